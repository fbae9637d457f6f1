"""The card of linear attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.cards.card import BenchCase, Call, Card, Cost, Make, Overhead, Sample, Target
from mmkernels.cards.heads import (
    STRIDED_HEADS,
    bad,
    bad_beside,
    bad_lengths,
    bad_operand,
    projection_call,
    strided,
    with_named,
)
from mmkernels.ops import linear_attention as ops
from mmkernels.ops.attention import DTYPES
from mmkernels.reference import linear_attention as reference

_SYSTEMS = ("Transformers are RNNs", "Efficient Attention", "EfficientViT", "MM-LEGO")

Lengths = tuple[int, ...]


# --- calls ------------------------------------------------------------------------------------------------------------
def _state(
    batch: int, heads: int, channels: int, values: int, dtype: torch.dtype, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The sums over some keys, whose features are positive."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    s, z = torch.randn(batch, heads, channels, values, generator=g), torch.rand(batch, heads, channels, generator=g)
    return s.to(kind), (1 + z).to(kind)


def _beside(
    state: tuple[Tensor, Tensor] | None, mask: Tensor | None, device: torch.device, kwargs: dict[str, Any]
) -> dict[str, Any]:
    more = dict(kwargs)
    if state is not None:
        more["state"] = tuple(x.to(device) for x in state)
    if mask is not None:
        more["mask"] = mask.to(device)
    return more


def _positive(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Features that are not made positive by the op, and that it divides by, are drawn so: a denominator near 0 would be a
    matter of rounding alone. So are those of relu, of which a row could be all 0."""
    raw = kwargs.get("feature_map") in ("identity", "relu") and kwargs.get("normalize", True)
    return x.abs() + 0.1 if raw else x


def _call(
    batch: int,
    heads: int,
    length: int,
    channels: int,
    *,
    keys: int | None = None,
    kv_heads: int | None = None,
    value_channels: int | None = None,
    mask: int | None = None,
    state: bool = False,
    **kwargs: Any,
) -> Make:
    """q [batch, heads, length, channels] and what is given beside it. `mask`: its batch, 1 or that of q."""
    keys = length if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    values = channels if value_channels is None else value_channels

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        q, k = (_positive(draw(batch, h, n, channels), kwargs) for h, n in ((heads, length), (kv_heads, keys)))
        v = draw(batch, kv_heads, keys, values)
        initial = _state(batch, kv_heads, channels, values, dtype, g) if state else None
        counted = None
        if mask is not None:
            counted = torch.rand(mask, keys, generator=g) < 0.6
            counted[:, :1] = True
        operands = tuple(x.to(device=device, dtype=dtype) for x in (q, k, v))
        return Call(operands, _beside(initial, counted, device, kwargs))

    return make


def _varlen_call(
    lengths_q: Lengths,
    lengths_k: Lengths,
    heads: int,
    channels: int,
    *,
    kv_heads: int | None = None,
    value_channels: int | None = None,
    mask: bool = False,
    state: bool = False,
    index: torch.dtype = torch.int32,
    **kwargs: Any,
) -> Make:
    """Sequences of these lengths, packed."""
    kv_heads = heads if kv_heads is None else kv_heads
    values = channels if value_channels is None else value_channels

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
        sizes = ((tokens_q, heads, channels), (tokens_k, kv_heads, channels), (tokens_k, kv_heads, values))
        operands = tuple(torch.randn(size, generator=g).to(device=device, dtype=dtype) for size in sizes)
        initial = _state(len(lengths_q), kv_heads, channels, values, dtype, g) if state else None
        counted = torch.rand(tokens_k, generator=g) < 0.7 if mask else None
        if counted is not None:
            counted[:1] = True
        more = _beside(initial, counted, device, kwargs)
        for name, lengths in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k)):
            more[name] = torch.tensor((0, *lengths)).cumsum(0).to(device=device, dtype=index)
        return Call(operands, more)

    return make


def _doubled(x: Tensor) -> Tensor:
    """A feature map of the caller's own, with twice the channels."""
    return torch.cat((torch.exp(-x.abs()), torch.sigmoid(x)), -1)


