"""Attention in bfloat16 at sizes that matrix tiles (AMX) or products of pairs (AVX512_BF16) take: their padding, every
option beside them, which kernel ran. Without either the same calls run on the best of vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import as_tuple, assert_same_bits, assert_within_rule, bfloat16_kernel, cotangents, gradients, to_double
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards.card import Call
from mmkernels.reference import attention as reference
from mmkernels.reference import window_attention as window_reference

BFLOAT16 = torch.bfloat16


@pytest.fixture(params=[runtime.best_isa()])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The highest tier alone: the others' kernels have tests of their own."""
    with runtime.forced_isa(request.param):
        yield request.param


def drawn(*shape: int, dtype: torch.dtype = BFLOAT16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def check(ours: Any, plain: Any, call: Call, op: str, kernel: str, luck: float = 0) -> None:
    """Outputs and gradients within the rule, on that kernel, forward and backward. `luck`: epsilons of a result's largest
    number more, where plain torch is right by luck."""
    upstream = cotangents(as_tuple(call.of(plain)))
    assert mk.explain(op, *call.args, **call.kwargs).kernel == kernel
    runtime.last_kernels(clear=True)
    with runtime.poisoned_outputs():
        results = [*as_tuple(call.of(ours)), *gradients(ours, call, upstream)]
    assert {(name, ran) for name, ran in runtime.last_kernels()} == {(op, kernel), (f"{op}_backward", kernel)}
    theirs = [*as_tuple(call.of(plain)), *gradients(plain, call, upstream)]
    truth = [*as_tuple(to_double(call).of(plain)), *gradients(plain, to_double(call), upstream)]
    for i, (a, b, c) in enumerate(zip(results, theirs, truth, strict=True)):
        assert torch.equal(a.isinf(), c.isinf()), f"result {i}"  # logarithms of rows that see nothing
        a, b, c = (x.masked_fill(c.isinf(), 0) for x in (a, b, c))
        assert_within_rule(a, b, c, f"result {i}", extra=luck * torch.finfo(a.dtype).eps * c.abs().max().item())


def operands(batch: int, heads: int, kv: int, len_q: int, len_k: int, dim: int, value_dim: int) -> tuple[Tensor, ...]:
    return (
        drawn(batch, heads, len_q, dim),
        drawn(batch, kv, len_k, dim, seed=1),
        drawn(batch, kv, len_k, value_dim, seed=2),
    )


# Every edge of a tile: 16 and 32 rows, keys and channels, one more, one less; blocks of keys beyond the first; odd numbers,
# the last of which has no pair.
SIZES = (
    (2, 4, 2, 37, 50, 64, 64),
    (1, 2, 2, 17, 33, 33, 72),
    (1, 2, 1, 33, 401, 72, 33),
    (1, 1, 1, 5, 197, 256, 1),
    (1, 2, 2, 64, 64, 1, 72),
    (1, 2, 2, 48, 95, 6, 40),
    (2, 3, 3, 31, 16, 32, 17),
    (1, 1, 1, 130, 770, 16, 48),
)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_sizes(sizes: tuple[int, ...], causal: bool, isa: str) -> None:
    call = Call(operands(*sizes), {"is_causal": causal, "causal_alignment": "bottom_right", "return_lse": True})
    check(mk.attention, reference.attention, call, "attention", bfloat16_kernel())


OPTIONS: dict[str, Any] = {
    "bias": lambda: {"bias": drawn(1, 4, 37, 90)},
    "bias of the keys": lambda: {"bias": drawn(2, 1, 1, 90, dtype=torch.float32)},
    "bias of the queries": lambda: {"bias": drawn(1, 4, 37, 1)},
    "mask": lambda: {"mask": drawn(2, 1, 37, 90) > -0.5},
    "limits": lambda: {"limits": torch.arange(74).reshape(2, 37) % 91},
    "window": lambda: {"window_size": (20, 9), "causal_alignment": "bottom_right"},
    "segments": lambda: {
        "segment_ids_q": torch.arange(37)[None] % 3,
        "segment_ids_k": torch.arange(180).reshape(2, 90) % 3,
    },
    "softcap": lambda: {"softcap": 1.5, "scale": 0.4},
    "dropout": lambda: {"dropout_p": 0.25, "seed": 11},
    "gate": lambda: {"value_gate": drawn(2, 2, 90, seed=5)},
}


@pytest.mark.parametrize("option", [*OPTIONS, "all but the bias of the queries"])
def test_options(option: str, isa: str) -> None:
    if option in OPTIONS:
        more = OPTIONS[option]()
    else:
        more = {key: value for name in OPTIONS if "of the" not in name for key, value in OPTIONS[name]().items()}
    call = Call(operands(2, 4, 2, 37, 90, 40, 24), {**more, "return_lse": True})
    check(mk.attention, reference.attention, call, "attention", bfloat16_kernel())


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("sizes", [((9, 10), (7, 7), (3, 3)), ((5, 6, 7), (4, 4, 4), (2, 0, 1))], ids=str)
def test_windows(sizes: tuple[tuple[int, ...], ...], norm: bool, isa: str) -> None:
    """Shifted, with tokens beyond the grid, relative positions; queries and keys over their norms."""
    grid, window, shift = sizes
    channels, heads = 2 * 24, 2
    rows = math.prod(2 * extent - 1 for extent in window)
    more: dict[str, Any] = {"window": window, "shift": shift, "num_heads": heads, "pad_value": drawn(3 * channels, seed=3)}
    if norm:
        more |= {"qk_norm": "l2", "scale": drawn(heads, seed=4).abs() * 4}
    call = Call((drawn(2, *grid, 3 * channels), drawn(rows, heads, seed=2)), more)
    check(mk.window_attention, window_reference.window_attention, call, "window_attention", bfloat16_kernel(), luck=2)


def test_packed_sequences_choose_one_by_one(isa: str) -> None:
    """Bit for bit what single calls are, some of which run on vectors."""
    lengths_q, lengths_k = (3, 70, 16, 40, 0), (200, 70, 20, 129, 8)
    q, k, v = drawn(sum(lengths_q), 2, 48), drawn(sum(lengths_k), 2, 48, seed=1), drawn(sum(lengths_k), 2, 20, seed=2)
    cu_q, cu_k = (torch.tensor((0, *lengths)).cumsum(0) for lengths in (lengths_q, lengths_k))
    together = Call((q, k, v), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "return_lse": True})
    check(mk.attention, reference.attention, together, "attention", bfloat16_kernel())
    upstream = cotangents(together.of(mk.attention))
    results = (*together.of(mk.attention), *gradients(mk.attention, together, upstream))
    ran = set()
    for b in range(len(lengths_q)):
        of_q, of_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = Call(
            tuple(x[part].transpose(0, 1)[None] for x, part in ((q, of_q), (k, of_k), (v, of_k))), {"return_lse": True}
        )
        runtime.last_kernels(clear=True)
        parts = alone.of(mk.attention)
        ran |= {kernel for _, kernel in runtime.last_kernels()}
        grads = gradients(mk.attention, alone, [u[of_q].transpose(0, 1)[None] for u in upstream])
        for i, (one, part, of) in enumerate(zip((*parts, *grads), results, (of_q, of_q, of_q, of_k, of_k), strict=True)):
            assert_same_bits(one[0].transpose(0, 1), part[of], f"result {i} of sequence {b}")
    assert ran == {bfloat16_kernel(), "cpu/avx512" if isa == "amx" else f"cpu/{isa}"}


