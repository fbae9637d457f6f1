"""Norm and rotary embedding of queries and keys in Triton: forward and backward.

Index glossary: a token is one position of one sample, counted through the batch; a tile is BLOCK_H heads of one token by all
D channels. The first programs of a launch take the queries, the others the keys. The channel that a channel forms a pair
with is read again, from the cache, instead of moved between threads. No float atomics: sums over tokens are kept for each
piece of them and added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton import launch, pinned
from mmkernels.triton.pinned import Tile

MAX_CHANNELS = 1024  # a head's channels live in one program's registers

# BLOCK_D -> heads of a tile, warps, where no table pins others: what spills nowhere (python_tests/test_triton.py compiles
# all of it).
_TILES = {64: (16, 4), 128: (8, 4), 256: (4, 4), MAX_CHANNELS: (1, 8)}

# As the operators number them.
_NONE, _RMS, _L2, _LAYER = (tl.constexpr(number) for number in range(4))

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = ["q_heads", "k_heads", "q_length", "k_length", "q_programs", "heads", "length", "tiles", "pieces"]


@triton.jit
def _partner(c, pairs, INTERLEAVED: tl.constexpr):
    """(pair, partner, whether it is the first of the two) of each channel below 2 * pairs."""
    if INTERLEAVED:
        return c // 2, c ^ 1, c % 2 == 0
    first = c < pairs
    return tl.where(first, c, c - pairs), tl.where(first, c + pairs, c - pairs), first


@triton.jit
def _load(pointer, offset, inside):
    return tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn(value, other, cos, sin, pair, turns, first, BACK: tl.constexpr):
    """The rotation of `value` by its pair's angle, `other` being its partner; BACK: by the opposite angle."""
    c = _load(cos, pair, turns)[None, :]
    s = _load(sin, pair, turns)[None, :]
    minus = first[None, :] != BACK
    return tl.where(turns[None, :], value * c + tl.where(minus, -other, other) * s, value)


@triton.jit
def _statistics(x, inside, channels, eps, NORM: tl.constexpr):
    """(mean, 1 / what divides, the share of sum(g h) h that the gradient loses) of each head."""
    mean = tl.zeros((x.shape[0],), dtype=tl.float32)
    rstd = mean + 1.0
    share = mean
    if NORM == _LAYER:
        mean = tl.sum(x, 1) / channels
        x = tl.where(inside, x - mean[:, None], 0.0)
    if NORM == _L2:
        length = tl.sqrt(tl.sum(x * x, 1))
        clamped = length < eps
        rstd = 1.0 / tl.where(clamped, eps, length)
        share = tl.where(clamped, 0.0, 1.0)
    elif NORM != _NONE:
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / channels + eps)
        share = mean * 0.0 + 1.0 / channels
    return mean, rstd, share


