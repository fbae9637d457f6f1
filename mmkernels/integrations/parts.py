"""What the forward passes of replaced modules share: activations by name, layers that are called or fused."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.integrations.rules import full_name
from mmkernels.nn.linear import untouched

# An activation that the ops have no name for.
UNKNOWN: Final = "unknown"

_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}

_CLASSES: dict[str, str | None] = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": "gelu",  # or "gelu_tanh": its attribute says
    "torch.nn.modules.linear.Identity": None,
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}

# Class -> name, for classes that have been met: a dict by class is what a traced forward pass can look into.
_met: dict[type, str | None] = {}


def meet_activation(activation: Any) -> str | None:
    """:func:`activation_name`, while modules are being replaced: makes the activation's class known to it."""
    if isinstance(activation, nn.Module):
        name = full_name(type(activation))
        if name in _CLASSES:
            _met[type(activation)] = _CLASSES[name]
    return activation_name(activation)


def activation_name(activation: Any) -> str | None:
    """The name that the ops have for an activation, a module or a function: None is the identity, UNKNOWN is no name."""
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation, UNKNOWN)
    kind = type(activation)
    name = _met.get(kind, UNKNOWN)
    if name == UNKNOWN or not untouched(activation, kind):
        return UNKNOWN
    if name == "gelu" and getattr(activation, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name
