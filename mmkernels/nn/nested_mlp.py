"""A feed-forward layer that holds smaller ones: its first hidden units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.nn.linear import check_activation
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.parameters import new_parameter, uniform
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.checks import check_int
from mmkernels.ops.nested_mlp import nested_mlp
from mmkernels.reference import nested_mlp as reference


class NestedMlp(KernelSwitch):
    """A feed-forward layer of the first `width` of its hidden units, through :func:`mmkernels.nested_mlp`.

    The width is an argument of a call, or the attribute `width`, the widest at first, which may be set layer by layer
    (MatFormer's Mix'n'Match). Gradients of the other units' weights are exactly 0.

    Parameters: w_in, w_gate [hidden, dim], w_out [dim, hidden].

    Args:
        dim: C. hidden: H, the widest layer's units.
        widths: those that may be chosen, 1 to H each (MatFormer: H / 8, H / 4, H / 2, H).
        gated: activation(x W_gate^T) * (x W_in^T) instead of activation(x W_in^T).
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        activation_on_product: activation of the product of gate and value, as MatFormer's code was released.
        kernels: True runs the op, False plain torch, as tensors of other classes (DTensor) always do. May be set any time.
        device, dtype: as in nn.Linear.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: "MatFormer: Nested Transformer for Elastic Inference" (2023).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        widths: Sequence[int],
        *,
        gated: bool = True,
        activation: str | None = "silu",
        activation_on_product: bool = False,
        kernels: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        for name, value in {"dim": dim, "hidden": hidden}.items():
            check_int(value, name, 1)
        if not widths:
            raise ValueError("widths: expected at least one")
        for width in widths:
            check_int(width, "widths", 1)
            if width > hidden:
                raise ValueError(f"widths: expected at most hidden, {hidden}, got {width}")
        if activation_on_product and not gated:
            raise ValueError("activation_on_product: expected False without gated")
        super().__init__()
        self.dim, self.hidden, self.widths = dim, hidden, tuple(widths)
        self.activation, self.activation_on_product = activation, activation_on_product
        self.w_in = new_parameter((hidden, dim), device, dtype)
        self.w_gate = new_parameter((hidden, dim), device, dtype) if gated else None
        self.w_out = new_parameter((dim, hidden), device, dtype)
        self.width = max(widths)
        self.kernels = kernels
        self.reset_parameters()

    @property
    def width(self) -> int:
        """Hidden units of a call that names none."""
        return self._width

    @width.setter
    def width(self, width: int) -> None:
        self._width = self._checked(width)

    def _checked(self, width: int) -> int:
        if width not in self.widths:
            raise ValueError(f"width: expected one of {', '.join(map(str, self.widths))}, got {width!r}")
        return width

    def reset_parameters(self) -> None:
        """As nn.Linear."""
        uniform(self.w_in, self.dim)
        if self.w_gate is not None:
            uniform(self.w_gate, self.dim)
        uniform(self.w_out, self.hidden)

    def forward(self, x: Tensor, width: int | None = None, residual: Tensor | None = None) -> Tensor:
        """x [..., dim] -> [..., dim].

        Args:
            x: in the dtype of the weights.
            width: hidden units, one of widths; None: those of the attribute.
            residual: None, or what expands to the output's shape; added last.

        Raises:
            ValueError: width is none of these.
            TypeError, ValueError: with kernels, as :func:`mmkernels.nested_mlp`.
        """
        width = self.width if width is None else self._checked(width)
        on = self.kernels and op_takes(x, self.w_in, self.w_gate, self.w_out, residual)
        return (nested_mlp if on else reference.nested_mlp)(
            x,
            width,
            self.w_in,
            self.w_out,
            w_gate=self.w_gate,
            activation=self.activation,
            activation_on_product=self.activation_on_product,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, widths={self.widths}, width={self.width}, "
            f"gated={self.w_gate is not None}, activation={self.activation}, {super().extra_repr()}"
        )
