"""The slots of a routing sorted by expert, in Triton: a stable counting sort without atomics and without a sync.

Index glossary: i and j count slots (S of them), e experts. Unused slots, and those of experts that there are none of, sort
behind all others, as if they were of expert E. A chunk is CHUNK slots; `table` [chunks, E + 1] has how many slots of each
expert the chunk has, and then, how many those before it have.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton import launch

CHUNK = 1024
_MOST_BINS = 1024
_BLOCK_C, _BLOCK_E = 32, 128
_BLOCK_I, _BLOCK_J = 128, 32
_OPTIONS = launch.options(4)

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = ["slots", "experts", "chunks"]


@triton.jit
def _keys(ids, i, slots, experts):
    """What slots are sorted by, as int32."""
    key = tl.load(ids + i, mask=i < slots, other=-1)
    return tl.where((key >= 0) & (key < experts), key, experts).to(tl.int32)


@triton.jit(do_not_specialize=_SIZES)
def count_kernel(ids, table, slots, experts, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """One program counts the slots of one chunk that go to BINS experts; grid: (cdiv(slots, CHUNK), cdiv(experts + 1,
    BINS))."""
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BINS
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    bin = _keys(ids, i, slots, experts) - first
    # What is behind the last slot counts as unused, of which nobody needs the number.
    counts = tl.histogram(tl.where(bin < 0, 0, bin), BINS, mask=(bin >= 0) & (bin < BINS))
    e = first + tl.arange(0, BINS)
    tl.store(table + chunk * (experts + 1) + e, counts, mask=e <= experts)


@triton.jit(do_not_specialize=_SIZES)
def scan_kernel(table, offsets, chunks, experts, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sums over the chunks before each, and over the experts before each; grid: (1,)."""
    ee = tl.arange(0, BLOCK_E)
    before = tl.full((), 0, tl.int64)
    tl.store(offsets, before)
    for first in range(0, experts + 1, BLOCK_E):
        e = first + ee
        totals = tl.zeros((BLOCK_E,), tl.int64)
        for start in range(0, chunks, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            at = table + c[:, None].to(tl.int64) * (experts + 1) + e[None, :]
            inside = (c < chunks)[:, None] & (e <= experts)[None, :]
            counts = tl.load(at, mask=inside, other=0).to(tl.int32)
            # Within BLOCK_C chunks 32 bits hold the sums.
            tl.store(at, totals[None, :] + (tl.cumsum(counts, 0) - counts), mask=inside)
            totals += tl.sum(counts, 0)
        tl.store(offsets + e + 1, before + tl.cumsum(totals, 0), mask=e < experts)
        before += tl.sum(totals)


@triton.jit(do_not_specialize=_SIZES)
def scatter_kernel(
    ids, table, offsets, order, positions, slots, experts,
    NAME_UNUSED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One program finds the places of BLOCK_I slots; grid: (cdiv(slots, BLOCK_I),). A slot comes after the others of its
    expert that are before it in its chunk, which the program counts by comparing. Unused slots are -1 in `order`, or with
    NAME_UNUSED slot i is -1 - i."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK_I
    i = begin + tl.arange(0, BLOCK_I)
    key = _keys(ids, i, slots, experts)
    chunk = begin // CHUNK
    rank = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(chunk * CHUNK, begin + BLOCK_I, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        same = (key[:, None] == _keys(ids, j, slots, experts)[None, :]) & (j[None, :] < i[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    inside = i < slots
    place = tl.load(offsets + key, mask=inside, other=0) + rank
    place += tl.load(table + chunk * (experts + 1) + key, mask=inside, other=0)
    used = key < experts
    tl.store(order + place, tl.where(used, i, -1 - (i if NAME_UNUSED else i * 0)), mask=inside)
    tl.store(positions + i, tl.where(used, place, -1), mask=inside)


# --- launches -----------------------------------------------------------------------------------------------------------
def sort(expert_ids: Tensor, num_experts: int, name_unused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(order, offsets, positions) as reference.moe.dispatch has them; with `name_unused`, `order` has -1 - slot in place of
    -1, so that who reads it knows all unused slots too."""
    ids = expert_ids.contiguous()
    slots = ids.numel()

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=ids.device)

    order, offsets, positions = new(slots), new(num_experts + 1), new(*ids.shape)
    chunks = triton.cdiv(slots, CHUNK)
    table = new(chunks, num_experts + 1)
    sizes: dict[str, Any] = {"slots": slots, "experts": num_experts}
    bins = min(_MOST_BINS, max(64, triton.next_power_of_2(num_experts + 1)))
    if slots > 0:
        grid = (chunks, triton.cdiv(num_experts + 1, bins))
        count_kernel[grid](ids=ids, table=table, **sizes, CHUNK=CHUNK, BINS=bins, **_OPTIONS)
    scan_kernel[(1,)](
        table=table, offsets=offsets, chunks=chunks, experts=num_experts, BLOCK_C=_BLOCK_C, BLOCK_E=_BLOCK_E, **_OPTIONS
    )
    if slots > 0:
        scatter_kernel[(triton.cdiv(slots, _BLOCK_I),)](
            ids=ids,
            table=table,
            offsets=offsets,
            order=order,
            positions=positions,
            **sizes,
            NAME_UNUSED=name_unused,
            CHUNK=CHUNK,
            BLOCK_I=_BLOCK_I,
            BLOCK_J=_BLOCK_J,
            **_OPTIONS,
        )
    return order, offsets, positions


def expert_order(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::expert_order."""
    return sort(expert_ids, num_experts)
