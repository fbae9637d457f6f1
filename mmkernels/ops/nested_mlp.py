"""Feed-forward layers whose first hidden units are smaller layers of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.ops.checks import check_int, check_matrix, check_tokens
from mmkernels.ops.linear import linear, mlp
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference.linear import activate


def _check(x: Any, width: Any, w_in: Any, w_out: Any, w_gate: Any, activation_on_product: Any) -> None:
    check_tokens(x, "x", "[..., C]", DTYPES)
    check_matrix(w_in, "w_in", "[H, C]", DTYPES)
    if w_in.shape[1] != x.shape[-1]:
        raise ValueError(f"w_in: expected [H, {x.shape[-1]}], got {tuple(w_in.shape)}")
    check_matrix(w_out, "w_out", "[N, H]", DTYPES)
    check_int(width, "width", 0)
    if width > w_in.shape[0]:
        raise ValueError(f"width: expected at most the hidden units, {w_in.shape[0]}, got {width}")
    if w_out.shape[1] != w_in.shape[0]:
        raise ValueError(f"w_out: expected [N, {w_in.shape[0]}], got {tuple(w_out.shape)}")
    if w_gate is not None:
        check_matrix(w_gate, "w_gate", "[H, C]", DTYPES)
        if w_gate.shape != w_in.shape:
            raise ValueError(f"w_gate: expected the shape of w_in, {tuple(w_in.shape)}, got {tuple(w_gate.shape)}")
    if activation_on_product and w_gate is None:
        raise ValueError("activation_on_product: expected a w_gate")


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
    """A feed-forward layer of the first `width` hidden units: one of those nested in a wider one.

    :func:`mmkernels.mlp` of the first `width` rows of w_in and w_gate and the first `width` columns of w_out, which are not
    copied. Gradients of the other rows and columns are exactly 0.

    Args:
        x: [..., C]; float32, bfloat16, float16 or float64.
        width: hidden units, 0 to H.
        w_in, w_gate: [H, C]. w_out: [N, H]. In the dtype of x.
        activation: as in mmkernels.mlp.
        activation_on_product: activation(gate * up) instead of activation(gate) * up, as MatFormer's code was released.
        residual: as in mmkernels.mlp; added last.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError, ValueError: as mmkernels.mlp; width out of range.
        NotImplementedError: a second derivative.

    Source: "MatFormer: Nested Transformer for Elastic Inference" (2023).
    """
    _check(x, width, w_in, w_out, w_gate, activation_on_product)
    up, out = w_in[:width], w_out[:, :width]
    if not activation_on_product:
        gate = None if w_gate is None else w_gate[:width]
        return mlp(x, up, out, w_gate=gate, activation=activation, residual=residual)
    assert w_gate is not None  # _check saw to it
    return linear(activate(linear(x, w_gate[:width]) * linear(x, up), activation), out, residual=residual)
