"""Parameter-free cross-attention in Triton: the scores of a block of rows, their thresholds, and what is kept. The products
with what was kept are plain ones, and stay torch's.

Index glossary: row counts tokens of x, m keys, d channels of queries and keys, w channels of values. Tiles of scores are
BLOCK_L x BLOCK_M, each summed over d in steps of BLOCK_D: in backward by the very function that forward calls, so that a
score meets its row's threshold with the bits that this was chosen by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.reference.silu_attention import rank_of
from mmkernels.triton import launch

BLOCK_L, BLOCK_M = 16, 128

# Tiles of scores that a program has -> its warps: for the 320 keys of the published systems, and for all that registers hold
# (python_tests/test_triton.py compiles all of it).
_WARPS = {3: 4, 8: 8}
MAX_KEYS = max(_WARPS) * BLOCK_M

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = ["rows", "rank"]


def _options(chunks: int) -> dict[str, Any]:
    """Launch options. In backward as in forward, so that a score is the same in both."""
    return launch.options(_WARPS[chunks])


@triton.jit
def _scores(
    x, keys, row, m, rows, count, channels, x_row, keys_row, scale,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale silu(x) keys^T of these rows and keys, in float32; silu(x) is rounded as torch rounds it. What is beyond the
    last row or key repeats it: whoever stores the scores leaves it out."""
    d = tl.arange(0, BLOCK_D)
    row = tl.minimum(row, rows - 1)
    m = tl.minimum(m, count - 1)
    total = tl.zeros((BLOCK_L, BLOCK_M), dtype=tl.float32)
    at_x = x + row[:, None] * x_row + d[None, :]
    at_keys = keys + m[None, :] * keys_row + d[:, None]
    for first in range(0, channels, BLOCK_D):
        inside = d < channels - first
        query = tl.load(at_x, mask=inside[None, :], other=0.0)
        wide = query.to(tl.float32)
        query = (wide * tl.sigmoid(wide)).to(query.dtype)
        key = tl.load(at_keys, mask=inside[:, None], other=0.0)
        total = tl.dot(query, key, total, input_precision="ieee")
        at_x += BLOCK_D
        at_keys += BLOCK_D
    return total * scale


