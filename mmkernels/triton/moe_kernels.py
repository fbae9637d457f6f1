"""The kernels of experts in Triton: products of the rows of each expert with its weights, and what stands between them.

Index glossary: a slot is token * K + k, a row a slot's place in the order of the experts; `order` has the slot of each row,
`offsets` where each expert's rows begin. e counts experts, c the channels that a product sums over, n its columns. A tile is
BLOCK_M rows of one expert; from row offsets[e] // BLOCK_M + e on, an expert has tiles enough for all of its rows, and some
that have none and end at once. The rows behind all experts, which no slot in use has, are the tiles of expert E.

Weights are operands (pointer, strides of e, n and c). What rows are made of lies by token (gathered) or by row. Rows from
`last` on do not exist, whatever offsets say. All sums have a fixed order, and no atomics. No tile depends on how many rows
there are, so that a token's bits do not depend on others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton.attention_parts import place
from mmkernels.triton.linear import activate

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = ["tiles", "experts", "slots_a_token", "last", "slots", "parts"]


# --- parts --------------------------------------------------------------------------------------------------------------
@triton.jit
def block_of(blocks, tiles, GROUP: tl.constexpr):
    """(tile, block of columns) of this program: GROUP tiles pass all columns together, so that what these read of weights,
    and of rows, is still in the second-level cache when the next one reads it."""
    of_group = GROUP * blocks
    first = tl.program_id(0) // of_group * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = tl.program_id(0) % of_group
    return first + within % size, within // size


@triton.jit
def rows_of_tile(tile, offsets, experts, last, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; it has none where the first is not before the end."""
    expert, first = place(tile, offsets, experts + 1, 0, 1, BLOCK_M)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1, mask=expert < experts, other=last)
    return expert, begin + first, tl.minimum(end, last)


@triton.jit
def weights_at(w, expert, n, c):
    """Where W[e] has its elements (n, c), a row of these for each c. Whatever the strides: c too may lie far apart."""
    return w[0] + expert.to(tl.int64) * w[1] + n.to(tl.int64)[None, :] * w[2] + c.to(tl.int64)[:, None] * w[3]


