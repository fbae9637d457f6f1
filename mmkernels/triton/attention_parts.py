"""What the kernels of attention in Triton are made of: addresses, sequences and their blocks, scores.

The index glossary of attention_kernels.py holds here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GOLDEN = tl.constexpr(0x9E3779B9)


# --- addresses ----------------------------------------------------------------------------------------------------------
@triton.jit
def address(x, b, head, token):
    """Where a token begins in an operand of heads or rows; packed sequences count tokens through all of them."""
    return x[0] + tl.cast(b, tl.int64) * x[1] + tl.cast(head, tl.int64) * x[2] + tl.cast(token, tl.int64) * x[3]


@triton.jit
def score_rows(x, b, head, i, AXIS: tl.constexpr):
    """Where the rows of queries i begin in an operand of scores, with a new axis for the tile; None where there is none."""
    rows = None
    if x is not None:
        rows = x[0] + tl.cast(b, tl.int64) * x[1] + tl.cast(head, tl.int64) * x[2] + tl.cast(i, tl.int64) * x[3]
        rows = tl.expand_dims(rows, AXIS)
    return rows


@triton.jit
def load_scores(x, rows, i, j, other):
    """The elements (i, j) of an operand of scores, whose rows begin at `rows`; `other` where it has none."""
    return tl.load(rows + tl.cast(j, tl.int64) * x[4], mask=(i < x[5]) & (j < x[6]), other=other)


@triton.jit
def load_rows(pointers, inside, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, CHECK: tl.constexpr):
    """[rows, BLOCK_C] of CHANNELS channels, 0 in what is padding; `inside` says which rows exist, where that is in doubt."""
    c = tl.arange(0, BLOCK_C)
    at = pointers[:, None] + c[None, :]
    if BLOCK_C == CHANNELS and not CHECK:
        tile = tl.load(at)
    elif BLOCK_C == CHANNELS:
        tile = tl.load(at, mask=inside[:, None], other=0.0)
    elif not CHECK:
        tile = tl.load(at, mask=(c < CHANNELS)[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=inside[:, None] & (c < CHANNELS)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(pointers, inside, tile, dtype: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    tl.store(pointers[:, None] + c[None, :], tile.to(dtype), mask=inside[:, None] & (c < CHANNELS)[None, :])


@triton.jit
def per_token(x, b, head, token, inside, AXIS: tl.constexpr):
    """One number a token, 0 where there is no token, with a new axis for the tile; None where a call has none."""
    value = None
    if x is not None:
        value = tl.expand_dims(tl.load(address(x, b, head, token), mask=inside, other=0), AXIS)
    return value


# --- sequences and blocks -----------------------------------------------------------------------------------------------
@triton.jit
def sequence(cu, b, tokens):
    """(first token, tokens) of sequence b; whatever cu_seqlens says, within the `tokens` that there are."""
    if cu is None:
        begin = tl.full((), 0, tl.int64)
        length = tokens
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu + b).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu + b + 1).to(tl.int64), begin), tokens)
        length = (end - begin).to(tokens.dtype)
    return begin, length


@triton.jit
def place(tile, cu, sequences, tokens, fold, BLOCK: tl.constexpr):
    """(sequence, first row) of a tile of BLOCK rows, where a token has `fold` rows.

    Of packed sequences, b has its tiles from fold * cu_seqlens[b] // BLOCK + b on: enough for all of its rows, and found
    without knowing the longest. Some tiles lie beyond the rows of their sequence.
    """
    if cu is None:
        blocks = tl.cdiv(tokens * fold, BLOCK)
        b = tile // blocks
        row = tile % blocks * BLOCK
    else:
        b = tile * 0
        after = b + sequences
        while after - b > 1:
            middle = (b + after) // 2
            reached = tl.load(cu + middle).to(tl.int64) * fold // BLOCK + middle <= tile
            b = tl.where(reached, middle, b)
            after = tl.where(reached, after, middle)
        row = (tile - (tl.load(cu + b).to(tl.int64) * fold // BLOCK + b)) * BLOCK
    return b, row


@triton.jit
def interval(i, len_q, len_k, window_left, window_right, limit, BOTTOM_RIGHT: tl.constexpr):
    """The keys [low, high) that window, causality, limits and length leave to queries i."""
    at = i.to(tl.int64)
    if BOTTOM_RIGHT:
        at += len_k
        at -= len_q
    low = at * 0
    high = low + len_k
    if window_left is not None:
        low = tl.minimum(tl.maximum(at - window_left, 0), len_k)
    if window_right is not None:
        high = tl.minimum(tl.maximum(at + window_right + 1, 0), len_k)
    if limit is not None:
        high = tl.maximum(tl.minimum(high, limit.to(tl.int64)), 0)
    return low.to(len_k.dtype), high.to(len_k.dtype)


@triton.jit
def keys_in_sight(len_q, len_k, window_right, BOTTOM_RIGHT: tl.constexpr):
    """As many keys as the last query may see: `len_k` for the interval of queries some of which do not exist, where sums go
    over these too. Further on they would meet keys that nobody sees, and make NaN of 0 times what is infinite there."""
    seen = len_k
    if not BOTTOM_RIGHT and window_right is not None:
        seen = tl.minimum(tl.cast(len_q, tl.int64) + window_right, len_k).to(len_k.dtype)
    return seen


@triton.jit
def key_blocks(low, high, inside, len_k, BLOCK: tl.constexpr):
    """Blocks of keys (begin, whole, whole_end, end): queries with these intervals see keys from `begin` on and before `end`,
    and all of those in [whole, whole_end)."""
    begin = tl.min(tl.where(inside, low, len_k)) // BLOCK
    end = tl.maximum(tl.cdiv(tl.max(tl.where(inside, high, 0)), BLOCK), begin)
    whole = tl.minimum(tl.cdiv(tl.max(tl.where(inside, low, 0)), BLOCK), end)
    whole_end = tl.maximum(tl.min(tl.where(inside, high, len_k)) // BLOCK, whole)
    return begin, whole, whole_end, end


@triton.jit
def query_blocks(j_first, j_last, len_q, len_k, window_left, window_right, BOTTOM_RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks of queries [begin, end) whose windows hold keys from j_first to j_last: interval, the other way round."""
    first = tl.full((), 0, tl.int64)
    last = first + len_q
    shift = first
    if BOTTOM_RIGHT:
        shift = first + len_k - len_q
    if window_right is not None:
        first = tl.minimum(tl.maximum(j_first - shift - window_right, 0), last)
    if window_left is not None:
        last = tl.minimum(tl.maximum(j_last - shift + window_left + 1, 0), last)
    return (first // BLOCK).to(len_q.dtype), tl.cdiv(last, BLOCK).to(len_q.dtype)


# --- scores -------------------------------------------------------------------------------------------------------------
@triton.jit
def _tanh(x):
    """A polynomial of x^2 near 0, where 1 - 2 / (exp(2x) + 1) would cancel. Within 3e-7."""
    size = tl.abs(x)
    square = x * x
    near = ((0.01643200964 * square - 0.05266802758) * square + 0.1332064271) * square - 0.3333294094
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.55, x + x * (square * near), tl.where(x < 0.0, -far, far))