def test_values_beyond_every_limit_are_not_read(isa: str) -> None:
    """As those of a cache that is longer than what it holds: they may be anything."""
    q, k, v = operands(1, 2, 2, 40, 100, 32, 32)
    limits = torch.arange(40)[None] + 30
    whole = mk.attention(q, k, v, limits=limits)
    k[:, :, 69:], v[:, :, 69:] = math.nan, math.inf
    assert_same_bits(mk.attention(q, k, v, limits=limits), whole, "out")


@pytest.mark.parametrize(
    ("sizes", "tiles", "pairs"),
    [
        ((8, 12, 12, 197, 197, 64, 64), True, True),  # ViT-B
        ((1, 3, 3, 49, 49, 32, 32), True, True),  # Swin
        ((1, 32, 8, 1, 4096, 128, 128), False, False),  # decoding: keys are read once
        ((1, 32, 4, 1, 4096, 128, 128), True, True),  # eight heads share them
        ((9, 4, 4, 16, 16, 32, 32), False, False),  # tiny sequences, batch entries as lanes
        ((9, 4, 4, 16, 16, 64, 64), False, True),
        ((1, 1, 1, 16, 32, 64, 64), False, True),
        ((1, 1, 1, 64, 64, 6, 6), False, True),  # padding
        ((1, 1, 1, 64, 64, 4, 4), False, False),
    ],
    ids=str,
)
def test_which_calls_leave_vectors(sizes: tuple[int, ...], tiles: bool, pairs: bool, isa: str) -> None:
    q, k, v = operands(*sizes)
    vectors = f"cpu/{'avx512' if isa == 'amx' else isa}"
    kernel = bfloat16_kernel() if (tiles if isa == "amx" else pairs) else vectors
    assert mk.explain(mk.attention, q, k, v).kernel == kernel
    runtime.last_kernels(clear=True)
    mk.attention(q, k, v)
    assert runtime.last_kernels() == [("attention", kernel)]
    assert mk.explain(mk.attention, q.float(), k.float(), v.float()).kernel == vectors


