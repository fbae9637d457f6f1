"""Token rolling in Triton, alone and with LayerNorm: forward and backward.

Index glossary: a row is one frame's tokens; a position is row * tokens + token of the output; `shifts` holds one shift per
token. Every kernel moves whole rows of channels in tiles of BLOCK_C, a power of two. No float atomics: the weights'
gradients are sums over fixed chunks of positions, added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton import launch, pinned
from mmkernels.triton.pinned import Tile

MAX_CHANNELS = 4096  # a row lives in one program's registers, and in backward so do its running sums: twice as many spill

# BLOCK_C -> warps of what has a norm, where no table pins others: what spills nowhere (python_tests/test_triton.py compiles
# all of it).
_WARPS = {64: 1, 256: 1, 1024: 8, MAX_CHANNELS: 8}
_ROLL_WARPS = 4

# How many ranges one launch writes into a table of shifts: a kernel for each of these numbers.
_RANGES = (4, 32)
_TABLE_TOKENS = 256

# What differs from call to call and makes no kernel faster, such as where the numbers of the rows begin: never a reason to
# compile one anew.
_SIZES = [
    "fold", "direction", "frames", "tokens", "positions", "chunks", "mean_out", "rstd_out", "mean_in", "rstd_in",
]  # fmt: skip


@triton.jit
def _source_row(row, token, tokens, frames, shifts, fold, direction, HAS_TABLE: tl.constexpr):
    """The row that a token comes from. By the table, or without one by the system's own rule: `fold` tokens after the first
    come from `direction` frames before, the last `fold` from as many after."""
    if HAS_TABLE:
        shift = tl.load(shifts + token, mask=token < tokens, other=0)
    else:
        shift = tl.where((token >= 1) & (token <= fold), direction, tl.where(token >= tokens - fold, -direction, 0))
    frame = row % frames
    return row - frame + (frame - shift + frames) % frames


@triton.jit(do_not_specialize=_SIZES)
def table_kernel(shifts, starts, stops, moves, tokens, FIRST: tl.constexpr, RANGES: tl.constexpr, BLOCK: tl.constexpr):
    """One program writes the shifts of BLOCK tokens: `moves` of the ranges [starts, stops), which are tuples of RANGES ints
    each, all as `_odd` makes them; with FIRST 0 to the other tokens. Grid: (cdiv(tokens, BLOCK),)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    shift = tl.zeros((BLOCK,), tl.int64)
    named = token < (tokens if FIRST else 0)
    for i in tl.static_range(RANGES):
        inside = (token >= (starts[i] >> 1) - 1) & (token < (stops[i] >> 1) - 1)
        shift = tl.where(inside, (moves[i] >> 1) - 1, shift)
        named = named | inside
    tl.store(shifts + token, shift, mask=named)


@triton.jit(do_not_specialize=_SIZES)
def roll_kernel(
    x,
    out,
    shifts,
    fold,
    direction,
    frames,
    tokens,
    channels,
    row_stride,
    token_stride,
    HAS_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program moves BLOCK_N tokens of one row; grid: (rows * cdiv(tokens, BLOCK_N),)."""
    tiles = tl.cdiv(tokens, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    token = (program % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < tokens
    source = _source_row(row, token, tokens, frames, shifts, fold, direction, HAS_TABLE)
    from_offset = source * row_stride + token * token_stride
    to_offset = (row * tokens + token) * channels
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < channels)[None, :]
        tl.store(out + to_offset[:, None] + c[None, :], tl.load(x + from_offset[:, None] + c[None, :], mask=mask), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def norm_kernel(
    x, shifts, weight, bias, normed, rolled, mean_out, rstd_out,
    fold, direction, frames, tokens, channels, row_stride, token_stride, eps,
    HAS_TABLE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, NEED_ROLLED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program rolls and normalises one position; grid: (rows * tokens,)."""
    position = tl.program_id(0).to(tl.int64)
    row = position // tokens
    token = position % tokens
    source = _source_row(row, token, tokens, frames, shifts, fold, direction, HAS_TABLE)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    raw = tl.load(x + source * row_stride + token * token_stride + c, mask=inside, other=0.0)
    if NEED_ROLLED:
        tl.store(rolled + position * channels + c, raw, mask=inside)
    value = raw.to(tl.float32)
    mean = tl.sum(value) / channels
    centred = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / channels + eps)
    value = centred * rstd
    if HAS_WEIGHT:
        value = value * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value = value + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + position * channels + c, value.to(normed.dtype.element_ty), mask=inside)
    tl.store(mean_out + position, mean)
    tl.store(rstd_out + position, rstd)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    grad_normed, grad_rolled, x, shifts, weight, mean_in, rstd_in, grad_x, partial_weight, partial_bias,
    fold, direction, frames, tokens, channels, row_stride, token_stride, positions, chunks,
    HAS_TABLE: tl.constexpr, HAS_NORMED: tl.constexpr, HAS_ROLLED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program takes one chunk of positions: their grad_x, and the chunk's sums; grid: (chunks,).

    With h = (x - mean) rstd and g = grad_normed * weight:
    grad_x = rstd (g - mean(g) - h mean(g h)) + grad_rolled at the position's source, which no other position shares.
    """
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    sum_weight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    begin = positions * chunk // chunks
    end = positions * (chunk + 1) // chunks
    for position in range(begin, end):
        row = position // tokens
        token = position % tokens
        source = _source_row(row, token, tokens, frames, shifts, fold, direction, HAS_TABLE)
        gradient = tl.zeros((BLOCK_C,), dtype=tl.float32)
        if HAS_NORMED:
            value = tl.load(x + source * row_stride + token * token_stride + c, mask=inside, other=0.0).to(tl.float32)
            upstream = tl.load(grad_normed + position * channels + c, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_in + position)
            hat = (value - tl.load(mean_in + position)) * rstd
            scaled = upstream
            if HAS_WEIGHT:
                scaled = upstream * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
            mean_g = tl.sum(scaled) / channels
            mean_gh = tl.sum(scaled * hat) / channels
            gradient = (scaled - mean_g - hat * mean_gh) * rstd
            sum_weight += upstream * hat
            sum_bias += upstream
        if HAS_ROLLED:
            gradient += tl.load(grad_rolled + position * channels + c, mask=inside, other=0.0).to(tl.float32)
        to = grad_x + (source * tokens + token) * channels + c
        tl.store(to, gradient.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial_weight + chunk * channels + c, sum_weight, mask=inside)
    tl.store(partial_bias + chunk * channels + c, sum_bias, mask=inside)


# --- launches -----------------------------------------------------------------------------------------------------------
def _block_c(channels: int) -> int:
    return next(block for block in _WARPS if block >= channels)


def _warps(kind: str, block_c: int) -> Tile:
    return pinned.tile(("token_roll", kind, block_c), (_WARPS[block_c],), pinned.WARPS)


def _roll_blocks(channels: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_C): tiles of 1024 elements, wide where rows are wide."""
    block_c = _block_c(min(channels, 1024))
    return 1024 // block_c, block_c


