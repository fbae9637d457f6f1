"""Hashed binary attention, EcoFormer's: the definition.

Source: "EcoFormer: Energy-Saving Attention with Linear Complexity" (2022). Index glossary: B samples, H heads, N tokens,
D channels, m supports, `bits` binary features of a token, h in {-1, +1}^bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def default_offset(bits: int) -> float:
    """The published code's c = bits + 1, with which h.h' + c is positive."""
    return float(bits + 1)


def power_of_two_offset(bits: int) -> float:
    """The paper's c, so that a product with it is a shift: the least power of two that is at least bits + 1."""
    return float(2 ** bits.bit_length())


# --- codes --------------------------------------------------------------------------------------------------------------
def pack_codes(signs: Tensor) -> Tensor:
    """[..., bits] booleans, at most 32, as int32 codes [...]: bit r is signs[..., r]."""
    weights = 2 ** torch.arange(signs.shape[-1], device=signs.device)
    code = (signs * weights).sum(-1)
    return torch.where(code >= 2**31, code - 2**32, code).to(torch.int32)


def unpack_codes(codes: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """int32 codes [...] as the features [..., bits] that they stand for: +1 where bit r is set, else -1. Higher bits do not
    count."""
    shifts = torch.arange(bits, device=codes.device)
    return ((codes.to(torch.int64)[..., None] >> shifts & 1) * 2 - 1).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _units(qk: Tensor) -> Tensor:
    """Rows of length one; NaN where a row is zero, as in the published code, which has no eps."""
    return qk / qk.square().sum(-1, keepdim=True).sqrt()


def _distances(units: Tensor, supports: Tensor) -> Tensor:
    """Squared, [B, H, N, m]."""
    return (units[:, :, :, None, :] - supports[:, None, :, :]).square().sum(-1)


def preactivations(qk: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    """y [B, H, N, bits] whose signs are the features, in float32 (float64 for float64 qk).

    u = qk / |qk|, d_j = |u - supports_j|^2, sigma the mean of d over tokens and supports of one sample and head,
    y = projection (exp(-d / (2 sigma)) - mean). A zero row of qk is NaN, and through sigma all rows of its head.
    """
    wide = _wide(qk)
    supports = supports.to(wide).reshape(supports.shape[-3:])
    distances = _distances(_units(qk.to(wide)), supports)
    sigma = distances.mean((-2, -1), keepdim=True)
    kernel = torch.exp(-distances / (2 * sigma)) - mean.to(wide).reshape(projection.shape[0], 1, -1)
    return kernel @ projection.to(wide).mT


def hash_codes(qk: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    """int32 codes [B, H, N]: bit r is set where y_r > 0."""
    return pack_codes(preactivations(qk.detach(), supports, projection, mean) > 0)


# --- attention ----------------------------------------------------------------------------------------------------------
def attend(h_q: Tensor, h_k: Tensor, v: Tensor, offset: float, self_term: str) -> Tensor:
    """(h S + c own) / (h.z + N c) with S = sum_j h_j v_j^T and z = sum_j h_j; `own` is the token's own value, or the sum of
    all values, which makes it the mean of the values with weights h.h_j + c."""
    own = v if self_term == "own" else v.sum(-2, keepdim=True)
    numerator = h_q @ (h_k.mT @ v) + offset * own
    denominator = h_q @ h_k.sum(-2)[..., None] + offset * v.shape[-2]
    return numerator / denominator


def hash_attention(
    codes_q: Tensor,
    codes_k: Tensor,
    v: Tensor,
    *,
    bits: int,
    offset: float | str | None = None,
    self_term: str = "own",
) -> Tensor:
    """Attention of packed codes, in float32 (float64 for float64 v) whatever autocast says, rounded to the dtype of v."""
    wide = _wide(v)
    with torch.autocast(v.device.type, enabled=False):
        h_q, h_k = unpack_codes(codes_q, bits, wide), unpack_codes(codes_k, bits, wide)
        return attend(h_q, h_k, v.to(wide), offset_of(offset, bits), self_term).to(v.dtype)


def offset_of(offset: float | str | None, bits: int) -> float:
    """The number that the public argument stands for."""
    if offset is None:
        return default_offset(bits)
    return power_of_two_offset(bits) if isinstance(offset, str) else float(offset)


def binary(y: Tensor) -> Tensor:
    """+1 where y > 0, else -1, and NaN where y is. The gradient is that of the identity where -1 < y < 1, else 0."""
    value = torch.where(y > 0, 1.0, -1.0).to(y.dtype).masked_fill(y.isnan(), torch.nan)
    through = torch.where(y.abs() < 1, y, 0)
    return value + (through - through.detach())


def ecoformer_attention(
    qk: Tensor,
    v: Tensor,
    supports: Tensor,
    projection: Tensor,
    mean: Tensor,
    *,
    self_term: str = "own",
    offset: float | str | None = None,
) -> Tensor:
    """Hashing and attention with the gradients of training: straight through the sign, and through everything before it to
    qk; the hash functions get none."""
    with torch.autocast(v.device.type, enabled=False):
        h = binary(preactivations(qk, supports.detach(), projection.detach(), mean.detach()))
        return attend(h, h, v.to(h.dtype), offset_of(offset, projection.shape[-2]), self_term).to(v.dtype)


# --- the operators' own signatures, for devices without kernels ---------------------------------------------------------
def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(operator)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return operator(first, *rest)

    return run


@_without_autocast
def hash_attention_op(v: Tensor, codes_q: Tensor, codes_k: Tensor, bits: int, offset: float, own: bool) -> Tensor:
    """The operator mmkernels::hash_attention."""
    wide = _wide(v)
    h_q, h_k = unpack_codes(codes_q, bits, wide), unpack_codes(codes_k, bits, wide)
    return attend(h_q, h_k, v.to(wide), offset, "own" if own else "all").to(v.dtype).contiguous()


@_without_autocast
def hash_attention_backward_op(
    grad: Tensor, codes_q: Tensor, codes_k: Tensor, bits: int, offset: float, own: bool
) -> Tensor:
    """The operator mmkernels::hash_attention_backward: the gradient of v."""
    wide = _wide(grad)
    h_q, h_k = unpack_codes(codes_q, bits, wide), unpack_codes(codes_k, bits, wide)
    scaled = grad.to(wide) / (h_q @ h_k.sum(-2)[..., None] + offset * codes_k.shape[-1])
    grad_v = h_k @ (h_q.mT @ scaled) + offset * (scaled if own else scaled.sum(-2, keepdim=True))
    return grad_v.to(grad.dtype).contiguous()


@_without_autocast
def ecoformer_attention_op(
    qk: Tensor,
    v: Tensor,
    supports: Tensor,
    projection: Tensor,
    mean: Tensor,
    offset: float,
    own: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::ecoformer_attention: the output, and where `keep` is set what backward needs: codes, the bits
    whose gradient passes (|y| < 1) packed alike, and [S, z, sum of v, sigma] of each head."""
    y = preactivations(qk, supports, projection, mean)
    h, values = binary(y), v.to(y.dtype)
    out = attend(h, h, values, offset, "own" if own else "all").to(v.dtype).contiguous()
    if not keep:
        none = qk.new_empty(0, dtype=torch.int32)
        return out, none, none.clone(), y.new_empty(0)
    wide_supports = supports.to(y.dtype).reshape(supports.shape[-3:])
    sigma = _distances(_units(qk.to(y.dtype)), wide_supports).mean((-2, -1))
    sigma = torch.where(y.isnan().flatten(2).any(-1), torch.nan, sigma)
    kept = torch.cat(((h.mT @ values).flatten(-2), h.sum(-2), values.sum(-2), sigma[..., None]), -1)
    return out, pack_codes(y > 0), pack_codes(y.abs() < 1), kept


@_without_autocast
def ecoformer_attention_backward_op(
    grad: Tensor,
    qk: Tensor,
    v: Tensor,
    supports: Tensor,
    projection: Tensor,
    mean: Tensor,
    codes: Tensor,
    inside: Tensor,
    sums: Tensor,
    offset: float,
    own: bool,
    need_qk: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::ecoformer_attention_backward: gradients of qk and v (empty where not needed).

    Its steps are what kernels do, row by row: with g' = grad / denominator and t the gradient of the denominator,
    grad h = S g' + t z (as query) + dS v + dz (as key), where dS = sum h g'^T and dz = sum h t; then back through the
    projection, the kernel, sigma and the norm.
    """
    wide, bits, tokens, width = sums.dtype, projection.shape[1], qk.shape[2], v.shape[3]
    h, passes = unpack_codes(codes, bits, wide), unpack_codes(inside, bits, wide) > 0
    state, counts, total, sigma = sums.split((bits * width, bits, width, 1), -1)
    state = state.unflatten(-1, (bits, width))
    values, upstream = v.to(wide), grad.to(wide)
    denominator = h @ counts[..., None] + offset * tokens
    scaled = upstream / denominator + 0 * sigma[..., None]  # NaN where the head's codes were
    numerator = h @ state + offset * (values if own else total[..., None, :])
    slope = -(numerator * scaled).sum(-1, keepdim=True) / denominator
    grad_state = h.mT @ scaled
    none = qk.new_empty(0)
    grad_v = none
    if need_v:
        grad_v = h @ grad_state + offset * (scaled if own else scaled.sum(-2, keepdim=True))
        grad_v = grad_v.to(v.dtype).contiguous()
    if not need_qk:
        return none.clone() if grad_v is none else none, grad_v
    grad_h = scaled @ state.mT + slope * counts[..., None, :] + values @ grad_state.mT + (h.mT @ slope).mT
    grad_kernel = torch.where(passes, grad_h, 0) @ projection.to(wide)
    anchors = supports.to(wide).reshape(supports.shape[-3:])
    x = qk.to(wide)
    units, lengths = _units(x), x.square().sum(-1, keepdim=True).sqrt()
    distances, sigma = _distances(units, anchors), sigma[..., None]
    weighted = torch.exp(-distances / (2 * sigma)) * grad_kernel
    grad_sigma = (weighted * distances).sum((-2, -1), keepdim=True) / (2 * sigma * sigma)
    grad_distances = grad_sigma / (tokens * anchors.shape[1]) - weighted / (2 * sigma)
    grad_units = 2 * (units * grad_distances.sum(-1, keepdim=True) - grad_distances @ anchors)
    grad_qk = (grad_units - units * (units * grad_units).sum(-1, keepdim=True)) / lengths
    return grad_qk.to(qk.dtype).contiguous(), grad_v
