"""Shifted-window attention, defined. Slow, in plain PyTorch, for any floating dtype.

B batch, G tokens of a grid, W windows of a sample, n tokens of a window with its pads, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # of F.normalize


def window_attention(
    qkv: Tensor,
    rel_bias_table: Tensor | None,
    *,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    scale: float | Tensor | None = None,
    pad_value: Tensor | None = None,
    pad_order: str = "roll_pad",
    bias_window: Sequence[int] | None = None,
    qk_norm: str | None = None,
    mask_value: float = -100.0,
) -> Tensor:
    """What :func:`mmkernels.window_attention` computes; its docstring says what each argument is."""
    return window_attention_op(
        qkv,
        rel_bias_table,
        pad_value,
        scale if isinstance(scale, Tensor) else None,
        window,
        shift,
        num_heads,
        _factor(scale, qkv, num_heads),
        window if bias_window is None else bias_window,
        pad_order == "pad_roll",
        NORM_EPS if qk_norm == "l2" else 0.0,
        mask_value,
    )[0]


def _factor(scale: float | Tensor | None, qkv: Tensor, num_heads: int) -> float:
    if scale is None:
        return (qkv.size(-1) // (3 * num_heads)) ** -0.5
    return 1.0 if isinstance(scale, Tensor) else scale


# --- where everything is ------------------------------------------------------------------------------------------------
def placement(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int], pad_first: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(source, region), both [W, n] int64: which token of the grid stands there, G for a pad, and in which region.

    One axis of 5 tokens, window 4, shift 2, so padded to 8:

        roll, then pad      2 3 4 0 | 1 . . .         pad, then roll      2 3 4 . | . . 0 1
        regions             0 0 0 0 | 1 1 2 2         regions             0 0 0 0 | 1 1 2 2
    """
    source = torch.zeros((), dtype=torch.int64, device=device)
    region, padding = source, source.bool()
    for size, extent, step in zip(grid, window, shift, strict=True):
        padded = -(-size // extent) * extent
        at = torch.arange(padded, device=device)
        token = (at + step) % max(padded if pad_first else size, 1)
        pads = token >= size if pad_first else at >= size
        # Slices at -window and -shift. A shift of 0 slices nothing off: [-0:] is the whole axis.
        part = (at >= padded - extent).long() + (at >= padded - step).long() if step > 0 else torch.zeros_like(at)
        source = source[..., None] * size + token
        region = region[..., None] * 3 + part
        padding = padding[..., None] | pads
    tokens = math.prod(grid)
    return _by_window(source.masked_fill(padding, tokens), window), _by_window(region, window)


def _by_window(x: Tensor, window: Sequence[int]) -> Tensor:
    """A padded grid [...] as [W, n]."""
    pieces: list[int] = []
    for size, extent in zip(x.shape, window, strict=True):
        pieces += [size // extent, extent]
    order = (*range(0, len(pieces), 2), *range(1, len(pieces), 2))
    return x.reshape(pieces).permute(order).reshape(math.prod(pieces[::2]), math.prod(window))


def relative_position_index(bias_window: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """[tokens, tokens]: the row of the table for a query and a key, which are numbered as in a window of `bias_window`."""
    axes = torch.meshgrid(*(torch.arange(extent, device=device) for extent in bias_window), indexing="ij")
    index = torch.zeros((tokens, tokens), dtype=torch.int64, device=device)
    for extent, axis in zip(bias_window, axes, strict=True):
        at = axis.flatten()[:tokens]
        index = index * (2 * extent - 1) + at[:, None] - at + extent - 1
    return index


def _gathered(tokens: Tensor, pad: Tensor, source: Tensor) -> Tensor:
    """Rows of [B, G, C] and pads as [B * W, n, C]."""
    rows = torch.cat((tokens, pad.expand(tokens.size(0), 1, -1)), 1).index_select(1, source.flatten())
    return rows.reshape(tokens.size(0) * source.size(0), source.size(1), tokens.size(2))


def _scattered(windows: Tensor, source: Tensor, like: Tensor) -> Tensor:
    """[B * W, n, C] put back into the grid of `like`; pads are dropped."""
    tokens = math.prod(like.shape[1:-1])
    home = source.flatten().argsort()[:tokens]  # every token stands in one place; pads, numbered last, fall off
    rows = windows.reshape(like.size(0), source.numel(), windows.size(-1)).index_select(1, home)
    return rows.reshape(*like.shape[:-1], windows.size(-1))


def _heads(windows: Tensor, parts: int, num_heads: int) -> Tensor:
    """[B * W, n, parts * C] -> [parts, B * W, H, n, D]."""
    return windows.unflatten(-1, (parts, num_heads, windows.size(-1) // (parts * num_heads))).permute(2, 0, 3, 1, 4)


# --- the scores ---------------------------------------------------------------------------------------------------------
def _normalised(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps), taken in float32: eps is nothing in half precision."""
    return x if eps == 0 else F.normalize(x.to(_wide(x)), dim=-1, eps=eps).to(x.dtype)


def _products(q: Tensor, k: Tensor, head_scale: Tensor | None, scale: float) -> Tensor:
    if head_scale is None:
        return (q * scale) @ k.transpose(-1, -2)
    products = q @ k.transpose(-1, -2)
    return products * head_scale[:, None, None].to(products.dtype)


def _weights(
    q: Tensor,
    k: Tensor,
    rel_bias_table: Tensor | None,
    head_scale: Tensor | None,
    scale: float,
    bias_window: Sequence[int],
    region: Tensor,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    """The softmax [B * W, H, n, n] and its logsumexp [B * W, H, n]."""
    scores = _products(q, k, head_scale, scale)
    if rel_bias_table is not None:
        index = relative_position_index(bias_window, q.size(2), q.device)
        scores = scores + rel_bias_table[index].permute(2, 0, 1).to(scores.dtype)
    apart = region[:, :, None] != region[:, None, :]
    mask = torch.zeros(apart.shape, dtype=scores.dtype, device=q.device).masked_fill(apart, mask_value)
    by_window = scores.reshape(-1 if mask.size(0) > 0 else 0, mask.size(0), *scores.shape[1:])
    scores = (by_window + mask[:, None]).reshape(scores.shape)
    return torch.softmax(scores, -1), torch.logsumexp(scores.to(_wide(q)), -1)


# --- operators ----------------------------------------------------------------------------------------------------------
def window_attention_op(
    qkv: Tensor,
    rel_bias_table: Tensor | None,
    pad_value: Tensor | None,
    head_scale: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    scale: float,
    bias_window: Sequence[int],
    pad_first: bool,
    norm_eps: float,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::window_attention: (out, lse). head_scale takes the place of scale; a norm_eps of 0 is no
    normalisation."""
    source, region = placement(qkv.shape[1:-1], window, shift, pad_first, qkv.device)
    q, k, v = _heads(_gathered(qkv.flatten(1, -2), _pad(qkv, pad_value), source), 3, num_heads)
    q, k = _normalised(q, norm_eps), _normalised(k, norm_eps)
    weights, lse = _weights(q, k, rel_bias_table, head_scale, scale, bias_window, region, mask_value)
    return _scattered((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2), source, qkv), lse


def _pad(qkv: Tensor, pad_value: Tensor | None) -> Tensor:
    return qkv.new_zeros(qkv.size(-1)) if pad_value is None else pad_value.to(qkv.dtype)


def window_attention_backward_op(
    grad_out: Tensor,
    qkv: Tensor,
    rel_bias_table: Tensor | None,
    pad_value: Tensor | None,
    head_scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    scale: float,
    bias_window: Sequence[int],
    pad_first: bool,
    norm_eps: float,
    mask_value: float,
    need_table: bool,
    need_pad: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::window_attention_backward: gradients of qkv, rel_bias_table, pad_value and head_scale; the
    last three empty where they are not needed. All in float32 beside half precision."""
    wide = _wide(qkv)
    source, region = placement(qkv.shape[1:-1], window, shift, pad_first, qkv.device)
    q, k, v = _heads(_gathered(qkv.flatten(1, -2), _pad(qkv, pad_value), source).to(wide), 3, num_heads)
    unit_q, unit_k = _normalised(q, norm_eps), _normalised(k, norm_eps)
    nothing = grad_out.new_zeros(grad_out.size(-1))
    upstream = _heads(_gathered(grad_out.flatten(1, -2), nothing, source).to(wide), 1, num_heads)[0]

    weights, _ = _weights(unit_q, unit_k, rel_bias_table, head_scale, scale, bias_window, region, mask_value)
    of_weights = upstream @ v.transpose(-1, -2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    factor = scale if head_scale is None else head_scale[:, None, None].to(q.dtype)
    of_windows = torch.stack(
        (
            _through_norm((of_scores @ unit_k) * factor, q, norm_eps),
            _through_norm((of_scores.transpose(-1, -2) @ unit_q) * factor, k, norm_eps),
            weights.transpose(-1, -2) @ upstream,
        )
    )
    of_windows = of_windows.permute(1, 3, 0, 2, 4).flatten(2)  # [B * W, n, 3 * C]

    def none(like: Tensor | None) -> Tensor:
        return qkv.new_zeros(0, dtype=qkv.dtype if like is None else like.dtype)

    of_table, of_pad, of_scale = none(rel_bias_table), none(pad_value), none(head_scale)
    if rel_bias_table is not None and need_table:
        index = relative_position_index(bias_window, source.size(1), qkv.device).flatten()
        pairs = of_scores.sum(0).flatten(1).T
        of_table = pairs.new_zeros(rel_bias_table.shape).index_add(0, index, pairs).to(rel_bias_table.dtype)
    if pad_value is not None and need_pad:
        pads = (source.flatten() == math.prod(qkv.shape[1:-1])).nonzero()[:, 0]
        rows = of_windows.reshape(qkv.size(0), source.numel(), qkv.size(-1)).index_select(1, pads)
        of_pad = rows.sum((0, 1)).to(pad_value.dtype)
    if head_scale is not None and need_scale:
        of_scale = (of_scores * (unit_q @ unit_k.transpose(-1, -2))).sum((0, 2, 3)).to(head_scale.dtype)
    return _scattered(of_windows, source, qkv).to(qkv.dtype), of_table, of_pad, of_scale


def _through_norm(gradient: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient of x from that of x / max(|x|, eps)."""
    if eps == 0:
        return gradient
    length = x.norm(dim=-1, keepdim=True)
    unit = x / length.clamp_min(eps)
    along = torch.where(length < eps, 0.0, (unit * gradient).sum(-1, keepdim=True))
    return (gradient - unit * along) / length.clamp_min(eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- the published pipeline ---------------------------------------------------------------------------------------------
def pipeline(
    qkv: Tensor,
    rel_bias_table: Tensor | None,
    *,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    scale: float | Tensor | None = None,
    pad_value: Tensor | None = None,
    pad_order: str = "roll_pad",
    bias_window: Sequence[int] | None = None,
    qk_norm: str | None = None,
    mask_value: float = -100.0,
) -> Tensor:
    """The same as published blocks run it: roll, pad, partition, scaled_dot_product_attention with bias and mask in one
    tensor, reverse, un-roll. What modules without kernels run, and what the benchmark measures against."""
    grid, axes = qkv.shape[1:-1], tuple(range(1, qkv.dim() - 1))
    crop = (slice(None), *(slice(size) for size in grid))
    shifted, padded = any(shift), [-(-size // extent) * extent for size, extent in zip(grid, window, strict=True)]
    back = [-step for step in shift]

    def pad(x: Tensor) -> Tensor:
        if padded == list(grid):
            return x
        if pad_value is None:
            ends = [end for size, full in zip(reversed(grid), reversed(padded), strict=True) for end in (0, full - size)]
            return F.pad(x, (0, 0, *ends))
        filled = pad_value.to(x.dtype).expand(x.size(0), *padded, -1).clone()
        filled[crop] = x
        return filled

    x = pad(qkv) if pad_order == "pad_roll" else qkv
    x = torch.roll(x, back, axes) if shifted else x
    x = x if pad_order == "pad_roll" else pad(x)

    pieces = [part for full, extent in zip(padded, window, strict=True) for part in (full // extent, extent)]
    split = (0, *range(1, len(pieces) + 1, 2), *range(2, len(pieces) + 1, 2), len(pieces) + 1)
    tokens = math.prod(window)
    windows = x.reshape(x.size(0), *pieces, -1).permute(split).reshape(-1, tokens, x.size(-1))
    q, k, v = _heads(windows, 3, num_heads)
    if qk_norm == "l2":
        q, k = _normalised(q, NORM_EPS), _normalised(k, NORM_EPS)
    if isinstance(scale, Tensor):
        q, factor = q * scale[:, None, None].to(q.dtype), 1.0
    else:
        factor = _factor(scale, qkv, num_heads)

    bias = None
    if rel_bias_table is not None:
        index = relative_position_index(window if bias_window is None else bias_window, tokens, qkv.device)
        bias = rel_bias_table[index].permute(2, 0, 1)[None].to(q.dtype)
    if shifted:
        _, region = placement(grid, window, shift, pad_order == "pad_roll", qkv.device)
        apart = region[:, :, None] != region[:, None, :]
        mask = torch.zeros(apart.shape, dtype=q.dtype, device=q.device).masked_fill(apart, mask_value)[:, None]
        mask = mask if bias is None else mask + bias
        bias = mask.repeat(x.size(0), 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=factor)

    together = [0]
    for axis in range(len(window)):
        together += [1 + axis, 1 + axis + len(window)]
    out = out.transpose(1, 2).reshape(x.size(0), *pieces[::2], *window, -1).permute(*together, len(pieces) + 1)
    out = out.reshape(x.size(0), *padded, -1)
    if pad_order == "pad_roll":
        return (torch.roll(out, list(shift), axes) if shifted else out)[crop].contiguous()
    out = out[crop]
    return torch.roll(out, list(shift), axes) if shifted else out.contiguous()
