"""The kernels of window attention in Triton, forward and backward: made of attention_parts.py, launched by
window_attention.py.

Index glossary, beyond that of attention_kernels.py: `window` counts the windows of all samples, `by_sample` each; i and j
are places of a window, N of them, and where the grid ends before the last window does, some are pads. A place has a token of
the grid, none if it is a pad, and a region, where windows are shifted: `places` [by_sample, N] holds 8 * token + region,
which is negative for pads. It has a position p in the bias window, so that i and j have the bias p(i) - p(j) from the middle
of a head's ROWS of the table.

Operands are those of heads. Their pads are rows like (pointer, 0, stride of heads, 0), or None where pads are zeros or there
are none; lse, norm and delta count windows, heads and places; `table` is [H, ROWS] in float32. `sizes`, `counts` (of
windows) and `shift` are tuples of an int an axis of the grid, WINDOW and BIAS_WINDOW of extents.

No atomics: a token stands in one place of one window, and what is summed over windows goes to a buffer of parts, cut by
sizes alone. All pads have the same key and value: their gradients are sums over queries of what each gives to all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton.attention_parts import (
    address,
    load_rows,
    lse_of,
    per_token,
    softmax_end,
    softmax_step,
    store_rows,
    weights_of,
)

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = ["by_sample", "heads", "windows", "span"]


# --- places -------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def places_kernel(
    places,
    sizes,
    counts,
    shift,
    by_sample,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program finds out what stands in BLOCK places, as reference.placement does; grid: (blocks of by_sample * N,).

    Regions are told apart within a window alone, where nothing but the last `shift` places of a padded axis differ from the
    others.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    window = number // N
    i = number % N
    exists = i >= 0
    token = i * 0
    region = i * 0
    tokens = 1
    for axis in tl.static_range(len(WINDOW) - 1, -1, -1):
        padded = counts[axis] * WINDOW[axis]
        at = window % counts[axis] * WINDOW[axis] + i % WINDOW[axis]
        window //= counts[axis]
        i //= WINDOW[axis]
        source = (at + shift[axis]) % (padded if PAD_FIRST else sizes[axis])
        exists = exists & ((source if PAD_FIRST else at) < sizes[axis])
        region = region * 2 + (at >= padded - shift[axis]).to(tl.int32)
        token += source * tokens
        tokens *= sizes[axis]
    tl.store(places + number, tl.where(exists, token, -1) * 8 + region, mask=number < by_sample * N)


@triton.jit
def _places(places, window, i, by_sample, N: tl.constexpr):
    """(is one of the N, is one and no pad, token, region) of places i of a window."""
    inside = i < N
    place = tl.load(places + window % by_sample * N + i, mask=inside, other=-8)
    return inside, place >= 0, place >> 3, place & 7


@triton.jit
def _positions(i, table, BIAS_WINDOW: tl.constexpr):
    """Of places i in the bias window; None without a table."""
    position = None
    if table is not None:
        position = i * 0
        stride = 1
        for axis in tl.static_range(len(BIAS_WINDOW) - 1, -1, -1):
            position += i % BIAS_WINDOW[axis] * stride
            i //= BIAS_WINDOW[axis]
            stride *= 2 * BIAS_WINDOW[axis] - 1
    return position


@triton.jit
def _bias(table, head, position_q, position_k, visible, ROWS: tl.constexpr):
    """A tile of the bias of a head, -inf where there is no such pair. Positions come with the new axis of the tile."""
    if table is None:
        bias = tl.where(visible, 0.0, float("-inf"))
    else:
        at = table + head.to(tl.int64) * ROWS + ROWS // 2 + (position_q - position_k)
        bias = tl.load(at, mask=visible, other=float("-inf"))
    return bias


@triton.jit
def _load(x, pad, b, head, token, inside, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of qkv, which where a place is a pad are that of `pad`."""
    rows = address(x, b, head, token)
    if pad is None:
        found = exists
    else:
        found = inside
        rows = tl.where(exists, rows, address(pad, 0, head, token * 0))
    return load_rows(rows, found, D, BLOCK_D, True)


