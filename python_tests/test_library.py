"""The compiled libraries: what they need of others, which tier runs, the trace, poisoned outputs, errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import mmkernels as mk
from mmkernels import runtime
from mmkernels.ops.entry import translated

sys.path.insert(0, str(ROOT / "csrc"))
import audit

LIBRARIES = [runtime.CPU_LIBRARY, *([runtime.CUDA_LIBRARY] if runtime.build_record()["cuda"] else [])]
over_libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with more environment; the source folder is not on its path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
        check=False,
    )


# --- ABI ----------------------------------------------------------------------------------------------------------------
def shims_of_torch_2_10() -> set[str]:
    folder = ROOT / "python_tests" / "abi"
    lines = [line for name in ("cpu", "cuda") for line in (folder / f"torch_2_10_{name}.txt").read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("#")}


@over_libraries
def test_needs_only_the_stable_abi_of_torch_2_10(library: Path) -> None:
    """No C++ symbol of torch, no symbol younger than 2.10, no Python symbol: one wheel serves every Python and torch."""
    undefined = {symbol.split("@")[0] for symbol in audit.undefined_symbols(library)}
    of_torch = {s for s in undefined if re.match(r"(aoti_torch|torch)_", s)}
    assert of_torch, "the library uses torch, so the audit must see it"
    assert of_torch <= shims_of_torch_2_10()
    assert not [s for s in undefined if re.match(r"_?Py[A-Z_]", s)], "Python's C API"
    assert not [s for s in undefined if re.search(r"(2at|3c10|5torch|6caffe2)\d", s)], "C++ symbols of torch"


@over_libraries
def test_exports_only_its_own_c_functions(library: Path) -> None:
    """Nothing that could be taken for, or replaced by, another library's symbol of the same name."""
    listing = subprocess.run(["nm", "-D", "--defined-only", "-C", library], check=True, capture_output=True, text=True)
    exported = {line.split(None, 2)[2] for line in listing.stdout.splitlines()}
    ours = {name for name in exported if name.startswith("mmk_")}
    # What is left are the C++ library's own templates (std::vector<...> and their like), which every library emits.
    assert not [name for name in exported - ours if "mmk" in name]


def test_requirements_and_wheel_tag_are_stated() -> None:
    needed = audit.requirements(LIBRARIES)
    policy = audit.manylinux_policy(needed)
    assert needed["GLIBC"] <= (2, 34) and needed["GLIBCXX"] <= (3, 4, 29), "a newer floor shuts users out: mean it"
    assert runtime.build_record()["platform_tag"] == f"manylinux_{policy}_{os.uname().machine}"


def test_policy_grows_with_the_needs() -> None:
    assert audit.manylinux_policy({"GLIBC": (2, 17)}) == "2_28"
    assert audit.manylinux_policy({"GLIBC": (2, 28), "GLIBCXX": (3, 4, 29)}) == "2_34"
    assert audit.manylinux_policy({"GLIBC": (2, 99)}) is None


