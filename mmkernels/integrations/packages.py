"""Optional packages, imported when they are asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

# The operators of torchvision whose absence its Python code does not survive.
_NEEDED_BY_TORCHVISION = ("nms", "qnms")


def require(package: str) -> ModuleType:
    """The package, imported; with a torchvision of another torch (PyPI's beside a CPU torch) too, which its Python code and
    whatever imports that do not outlive: the operators that it lacks are then declared, and calling them says that they have
    no kernel.

    Raises:
        ImportError: it is not installed; the message has the command that helps.
    """
    if package != "torchvision" and importlib.util.find_spec("torchvision") is not None:
        require("torchvision")
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = {"open_clip": "open_clip_torch"}.get(package, package)
        raise ImportError(f"this needs the package {error.name or package}: pip install {name}") from error
    except RuntimeError as error:
        if package != "torchvision" or "operator torchvision::" not in str(error):
            raise
        for operator in _NEEDED_BY_TORCHVISION:
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return importlib.import_module(package)