# --- scores -------------------------------------------------------------------------------------------------------------
@triton.jit
def _length(x):
    wide = x.to(tl.float32)
    return tl.sqrt(tl.sum(wide * wide, 1))


@triton.jit
def _inverse_length(x, norm_eps):
    """1 / max(|x|, eps) of rows; None where a call does not normalise."""
    inverse = None
    if norm_eps is not None:  # not as one expression: Triton 3.6 makes both sides of it
        inverse = 1.0 / tl.maximum(_length(x), norm_eps)
    return inverse


@triton.jit
def _unit(x, inverse):
    """Rows of length 1, in the dtype of x; x itself where a call does not normalise."""
    if inverse is not None:
        x = (x.to(tl.float32) * inverse[:, None]).to(x.dtype)
    return x


@triton.jit
def _through_norm(gradient, x, inverse, norm_eps):
    """The gradient of x from that of x / max(|x|, eps)."""
    if inverse is not None:
        unit = x.to(tl.float32) * inverse[:, None]
        along = tl.where(_length(x) < norm_eps, 0.0, tl.sum(unit * gradient, 1))
        gradient = (gradient - unit * along[:, None]) * inverse[:, None]
    return gradient


@triton.jit
def _factor(head_scale, head, scale):
    factor = scale
    if head_scale is not None:
        factor = tl.load(head_scale + head)
    return factor


@triton.jit
def _column(x):
    return None if x is None else tl.expand_dims(x, 1)


@triton.jit
def _row(x):
    return None if x is None else tl.expand_dims(x, 0)


@triton.jit
def _scores(products, factor, inverse_q, inverse_k, bias, region_q, region_k, mask_value, SHIFTED: tl.constexpr):
    """(scores, products of unit rows) from products of rows as they lie: units rounded to half precision would show in the
    gradients of what is float32. What belongs to queries and keys comes with the new axis of the tile."""
    if inverse_q is not None:
        products = products * inverse_q * inverse_k
    scores = products * factor + bias
    if SHIFTED:
        scores += tl.where(region_q == region_k, 0.0, mask_value)
    return scores, products


# --- forward ------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q, k, v, out, lse, pad_q, pad_k, pad_v, table, head_scale, places, by_sample, heads,
    scale, norm_eps, mask_value,
    BIAS_WINDOW: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends for BLOCK_M places of a window in one head; grid: (windows * blocks of places * heads,)."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % tl.cdiv(N, BLOCK_M)
    window = tl.program_id(0) // heads // tl.cdiv(N, BLOCK_M)
    b = window // by_sample
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, exists, token, region_q = _places(places, window, i, by_sample, N)
    own_q = _load(q, pad_q, b, head, token, inside, exists, D, BLOCK_D)
    inverse_q = _inverse_length(own_q, norm_eps)
    factor = _factor(head_scale, head, scale)
    position_q = _column(_positions(i, table, BIAS_WINDOW))
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside_k, exists_k, token_k, region_k = _places(places, window, j, by_sample, N)
        keys = _load(k, pad_k, b, head, token_k, inside_k, exists_k, D, BLOCK_D)
        inverse_k = _inverse_length(keys, norm_eps)
        products = tl.dot(own_q, tl.trans(keys), input_precision="ieee")
        visible = inside[:, None] & inside_k[None, :]
        bias = _bias(table, head, position_q, _row(_positions(j, table, BIAS_WINDOW)), visible, ROWS)
        s, _ = _scores(
            products, factor, _column(inverse_q), _row(inverse_k), bias, _column(region_q), _row(region_k), mask_value,
            SHIFTED,
        )  # fmt: skip
        p, rescale, top, total = softmax_step(s, top, total, None, False)
        values = _load(v, pad_v, b, head, token_k, inside_k, exists_k, D, BLOCK_D)
        acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    acc, of_rows = softmax_end(acc, top, total, None, False)
    store_rows(address(out, b, head, token), exists, acc, out[0].dtype.element_ty, D, BLOCK_D)
    tl.store(address(lse, window, head, i), of_rows, mask=inside)