def _odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """Odd and more than 1: of ints in a tuple Triton compiles kernels of their own for 1 and for multiples of 16."""
    return tuple(2 * number + 3 for number in numbers)


def _table(num_tokens: int, num_frames: int, flat: Sequence[int], inverse: bool, device: torch.device) -> Tensor:
    """The shift of every token, modulo the frames, on the device. Made anew by every call and by a kernel: a copy from the
    host would wait, and what is kept from call to call would be written over where it lies in the memory of a CUDA graph."""
    shifts = torch.empty(num_tokens, dtype=torch.int64, device=device)
    triples = [
        (flat[i], flat[i + 1], (-flat[i + 2] if inverse else flat[i + 2]) % num_frames) for i in range(0, len(flat), 3)
    ]
    for first in range(0, max(1, len(triples)), _RANGES[-1]):
        some = triples[first : first + _RANGES[-1]]
        ranges = next(number for number in _RANGES if number >= len(some))
        starts, stops, moves = zip(*some, *[(0, 0, 0)] * (ranges - len(some)), strict=True)
        table_kernel[(triton.cdiv(num_tokens, _TABLE_TOKENS),)](
            shifts,
            starts=_odd(starts),
            stops=_odd(stops),
            moves=_odd(moves),
            tokens=num_tokens,
            FIRST=first == 0,
            RANGES=ranges,
            BLOCK=_TABLE_TOKENS,
            **launch.options(_ROLL_WARPS),
        )
    return shifts