def test_lower_tiers_keep_to_vectors() -> None:
    q, k, v = operands(1, 2, 2, 40, 40, 32, 32)
    for name in runtime.available_isas():
        if name not in ("avx512", "amx"):
            with runtime.forced_isa(name):
                runtime.last_kernels(clear=True)
                mk.attention(q, k, v)
                assert mk.explain(mk.attention, q, k, v).kernel == f"cpu/{name}"
                assert runtime.last_kernels() == [("attention", f"cpu/{name}")]


def test_infinity_and_nan_stay(isa: str) -> None:
    """In the rows and channels that they belong to, and in no other."""
    q, k, v = operands(1, 1, 1, 40, 51, 32, 31)
    q[0, 0, 3, 31], v[0, 0, 50, 30], v[0, 0, 7, 0] = math.nan, math.inf, math.nan
    out, lse = mk.attention(q, k, v, return_lse=True)
    plain, plain_lse = reference.attention(q, k, v, return_lse=True)
    assert torch.equal(out.isnan(), plain.isnan()) and torch.equal(out.isinf(), plain.isinf())
    assert torch.equal(lse.isnan(), plain_lse.isnan()) and lse.isnan().any() and not lse.isnan().all()
    assert out.isinf().any() and not out.isnan().all()


def test_bits_hang_on_neither_threads_nor_batch(isa: str) -> None:
    call = Call(operands(3, 4, 2, 70, 91, 48, 40), {"is_causal": True, "return_lse": True})
    upstream = cotangents(as_tuple(call.of(mk.attention)))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([*as_tuple(call.of(mk.attention)), *gradients(mk.attention, call, upstream)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(a, b, f"result {i}")
    for b in range(3):
        alone = Call(tuple(x[b : b + 1] for x in call.args), call.kwargs)
        ups = [u[b : b + 1] for u in upstream]
        for i, (a, c) in enumerate(
            zip((*as_tuple(alone.of(mk.attention)), *gradients(mk.attention, alone, ups)), results[0], strict=True)
        ):
            assert_same_bits(a, c[b : b + 1], f"result {i} of entry {b}")
