"""Experts: feed-forward layers of which each token passes a few, and linear layers of which it passes one. The definition.

T tokens, E experts, K slots a token, C channels, H hidden channels, N outputs, S = T K slots in all.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.reference.linear import ACTIVATIONS, activate, affine, as_rows, through
from mmkernels.reference.routing import Routing


class Dispatch(NamedTuple):
    """The slots of a routing in the order of their experts, and in each expert's in their own.

    order: [S] int64, the slot (token * K + k) at each place; -1 beyond the slots in use.
    offsets: [E + 1] int64: expert e has the places offsets[e] to offsets[e + 1].
    positions: [T, K] int64, the place of each slot; -1 of unused ones. The inverse of order.
    """

    order: Tensor
    offsets: Tensor
    positions: Tensor


def dispatch(expert_ids: Tensor, num_experts: int) -> Dispatch:
    """Sorts the slots by expert."""
    ids = expert_ids.flatten()
    if ids.numel() and not bool(((ids >= -1) & (ids < num_experts)).all()):
        raise ValueError(f"expert_ids: expected -1 to {num_experts - 1}")
    key = torch.where(ids < 0, num_experts, ids)
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    place = torch.arange(ids.numel(), device=ids.device)
    used = place < offsets[-1]
    positions = torch.empty_like(order).scatter(0, order, torch.where(used, place, -1))
    return Dispatch(torch.where(used, order, -1), offsets, positions.view(expert_ids.shape))


def _expert(value: Tensor | None, expert: int) -> Tensor | None:
    return None if value is None else value[expert]


def moe_mlp(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """out[t] = sum_k weights[t, k] f_e(x[t]) + residual[t] with e = expert_ids[t, k], unused slots left out, and
    f_e(x) = h W_out[e]^T + b_out[e], h as in mmkernels.mlp."""
    tokens = as_rows(x)
    ids = routing.expert_ids
    places, rows = [], []
    for expert in range(w_in.size(0)):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        chosen = tokens[token]
        up = affine(chosen, w_in[expert], _expert(b_in, expert))
        if w_gate is None:
            hidden = activate(up, activation)
        else:
            hidden = activate(affine(chosen, w_gate[expert], _expert(b_gate, expert)), activation) * up
        places.append((token, slot))
        rows.append(affine(hidden, w_out[expert], _expert(b_out, expert)))
    values = torch.cat(rows)
    slots = values.new_zeros((*ids.shape, w_out.size(1)))
    slots = slots.index_put(tuple(torch.cat(index) for index in zip(*places, strict=True)), values)
    weights = routing.weights.masked_fill(ids < 0, 0)
    out = torch.where((ids < 0)[..., None], 0, slots * weights[..., None]).sum(1)
    out = out.to(values.dtype).view(*x.shape[:-1], w_out.size(1))
    return out if residual is None else out + residual


def grouped_linear(x: Tensor, group_ids: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[t] W[g]^T + bias[g] with g = group_ids[t]; 0 where that is -1."""
    tokens, ids = as_rows(x), group_ids.reshape(-1)
    places = [torch.nonzero(ids == group)[:, 0] for group in range(weight.size(0))]
    values = torch.cat([affine(tokens[token], weight[group], _expert(bias, group)) for group, token in enumerate(places)])
    out = values.new_zeros((tokens.size(0), weight.size(1))).index_put((torch.cat(places),), values)
    return out.view(*x.shape[:-1], weight.size(1))


