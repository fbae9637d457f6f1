"""Gated MLPs in Triton, beyond the samples of their card."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT


def test_interpreter() -> None:
    """Every activation, many tiles and exact ones, empty tensors, numbers that overflow, on the CPU (triton_glu.py)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "python_tests" / "triton_glu.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "python_tests")},
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("checked") > 100