# --- backward -----------------------------------------------------------------------------------------------------------
@triton.jit
def _store_pads(of_pads, of_key, of_value, part, heads, head, pad_k, norm_eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One part of the gradients of all pads of a head: of_pads [parts, 2, H, D]."""
    d = tl.arange(0, BLOCK_D)
    pad = load_rows(address(pad_k, 0, head, tl.zeros((1,), tl.int32)), None, D, BLOCK_D, False)
    of_key = _through_norm(of_key[None, :], pad, _inverse_length(pad, norm_eps), norm_eps)
    at = of_pads + (part.to(tl.int64) * 2 * heads + head) * D + d
    tl.store(at[None, :], of_key, mask=(d < D)[None, :])
    tl.store(at + heads * D, of_value, mask=d < D)


@triton.jit(do_not_specialize=_SIZES)
def whole_kernel(
    grad_out, q, k, v, grad_q, grad_k, grad_v, of_table, of_pads, pad_q, pad_k, pad_v, table, head_scale,
    places, by_sample, heads, windows, span, scale, mask_value,
    BIAS_WINDOW: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program goes back through `span` windows of one head, where a tile holds all pairs of a window: all but what
    cosine scores and a scale a head want, for which registers do not suffice. It needs no lse: all keys of a query are at
    hand. Grid: (parts * heads,)."""
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    factor = _factor(head_scale, head, scale)
    i = tl.arange(0, BLOCK_M)
    # Rows beyond the window's are the last one's again, without an upstream.
    position = _positions(tl.minimum(i, N - 1), table, BIAS_WINDOW)
    bias = _bias(table, head, _column(position), _row(position), (i < N)[None, :], ROWS)
    table_sums = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    of_pad_key = tl.zeros((BLOCK_D,), tl.float32)
    of_pad_value = tl.zeros((BLOCK_D,), tl.float32)
    for window in range(part * span, tl.minimum(part * span + span, windows)):
        b = window // by_sample
        inside, exists, token, region = _places(places, window, i, by_sample, N)
        queries = _load(q, pad_q, b, head, token, inside, exists, D, BLOCK_D)
        keys = _load(k, pad_k, b, head, token, inside, exists, D, BLOCK_D)
        values = _load(v, pad_v, b, head, token, inside, exists, D, BLOCK_D)
        upstream = load_rows(address(grad_out, b, head, token), exists, D, BLOCK_D, True)
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        s, _ = _scores(products, factor, None, None, bias, _column(region), _row(region), mask_value, SHIFTED)
        p = tl.exp(s - tl.max(s, 1)[:, None])
        p *= (1.0 / tl.sum(p, 1))[:, None]
        if of_pads is not None:
            pads = (inside & (exists == 0))[None, :]
            pad_weights = tl.sum(tl.where(pads, p, 0.0), 1)[:, None]
            of_pad_value += tl.sum(pad_weights * upstream.to(tl.float32), 0)
        dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        of_values = tl.dot(tl.trans(p.to(upstream.dtype)), upstream, input_precision="ieee")
        store_rows(address(grad_v, b, head, token), exists, of_values, grad_v[0].dtype.element_ty, D, BLOCK_D)
        if of_table is not None:
            table_sums += ds
        if of_pads is not None:
            pad_slopes = tl.sum(tl.where(pads, ds, 0.0), 1)[:, None]
            of_pad_key += tl.sum(pad_slopes * queries.to(tl.float32), 0) * factor
        ds = ds.to(upstream.dtype)
        of_queries = tl.dot(ds, keys, input_precision="ieee") * factor
        store_rows(address(grad_q, b, head, token), exists, of_queries, grad_q[0].dtype.element_ty, D, BLOCK_D)
        of_keys = tl.dot(tl.trans(ds), queries, input_precision="ieee") * factor
        store_rows(address(grad_k, b, head, token), exists, of_keys, grad_k[0].dtype.element_ty, D, BLOCK_D)
    if of_table is not None:
        at = of_table + (part.to(tl.int64) * heads + head) * N * N + i[:, None] * N + i[None, :]
        tl.store(at, table_sums, mask=(i < N)[:, None] & (i < N)[None, :])
    if of_pads is not None:
        _store_pads(of_pads, of_pad_key, of_pad_value, part, heads, head, pad_k, None, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def queries_kernel(
    grad_out, q, k, v, lse, norm, delta, grad_q, of_pads, of_scale, pad_q, pad_k, pad_v, table, head_scale,
    places, by_sample, heads, scale, norm_eps, mask_value,
    BIAS_WINDOW: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program adds up grad_q of BLOCK_M places of a window in one head, in its pass 1 over the keys; in pass 0 norm =
    1 / sum(p), which makes up for the rounding of lse, and delta = sum(p dp), for all kernels. A launch makes the passes
    from FIRST to LAST: in float32 one of them, as registers do not suffice for both.
    Grid: (windows * blocks of places * heads,), each of windows * blocks one part of what pads and head_scale get."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    window = part // tl.cdiv(N, BLOCK_M)
    b = window // by_sample
    i = part % tl.cdiv(N, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, exists, token, region_q = _places(places, window, i, by_sample, N)
    own_q = _load(q, pad_q, b, head, token, inside, exists, D, BLOCK_D)
    upstream = load_rows(address(grad_out, b, head, token), exists, D, BLOCK_D, True)
    inverse_q = _inverse_length(own_q, norm_eps)
    factor = _factor(head_scale, head, scale)
    position_q = _column(_positions(i, table, BIAS_WINDOW))
    of_rows = lse_of(lse, window, head, i, inside, 1, False)
    if FIRST == 0:
        norm_rows = tl.full((BLOCK_M, 1), 1.0, tl.float32)
        weighted = tl.zeros((BLOCK_M,), tl.float32)
    else:
        norm_rows = per_token(norm, window, head, i, inside, 1)
        weighted = tl.load(address(delta, window, head, i), mask=inside, other=0.0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale_sums = tl.zeros((BLOCK_M,), tl.float32)
    pad_weights = tl.zeros((BLOCK_M,), tl.float32)
    pad_slopes = tl.zeros((BLOCK_M,), tl.float32)
    for turn in tl.static_range(FIRST, LAST + 1):
        for start in range(0, N, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            inside_k, exists_k, token_k, region_k = _places(places, window, j, by_sample, N)
            keys = _load(k, pad_k, b, head, token_k, inside_k, exists_k, D, BLOCK_D)
            values = _load(v, pad_v, b, head, token_k, inside_k, exists_k, D, BLOCK_D)
            inverse_k = _inverse_length(keys, norm_eps)
            products = tl.dot(own_q, tl.trans(keys), input_precision="ieee")
            if EXACT:  # sooner than it is needed: later, registers spill
                dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
            visible = inside[:, None] & inside_k[None, :]
            bias = _bias(table, head, position_q, _row(_positions(j, table, BIAS_WINDOW)), visible, ROWS)
            s, products = _scores(
                products, factor, _column(inverse_q), _row(inverse_k), bias, _column(region_q), _row(region_k), mask_value,
                SHIFTED,
            )  # fmt: skip
            p = weights_of(s, of_rows, norm_rows, None, False)
            if not EXACT:
                dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
            if turn == 0:
                total += tl.sum(p, 1)
                weighted += tl.sum(p * dp, 1)
            else:
                ds = p * (dp - weighted[:, None])
                if of_scale is not None:
                    scale_sums += tl.sum(ds * products, 1)
                if of_pads is not None:
                    pads = (inside_k & (exists_k == 0))[None, :]
                    pad_weights += tl.sum(tl.where(pads, p, 0.0), 1)
                    pad_slopes += tl.sum(tl.where(pads, ds, 0.0), 1)
                acc = tl.dot(ds.to(keys.dtype), _unit(keys, inverse_k), acc, input_precision="ieee")
        if turn == 0:
            norms = 1.0 / tl.where(total == 0.0, 1.0, total)
            weighted *= norms
            tl.store(address(norm, window, head, i), norms, mask=inside)
            tl.store(address(delta, window, head, i), weighted, mask=inside)
            norm_rows = norms[:, None]
    if LAST == 1:
        acc = _through_norm(acc * factor, own_q, inverse_q, norm_eps)
        store_rows(address(grad_q, b, head, token), exists, acc, grad_q[0].dtype.element_ty, D, BLOCK_D)
        if of_scale is not None:
            tl.store(of_scale + part.to(tl.int64) * heads + head, tl.sum(scale_sums, 0))
        if of_pads is not None:
            if EXACT:  # read again, behind a store, rather than held in registers, of which the loops leave none
                upstream = load_rows(address(grad_out, b, head, token), exists, D, BLOCK_D, True)
                own_q = _load(q, pad_q, b, head, token, inside, exists, D, BLOCK_D)
            units = own_q.to(tl.float32)
            if inverse_q is not None:
                units *= inverse_q[:, None]
            of_key = tl.sum(pad_slopes[:, None] * units, 0) * factor
            of_value = tl.sum(pad_weights[:, None] * upstream.to(tl.float32), 0)
            _store_pads(of_pads, of_key, of_value, part, heads, head, pad_k, norm_eps, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def keys_kernel(
    grad_out, q, k, v, lse, norm, delta, grad_k, grad_v, pad_q, pad_k, pad_v, table, head_scale,
    places, by_sample, heads, scale, norm_eps, mask_value,
    BIAS_WINDOW: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up grad_k and grad_v of BLOCK_N places of a window in one head; grid: (windows * blocks of places *
    heads,). Its tiles of scores are transposed, keys before queries."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads // tl.cdiv(N, BLOCK_N)
    b = window // by_sample
    j = tl.program_id(0) // heads % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, exists, token, region_k = _places(places, window, j, by_sample, N)
    own_k = _load(k, pad_k, b, head, token, inside, exists, D, BLOCK_D)
    own_v = _load(v, pad_v, b, head, token, inside, exists, D, BLOCK_D)
    inverse_k = _inverse_length(own_k, norm_eps)
    factor = _factor(head_scale, head, scale)
    position_k = _column(_positions(j, table, BIAS_WINDOW))
    of_keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    of_values = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        inside_q, exists_q, token_q, region_q = _places(places, window, i, by_sample, N)
        queries = _load(q, pad_q, b, head, token_q, inside_q, exists_q, D, BLOCK_D)
        upstream = load_rows(address(grad_out, b, head, token_q), exists_q, D, BLOCK_D, True)
        inverse_q = _inverse_length(queries, norm_eps)
        products = tl.dot(own_k, tl.trans(queries), input_precision="ieee")
        visible = inside[:, None] & inside_q[None, :]
        bias = _bias(table, head, _row(_positions(i, table, BIAS_WINDOW)), position_k, visible, ROWS)
        s, _ = _scores(
            products, factor, _row(inverse_q), _column(inverse_k), bias, _row(region_q), _column(region_k), mask_value,
            SHIFTED,
        )  # fmt: skip
        of_rows = lse_of(lse, window, head, i, inside_q, 0, False)
        p = weights_of(s, of_rows, per_token(norm, window, head, i, inside_q, 0), None, False)
        of_values = tl.dot(p.to(upstream.dtype), upstream, of_values, input_precision="ieee")
        dp = tl.dot(own_v, tl.trans(upstream), input_precision="ieee")
        ds = p * (dp - per_token(delta, window, head, i, inside_q, 0))
        of_keys = tl.dot(ds.to(queries.dtype), _unit(queries, inverse_q), of_keys, input_precision="ieee")
    of_keys = _through_norm(of_keys * factor, own_k, inverse_k, norm_eps)
    store_rows(address(grad_k, b, head, token), exists, of_keys, grad_k[0].dtype.element_ty, D, BLOCK_D)
    store_rows(address(grad_v, b, head, token), exists, of_values, grad_v[0].dtype.element_ty, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def pairs_kernel(
    grad_out, q, k, v, lse, norm, delta, of_table, pad_q, pad_k, pad_v, table, head_scale,
    places, by_sample, heads, windows, span, scale, norm_eps, mask_value,
    BIAS_WINDOW: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up ds of one tile of pairs (i, j) of one head over `span` windows, to of_table [parts, H, N, N];
    grid: (parts * heads * blocks of queries * blocks of keys,)."""
    tile = tl.program_id(0)
    j = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tile // tl.cdiv(N, BLOCK_N) % tl.cdiv(N, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    owner = tile // tl.cdiv(N, BLOCK_N) // tl.cdiv(N, BLOCK_M)
    head = owner % heads
    part = owner // heads
    factor = _factor(head_scale, head, scale)
    visible = (i < N)[:, None] & (j < N)[None, :]
    position_q = _column(_positions(i, table, BIAS_WINDOW))
    bias = _bias(table, head, position_q, _row(_positions(j, table, BIAS_WINDOW)), visible, ROWS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for window in range(part * span, tl.minimum(part * span + span, windows)):
        b = window // by_sample
        inside, exists, token, region_q = _places(places, window, i, by_sample, N)
        inside_k, exists_k, token_k, region_k = _places(places, window, j, by_sample, N)
        queries = _load(q, pad_q, b, head, token, inside, exists, D, BLOCK_D)
        keys = _load(k, pad_k, b, head, token_k, inside_k, exists_k, D, BLOCK_D)
        values = _load(v, pad_v, b, head, token_k, inside_k, exists_k, D, BLOCK_D)
        upstream = load_rows(address(grad_out, b, head, token), exists, D, BLOCK_D, True)
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        inverse_q = _column(_inverse_length(queries, norm_eps))
        inverse_k = _row(_inverse_length(keys, norm_eps))
        s, _ = _scores(products, factor, inverse_q, inverse_k, bias, _column(region_q), _row(region_k), mask_value, SHIFTED)
        of_rows = lse_of(lse, window, head, i, inside, 1, False)
        p = weights_of(s, of_rows, per_token(norm, window, head, i, inside, 1), None, False)
        dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
        acc += p * (dp - per_token(delta, window, head, i, inside, 1))
    at = of_table + owner.to(tl.int64) * N * N + i[:, None] * N + j[None, :]
    tl.store(at, acc, mask=visible)


@triton.jit(do_not_specialize=_SIZES)
def table_kernel(
    of_pairs, grad_table, heads,
    BIAS_WINDOW: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds up BLOCK_M rows of grad_table [ROWS, H] for one head, each over its pairs of of_pairs [H, N, N]:
    those that lie as far apart on every axis of the bias window; grid: (blocks of rows * heads,)."""
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * BLOCK_M + tl.arange(0, BLOCK_M)
    pairs = of_pairs + head.to(tl.int64) * N * N
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        row_rest = row[:, None]
        i_rest = i[None, :]
        j = row_rest * 0
        exists = i_rest < N
        places = 1
        for axis in tl.static_range(len(BIAS_WINDOW) - 1, -1, -1):
            at = i_rest % BIAS_WINDOW[axis] - row_rest % (2 * BIAS_WINDOW[axis] - 1) + BIAS_WINDOW[axis] - 1
            exists = exists & (at >= 0) & (at < BIAS_WINDOW[axis])
            j = j + at * places
            places *= BIAS_WINDOW[axis]
            row_rest //= 2 * BIAS_WINDOW[axis] - 1
            i_rest //= BIAS_WINDOW[axis]
        exists = exists & (row_rest == 0) & (j < N)
        acc += tl.sum(tl.load(pairs + i[None, :] * N + j, mask=exists, other=0.0), 1)
    tl.store(grad_table + row.to(tl.int64) * heads + head, acc.to(grad_table.dtype.element_ty), mask=row < ROWS)