# One channel or one key has gradients of nothing but rounding, unless eps is of some size: out is v whatever the features
# are. "small", "odd sizes" and "ViT" are names that the generic suite looks for.
_SAMPLES = (
    Sample("small", _call(2, 3, 5, 8, keys=7)),
    Sample(
        "odd sizes",
        _call(2, 4, 13, 6, kv_heads=2, value_channels=10, mask=2, state=True, is_causal=True, return_state=True, eps=1e-3),
    ),
    *(
        Sample(
            f"{name}{', causal' if causal else ''}{'' if normalize else ', not normalized'}",
            _call(2, 2, 9, 8, feature_map=name, is_causal=causal, normalize=normalize),
        )
        for name in ("elu1", "relu", "identity")
        for causal in (False, True)
        for normalize in (True, False)
    ),
    Sample("softmax", _call(2, 3, 6, 8, keys=9, feature_map="softmax")),
    Sample("softmax, mask, grouped", _call(2, 4, 6, 7, keys=11, kv_heads=2, mask=2, feature_map="softmax")),
    Sample("a map of the caller's own", _call(2, 2, 7, 5, feature_map=_doubled)),
    *(
        Sample(f"{channels} channels{', causal' if causal else ''}", _call(2, 2, 9, channels, is_causal=causal))
        for channels in (10, 17, 72)
        for causal in (False, True)
    ),
    Sample("one channel", _call(2, 2, 9, 1, eps=0.5)),
    Sample("one channel, causal", _call(2, 2, 9, 1, is_causal=True, eps=0.5)),
    Sample("more value channels", _call(2, 2, 5, 6, keys=7, value_channels=20)),
    Sample("one value channel, causal", _call(2, 2, 6, 12, value_channels=1, is_causal=True)),
    Sample("grouped queries", _call(2, 6, 5, 8, keys=7, kv_heads=2)),
    Sample("grouped queries, causal", _call(2, 6, 9, 8, kv_heads=2, is_causal=True)),
    Sample("one query", _call(3, 2, 1, 16, keys=37)),
    Sample("one key", _call(3, 2, 4, 8, keys=1, eps=0.5)),
    Sample("one token, causal", _call(3, 2, 1, 8, is_causal=True, state=True)),
    Sample("mask", _call(2, 3, 5, 8, keys=11, mask=2)),
    Sample("mask of all, causal", _call(2, 3, 11, 8, mask=1, is_causal=True)),
    Sample("mask, strided", with_named(_call(2, 3, 5, 8, keys=11, mask=2), "mask", lambda m: m.T.contiguous().T)),
    Sample("state", _call(2, 3, 5, 8, keys=7, state=True)),
    Sample("state, causal", _call(2, 4, 9, 8, kv_heads=2, state=True, is_causal=True)),
    Sample("returned state", _call(2, 3, 5, 8, keys=7, return_state=True)),
    Sample("returned state, causal", _call(2, 3, 9, 8, is_causal=True, return_state=True)),
    Sample("state in and out, not normalized", _call(2, 3, 5, 8, state=True, return_state=True, normalize=False)),
    Sample("packed", _varlen_call((5, 0, 3, 9), (5, 2, 3, 4), 2, 8)),
    Sample(
        "packed, cross, grouped, mask",
        _varlen_call((5, 2, 0, 3), (7, 4, 6, 3), 4, 6, kv_heads=2, value_channels=10, mask=True, index=torch.int64),
    ),
    Sample("packed, softmax, mask", _varlen_call((5, 2, 4), (7, 3, 6), 2, 8, mask=True, feature_map="softmax")),
    Sample("packed, causal", _varlen_call((3, 0, 1, 6), (3, 0, 1, 6), 2, 8, is_causal=True, max_seqlen_q=6)),
    Sample(
        "packed, causal, state in and out",
        _varlen_call((5, 0, 6), (5, 0, 6), 4, 6, kv_heads=2, is_causal=True, state=True, return_state=True, mask=True),
    ),
    Sample("views of a projection", projection_call(2, 3, 3, 9, 8)),
    Sample("views of a projection, grouped, causal", projection_call(2, 4, 2, 9, 8, is_causal=True)),
    *(Sample(name, strided(_call(2, 3, 7, 8), change)) for name, change in STRIDED_HEADS.items()),
    *(
        Sample(f"{name}, causal", strided(_call(2, 3, 7, 8, is_causal=True), change), full=name != "token slice")
        for name, change in STRIDED_HEADS.items()
    ),
    Sample("no batch", _call(0, 3, 5, 8, return_state=True), gradcheck=False),
    Sample("no queries", _call(2, 3, 0, 8, keys=7, return_state=True), gradcheck=False),
    Sample("no keys", _call(2, 3, 5, 8, keys=0, eps=0.1), gradcheck=False),
    Sample("no keys, state", _call(2, 3, 5, 8, keys=0, state=True, return_state=True), gradcheck=False),
    Sample("no keys, softmax", _call(2, 3, 5, 8, keys=0, feature_map="softmax"), gradcheck=False),
    Sample("no tokens, causal", _call(2, 3, 0, 8, is_causal=True, state=True, return_state=True), gradcheck=False),
    Sample("no value channels", _call(2, 3, 5, 8, value_channels=0), gradcheck=False),
    *(
        Sample(
            f"{length} tokens{', causal' if causal else ''}",
            _call(1, 2, length, 20, value_channels=12, is_causal=causal, return_state=True),
            gradcheck=False,
        )
        for length in (63, 64, 65, 129, 200)
        for causal in (False, True)
    ),
    Sample("ViT-B/16", _call(1, 2, 197, 64), gradcheck=False),
    Sample("ViT-B/16, causal, grouped", _call(1, 4, 197, 64, kv_heads=2, is_causal=True), gradcheck=False),
    Sample("long, as of ViT", _call(1, 2, 1500, 16, keys=1700, mask=1), gradcheck=False),
    Sample("long, as of ViT, softmax", _call(1, 2, 1500, 16, keys=1700, mask=1, feature_map="softmax"), gradcheck=False),
    Sample("long, as of ViT, causal", _call(1, 2, 1300, 16, is_causal=True, state=True, return_state=True), gradcheck=False),
    Sample("high resolution", _call(2, 8, 3136, 64), gradcheck=False, full=True),
    Sample("language model", _call(1, 8, 2048, 64, is_causal=True), gradcheck=False, full=True),
)


