"""Attention, defined. Slow, in plain PyTorch, for any floating dtype.

B batch, H query heads, Hk key/value heads (H = Hk * group), Lq and Lk lengths, D and Dv channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    limits: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    value_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """What :func:`mmkernels.attention` computes; its docstring says what each argument is."""
    left, right = (-1 if size is None else size for size in window_size or (None, None))
    if is_causal:
        right = 0 if right < 0 else min(right, 0)
    seeds = torch.as_tensor(0 if seed is None else seed, dtype=torch.int64)
    out, lse = attention_op(
        q,
        k,
        v,
        bias,
        mask,
        limits,
        segment_ids_q,
        segment_ids_k,
        cu_seqlens_q,
        cu_seqlens_k,
        value_gate,
        seeds,
        q.size(-1) ** -0.5 if scale is None else scale,
        softcap or 0.0,
        dropout_p,
        left,
        right,
        causal_alignment == "bottom_right",
        0,
        0,
    )
    return (out, lse) if return_lse else out


def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    value_gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::attention: (out, lse). A window of -1 is unlimited, a softcap of 0 none."""
    rest = (seed, scale, softcap, dropout_p, window_left, window_right, bottom_right)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense(q, k, v, bias, mask, limits, segment_ids_q, segment_ids_k, value_gate, *rest, first=0)
    out, lse = q.new_empty(*q.shape[:2], v.size(2)), q.new_empty(q.shape[:2], dtype=_wide(q))
    parts = _sequences(q, k, v, bias, mask, limits, segment_ids_q, segment_ids_k, cu_seqlens_q, cu_seqlens_k, value_gate)
    for number, (rows, _, operands) in enumerate(parts):
        of_sequence, lse_of_sequence = _dense(*operands, *rest, first=number * q.size(1))
        out[rows], lse[rows] = of_sequence[0].transpose(0, 1), lse_of_sequence[0].transpose(0, 1)
    return out, lse


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    value_gate: Tensor | None,
) -> Iterator[tuple[slice, slice, tuple[Any, ...]]]:
    """Packed sequences one by one: their queries, their keys, and the operands as a batch of one."""

    def packed(x: Tensor | None, part: slice) -> Tensor | None:
        """[T, H, ...] -> [1, H, L, ...]."""
        return None if x is None else x[part].transpose(0, 1)[None]

    def ids(x: Tensor | None, part: slice) -> Tensor | None:
        return None if x is None else x[part][None]

    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        yield (
            rows,
            keys,
            (
                *(packed(x, part) for x, part in ((q, rows), (k, keys), (v, keys))),
                *(_of_sequence(x, b, rows, keys) for x in (bias, mask)),
                ids(limits, rows),
                ids(segment_ids_q, rows),
                ids(segment_ids_k, keys),
                packed(value_gate, keys),
            ),
        )


def _of_sequence(x: Tensor | None, b: int, rows: slice, keys: slice) -> Tensor | None:
    """A view of what one sequence sees of [B or 1, H or 1, longest or 1, longest or 1]."""
    if x is None:
        return None
    x = _four(x)
    x = x[b : b + 1] if x.size(0) > 1 else x
    x = x[:, :, : rows.stop - rows.start] if x.size(2) > 1 else x
    return x[..., : keys.stop - keys.start] if x.size(3) > 1 else x


def _weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """The softmax [B, H, Lq, Lk], 0 in rows that see nothing, and its logsumexp, -inf there. k has the heads of q."""
    len_q, len_k = q.size(2), k.size(2)
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + _four(bias).to(scores.dtype)
    visible = visible_keys(
        len_q, len_k, mask, limits, segment_ids_q, segment_ids_k, window_left, window_right, bottom_right, q.device
    )
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores.to(_wide(q)), -1)
    nothing = (lse == -math.inf)[..., None]
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0), lse


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    value_gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    *window: Any,
    first: int,
) -> tuple[Tensor, Tensor]:
    group = q.size(1) // k.size(1)
    weights, lse = _weights(
        q,
        k.repeat_interleave(group, 1),
        bias,
        mask,
        limits,
        segment_ids_q,
        segment_ids_k,
        scale,
        softcap,
        *window,
    )
    weights = _dropped(weights, seed, dropout_p, first)
    return weights @ _gated(v, value_gate).repeat_interleave(group, 1), lse


def _gated(v: Tensor, value_gate: Tensor | None) -> Tensor:
    return v if value_gate is None else v * value_gate[..., None].to(v.dtype)


def _dropped(weights: Tensor, seed: Tensor | None, dropout_p: float, first: int) -> Tensor:
    if dropout_p == 0 or seed is None:
        return weights
    return weights * dropout_keep(seed, dropout_p, first, *weights.shape).to(weights.device) / (1 - dropout_p)


def visible_keys(
    len_q: int,
    len_k: int,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    device: torch.device,
) -> Tensor | None:
    """Which key each query sees, broadcastable to [B, H, Lq, Lk]; None where it is every one."""
    key = torch.arange(len_k, device=device)
    at = torch.arange(len_q, device=device)[:, None] + (len_k - len_q if bottom_right else 0)
    visible = None if mask is None else _four(mask)

    def also(other: Tensor) -> Tensor:
        return other if visible is None else visible & other

    if window_left >= 0:
        visible = also((key >= at - window_left)[None, None])
    if window_right >= 0:
        visible = also((key <= at + window_right)[None, None])
    if limits is not None:
        visible = also((key < limits[:, :, None])[:, None])
    if segment_ids_q is not None and segment_ids_k is not None:
        visible = also((segment_ids_q[:, :, None] == segment_ids_k[:, None, :])[:, None])
    return visible


