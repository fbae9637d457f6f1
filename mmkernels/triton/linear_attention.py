"""Linear attention in Triton.

Index glossary: b a sequence of the batch; H heads of q, of which `group` neighbours share a head of k and v; i a query and
j a key, counted within their sequence; d a channel of q and k (D of them), e a channel of v (DV). f are features, s the
state [D, DV] and z [D]. Of causal attention, every tile of BLOCK rows has the state that its first row finds; else all
queries of a sequence have one.

Operands of heads (q, k, v, out, gradients, numbers of a query) are tuples (pointer, strides of b, head and token); packed
sequences have their tokens one after the other (stride of b: 0) and begin where cu_seqlens says. States are contiguous,
[states, heads of k, D, DV] and [states, heads of k, D].

No atomics: sums over a sequence are made tile by tile and added up in their order. Features, and what else enters a product
of matrices, are rounded to the dtype of q.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.reference.linear_attention import SOFTMAX
from mmkernels.triton import launch, pinned
from mmkernels.triton.attention_parts import address, load_rows, place, sequence, store_rows

IS_SOFTMAX = tl.constexpr(SOFTMAX)
IS_ELU1 = tl.constexpr(2)
IS_RELU = tl.constexpr(1)

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = ["tiles", "sequences", "heads", "group", "len_q", "len_k", "tokens", "elements", "mask_batch", "mask_row"]


# --- features -----------------------------------------------------------------------------------------------------------
@triton.jit
def features(x, live, MAP: tl.constexpr):
    """Features in float32; 0 where there is nothing."""
    if MAP == IS_ELU1:
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == IS_RELU:
        x = tl.where(x <= 0, 0.0, x)
    elif MAP == IS_SOFTMAX:
        x = tl.exp(tl.where(live, x, 0.0))
    return tl.where(live, x, 0.0)


@triton.jit
def times_slope(gradient, x, MAP: tl.constexpr):
    """The gradient of features as that of what they were made from."""
    if MAP == IS_ELU1:
        gradient = tl.where(x > 0, gradient, gradient * tl.exp(tl.minimum(x, 0.0)))
    elif MAP == IS_RELU:
        gradient = tl.where(x <= 0, 0.0, gradient)
    elif MAP == IS_SOFTMAX:
        gradient = gradient * tl.exp(x)
    return gradient


@triton.jit
def query_rows(q, b, head, token, inside, MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(what features are made of, features) of queries, in float32 and in the dtype of q."""
    d = tl.arange(0, BLOCK_D)
    x = load_rows(address(q, b, head, token), inside, D, BLOCK_D, True).to(tl.float32)
    if MAP == IS_SOFTMAX:
        x -= tl.max(tl.where((d < D)[None, :], x, float("-inf")), 1)[:, None]
    live = inside[:, None] & (d < D)[None, :]
    return x, features(x, live, MAP).to(q[0].dtype.element_ty)


@triton.jit
def counted_keys(mask, mask_batch, mask_row, b, token, inside):
    """Which of these keys count."""
    counts = inside
    if mask is not None:
        at = mask + b.to(tl.int64) * mask_batch + token.to(tl.int64) * mask_row
        counts = inside & (tl.load(at, mask=inside, other=0) != 0)
    return counts


