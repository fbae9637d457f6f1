"""The card of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.cards import attention_gpu
from mmkernels.cards.card import BadInput, BenchCase, Call, Card, Make, Sample, Target
from mmkernels.cards.heads import (
    STRIDED_HEADS,
    attention_cost,
    bad,
    bad_beside,
    bad_lengths,
    bad_operand,
    projection_call,
    strided,
    with_named,
)
from mmkernels.cards.peers import plain, sdpa
from mmkernels.ops import attention as ops
from mmkernels.reference import attention as reference

_SYSTEMS = ("all of them", "CrossViT", "ViViT", "TNT", "Swin UNETR", "4M", "PILL", "MM-LEGO")

Shape = tuple[int, ...]


# --- calls ------------------------------------------------------------------------------------------------------------
def _kept(kind: str, dtype: torch.dtype) -> torch.dtype:
    """`kind` "float32" keeps a tensor in float32 beside a half-precision q."""
    return torch.float32 if kind == "float32" and dtype != torch.float64 else dtype


def _beside(
    device: torch.device,
    dtype: torch.dtype,
    g: torch.Generator,
    bias: Shape | None,
    mask: Shape | None,
    blind: bool,
    kept: str,
) -> dict[str, Tensor]:
    """bias and mask of these shapes; every row of the mask sees its first key, or, `blind`, every other row sees none."""
    tensors = {}
    if bias is not None:
        tensors["bias"] = torch.randn(bias, generator=g).to(device=device, dtype=_kept(kept, dtype))
    if mask is not None:
        seen = torch.rand(mask, generator=g) < 0.6
        seen[..., :1] = True
        if blind:
            seen[..., ::2, :] = False
        tensors["mask"] = seen.to(device)
    return tensors


def _attention_call(
    batch: int,
    heads: int,
    len_q: int,
    channels: int,
    *,
    len_k: int | None = None,
    kv_heads: int | None = None,
    value_channels: int | None = None,
    bias: Shape | None = None,
    mask: Shape | None = None,
    blind: bool = False,
    limits: int | None = None,
    segments: int | None = None,
    gate: bool = False,
    kept: str = "own",
    seed_tensor: int | None = None,
    **kwargs: Any,
) -> Make:
    """q [batch, heads, len_q, channels] and what is given beside it. `limits`, `segments`: their batch, 1 or that of q.
    `kept`: the dtype of bias and gate, own or float32."""
    len_k = len_q if len_k is None else len_k
    kv_heads = heads if kv_heads is None else kv_heads
    value_channels = channels if value_channels is None else value_channels

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(device=device, dtype=dtype)

        q, k = draw(batch, heads, len_q, channels), draw(batch, kv_heads, len_k, channels)
        more: dict[str, Any] = dict(kwargs)
        v = draw(batch, kv_heads, len_k, value_channels)
        more |= _beside(device, dtype, g, bias, mask, blind, kept)
        if limits is not None:
            more["limits"] = torch.randint(0, len_k + 1, (limits, len_q), generator=g).to(device)
        if segments is not None:
            for name, length in (("segment_ids_q", len_q), ("segment_ids_k", len_k)):
                more[name] = torch.randint(0, 3, (segments, length), generator=g, dtype=torch.int32).to(device)
        if gate:
            more["value_gate"] = draw(batch, kv_heads, len_k).to(_kept(kept, dtype))
        if seed_tensor is not None:
            more["seed"] = torch.tensor([seed_tensor], device=device)
        return Call((q, k, v), more)

    return make


def _varlen_call(
    lengths_q: Shape,
    lengths_k: Shape,
    heads: int,
    channels: int,
    *,
    kv_heads: int | None = None,
    value_channels: int | None = None,
    bias: Shape | None = None,
    mask: Shape | None = None,
    limits: bool = False,
    segments: bool = False,
    gate: bool = False,
    index: torch.dtype = torch.int32,
    **kwargs: Any,
) -> Make:
    """Sequences of these lengths, packed."""
    kv_heads = heads if kv_heads is None else kv_heads
    value_channels = channels if value_channels is None else value_channels

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(device=device, dtype=dtype)

        tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
        q, k, v = (
            draw(tokens_q, heads, channels),
            draw(tokens_k, kv_heads, channels),
            draw(tokens_k, kv_heads, value_channels),
        )
        more: dict[str, Any] = dict(kwargs) | _beside(device, dtype, g, bias, mask, False, "own")
        for name, lengths in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k)):
            more[name] = torch.tensor((0, *lengths)).cumsum(0).to(device=device, dtype=index)
        if limits:
            more["limits"] = torch.randint(0, max(lengths_k) + 1, (tokens_q,), generator=g, dtype=torch.int32).to(device)
        if segments:
            more["segment_ids_q"] = torch.randint(0, 2, (tokens_q,), generator=g).to(device)
            more["segment_ids_k"] = torch.randint(0, 2, (tokens_k,), generator=g).to(device)
        if gate:
            more["value_gate"] = draw(tokens_k, kv_heads)
        return Call((q, k, v), more)

    return make


_SELDOM = ((2, 1, 5, 9), (1, 1, 5, 9), (2, 4, 1, 9), (1, 4, 1, 9))  # those of the exhaustive suite alone
_BIASES = tuple((batch, heads, len_q, 9) for batch, heads, len_q in product((1, 2), (1, 4), (1, 5)))

# A row that sees one key has a gradient of nothing but rounding, of as many terms as there are value channels: few in causal
# samples. "small", "odd sizes", "float32 parameters" and "ViT-B/16" are names that the generic suite looks for.
_SAMPLES = (
    Sample("small", _attention_call(2, 3, 5, 8, len_k=7)),
    Sample(
        "odd sizes",
        _attention_call(
            2,
            4,
            5,
            6,
            len_k=11,
            kv_heads=2,
            value_channels=10,
            bias=(2, 4, 5, 11),
            mask=(2, 1, 5, 11),
            gate=True,
            softcap=3.0,
            window_size=(4, 6),
            dropout_p=0.2,
            seed=11,
            return_lse=True,
        ),
    ),
    Sample("self-attention", _attention_call(2, 2, 9, 8)),
    *(Sample(f"{channels} channels", _attention_call(2, 2, 9, channels)) for channels in (1, 6, 10, 72)),
    Sample("more value channels", _attention_call(2, 2, 5, 6, len_k=7, value_channels=20)),
    Sample("one value channel", _attention_call(2, 2, 5, 12, len_k=7, value_channels=1), full=True),
    Sample("grouped queries", _attention_call(2, 6, 5, 8, len_k=7, kv_heads=2)),
    Sample("one key head", _attention_call(2, 5, 3, 10, len_k=12, kv_heads=1), full=True),
    Sample("one query", _attention_call(3, 2, 1, 16, len_k=37)),
    Sample(
        "one query, grouped, sees the last keys",
        _attention_call(2, 8, 1, 16, len_k=37, kv_heads=2, window_size=(9, 0), causal_alignment="bottom_right"),
    ),
    Sample("few queries", _attention_call(2, 3, 3, 16, len_k=41, bias=(1, 3, 3, 41))),
    Sample("tiny sequences", _attention_call(6, 4, 16, 6)),
    Sample("windows with a bias", _attention_call(3, 2, 49, 32, bias=(1, 2, 49, 49)), gradcheck=False),
    Sample("windows with a bias each", _attention_call(2, 2, 49, 8, bias=(2, 1, 49, 49)), gradcheck=False),
    Sample("many windows", _attention_call(20, 2, 17, 8, bias=(1, 2, 17, 17), mask=(1, 1, 17, 17)), gradcheck=False),
    *(
        Sample(f"bias {bias}", _attention_call(2, 4, 5, 6, len_k=9, kv_heads=2, bias=bias), full=bias in _SELDOM)
        for bias in _BIASES
    ),
    Sample("bias [H, Lq, Lk]", _attention_call(2, 4, 5, 6, len_k=9, bias=(4, 5, 9))),
    Sample("bias [Lq, Lk]", _attention_call(2, 4, 5, 6, len_k=9, bias=(5, 9)), full=True),
    Sample("bias [Lk]", _attention_call(2, 4, 5, 6, len_k=9, bias=(9,))),
    Sample(
        "bias transposed", with_named(_attention_call(2, 4, 9, 6, bias=(1, 4, 9, 9)), "bias", lambda x: x.transpose(2, 3))
    ),
    Sample("float32 parameters", _attention_call(2, 4, 15, 6, len_k=19, bias=(1, 4, 15, 19), gate=True, kept="float32")),
    *(
        Sample(f"mask {mask}", _attention_call(2, 4, 5, 6, len_k=9, kv_heads=2, mask=mask))
        for mask in ((2, 4, 5, 9), (2, 1, 1, 9), (1, 4, 5, 9), (5, 9), (9,))
    ),
    Sample("rows that see nothing", _attention_call(2, 4, 5, 6, len_k=9, mask=(2, 1, 5, 9), blind=True)),
    Sample("mask of rows alone", _attention_call(2, 4, 5, 6, len_k=9, mask=(1, 4, 5, 1), blind=True), full=True),
    Sample("mask and bias", _attention_call(2, 4, 5, 6, len_k=9, mask=(2, 1, 5, 9), bias=(1, 4, 5, 9), blind=True)),
    *(
        Sample(
            f"causal {alignment}, {len_q} of {len_k}",
            _attention_call(2, 2, len_q, 8, len_k=len_k, value_channels=2, is_causal=True, causal_alignment=alignment),
        )
        for alignment in ("top_left", "bottom_right")
        for len_q, len_k in ((9, 9), (5, 12), (12, 5))
    ),
    *(
        Sample(f"window {left}, {right}", _attention_call(2, 4, 11, 8, kv_heads=2, window_size=(left, right)))
        for left, right in ((2, 3), (2, None), (None, 1))
    ),
    Sample("causal window", _attention_call(2, 2, 13, 8, is_causal=True, window_size=(4, 5)), full=True),
    Sample("limits", _attention_call(2, 4, 5, 8, len_k=9, kv_heads=2, limits=2)),
    Sample("limits of all", _attention_call(2, 2, 5, 8, len_k=9, limits=1), full=True),
    Sample("segments", _attention_call(2, 4, 9, 8, len_k=12, kv_heads=2, segments=2)),
    Sample("segments of all, causal", _attention_call(2, 2, 9, 8, value_channels=2, segments=1, is_causal=True)),
    Sample("scale", _attention_call(2, 2, 5, 8, len_k=7, scale=0.7), full=True),
    Sample("softcap", _attention_call(2, 4, 5, 8, len_k=7, kv_heads=2, softcap=1.5), full=True),
    Sample("softcap and bias", _attention_call(2, 4, 5, 8, len_k=7, softcap=1.5, bias=(1, 4, 5, 7), mask=(2, 1, 1, 7))),
    Sample("value gate", _attention_call(2, 4, 5, 8, len_k=7, gate=True), full=True),
    Sample("value gate, grouped", _attention_call(2, 4, 5, 8, len_k=7, kv_heads=2, gate=True, mask=(7,))),
    Sample("dropout", _attention_call(2, 4, 9, 8, dropout_p=0.3, seed=5)),
    Sample(
        "dropout, grouped, seed in a tensor",
        _attention_call(2, 4, 9, 8, kv_heads=2, bias=(1, 1, 1, 9), dropout_p=0.1, seed_tensor=-(2**40) - 3),
    ),
    Sample("logarithms", _attention_call(2, 4, 5, 8, len_k=7, return_lse=True)),
    Sample(
        "logarithms, grouped, bias",
        _attention_call(2, 4, 5, 8, len_k=7, kv_heads=2, bias=(1, 4, 5, 7), return_lse=True),
        full=True,
    ),
    Sample("packed", _varlen_call((5, 0, 3, 9), (5, 0, 3, 9), 2, 8)),
    Sample(
        "packed, cross, grouped",
        _varlen_call((5, 2, 0, 3), (7, 4, 6, 0), 4, 6, kv_heads=2, value_channels=10, index=torch.int64),
    ),
    Sample(
        "packed, causal bottom right",
        _varlen_call((3, 1, 6), (9, 4, 6), 2, 8, is_causal=True, causal_alignment="bottom_right"),
    ),
    Sample(
        "packed, everything",
        _varlen_call(
            (5, 2, 6),
            (7, 4, 9),
            4,
            6,
            kv_heads=2,
            value_channels=8,
            bias=(3, 4, 6, 9),
            mask=(3, 1, 6, 9),
            limits=True,
            segments=True,
            gate=True,
            softcap=2.0,
            window_size=(3, 5),
            dropout_p=0.2,
            seed=3,
            max_seqlen_q=6,
            max_seqlen_k=9,
        ),
    ),
    Sample(
        "packed, one bias for all, logarithms", _varlen_call((5, 2, 6), (7, 4, 9), 2, 6, bias=(2, 8, 10), return_lse=True)
    ),
    Sample("views of a projection", projection_call(2, 3, 3, 9, 8)),
    Sample("views of a projection, grouped, causal", projection_call(2, 4, 2, 9, 8, is_causal=True)),
    *(Sample(name, strided(_attention_call(2, 3, 7, 8), change)) for name, change in STRIDED_HEADS.items()),
    Sample("no batch", _attention_call(0, 3, 5, 8), gradcheck=False),
    Sample("no queries", _attention_call(2, 3, 0, 8, len_k=7, bias=(1, 3, 0, 7)), gradcheck=False),
    Sample("no keys", _attention_call(2, 3, 5, 8, len_k=0, bias=(3, 5, 0)), gradcheck=False),
    Sample("no value channels", _attention_call(2, 3, 5, 8, value_channels=0), gradcheck=False),
    Sample("many keys", _attention_call(1, 2, 9, 16, len_k=700, mask=(9, 700)), gradcheck=False),
    Sample("many keys, few queries", _attention_call(1, 2, 2, 16, len_k=700), gradcheck=False),
    Sample("many queries", _attention_call(1, 1, 620, 8, len_k=40), gradcheck=False),
    Sample("long, causal", _attention_call(1, 1, 410, 8, value_channels=2, is_causal=True), gradcheck=False),
    Sample(
        "long, grouped, window", _attention_call(1, 4, 130, 8, len_k=260, kv_heads=1, window_size=(200, 90)), gradcheck=False
    ),
    Sample("ViT-B/16", _attention_call(1, 2, 197, 64), gradcheck=False),
    Sample("ViT-B/16, bias", _attention_call(2, 2, 197, 16, bias=(1, 2, 197, 197)), gradcheck=False),
    Sample("ViT-B/16, batch of 8", _attention_call(8, 12, 197, 64), gradcheck=False, full=True),
    Sample("long", _attention_call(1, 2, 700, 16, bias=(700, 700)), gradcheck=False, full=True),
    Sample("DINO", _attention_call(1, 12, 1025, 64), gradcheck=False, full=True),
    Sample("DINO, bias", _attention_call(1, 4, 1025, 64, bias=(4, 1025, 1025)), gradcheck=False, full=True),
    Sample("Swin, first stage", _attention_call(512, 3, 49, 32, bias=(1, 3, 49, 49)), gradcheck=False, full=True),
    Sample("Swin UNETR", _attention_call(8, 3, 343, 16, bias=(1, 3, 343, 343)), gradcheck=False, full=True),
    Sample("decoding", _attention_call(4, 32, 1, 128, len_k=4096, kv_heads=8), gradcheck=False, full=True),
)


# --- bad input --------------------------------------------------------------------------------------------------------
_DENSE = _attention_call(2, 4, 5, 8, len_k=7, kv_heads=2)
_PACKED = _varlen_call((5, 3), (7, 2), 4, 8, kv_heads=2)


def _bad_scores(name: str, good: Callable[..., Tensor], dtype: torch.dtype) -> tuple[BadInput, ...]:
    return (
        bad(_DENSE, name, "that does not broadcast", good(2, 3, 5, 7), ValueError),
        bad(_DENSE, name, "of too few keys", good(5, 6), ValueError),
        bad(_DENSE, name, "of five dimensions", good(1, 2, 4, 5, 7), ValueError),
        bad(_DENSE, name, "of another dtype", good(5, 7).to(dtype), TypeError),
        bad(_DENSE, name, "on another device", good(5, 7).to("meta"), ValueError),
        bad(_DENSE, name, "a number", 1.0, TypeError),
        bad(_DENSE, name, "sparse", good(5, 7).to_sparse(), TypeError),
        bad(_PACKED, name, "of another number of sequences", good(3, 1, 5, 7), ValueError),
    )


def _bad_rows(name: str, length: int, other: str | None) -> tuple[BadInput, ...]:
    """`other`: the argument that this one comes with."""
    dense, packed = _DENSE, _PACKED
    if other is not None:
        dense = with_named(dense, other, torch.zeros(1, 12 - length, dtype=torch.int64))
        packed = with_named(packed, other, torch.zeros(8 if other == "segment_ids_q" else 9, dtype=torch.int64))
    good = torch.zeros(2, length, dtype=torch.int64)
    return (
        bad(dense, name, "too short", good[:, 1:], ValueError),
        bad(dense, name, "of another batch", good[:1].expand(3, -1), ValueError),
        bad(dense, name, "of one dimension", good[0], ValueError),
        bad(dense, name, "of floats", good.float(), TypeError),
        bad(dense, name, "on another device", good.to("meta"), ValueError),
        bad(dense, name, "a list", good.tolist(), TypeError),
        bad(packed, name, "of two dimensions, packed", good, ValueError),
    )


_BAD = (
    *bad_operand(_DENSE, _PACKED, "q"),
    *bad_operand(_DENSE, _PACKED, "k"),
    *bad_operand(_DENSE, _PACKED, "v"),
    *bad_beside(_DENSE, "k"),
    *bad_beside(_DENSE, "v"),
    bad(_DENSE, "q", "without channels", lambda x: x[..., :0], ValueError, "k"),
    bad(with_named(_DENSE, "k", lambda x: x[..., :0]), "q", "and k without channels", lambda x: x[..., :0], ValueError),
    bad(_DENSE, "k", "of other channels", lambda x: x[..., :6], ValueError),
    bad(with_named(_DENSE, "v", lambda x: x[:, :0]), "k", "without heads", lambda x: x[:, :0], ValueError),
    bad(_DENSE, "q", "of heads that k's do not divide", lambda x: x[:, :3], ValueError, "k"),
    bad(_DENSE, "v", "of another length", lambda x: x[:, :, :6], ValueError),
    bad(_DENSE, "v", "of other heads", lambda x: x[:, :1], ValueError),
    *_bad_scores("bias", torch.zeros, torch.float64),
    *_bad_scores("mask", lambda *shape: torch.ones(shape, dtype=torch.bool), torch.float32),
    *_bad_rows("limits", 5, None),
    *_bad_rows("segment_ids_q", 5, "segment_ids_k"),
    *_bad_rows("segment_ids_k", 7, "segment_ids_q"),
    bad(_DENSE, "segment_ids_q", "alone", torch.zeros(2, 5, dtype=torch.int64), ValueError, "segment_ids_k"),
    bad(_DENSE, "segment_ids_k", "alone", torch.zeros(2, 7, dtype=torch.int64), ValueError, "segment_ids_q"),
    *bad_lengths(_PACKED, "cu_seqlens_q"),
    *bad_lengths(_PACKED, "cu_seqlens_k"),
    *(
        bad(_PACKED, name, what, value, error)
        for name in ("max_seqlen_q", "max_seqlen_k")
        for what, value, error in (
            ("negative", -1, ValueError),
            ("huge", 2**63, ValueError),
            ("a float", 5.0, TypeError),
            ("a bool", True, TypeError),
        )
    ),
    bad(_DENSE, "value_gate", "of q's heads", torch.zeros(2, 4, 7), ValueError),
    bad(_DENSE, "value_gate", "of another dtype", torch.zeros(2, 2, 7).half(), TypeError),
    bad(_DENSE, "value_gate", "on another device", torch.zeros(2, 2, 7, device="meta"), ValueError),
    bad(_DENSE, "value_gate", "a number", 1.0, TypeError),
    bad(_DENSE, "scale", "a string", "0.5", TypeError),
    bad(_DENSE, "scale", "a huge int", 10**400, ValueError),
    bad(_DENSE, "softcap", "0", 0.0, ValueError),
    bad(_DENSE, "softcap", "negative", -2, ValueError),
    bad(_DENSE, "softcap", "a string", "2", TypeError),
    bad(_DENSE, "dropout_p", "1", 1.0, ValueError),
    bad(_DENSE, "dropout_p", "negative", -0.1, ValueError),
    bad(_DENSE, "dropout_p", "NaN", math.nan, ValueError),
    bad(_DENSE, "dropout_p", "a string", "0.1", TypeError),
    bad(_DENSE, "seed", "a float", 1.0, TypeError),
    bad(_DENSE, "seed", "a bool", True, TypeError),
    bad(_DENSE, "seed", "of 65 bits", 2**63, ValueError),
    bad(_DENSE, "seed", "of two numbers", torch.zeros(2, dtype=torch.int64), ValueError),
    bad(_DENSE, "seed", "of floats", torch.zeros(1), TypeError),
    bad(_DENSE, "seed", "on another device", torch.zeros(1, dtype=torch.int64, device="meta"), ValueError),
    bad(_DENSE, "causal_alignment", "unknown", "bottom_left", ValueError),
    bad(_DENSE, "window_size", "one number", 3, TypeError),
    bad(_DENSE, "window_size", "of three", (1, 2, 3), TypeError),
    bad(_DENSE, "window_size", "of floats", (1.0, 2.0), TypeError),
    bad(_DENSE, "window_size", "of a bool", (True, 1), TypeError),
    bad(_DENSE, "window_size", "negative", (-1, 1), ValueError),
    bad(_DENSE, "window_size", "huge", (None, 2**63), ValueError),
)


# --- benchmark --------------------------------------------------------------------------------------------------------
# The peers are what a model would have: torch's own attention, and the formula written out. Grouped queries are folded into
# rows of one head, which is the fastest way that torch has for few of them.
def _eager_grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _folded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The queries of the heads that one head of k and v serves, as rows of one head."""
    return lambda q, k, v: function(q.view(*k.shape[:2], -1, q.size(-1)), k, v).view(*q.shape[:-1], v.size(-1))