def test_weak_symbols_in_a_tier_are_found(tmp_path: Path) -> None:
    """The audit that every build runs over the tiers' objects: an inline function of a shared header is caught."""
    compiler = shutil.which("c++")
    assert compiler is not None, "the tests need the compiler that built the libraries"
    sources = {
        "bad": "inline int shared(int x) { return x + 1; } int (*keep)(int) = shared;",
        "good": "namespace { inline int own(int x) { return x + 1; } } int (*keep)(int) = own;",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.cpp").write_text(text)
        subprocess.run([compiler, "-c", tmp_path / f"{name}.cpp", "-o", tmp_path / f"{name}.o"], check=True)
    assert [line.split(": ")[1] for line in audit.weak_symbols([tmp_path / "bad.o"])] == ["shared(int)"]
    assert audit.weak_symbols([tmp_path / "good.o"]) == []
    script = [sys.executable, ROOT / "csrc" / "audit.py"]
    assert subprocess.run([*script, tmp_path / "bad.o"], check=False, capture_output=True).returncode == 1
    assert subprocess.run([*script, tmp_path / "good.o"], check=False, capture_output=True).returncode == 0


# --- tiers --------------------------------------------------------------------------------------------------------------
def test_tiers_are_ordered_and_can_be_forced() -> None:
    assert runtime.available_isas()[0] == "generic" and runtime.available_isas()[-1] == runtime.best_isa()
    before = runtime.isa()
    for name in runtime.available_isas():
        with runtime.forced_isa(name):
            assert runtime.isa() == name
    assert runtime.isa() == before


def test_a_tier_beyond_the_processor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^isa: "):
        runtime.set_isa("sse9")
    for name in set(runtime.ISA_NAMES) - set(runtime.available_isas()):
        with pytest.raises(ValueError, match=r"^isa: this processor offers"):
            runtime.set_isa(name)


def test_environment_forces_a_tier() -> None:
    for name in runtime.available_isas():
        code = (
            "import torch, mmkernels as mk; mk.token_roll(torch.ones(2, 9, 4), 2); "
            "print(mk.runtime.isa(), mk.last_kernels()[-1][1])"
        )
        done = run_python(code, MMKERNELS_ISA=name)
        isa, kernel = done.stdout.split()
        assert isa == name and kernel == f"cpu/{'avx512' if name == 'amx' else name}", done.stderr
    refused = run_python("import mmkernels", MMKERNELS_ISA="sse9")
    assert refused.returncode != 0 and "MMKERNELS_ISA=sse9" in refused.stderr


def test_cache_is_what_linux_says() -> None:
    """sysfs and not the C library, whose answer for a virtual machine can be many times too large."""
    sizes = [Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") for index in (3, 2)]
    said = next((path.read_text().strip() for path in sizes if path.exists()), None)
    if said is not None:
        assert runtime.cache_bytes() == int(said[:-1]) << {"K": 10, "M": 20}[said[-1]]
    before = runtime.cache_bytes()
    with runtime.assumed_cache_bytes(0):
        assert runtime.cache_bytes() == 0
    assert runtime.cache_bytes() == before > 0


# --- trace, poison, errors ----------------------------------------------------------------------------------------------
def test_trace_lists_what_ran_oldest_first() -> None:
    mk.last_kernels(clear=True)
    x = torch.ones(2, 9, 4)
    mk.token_roll(x, 2)
    mk.token_roll_layer_norm(x, 2, None, None, 1e-6)
    runtime.record_kernel("from_python", "triton")
    names = [op for op, _ in mk.last_kernels(clear=True)]
    assert names == ["token_roll", "token_roll_layer_norm", "from_python"]
    assert mk.last_kernels() == []


def test_trace_keeps_the_newest() -> None:
    mk.last_kernels(clear=True)
    for i in range(300):
        runtime.record_kernel(f"op{i}", "reference")
    names = [op for op, _ in mk.last_kernels(clear=True)]
    assert names == [f"op{i}" for i in range(44, 300)]


def test_poison_reaches_outputs() -> None:
    """An output that no kernel writes is NaN under poison: an empty roll of rows that exist has nothing to write, so the
    statistics of a call without channels show it."""
    with runtime.poisoned_outputs():
        _, _, stats = torch.ops.mmkernels.token_roll_layer_norm(torch.ones(2, 9, 4), 2, 8, [], None, None, 1e-6, True, False)
        assert not stats.isnan().any(), "every element was written over the poison"
        grads = torch.ops.mmkernels.token_roll_layer_norm_backward(
            None, None, torch.ones(2, 9, 4), stats, 2, 8, [], None, None, True, True
        )
        assert all(not g.isnan().any() for g in grads)


def test_c_errors_become_value_errors_in_eager_code() -> None:
    x = torch.ones(2, 9, 4)
    with pytest.raises(RuntimeError, match=r"mmkernels: num_frames: ") as caught:
        torch.ops.mmkernels.token_roll(x, 5, 8, [])
    error = translated(caught.value)
    assert type(error) is ValueError and str(error).startswith("num_frames: must divide the 2 rows")
    other = RuntimeError("out of memory")
    assert translated(other) is other


def test_explain_says_why_not() -> None:
    explanation = mk.explain("token_roll", torch.ones(2, 9, 4), 2)
    assert explanation.kernel == f"cpu/{'avx512' if runtime.isa() == 'amx' else runtime.isa()}"
    assert explanation.reasons == {"cpu": None}
    with pytest.raises(ValueError, match=r"^op: .*token_roll"):
        mk.explain("no_such_op")
    with pytest.raises(TypeError):
        mk.explain(mk.token_roll, torch.ones(2, 9, 4), 2, nonsense=1)


def test_info_tells_the_truth() -> None:
    info = mk.info()
    assert info.version == mk.__version__ and info.torch == torch.__version__
    assert info.isa == runtime.isa() and set(info.isas) == set(runtime.available_isas())
    assert {op["name"] for op in info.ops} >= {"token_roll", "token_roll_layer_norm"}
    assert all("cpu" in op["backends"] and "reference" in op["backends"] for op in info.ops)
    text = str(info)
    assert mk.__version__ in text and runtime.build_record()["platform_tag"] in text


def test_import_needs_neither_triton_nor_matplotlib() -> None:
    """A plain import loads torch and numpy and nothing that a user may lack."""
    code = (
        "import sys\n"
        "for name in ('triton', 'matplotlib', 'av', 'rich', 'typer', 'pybind11'): sys.modules[name] = None\n"
        "import torch, mmkernels as mk\n"
        "assert mk.token_roll(torch.ones(2, 9, 4), 2).shape == (2, 9, 4)\n"
        "print(mk.info())"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "cannot be imported" in done.stdout
