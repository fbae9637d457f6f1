"""nn.Linear with its activation and residual in the same pass, and its weight packed in eval mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mmkernels.nn.packed import Packing, WeightPack
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.linear import linear
from mmkernels.ops.packed_linear import PackedLinear
from mmkernels.reference.linear import ACTIVATIONS, activate


def check_activation(activation: Any) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(str, ACTIVATIONS))}, got {activation!r}")


class Linear(Packing, nn.Linear):
    """activation(x W^T + bias) + residual: nn.Linear through :func:`mmkernels.linear`.

    Parameters and state_dict keys are those of nn.Linear, so either loads the other's weights. In eval mode on the CPU the
    weight is kept packed beside itself, which takes its memory again; it is packed by ``eval()``, and again by whatever
    changes it (:mod:`mmkernels.nn.packed` has the rules). Writes that torch does not count (into ``weight.data`` or a NumPy
    view) need :meth:`repack`. Copies, pickles and files hold the plain weight alone.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        packed_dtype: None, or torch.int8 to quantise in eval mode: each output channel of the weight, and x row by row.
            Training, an exported program and whatever cannot be packed compute in the dtype of the weight.
        kernels: True runs the op, False plain torch. May be set at any time. Weights or inputs of other tensor classes
            (DTensor) always run plain torch.

    Raises:
        ValueError: activation or packed_dtype is none of these.

    Source: nn.Linear; int8 as in "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022), without its
    outliers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        check_activation(activation)
        pack = WeightPack(packed_dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.kernels = kernels
        self._pack = pack

    @property
    def packed_dtype(self) -> torch.dtype | None:
        """torch.int8, or None: the weight's own."""
        return self._pack.dtype

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features].

        Args:
            x: in the dtype of the weight (beside int8, any of at most 32 bits).
            residual: None, or what expands to the output's shape; added last.

        Raises:
            TypeError, ValueError: with kernels, as :func:`mmkernels.linear`.
        """
        return run(self, x, self.activation, residual)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, activation={self.activation}, packed_dtype={self.packed_dtype}, kernels={self.kernels}"
        )


# --- what the modules made of linear layers share ---------------------------------------------------------------------
def operand(layer: Linear) -> tuple[Tensor | PackedLinear, Tensor | None] | None:
    """(weight, bias) of the layer as an op takes them, (pack, None) where there is a pack; None where it takes none."""
    weight, bias = layer.weight, layer.bias
    if not op_takes(weight, bias):
        return None
    packed = None if layer.training else layer._pack.of(weight, bias)
    return (weight, bias) if packed is None else (packed, None)


def run(layer: Linear, x: Tensor, activation: str | None, residual: Tensor | None = None) -> Tensor:
    """The layer with another activation than its own."""
    if layer.kernels and op_takes(x, residual):
        taken = operand(layer)
        if taken is not None:
            return linear(laid_out(x), *taken, activation=activation, residual=residual)
    out = activate(F.linear(x, layer.weight, layer.bias), activation)
    return out if residual is None else out + residual


def untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is no more than the forward of `kind`, so that a fused op may do it instead: nothing stands
    in its place (an adapter, a parametrization), no hook listens, and nobody has set a forward of its own."""
    return not layer._forward_hooks and unchanged(layer, kind)


def unchanged(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """The same, whoever listens to what the layer gives."""
    return (
        type(layer) is kind
        and "forward" not in layer.__dict__
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and not _has_any_global_hook()
    )


def untouched_linear(layer: nn.Module) -> bool:
    return untouched(layer, Linear) and layer.activation is None and bool(layer.kernels)


def activated(layer: nn.Module, x: Tensor, activation: str | None) -> Tensor:
    """activation(layer(x)), in one pass where the layer is our own and nobody listens to what it gives."""
    return run(layer, x, activation) if untouched_linear(layer) else activate(layer(x), activation)  # type: ignore[arg-type]


def added(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """layer(x) + residual, in one pass where the layer is our own and nobody listens to what it gives."""
    if residual is None or not untouched_linear(layer):
        out = layer(x)
        return out if residual is None else out + residual
    return run(layer, x, None, residual)  # type: ignore[arg-type]