def _of_fixed_bias(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, *, bias: function(q, k, v, bias=bias.detach())


_PEERS: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa, "plain": plain}
# Where the scores of the formula written out, and their copies, are gigabytes, and it is far behind.
_SDPA: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa}
_GROUPED: dict[str, Callable[..., Tensor]] = {
    "sdpa": _eager_grouped_sdpa,
    "folded": _folded(sdpa),
    "plain": _folded(plain),
}


def _bench(
    name: str,
    make: Make,
    ratios: tuple[float, float],
    *,
    peers: dict[str, Callable[..., Tensor]] | None = None,
    run: Callable[..., Any] = ops.attention,
    backward: bool = False,
) -> tuple[BenchCase, ...]:
    """One case for float32 and one for bfloat16, each with its own target."""
    peers = _PEERS if peers is None else peers
    compiled = ("plain",) if "plain" in peers else ()
    return tuple(
        BenchCase(
            f"attention.{name}{'.backward' if backward else ''}",
            make,
            run,
            peers,
            lambda call: attention_cost(call, backward=backward),
            dtypes=(dtype,),
            backward=backward,
            compiled_peers=compiled,
            target=Target((*peers, *(("compile",) if compiled else ())), ratio),
        )
        for dtype, ratio in zip((torch.float32, torch.bfloat16), ratios, strict=True)
    )


