"""Run by test_triton_attention.py in a process of its own, under TRITON_INTERPRET=1: attention on CPU tensors, with tiles
small enough that every loop turns. Arguments: dtypes, with "-brief" after them for the cases of BRIEF alone. Prints a line
a check."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from support import assert_same_bits
from torch import Tensor
from triton_compare import compare, run

from mmkernels.reference import attention as reference
from mmkernels.triton import attention as launches

SMALL_TILES = {
    "forward": (32, 32),
    "decode": (16, 32),
    "queries": (32, 32),
    "keys": (32, 32),
    "bias": (32, 32),
    "tiny forward": (32, 32),
    "tiny backward": (32, 32),
}


@dataclass
class Case:
    """One call. Shapes of `bias` and `mask` hold letters (B, H, Q, K) or 1; `lengths` are those of packed sequences."""

    sizes: tuple[int, int, int] = (1, 1, 1)  # B, H, Hk
    length: tuple[int, int] = (37, 45)  # Lq, Lk
    channels: tuple[int, int] = (24, 24)  # D, Dv
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    longest: tuple[int, int] = (0, 0)
    bias: str = ""
    float_bias: bool = False
    mask: str = ""
    limits: str = ""  # "own", one row a sample, or "shared"
    segments: bool = False
    gate: bool = False
    scale: float = 0.3
    softcap: float = 0.0
    dropout: float = 0.0
    window: tuple[int, int] = (-1, -1)
    bottom_right: bool = False
    grad_lse: bool = False
    views: bool = False  # of one packed projection
    small_tiles: bool = True
    tiny: bool = False  # whether several heads and sequences share a tile
    noise: float = 0.0  # beyond the rule, where a gradient is 0 because all weights of a row move together


CASES = {
    "plain": Case(sizes=(2, 2, 2)),
    "tiles of the table": Case(length=(70, 150), grad_lse=True, small_tiles=False),
    "whole blocks": Case(length=(64, 96)),
    "causal, top left": Case(window=(-1, 0), grad_lse=True),
    "causal, top left, more queries": Case(length=(50, 21), window=(-1, 0)),
    "causal, bottom right": Case(window=(-1, 0), bottom_right=True),
    "causal, bottom right, more queries": Case(length=(50, 21), window=(-1, 0), bottom_right=True, grad_lse=True),
    "window": Case(sizes=(2, 1, 1), length=(90, 90), window=(20, 7)),
    "window of one": Case(window=(0, 0), noise=1e-6),
    "window to the left": Case(length=(50, 90), window=(11, -1), bottom_right=True),
    "window to the right": Case(length=(90, 50), window=(-1, 30)),
    "window without end": Case(window=(2**63 - 1, 2**62)),
    "bias BHQK": Case(sizes=(2, 2, 2), bias="BHQK", grad_lse=True),
    "bias 1HQK": Case(sizes=(2, 2, 2), bias="1HQK", window=(-1, 0)),
    "bias B1QK": Case(bias="B1QK", sizes=(2, 2, 1)),
    "bias 11QK": Case(sizes=(2, 2, 2), bias="11QK", float_bias=True),
    "bias B11K": Case(sizes=(2, 1, 1), bias="B11K"),
    "bias BHQ1": Case(sizes=(2, 1, 1), bias="BHQ1", noise=1e-5),
    "bias 1H1K": Case(sizes=(2, 2, 2), bias="1H1K", dropout=0.2),
    "bias 1111": Case(sizes=(2, 2, 2), bias="1111", float_bias=True, noise=1e-4),
    "bias QK": Case(bias="QK"),
    "mask B1QK": Case(sizes=(2, 1, 1), mask="B1QK"),
    "mask BHQK": Case(sizes=(2, 2, 2), mask="BHQK", grad_lse=True),
    "mask B11K": Case(sizes=(2, 1, 1), mask="B11K", bias="1HQK"),
    "mask Q1": Case(mask="Q1"),
    "limits": Case(sizes=(2, 1, 1), limits="own"),
    "limits, shared": Case(sizes=(2, 2, 2), limits="shared", window=(9, -1), grad_lse=True),
    "segments": Case(sizes=(2, 1, 1), segments=True),
    "segments, causal": Case(segments=True, window=(-1, 0), sizes=(1, 4, 2)),
    "softcap": Case(softcap=0.7, scale=1.0, grad_lse=True),
    "softcap, bias": Case(softcap=5.0, bias="1HQK"),
    "groups": Case(sizes=(1, 6, 2)),
    "one head of k": Case(sizes=(1, 3, 1), window=(-1, 0)),
    "dropout": Case(dropout=0.3),
    "dropout, groups": Case(dropout=0.5, sizes=(2, 2, 1), grad_lse=True),
    "gate": Case(sizes=(2, 2, 2), gate=True),
    "gate, dropout, groups": Case(gate=True, dropout=0.25, sizes=(1, 4, 2)),
    "Dv above D": Case(channels=(24, 40)),
    "Dv below D": Case(channels=(40, 24), window=(-1, 0)),
    "6 channels": Case(channels=(6, 6)),
    "10 channels": Case(channels=(10, 3)),
    "72 channels": Case(channels=(72, 72)),
    "1 channel": Case(channels=(1, 1)),
    "no channels of v": Case(channels=(8, 0), grad_lse=True),
    "views": Case(sizes=(2, 2, 2), length=(33, 33), views=True),
    "views, causal": Case(length=(33, 33), views=True, window=(-1, 0), channels=(16, 16)),
    "negative scale": Case(scale=-0.4),
    "scale of 0": Case(scale=0.0, window=(9, 0), noise=1e-6),
    "everything": Case(
        sizes=(2, 2, 1),
        length=(33, 40),
        channels=(24, 40),
        bias="1HQK",
        mask="B1QK",
        limits="own",
        segments=True,
        gate=True,
        softcap=3.0,
        dropout=0.2,
        window=(25, 9),
        bottom_right=True,
        grad_lse=True,
    ),
    "one query": Case(length=(1, 700)),
    "one query, groups": Case(length=(1, 700), sizes=(1, 4, 2), window=(300, 0), bottom_right=True, grad_lse=True),
    "one query, few keys": Case(length=(1, 40), sizes=(2, 4, 2)),
    "three queries, groups": Case(length=(3, 600), sizes=(1, 4, 1), window=(-1, 0), bottom_right=True),
    "three queries, top left": Case(length=(3, 600), sizes=(1, 4, 1), window=(-1, 0)),
    "four queries, everything": Case(
        length=(4, 270),
        sizes=(1, 4, 2),
        channels=(10, 6),
        bias="BHQK",
        mask="B1QK",
        limits="own",
        segments=True,
        gate=True,
        dropout=0.2,
    ),
    "tiny": Case(sizes=(3, 1, 1), length=(16, 16), channels=(6, 6), grad_lse=True, tiny=True),
    "tiny, tiles of the table": Case(
        sizes=(3, 3, 3), length=(16, 16), channels=(64, 64), small_tiles=False, grad_lse=True, tiny=True
    ),
    "tiny, one pair a tile": Case(sizes=(1, 3, 3), length=(17, 32), tiny=True),
    "tiny, more keys": Case(sizes=(2, 2, 2), length=(5, 30), channels=(24, 40), small_tiles=False, tiny=True),
    "tiny, more queries": Case(sizes=(3, 1, 1), length=(13, 3), channels=(40, 24), tiny=True),
    "tiny, one key": Case(sizes=(3, 1, 1), length=(4, 1), noise=1e-6, tiny=True),
    "tiny, causal": Case(sizes=(1, 3, 3), length=(9, 13), window=(-1, 0), tiny=True),
    "tiny, causal, bottom right": Case(
        sizes=(1, 3, 3), length=(12, 7), window=(-1, 0), bottom_right=True, grad_lse=True, tiny=True
    ),
    "tiny, window": Case(sizes=(3, 1, 1), length=(16, 16), window=(4, 2), tiny=True),
    "tiny, bias 1HQK": Case(sizes=(3, 3, 3), length=(16, 11), bias="1HQK", window=(-1, 0), grad_lse=True, tiny=True),
    "tiny, bias BHQK": Case(sizes=(3, 1, 1), length=(10, 16), bias="BHQK", tiny=True),
    "tiny, bias 1H1K": Case(sizes=(1, 3, 3), length=(10, 16), bias="1H1K", float_bias=True, tiny=True),
    "tiny, mask B11K": Case(sizes=(3, 1, 1), length=(16, 16), mask="B11K", grad_lse=True, tiny=True),
    "tiny, mask 1HQK, bias QK": Case(sizes=(1, 3, 3), length=(7, 9), mask="1HQK", bias="QK", tiny=True),
    "tiny, views": Case(sizes=(3, 3, 3), length=(16, 16), views=True, scale=-0.4, tiny=True),
    "tiny, all that is for others": Case(
        sizes=(3, 2, 1), length=(9, 11), bias="1HQK", limits="own", segments=True, gate=True, softcap=3.0, dropout=0.2
    ),
    "no queries": Case(length=(0, 9), tiny=True),
    "no queries, groups": Case(sizes=(1, 4, 2), length=(0, 9)),
    "no keys": Case(length=(9, 0), bias="1HQK", gate=True, grad_lse=True),
    "no keys, tiny": Case(length=(9, 0), bias="1HQK", grad_lse=True, tiny=True),
    "one query, no keys": Case(sizes=(1, 4, 2), length=(1, 0)),
    "no batch": Case(sizes=(0, 2, 2), bias="1HQK"),
    "packed": Case(sizes=(0, 2, 2), lengths=((20, 0, 37, 5), (45, 6, 0, 17)), grad_lse=True),
    "packed, causal": Case(lengths=((20, 1, 37), (20, 1, 37)), window=(-1, 0), sizes=(0, 4, 2)),
    "packed, bottom right": Case(lengths=((20, 40), (33, 17)), window=(-1, 0), bottom_right=True),
    "packed, all of it": Case(
        lengths=((20, 0, 37), (45, 6, 17)),
        sizes=(0, 2, 1),
        bias="BHQK",
        mask="B1QK",
        limits="own",
        segments=True,
        gate=True,
        dropout=0.2,
        window=(30, 12),
        grad_lse=True,
    ),
    "packed, bias 1HQK": Case(sizes=(0, 2, 2), lengths=((20, 7), (18, 33)), bias="1HQK"),
    "packed, bias 1H1K": Case(sizes=(0, 2, 2), lengths=((40, 7), (18, 33)), bias="1H1K", mask="B11K"),
    "packed, bias B1Q1": Case(lengths=((40, 7), (18, 33)), bias="B1Q1", float_bias=True, noise=1e-5),
    "packed, one query each": Case(lengths=((1, 1, 0), (600, 3, 7)), longest=(1, 600), sizes=(0, 4, 2)),
    "packed, few queries": Case(lengths=((3, 2), (300, 700)), longest=(3, 700), window=(-1, 0), bottom_right=True),
    "packed, lengths that understate": Case(lengths=((40, 7), (300, 33)), longest=(2, 20)),
    "packed, nothing": Case(lengths=((), ())),
    "packed, empty sequences": Case(lengths=((0, 0), (0, 0))),
}

# What half precision could break: conversions, scores in units of log 2.
BRIEF = (
    "causal, bottom right",
    "tiles of the table",
    "bias 1HQK",
    "softcap",
    "gate, dropout, groups",
    "Dv above D",
    "everything",
    "one query, groups",
    "packed, all of it",
    "tiny, tiles of the table",
    "tiny, bias 1HQK",
)


def arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """The operator's arguments."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, kv_heads = case.sizes
    len_q, len_k = case.length
    d, dv = case.channels
    cu_q = cu_k = None
    longest_q, longest_k = len_q, len_k
    if case.lengths is not None:
        batch = len(case.lengths[0])
        longest_q, longest_k = (max((0, *lengths)) for lengths in case.lengths)
        cu_q, cu_k = (
            torch.tensor([0, *accumulate(lengths)], dtype=kind)
            for lengths, kind in zip(case.lengths, (torch.int32, torch.int64), strict=True)
        )

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    if cu_q is not None and cu_k is not None:
        total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
        q, k, v = draw(total_q, heads, d), draw(total_k, kv_heads, d), draw(total_k, kv_heads, dv)
        rows_q, rows_k, gate = (total_q,), (total_k,), (total_k, kv_heads)
    elif case.views:
        q, k, v = draw(batch, len_q, 3, heads, d).permute(2, 0, 3, 1, 4)
        rows_q, rows_k, gate = (batch, len_q), (batch, len_k), (batch, kv_heads, len_k)
    else:
        q, k, v = draw(batch, heads, len_q, d), draw(batch, kv_heads, len_k, d), draw(batch, kv_heads, len_k, dv)
        rows_q, rows_k, gate = (batch, len_q), (batch, len_k), (batch, kv_heads, len_k)
    full = {"B": batch, "H": heads, "Q": longest_q, "K": longest_k, "1": 1}

    def scores(letters: str, kind: torch.dtype) -> Tensor | None:
        return draw(*(full[letter] for letter in letters), kind=kind) if letters else None

    def ids(shape: tuple[int, ...], low: int, high: int, kind: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(kind)

    limits = None
    if case.limits:
        limits = ids((1, len_q) if case.limits == "shared" else rows_q, -3, longest_k + 3, torch.int64)
        limits.view(-1)[:2] = torch.tensor([-(2**63), 2**63 - 1])[: limits.numel()]
    mask = scores(case.mask, torch.float32)
    return (
        q,
        k,
        v,
        scores(case.bias, torch.float32 if case.float_bias else dtype),
        None if mask is None else mask > -0.3,
        limits,
        ids(rows_q, 0, 3, torch.int32) if case.segments else None,
        ids(rows_k, 0, 3, torch.int64) if case.segments else None,
        cu_q,
        cu_k,
        draw(*gate, kind=torch.float32 if case.softcap else dtype) if case.gate else None,
        torch.tensor([-1234567890123456789]) if case.dropout else None,
        case.scale,
        case.softcap,
        case.dropout,
        *case.window,
        case.bottom_right,
        *case.longest,
    )


def check(name: str, case: Case, dtype: torch.dtype) -> None:
    args = arguments(case, dtype)
    assert launches._Call(*args).is_tiny == case.tiny, name
    out, lse = compare(launches.attention, reference.attention_op, args, f"forward {name}, {dtype}")
    assert (out if case.lengths is not None else out.transpose(1, 2)).is_contiguous() and lse.is_contiguous(), name
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(dtype)
    grad_lse = torch.randn(lse.shape, generator=generator) if case.grad_lse else None
    backward = (grad_out, grad_lse, *args[:12], out, lse, *args[12:])
    what = f"backward {name}, {dtype}"
    noise = case.noise * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    grads = compare(launches.attention_backward, reference.attention_backward_op, (*backward, True, True), what, noise)
    for grad in grads[:3]:
        assert (grad if case.lengths is not None else grad.transpose(1, 2)).is_contiguous(), name
    if case.bias or case.gate:
        fewer = run(launches.attention_backward, (*backward, False, False))
        assert fewer[3].numel() == fewer[4].numel() == 0
        for first, second in zip(grads[:3], fewer[:3], strict=True):
            assert_same_bits(first, second, f"{name}: without the gradients of bias and gate")


def check_far_out(case: Case, dtype: torch.dtype) -> None:
    """Rows of a bias far below 0, down to the lowest float: uniform weights; and -inf, which hides."""
    args = list(arguments(case, dtype))
    rows = torch.tensor([0.0, -5000.0, torch.finfo(dtype).min, -torch.inf, -30000.0, 5000.0]).to(dtype)
    args[3] = rows.repeat(7)[: case.length[0], None].expand(case.length)
    out, lse = compare(launches.attention, reference.attention_op, tuple(args), f"forward far out, {dtype}")
    assert torch.equal(lse.isinf(), (args[3][:, 0] == -torch.inf).expand_as(lse))
    backward = (torch.ones_like(out), None, *args[:12], out, lse, *args[12:], False, False)
    compare(launches.attention_backward, reference.attention_backward_op, backward, f"backward far out, {dtype}")


def check_bad_indices(dtype: torch.dtype) -> None:
    """cu_seqlens that lie and a bias that is too small: nothing is read or written out of bounds, and what they do not spoil
    is right."""
    case = Case(lengths=((20, 9, 8), (20, 9, 8)), bias="1HQK", sizes=(0, 2, 2))
    good = arguments(case, dtype)
    expected = reference.attention_op(*good)[0][:20]
    for spoiled in ([0, 20, 2**40, -(2**40)], [0, 20, -7, 10**9], [-(2**62), 20, 5, 2**62]):
        args = list(good)
        args[8], args[9] = torch.tensor(spoiled), torch.tensor(spoiled)
        out, lse = launches.attention(*args)
        if spoiled[2] > 20:
            torch.testing.assert_close(out[:20], expected, rtol=0.05, atol=0.05)
        launches.attention_backward(torch.ones_like(out), None, *args[:12], out, lse, *args[12:], True, False)
    args = list(good)
    args[3] = good[3][..., :3, :2].contiguous()
    out, lse = launches.attention(*args)
    grad_bias = launches.attention_backward(torch.ones_like(out), None, *args[:12], out, lse, *args[12:], True, False)[3]
    assert out.isfinite().all() and grad_bias.shape == args[3].shape and grad_bias.isfinite().all()
    print("checked bad indices,", dtype)


def before_the_end(x: Tensor) -> Tensor:
    """A copy, behind which no memory can be read."""
    room = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, room + mmap.PAGESIZE)
    copy = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=room - x.nbytes).view(x.shape)
    no_access = ctypes.CDLL(None).mprotect(ctypes.c_void_p(copy.data_ptr() + x.nbytes), mmap.PAGESIZE, 0)
    assert no_access == 0
    return copy.copy_(x)


