"""Routing of tokens to experts in Triton.

Index glossary: t tokens, e experts, k slots, g groups of experts. A program holds whole rows of BLOCK_E experts, BLOCK_T at
a time. What is chosen is a matrix `rank` [t, e]: the slot that an expert has, or -1; ids, weights and statistics follow from
it. All is computed in float32. Statistics are sums over the tokens of each program, added up over the programs, whose number
depends on sizes alone. NaN logits count as -inf: to raise would need a sync.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.reference.routing import GROUP_SCORES, SCORES
from mmkernels.triton import launch
from mmkernels.triton.expert_order import expert_order

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# In the order of floats: -inf, far below it what is none of them, and between these the slots of what is taken.
LOWEST = tl.constexpr(-0x7F800001)
NONE = tl.constexpr(-0x80000000)

# What differs from call to call and makes no kernel faster: never a reason to compile one anew.
_SIZES = ["tokens", "blocks", "slots", "top_p", "num_groups", "top_groups", "group"]


# --- parts --------------------------------------------------------------------------------------------------------------
@triton.jit
def in_order(x):
    """Floats as integers of the same order; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def first_best(key, index, BLOCK: tl.constexpr):
    """Of each row the index of the greatest key, of equal ones the lowest."""
    best = tl.max(key, 1)
    return tl.min(tl.where(key == best[:, None], index[None, :], BLOCK), 1)


