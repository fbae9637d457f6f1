"""Reference PyTorch models of published systems, each with the kernels on or off.

Every module in this folder that has ``MODELS: dict[str, Callable[..., nn.Module]]`` adds its names to the list.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

__all__ = ["create_model", "list_models"]


@cache
def _makers() -> dict[str, Callable[..., nn.Module]]:
    makers: dict[str, Callable[..., nn.Module]] = {}
    for found in pkgutil.iter_modules(__path__):
        makers |= getattr(importlib.import_module(f"{__name__}.{found.name}"), "MODELS", {})
    return makers


def list_models() -> list[str]:
    """The names that :func:`create_model` takes, sorted."""
    return sorted(_makers())


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds a model with random weights; nothing is downloaded.

    Args:
        name: one of :func:`list_models`.
        **overrides: arguments of the model's class (``kernels=False``, ``depth=2``); they replace the named size's own.

    Raises:
        ValueError: the name is unknown. TypeError: the model has no such argument.
    """
    makers = _makers()
    if name not in makers:
        raise ValueError(f"model: expected one of {', '.join(sorted(makers))}, got {name!r}")
    return makers[name](**overrides)