# --- the operators' own signatures ----------------------------------------------------------------------------------------
def expert_order_op(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::expert_order."""
    return tuple(dispatch(expert_ids, num_experts))  # type: ignore[return-value]


# Which gradients moe_mlp_backward makes, by bit.
MOE_GRADIENTS = ("x", "weights", "w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")


def moe_needs(needs: int) -> dict[str, bool]:
    """The bits by name."""
    return {name: bool(needs >> bit & 1) for bit, name in enumerate(MOE_GRADIENTS)}


def _bounds(offsets: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets.tolist()))


def moe_mlp_op(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    packed_in: Tensor | None,
    packed_out: Tensor | None,
    packed_gate: Tensor | None,
    current: Tensor | None,
    residual: Tensor | None,
    activation: int,
    max_slots: int,
    need_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::moe_mlp: the output, and what the first products gave, in the order of the experts and zero
    beyond the slots in use (or empty)."""
    slots_a_token, name = expert_ids.size(1), ACTIVATIONS[activation]
    order, offsets, positions = dispatch(expert_ids, w_in.size(0))
    if int(offsets[-1]) > max_slots:
        raise ValueError(f"max_slots: expected at least the slots in use, {int(offsets[-1])}, got {max_slots}")
    hidden = w_in.size(1)
    pre = x.new_zeros((max_slots if need_pre else 0, hidden))
    pre_gate = x.new_zeros((max_slots if need_pre and w_gate is not None else 0, hidden))
    slots = x.new_zeros((max_slots, w_out.size(1)))
    for expert, (begin, end) in enumerate(_bounds(offsets)):
        chosen = x[order[begin:end] // max(1, slots_a_token)]
        up = affine(chosen, w_in[expert].to(x.dtype), _expert(b_in, expert))
        if need_pre:
            pre[begin:end] = up
        if w_gate is None:
            value = activate(up, name)
        else:
            gate = affine(chosen, w_gate[expert].to(x.dtype), _expert(b_gate, expert))
            if need_pre:
                pre_gate[begin:end] = gate
            value = activate(gate, name) * up
        slots[begin:end] = affine(value, w_out[expert].to(x.dtype), _expert(b_out, expert))
    out = combine(slots, positions, weights).to(x.dtype)
    out = out if residual is None else out + residual
    return out, pre if need_pre else x.new_empty(0), pre_gate if need_pre and w_gate is not None else x.new_empty(0)


def combine(slots: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    """[T, N]: each token's rows of `slots` at its positions, times their weights, summed in the order of the slots."""
    used = (positions >= 0)[..., None]
    if slots.size(0) == 0:
        return slots.new_zeros((positions.size(0), slots.size(1)))
    rows = slots[positions.clamp(min=0)]
    rows = rows if weights is None else rows * weights[..., None]
    return torch.where(used, rows, 0).sum(1)


def moe_mlp_backward_op(
    grad: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::moe_mlp_backward: the gradients that MOE_GRADIENTS names (empty where not needed).

    With g = grad W_out[e], of the output without its weight, the gradient of a weight is <g, h> + <grad, b_out[e]>: what
    the experts gave is not needed.
    """
    need, gated = moe_needs(needs), w_gate is not None
    slots_a_token = max(1, expert_ids.size(1))
    order, offsets, positions = dispatch(expert_ids, w_in.size(0))
    flat_weights = weights.flatten()

    def zeros(name: str, like: Tensor | None) -> Tensor:
        if like is None or not need[name]:
            return x.new_empty(0) if like is None else like.new_empty(0)
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)

    inputs = (weights, w_in, w_out, w_gate, b_in, b_out, b_gate)
    grads = {name: zeros(name, like) for name, like in zip(MOE_GRADIENTS[1:], inputs, strict=True)}
    slots_x = x.new_zeros((max(1, pre.size(0)), x.size(1)))
    for expert, (begin, end) in enumerate(_bounds(offsets)):
        slot = order[begin:end]
        chosen, upstream = x[slot // slots_a_token], grad[slot // slots_a_token]
        weight = flat_weights[slot, None]
        of_hidden = upstream @ w_out[expert]
        if gated:
            before_gate, value = through(of_hidden * pre[begin:end], pre_gate[begin:end], activation)
            before, hidden = of_hidden * value, value * pre[begin:end]
        else:
            before, hidden = through(of_hidden, pre[begin:end], activation)
            before_gate = before
        if need["weights"]:
            dots = (of_hidden.to(weights.dtype) * hidden).sum(-1)
            if b_out is not None:
                dots = dots + (upstream.to(weights.dtype) * b_out[expert]).sum(-1)
            grads["weights"].view(-1)[slot] = dots
        weighted, before, before_gate = ((weight * v).to(x.dtype) for v in (hidden, before, before_gate))
        if need["w_out"]:
            grads["w_out"][expert] = upstream.T @ weighted
        if need["b_out"] and b_out is not None:
            grads["b_out"][expert] = (upstream * weight).sum(0, dtype=weights.dtype)
        for name, of in (("in", before), ("gate", before_gate)):
            if need[f"w_{name}"] and (gated or name == "in"):
                grads[f"w_{name}"][expert] = of.T @ chosen
            if need[f"b_{name}"] and grads[f"b_{name}"].numel():
                grads[f"b_{name}"][expert] = of.sum(0, dtype=grads[f"b_{name}"].dtype)
        if need["x"]:
            slots_x[begin:end] = before @ w_in[expert]
            if w_gate is not None:
                slots_x[begin:end] += before_gate @ w_gate[expert]
    grad_x = combine(slots_x, positions, None) if need["x"] else x.new_empty(0)
    return (grad_x, *grads.values())  # type: ignore[return-value]


def grouped_linear_op(
    x: Tensor, group_ids: Tensor, weight: Tensor, packed: Tensor | None, current: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The operator mmkernels::grouped_linear."""
    return grouped_linear(x, group_ids, weight.to(x.dtype), bias)


def grouped_linear_backward_op(
    grad: Tensor,
    x: Tensor,
    group_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::grouped_linear_backward: gradients of x, weight and bias (empty where not needed)."""
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_weight = weight.new_zeros(weight.shape) if need_weight else weight.new_empty(0)
    like = x if bias is None else bias
    grad_bias = like.new_zeros(weight.shape[:2]) if need_bias else like.new_empty(0)
    for group in range(weight.size(0)):
        token = torch.nonzero(group_ids == group)[:, 0]
        if need_x:
            grad_x[token] = grad[token] @ weight[group]
        if need_weight:
            grad_weight[group] = grad[token].T @ x[token]
        if need_bias:
            grad_bias[group] = grad[token].sum(0, dtype=like.dtype)
    return grad_x, grad_weight, grad_bias