@triton.jit
def _in_order(bits):
    """The bits of a float as an integer of the same order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=_SIZES)
def silu_attention_kernel(
    x, keys, kept, thresholds, x_sample, x_row, keys_sample, keys_row, rows, count, channels, rank, scale,
    DROPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_L rows of one sample with all their scores; grid: (samples * cdiv(rows, BLOCK_L),).

    Scores are held as integers of their order. The one of rank `rank` in a row is found by bisection of all floats: 32
    counts of the scores at or below the middle. NaN comes last, as torch sorts it; so do the columns beyond the keys. The
    threshold is halfway from the greatest score that is dropped up to the lowest that is kept, or the latter; 0 where
    nothing is dropped.
    """
    blocks = tl.cdiv(rows, BLOCK_L)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    scores = ()  # type: Any
    for chunk in tl.static_range(CHUNKS):
        m = chunk * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        tile = _scores(
            x + sample * x_sample, keys + sample * keys_sample, row, m, rows, count, channels, x_row, keys_row, scale,
            BLOCK_L, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if DROPS:
            tile = tl.where(tile == tile, _in_order(tile.to(tl.int32, bitcast=True)), 0x7FFFFFFF)
            tile = tl.maximum(tile, tl.where(m < count, -0x80000000, 0x7FFFFFFF)[None, :])
        scores = scores + (tile,)  # noqa: RUF005 - Triton unpacks no tuples
    threshold = tl.zeros((BLOCK_L,), dtype=tl.float32)
    if DROPS:
        low = tl.full((BLOCK_L,), -0x80000000, dtype=tl.int32)
        high = tl.full((BLOCK_L,), 0x7FFFFFFF, dtype=tl.int32)
        for _ in range(32):
            middle = (low & high) + ((low ^ high) >> 1)
            found = tl.zeros((BLOCK_L,), dtype=tl.float32)  # LLVM counts bits instead of integers, in memory
            for chunk in tl.static_range(CHUNKS):
                found += tl.sum(tl.where(scores[chunk] <= middle[:, None], 1.0, 0.0), 1)
            high = tl.where(found > rank, middle, high)
            low = tl.where(found > rank, low, middle + 1)
        dropped = tl.full((BLOCK_L,), -0x7F800001, dtype=tl.int32)
        for chunk in tl.static_range(CHUNKS):
            dropped = tl.maximum(dropped, tl.max(tl.where(scores[chunk] < low[:, None], scores[chunk], -0x7F800001), 1))
        below = _in_order(dropped).to(tl.float32, bitcast=True)
        lowest_kept = _in_order(low).to(tl.float32, bitcast=True)
        middle = below * 0.5 + lowest_kept * 0.5
        threshold = tl.where((middle > below) & (middle <= lowest_kept), middle, lowest_kept)
    tl.store(thresholds + sample * rows + row, threshold, mask=row < rows)
    for chunk in tl.static_range(CHUNKS):
        m = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
        value = scores[chunk]
        if DROPS:
            value = _in_order(value).to(tl.float32, bitcast=True)
            value = value * tl.where(value >= threshold[:, None], 1.0, 0.0)
        to = kept + (sample * rows + row)[:, None] * count + m[None, :]
        tl.store(to, value.to(kept.dtype.element_ty), mask=(row < rows)[:, None] & (m < count)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    grad, x, keys, values, thresholds, kept, slopes, x_sample, x_row, keys_sample, keys_row, values_sample, values_row,
    rows, count, channels, width, scale,
    DROPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program takes one tile of scores: what was kept of them, and the gradients before scaling, grad values^T kept
    scale; grid: (samples * cdiv(rows, BLOCK_L) * cdiv(count, BLOCK_M),)."""
    blocks = tl.cdiv(rows, BLOCK_L)
    chunks = tl.cdiv(count, BLOCK_M)
    sample = (tl.program_id(0) // (blocks * chunks)).to(tl.int64)
    row = (tl.program_id(0) // chunks % blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    m = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    value = _scores(
        x + sample * x_sample, keys + sample * keys_sample, row, m, rows, count, channels, x_row, keys_row, scale,
        BLOCK_L, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    w = tl.arange(0, BLOCK_D)
    slope = tl.zeros((BLOCK_L, BLOCK_M), dtype=tl.float32)
    at_grad = grad + (sample * rows + tl.minimum(row, rows - 1))[:, None] * width + w[None, :]
    at_values = values + sample * values_sample + tl.minimum(m, count - 1)[None, :] * values_row + w[:, None]
    for first in range(0, width, BLOCK_D):
        inside = w < width - first
        upstream = tl.load(at_grad, mask=inside[None, :], other=0.0)
        of_keys = tl.load(at_values, mask=inside[:, None], other=0.0)
        slope = tl.dot(upstream, of_keys, slope, input_precision="ieee")
        at_grad += BLOCK_D
        at_values += BLOCK_D
    if DROPS:
        threshold = tl.load(thresholds + sample * rows + row, mask=row < rows, other=0.0)
        keep = tl.where(value >= threshold[:, None], 1.0, 0.0)
        value = value * keep
        slope = slope * keep
    to = (sample * rows + row)[:, None] * count + m[None, :]
    inside = (row < rows)[:, None] & (m < count)[None, :]
    tl.store(kept + to, value.to(kept.dtype.element_ty), mask=inside)
    tl.store(slopes + to, (slope * scale).to(slopes.dtype.element_ty), mask=inside)


# --- launches -----------------------------------------------------------------------------------------------------------
def _chunks(count: int) -> int:
    return next(chunks for chunks in _WARPS if chunks * BLOCK_M >= count)


def _block_d(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float32 else 32


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_{which}": tensor.stride(dim)
        for name, tensor in tensors.items()
        for dim, which in enumerate(("sample", "row"))
    }


def silu_attention(
    x: Tensor, keys: Tensor, values: Tensor, drop_ratio: float, key_is_activated: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::silu_attention."""
    batch, rows, channels = x.shape
    count = keys.shape[1]
    rank = rank_of(drop_ratio, count)
    key = keys if key_is_activated else F.silu(keys)
    kept = torch.empty((batch, rows, count), dtype=x.dtype, device=x.device)
    thresholds = torch.zeros((batch, rows), dtype=torch.float32, device=x.device)
    if kept.numel() > 0:
        silu_attention_kernel[(batch * triton.cdiv(rows, BLOCK_L),)](
            x=x,
            keys=key,
            kept=kept,
            thresholds=thresholds,
            **_strides(x=x, keys=key),
            rows=rows,
            count=count,
            channels=channels,
            rank=rank,
            scale=scale,
            DROPS=rank > 0,
            CHUNKS=_chunks(count),
            BLOCK_L=BLOCK_L,
            BLOCK_M=BLOCK_M,
            BLOCK_D=_block_d(x.dtype),
            **_options(_chunks(count)),
        )
    return kept @ values, thresholds


def silu_attention_backward(
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
    """The operator mmkernels::silu_attention_backward."""
    batch, rows, channels = x.shape
    count = keys.shape[1]
    key = keys if key_is_activated else F.silu(keys)
    kept, slopes = (torch.empty((batch, rows, count), dtype=x.dtype, device=x.device) for _ in range(2))
    if kept.numel() > 0:
        backward_kernel[(batch * triton.cdiv(rows, BLOCK_L) * triton.cdiv(count, BLOCK_M),)](
            grad=grad,
            x=x,
            keys=key,
            values=values,
            thresholds=threshold,
            kept=kept,
            slopes=slopes,
            **_strides(x=x, keys=key, values=values),
            rows=rows,
            count=count,
            channels=channels,
            width=values.shape[2],
            scale=scale,
            DROPS=rank_of(drop_ratio, count) > 0,
            BLOCK_L=BLOCK_L,
            BLOCK_M=BLOCK_M,
            BLOCK_D=_block_d(x.dtype),
            **_options(_chunks(count)),
        )
    grad_x, grad_keys, grad_values = (x.new_empty(0) for _ in range(3))
    if need_x:
        grad_x = torch.ops.aten.silu_backward(slopes @ key, x).contiguous()
    if need_keys:
        grad_keys = slopes.mT @ F.silu(x)
        if not key_is_activated:
            grad_keys = torch.ops.aten.silu_backward(grad_keys, keys).contiguous()
    if need_values:
        grad_values = kept.mT @ grad
    return grad_x, grad_keys, grad_values


# --- what can be launched, for the gate that compiles all of it without a GPU -------------------------------------------
def configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of every element type and number of tiles that the launches can choose."""
    for element, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        tile = {"BLOCK_L": BLOCK_L, "BLOCK_M": BLOCK_M, "BLOCK_D": _block_d(dtype)}
        strides = {f"{name}_{which}": "i64" for name in ("x", "keys") for which in ("sample", "row")}
        sizes = dict.fromkeys(("rows", "count", "channels"), "i32")
        signature = {
            **dict.fromkeys(("x", "keys", "kept"), f"*{element}"),
            "thresholds": "*fp32",
            **strides,
            **sizes,
            "rank": "i32",
            "scale": "fp32",
        }
        for chunks in _WARPS:
            yield silu_attention_kernel, signature, {"DROPS": True, "CHUNKS": chunks, **tile}, _options(chunks)
        signature = {
            **dict.fromkeys(("grad", "x", "keys", "values", "kept", "slopes"), f"*{element}"),
            "thresholds": "*fp32",
            **strides,
            "values_sample": "i64",
            "values_row": "i64",
            **sizes,
            "width": "i32",
            "scale": "fp32",
        }
        for chunks in _WARPS:
            yield backward_kernel, signature, {"DROPS": True, **tile}, _options(chunks)