_SIZES: dict[str, Make] = {
    "vitb_8x12x197x64": _attention_call(8, 12, 197, 64),
    "dino_1x12x1025x64": _attention_call(1, 12, 1025, 64),
    "bias_8x12x197x64": _attention_call(8, 12, 197, 64, bias=(1, 12, 197, 197)),
    "cross_8x12_32to577x64": _attention_call(8, 12, 32, 64, len_k=577),
    "crossvit_32x6_1to401x32": _attention_call(32, 6, 1, 32, len_k=401),
    "crossvit_32x6_1to401x64": _attention_call(32, 6, 1, 64, len_k=401),
    "tnt_1568x4x16x6": _attention_call(1568, 4, 16, 6),
    "tnt_1568x4x16x10": _attention_call(1568, 4, 16, 10),
    "swin_2048x3x49x32": _attention_call(2048, 3, 49, 32, bias=(1, 3, 49, 49)),
    "swin_128x12x49x32": _attention_call(128, 12, 49, 32, bias=(1, 12, 49, 49)),
    "swinunetr_64x3x343x16": _attention_call(64, 3, 343, 16, bias=(1, 3, 343, 343)),
    "vivit_3136x12x16x64": _attention_call(3136, 12, 16, 64),
    "vivit_1568x12x16x64": _attention_call(1568, 12, 16, 64),
}
_CAUSAL = _attention_call(1, 16, 2048, 64, is_causal=True)
# Ratios promised for float32 and bfloat16.
_FORWARD: dict[str, tuple[float, float]] = {
    "vitb_8x12x197x64": (1.4, 3.0),
    "dino_1x12x1025x64": (1.0, 1.0),
    "bias_8x12x197x64": (1.0, 1.0),
    "cross_8x12_32to577x64": (1.0, 1.0),
    "crossvit_32x6_1to401x32": (1.0, 1.0),
    "crossvit_32x6_1to401x64": (1.0, 1.0),
    "tnt_1568x4x16x6": (4.0, 5.0),
    "tnt_1568x4x16x10": (4.0, 5.0),
    "swin_2048x3x49x32": (2.5, 4.0),
    "swin_128x12x49x32": (2.5, 4.0),
    "swinunetr_64x3x343x16": (2.0, 4.0),
    "vivit_3136x12x16x64": (2.0, 1.0),
}
_BACKWARD: dict[str, tuple[float, float]] = {
    "vitb_8x12x197x64": (1.3, 3.0),
    "dino_1x12x1025x64": (1.15, 2.5),
    "cross_8x12_32to577x64": (1.0, 3.0),
    "crossvit_32x6_1to401x32": (1.0, 3.0),
    "crossvit_32x6_1to401x64": (1.0, 3.0),
    "tnt_1568x4x16x6": (2.0, 5.0),
    "tnt_1568x4x16x10": (2.0, 5.0),
    "vivit_1568x12x16x64": (1.0, 5.0),
}
_FIXED_BIAS: dict[str, tuple[float, float]] = {
    "bias_8x12x197x64": (1.3, 3.0),
    "swin_2048x3x49x32": (2.0, 5.0),
    "swin_128x12x49x32": (2.0, 5.0),
    "swinunetr_64x3x343x16": (2.0, 5.0),
}
_LEARNED_BIAS: dict[str, tuple[float, float]] = {
    "bias_8x12x197x64": (1.6, 3.0),
    "swin_2048x3x49x32": (2.0, 3.0),
    "swin_128x12x49x32": (2.0, 3.0),
    "swinunetr_64x3x343x16": (2.0, 3.0),
}