@triton.jit
def load_logits(logits, row, t, e, tokens, experts):
    """float32 of these rows; -inf in place of NaN, and in columns that are no experts."""
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    value = tl.load(logits + t[:, None] * row + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def softmax(x):
    """(softmax, logsumexp) of rows; NaN and -inf of rows that are all -inf, as torch has it."""
    top = tl.max(x, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    power = tl.exp(x - base[:, None])
    total = tl.sum(power, 1)
    return power / total[:, None], base + tl.log(total)


@triton.jit
def log_of(share):
    return tl.log(tl.where(share > 0.0, share, 1.0))


@triton.jit
def weights_of(logits, scores, used, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr):
    """[t, e]: the weights of the used experts, 0 of others; `scores` are their softmax or sigmoid."""
    if NORMALIZE and SOFTMAX:  # from the logits themselves, so that the chosen may all be improbable
        picked = tl.where(used, logits, float("-inf"))
        top = tl.max(picked, 1)
        powers = tl.exp(picked - tl.where(tl.abs(top) == float("inf"), 0.0, top)[:, None])
        weights = powers / tl.maximum(tl.sum(powers, 1), TINY)[:, None]
    elif NORMALIZE:
        weights = tl.where(used, scores, 0.0)
        weights = weights / (tl.sum(weights, 1) + TINY)[:, None]
    else:
        weights = scores
    return tl.where(used, weights, 0.0)


@triton.jit
def allowed_experts(
    values, e, experts, num_groups, top_groups, group,
    TOP2: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Which experts are in one of their token's best groups, of `group` experts each."""
    gg = tl.arange(0, BLOCK_G)
    keys = tl.full((BLOCK_T, BLOCK_G), NONE, tl.int32)
    for g in range(num_groups):
        own = tl.where((e // group == g)[None, :], values, float("-inf"))
        best = tl.max(own, 1)
        if TOP2:
            chosen = first_best(in_order(own), e, BLOCK_E)
            best += tl.max(tl.where(e[None, :] == chosen[:, None], float("-inf"), own), 1)
        keys = tl.where((gg == g)[None, :], in_order(best)[:, None], keys)
    allowed = tl.full((BLOCK_T, BLOCK_E), 0, tl.int32)
    for _ in range(top_groups):
        chosen = first_best(keys, gg, BLOCK_G)
        keys = tl.where(gg[None, :] == chosen[:, None], NONE, keys)
        allowed = tl.where((e // group)[None, :] == chosen[:, None], 1, allowed)
    return (allowed != 0) & (e < experts)[None, :]


# --- kernels ------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def route_kernel(
    logits, logits_row, selection, selection_row, selection_column, ids, weights, sums, counts,
    tokens, blocks, experts, slots, top_p, num_groups, top_groups, group,
    GIVEN: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, GROUPS: tl.constexpr, TOP2: tl.constexpr,
    DROPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program routes `blocks` times BLOCK_T tokens; grid: (programs,). It writes its own row of `sums` and `counts`.
    With GIVEN `ids` are read; else the best of what is not taken goes to slot after slot, of GROUPS only what these allow,
    and with DROPS only while the probabilities of those before are less than top_p."""
    e = tl.arange(0, BLOCK_E)
    real = (e < experts)[None, :]
    of_probability = tl.zeros((BLOCK_E,), tl.float32)
    of_weight = tl.zeros((BLOCK_E,), tl.float32)
    of_slot = tl.zeros((BLOCK_E,), tl.int32)
    of_first = tl.zeros((BLOCK_E,), tl.int32)
    of_z = tl.zeros((BLOCK_T,), tl.float32)
    of_entropy = tl.zeros((BLOCK_T,), tl.float32)
    for block in range(blocks):
        t = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        there = t < tokens
        live = there[:, None] & real
        x = load_logits(logits, logits_row, t, e, tokens, experts)
        probability, lse = softmax(x)
        scores = probability if SOFTMAX else tl.sigmoid(x)
        if GIVEN:
            rank = tl.full((BLOCK_T, BLOCK_E), -1, tl.int32)
            for k in range(slots):
                chosen = tl.load(ids + t * slots + k, mask=there, other=-1)
                tl.store(weights + t * slots + k, 0.0, mask=there & (chosen < 0))
                rank = tl.where(e[None, :] == chosen[:, None], k, rank)
        else:
            values = x if SOFTMAX else scores
            if selection is not None:
                at = selection + t[:, None] * selection_row + e[None, :] * selection_column
                values += tl.load(at, mask=live, other=0.0)
            allowed = live
            if GROUPS:
                allowed = allowed_experts(
                    tl.where(real, values, float("-inf")), e, experts, num_groups, top_groups, group,
                    TOP2, BLOCK_T, BLOCK_E, BLOCK_G,
                )  # fmt: skip
                values = tl.where(allowed, values, float("-inf"))
            key = tl.where(real, tl.maximum(in_order(values), LOWEST), NONE)
            before = tl.zeros((BLOCK_T,), tl.float32)
            for k in range(slots):
                chosen = first_best(key, e, BLOCK_E)
                hit = e[None, :] == chosen[:, None]
                keep = tl.max((hit & allowed).to(tl.int32), 1) != 0
                if DROPS:
                    keep = keep & ((k == 0) | (before < top_p))
                    before += tl.sum(tl.where(hit & allowed, scores, 0.0), 1)
                key = tl.where(hit, NONE + tl.where(keep, k + 1, 0)[:, None], key)
                tl.store(ids + t * slots + k, tl.where(keep, chosen, -1).to(tl.int64), mask=there)
                tl.store(weights + t * slots + k, 0.0, mask=there & ~keep)
            rank = tl.where(key < LOWEST, key - NONE, 0) - 1
        used = (rank >= 0) & live
        weight = weights_of(x, scores, used, SOFTMAX, NORMALIZE)
        to = t[:, None] * slots + rank
        tl.store(weights + to, weight, mask=used)
        if SOFTMAX:
            share = probability
            log = tl.where(share > 0.0, x - lse[:, None], 0.0)
        else:
            share = tl.where(live, scores, 0.0)
            share = share / (tl.sum(share, 1) + TINY)[:, None]
            log = log_of(share)
        of_probability += tl.sum(tl.where(live, share, 0.0), 0)
        of_weight += tl.sum(weight, 0)
        of_slot += tl.sum(used.to(tl.int32), 0)
        of_first += tl.sum((used & (rank == 0)).to(tl.int32), 0)
        of_z += tl.where(there, lse * lse, 0.0)
        of_entropy -= tl.sum(tl.where(live, share * log, 0.0), 1)
    to = sums + tl.program_id(0).to(tl.int64) * (2 * experts + 2)
    tl.store(to + e, of_probability, mask=e < experts)
    tl.store(to + experts + e, of_weight, mask=e < experts)
    tl.store(to + 2 * experts, tl.sum(of_z))
    tl.store(to + 2 * experts + 1, tl.sum(of_entropy))
    to = counts + tl.program_id(0).to(tl.int64) * 2 * experts
    tl.store(to + e, of_slot, mask=e < experts)
    tl.store(to + experts + e, of_first, mask=e < experts)


@triton.jit(do_not_specialize=_SIZES)
def route_backward_kernel(
    grad_weights, grad_sums, logits, logits_row, ids, grad, tokens, experts, slots,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program makes the gradients of BLOCK_T tokens' logits; grid: (cdiv(tokens, BLOCK_T),)."""
    e = tl.arange(0, BLOCK_E)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = t < tokens
    live = there[:, None] & (e < experts)[None, :]
    x = load_logits(logits, logits_row, t, e, tokens, experts)
    probability, lse = softmax(x)
    of_probability = tl.load(grad_sums + e, mask=e < experts, other=0.0)[None, :]
    of_importance = tl.load(grad_sums + experts + e, mask=e < experts, other=0.0)[None, :]
    of_z = tl.load(grad_sums + 2 * experts)
    of_entropy = tl.load(grad_sums + 2 * experts + 1)
    used = tl.full((BLOCK_T, BLOCK_E), 0, tl.int32)
    of_weight = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in range(slots):
        chosen = tl.load(ids + t * slots + k, mask=there, other=-1)
        hit = e[None, :] == chosen[:, None]
        upstream = tl.load(grad_weights + t * slots + k, mask=there, other=0.0)
        of_weight = tl.where(hit, upstream[:, None] + of_importance, of_weight)
        used = tl.where(hit, 1, used)
    scores = probability if SOFTMAX else tl.where(live, tl.sigmoid(x), 0.0)
    weight = weights_of(x, scores, used != 0, SOFTMAX, NORMALIZE)
    if SOFTMAX:
        log = tl.where(probability > 0.0, x - lse[:, None], 0.0)
        of_score = tl.where(live, of_probability - of_entropy * (log + 1.0), 0.0)
    else:
        total = tl.sum(scores, 1)[:, None] + TINY
        share = scores / total
        of_share = tl.where(live, of_probability - of_entropy * (log_of(share) + 1.0), 0.0)
        of_score = (of_share - tl.sum(of_share * share, 1)[:, None]) / total
    result = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if NORMALIZE:
        result = weight * (of_weight - tl.sum(weight * of_weight, 1)[:, None])
        if not SOFTMAX:  # each weight is its score as a part of a sum: by the logarithm of the score
            result *= 1.0 - scores
    else:
        of_score += of_weight
    if SOFTMAX:
        result += scores * (of_score - tl.sum(scores * of_score, 1)[:, None])
    else:
        result += of_score * scores * (1.0 - scores)
    result += 2.0 * of_z * lse[:, None] * probability
    tl.store(grad + t[:, None] * experts + e[None, :], result.to(grad.dtype.element_ty), mask=live)


# --- launches -----------------------------------------------------------------------------------------------------------
_TILE = 1024  # logits that a program holds, where a row has no more
_PROGRAMS = 1024  # among which the tokens are shared


def _blocks(experts: int) -> tuple[dict[str, int], dict[str, Any]]:
    """(blocks, launch options)."""
    block_e = max(16, triton.next_power_of_2(experts))
    blocks = {"BLOCK_T": max(1, min(64, _TILE // block_e)), "BLOCK_E": block_e}
    warps = max(4, block_e // 256)
    options = launch.options(warps)
    if launch.make() == "cuda":  # all that there are: unasked, ptxas spills a few bytes to have room for more programs
        options["maxnreg"] = min(255, 65536 // (32 * warps))
    return blocks, options


def _launch(
    logits: Tensor,
    ids: Tensor,
    score: int,
    normalize: bool,
    *,
    given: bool,
    selection: Tensor | None = None,
    top_p: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, sums, counts); `ids` are written, or with `given` read."""
    tokens, experts = logits.shape
    blocks, options = _blocks(experts)
    of_program = triton.cdiv(triton.cdiv(tokens, blocks["BLOCK_T"]), _PROGRAMS)  # blocks of tokens
    programs = triton.cdiv(tokens, blocks["BLOCK_T"] * max(1, of_program))
    weights = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    sums = torch.empty((programs, 2 * experts + 2), dtype=torch.float32, device=ids.device)
    counts = torch.empty((programs, 2, experts), dtype=torch.int32, device=ids.device)
    strides = (0, 0) if selection is None else ((0, selection.stride(0)) if selection.dim() == 1 else selection.stride())
    if programs > 0:
        route_kernel[(programs,)](
            logits=logits,
            logits_row=logits.stride(0),
            selection=selection,
            selection_row=strides[0],
            selection_column=strides[1],
            ids=ids,
            weights=weights,
            sums=sums,
            counts=counts,
            tokens=tokens,
            blocks=of_program,
            experts=experts,
            slots=ids.size(1),
            top_p=float(top_p),
            num_groups=num_groups,
            top_groups=top_groups,
            group=experts // num_groups,
            GIVEN=given,
            SOFTMAX=SCORES[score] == "softmax",
            NORMALIZE=normalize,
            GROUPS=top_groups < num_groups,
            TOP2=GROUP_SCORES[group_score] == "top2" and experts > num_groups,
            DROPS=top_p < 1,
            **blocks,
            BLOCK_G=max(2, triton.next_power_of_2(num_groups)),
            **options,
        )
    return weights, sums.sum(0), counts.sum(0)


def route(
    logits: Tensor,
    selection: Tensor | None,
    top_k: int,
    score: int,
    normalize: bool,
    top_p: float,
    num_groups: int,
    top_groups: int,
    group_score: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::route."""
    ids = torch.empty((logits.size(0), top_k), dtype=torch.int64, device=logits.device)
    weights, sums, counts = _launch(
        logits,
        ids,
        score,
        normalize,
        given=False,
        selection=selection,
        top_p=top_p,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )
    if capacity >= 0:
        by_slot = ids.T.contiguous()  # all first choices first
        _, offsets, positions = expert_order(by_slot, logits.size(1))
        keep = (by_slot >= 0) & (positions - offsets[by_slot.clamp(min=0)] < capacity)
        ids = torch.where(keep, by_slot, -1).T.contiguous()
        weights, sums, _ = _launch(logits, ids, score, normalize, given=True)
    return weights, sums, ids, counts


def expert_choice(logits: Tensor, slots: int, capacity: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::expert_choice: experts choose by torch's own sort."""
    tokens, experts = logits.shape
    wide = logits.float()
    values = torch.where(wide.isnan(), float("-inf"), wide).softmax(-1).unflatten(0, (-1, max(1, group)))
    best = torch.sort(values, dim=1, descending=True, stable=True).indices[:, :capacity]
    taken = torch.zeros(values.shape, dtype=torch.bool, device=logits.device).scatter(1, best, True).view(tokens, experts)
    place = taken.cumsum(-1) - 1
    named = torch.arange(experts, device=logits.device).expand(tokens, experts)
    ids = torch.full((tokens, slots + 1), -1, device=logits.device)  # the last takes what has no slot
    ids = ids.scatter(1, torch.where(taken & (place < slots), place, slots), named)[:, :slots].contiguous()
    weights, sums, counts = _launch(logits, ids, SCORES.index("softmax"), False, given=True)
    return weights, sums, ids, counts


def route_backward(
    grad_weights: Tensor, grad_sums: Tensor, logits: Tensor, expert_ids: Tensor, score: int, normalize: bool
) -> Tensor:
    """The operator mmkernels::route_backward."""
    tokens, experts = logits.shape
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    blocks, options = _blocks(experts)
    if tokens > 0:
        route_backward_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            grad_weights=grad_weights,
            grad_sums=grad_sums,
            logits=logits,
            logits_row=logits.stride(0),
            ids=expert_ids.contiguous(),
            grad=grad,
            tokens=tokens,
            experts=experts,
            slots=expert_ids.size(1),
            SOFTMAX=SCORES[score] == "softmax",
            NORMALIZE=normalize,
            **blocks,
            **options,
        )
    return grad
