"""Linear attention, defined. Slow, in plain PyTorch, for any floating dtype.

B batch, H query heads, Hk key/value heads (H = Hk * group), Lq and Lk lengths, D and Dv channels of a head. phi are
features, S = sum_j phi(k_j) v_j^T [D, Dv] and z = sum_j phi(k_j) [D] the state of a head of keys.

Sources: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020), "Efficient Attention:
Attention with Linear Complexities" (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("identity", "relu", "elu1", "softmax")  # the operator knows them by their number
SOFTMAX = FEATURE_MAPS.index("softmax")

State = tuple[Tensor, Tensor]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu1",
    is_causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Any:
    """What :func:`mmkernels.linear_attention` computes; its docstring says what each argument is."""
    if not isinstance(feature_map, str):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    how: tuple[Any, ...] = (feature_map, is_causal, normalize, eps)
    s, z = (None, None) if state is None else state
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, *final = _plain(q, k, v, mask, s, z, *how)
    else:
        parts = [_plain(*part, *how) for _, _, *part in sequences(q, k, v, mask, s, z, cu_seqlens_q, cu_seqlens_k)]
        out = torch.cat([q.new_empty(0, q.size(1), v.size(2)), *(out[0].transpose(0, 1) for out, _, _ in parts)])
        final = [torch.cat([part[i] for part in parts]) for i in (1, 2)]
    return (out, tuple(final)) if return_state else out


def sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    s: Tensor | None,
    z: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> Iterator[tuple[Any, ...]]:
    """Packed sequences one by one: their queries, their keys, and the operands as a batch of one."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        operands = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys)))
        own = (None if x is None else x[b : b + 1] for x in (s, z))
        yield rows, keys, *operands, None if mask is None else mask[keys][None], *own


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    s: Tensor | None,
    z: Tensor | None,
    feature_map: str,
    is_causal: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, S, z) of sequences of one length, in the dtype of q but for the state."""
    queries, keys = _activate(q, feature_map, -1), _activate(k, feature_map, -2, mask)
    queries, grouped = _by_group(queries, k), keys[:, :, None]
    of_keys, sum_of_keys = (keys.mT @ v).to(wide(q)), keys.sum(-2).to(wide(q))
    final_s = of_keys if s is None else of_keys + s
    final_z = sum_of_keys if z is None else sum_of_keys + z
    if is_causal:
        weights = (queries @ grouped.mT).tril()
        out, total = weights @ v[:, :, None], weights.sum(-1)
        if s is not None and z is not None:
            out = out + queries @ s[:, :, None].to(q.dtype)
            total = total + (queries @ z[:, :, None, :, None].to(q.dtype))[..., 0]
    else:
        out = queries @ final_s[:, :, None].to(q.dtype)
        total = (queries @ final_z[:, :, None, :, None].to(q.dtype))[..., 0]
    if normalize and feature_map != "softmax":
        out = out / (total + eps)[..., None]
    return out.flatten(1, 2), final_s, final_z


def _activate(x: Tensor, feature_map: str, dim: int, mask: Tensor | None = None) -> Tensor:
    """Features; the softmax goes over `dim`. Keys that do not count have features of 0."""
    hidden = None if mask is None else ~mask[:, None, :, None]
    if feature_map == "softmax":
        x = (x if hidden is None else x.masked_fill(hidden, -torch.inf)).softmax(dim)
    elif feature_map == "elu1":
        x = F.elu(x) + 1
    elif feature_map == "relu":
        x = F.relu(x)
    return x if hidden is None else x.masked_fill(hidden, 0)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, L, C] -> [B, Hk, group, L, C]."""
    return x.unflatten(1, (k.size(1), x.size(1) // k.size(1)))


def wide(x: Tensor) -> torch.dtype:
    """The dtype of the state."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- the operators' own signatures, for devices without kernels ---------------------------------------------------------
# What enters products of matrices is rounded to the dtype of q, as torch's own products would have it; sums are in the dtype
# of the state. Of "softmax", features
# of keys are exp(k - the largest of the channel), the state is S / z instead of S, and z are the sums of these features.
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state_s: Tensor | None,
    state_z: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    feature_map: int,
    is_causal: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::linear_attention: (out, final S, final z)."""
    how: tuple[Any, ...] = (feature_map, is_causal, normalize, eps)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense(q, k, v, mask, state_s, state_z, *how)
    batch, kind = cu_seqlens_q.size(0) - 1, wide(q)
    out = q.new_empty(*q.shape[:2], v.size(2))
    final_s, final_z = (
        q.new_empty(batch, k.size(1), *sizes, dtype=kind) for sizes in ((k.size(2), v.size(2)), (k.size(2),))
    )
    parts = sequences(q, k, v, mask, state_s, state_z, cu_seqlens_q, cu_seqlens_k)
    for b, (rows, _, *operands) in enumerate(parts):
        of_sequence, final_s[b], final_z[b] = (x[0] for x in _dense(*operands, *how))
        out[rows] = of_sequence.transpose(0, 1)
    return out, final_s, final_z


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state_s: Tensor | None,
    state_z: Tensor | None,
    feature_map: int,
    is_causal: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = _features(q, k, mask, feature_map), _features(k, k, mask, feature_map, True), v.to(wide(q))
    s, z = keys.mT @ values, keys.sum(-2)
    if feature_map == SOFTMAX:
        s = s / _or_one(z)[..., None]
    if state_s is not None and state_z is not None:
        s, z = s + state_s, z + state_z
    if is_causal:
        weights = (queries @ keys[:, :, None].mT).tril()
        out = _rounded(weights, q) @ values[:, :, None]
        if state_s is not None:
            out = out + queries @ _rounded(state_s, q)[:, :, None]
    else:
        weights, out = None, queries @ _rounded(s, q)[:, :, None]
    out = out / _totals(queries, weights, state_z if is_causal else z, feature_map, normalize, eps)
    return out.flatten(1, 2).to(q.dtype), s, z


def _rounded(x: Tensor, q: Tensor) -> Tensor:
    return x.to(q.dtype).to(x.dtype)


def _totals(
    queries: Tensor, weights: Tensor | None, z: Tensor | None, feature_map: int, normalize: bool, eps: float
) -> Tensor:
    """What each query's sum is divided by, [B, Hk, group, Lq, 1]: `weights` are those of causal attention, z what else is
    seen."""
    if feature_map == SOFTMAX:
        return queries.sum(-1, keepdim=True)
    total = queries.new_zeros(*queries.shape[:-1], 1)
    if not normalize:
        return total + 1
    if weights is not None:
        total = total + weights.sum(-1, keepdim=True)
    if z is not None:
        total = total + queries @ z[:, :, None, :, None]
    return total + eps


def _or_one(z: Tensor) -> Tensor:
    """z, and 1 where no key counts."""
    return torch.where(z == 0, 1, z)


def _shifted(x: Tensor, mask: Tensor | None, of_keys: bool) -> Tensor:
    """x less its largest, of a query or of the counted keys of a channel."""
    if x.numel() == 0:
        return x
    if of_keys and mask is not None:
        top = x.masked_fill(~mask[:, None, :, None], -torch.inf).amax(-2, keepdim=True)
        return x - top.masked_fill(top == -torch.inf, 0)
    return x - x.amax(-2 if of_keys else -1, keepdim=True)


def _features(x: Tensor, k: Tensor, mask: Tensor | None, feature_map: int, of_keys: bool = False) -> Tensor:
    """Features in the dtype of the state: of keys [B, Hk, Lk, D], of queries by group [B, Hk, group, Lq, D]."""
    if feature_map == SOFTMAX:
        features = _shifted(x.to(wide(x)), mask, of_keys).exp().to(x.dtype)
    else:
        features = _activate(x, FEATURE_MAPS[feature_map], -1)
    features = features.to(wide(x))
    if not of_keys:
        return _by_group(features, k)
    return features if mask is None else features.masked_fill(~mask[:, None, :, None], 0)


def _slopes(x: Tensor, mask: Tensor | None, feature_map: int, of_keys: bool = False) -> Tensor:
    """The derivative of features, in the dtype of the state."""
    x = x.to(wide(x))
    if feature_map == SOFTMAX:
        slopes = _shifted(x, mask, of_keys).exp()
    elif FEATURE_MAPS[feature_map] == "elu1":
        slopes = x.clamp(max=0).exp()
    elif FEATURE_MAPS[feature_map] == "relu":
        slopes = (x > 0).to(x.dtype)
    else:
        slopes = torch.ones_like(x)
    return slopes.masked_fill(~mask[:, None, :, None], 0) if of_keys and mask is not None else slopes


def linear_attention_backward_op(
    grad_out: Tensor,
    grad_s: Tensor | None,
    grad_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state_s: Tensor | None,
    state_z: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    final_s: Tensor,
    final_z: Tensor,
    feature_map: int,
    is_causal: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::linear_attention_backward: gradients of q, k, v and of the initial state, these also where
    there was none."""
    how: tuple[Any, ...] = (feature_map, is_causal, normalize, eps)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense_backward(grad_out, grad_s, grad_z, q, k, v, mask, state_s, state_z, final_s, final_z, *how)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, final_s, final_z)]
    parts = sequences(q, k, v, mask, state_s, state_z, cu_seqlens_q, cu_seqlens_k)
    for b, (rows, keys, *operands) in enumerate(parts):
        own = slice(b, b + 1)
        of_state = (None if x is None else x[own] for x in (grad_s, grad_z))
        upstream: tuple[Any, ...] = (grad_out[rows].transpose(0, 1)[None], *of_state)
        arguments: tuple[Any, ...] = (*upstream, *operands, final_s[own], final_z[own], *how)
        of_sequence = _dense_backward(*arguments)
        for grad, part, x in zip(grads[:3], (rows, keys, keys), of_sequence[:3], strict=True):
            grad[part] = x[0].transpose(0, 1)
        for grad, x in zip(grads[3:], of_sequence[3:], strict=True):
            grad[own] = x
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def _dense_backward(
    grad_out: Tensor,
    grad_s: Tensor | None,
    grad_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state_s: Tensor | None,
    state_z: Tensor | None,
    final_s: Tensor,
    final_z: Tensor,
    feature_map: int,
    is_causal: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    queries, keys, values = _features(q, k, mask, feature_map), _features(k, k, mask, feature_map, True), v.to(wide(q))
    zeros_s, zeros_z = torch.zeros_like(final_s), torch.zeros_like(final_z)
    normalized = normalize or feature_map == SOFTMAX
    # What every query sees, and what it is divided by.
    if is_causal:
        s, z = zeros_s if state_s is None else state_s, zeros_z if state_z is None else state_z
        weights = (queries @ keys[:, :, None].mT).tril()
    else:
        s, z, weights = final_s, torch.ones_like(final_z) if feature_map == SOFTMAX else final_z, None
    totals = _totals(queries, weights, z, feature_map, normalize, eps)
    upstream = _rounded(_by_group(grad_out.to(wide(q)), k) / totals, q)
    of_queries = upstream @ _rounded(s, q)[:, :, None].mT
    dots = (queries * of_queries).sum(-1, keepdim=True)
    slopes = None
    if weights is not None:
        slopes = (upstream @ values[:, :, None].mT).tril()
        dots = dots + (weights * slopes).sum(-1, keepdim=True)
    of_totals = -dots / totals if normalized else torch.zeros_like(dots)
    of_queries = of_queries + of_totals * z[:, :, None, None]
    # Of the state that a query sees, and of the one that is returned.
    of_s = (queries.mT @ upstream).sum(2)
    of_z = (queries.mT @ of_totals)[..., 0].sum(2)
    if feature_map == SOFTMAX:
        of_z = -(of_s * final_s).sum(-1) / _or_one(final_z)
        of_s = of_s / _or_one(final_z)[..., None]
    returned_s, returned_z = zeros_s if grad_s is None else grad_s, zeros_z if grad_z is None else grad_z
    of_s, of_z = of_s + returned_s, of_z + returned_z
    by_keys_s, by_keys_z = (returned_s, returned_z) if is_causal else (of_s, of_z)
    of_keys = values @ _rounded(by_keys_s, q).mT + by_keys_z[:, :, None]
    of_values = keys @ _rounded(by_keys_s, q)
    if weights is not None and slopes is not None:
        slopes = _rounded((slopes + of_totals).tril(), q)
        of_queries = of_queries + slopes @ keys[:, :, None]
        of_keys = of_keys + (slopes.mT @ queries).sum(2)
        of_values = of_values + (_rounded(weights, q).mT @ upstream).sum(2)
    return (
        (of_queries.flatten(1, 2) * _slopes(q, mask, feature_map)).to(q.dtype),
        (of_keys * _slopes(k, mask, feature_map, True)).to(q.dtype),
        of_values.to(q.dtype),
        of_s,
        of_z,
    )
