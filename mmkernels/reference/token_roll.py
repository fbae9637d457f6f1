"""Temporal token rolling: the definition.

Source: "All in One: Exploring Unified Video-Language Pre-training" (CVPR 2023), the system's variant v=0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[int, int, int]


def default_ranges(num_tokens: int, divisor: int) -> tuple[Range, ...]:
    """The system's ranges: f = num_tokens // divisor tokens after the first look one frame back, the last f one ahead."""
    fold = num_tokens // divisor
    return ((1, 1 + fold, 1), (num_tokens - fold, num_tokens, -1)) if fold > 0 else ()


def token_roll(x: Tensor, num_frames: int, *, divisor: int = 8, ranges: Sequence[Range] | None = None) -> Tensor:
    """out[t] = x[(t - shift) mod T] for the tokens of each range (start, stop, shift); the others stay."""
    batch_frames, num_tokens, channels = x.shape
    if ranges is None:
        ranges = default_ranges(num_tokens, divisor)
    video = x.reshape(batch_frames // num_frames, num_frames, num_tokens, channels)
    out = video.clone()
    for start, stop, shift in ranges:
        out[:, :, start:stop] = torch.roll(video[:, :, start:stop], shift, dims=1)
    return out.reshape(batch_frames, num_tokens, channels)


def token_roll_layer_norm(
    x: Tensor,
    num_frames: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    divisor: int = 8,
    ranges: Sequence[Range] | None = None,
    need_rolled: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(LayerNorm over C of the rolled tokens, the rolled tokens)."""
    rolled = token_roll(x, num_frames, divisor=divisor, ranges=ranges)
    normed = F.layer_norm(rolled, rolled.shape[-1:], weight, bias, eps)
    return normed, rolled if need_rolled else None


# --- the operators' own signatures, for devices without kernels ---------------------------------------------------------
def _ranges_of(x: Tensor, divisor: int, flat: Sequence[int]) -> Sequence[Range]:
    if divisor > 0:
        return default_ranges(x.shape[1], divisor)
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def token_roll_op(x: Tensor, num_frames: int, divisor: int, ranges: Sequence[int], inverse: bool = False) -> Tensor:
    """The operator mmkernels::token_roll; `inverse` rolls back."""
    sign = -1 if inverse else 1
    moved = [(start, stop, sign * shift) for start, stop, shift in _ranges_of(x, divisor, ranges)]
    return token_roll(x, num_frames, ranges=moved)


def token_roll_layer_norm_op(
    x: Tensor,
    num_frames: int,
    divisor: int,
    ranges: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    need_rolled: bool,
    float_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::token_roll_layer_norm: (normed, rolled or empty, [mean; rstd])."""
    rolled = token_roll_op(x, num_frames, divisor, ranges)
    wide = rolled.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    mean = wide.mean(-1)
    centred = wide - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    normed = centred * rstd[..., None]
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    normed = normed.to(wide.dtype if float_normed else x.dtype)
    return normed, rolled if need_rolled else x.new_empty(0), torch.stack((mean, rstd))


def token_roll_layer_norm_backward_op(
    grad_normed: Tensor | None,
    grad_rolled: Tensor | None,
    x: Tensor,
    stats: Tensor,
    num_frames: int,
    divisor: int,
    ranges: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::token_roll_layer_norm_backward: gradients of x, weight and bias (empty where not needed)."""
    mean, rstd = stats[0][..., None], stats[1][..., None]
    rolled = token_roll_op(x, num_frames, divisor, ranges).to(stats.dtype)
    hat = (rolled - mean) * rstd
    upstream = torch.zeros_like(hat) if grad_normed is None else grad_normed.to(stats.dtype)
    scaled = upstream if weight is None else upstream * weight
    centred = scaled - scaled.mean(-1, keepdim=True) - hat * (scaled * hat).mean(-1, keepdim=True)
    grad = centred * rstd
    if grad_rolled is not None:
        grad = grad + grad_rolled
    grad_x = token_roll_op(grad.to(x.dtype), num_frames, divisor, ranges, inverse=True)

    def parameter(needed: bool, like: Tensor | None, value: Tensor) -> Tensor:
        dtype = x.dtype if like is None else like.dtype
        return value.sum((0, 1)).to(dtype) if needed else x.new_empty(0, dtype=dtype)

    return grad_x, parameter(need_weight, weight, upstream * hat), parameter(need_bias, bias, upstream)