# --- bad input --------------------------------------------------------------------------------------------------------
_DENSE = _call(2, 4, 5, 8, keys=7, kv_heads=2)
_CAUSAL = _call(2, 4, 5, 8, kv_heads=2, is_causal=True)
_SOFTMAX = _call(2, 4, 5, 8, kv_heads=2, feature_map="softmax")
_STATEFUL = _call(2, 4, 5, 8, keys=7, kv_heads=2, state=True)
_PACKED = _varlen_call((5, 3), (7, 2), 4, 8, kv_heads=2)


_BAD = (
    *bad_operand(_DENSE, _PACKED, "q"),
    *bad_operand(_DENSE, _PACKED, "k"),
    *bad_operand(_DENSE, _PACKED, "v"),
    *bad_beside(_DENSE, "k"),
    *bad_beside(_DENSE, "v"),
    bad(with_named(_DENSE, "k", lambda x: x[..., :0]), "q", "and k without channels", lambda x: x[..., :0], ValueError),
    bad(_DENSE, "k", "of other channels", lambda x: x[..., :6], ValueError),
    bad(with_named(_DENSE, "v", lambda x: x[:, :0]), "k", "without heads", lambda x: x[:, :0], ValueError),
    bad(_DENSE, "q", "of heads that k's do not divide", lambda x: x[:, :3], ValueError, "k"),
    bad(_DENSE, "v", "of another length", lambda x: x[:, :, :6], ValueError),
    bad(_DENSE, "v", "of other heads", lambda x: x[:, :1], ValueError),
    bad(_DENSE, "feature_map", "unknown", "elu", ValueError),
    bad(_DENSE, "feature_map", "None", None, TypeError),
    bad(_DENSE, "feature_map", "a number", 1, TypeError),
    bad(_CAUSAL, "feature_map", "softmax, causal", "softmax", ValueError),
    bad(_STATEFUL, "feature_map", "softmax with a state", "softmax", ValueError),
    bad(_SOFTMAX, "return_state", "with softmax", True, ValueError, "feature_map"),
    bad(_DENSE, "is_causal", "of unequal lengths", True, ValueError),
    bad(_PACKED, "is_causal", "of unequal lengths, packed", True, ValueError),
    *(bad(_CAUSAL, name, "an int", 1, TypeError) for name in ("is_causal", "normalize", "return_state")),
    bad(_DENSE, "eps", "negative", -1e-6, ValueError),
    bad(_DENSE, "eps", "NaN", math.nan, ValueError),
    bad(_DENSE, "eps", "infinite", math.inf, ValueError),
    bad(_DENSE, "eps", "a string", "1e-6", TypeError),
    bad(_DENSE, "eps", "a huge int", 10**400, ValueError),
    bad(_DENSE, "mask", "of too few keys", torch.ones(2, 6, dtype=torch.bool), ValueError),
    bad(_DENSE, "mask", "of another batch", torch.ones(3, 7, dtype=torch.bool), ValueError),
    bad(_DENSE, "mask", "of one dimension", torch.ones(7, dtype=torch.bool), ValueError),
    bad(_DENSE, "mask", "of floats", torch.ones(2, 7), TypeError),
    bad(_DENSE, "mask", "a list", [True] * 7, TypeError),
    bad(_DENSE, "mask", "on another device", torch.ones(2, 7, dtype=torch.bool, device="meta"), ValueError),
    bad(_PACKED, "mask", "of two dimensions, packed", torch.ones(1, 9, dtype=torch.bool), ValueError),
    bad(_DENSE, "state", "a tensor", torch.zeros(2, 2, 8, 8), TypeError),
    bad(_DENSE, "state", "of three", (torch.zeros(2, 2, 8, 8),) * 3, TypeError),
    bad(_STATEFUL, "state", "without z", lambda state: (state[0], None), ValueError),
    bad(_STATEFUL, "state", "without S", lambda state: (None, state[1]), ValueError),
    bad(_STATEFUL, "state", "of other heads", lambda state: tuple(x[:, :1] for x in state), ValueError),
    bad(_STATEFUL, "state", "of another batch", lambda state: tuple(x[:1] for x in state), ValueError),
    bad(_STATEFUL, "state", "of other channels", lambda state: (state[0], state[1][..., :6]), ValueError),
    bad(_STATEFUL, "state", "in bfloat16", lambda state: tuple(x.bfloat16() for x in state), TypeError),
    bad(_STATEFUL, "state", "of lists", lambda state: tuple(x.tolist() for x in state), TypeError),
    bad(_STATEFUL, "state", "on another device", lambda state: tuple(x.to("meta") for x in state), ValueError),
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
)


