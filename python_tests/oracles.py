"""The packages whose models tests swap: `pip install '.[test-oracles]'`."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from mmkernels.integrations.packages import require


def oracle(package: str) -> ModuleType:
    """The package; where it is not installed, the test module that asks for it is skipped."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install '.[test-oracles]'", allow_module_level=True)
    return require(package)