@triton.jit
def power(scores, base, unit, BASE2: tl.constexpr):
    """exp(scores - base), where with BASE2 scores are products yet, of which one is `unit` of log 2, as base is counted: a
    fused multiply-add and an exp2."""
    return tl.exp2(tl.fma(scores, unit, -base)) if BASE2 else tl.exp(scores - base)


@triton.jit
def scaled(queries, scale, EXACT: tl.constexpr):
    """float32 queries are scaled before the product, as the definition has it; half precision afterwards, where it costs no
    digits."""
    if EXACT:
        queries *= scale
    return queries


@triton.jit
def scores_of(products, scale, softcap, bias, bias_rows, i, j, EXACT: tl.constexpr, BASE2: tl.constexpr):
    """(scores, their derivative by scale * products); with BASE2 the products as they are, see `power`."""
    slope = 1.0
    scores = products if EXACT or BASE2 else products * scale
    if softcap is not None:
        capped = _tanh(scores / softcap)
        scores = softcap * capped
        slope = 1.0 - capped * capped
    if bias is not None:
        scores += load_scores(bias, bias_rows, i, j, 0.0).to(tl.float32)
    return scores, slope


@triton.jit
def hide(scores, low, high, mask, mask_rows, segment_q, segment_k, i, j):
    """-inf in place of the scores of hidden keys."""
    visible = (j >= low) & (j < high)
    if mask is not None:
        visible = visible & (load_scores(mask, mask_rows, i, j, 0) != 0)
    if segment_q is not None:
        visible = visible & (segment_q == segment_k)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _mix(x):
    """The finaliser of MurmurHash3 on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout_rows_of(seed, head, i):
    """The hash of (seed, head, query), from which dropout_factor goes on; `head` is counted over the batch."""
    number = tl.load(seed)
    low = number.to(tl.uint32)
    high = (number >> 32).to(tl.uint32)
    stream = _mix(low ^ _mix(head.to(tl.uint32) + high))
    return _mix(stream + i.to(tl.uint32) * GOLDEN)


@triton.jit
def dropout_factor(dropout_rows, j, threshold, keep_scale):
    """What dropout multiplies weights with: keep_scale where reference.dropout_keep says so, else 0."""
    kept = (_mix(dropout_rows + j.to(tl.uint32) * GOLDEN) >> 8) >= threshold.to(tl.uint32)
    return tl.where(kept, keep_scale, 0.0)


# --- softmax ------------------------------------------------------------------------------------------------------------
@triton.jit
def softmax_step(scores, top, total, unit, BASE2: tl.constexpr):
    """(weights, what earlier sums of weights are multiplied with, top, total) after a block of keys more: weights are by
    the highest score so far, `top`, and `total` adds them up."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    if BASE2:
        base *= unit
    p = power(scores, base[:, None], unit, BASE2)
    rescale = power(top, base, unit, BASE2)
    return p, rescale, new_top, total * rescale + tl.sum(p, 1)


@triton.jit
def softmax_end(acc, top, total, unit, BASE2: tl.constexpr):
    """(acc / total, lse) of rows after their last block; 0 and -inf where they have seen nothing."""
    if BASE2:
        top *= unit * LN2
    seen_any = total != 0.0
    total = tl.where(seen_any, total, 1.0)
    return acc * (1.0 / total)[:, None], tl.where(seen_any, top + tl.log(total), float("-inf"))


@triton.jit
def lse_of(lse, b, head, token, inside, AXIS: tl.constexpr, BASE2: tl.constexpr):
    """lse of queries, with a new axis for the tile; inf, which makes weights 0, for those that see nothing or are none."""
    of_rows = tl.load(address(lse, b, head, token), mask=inside, other=float("inf"))
    of_rows = tl.where(of_rows == float("-inf"), float("inf"), of_rows)
    if BASE2:
        of_rows *= LOG2E
    return tl.expand_dims(of_rows, AXIS)


@triton.jit
def weights_of(scores, of_rows, norm, unit, BASE2: tl.constexpr):
    p = power(scores, of_rows, unit, BASE2)
    if norm is not None:
        p *= norm
    return p