_BENCH = (
    *(case for name, ratios in _FORWARD.items() for case in _bench(name, _SIZES[name], ratios)),
    *_bench("causal_1x16x2048x64", _CAUSAL, (1.0, 1.0), peers=_SDPA),
    *_bench("long_1x16x4096x64", _attention_call(1, 16, 4096, 64), (1.15, 1.8), peers=_SDPA),
    *_bench(
        "decode_8x32of8_1to4096x128", _attention_call(8, 32, 1, 128, len_k=4096, kv_heads=8), (1.0, 1.0), peers=_GROUPED
    ),
    *(case for name, ratios in _BACKWARD.items() for case in _bench(name, _SIZES[name], ratios, backward=True)),
    *_bench("causal_1x16x2048x64", _CAUSAL, (1.1, 2.5), peers=_SDPA, backward=True),
    *_bench("long_1x4x4096x64", _attention_call(1, 4, 4096, 64), (1.1, 2.5), peers=_SDPA, backward=True),
    *(
        case
        for name, ratios in _FIXED_BIAS.items()
        for case in _bench(
            f"{name}.fixed",
            _SIZES[name],
            ratios,
            peers={peer: _of_fixed_bias(function) for peer, function in _PEERS.items()},
            run=_of_fixed_bias(ops.attention),
            backward=True,
        )
    ),
    *(
        case
        for name, ratios in _LEARNED_BIAS.items()
        for case in _bench(f"{name}.learned", _SIZES[name], ratios, backward=True)
    ),
    *attention_gpu.BENCH,
)

CARDS = (
    Card(
        name="attention",
        family="attention",
        function=ops.attention,
        reference=reference.attention,
        ops=("mmkernels::attention", "mmkernels::attention_backward"),
        backends=ops.BACKENDS,
        samples=_SAMPLES,
        bad_inputs=_BAD,
        dtypes=ops.DTYPES,
        systems=_SYSTEMS,
        summary="softmax attention with every mask and bias, learned ones too; grouped heads, packed sequences",
        bench=_BENCH,
    ),
)