def check_tiny_apart(dtype: torch.dtype) -> None:
    """Heads and sequences that share a tile: what is NaN in one stays there, and the last tile, which has room for one more,
    reads no bias and no mask behind the last."""
    args = list(arguments(Case(sizes=(3, 1, 1), length=(16, 16), bias="BHQK", mask="BHQK"), dtype))
    args[3], args[4] = before_the_end(args[3]), before_the_end(args[4])

    def both_ways() -> tuple[Tensor, ...]:
        out, lse = launches.attention(*args)
        backward = (torch.ones_like(out), None, *args[:12], out, lse, *args[12:], True, False)
        return out, lse, *launches.attention_backward(*backward)[:4]

    assert launches._Call(*args).is_tiny
    good = both_ways()
    for operand in range(3):
        spoiled, args[operand] = args[operand], args[operand].clone()
        args[operand][1, 0, 3] = float("nan")
        bad = both_ways()
        args[operand] = spoiled
        assert bad[0][1].isnan().any()
        for ours, theirs in zip(bad, good, strict=True):
            assert_same_bits(ours[0::2], theirs[0::2], f"NaN beside, operand {operand}")
    print("checked tiny apart,", dtype)


table, resident = launches._tile, launches._Call.resident


def small(kind: str, *sizes: Any) -> tuple[dict[str, int], dict[str, Any]]:
    blocks, options = table(kind, *sizes)
    return {**blocks, "BLOCK_M": SMALL_TILES[kind][0], "BLOCK_N": SMALL_TILES[kind][1]}, options


for argument in sys.argv[1:]:
    dtype = getattr(torch, argument.removesuffix("-brief"))
    for turn, name in enumerate(BRIEF if argument.endswith("-brief") else CASES):
        launches._tile = small if CASES[name].small_tiles else table
        launches._Call.resident = (
            resident if turn % 2 else (lambda call: 2)
        )  # fewer programs than tiles, in every other case
        check(name, CASES[name], dtype)
    launches._tile = small
    check_far_out(Case(), dtype)
    check_far_out(Case(length=(16, 11)), dtype)
    check_bad_indices(dtype)
    check_tiny_apart(dtype)
sys.exit(0)
