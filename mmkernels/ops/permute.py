"""Tokens in the order of their experts and back, for experts of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import check_gradient, check_int, check_tensor, check_tokens
from mmkernels.ops.entry import define, differentiable, implement, not_differentiable, stats_dtype, wants_gradient
from mmkernels.ops.moe import check_ids, dense, dense_rows
from mmkernels.reference import permute as reference
from mmkernels.reference.moe import Dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_places(order: Any, positions: Any, beside: Tensor, beside_name: str) -> None:
    check_ids(order, "dispatch", "[T K]")
    check_ids(positions, "dispatch", "[T, K]")
    if order.shape[0] != positions.shape[0] * positions.shape[1]:
        raise ValueError(
            f"dispatch: expected an order of all {positions.shape[0] * positions.shape[1]} slots, got {tuple(order.shape)}"
        )
    for value in (order, positions):
        if value.device != beside.device:
            raise ValueError(f"dispatch: expected the device of {beside_name}, {beside.device}, got {value.device}")


def _check_tokens_of(x: Tensor, name: str, positions: Tensor) -> None:
    if x.shape[0] != positions.shape[0]:
        raise ValueError(f"{name}: expected the {positions.shape[0]} tokens of dispatch, got {x.shape[0]}")


def _check_most(max_slots: Any, order: Tensor) -> None:
    check_int(max_slots, "max_slots", 0)
    if max_slots > order.shape[0]:
        raise ValueError(f"max_slots: expected at most as many as there are slots, {order.shape[0]}, got {max_slots}")


def _check_permute(x: Any, order: Any, positions: Any, max_slots: Any) -> None:
    check_tensor(x, "x", "[T, C]", DTYPES)
    _check_places(order, positions, x, "x")
    _check_tokens_of(x, "x", positions)
    _check_most(max_slots, order)


def _check_weights(weights: Any, positions: Tensor, beside: Tensor) -> None:
    if weights.shape != positions.shape or weights.dtype != stats_dtype(beside) or weights.device != beside.device:
        raise ValueError(
            f"weights: expected {tuple(positions.shape)} in {stats_dtype(beside)} on {beside.device}, got "
            f"{tuple(weights.shape)} in {weights.dtype} on {weights.device}"
        )


def _check_unpermute(rows: Any, order: Any, positions: Any, weights: Any) -> None:
    check_tensor(rows, "rows", "[S, C]", DTYPES)
    _check_places(order, positions, rows, "rows")
    if rows.shape[0] > order.shape[0]:
        raise ValueError(f"rows: expected at most as many as there are slots, {order.shape[0]}, got {rows.shape[0]}")
    if weights is not None:
        _check_weights(weights, positions, rows)


def _check_unpermute_backward(
    grad: Any, rows: Any, order: Any, positions: Any, weights: Any, max_slots: Any, need_rows: bool
) -> None:
    check_tensor(grad, "grad", "[T, C]", DTYPES)
    check_gradient(grad, "grad", (positions.shape[0], grad.shape[1]), DTYPES, grad)
    _check_places(order, positions, grad, "grad")
    _check_most(max_slots, order)
    if weights is not None:
        _check_weights(weights, positions, grad)
    if rows is not None:
        _check_unpermute(rows, order, positions, weights)


# --- operators --------------------------------------------------------------------------------------------------------
def _fake_permute(x: Tensor, order: Tensor, positions: Tensor, max_slots: Any) -> Tensor:
    _check_permute(x, order, positions, max_slots)
    return torch.empty((max_slots, x.shape[1]), dtype=x.dtype, device=x.device)


def _fake_unpermute(rows: Tensor, order: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    _check_unpermute(rows, order, positions, weights)
    return torch.empty((positions.shape[0], rows.shape[1]), dtype=rows.dtype, device=rows.device)


def _fake_unpermute_backward(
    grad: Tensor,
    rows: Tensor | None,
    order: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    max_slots: Any,
    need_rows: bool,
) -> tuple[Tensor, Tensor]:
    _check_unpermute_backward(grad, rows, order, positions, weights, max_slots, need_rows)
    shape = (max_slots, grad.shape[1]) if need_rows else (0,)
    of_weights = (0,) if rows is None else tuple(positions.shape)
    return grad.new_empty(shape), grad.new_empty(of_weights, dtype=stats_dtype(grad))


_permute_op = define("permute_tokens(Tensor x, Tensor order, Tensor positions, SymInt max_slots) -> Tensor", _fake_permute)
_unpermute_op = define(
    "unpermute_tokens(Tensor rows, Tensor order, Tensor positions, Tensor? weights) -> Tensor", _fake_unpermute
)
_unpermute_backward_op = define(
    "unpermute_tokens_backward(Tensor grad, Tensor? rows, Tensor order, Tensor positions, Tensor? weights, "
    "SymInt max_slots, bool need_rows) -> (Tensor grad_rows, Tensor grad_weights)",
    _fake_unpermute_backward,
)


def _backends(primary: str, generic_only: tuple[torch.dtype, ...]) -> tuple[backends.Backend, ...]:
    return (
        backends.cpu(backends.VECTOR_TIERS, primary=primary, generic_only=generic_only),
        backends.cuda(primary=primary),
        backends.torch_cuda("torch's own gathers, in more passes, where there is no CUDA library", primary=primary),
        backends.REFERENCE,
    )


def _named(index: Tensor, size: int) -> Tensor:
    """-1 in place of what names none of `size`: on CUDA, torch's gathers end the process's use of the device there."""
    return torch.where((index >= 0) & (index < size), index, -1)


def _torch_permute(x: Tensor, order: Tensor, positions: Tensor, max_slots: int) -> Tensor:
    return reference.permute_tokens_op(x, _named(order, order.shape[0]), positions, max_slots)


def _torch_unpermute(rows: Tensor, order: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    return reference.unpermute_tokens_op(rows, order, _named(positions, rows.shape[0]), weights)


def _torch_unpermute_backward(
    grad: Tensor,
    rows: Tensor | None,
    order: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    max_slots: int,
    need_rows: bool,
) -> tuple[Tensor, Tensor]:
    order = _named(order, order.shape[0])
    places = positions if rows is None else _named(positions, rows.shape[0])
    return reference.unpermute_tokens_backward_op(grad, rows, order, places, weights, max_slots, need_rows)


PERMUTE_BACKENDS = _backends("x", ())
UNPERMUTE_BACKENDS = _backends("rows", (torch.float64,))

implement(
    _permute_op,
    PERMUTE_BACKENDS,
    "x",
    check=_check_permute,
    reference=reference.permute_tokens_op,
    torch_formula=_torch_permute,
)
implement(
    _unpermute_op,
    UNPERMUTE_BACKENDS,
    "rows",
    check=_check_unpermute,
    reference=reference.unpermute_tokens_op,
    torch_formula=_torch_unpermute,
)
implement(
    _unpermute_backward_op,
    _backends("grad", (torch.float64,)),
    "grad",
    check=_check_unpermute_backward,
    reference=reference.unpermute_tokens_backward_op,
    torch_formula=_torch_unpermute_backward,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    order, positions = ctx.saved_tensors
    return _call_unpermute(grad.requires_grad, grad.contiguous(), order, positions, None), None, None, None


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, order, positions, weights = inputs
    ctx.of_weights = weights is not None and ctx.needs_input_grad[3]
    # Only the gradient of the weights is made of the rows.
    ctx.save_for_backward(rows if ctx.of_weights else None, order, positions, weights)
    ctx.max_slots = rows.shape[0]


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, order, positions, weights = ctx.saved_tensors
    need_rows, *_, need_weights = ctx.needs_input_grad
    of_rows, of_weights = _call_unpermute_backward(
        any(value is not None and value.requires_grad for value in (grad, rows, weights)),
        grad.contiguous(),
        rows,
        order,
        positions,
        weights,
        ctx.max_slots,
        need_rows,
    )
    return of_rows if need_rows else None, None, None, of_weights if need_weights else None


_call_permute = differentiable(_permute_op, _permute_setup, _permute_backward, twice=True)
_call_unpermute_backward = not_differentiable(_unpermute_backward_op)
_call_unpermute = differentiable(_unpermute_op, _unpermute_setup, _unpermute_backward, twice=False)


# --- public functions -------------------------------------------------------------------------------------------------
def _places(dispatch: Any) -> tuple[Any, Any]:
    if not isinstance(dispatch, Dispatch):
        raise TypeError(f"dispatch: expected a Dispatch (mk.dispatch), got {type(dispatch).__name__}")
    return dense(dispatch.order), dense(dispatch.positions)


def permute_tokens(x: Tensor, dispatch: Dispatch, *, max_slots: int | None = None) -> Tensor:
    """Tokens in the order of their experts, one row for each slot in use: out[i] = x[order[i] // K], without padding.

    Args:
        x: [..., C], T tokens in all; float32, bfloat16, float16 or float64.
        dispatch: of these tokens, K slots each: :func:`mmkernels.dispatch`.
        max_slots: rows of the result, at least as many as there are slots in use (`Routing.max_slots`); T K by default,
            since a number that lies on the device would have to be waited for.

    Returns:
        [max_slots, C] in the dtype of x, under autocast too: expert e has the rows dispatch.offsets[e] to
        dispatch.offsets[e + 1], and the rows behind those in use are 0. The gradient is :func:`unpermute_tokens` without
        weights, to any order but the third.

    Raises:
        TypeError: x or dispatch of another type or dtype.
        ValueError: shapes or devices do not fit; an entry of dispatch out of range, or more slots in use than max_slots
            (on CUDA such rows are 0, or left out).

    Source: "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (2022).
    """
    order, positions = _places(dispatch)
    check_tokens(x, "x", "[..., C]", DTYPES)
    rows = dense_rows(x)
    most = order.shape[0] if max_slots is None and isinstance(order, Tensor) and order.dim() > 0 else max_slots
    if is_compiling():
        _check_permute(rows, order, positions, most)
    try:
        return _call_permute(rows.requires_grad, rows, order, positions, most)
    except Exception:
        _check_permute(rows, order, positions, most)
        raise


def unpermute_tokens(rows: Tensor, dispatch: Dispatch, weights: Tensor | None = None) -> Tensor:
    """What the experts made of their rows, summed by token: out[t] = sum_k weights[t, k] rows[positions[t, k]].

    Args:
        rows: [S, C] in the order of the experts, S at most T K and at least the slots in use, as :func:`permute_tokens`
            gives them; float32, bfloat16, float16 or float64.
        dispatch: what the rows lie by: :func:`mmkernels.dispatch`.
        weights: [T, K] (`Routing.weights`), or None for 1; of any floating dtype, read as float32 (float64 beside such
            rows).

    Returns:
        [T, C] in the dtype of rows, under autocast too; a token without slots in use gives 0. Sums are float32 in the order
        of the slots, rounded once, without atomics: the same bits from run to run and for any number of threads. Gradients
        of rows and weights, not twice; rows behind those in use have a gradient of 0. The rows are kept for the gradient of
        the weights alone.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes or devices do not fit; a slot of dispatch that there is no row for (on CUDA it is left out).
        NotImplementedError: a second derivative.

    Source: "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (2022).
    """
    order, positions = _places(dispatch)
    check_tokens(rows, "rows", "[S, C]", DTYPES)
    rows = dense_rows(rows) if rows.dim() == 2 else rows
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights: expected a tensor [T, K] or None, got {type(weights).__name__}")
        if not weights.is_floating_point():
            raise TypeError(f"weights: expected floats, got {weights.dtype}")
        weights = dense(weights.to(stats_dtype(rows)))
    if is_compiling():
        _check_unpermute(rows, order, positions, weights)
    try:
        return _call_unpermute(wants_gradient(rows, weights), rows, order, positions, weights)
    except Exception:
        _check_unpermute(rows, order, positions, weights)
        raise
