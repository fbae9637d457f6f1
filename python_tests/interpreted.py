"""Starts the scripts that run Triton kernels in Triton's interpreter, which needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT


def checks_of(script: str, *arguments: str) -> int:
    """How many checks a script of this folder printed; what it wrote is the error where it failed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "python_tests" / f"{script}.py"), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "python_tests")},
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.count("checked")
