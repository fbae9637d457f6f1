"""Triton kernels without a GPU: the interpreter says that they are right, the compiler that they fit the hardware."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import float_atomics
import pytest
from interpreted import checks_of

import mmkernels.triton
from mmkernels import runtime
from mmkernels.cards import all_cards

MODULES = {module.name for module in pkgutil.iter_modules(mmkernels.triton.__path__)}
FAMILIES = sorted(MODULES & {card.family for card in all_cards()})
# Whose tiles differ by the make of the GPU: test_triton_<family>.py compiles them.
OWN_GATE = {"attention", "linear_attention", "moe", "routing", "window_attention"}
SLOW = {"linear_attention", "window_attention"}  # to interpret
FLOATS = ("*fp32", "*bf16", "*fp16")

# Target -> shared memory that one block may have, in bytes (CUDA programming guide; CDNA 3 ISA: 64 KiB LDS).
TARGETS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


def test_every_family_on_a_card_has_its_kernels_here() -> None:
    expected = {card.family for card in all_cards() if any(b.name == "triton" for b in card.backends)}
    assert expected == set(FAMILIES)


def interpreted() -> Iterator[Any]:
    """Of those that take long some of the samples; all are in the exhaustive suite."""
    brief, all_dtypes = ("float32-brief", "bfloat16-brief"), ("float32", "bfloat16", "float16")
    for family in FAMILIES:
        default, others = (brief, all_dtypes) if family in SLOW else (all_dtypes[:2], all_dtypes[2:])
        yield pytest.param(family, default, id=f"{family}-{'-'.join(default)}")
        yield pytest.param(family, others, id=f"{family}-{'-'.join(others)}", marks=pytest.mark.full)


@pytest.mark.parametrize(("family", "dtypes"), list(interpreted()))
def test_interpreter(family: str, dtypes: tuple[str, ...]) -> None:
    """Every sample, every operator, on the CPU (triton_interpreter.py)."""
    assert checks_of("triton_interpreter", family, *dtypes) > 10


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=full, constexprs=positions)
    return triton.compile(source, target=gpu, options=options)


def nvidia_tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def stack_bytes(binary: bytes | Path, folder: Path) -> list[int]:
    """Stack and local memory of every kernel in a cubin or a library: where spilled registers go."""
    if isinstance(binary, bytes):
        path = folder / "kernel.cubin"
        path.write_bytes(binary)
    else:
        path = binary
    done = subprocess.run(
        [nvidia_tool("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True, check=True
    )
    usage = re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", done.stdout)
    assert usage, done.stdout + done.stderr
    return [int(stack) + int(local) for stack, local in usage]


def keeps_in_local_memory(cubin: bytes, folder: Path) -> bool:
    """Whether a kernel has registers spilt. Now and then ptxas reserves 8 bytes of stack that no instruction
    touches ("8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"): these are none."""
    if stack_bytes(cubin, folder) == [0]:
        return False
    done = subprocess.run(
        [nvidia_tool("cuobjdump"), "--dump-sass", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    assert "EXIT" in done.stdout, done.stdout + done.stderr
    return re.search(r"\b(?:LDL|STL)\b", done.stdout) is not None


def assert_no_float_atomics(asm: dict[str, Any], name: str) -> None:
    """Of a compiled Triton kernel: its results hang on no order in which blocks come (float_atomics.py)."""
    found = float_atomics.in_ptx(asm["ptx"]) if "ptx" in asm else float_atomics.in_gcn(asm["amdgcn"])
    assert not found, f"{name}: {found}"


def assert_fits(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], target: str, tmp: Path
) -> None:
    result = compiled(kernel, signature, constants, options, target)
    assert result.metadata.shared <= TARGETS[target], f"{result.metadata.shared} bytes of shared memory"
    if target.startswith("sm_"):
        assert not keeps_in_local_memory(result.asm["cubin"], tmp), "registers spill"
    else:
        spills = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", result.asm["amdgcn"])
        assert spills and set(spills) == {"0"}, f"registers spill: {spills}"
    assert_no_float_atomics(result.asm, kernel.fn.__name__)


def configurations() -> Iterator[Any]:
    """All configurations that a launch can choose. Of those in half precision that differ in their element types alone, only
    the first is in the default suite."""
    seen = set()
    for family in sorted(set(FAMILIES) - OWN_GATE):
        for kernel, signature, constants, options in importlib.import_module(f"mmkernels.triton.{family}").configurations():
            elements = "-".join(kind[1:] for kind, _ in groupby(s for s in signature.values() if s in FLOATS))
            flags = "-".join(f"{k}={v}" for k, v in constants.items() if v is not True)
            name = f"{kernel.fn.__name__}-{elements}-{flags}"
            same = (kernel.fn.__name__, flags, elements == "fp32")
            marks = [pytest.mark.full] if same in seen else []
            seen.add(same)
            yield pytest.param(kernel, signature, constants, options, id=name, marks=marks)


@pytest.mark.parametrize(("kernel", "signature", "constants", "options"), list(configurations()))
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_and_fits(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], target: str, tmp_path: Path
) -> None:
    assert_fits(kernel, signature, constants, options, target, tmp_path)


def test_gate_sees_spills(tmp_path: Path) -> None:
    """The gate itself: a kernel that holds far more than the registers of one warp fails it."""
    from triton_greedy import greedy_kernel

    with pytest.raises(AssertionError, match="spill"):
        assert_fits(greedy_kernel, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 32768}, {"num_warps": 1}, "sm_80", tmp_path)


def test_cuda_library_spills_nothing(tmp_path: Path) -> None:
    """The compiled CUDA kernels of every architecture: no stack, no local memory. (Without nvcc there are none.)"""
    if not runtime.build_record()["cuda"]:
        assert not runtime.CUDA_LIBRARY.exists()
        return
    usage = stack_bytes(runtime.CUDA_LIBRARY, tmp_path)
    assert len(usage) >= 3 and set(usage) == {0}


def test_cuda_library_has_no_float_atomics() -> None:
    """Its instructions for every architecture. (Without nvcc there are none.)"""
    if not runtime.build_record()["cuda"]:
        assert not runtime.CUDA_LIBRARY.exists()
        return
    command = [nvidia_tool("cuobjdump"), "--dump-sass", runtime.CUDA_LIBRARY]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert sass.count("Function :") >= 3
    assert float_atomics.in_sass(sass) == []


ATOMICS = {
    "ptx": (
        ("atom.global.gpu.acq_rel.add.f32", "red.global.add.noftz.bf16x2", "atom.shared.cas.b32", "red.relaxed.gpu.max.f64"),
        ("atom.global.add.u32", "red.shared.add.s64", "redux.sync.add.s32", "add.rn.f32", "cvt.rn.bf16x2.f32"),
    ),
    "sass": (
        (
            "RED.E.ADD.F32.FTZ.RN.STRONG.GPU",
            "ATOMG.E.ADD.F16x2.RN",
            "REDG.E.ADD.BF16_V2",
            "ATOMS.CAST.SPIN",
            "ATOM.E.MAX.F64",
        ),
        ("REDUX.SUM", "RED.E.ADD.STRONG.GPU", "ATOMS.ADD", "ATOMG.E.ADD.S32", "HADD2.BF16_V2", "F2F.F32.F64"),
    ),
    "gcn": (
        ("global_atomic_add_f32", "ds_add_rtn_f32", "buffer_atomic_pk_add_bf16", "flat_atomic_max_f64", "ds_cmpst_b32"),
        ("global_atomic_add", "ds_add_u32", "v_add_f32", "ds_read_b64", "buffer_load_dwordx4", "v_max_f64"),
    ),
}


@pytest.mark.parametrize("language", ATOMICS)
def test_float_atomics_are_told_from_others(language: str) -> None:
    find = getattr(float_atomics, f"in_{language}")
    forbidden, allowed = ATOMICS[language]
    assert [bool(find(f"  {text} r1, [r2];")) for text in forbidden] == [True] * len(forbidden)
    assert [text for text in allowed if find(f"  {text} r1, [r2];")] == []


def test_gate_sees_float_atomics(tmp_path: Path) -> None:
    """The gate itself: a kernel that adds to one number from every block fails it, on every target."""
    from triton_greedy import adding_kernel

    for target in TARGETS:
        with pytest.raises(AssertionError, match="adding_kernel"):
            assert_fits(adding_kernel, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 256}, {"num_warps": 1}, target, tmp_path)
