"""The AVX-512 and AMX kernels on a processor with AVX2 alone: the same source through SIMDe and tiles in memory, under the
whole generic suite."""

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

import mmkernels
from mmkernels import runtime


@pytest.mark.full
def test_higher_tiers_through_emulation(tmp_path: Path) -> None:
    if "avx512" in runtime.available_isas():
        return  # the real one is tested by every test that takes the fixture `isa`
    if runtime.best_isa() != "avx2" or not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("needs AVX2 and SIMDe's headers (Debian and Ubuntu: libsimde-dev)")
    build = tmp_path / "build"
    build.mkdir()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = [f"-DTORCH_DIR={Path(torch.__file__).parent}", "-DMMK_CUDA=OFF", "-DMMK_EMULATE_AVX512=ON"]
    for command in (["cmake", "-G", "Ninja", *options, str(ROOT)], ["ninja", "mmkernels_cpu"]):
        done = subprocess.run(command, cwd=build, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    package = tmp_path / "site" / "mmkernels"
    shutil.copytree(Path(mmkernels.__file__).parent, package)
    shutil.copy2(build / "libmmkernels_cpu.so", package / "lib")
    environment["PYTHONPATH"] = str(package.parent)
    environment["MMK_TEST_EMULATE_AVX512"] = "1"  # for the fixture `blocks`
    code = "import mmkernels as mk; print(mk.runtime.available_isas()[-1], mk.__file__)"
    which = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert which.stdout.split() == ["amx", str(package / "__init__.py")]
    tests = [
        str(ROOT / "python_tests" / name)
        for name in (
            "test_cards.py",
            "test_token_roll.py",
            "test_linear.py",
            "test_norm.py",
            "test_attention.py",
            "test_attention_bfloat16.py",
            "test_window_attention.py",
            "test_qk_norm_rope.py",
            "test_silu_attention.py",
            "test_linear_attention.py",
            "test_hash_attention.py",
            "test_routing.py",
            "test_moe.py",
            "test_blocks.py",
            "test_math.py",
        )
    ]
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "pytest"),
            "-k",
            "avx512 or amx or tiers_agree or any_",
            "--rootdir",
            str(ROOT),
            *tests,
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 300, done.stdout[-400:]
