"""What the forward passes of replaced modules share: activations by name, layers that are called or fused."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.integrations.rules import full_name
from mmkernels.nn.linear import untouched
from mmkernels.nn.tensor_classes import op_takes

# An activation that the ops have no name for.
UNKNOWN: Final = "unknown"

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# In the place of a dropout layer that a module has none of.
NO_DROP: Final = nn.Dropout(0.0)

_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}

_CLASSES: dict[str, str | None] = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": "gelu",  # or "gelu_tanh": its attribute says
    "torch.nn.modules.linear.Identity": None,
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.FastGELUActivation": "gelu_tanh",  # its constants have ten digits
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
}


def activation_name(activation: Any) -> str | None:
    """The name that the ops have for an activation, a module or a function: None is the identity, UNKNOWN is no name."""
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation, UNKNOWN)
    kind = type(activation)
    name = _CLASSES.get(full_name(kind), UNKNOWN)
    if name == UNKNOWN or not untouched(activation, kind):
        return UNKNOWN
    if name == "gelu" and getattr(activation, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name


def drop_of(layer: nn.Module) -> nn.Module:
    """The dropout layer that :func:`mmkernels.nn.mlp.feed_forward` takes for one that may be the identity."""
    return NO_DROP if untouched(layer, nn.Identity) else layer


def stands_in(layer: nn.Module, kind: type) -> bool:
    """Whether a part is a swapped one of `kind` whose work its parent may do: nobody listens to it."""
    return isinstance(layer, kind) and untouched(layer, type(layer))


def unusual(parameter: Tensor | None) -> str | None:
    """Why the ops do not take a parameter, of a module that has lazy, quantised or other ones; None where they do."""
    if parameter is None:
        return None
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "its parameters have no shape before the first call: swap after it"
    if parameter.dtype not in DTYPES:
        return f"its weight is {parameter.dtype}"
    return None if op_takes(parameter) else f"its weight is a {type(parameter).__name__}"


def unusual_norm(norm: Any) -> str | None:
    """Why the ops do not compute a norm like torch's; None where they do."""
    if len(norm.normalized_shape) != 1:
        return f"it normalises over {len(norm.normalized_shape)} dimensions"
    return unusual(norm.weight)