# --- benchmark --------------------------------------------------------------------------------------------------------
_CHUNK = 128


def _eager_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What published models write; the denominator is a column of the product with the state."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2)[..., None] + 1e-6)


def _eager_chunked(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Causal attention in chunks: within a chunk by its scores, before it by the state, all chunks side by side."""
    q, k, v = (x.unflatten(2, (-1, _CHUNK)) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    state = (k.mT @ v).cumsum(2)
    sums = k.sum(-2).cumsum(2)
    state, sums = (torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, :-1]), 2) for x in (state, sums))
    scores = (q @ k.mT).tril()
    total = scores.sum(-1, keepdim=True) + q @ sums[..., None]
    return ((scores @ v + q @ state) / (total + 1e-6)).flatten(2, 3)


# Where the processor has no products of bfloat16, torch's are so slow that float32 in between is what a user would take.
def _in_float32(peer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        return peer(q.float(), k.float(), v.float(), **kwargs).to(q.dtype)

    return function


def _cost(call: Call, *, backward: bool) -> Cost:
    """Two products with the state forward and six with backward; causal attention in the chunks of the peer, half of whose
    scores are seen, has two more of a chunk's depth, and six. Every operand, the output and their gradients once a pass."""
    q, k, v = call.args
    depth = q.size(-1) + (_CHUNK / 2 if call.kwargs.get("is_causal") else 0)
    products = 4.0 * q.numel() * v.size(-1) / q.size(-1) * depth
    moved = float(sum(x.numel() * x.element_size() for x in (q, k, v, q)))
    return Cost(flops=products * (3 if backward else 1), bytes=moved * (3 if backward else 1))


def _bench(
    name: str, make: Make, peer: Callable[..., Tensor], ratios: tuple[float, float], backward: bool
) -> tuple[BenchCase, ...]:
    """One case for float32 and one for bfloat16, each with its own target."""
    cases = []
    for dtype, ratio in zip((torch.float32, torch.bfloat16), ratios, strict=True):
        peers = {"eager": peer, **({} if dtype == torch.float32 else {"in float32": _in_float32(peer)})}
        cases.append(
            BenchCase(
                f"linear_attention.{name}{'.backward' if backward else ''}",
                make,
                ops.linear_attention,
                peers,
                lambda call: _cost(call, backward=backward),
                dtypes=(dtype,),
                backward=backward,
                compiled_peers=tuple(peers),
                target=Target((*peers, "compile"), ratio),
            )
        )
    return tuple(cases)


_BENCH = (
    *_bench("8x8x3136x64", _call(8, 8, 3136, 64), _eager_plain, (2.0, 3.0), False),
    *_bench("8x8x3136x64", _call(8, 8, 3136, 64), _eager_plain, (2.0, 3.0), True),
    *_bench("causal_1x8x2048x64", _call(1, 8, 2048, 64, is_causal=True), _eager_chunked, (3.0, 3.0), False),
    *_bench("causal_1x8x2048x64", _call(1, 8, 2048, 64, is_causal=True), _eager_chunked, (3.0, 3.0), True),
)


def _tiny() -> Call:
    return Call(tuple(torch.randn(1, 1, 4, 8) for _ in range(3)))


CARDS = (
    Card(
        name="linear_attention",
        family="linear_attention",
        function=ops.linear_attention,
        reference=reference.linear_attention,
        ops=("mmkernels::linear_attention", "mmkernels::linear_attention_backward"),
        backends=ops.BACKENDS,
        samples=_SAMPLES,
        bad_inputs=_BAD,
        dtypes=DTYPES,
        systems=_SYSTEMS,
        summary="attention of features instead of scores, linear in the length; causal too, with a state for streaming",
        bench=_BENCH,
        overheads=(Overhead("linear_attention call, no gradient", _tiny, ops.linear_attention, grad=False, limit_us=20.0),),
    ),
)
