"""The kernels of attention in Triton for tiny sequences, several of which share a program: launched by attention.py.

Index glossary, beyond that of attention_kernels.py: a pair is a head of a sequence, b * heads + head, and no head of k has
more than one of q. A tile has PAIRS pairs, with SLOT_Q rows for all queries of each and SLOT_K for all keys: softmax needs
no second block and backward no other kernel. Products are those of PAIRS matrices side by side and not of one with blocks on
its diagonal: what is NaN or infinite in a pair stays there, and no product is for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton.attention_parts import (
    LOG2E,
    address,
    hide,
    interval,
    keys_in_sight,
    load_rows,
    lse_of,
    scaled,
    score_rows,
    scores_of,
    softmax_end,
    softmax_step,
    store_rows,
    weights_of,
)

# Of what all kernels of a call are given, what those here take.
SHARED = (
    "q", "k", "v", "bias", "mask", "heads", "len_q", "len_k", "window_left", "window_right", "scale",
    "BASE2", "BOTTOM_RIGHT",
)  # fmt: skip
_SIZES = ["pairs", "heads", "len_q", "len_k", "window_left", "window_right"]


@triton.jit
def _rows_of(pairs, heads, tokens, PAIRS: tl.constexpr, SLOT: tl.constexpr):
    """(b, head, token, is one) of the rows of a tile. Where there is no pair, b and head are those of the last one: scores
    are read wherever b and head say."""
    row = tl.arange(0, PAIRS * SLOT)
    # There may be more pairs than an int32 counts: they are counted from the tile's first one, and the division of that is
    # of scalars.
    first = tl.program_id(0).to(tl.int64) * PAIRS
    here = tl.minimum(pairs - first, PAIRS).to(tl.int32)
    token = row % SLOT
    inside = (row // SLOT < here) & (token < tokens)
    head = (first % heads).to(tl.int32) + tl.minimum(row // SLOT, here - 1)
    return first // heads + head // heads, head % heads, token, inside


@triton.jit
def _by_pair(x, PAIRS: tl.constexpr):
    """[PAIRS * rows, columns] as [PAIRS, rows, columns]."""
    return tl.reshape(x, (PAIRS, x.shape[0] // PAIRS, x.shape[1]))


@triton.jit
def _product(x, y, PAIRS: tl.constexpr):
    """x y of each pair, [PAIRS * rows, columns of y]."""
    z = tl.dot(_by_pair(x, PAIRS), _by_pair(y, PAIRS), input_precision="ieee")
    return tl.reshape(z, (x.shape[0], y.shape[1]))


@triton.jit
def _product_by_rows(x, y, PAIRS: tl.constexpr):
    """x y^T of each pair, [PAIRS * rows of x, rows of y]."""
    z = tl.dot(_by_pair(x, PAIRS), tl.permute(_by_pair(y, PAIRS), (0, 2, 1)), input_precision="ieee")
    return tl.reshape(z, (x.shape[0], y.shape[0] // PAIRS))


@triton.jit
def _product_by_columns(x, y, PAIRS: tl.constexpr):
    """x^T y of each pair, [PAIRS * columns of x, columns of y]."""
    z = tl.dot(tl.permute(_by_pair(x, PAIRS), (0, 2, 1)), _by_pair(y, PAIRS), input_precision="ieee")
    return tl.reshape(z, (PAIRS * x.shape[1], y.shape[1]))


@triton.jit
def _scores(
    queries, keys, bias, mask, b, head, i, len_q, len_k, window_left, window_right, scale,
    BOTTOM_RIGHT: tl.constexpr, EXACT: tl.constexpr, BASE2: tl.constexpr, PAIRS: tl.constexpr, SLOT_K: tl.constexpr,
):  # fmt: skip
    """[PAIRS * SLOT_Q, SLOT_K], -inf where a key is hidden or none."""
    bias_rows = score_rows(bias, b, head, i, 1)
    mask_rows = score_rows(mask, b, head, i, 1)
    i = i[:, None]
    j = tl.arange(0, SLOT_K)[None, :]
    products = _product_by_rows(queries, keys, PAIRS)
    s, _ = scores_of(products, scale, None, bias, bias_rows, i, j, EXACT, BASE2)
    seen_k = keys_in_sight(len_q, len_k, window_right, BOTTOM_RIGHT)
    low, high = interval(i, len_q, seen_k, window_left, window_right, None, BOTTOM_RIGHT)
    return hide(s, low, high, mask, mask_rows, None, None, i, j)


@triton.jit(do_not_specialize=_SIZES)
def tiny_forward_kernel(
    q, k, v, out, lse, bias, mask, pairs, heads, len_q, len_k, window_left, window_right, scale,
    BASE2: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAIRS: tl.constexpr, SLOT_Q: tl.constexpr, SLOT_K: tl.constexpr,
):  # fmt: skip
    """One program attends for PAIRS pairs; grid: (cdiv(pairs, PAIRS),)."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    unit = scale * LOG2E
    b, head, i, inside = _rows_of(pairs, heads, len_q, PAIRS, SLOT_Q)
    b_of_key, head_of_key, j, exists = _rows_of(pairs, heads, len_k, PAIRS, SLOT_K)
    queries = scaled(load_rows(address(q, b, head, i), inside, D, BLOCK_D, True), scale, EXACT)
    keys = load_rows(address(k, b_of_key, head_of_key, j), exists, D, BLOCK_D, True)
    values = load_rows(address(v, b_of_key, head_of_key, j), exists, DV, BLOCK_DV, True)
    s = _scores(
        queries, keys, bias, mask, b, head, i, len_q, len_k, window_left, window_right, scale, BOTTOM_RIGHT, EXACT, BASE2,
        PAIRS, SLOT_K,
    )  # fmt: skip
    top = tl.full((PAIRS * SLOT_Q,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS * SLOT_Q,), tl.float32)
    p, _, top, total = softmax_step(s, top, total, unit, BASE2)
    acc, of_rows = softmax_end(_product(p.to(values.dtype), values, PAIRS), top, total, unit, BASE2)
    store_rows(address(out, b, head, i), inside, acc, out[0].dtype.element_ty, DV, BLOCK_DV)
    tl.store(address(lse, b, head, i), of_rows, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def tiny_backward_kernel(
    grad_out, grad_lse, q, k, v, lse, norm, delta, grad_q, grad_k, grad_v, bias, mask,
    pairs, heads, len_q, len_k, window_left, window_right, scale,
    BASE2: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAIRS: tl.constexpr, SLOT_Q: tl.constexpr, SLOT_K: tl.constexpr,
):  # fmt: skip
    """One program goes back through PAIRS pairs; grid: (cdiv(pairs, PAIRS),). It leaves norm and delta, what queries_kernel
    has them be, where they are not None."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    unit = scale * LOG2E
    b, head, i, inside = _rows_of(pairs, heads, len_q, PAIRS, SLOT_Q)
    b_of_key, head_of_key, j, exists = _rows_of(pairs, heads, len_k, PAIRS, SLOT_K)
    queries = scaled(load_rows(address(q, b, head, i), inside, D, BLOCK_D, True), scale, EXACT)
    keys = load_rows(address(k, b_of_key, head_of_key, j), exists, D, BLOCK_D, True)
    values = load_rows(address(v, b_of_key, head_of_key, j), exists, DV, BLOCK_DV, True)
    upstream = load_rows(address(grad_out, b, head, i), inside, DV, BLOCK_DV, True)
    s = _scores(
        queries, keys, bias, mask, b, head, i, len_q, len_k, window_left, window_right, scale, BOTTOM_RIGHT, EXACT, BASE2,
        PAIRS, SLOT_K,
    )  # fmt: skip
    p = weights_of(s, lse_of(lse, b, head, i, inside, 1, BASE2), None, unit, BASE2)
    total = tl.sum(p, 1)
    of_norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    p *= of_norm[:, None]
    dp = _product_by_rows(upstream, values, PAIRS)
    centre = tl.sum(p * dp, 1)
    if grad_lse is not None:
        centre -= tl.load(address(grad_lse, b, head, i), mask=inside, other=0.0)
    if norm is not None:
        tl.store(address(norm, b, head, i), of_norm, mask=inside)
        tl.store(address(delta, b, head, i), centre, mask=inside)
    of_values = _product_by_columns(p.to(upstream.dtype), upstream, PAIRS)
    store_rows(address(grad_v, b_of_key, head_of_key, j), exists, of_values, grad_v[0].dtype.element_ty, DV, BLOCK_DV)
    ds = (p * (dp - centre[:, None])).to(keys.dtype)
    of_queries = _product(ds, keys, PAIRS) * scale
    store_rows(address(grad_q, b, head, i), inside, of_queries, grad_q[0].dtype.element_ty, D, BLOCK_D)
    of_keys = _product_by_columns(ds, queries, PAIRS)
    if not EXACT:
        of_keys *= scale
    store_rows(address(grad_k, b_of_key, head_of_key, j), exists, of_keys, grad_k[0].dtype.element_ty, D, BLOCK_D)
