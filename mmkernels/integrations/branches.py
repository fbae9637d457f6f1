"""Residual blocks that others wrote: their branches, and the layers between a branch and the sum."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.integrations.parts import stands_in
from mmkernels.integrations.rules import Swapped, full_name
from mmkernels.nn.linear import operand, untouched, untouched_linear
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.entry import autocast_dtype
from mmkernels.ops.linear import linear

# Layers that drop whole branches of some samples, in training.
_DROP_PATHS = ("timm.layers.drop.DropPath",)


class Branch(Swapped):
    """A replaced attention layer or MLP, whose last layer can add the residual in the same pass."""

    def added_to(self, residual: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """forward(...) + residual."""
        raise NotImplementedError


def plus(out: Tensor, residual: Tensor | None) -> Tensor:
    return out if residual is None else residual + out


def passes(layer: nn.Module) -> bool:
    """Whether calling the layer gives back what it is given, and nobody listens: Identity, or dropout of nothing."""
    kind = type(layer)
    if not untouched(layer, kind):
        return False
    if kind is nn.Identity:
        return True
    if kind is nn.Dropout:
        return not layer.training or layer.p == 0  # type: ignore[operator]
    return full_name(kind) in _DROP_PATHS and (not layer.training or layer.drop_prob == 0)  # type: ignore[operator]


def joined(residual: Tensor, branch: nn.Module, after: tuple[nn.Module, ...], *args: Any, **kwargs: Any) -> Tensor:
    """residual + after(branch(...)): in the branch's last layer, where nothing is done after it and nobody listens."""
    if stands_in(branch, Branch) and residual.dtype == args[0].dtype:
        for layer in after:
            if not passes(layer):
                break
        else:
            return branch.added_to(residual, *args, **kwargs)  # type: ignore[operator]
    out = branch(*args, **kwargs)
    for layer in after:
        out = layer(out)
    return residual + out


def biased(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, layer.weight, bias), as it is written where a projection's bias is kept apart from it; the layer itself
    where there is none."""
    if bias is None:
        return layer(x)
    ours = untouched_linear(layer) and layer.bias is None and op_takes(x, bias)
    taken = operand(layer) if ours else None  # type: ignore[arg-type]
    if taken is None:
        return F.linear(x, layer.weight, bias)  # type: ignore[arg-type]
    weight, _ = taken
    if isinstance(weight, Tensor):
        return linear(laid_out(x), weight, bias)
    dtype = autocast_dtype(x)  # a pack has no bias but its own; as a residual it does not widen what autocast narrows
    return linear(laid_out(x), weight, residual=bias if dtype is None else bias.to(dtype))
