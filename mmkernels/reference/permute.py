"""Rows in the order of the experts and back: the definition.

T tokens, K slots a token, C channels; a row for each slot in use, and up to S = T K of them in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.reference.linear import as_rows
from mmkernels.reference.moe import Dispatch


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _and_zero(rows: Tensor) -> Tensor:
    """The rows and one of zeros, which index -1 means."""
    return torch.cat((rows, rows.new_zeros((1, rows.size(1)))))


def permute_tokens(x: Tensor, dispatch: Dispatch, *, max_slots: int | None = None) -> Tensor:
    """out[i] = x[order[i] // K], and 0 where order[i] is -1."""
    order = dispatch.order if max_slots is None else dispatch.order[:max_slots]
    return _and_zero(as_rows(x))[order // max(1, dispatch.positions.size(1))]


def unpermute_tokens(rows: Tensor, dispatch: Dispatch, weights: Tensor | None = None) -> Tensor:
    """out[t] = sum_k weights[t, k] rows[positions[t, k]], unused slots left out."""
    chosen = _and_zero(rows)[dispatch.positions].to(_sums(rows))
    if weights is not None:
        chosen = chosen * torch.where(dispatch.positions >= 0, weights, 0)[..., None].to(chosen.dtype)
    return chosen.sum(1).to(rows.dtype)


# --- operators ----------------------------------------------------------------------------------------------------------
def permute_tokens_op(x: Tensor, order: Tensor, positions: Tensor, max_slots: int) -> Tensor:
    """The operator mmkernels::permute_tokens."""
    return permute_tokens(x, Dispatch(order, order.new_empty(0), positions), max_slots=max_slots)


def unpermute_tokens_op(rows: Tensor, order: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    """The operator mmkernels::unpermute_tokens."""
    return unpermute_tokens(rows, Dispatch(order, order.new_empty(0), positions), weights)


def unpermute_tokens_backward_op(
    grad: Tensor,
    rows: Tensor | None,
    order: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    max_slots: int,
    need_rows: bool,
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::unpermute_tokens_backward: the gradients of the rows and, where `rows` are given, of the
    weights, or empty."""
    kind = _sums(grad)
    grad_rows, grad_weights = grad.new_empty(0), grad.new_empty(0, dtype=kind)
    if need_rows:
        grad_rows = permute_tokens_op(grad, order, positions, max_slots)
        if weights is not None and max_slots > 0:
            of_slots = torch.where(order[:max_slots] >= 0, weights.flatten()[order[:max_slots]], 0)
            grad_rows = (grad_rows.to(kind) * of_slots[:, None]).to(grad.dtype)
    if rows is not None:
        dots = (_and_zero(rows)[positions].to(kind) * grad[:, None].to(kind)).sum(-1)
        grad_weights = torch.where(positions >= 0, dots, 0)
    return grad_rows, grad_weights