@triton.jit
def multiply(acc, rows, w, expert, n, depth, columns, BLOCK_K: tl.constexpr):
    """acc + A W[e]^T for the rows of A that begin at the pointers `rows`."""
    c = tl.arange(0, BLOCK_K)
    at_a = rows[:, None] + c[None, :]
    at_w = weights_at(w, expert, n, c)
    step = tl.cast(w[3], tl.int64) * BLOCK_K
    for first in range(0, depth, BLOCK_K):
        inside = c < depth - first
        a = tl.load(at_a, mask=inside[None, :], other=0.0)
        b = tl.load(at_w, mask=inside[:, None] & (n < columns)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        at_a += BLOCK_K
        at_w += step
    return acc


@triton.jit
def with_bias(acc, bias, expert, n, columns, live):
    """acc + bias[e] in float32, where there is one; none for what is not `live`."""
    if bias is not None:
        at = bias + expert.to(tl.int64) * columns + n
        acc += tl.load(at, mask=n < tl.where(live, columns, 0), other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def load_tile(x, row, n, inside, columns):
    """float32 of a contiguous [rows, columns]."""
    return tl.load(x + row[:, None] * columns + n[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, row, n, inside, columns, tile):
    tl.store(x + row[:, None] * columns + n[None, :], tile.to(x.dtype.element_ty), mask=inside)


# --- forward ------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def hidden_kernel(
    x, x_row, w_in, w_gate, b_in, b_gate, order, offsets, hidden, pre, pre_gate,
    tiles, experts, slots_a_token, last, depth, columns,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_N columns of `hidden` for a tile, of rows gathered from x; grid: (tiles * cdiv(columns,
    BLOCK_N),). `pre` and `pre_gate` get what went into the activation, and 0 in the rows behind all experts."""
    tile, block = block_of(tl.cdiv(columns, BLOCK_N), tiles, GROUP)
    expert, first, end = rows_of_tile(tile, offsets, experts, last, BLOCK_M)
    live = expert < experts
    if (first >= end) | ((pre is None) & (expert >= experts)):
        return
    row = first + tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(order + row, mask=row < tl.where(live, end, first), other=0) // slots_a_token
    rows = x + token * x_row
    summed = tl.where(live, depth, 0)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    inside = (row < end)[:, None] & (n < columns)[None, :]
    if w_gate is None:
        up = multiply(up, rows, w_in, expert, n, summed, columns, BLOCK_K)
        up = with_bias(up, b_in, expert, n, columns, live).to(hidden.dtype.element_ty)
        value, _ = activate(up.to(tl.float32), ACTIVATION)
    else:
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        c = tl.arange(0, BLOCK_K)
        at_x = rows[:, None] + c[None, :]
        at_in = weights_at(w_in, expert, n, c)
        at_gate = weights_at(w_gate, expert, n, c)
        step_in = tl.cast(w_in[3], tl.int64) * BLOCK_K
        step_gate = tl.cast(w_gate[3], tl.int64) * BLOCK_K
        for start in range(0, summed, BLOCK_K):
            here = c < summed - start
            a = tl.load(at_x, mask=here[None, :], other=0.0)
            b = tl.load(at_in, mask=here[:, None] & (n < columns)[None, :], other=0.0)
            up = tl.dot(a, b, up, input_precision="ieee")
            b = tl.load(at_gate, mask=here[:, None] & (n < columns)[None, :], other=0.0)
            gate = tl.dot(a, b, gate, input_precision="ieee")
            at_x += BLOCK_K
            at_in += step_in
            at_gate += step_gate
        up = with_bias(up, b_in, expert, n, columns, live).to(hidden.dtype.element_ty)
        gate = with_bias(gate, b_gate, expert, n, columns, live).to(hidden.dtype.element_ty)
        value, _ = activate(gate.to(tl.float32), ACTIVATION)
        value *= up.to(tl.float32)
        if pre is not None:
            store_tile(pre_gate, row, n, inside, columns, gate)
    if pre is not None:
        store_tile(pre, row, n, inside, columns, up)
    store_tile(hidden, row, n, inside, columns, value)


@triton.jit(do_not_specialize=_SIZES)
def product_kernel(
    a, a_row, also, w, w_also, bias, order, offsets, out,
    tiles, experts, slots_a_token, last, depth, columns,
    BY_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_N columns of out = a W[e]^T + also W_also[e]^T + bias[e] for a tile; grid: (tiles *
    cdiv(columns, BLOCK_N),). Rows of `a` and `out` lie by row, or BY_TOKEN by token, where tokens without an expert get 0
    (`order` names them as expert_order.sort does)."""
    tile, block = block_of(tl.cdiv(columns, BLOCK_N), tiles, GROUP)
    expert, first, end = rows_of_tile(tile, offsets, experts, last, BLOCK_M)
    live = expert < experts
    if (first >= end) | ((not BY_TOKEN) & (expert >= experts)):
        return
    row = first + tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < end)[:, None] & (n < columns)[None, :]
    if BY_TOKEN:
        row = tl.load(order + row, mask=row < end, other=0)
        row = tl.where(row < 0, -1 - row, row) // slots_a_token
    else:
        row = tl.minimum(row, end - 1)
    summed = tl.where(live, depth, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(acc, a + row * a_row, w, expert, n, summed, columns, BLOCK_K)
    if also is not None:
        acc = multiply(acc, also + row * a_row, w_also, expert, n, summed, columns, BLOCK_K)
    acc = with_bias(acc, bias, expert, n, columns, live)
    store_tile(out, row, n, inside, columns, acc)


@triton.jit(do_not_specialize=_SIZES)
def combine_kernel(
    rows, positions, weights, residual, residual_row, residual_column, out, slots_a_token, last, columns,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_N columns of one token's rows, times their weights, in the order of its slots; grid:
    (tokens, cdiv(columns, BLOCK_N))."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(slots_a_token):
        slot = token * slots_a_token + k
        row = tl.load(positions + slot)
        used = (row >= 0) & (row < last)
        value = tl.load(rows + row * columns + n, mask=n < tl.where(used, columns, 0), other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + slot)
        total += tl.where(used, value, 0.0)
    if residual is not None:
        at = residual + token * residual_row + n.to(tl.int64) * residual_column
        total += tl.load(at, mask=n < columns, other=0.0).to(tl.float32)
    tl.store(out + token * columns + n, total.to(out.dtype.element_ty), mask=n < columns)


# --- backward -----------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def hidden_backward_kernel(
    grad, w_out, pre, pre_gate, weights, order, offsets, before, before_gate, weighted, dots,
    tiles, experts, slots_a_token, last, depth, columns,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_N columns of g = grad W_out[e] for a tile, and of it the gradients before the activation;
    grid: (tiles * cdiv(columns, BLOCK_N),). `weighted` gets the hidden activations once more, times the weights of their
    slots as the gradients are; `dots` [blocks of columns, last] each block's share of <g, hidden>."""
    tile, block = block_of(tl.cdiv(columns, BLOCK_N), tiles, GROUP)
    expert, first, end = rows_of_tile(tile, offsets, experts, last, BLOCK_M)
    if (first >= end) | (expert >= experts):
        return
    row = first + tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(order + row, mask=row < end, other=0)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    g = multiply(g, grad + slot // slots_a_token * depth, w_out, expert, n, depth, columns, BLOCK_K)
    inside = (row < end)[:, None] & (n < columns)[None, :]
    weight = tl.load(weights + slot, mask=row < end, other=0.0)[:, None]
    up = load_tile(pre, row, n, inside, columns)
    if pre_gate is None:
        hidden, slope = activate(up, ACTIVATION)
        of_up = g * slope
    else:
        value, slope = activate(load_tile(pre_gate, row, n, inside, columns), ACTIVATION)
        hidden = value * up
        of_up = g * value
        if before_gate is not None:
            store_tile(before_gate, row, n, inside, columns, g * up * slope * weight)
    if before is not None:
        store_tile(before, row, n, inside, columns, of_up * weight)
    if weighted is not None:
        store_tile(weighted, row, n, inside, columns, hidden * weight)
    if dots is not None:
        # Columns beyond the last have a g of 0, and rows beyond the expert's are not kept.
        tl.store(dots + block.to(tl.int64) * last + row, tl.sum(g * hidden, 1), mask=row < end)


@triton.jit(do_not_specialize=_SIZES)
def slot_weights_kernel(
    dots, grad, b_out, expert_ids, positions, out, slots, parts, slots_a_token, last, columns,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of the weights of BLOCK_S slots: the sum of their dots, and <grad, b_out[e]>; grid: (cdiv(slots,
    BLOCK_S),)."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tl.load(positions + slot, mask=slot < slots, other=-1)
    used = (row >= 0) & (row < last)
    total = tl.zeros((BLOCK_S,), tl.float32)
    for part in range(parts):
        total += tl.load(dots + tl.cast(part, tl.int64) * last + row, mask=used, other=0.0)
    if b_out is not None:
        expert = tl.load(expert_ids + slot, mask=used, other=0)
        share = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
        for start in range(0, columns, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = used[:, None] & (n < columns)[None, :]
            upstream = load_tile(grad, slot // slots_a_token, n, inside, columns)
            share += upstream * load_tile(b_out, expert, n, inside, columns)
        total += tl.sum(share, 1)
    tl.store(out + slot, total, mask=slot < slots)


@triton.jit(do_not_specialize=_SIZES)
def grad_matrices_kernel(
    left, left_row, right, right_row, order, offsets, out, slots_a_token, last, height, width,
    LEFT_BY_TOKEN: tl.constexpr, RIGHT_BY_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M x BLOCK_N of out[e] = sum over the rows of e of left^T right; grid: (E * cdiv(height,
    BLOCK_M) * cdiv(width, BLOCK_N),)."""
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    expert = (tl.program_id(0) // (down * across)).to(tl.int64)
    m = tl.program_id(0) // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.minimum(tl.load(offsets + expert), last)
    end = tl.minimum(tl.load(offsets + expert + 1), last)
    r = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + r
        inside = row < end
        of_left = row
        of_right = row
        if LEFT_BY_TOKEN or RIGHT_BY_TOKEN:
            token = tl.load(order + row, mask=inside, other=0) // slots_a_token
            if LEFT_BY_TOKEN:
                of_left = token
            if RIGHT_BY_TOKEN:
                of_right = token
        at_left = left + of_left[:, None] * left_row + m[None, :]
        at_right = right + of_right[:, None] * right_row + n[None, :]
        a = tl.load(at_left, mask=inside[:, None] & (m < height)[None, :], other=0.0)
        b = tl.load(at_right, mask=inside[:, None] & (n < width)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    to = out + expert * height * width + m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def grad_biases_kernel(
    of, weights, order, offsets, out, slots_a_token, last, columns,
    BY_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_N columns over the rows of one expert, times the weights of their slots where these are given;
    grid: (E, cdiv(columns, BLOCK_N))."""
    expert = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.minimum(tl.load(offsets + expert), last)
    end = tl.minimum(tl.load(offsets + expert + 1), last)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < end
        slot = row
        if BY_TOKEN:
            slot = tl.load(order + row, mask=inside, other=0)
            row = slot // slots_a_token
        value = load_tile(of, row, n, inside[:, None] & (n < columns)[None, :], columns)
        if weights is not None:
            value *= tl.load(weights + slot, mask=inside, other=0.0)[:, None]
        total += value
    tl.store(out + expert * columns + n, tl.sum(total, 0).to(out.dtype.element_ty), mask=n < columns)
