"""Parameter-free cross-attention with an adaptive drop of the lowest scores: the definition.

Source: "ADEM-VL: Adaptive and Embedded Fusion for Efficient Vision-Language Tuning" (2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rank_of(drop_ratio: float, keys: Any) -> Any:
    """The rank, in ascending order, of the score below which a row's scores are dropped: how many are, but for ties."""
    return math.floor(drop_ratio * keys)


def silu_attention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    drop_ratio: float = 0.0,
    key_is_activated: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """(S kept) V with S = scale silu(x) silu(keys)^T, kept where a score reaches the one of rank floor(drop_ratio M)."""
    scores = scale * (F.silu(x) @ (keys if key_is_activated else F.silu(keys)).mT)
    rank = rank_of(drop_ratio, keys.shape[1])
    if rank > 0:
        threshold = scores.detach().sort(-1).values[..., rank : rank + 1]
        scores = scores * (scores >= threshold)
    return scores @ values


# --- the operators' own signatures, for devices without kernels ---------------------------------------------------------
def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _activated(x: Tensor, is_activated: bool = False) -> Tensor:
    """silu as torch rounds it, in the dtype of scores."""
    return (x if is_activated else F.silu(x)).to(_wide(x))


def silu_attention_op(
    x: Tensor, keys: Tensor, values: Tensor, drop_ratio: float, key_is_activated: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::silu_attention: the output, and a threshold of each row that separates what is dropped from
    what is kept: halfway between the two, or the lowest that is kept; 0 where nothing is dropped."""
    scores = (_activated(x) @ _activated(keys, key_is_activated).mT) * scale
    rank = rank_of(drop_ratio, keys.shape[1])
    if rank > 0:
        lowest_kept = scores.sort(-1).values[..., rank]
        below = torch.where(scores < lowest_kept[..., None], scores, -torch.inf).amax(-1)
        middle = below * 0.5 + lowest_kept * 0.5
        threshold = torch.where((middle > below) & (middle <= lowest_kept), middle, lowest_kept)
        scores = scores * (scores >= threshold[..., None])
    else:
        threshold = scores.new_zeros(x.shape[:2])
    return (scores @ values.to(scores.dtype)).to(x.dtype), threshold


def silu_attention_backward_op(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    threshold: Tensor,
    drop_ratio: float,
    key_is_activated: bool,
    scale: float,
    need_x: bool,
    need_keys: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::silu_attention_backward: gradients of x, keys and values (empty where not needed)."""
    wide = threshold.dtype
    query, key, upstream = _activated(x), _activated(keys, key_is_activated), grad.to(wide)
    scores = (query @ key.mT) * scale
    slopes = upstream @ values.to(wide).mT
    if rank_of(drop_ratio, keys.shape[1]) > 0:
        keep = scores >= threshold[..., None]
        scores, slopes = scores * keep, slopes * keep
    slopes = slopes * scale
    none = x.new_empty(0)
    grad_keys = slopes.mT @ query
    if not key_is_activated:
        grad_keys = torch.ops.aten.silu_backward(grad_keys, keys.to(wide))
    return (
        torch.ops.aten.silu_backward(slopes @ key, x.to(wide)).to(x.dtype).contiguous() if need_x else none,
        grad_keys.to(x.dtype).contiguous() if need_keys else none,
        (scores.mT @ upstream).to(x.dtype) if need_values else none,
    )