def _shift_arguments(
    x: Tensor, num_frames: int, divisor: int, ranges: Sequence[int], inverse: bool = False
) -> dict[str, Any]:
    """What tells a kernel which tokens move: the system's rule by numbers, other ranges by a table."""
    if divisor > 0:
        return {"shifts": x, "fold": x.shape[1] // divisor, "direction": -1 if inverse else 1, "HAS_TABLE": False}
    table = _table(x.shape[1], num_frames, ranges, inverse, x.device)
    return {"shifts": table, "fold": 0, "direction": 0, "HAS_TABLE": True}


def token_roll(x: Tensor, num_frames: int, divisor: int, ranges: Sequence[int], inverse: bool = False) -> Tensor:
    """The operator mmkernels::token_roll."""
    rows, tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_n, block_c = _roll_blocks(channels)
    roll_kernel[(rows * triton.cdiv(tokens, block_n),)](
        x,
        out,
        **_shift_arguments(x, num_frames, divisor, ranges, inverse),
        frames=num_frames,
        tokens=tokens,
        channels=channels,
        row_stride=x.stride(0),
        token_stride=x.stride(1),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        **launch.options(*pinned.tile(("token_roll", "roll", block_c), (_ROLL_WARPS,), pinned.WARPS)),
    )
    return out


def token_roll_layer_norm(
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
    """The operator mmkernels::token_roll_layer_norm."""
    rows, tokens, channels = x.shape
    normed = torch.empty(x.shape, dtype=torch.float32 if float_normed else x.dtype, device=x.device)
    rolled = torch.empty(x.shape if need_rolled else (0,), dtype=x.dtype, device=x.device)
    stats = torch.empty((2, rows, tokens), dtype=torch.float32, device=x.device)
    if normed.numel() == 0:
        return normed, rolled, stats.fill_(torch.nan)  # the statistics of no channels
    block_c = _block_c(channels)
    norm_kernel[(rows * tokens,)](
        x,
        weight=x if weight is None else weight.contiguous(),
        bias=x if bias is None else bias.contiguous(),
        normed=normed,
        rolled=rolled,
        mean_out=stats[0],
        rstd_out=stats[1],
        **_shift_arguments(x, num_frames, divisor, ranges),
        frames=num_frames,
        tokens=tokens,
        channels=channels,
        row_stride=x.stride(0),
        token_stride=x.stride(1),
        eps=eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        NEED_ROLLED=need_rolled,
        BLOCK_C=block_c,
        **launch.options(*_warps("layer_norm", block_c)),
    )
    return normed, rolled, stats


def token_roll_layer_norm_backward(
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
    """The operator mmkernels::token_roll_layer_norm_backward."""
    rows, tokens, channels = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    positions = rows * tokens
    # Enough chunks to fill a GPU, few enough that their sums are little beside the gradients; cut by size alone.
    chunks = min(1024, max(1, positions // 8))
    partial = torch.zeros((2, chunks, channels), dtype=torch.float32, device=x.device)
    if grad_x.numel() > 0:
        block_c = _block_c(channels)
        backward_kernel[(chunks,)](
            x if grad_normed is None else grad_normed,
            x if grad_rolled is None else grad_rolled,
            x,
            weight=x if weight is None else weight.contiguous(),
            mean_in=stats[0],
            rstd_in=stats[1],
            grad_x=grad_x,
            partial_weight=partial[0],
            partial_bias=partial[1],
            **_shift_arguments(x, num_frames, divisor, ranges),
            frames=num_frames,
            tokens=tokens,
            channels=channels,
            row_stride=x.stride(0),
            token_stride=x.stride(1),
            positions=positions,
            chunks=chunks,
            HAS_NORMED=grad_normed is not None,
            HAS_ROLLED=grad_rolled is not None,
            HAS_WEIGHT=weight is not None,
            BLOCK_C=block_c,
            **launch.options(*_warps("layer_norm_backward", block_c)),
        )

    def parameter(needed: bool, like: Tensor | None, sums: Tensor) -> Tensor:
        dtype = x.dtype if like is None else like.dtype
        return sums.sum(0).to(dtype) if needed else torch.empty(0, dtype=dtype, device=x.device)

    return grad_x, parameter(need_weight, weight, partial[0]), parameter(need_bias, bias, partial[1])


# --- what can be launched, for the gate that compiles all of it without a GPU -------------------------------------------
def configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of every tile and element type that the launches above can choose."""
    strides = {name: "i64" for name in ("row_stride", "token_stride")}
    sizes = {name: "i32" for name in ("fold", "direction", "frames", "tokens", "channels")}
    types = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"))
    for x in ("fp32", "bf16", "fp16"):
        for block_c, table in ((64, True), (64, False), (256, True), (256, False), (1024, True), (1024, False)):
            signature = {"x": f"*{x}", "out": f"*{x}", "shifts": "*i64", **sizes, **strides}
            yield (
                roll_kernel,
                signature,
                {"HAS_TABLE": table, "BLOCK_N": 1024 // block_c, "BLOCK_C": block_c},
                launch.options(_ROLL_WARPS),
            )
    for x, normed in types:
        for block_c, warps in _WARPS.items():
            pointers = ("x", "shifts", "weight", "bias", "normed", "rolled", "mean_out", "rstd_out")
            kinds = (x, "i64", x, x, normed, x, "fp32", "fp32")
            signature = {name: f"*{kind}" for name, kind in zip(pointers, kinds, strict=True)}
            flags = {"HAS_TABLE": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "NEED_ROLLED": True, "BLOCK_C": block_c}
            yield norm_kernel, {**signature, **sizes, **strides, "eps": "fp32"}, flags, launch.options(warps)
            backward_pointers = (
                "grad_normed", "grad_rolled", "x", "shifts", "weight", "mean_in", "rstd_in", "grad_x", "partial_weight",
                "partial_bias",
            )  # fmt: skip
            backward_kinds = (normed, x, x, "i64", x, "fp32", "fp32", x, "fp32", "fp32")
            signature = {name: f"*{kind}" for name, kind in zip(backward_pointers, backward_kinds, strict=True)}
            flags = {"HAS_TABLE": True, "HAS_NORMED": True, "HAS_ROLLED": True, "HAS_WEIGHT": True, "BLOCK_C": block_c}
            yield (
                backward_kernel,
                {**signature, **sizes, **strides, "positions": "i32", "chunks": "i32"},
                flags,
                launch.options(warps),
            )
