"""Fixtures and the header that says what this machine could test."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mmkernels as mk
from mmkernels import runtime

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Under xdist every worker is a process of its own: the threads of all of them together fill the machine.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_report_header(config: pytest.Config) -> str:
    absent = [name for name in runtime.ISA_NAMES if name not in runtime.available_isas()]
    tiers = f"tiers tested here: {', '.join(runtime.available_isas())}"
    return f"mmkernels {mk.__version__}, torch {torch.__version__}; {tiers}" + (
        f"; this processor cannot run: {', '.join(absent)}" if absent else ""
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`full` and `gpu` tests are left out unless -m asks for them; deselected, not skipped."""
    if config.getoption("-m"):
        return
    left_out = [item for item in items if item.get_closest_marker("full") or item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


# One family's share of the default suite, on two cores.
FAMILY_BUDGET_S = 60.0

_seconds: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[Path(report.nodeid.split("::")[0]).name] += report.duration


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The time of each file, so that a family that outgrows its budget shows."""
    workers = (
        int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")) or terminalreporter.config.getoption("numprocesses", 0) or 1
    )
    times = ", ".join(f"{name} {seconds / workers:.0f} s" for name, seconds in _seconds.most_common() if seconds >= 1)
    terminalreporter.write_line(f"time by file ({workers} workers; a family has {FAMILY_BUDGET_S:.0f} s): {times}")


@pytest.fixture(params=runtime.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every tier that this processor offers, in force one after the other."""
    with runtime.forced_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def built_extension(target: str) -> ModuleType:
    """A module of the test extension, built on first use for this Python."""
    from filelock import FileLock

    emulated = os.environ.get("MMK_TEST_EMULATE_AVX512") == "1"  # set by test_emulated.py
    build = ROOT / "build" / f"blocks-{sys.implementation.cache_tag}{'-emulated' if emulated else ''}"
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / "lock"):
        options = [
            f"-DTORCH_DIR={Path(torch.__file__).parent}",
            "-DMMK_CUDA=OFF",
            "-DMMK_TEST_EXTENSION=ON",
            f"-DMMK_EMULATE_AVX512={'ON' if emulated else 'OFF'}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            "-DPython3_FIND_VIRTUALENV=ONLY",
        ]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for command in (["cmake", "-G", "Ninja", *options, str(ROOT)], ["ninja", target]):
            done = subprocess.run(command, cwd=build, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"the test extension did not build:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    if str(build) not in sys.path:
        sys.path.insert(0, str(build))
    return importlib.import_module(target)


@pytest.fixture(scope="session")
def blocks() -> ModuleType:
    """The CPU core's building blocks."""
    return built_extension("mmkernels_blocks")


@pytest.fixture(scope="session")
def hopper() -> ModuleType:
    """The kernels for Hopper, in software."""
    return built_extension("mmkernels_hopper")