@triton.jit
def _forward_tile(
    program, x, out, weight, x_sample, x_head, x_token, heads, cos, sin, cos_sample, cos_token, sin_sample, sin_token,
    length, channels, pairs, eps,
    HAS_WEIGHT: tl.constexpr, ROTATES: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(heads, BLOCK_H)
    sample = program // groups // length
    token = program // groups % length
    h = (program % groups) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    inside = (h < heads)[:, None] & (c < channels)[None, :]
    row = (sample * x_sample + token * x_token + h * x_head)[:, None]
    value = _load(x, row + c[None, :], inside)
    mean, rstd, _ = _statistics(value, inside, channels, eps, NORM)
    value = (value - mean[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        value = value * _load(weight, c, c < channels)[None, :]
    if ROTATES:
        turns = c < 2 * pairs
        pair, partner, first = _partner(c, pairs, INTERLEAVED)
        other = _load(x, row + partner[None, :], inside & turns[None, :])
        other = (other - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            other = other * _load(weight, partner, turns)[None, :]
        cos_row, sin_row = cos + sample * cos_sample + token * cos_token, sin + sample * sin_sample + token * sin_token
        value = _turn(value, other, cos_row, sin_row, pair, turns, first, False)
    place = ((sample * heads + h) * length + token)[:, None] * channels + c[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def qk_norm_rope_kernel(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, q_sample, q_head, q_token, k_sample, k_head, k_token,
    cos_sample, cos_token, sin_sample, sin_token, q_heads, k_heads, q_length, k_length, q_programs, channels, pairs, eps,
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr, ROTATES: tl.constexpr, NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program takes one tile; grid: (tiles of q + tiles of k,)."""
    program = tl.program_id(0).to(tl.int64)
    if program < q_programs:
        _forward_tile(
            program, q, q_out, q_weight, q_sample, q_head, q_token, q_heads,
            cos, sin, cos_sample, cos_token, sin_sample, sin_token, q_length, channels, pairs, eps,
            HAS_Q_WEIGHT, ROTATES, NORM, INTERLEAVED, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        _forward_tile(
            program - q_programs, k, k_out, k_weight, k_sample, k_head, k_token, k_heads,
            cos, sin, cos_sample, cos_token, sin_sample, sin_token, k_length, channels, pairs, eps,
            HAS_K_WEIGHT, ROTATES, NORM, INTERLEAVED, BLOCK_H, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def qk_norm_rope_backward_kernel(
    x, gradient, grad_x, weight, sums, cos, sin, x_sample, x_head, x_token, cos_sample, cos_token, sin_sample, sin_token,
    heads, length, tiles, pieces, channels, pairs, eps,
    HAS_WEIGHT: tl.constexpr, ROTATES: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program takes one piece of the tiles of q, or in another launch of k: their gradients, and the piece's sums; grid:
    (pieces,).

    With h the normalised row, u the gradient turned back and g = u * weight: gradient of x = rstd (g - share h sum(g h)),
    for LayerNorm also less rstd mean(g); gradient of weight = sum u h.
    """
    piece = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    groups = tl.cdiv(heads, BLOCK_H)
    for tile in range(tiles * piece // pieces, tiles * (piece + 1) // pieces):
        sample = tile // groups // length
        token = tile // groups % length
        h = (tile % groups) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
        inside = (h < heads)[:, None] & (c < channels)[None, :]
        value = _load(x, (sample * x_sample + token * x_token + h * x_head)[:, None] + c[None, :], inside)
        mean, rstd, share = _statistics(value, inside, channels, eps, NORM)
        hat = tl.where(inside, (value - mean[:, None]) * rstd[:, None], 0.0)
        row = ((sample * heads + h) * length + token)[:, None] * channels
        g = _load(gradient, row + c[None, :], inside)
        if ROTATES:
            turns = c < 2 * pairs
            pair, partner, first = _partner(c, pairs, INTERLEAVED)
            other = _load(gradient, row + partner[None, :], inside & turns[None, :])
            cos_row, sin_row = cos + sample * cos_sample + token * cos_token, sin + sample * sin_sample + token * sin_token
            g = _turn(g, other, cos_row, sin_row, pair, turns, first, True)
        if HAS_WEIGHT:
            total += g * hat
            g = g * _load(weight, c, c < channels)[None, :]
        result = g - hat * (tl.sum(g * hat, 1) * share)[:, None]
        if NORM == _LAYER:
            result = result - (tl.sum(g, 1) * share)[:, None]
        tl.store(grad_x + row + c[None, :], (result * rstd[:, None]).to(grad_x.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(sums + piece * channels + c, tl.sum(total, 0), mask=c < channels)


# --- launches -----------------------------------------------------------------------------------------------------------
def _block_d(channels: int) -> int:
    return next(block for block in _TILES if block >= channels)


def _tile(block_d: int) -> Tile:
    return pinned.tile(("qk_norm_rope", block_d), _TILES[block_d], ("BLOCK_H", "warps"))


def _heads(name: str, x: Tensor) -> dict[str, Any]:
    return {name: x, f"{name}_sample": x.stride(0), f"{name}_head": x.stride(1), f"{name}_token": x.stride(2)}


def _vector(weight: Tensor | None, x: Tensor) -> Tensor:
    return x if weight is None else weight.contiguous()


def _angles(name: str, angles: Tensor | None, x: Tensor) -> dict[str, Any]:
    if angles is None:
        return {name: x, f"{name}_sample": 0, f"{name}_token": 0}
    by_sample = angles.dim() == 3 and angles.shape[0] > 1
    return {name: angles, f"{name}_sample": angles.stride(0) if by_sample else 0, f"{name}_token": angles.stride(-2)}


def _shared(x: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, norm: int, interleaved: bool) -> dict[str, Any]:
    """What both kernels take."""
    block_d = _block_d(x.shape[3])
    block_h, warps = _tile(block_d)
    return {
        **_angles("cos", cos, x),
        **_angles("sin", sin, x),
        "channels": x.shape[3],
        "pairs": 0 if cos is None else cos.shape[-1],
        "eps": eps,
        "ROTATES": cos is not None,
        "NORM": norm,
        "INTERLEAVED": interleaved,
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        **launch.options(warps),
    }


def _tiles(x: Tensor) -> int:
    if x.numel() == 0:
        return 0
    return x.shape[0] * x.shape[2] * triton.cdiv(x.shape[1], _tile(_block_d(x.shape[3]))[0])


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::qk_norm_rope."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_programs, k_programs = _tiles(q), _tiles(k)
    if q_programs + k_programs > 0:
        qk_norm_rope_kernel[(q_programs + k_programs,)](
            **_heads("q", q),
            **_heads("k", k),
            q_out=q_out,
            k_out=k_out,
            q_weight=_vector(q_weight, q),
            k_weight=_vector(k_weight, k),
            q_heads=q.shape[1],
            k_heads=k.shape[1],
            q_length=q.shape[2],
            k_length=k.shape[2],
            q_programs=q_programs,
            HAS_Q_WEIGHT=q_weight is not None,
            HAS_K_WEIGHT=k_weight is not None,
            **_shared(q, cos, sin, eps, norm, interleaved),
        )
    return q_out, k_out


def qk_norm_rope_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
    need_q_weight: bool,
    need_k_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::qk_norm_rope_backward."""
    angles_and_norm = (cos, sin, eps, norm, interleaved)
    of_q, of_q_weight = _backward(grad_q, q, q_weight, need_q_weight, *angles_and_norm)
    of_k, of_k_weight = _backward(grad_k, k, k_weight, need_k_weight, *angles_and_norm)
    return of_q, of_k, of_q_weight, of_k_weight


def _backward(
    gradient: Tensor | None, x: Tensor, weight: Tensor | None, need_weight: bool, *angles_and_norm: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of q or k and of its weight."""
    channels, needs = x.shape[3], gradient is not None and need_weight and weight is not None
    grad_x = torch.empty((0,) if gradient is None else x.shape, dtype=x.dtype, device=x.device)
    tiles = 0 if gradient is None else _tiles(x)
    # Enough pieces to fill a GPU, few enough that their sums are little beside the gradients; cut by size alone.
    pieces = min(tiles, max(1, min(1024, tiles // 4)))
    sums = torch.empty((pieces if weight is not None else 0, channels), dtype=torch.float32, device=x.device)
    if gradient is not None and pieces > 0:
        qk_norm_rope_backward_kernel[(pieces,)](
            **_heads("x", x),
            gradient=gradient.contiguous(),
            grad_x=grad_x,
            weight=_vector(weight, x),
            sums=sums,
            heads=x.shape[1],
            length=x.shape[2],
            tiles=tiles,
            pieces=pieces,
            HAS_WEIGHT=weight is not None,
            **_shared(x, *angles_and_norm),
        )
    dtype_of_weight = x.dtype if weight is None else weight.dtype
    return grad_x, sums.sum(0).to(dtype_of_weight) if needs else torch.empty(0, dtype=dtype_of_weight, device=x.device)


# --- what can be launched, for the gate that compiles all of it without a GPU -------------------------------------------
def _signature(pointers: dict[str, str], strided: tuple[str, ...], sizes: tuple[str, ...]) -> dict[str, str]:
    strides = {f"{name}_{which}": "i64" for name in strided for which in ("sample", "head", "token")}
    angles = {f"{name}_{which}": "i64" for name in ("cos", "sin") for which in ("sample", "token")}
    counts = dict.fromkeys(("channels", "pairs", *sizes), "i32")
    return {**{name: f"*{kind}" for name, kind in pointers.items()}, **strides, **angles, **counts, "eps": "fp32"}


def configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of every tile and element type that the launches above can choose, with all
    that a call can have and the norm that has most; channels that are neighbours in the largest tile."""
    for x in ("fp32", "bf16", "fp16"):
        for block_d, (block_h, warps) in _TILES.items():
            for interleaved in (False, True) if block_d == MAX_CHANNELS else (False,):
                constants = {
                    "ROTATES": True,
                    "NORM": _LAYER.value,
                    "INTERLEAVED": interleaved,
                    "BLOCK_H": block_h,
                    "BLOCK_D": block_d,
                }
                of_both = dict.fromkeys(("q", "k", "q_out", "k_out", "q_weight", "k_weight", "cos", "sin"), x)
                sizes_of_both = ("q_heads", "k_heads", "q_length", "k_length", "q_programs")
                flags = {"HAS_Q_WEIGHT": True, "HAS_K_WEIGHT": True}
                signature = _signature(of_both, ("q", "k"), sizes_of_both)
                yield qk_norm_rope_kernel, signature, {**flags, **constants}, launch.options(warps)
                of_one = {**dict.fromkeys(("x", "gradient", "grad_x", "weight", "cos", "sin"), x), "sums": "fp32"}
                signature = _signature(of_one, ("x",), ("heads", "length", "tiles", "pieces"))
                yield qk_norm_rope_backward_kernel, signature, {"HAS_WEIGHT": True, **constants}, launch.options(warps)