def dropout_keep(seed: Tensor, p: float, first: int, batch: int, heads: int, len_q: int, len_k: int) -> Tensor:
    """Which weights dropout keeps, [B, H, Lq, Lk] bool: a hash of (seed, head, query, key), 24 bits of it against p.

    `first` is the number of the first head, counted over batch and heads.
    """
    number = int(seed)
    low, high = number & _MASK32, (number >> 32) & _MASK32
    head = torch.arange(first, first + batch * heads).view(batch, heads, 1, 1)
    stream = _mix(low ^ _mix((head + high) & _MASK32))
    row = _mix((stream + torch.arange(len_q)[:, None] * _GOLDEN) & _MASK32)
    value = _mix((row + torch.arange(len_k) * _GOLDEN) & _MASK32)
    return (value >> 8) >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """The smallest of the 2^24 values that are kept."""
    return math.floor(p * 2**24 + 0.5)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32-bit numbers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK32
    return x ^ (x >> 16)


def attention_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    value_gate: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    max_seqlen_q: int,
    max_seqlen_k: int,
    need_bias: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::attention_backward: gradients of q, k, v, bias and value_gate; the last two empty where they
    are not needed."""
    rest = (scale, softcap, dropout_p, window_left, window_right, bottom_right)

    def like(x: Tensor | None, needed: bool = True) -> Tensor:
        """Where a gradient is summed up."""
        if x is None or not needed:
            return q.new_zeros(0, dtype=q.dtype if x is None else x.dtype)
        return torch.zeros(x.shape, dtype=x.dtype if cu_seqlens_q is None else _wide(q), device=q.device)

    of_bias = like(bias, need_bias)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        operands = (q, k, v, bias, mask, limits, segment_ids_q, segment_ids_k, value_gate)
        of_q, of_k, of_v, summed, of_gate = _dense_backward(grad_out, grad_lse, *operands, seed, lse, *rest, first=0)
        if bias is not None and need_bias:
            of_bias = summed.sum_to_size(bias.shape).to(bias.dtype)
    else:
        of_q, of_k, of_v, of_gate = like(q), like(k), like(v), like(value_gate)
        parts = _sequences(q, k, v, bias, mask, limits, segment_ids_q, segment_ids_k, cu_seqlens_q, cu_seqlens_k, value_gate)
        for number, (rows, keys, operands) in enumerate(parts):
            upstream = (grad_out[rows].transpose(0, 1)[None], None if grad_lse is None else grad_lse[rows].T[None])
            *grads, summed, gate = _dense_backward(
                *upstream, *operands, seed, lse[rows].T[None], *rest, first=number * q.size(1)
            )
            for total, part, grad in zip((of_q, of_k, of_v), (rows, keys, keys), grads, strict=True):
                total[part] = grad[0].transpose(0, 1).to(total.dtype)
            if value_gate is not None:
                of_gate[keys] = gate[0].T.to(of_gate.dtype)
            if bias is not None and need_bias:
                seen = _of_sequence(of_bias, number, rows, keys)
                if seen is not None:
                    seen += summed.sum_to_size(seen.shape)
        of_q, of_k, of_v = of_q.to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype)
        of_bias = of_bias if bias is None else of_bias.to(bias.dtype)
    if value_gate is None or not need_gate:
        return of_q, of_k, of_v, of_bias, like(value_gate, False)
    return of_q, of_k, of_v, of_bias, of_gate.to(value_gate.dtype)


def _dense_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    value_gate: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
    *window: Any,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the scores with their bias [B, H, Lq, Lk], and of value_gate."""
    group = q.size(1) // k.size(1)
    keys, values = k.repeat_interleave(group, 1), _gated(v, value_gate).repeat_interleave(group, 1)
    ids = (mask, limits, segment_ids_q, segment_ids_k)
    weights, _ = _weights(q, keys, bias, *ids, scale, softcap, *window)
    grad_values = _dropped(weights, seed, dropout_p, first).transpose(-1, -2) @ grad_out
    grad_weights = _dropped(grad_out @ values.transpose(-1, -2), seed, dropout_p, first)
    centre = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        centre = centre - grad_lse[..., None].to(centre.dtype)
    of_scores = weights * (grad_weights - centre)
    of_products = of_scores
    if softcap > 0:
        capped = torch.tanh((q * scale) @ keys.transpose(-1, -2) / softcap)
        of_products = of_scores * (1 - capped.square())

    def over_group(x: Tensor) -> Tensor:
        return x.reshape(*k.shape[:2], group, *x.shape[2:]).sum(2) if group > 1 else x

    grad_values = over_group(grad_values)
    of_gate = (grad_values * v).sum(-1)
    grad_v = _gated(grad_values, value_gate)
    grad_k = over_group(of_products.transpose(-1, -2) @ (q * scale))
    return (of_products @ keys) * scale, grad_k, grad_v, of_scores, of_gate


def _four(x: Tensor) -> Tensor:
    return x.view((1,) * (4 - x.dim()) + x.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