@triton.jit
def key_rows(
    k, shift, b, head, heads, token, counts,
    MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same of keys; those that do not count have features of 0."""
    d = tl.arange(0, BLOCK_D)
    x = load_rows(address(k, b, head, token), counts, D, BLOCK_D, True).to(tl.float32)
    if MAP == IS_SOFTMAX:
        x -= tl.load(shift + (b.to(tl.int64) * heads + head) * D + d, mask=d < D, other=0.0)[None, :]
    live = counts[:, None] & (d < D)[None, :]
    return x, features(x, live, MAP).to(k[0].dtype.element_ty)


@triton.jit
def load_state(s, state, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """[BLOCK_D, BLOCK_DV] of a state."""
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    at = s + state.to(tl.int64) * D * DV + d[:, None] * DV + e[None, :]
    return tl.load(at, mask=(d < D)[:, None] & (e < DV)[None, :], other=0.0)


@triton.jit
def load_sums(z, state, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    return tl.load(z + state.to(tl.int64) * D + d, mask=d < D, other=0.0)


@triton.jit
def rows_of_tile(cu, tile, sequences, tokens, BLOCK: tl.constexpr):
    """(sequence, first token, tokens, first row) of a tile; it has no rows where this is none of the sequence's."""
    b, first_row = place(tile, cu, sequences, tokens, 1, BLOCK)
    begin, length = sequence(cu, b, tokens)
    return b, begin, length, first_row


# --- sums ---------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def top_kernel(
    k, mask, shift, cu_k, sequences, heads, len_k, mask_batch, mask_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest of each channel, over the keys of one sequence and head that count; grid: (sequences * heads of k,)."""
    b = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin, length = sequence(cu_k, b, len_k)
    d = tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_D,), float("-inf"), tl.float32)
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        counts = counted_keys(mask, mask_batch, mask_row, b, begin + j, j < length)
        x = load_rows(address(k, b, head, begin + j), counts, D, BLOCK_D, True).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.where(counts[:, None], x, float("-inf")), 0))
    tl.store(shift + tl.program_id(0).to(tl.int64) * D + d, tl.where(top == float("-inf"), 0.0, top), mask=d < D)


@triton.jit(do_not_specialize=_SIZES)
def sums_kernel(
    x, y, mask, shift, inverse, gradient, cu, s, z, tiles, sequences, heads, group, tokens, mask_batch, mask_row,
    OF_KEYS: tl.constexpr, MAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The sums over PART rows, for BLOCK_E channels of y; grid: (heads of k * tiles, cdiv(DV, BLOCK_E)).

    Of keys, s = sum f_j y_j^T and z = sum f_j. Of queries, backward: s = sum f_i inverse_i y_i^T and z = sum f_i gradient_i,
    over all heads that share one of k.
    """
    owner = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b, begin, length, first_row = rows_of_tile(cu, tile, sequences, tokens, PART)
    if cu is not None:  # noqa: SIM102 - Triton evaluates both sides of an `and`
        if (first_row < 0) | (first_row >= length):
            return
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for g in range(group):
        for start in range(0, PART, BLOCK_N):
            row = (first_row + start + tl.arange(0, BLOCK_N)).to(length.dtype)
            inside = row < length
            if OF_KEYS:
                head = owner
                counts = counted_keys(mask, mask_batch, mask_row, b, begin + row, inside)
                _, f = key_rows(x, shift, b, owner, heads, begin + row, counts, MAP, D, BLOCK_D)
                sums += tl.sum(f.to(tl.float32), 0)
            else:
                head = owner * group + g
                _, f = query_rows(x, b, head, begin + row, inside, MAP, D, BLOCK_D)
                weight = tl.load(address(gradient, b, head, begin + row), mask=inside, other=0.0)
                sums += tl.sum(f.to(tl.float32) * weight[:, None], 0)
            at = address(y, b, head, begin + row)[:, None] + e[None, :]
            values = tl.load(at, mask=inside[:, None] & (e < DV)[None, :], other=0.0)
            if not OF_KEYS:
                factor = tl.load(address(inverse, b, head, begin + row), mask=inside, other=0.0)
                values = (values.to(tl.float32) * factor[:, None]).to(values.dtype)
            total = tl.dot(tl.trans(f), values, total, input_precision="ieee")
    state = (tile * heads + owner).to(tl.int64)
    to = s + state * D * DV + d[:, None] * DV + e[None, :]
    tl.store(to, total, mask=(d < D)[:, None] & (e < DV)[None, :])
    if tl.program_id(1) == 0:
        tl.store(z + state * D + d, sums, mask=d < D)


@triton.jit(do_not_specialize=_SIZES)
def join_kernel(
    partial, first, final, cu, sequences, heads, tokens, elements,
    REVERSED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of a sequence's tiles, in their order or against it, to `first`; each tile's become what those before
    it add up to. grid: (sequences * heads, cdiv(elements, BLOCK))."""
    b = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin, length = sequence(cu, b, tokens)
    count = tl.cdiv(length, PART)
    if cu is None:  # noqa: SIM108 - both sides would have to be of one type
        tile = b * count
    else:
        tile = (begin // PART + b).to(tl.int32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = tl.program_id(0).to(tl.int64) * elements + at
    running = tl.zeros((BLOCK,), tl.float32)  # without `first`, beside which the sums' own digits may be lost
    before = running
    if first is not None:
        before = tl.load(first + own, mask=at < elements, other=0.0)
    for n in range(count):
        index = tile + (count - 1 - n if REVERSED else n)
        place_of = partial + (index.to(tl.int64) * heads + head) * elements + at
        value = tl.load(place_of, mask=at < elements, other=0.0)
        tl.store(place_of, running + before, mask=at < elements)
        running += value
    tl.store(final + own, running + before, mask=at < elements)


# --- queries and keys ---------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def queries_kernel(
    q, k, v, out, mask, s, z, cu_q, tiles, sequences, heads, group, len_q, mask_batch, mask_row, eps,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, DIVIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK rows of out of one head of q; grid: (heads of q * tiles,). `heads` are those of k."""
    owner = tl.program_id(0) // tiles
    kv_head = owner // group
    tile = tl.program_id(0) % tiles
    b, begin, length, first_row = rows_of_tile(cu_q, tile, sequences, len_q, BLOCK)
    if cu_q is not None:  # noqa: SIM102
        if (first_row < 0) | (first_row >= length):
            return
    row = (first_row + tl.arange(0, BLOCK)).to(length.dtype)
    inside = row < length
    _, f = query_rows(q, b, owner, begin + row, inside, MAP, D, BLOCK_D)
    state = (tile if CAUSAL else b) * heads + kv_head
    of_state = load_state(s, state, D, DV, BLOCK_D, BLOCK_DV).to(f.dtype)
    acc = tl.dot(f, of_state, input_precision="ieee")
    if MAP == IS_SOFTMAX:
        total = tl.sum(f.to(tl.float32), 1)
    else:
        total = tl.sum(f.to(tl.float32) * load_sums(z, state, D, BLOCK_D)[None, :], 1) + eps
    if CAUSAL:
        counts = counted_keys(mask, mask_batch, mask_row, b, begin + row, inside)
        _, g = key_rows(k, None, b, kv_head, heads, begin + row, counts, MAP, D, BLOCK_D)
        scores = tl.dot(f, tl.trans(g), input_precision="ieee")
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
        total += tl.sum(scores, 1)
        values = load_rows(address(v, b, kv_head, begin + row), inside, DV, BLOCK_DV, True)
        acc = tl.dot(scores.to(values.dtype), values, acc, input_precision="ieee")
    if DIVIDE:
        acc = acc / total[:, None]
    store_rows(address(out, b, owner, begin + row), inside, acc, out[0].dtype.element_ty, DV, BLOCK_DV)


@triton.jit(do_not_specialize=_SIZES)
def queries_backward_kernel(
    grad_out, q, k, v, grad_q, inverse, gradient, mask, s, z, cu_q, tiles, sequences, heads, group, len_q,
    mask_batch, mask_row, eps,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, DIVIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK queries of one head, their inverse totals and the gradients of these; grid: as queries_kernel."""
    owner = tl.program_id(0) // tiles
    kv_head = owner // group
    tile = tl.program_id(0) % tiles
    b, begin, length, first_row = rows_of_tile(cu_q, tile, sequences, len_q, BLOCK)
    if cu_q is not None:  # noqa: SIM102
        if (first_row < 0) | (first_row >= length):
            return
    row = (first_row + tl.arange(0, BLOCK)).to(length.dtype)
    inside = row < length
    x, f = query_rows(q, b, owner, begin + row, inside, MAP, D, BLOCK_D)
    upstream = load_rows(address(grad_out, b, owner, begin + row), inside, DV, BLOCK_DV, True)
    state = (tile if CAUSAL else b) * heads + kv_head
    of_state = load_state(s, state, D, DV, BLOCK_D, BLOCK_DV).to(f.dtype)
    acc = tl.dot(upstream, tl.trans(of_state), input_precision="ieee")
    if MAP == IS_SOFTMAX:
        sums = tl.full((BLOCK_D,), 1.0, tl.float32)
        total = tl.sum(f.to(tl.float32), 1)
    else:
        sums = load_sums(z, state, D, BLOCK_D)
        total = tl.sum(f.to(tl.float32) * sums[None, :], 1) + eps
    dots = tl.sum(f.to(tl.float32) * acc, 1)
    if CAUSAL:
        counts = counted_keys(mask, mask_batch, mask_row, b, begin + row, inside)
        _, g = key_rows(k, None, b, kv_head, heads, begin + row, counts, MAP, D, BLOCK_D)
        sees = row[:, None] >= row[None, :]
        scores = tl.where(sees, tl.dot(f, tl.trans(g), input_precision="ieee"), 0.0)
        total += tl.sum(scores, 1)
        values = load_rows(address(v, b, kv_head, begin + row), inside, DV, BLOCK_DV, True)
        slopes = tl.where(sees, tl.dot(upstream, tl.trans(values), input_precision="ieee"), 0.0)
        dots += tl.sum(scores * slopes, 1)
    if DIVIDE:
        inverses = 1.0 / total
        of_totals = -dots * inverses * inverses
        acc = acc * inverses[:, None] + of_totals[:, None] * sums[None, :]
    else:
        inverses = tl.full((BLOCK,), 1.0, tl.float32)
        of_totals = tl.zeros((BLOCK,), tl.float32)
    if CAUSAL:
        slopes = tl.where(sees, slopes * inverses[:, None] + of_totals[:, None], 0.0)
        acc = tl.dot(slopes.to(g.dtype), g, acc, input_precision="ieee")
    acc = times_slope(acc, x, MAP)
    store_rows(address(grad_q, b, owner, begin + row), inside, acc, grad_q[0].dtype.element_ty, D, BLOCK_D)
    tl.store(address(inverse, b, owner, begin + row), inverses, mask=inside)
    tl.store(address(gradient, b, owner, begin + row), of_totals, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def keys_backward_kernel(
    grad_out, q, k, v, grad_k, grad_v, inverse, gradient, mask, shift, s, z, cu_k, tiles, sequences, heads, group, len_k,
    mask_batch, mask_row,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK keys and values of one head; s and z are gradients of the state. grid: (heads of k * tiles,)."""
    owner = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b, begin, length, first_row = rows_of_tile(cu_k, tile, sequences, len_k, BLOCK)
    if cu_k is not None:  # noqa: SIM102
        if (first_row < 0) | (first_row >= length):
            return
    row = (first_row + tl.arange(0, BLOCK)).to(length.dtype)
    inside = row < length
    counts = counted_keys(mask, mask_batch, mask_row, b, begin + row, inside)
    x, f = key_rows(k, shift, b, owner, heads, begin + row, counts, MAP, D, BLOCK_D)
    state = (tile if CAUSAL else b) * heads + owner
    of_keys = tl.zeros((BLOCK, BLOCK_D), tl.float32) + load_sums(z, state, D, BLOCK_D)[None, :]
    # Some channels of v after the other: for the two products of a whole state small GPUs have no shared memory, and LLVM
    # fails on them in float32.
    ee = tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    for first in range(0, DV, BLOCK_E):
        e = first + ee
        here = inside[:, None] & (e < DV)[None, :]
        some = tl.load(address(v, b, owner, begin + row)[:, None] + e[None, :], mask=here, other=0.0)
        at = s + state.to(tl.int64) * D * DV + d[:, None] * DV + e[None, :]
        of_state = tl.load(at, mask=(d < D)[:, None] & (e < DV)[None, :], other=0.0).to(f.dtype)
        of_keys = tl.dot(some, tl.trans(of_state), of_keys, input_precision="ieee")
        if not CAUSAL:
            of_some = tl.dot(f, of_state, input_precision="ieee").to(grad_v[0].dtype.element_ty)
            tl.store(address(grad_v, b, owner, begin + row)[:, None] + e[None, :], of_some, mask=here)
    if CAUSAL:
        values = load_rows(address(v, b, owner, begin + row), inside, DV, BLOCK_DV, True)
        whole = load_state(s, state, D, DV, BLOCK_D, BLOCK_DV).to(f.dtype)
        of_values = tl.dot(f, whole, input_precision="ieee")
        sees = row[:, None] >= row[None, :]
        for n in range(group):
            head = owner * group + n
            _, h = query_rows(q, b, head, begin + row, inside, MAP, D, BLOCK_D)
            upstream = load_rows(address(grad_out, b, head, begin + row), inside, DV, BLOCK_DV, True)
            inverses = tl.load(address(inverse, b, head, begin + row), mask=inside, other=0.0)
            of_totals = tl.load(address(gradient, b, head, begin + row), mask=inside, other=0.0)
            scores = tl.dot(h, tl.trans(f), input_precision="ieee") * inverses[:, None]
            slopes = tl.dot(upstream, tl.trans(values), input_precision="ieee") * inverses[:, None] + of_totals[:, None]
            scores = tl.where(sees, scores, 0.0).to(values.dtype)
            slopes = tl.where(sees, slopes, 0.0).to(values.dtype)
            of_keys = tl.dot(tl.trans(slopes), h, of_keys, input_precision="ieee")
            of_values = tl.dot(tl.trans(scores), upstream, of_values, input_precision="ieee")
        store_rows(address(grad_v, b, owner, begin + row), inside, of_values, grad_v[0].dtype.element_ty, DV, BLOCK_DV)
    of_keys = tl.where(counts[:, None], times_slope(of_keys, x, MAP), 0.0)
    store_rows(address(grad_k, b, owner, begin + row), inside, of_keys, grad_k[0].dtype.element_ty, D, BLOCK_D)


# --- launches -----------------------------------------------------------------------------------------------------------
_PART = 1024  # rows whose sums one program makes where all queries have one state
_ELEMENTS = 256

# Where no table pins others: rows of a tile, warps, and kernels that have other warps for heads of up to 64 channels; what
# spills nowhere and every compiler takes, by the make of the GPU (python_tests/test_triton_linear_attention.py compiles all
# of it). The rows of causal tiles are those of the states, and so the same for all kernels of a call.
_Default = tuple[int, int, dict[str, int]]
_HALF: dict[str, _Default] = {"cuda": (32, 8, {"queries_kernel": 4}), "hip": (32, 4, {})}
_SINGLE: dict[str, _Default] = {"cuda": (16, 8, {"keys_backward_kernel": 4}), "hip": (16, 8, {})}
_UNALIGNED_ROWS = 16  # on CUDA, of more than 64 channels that 16 does not divide: each element has an address in a register
_MOST_VALUES = 32  # channels of v whose sums, or gradients, are at hand
_WIDE_SUMS = 16, 64  # the same of sums on CUDA in half precision for heads of more than 64 channels, rows first


def _heads(x: Tensor, packed: bool) -> tuple[Any, ...]:
    """[B, H, L, ...] or packed [T, H, ...] as an operand of heads."""
    return (x, 0, x.stride(1), x.stride(0)) if packed else (x, *x.stride()[:3])


class _Call:
    """One call: what all of its kernels are given, and how they are launched."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        feature_map: int,
        is_causal: bool,
        normalize: bool,
        eps: float,
    ) -> None:
        self.packed = packed = cu_seqlens_q is not None
        self.q, self.k, self.v = q, k, v
        self.heads, self.kv_heads = q.size(1), k.size(1)
        self.sequences = q.size(0) if cu_seqlens_q is None else cu_seqlens_q.size(0) - 1
        self.len_q, self.len_k = (x.size(0 if packed else 2) for x in (q, k))
        self.cu_q, self.cu_k = (None if cu is None else cu.contiguous() for cu in (cu_seqlens_q, cu_seqlens_k))
        self.causal = is_causal
        self.divides = normalize or feature_map == SOFTMAX
        self.map, self.eps = feature_map, 0.0 if feature_map == SOFTMAX else eps
        channels = q.size(-1), v.size(-1)
        single, on_cuda = q.dtype == torch.float32, launch.make() == "cuda"
        rows, self.warps, others = (_SINGLE if single else _HALF)[launch.make()]
        small = max(launch.block(c) for c in channels) <= 64
        self.others = others if small else {}
        unaligned = not small and on_cuda and any(c % 16 for c in channels)
        if unaligned:
            rows = _UNALIGNED_ROWS
        self.words = "single" if single else "half", small and 64, unaligned and "unaligned", is_causal and "causal"
        (self.rows,) = pinned.tile(("linear_attention", "rows", *self.words), (rows,), ("BLOCK",))
        self.of_sums = _WIDE_SUMS if not small and on_cuda and not single else (self.rows, _MOST_VALUES)
        self.sizes = {"D": channels[0], "DV": channels[1], "BLOCK_D": launch.block(channels[0])}
        self.group = self.heads // self.kv_heads
        self.shared = {"sequences": self.sequences, "heads": self.kv_heads}
        self.mask: dict[str, Any] = {"mask": None, "mask_batch": 0, "mask_row": 0}
        if mask is not None:
            strides = (0, mask.stride(0)) if packed else (0 if mask.size(0) == 1 else mask.stride(0), mask.stride(1))
            self.mask = {"mask": mask.view(torch.uint8), "mask_batch": strides[0], "mask_row": strides[1]}
        self.shift = self._shift() if feature_map == SOFTMAX else None

    def new(self, shape: tuple[int, ...]) -> Tensor:
        """[B, H, L, C], in memory [B, L, H, C]; packed as it is."""
        if self.packed:
            return torch.empty(shape, dtype=self.q.dtype, device=self.q.device)
        batch, heads, length, channels = shape
        return torch.empty((batch, length, heads, channels), dtype=self.q.dtype, device=self.q.device).transpose(1, 2)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def state(self, states: int) -> tuple[Tensor, Tensor]:
        d, dv = self.sizes["D"], self.sizes["DV"]
        return self.floats(states, self.kv_heads, d, dv), self.floats(states, self.kv_heads, d)

    def operand(self, x: Tensor) -> tuple[Any, ...]:
        return _heads(x, self.packed)

    def tiles(self, tokens: int, rows: int) -> int:
        return tokens // rows + self.sequences if self.packed else triton.cdiv(tokens, rows) * self.sequences

    def options(self, kernel: Any) -> dict[str, Any]:
        """Launch options of a kernel."""
        name = kernel.fn.__name__
        default = self.others.get(name, self.warps), 1
        words = ("linear_attention", name.removesuffix("_kernel"), *self.words)
        return launch.options(*pinned.tile(words, default, ("warps", "stages")))

    def _shift(self) -> Tensor:
        shift = self.floats(self.sequences, self.kv_heads, self.sizes["D"])
        if shift.numel() > 0:
            top_kernel[(self.sequences * self.kv_heads,)](
                k=self.operand(self.k),
                shift=shift,
                cu_k=self.cu_k,
                len_k=self.len_k,
                **self.mask,
                **self.shared,
                D=self.sizes["D"],
                BLOCK_D=self.sizes["BLOCK_D"],
                BLOCK_N=self.rows,
                **self.options(top_kernel),
            )
        return shift

    def sums(
        self,
        of_keys: bool,
        x: Tensor,
        y: Tensor,
        first: tuple[Tensor | None, Tensor | None],
        inverse: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(the state of every tile, the final one) of sums over keys, or backward over queries."""
        cu, tokens = (self.cu_k, self.len_k) if of_keys else (self.cu_q, self.len_q)
        part = self.rows if self.causal else _PART
        tiles = self.tiles(tokens, part)
        partial, final = self.state(tiles), self.state(self.sequences)
        rows, most_values = pinned.tile(("linear_attention", "sums tile", *self.words), self.of_sums, ("BLOCK_N", "BLOCK_E"))
        rows = min(rows, part)
        block_e = min(launch.block(self.sizes["DV"]), most_values)
        if tokens * self.sequences > 0:
            sums_kernel[(self.kv_heads * tiles, max(1, triton.cdiv(self.sizes["DV"], block_e)))](
                x=self.operand(x),
                y=self.operand(y),
                shift=self.shift,
                inverse=None if inverse is None else self.operand(inverse),
                gradient=None if gradient is None else self.operand(gradient),
                cu=cu,
                s=partial[0],
                z=partial[1],
                tiles=tiles,
                group=1 if of_keys else self.group,
                tokens=tokens,
                **self.mask,
                **self.shared,
                OF_KEYS=of_keys,
                MAP=self.map,
                **self.sizes,
                BLOCK_E=block_e,
                BLOCK_N=rows,
                PART=part,
                **self.options(sums_kernel),
            )
        for own, before, total in zip(partial, first, final, strict=True):
            elements = total[0, 0].numel() if total.numel() > 0 else 0
            if elements > 0:
                join_kernel[(self.sequences * self.kv_heads, triton.cdiv(elements, _ELEMENTS))](
                    partial=own,
                    first=before,
                    final=total,
                    cu=cu,
                    tokens=tokens,
                    elements=elements,
                    **self.shared,
                    REVERSED=not of_keys,
                    PART=part,
                    BLOCK=_ELEMENTS,
                    **self.options(join_kernel),
                )
        return partial, final

    def over_rows(self, kernel: Any, of_keys: bool, state: tuple[Tensor, Tensor], **arguments: Any) -> None:
        """Launches a kernel whose programs own tiles of queries, or of keys."""
        tokens, owners = (self.len_k, self.kv_heads) if of_keys else (self.len_q, self.heads)
        tiles = self.tiles(tokens, self.rows)
        if tokens * self.sequences * owners > 0:
            kernel[(owners * tiles,)](
                q=self.operand(self.q),
                k=self.operand(self.k),
                v=self.operand(self.v),
                s=state[0],
                z=state[1],
                tiles=tiles,
                group=self.group,
                **arguments,
                **self.mask,
                **self.shared,
                MAP=self.map,
                CAUSAL=self.causal,
                **self.sizes,
                BLOCK_DV=launch.block(self.sizes["DV"]),
                BLOCK=self.rows,
                **self.options(kernel),
            )


# --- operators ----------------------------------------------------------------------------------------------------------
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state_s: Tensor | None,
    state_z: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::linear_attention."""
    call = _Call(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, *how)
    out = call.new((*q.shape[:-1], v.size(-1)))
    partial, final = call.sums(True, k, v, (state_s, state_z))
    if call.map == SOFTMAX:
        final = (final[0] / torch.where(final[1] == 0, 1.0, final[1])[..., None], final[1])
    call.over_rows(
        queries_kernel,
        False,
        partial if call.causal else final,
        out=call.operand(out),
        cu_q=call.cu_q,
        len_q=call.len_q,
        eps=call.eps,
        DIVIDE=call.divides,
    )
    return out, *final


def linear_attention_backward(
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
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::linear_attention_backward."""
    call = _Call(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, *how)
    grad_q, grad_k, grad_v = (call.new(x.shape) for x in (q, k, v))
    inverse, gradient = (call.floats(*q.shape[:-1]) for _ in range(2))
    state = call.sums(True, k, v, (state_s, state_z))[0] if call.causal else (final_s, final_z)
    upstream = {"grad_out": call.operand(grad_out), "inverse": call.operand(inverse), "gradient": call.operand(gradient)}
    call.over_rows(
        queries_backward_kernel,
        False,
        state,
        **upstream,
        grad_q=call.operand(grad_q),
        cu_q=call.cu_q,
        len_q=call.len_q,
        eps=call.eps,
        DIVIDE=call.divides,
    )
    partial, of_state = call.sums(False, q, grad_out, (grad_s, grad_z), inverse, gradient)
    if call.map == SOFTMAX:
        divisor = torch.where(final_z == 0, 1.0, final_z)
        of_state = (of_state[0] / divisor[..., None], -(of_state[0] * final_s).sum(-1) / divisor)
    call.over_rows(
        keys_backward_kernel,
        True,
        partial if call.causal else of_state,
        **upstream,
        grad_k=call.operand(grad_k),
        grad_v=call.operand(grad_v),
        shift=call.shift,
        BLOCK_E=min(launch.block(v.size(-1)), _MOST_VALUES),
        cu_k=call.cu_k,
        len_k=call.len_k,
    )
    return grad_q, grad_k, grad_v, *of_state
