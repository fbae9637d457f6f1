"""The kernels of attention in Triton, forward and backward: made of attention_parts.py, launched by attention.py.

Index glossary: b a sequence of the batch; H heads of q, of which `group` neighbours share a head of k and v; i a query and j
a key, counted within their sequence; d a channel of q and k (D of them), e a channel of v (DV). A tile has BLOCK_M queries
and BLOCK_N keys; BLOCK_D and BLOCK_DV are D and DV rounded up to powers of two. s are scores, p = exp(s - lse) weights,
dp and ds gradients of the two.

Operands are tuples, None where a call has none of them:

- heads (q, k, v, out, lse, delta, gate, gradients): (pointer, strides of b, head and token);
- rows (limits, segment ids): the same with a stride of 0 for heads;
- scores (bias, mask): (pointer, strides of b, head, i and j, how many i and how many j there are); a dimension of size 1 has
  stride 0 and as many as an int32 can count.

Packed sequences have their tokens one after the other (stride of b: 0) and begin where cu_seqlens says; `len_q` and `len_k`
are then the tokens of all sequences until a kernel has looked up its own. A query sees the keys of an interval [low, high),
which joins window, causality, limits and length, less those that mask and segment ids hide. The forward loop goes first
through the blocks that are wholly visible (phase 0: nothing to check) and then through the others (phase 1).

No atomics: every element of every output has one program, which adds up in a fixed order. In half precision without bias
and softcap, and with a positive scale, weights are powers of 2 (BASE2), and scores stay the products that they were, whose
order the scale does not change. Else they are natural: a bias may be as large as a float can be, and in float32 the rounding
of one more factor shows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton.attention_parts import (
    LOG2E,
    address,
    dropout_factor,
    dropout_rows_of,
    hide,
    interval,
    key_blocks,
    keys_in_sight,
    load_rows,
    lse_of,
    per_token,
    place,
    query_blocks,
    scaled,
    score_rows,
    scores_of,
    sequence,
    softmax_end,
    softmax_step,
    store_rows,
    weights_of,
)

FAR = tl.constexpr(256.0)  # of lse: from here on its rounding is more than 2^-17 of a weight

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = [
    "tiles", "sequences", "heads", "group", "len_q", "len_k", "window_left", "window_right", "threshold", "split_rows",
    "all_tiles", "own_heads", "sum_batch", "sum_heads", "size_q", "size_k", "middle", "inner", "rows", "parts",
]  # fmt: skip


# --- forward ------------------------------------------------------------------------------------------------------------
@triton.jit
def attend(
    index,
    q, k, v, out, lse, bias, mask, limits, segments_q, segments_k, gate, cu_q, cu_k, seed,
    tiles, sequences, heads, group, len_q, len_k, window_left, window_right, scale, softcap, threshold, keep_scale,
    split_rows,
    BASE2: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, DECODE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile of this index, see forward_kernel."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    unit = scale * LOG2E
    FREE: tl.constexpr = mask is None and segments_q is None
    owner = index // tiles
    fold = group if DECODE else 1
    b, first_row = place(index % tiles, cu_q, sequences, len_q, fold, BLOCK_M)
    if cu_q is None:  # the last queries first: of causal ones they take longest, and should not be what all wait for
        first_row = (tl.cdiv(len_q * fold, BLOCK_M) - 1) * BLOCK_M - first_row
    begin_q, len_q = sequence(cu_q, b, len_q)
    begin_k, len_k = sequence(cu_k, b, len_k)
    row = (first_row + tl.arange(0, BLOCK_M)).to(len_q.dtype)
    inside = row < len_q * fold
    if cu_q is not None:  # tiles beyond the rows of their sequence have none inside, so no blocks of keys and no scores
        inside = inside & (row >= 0)
    if DECODE:
        i = row % tl.maximum(len_q, 1)
        head = owner * group + tl.minimum(row // tl.maximum(len_q, 1), group - 1)  # scores are read wherever head says
        kv_head = owner
    else:
        i = row
        head = owner + row * 0
        kv_head = owner // group

    limit = per_token(limits, b, 0, begin_q + i, inside, 1)
    segment_q = per_token(segments_q, b, 0, begin_q + i, inside, 1)
    bias_rows = score_rows(bias, b, head, i, 1)
    mask_rows = score_rows(mask, b, head, i, 1)
    if threshold is not None:
        dropout_rows = dropout_rows_of(seed, b * heads + head, i)[:, None]
    low, high = interval(i[:, None], len_q, len_k, window_left, window_right, limit, BOTTOM_RIGHT)
    begin, whole, whole_end, end = key_blocks(low, high, inside[:, None], len_k, BLOCK_N)
    if DECODE:
        # blocks * part // parts, where the product may be more than an int32 counts.
        blocks = (end - begin) // tl.num_programs(1)
        others = (end - begin) % tl.num_programs(1)
        part = tl.program_id(1)
        end = begin + blocks * (part + 1) + others * (part + 1) // tl.num_programs(1)
        begin += blocks * part + others * part // tl.num_programs(1)
        whole = tl.minimum(tl.maximum(whole, begin), end)
        whole_end = tl.minimum(tl.maximum(whole_end, whole), end)
    whole_blocks = whole_end - whole

    own_q = scaled(load_rows(address(q, b, head, begin_q + i), inside, D, BLOCK_D, True), scale, EXACT)
    jj = tl.arange(0, BLOCK_N)
    k_rows = address(k, b, kv_head, begin_k + jj)
    v_rows = address(v, b, kv_head, begin_k + jj)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for phase in tl.static_range(0 if FREE else 1, 2):
        for n in range(whole_blocks if phase == 0 else end - begin - (whole_blocks if FREE else 0)):
            if phase == 0:
                start = (whole + n) * BLOCK_N
            else:
                start = (begin + n) * BLOCK_N
                if FREE:
                    start += tl.where(begin + n >= whole, whole_blocks * BLOCK_N, 0)
            j = start + jj
            keys = load_rows(k_rows + start.to(tl.int64) * k[3], j < len_k, D, BLOCK_D, phase == 1)
            products = tl.dot(own_q, tl.trans(keys), input_precision="ieee")
            s, _ = scores_of(products, scale, softcap, bias, bias_rows, i[:, None], j[None, :], EXACT, BASE2)
            if phase == 1:
                segment_k = per_token(segments_k, b, 0, begin_k + j, j < len_k, 0)
                s = hide(s, low, high, mask, mask_rows, segment_q, segment_k, i[:, None], j[None, :])
            p, rescale, top, total = softmax_step(s, top, total, unit, BASE2)
            if threshold is not None:
                p *= dropout_factor(dropout_rows, j[None, :], threshold, keep_scale)
            if gate is not None:
                factor = tl.load(address(gate, b, kv_head, begin_k + j), mask=j < len_k, other=0.0)
                p *= factor.to(tl.float32)[None, :]
            values = load_rows(v_rows + start.to(tl.int64) * v[3], j < len_k, DV, BLOCK_DV, phase == 1)
            acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    acc, of_rows = softmax_end(acc, top, total, unit, BASE2)
    part = 0
    if DECODE:
        part = tl.program_id(1).to(tl.int64) * split_rows
    out_rows = address(out, b, head, begin_q + i) + part * DV
    store_rows(out_rows, inside, acc, out[0].dtype.element_ty, DV, BLOCK_DV)
    tl.store(address(lse, b, head, begin_q + i) + part, of_rows, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q, k, v, out, lse, bias, mask, limits, segments_q, segments_k, gate, cu_q, cu_k, seed,
    tiles, sequences, heads, group, len_q, len_k, window_left, window_right, scale, softcap, threshold, keep_scale,
    split_rows, all_tiles,
    BASE2: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, DECODE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One program attends for BLOCK_M queries of one head of q; grid: (heads * tiles, 1).

    PERSISTENT: fewer programs, each of which takes one of `all_tiles` after the other, as many apart as there are programs.

    With DECODE, for few queries: for BLOCK_M rows of a head of k, the queries of its whole group, and for one part of the
    keys; grid: (heads of k * tiles, parts). Part n writes out and lse `n * split_rows` rows further on.
    """
    if PERSISTENT:
        for index in range(tl.program_id(0), all_tiles, tl.num_programs(0)):
            attend(
                index,
                q, k, v, out, lse, bias, mask, limits, segments_q, segments_k, gate, cu_q, cu_k, seed,
                tiles, sequences, heads, group, len_q, len_k, window_left, window_right, scale, softcap, threshold,
                keep_scale, split_rows,
                BASE2, BOTTOM_RIGHT, DECODE, D, DV,
                BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        attend(
            tl.program_id(0),
            q, k, v, out, lse, bias, mask, limits, segments_q, segments_k, gate, cu_q, cu_k, seed,
            tiles, sequences, heads, group, len_q, len_k, window_left, window_right, scale, softcap, threshold, keep_scale,
            split_rows,
            BASE2, BOTTOM_RIGHT, DECODE, D, DV,
            BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def combine_kernel(parts_out, parts_lse, out, lse, middle, inner, rows, parts, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One program joins what the parts of the keys gave one row of out; grid: (rows,).

    Row (outer, middle, inner) of out, by its strides; a row sees what some part sees.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(parts_lse + tl.cast(part, tl.int64) * rows + row))
    base = tl.where(top == float("-inf"), 0.0, top)
    e = tl.arange(0, BLOCK_DV)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for part in range(parts):
        from_row = tl.cast(part, tl.int64) * rows + row
        weight = tl.exp(tl.load(parts_lse + from_row) - base)
        total += weight
        acc += weight * tl.load(parts_out + from_row * DV + e, mask=e < DV, other=0.0)
    at = address(out, row // inner // middle, row // inner % middle, row % inner)
    seen_any = total != 0.0
    total = tl.where(seen_any, total, 1.0)
    tl.store(at + e, (acc / total).to(out[0].dtype.element_ty), mask=e < DV)
    tl.store(lse + row, tl.where(seen_any, top + tl.log(total), float("-inf")))


# --- backward -----------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def delta_kernel(
    grad_out, out, grad_lse, delta, middle, inner, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = <grad_out, out> - grad_lse of BLOCK_M rows (outer, middle, inner); grid: (cdiv(rows, BLOCK_M),)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    outer = row // inner // middle
    upstream = load_rows(address(grad_out, outer, row // inner % middle, row % inner), inside, DV, BLOCK_DV, True)
    value = load_rows(address(out, outer, row // inner % middle, row % inner), inside, DV, BLOCK_DV, True)
    total = tl.sum(upstream.to(tl.float32) * value.to(tl.float32), 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + row, mask=inside, other=0.0)
    tl.store(delta + row, total, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def queries_kernel(
    grad_out, grad_lse, q, k, v, lse, norm, delta, grad_q,
    bias, mask, limits, segments_q, segments_k, gate, cu_q, cu_k, seed,
    tiles, sequences, heads, group, len_q, len_k, window_left, window_right, scale, softcap, threshold, keep_scale,
    STATS: tl.constexpr, BASE2: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up grad_q of BLOCK_M queries of one head over the keys; grid: (heads * tiles,).

    With STATS instead norm = 1 / sum(p), which makes up for the rounding of lse, and delta = sum(p dp) - grad_lse, from the
    very p and dp that will be held against it. In half precision that matters, and is done, only where a bias has made lse
    so large that its rounding shows there (FAR); elsewhere norm is 1 and delta what it was.
    """
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    unit = scale * LOG2E
    head = tl.program_id(0) // tiles
    kv_head = head // group
    b, first_row = place(tl.program_id(0) % tiles, cu_q, sequences, len_q, 1, BLOCK_M)
    if cu_q is None:  # as in forward_kernel
        first_row = (tl.cdiv(len_q, BLOCK_M) - 1) * BLOCK_M - first_row
    begin_q, len_q = sequence(cu_q, b, len_q)
    begin_k, len_k = sequence(cu_k, b, len_k)
    if cu_q is not None:  # noqa: SIM102 - Triton evaluates both sides of an `and`
        if (first_row < 0) | (first_row >= len_q):
            return
    i = (first_row + tl.arange(0, BLOCK_M)).to(len_q.dtype)
    inside = i < len_q

    limit = per_token(limits, b, 0, begin_q + i, inside, 1)
    segment_q = per_token(segments_q, b, 0, begin_q + i, inside, 1)
    bias_rows = score_rows(bias, b, head, i, 1)
    mask_rows = score_rows(mask, b, head, i, 1)
    if threshold is not None:
        dropout_rows = dropout_rows_of(seed, b * heads + head, i)[:, None]
    low, high = interval(i[:, None], len_q, len_k, window_left, window_right, limit, BOTTOM_RIGHT)
    begin, _, _, end = key_blocks(low, high, inside[:, None], len_k, BLOCK_N)

    own_q = scaled(load_rows(address(q, b, head, begin_q + i), inside, D, BLOCK_D, True), scale, EXACT)
    upstream = load_rows(address(grad_out, b, head, begin_q + i), inside, DV, BLOCK_DV, True)
    of_rows = lse_of(lse, b, head, begin_q + i, inside, 1, BASE2)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    if not STATS:
        norm_rows = per_token(norm, b, head, begin_q + i, inside, 1)
        centre = per_token(delta, b, head, begin_q + i, inside, 1)
    jj = tl.arange(0, BLOCK_N)
    k_rows = address(k, b, kv_head, begin_k + jj)
    v_rows = address(v, b, kv_head, begin_k + jj)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if STATS and not EXACT:
        size = tl.where(of_rows < float("inf"), tl.abs(of_rows), 0.0)
        end = tl.where(tl.max(size) > FAR, end, begin)
    for block in range(begin, end):
        start = block * BLOCK_N
        j = start + jj
        keys = load_rows(k_rows + start.to(tl.int64) * k[3], j < len_k, D, BLOCK_D, True)
        values = load_rows(v_rows + start.to(tl.int64) * v[3], j < len_k, DV, BLOCK_DV, True)
        products = tl.dot(own_q, tl.trans(keys), input_precision="ieee")
        s, slope = scores_of(products, scale, softcap, bias, bias_rows, i[:, None], j[None, :], EXACT, BASE2)
        segment_k = per_token(segments_k, b, 0, begin_k + j, j < len_k, 0)
        s = hide(s, low, high, mask, mask_rows, segment_q, segment_k, i[:, None], j[None, :])
        p = weights_of(s, of_rows, None if STATS else norm_rows, unit, BASE2)
        dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
        if gate is not None:
            factor = tl.load(address(gate, b, kv_head, begin_k + j), mask=j < len_k, other=0.0)
            dp *= factor.to(tl.float32)[None, :]
        if threshold is not None:
            dp *= dropout_factor(dropout_rows, j[None, :], threshold, keep_scale)
        if STATS:
            total += tl.sum(p, 1)
            weighted += tl.sum(p * dp, 1)
        else:
            ds = p * (dp - centre)
            if softcap is not None:
                ds *= slope
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
    if STATS:
        of_norm = 1.0 / tl.where(total == 0.0, 1.0, total)
        weighted *= of_norm
        if grad_lse is not None:
            weighted -= tl.load(address(grad_lse, b, head, begin_q + i), mask=inside, other=0.0)
        tl.store(address(norm, b, head, begin_q + i), of_norm, mask=inside)
        if not EXACT:
            inside = i < tl.where(end > begin, len_q, 0)
        tl.store(address(delta, b, head, begin_q + i), weighted, mask=inside)
    else:
        store_rows(address(grad_q, b, head, begin_q + i), inside, acc * scale, grad_q[0].dtype.element_ty, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def keys_kernel(
    grad_out, q, k, v, lse, norm, delta, grad_k, grad_v, grad_gate,
    bias, mask, limits, segments_q, segments_k, gate, cu_q, cu_k, seed,
    tiles, sequences, heads, group, len_q, len_k, window_left, window_right, scale, softcap, threshold, keep_scale,
    BASE2: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up grad_k, grad_v and grad_gate of BLOCK_N keys of one head of k, over the heads of its group and
    their queries; grid: (heads of k * tiles,). Its tiles of scores are transposed, keys before queries."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    unit = scale * LOG2E
    kv_head = tl.program_id(0) // tiles
    b, first_row = place(tl.program_id(0) % tiles, cu_k, sequences, len_k, 1, BLOCK_N)
    begin_q, len_q = sequence(cu_q, b, len_q)
    begin_k, len_k = sequence(cu_k, b, len_k)
    if cu_q is not None:  # noqa: SIM102 - Triton evaluates both sides of an `and`
        if (first_row < 0) | (first_row >= len_k):
            return
    j = (first_row + tl.arange(0, BLOCK_N)).to(len_k.dtype)
    inside = j < len_k

    segment_k = per_token(segments_k, b, 0, begin_k + j, inside, 1)
    if gate is not None:
        factor = tl.load(address(gate, b, kv_head, begin_k + j), mask=inside, other=0.0).to(tl.float32)
    begin, end = query_blocks(
        first_row, tl.minimum(first_row + BLOCK_N, len_k) - 1, len_q, len_k, window_left, window_right, BOTTOM_RIGHT, BLOCK_M
    )

    seen_k = keys_in_sight(len_q, len_k, window_right, BOTTOM_RIGHT)
    own_k = load_rows(address(k, b, kv_head, begin_k + j), inside, D, BLOCK_D, True)
    own_v = load_rows(address(v, b, kv_head, begin_k + j), inside, DV, BLOCK_DV, True)
    ii = tl.arange(0, BLOCK_M)
    of_keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    of_values = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    of_gate = tl.zeros((BLOCK_N,), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_rows = address(q, b, head, begin_q + ii)
        grad_rows = address(grad_out, b, head, begin_q + ii)
        for block in range(begin, end):
            start = block * BLOCK_M
            i = start + ii
            exists = i < len_q
            queries = scaled(load_rows(q_rows + start.to(tl.int64) * q[3], exists, D, BLOCK_D, True), scale, EXACT)
            upstream = load_rows(grad_rows + start.to(tl.int64) * grad_out[3], exists, DV, BLOCK_DV, True)
            of_rows = lse_of(lse, b, head, begin_q + i, exists, 0, BASE2)
            norm_rows = per_token(norm, b, head, begin_q + i, exists, 0)
            centre = per_token(delta, b, head, begin_q + i, exists, 0)
            bias_rows = score_rows(bias, b, head, i, 0)
            products = tl.dot(own_k, tl.trans(queries), input_precision="ieee")
            s, slope = scores_of(products, scale, softcap, bias, bias_rows, i[None, :], j[:, None], EXACT, BASE2)
            limit = per_token(limits, b, 0, begin_q + i, exists, 0)
            segment_q = per_token(segments_q, b, 0, begin_q + i, exists, 0)
            mask_rows = score_rows(mask, b, head, i, 0)
            low, high = interval(i[None, :], len_q, seen_k, window_left, window_right, limit, BOTTOM_RIGHT)
            s = hide(s, low, high, mask, mask_rows, segment_q, segment_k, i[None, :], j[:, None])
            p = weights_of(s, of_rows, norm_rows, unit, BASE2)
            kept = p
            dp = tl.dot(own_v, tl.trans(upstream), input_precision="ieee")
            if threshold is not None:
                keep = dropout_factor(dropout_rows_of(seed, b * heads + head, i)[None, :], j[:, None], threshold, keep_scale)
                kept = p * keep
                dp *= keep
            of_values = tl.dot(kept.to(upstream.dtype), upstream, of_values, input_precision="ieee")
            if grad_gate is not None:
                of_gate += tl.sum(p * dp, 1)
            if gate is not None:
                dp *= factor[:, None]
            ds = p * (dp - centre)
            if softcap is not None:
                ds *= slope
            of_keys = tl.dot(ds.to(queries.dtype), queries, of_keys, input_precision="ieee")
    if gate is not None:
        of_values *= factor[:, None]
    if not EXACT:
        of_keys *= scale
    at = begin_k + j
    store_rows(address(grad_k, b, kv_head, at), inside, of_keys, grad_k[0].dtype.element_ty, D, BLOCK_D)
    store_rows(address(grad_v, b, kv_head, at), inside, of_values, grad_v[0].dtype.element_ty, DV, BLOCK_DV)
    if grad_gate is not None:
        tl.store(address(grad_gate, b, kv_head, at), of_gate.to(grad_gate[0].dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def bias_kernel(
    grad_out, q, k, v, lse, norm, delta, grad_bias, bias, mask, limits, segments_q, segments_k, gate, cu_q, cu_k, seed,
    own_heads, sum_batch, sum_heads, size_q, size_k,
    heads, group, len_q, len_k, window_left, window_right, scale, softcap, threshold, keep_scale,
    SUM_Q: tl.constexpr, SUM_K: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up one tile of grad_bias, [own batch, own_heads, size_q, size_k] as it lies in memory, over what the
    bias is broadcast to: sum_batch sequences, sum_heads heads, with SUM_Q all queries, with SUM_K all keys;
    grid: (own batch * own_heads * blocks of queries * blocks of keys,)."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    tile = tl.program_id(0)
    k_tiles = 1 if SUM_K else tl.cdiv(size_k, BLOCK_N)
    q_tiles = 1 if SUM_Q else tl.cdiv(size_q, BLOCK_M)
    k_tile = tile % k_tiles
    q_tile = tile // k_tiles % q_tiles
    own_head = tile // k_tiles // q_tiles % own_heads
    own_b = tile // k_tiles // q_tiles // own_heads
    ii = tl.arange(0, BLOCK_M)
    jj = tl.arange(0, BLOCK_N)
    all_q = len_q
    all_k = len_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(own_b, own_b + sum_batch):
        begin_q, len_q = sequence(cu_q, b, all_q)
        begin_k, len_k = sequence(cu_k, b, all_k)
        seen_k = keys_in_sight(len_q, len_k, window_right, BOTTOM_RIGHT)
        q_blocks = tl.cdiv(len_q, BLOCK_M) if SUM_Q else 1
        k_blocks = tl.cdiv(len_k, BLOCK_N) if SUM_K else 1
        for head in range(own_head, own_head + sum_heads):
            kv_head = head // group
            for q_block in range(q_blocks):
                for k_block in range(k_blocks):
                    i = (q_tile + q_block) * BLOCK_M + ii
                    j = (k_tile + k_block) * BLOCK_N + jj
                    inside = i < len_q
                    queries = scaled(load_rows(address(q, b, head, begin_q + i), inside, D, BLOCK_D, True), scale, EXACT)
                    upstream = load_rows(address(grad_out, b, head, begin_q + i), inside, DV, BLOCK_DV, True)
                    keys = load_rows(address(k, b, kv_head, begin_k + j), j < len_k, D, BLOCK_D, True)
                    values = load_rows(address(v, b, kv_head, begin_k + j), j < len_k, DV, BLOCK_DV, True)
                    of_rows = lse_of(lse, b, head, begin_q + i, inside, 1, False)
                    norm_rows = per_token(norm, b, head, begin_q + i, inside, 1)
                    centre = per_token(delta, b, head, begin_q + i, inside, 1)
                    limit = per_token(limits, b, 0, begin_q + i, inside, 1)
                    segment_q = per_token(segments_q, b, 0, begin_q + i, inside, 1)
                    segment_k = per_token(segments_k, b, 0, begin_k + j, j < len_k, 0)
                    bias_rows = score_rows(bias, b, head, i, 1)
                    mask_rows = score_rows(mask, b, head, i, 1)
                    low, high = interval(i[:, None], len_q, seen_k, window_left, window_right, limit, BOTTOM_RIGHT)
                    products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
                    s, _ = scores_of(products, scale, softcap, bias, bias_rows, i[:, None], j[None, :], EXACT, False)
                    s = hide(s, low, high, mask, mask_rows, segment_q, segment_k, i[:, None], j[None, :])
                    dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
                    if gate is not None:
                        factor = tl.load(address(gate, b, kv_head, begin_k + j), mask=j < len_k, other=0.0)
                        dp *= factor.to(tl.float32)[None, :]
                    if threshold is not None:
                        dropout_rows = dropout_rows_of(seed, b * heads + head, i)[:, None]
                        dp *= dropout_factor(dropout_rows, j[None, :], threshold, keep_scale)
                    acc += weights_of(s, of_rows, norm_rows, None, False) * (dp - centre)
    i = q_tile * BLOCK_M + ii
    j = k_tile * BLOCK_N + jj
    grad = grad_bias + (own_b.to(tl.int64) * own_heads + own_head) * size_q * size_k
    if SUM_Q:
        i = tl.zeros((1,), tl.int32)
        acc = tl.expand_dims(tl.sum(acc, 0), 0)
    if SUM_K:
        j = tl.zeros((1,), tl.int32)
        acc = tl.expand_dims(tl.sum(acc, 1), 1)
    at = grad + i.to(tl.int64)[:, None] * size_k + j[None, :]
    tl.store(at, acc.to(grad_bias.dtype.element_ty), mask=(i < size_q)[:, None] & (j < size_k)[None, :])
