"""Options of ``python -m pytest bench``."""

from __future__ import annotations

import os

import pytest

from mmkernels.bench.supervisor import TUNED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"), help="where the benchmark cases run")


def pytest_report_header() -> str:
    """malloc reads its settings when a process starts, so this one can only say what it was started with."""
    if all(os.environ.get(name) == value for name, value in TUNED.items()):
        return "allocator: tuned"
    return f"allocator: stock; for the tuned one start with {' '.join(f'{name}={value}' for name, value in TUNED.items())}"


@pytest.fixture(scope="session")
def bench_device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--bench-device"))
