"""Feed-forward layers whose first hidden units are smaller layers of their own: the definition ("MatFormer", 2023)."""

from __future__ import annotations

from torch import Tensor

from mmkernels.reference.linear import activate, affine, linear, mlp


def nested_mlp(
    x: Tensor,
    width: int,
    w_in: Tensor,
    w_out: Tensor,
    *,
    w_gate: Tensor | None = None,
    activation: str | None = "silu",
    activation_on_product: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The feed-forward layer of the first `width` hidden units; `activation_on_product`: of the product of gate and up, as
    MatFormer's code was released."""
    up, out = w_in[:width], w_out[:, :width]
    if w_gate is not None and activation_on_product:
        hidden = activate(affine(x, w_gate[:width], None) * affine(x, up, None), activation)
        return linear(hidden, out, residual=residual)
    return mlp(x, up, out, w_gate=None if w_gate is None else w_gate[:width], activation=activation, residual=residual)
