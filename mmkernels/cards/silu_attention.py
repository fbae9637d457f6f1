"""The card of parameter-free cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.cards.card import (
    STRIDED_TOKENS,
    BadInput,
    BenchCase,
    Call,
    Card,
    Cost,
    Make,
    Overhead,
    Sample,
    Target,
    bad_argument,
    bad_keyword,
    with_argument,
)
from mmkernels.ops import silu_attention as ops
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference import silu_attention as reference

_SYSTEMS = ("ADEM-VL",)


# --- calls ------------------------------------------------------------------------------------------------------------
def _clearest(candidates: Tensor, keys: Tensor, rank: int) -> Tensor:
    """Of the candidates [N, B, L, D] for each row of x the one whose threshold stands out most from the score below it: the
    choice of what is dropped must not hang on how a sum is rounded. (A tie may fall either way only from below: where the
    score above the threshold takes its place, both are kept as before.)"""
    scores = (F.silu(candidates.double()) @ keys.double().mT).sort(-1).values
    gap = (scores[..., rank] - scores[..., rank - 1]) / scores.abs().amax(-1)
    best = gap.argmax(0)[None, :, :, None].expand(1, *candidates.shape[1:])
    return candidates.gather(0, best)[0]


def _call(
    batch: int,
    rows: int,
    keys: int,
    channels: int,
    width: int,
    *,
    candidates: int = 12,
    **kwargs: Any,
) -> Make:
    """x [batch, rows, channels], keys [batch, keys, channels], values [batch, keys, width]."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        of_keys = torch.randn(batch, keys, channels, generator=g)
        of_values = torch.randn(batch, keys, width, generator=g)
        activated = F.silu(of_keys)
        if kwargs.get("key_is_activated", False):
            of_keys = activated
        rank = reference.rank_of(kwargs.get("drop_ratio", 0.0), keys)
        drawn = torch.randn(candidates if rank > 0 else 1, batch, rows, channels, generator=g).to(dtype)
        x = _clearest(drawn, activated, rank) if drawn.shape[0] > 1 and drawn.numel() > 0 else drawn[0]
        return Call((x.to(device), of_keys.to(device=device, dtype=dtype), of_values.to(device=device, dtype=dtype)), kwargs)

    return make


def _of_one_sample(make: Make) -> Make:
    """One sample expanded to all."""

    def expanded(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        call = make(device, dtype, g)
        return call.map_tensors(lambda t: t[:1].expand_as(t))

    return expanded


_SMALL = _call(2, 5, 7, 6, 4, drop_ratio=0.3)
_STRIDED = {
    **{name: change for name, change in STRIDED_TOKENS.items() if name != "one row expanded"},
    "channels strided": lambda t: torch.stack((t, t), -1)[..., 0],
}

# "small" and "ViT" are names that the generic suite looks for.
_SAMPLES = (
    Sample("small", _SMALL),
    Sample("odd sizes", _call(3, 7, 19, 11, 13, drop_ratio=0.4)),
    Sample("nothing dropped", _call(2, 5, 7, 6, 4)),
    Sample("rank 0", _call(2, 5, 7, 6, 4, drop_ratio=0.1)),
    Sample("all but one dropped", _call(2, 5, 7, 6, 4, drop_ratio=0.99)),
    Sample("keys activated before", _call(2, 5, 7, 6, 4, drop_ratio=0.3, key_is_activated=True)),
    Sample("scale", _call(2, 5, 7, 6, 4, drop_ratio=0.3, scale=0.37)),
    Sample("one row", _call(1, 1, 9, 5, 3, drop_ratio=0.8)),
    Sample("one key", _call(2, 3, 1, 5, 3, drop_ratio=0.5)),
    Sample("one channel", _call(2, 3, 5, 1, 1, drop_ratio=0.3)),
    Sample("many rows and keys", _call(2, 37, 150, 24, 18, drop_ratio=0.1), gradcheck=False),
    Sample("many keys", _call(1, 3, 400, 5, 3, drop_ratio=0.1), gradcheck=False),
    Sample("no samples", _call(0, 5, 7, 6, 4, drop_ratio=0.3), gradcheck=False),
    Sample("no rows", _call(2, 0, 7, 6, 4, drop_ratio=0.3), gradcheck=False),
    Sample("no keys", _call(2, 5, 0, 6, 4, drop_ratio=0.3), gradcheck=False),
    Sample("no channels", _call(2, 5, 7, 0, 4), gradcheck=False),
    Sample("no channels of values", _call(2, 5, 7, 6, 0, drop_ratio=0.3), gradcheck=False),
    *(Sample(f"x, {name}", with_argument(_SMALL, 0, change)) for name, change in _STRIDED.items()),
    *(Sample(f"keys, {name}", with_argument(_SMALL, 1, change)) for name, change in _STRIDED.items()),
    *(Sample(f"values, {name}", with_argument(_SMALL, 2, change)) for name, change in _STRIDED.items()),
    Sample("one sample expanded", _of_one_sample(_SMALL)),
    Sample("ViT-L/14 features", _call(2, 20, 320, 128, 96, drop_ratio=0.1), gradcheck=False),
    Sample("ViT-L/14 features, wide, in blocks of rows", _call(1, 120, 9, 20, 15000, drop_ratio=0.3), gradcheck=False),
    Sample("ADEM-VL, 7B", _call(2, 512, 320, 4096, 4096, drop_ratio=0.1), gradcheck=False, full=True),
)


# --- bad input --------------------------------------------------------------------------------------------------------
_BAD = (
    BadInput("x of another length", bad_argument(_SMALL, 0, lambda t: t[..., 1:]), ValueError, "keys"),
    *(
        bad
        for position, name in enumerate(("x", "keys", "values"))
        for bad in (
            BadInput(f"{name} is a matrix", bad_argument(_SMALL, position, lambda t: t[0]), ValueError, name),
            BadInput(f"{name} has four dimensions", bad_argument(_SMALL, position, lambda t: t[None]), ValueError, name),
            BadInput(f"{name} of integers", bad_argument(_SMALL, position, lambda t: t.int()), TypeError, name),
            BadInput(f"{name} is a list", bad_argument(_SMALL, position, lambda t: t.tolist()), TypeError, name),
            BadInput(f"{name} is None", bad_argument(_SMALL, position, lambda t: None), TypeError, name),
            BadInput(f"{name} is sparse", bad_argument(_SMALL, position, lambda t: t.to_sparse()), TypeError, name),
        )
    ),
    *(
        bad
        for position, name in enumerate(("keys", "values"), 1)
        for bad in (
            BadInput(f"{name} of another batch", bad_argument(_SMALL, position, lambda t: t[:1]), ValueError, name),
            BadInput(f"{name} of another dtype", bad_argument(_SMALL, position, lambda t: t.double()), TypeError, name),
            BadInput(f"{name} on another device", bad_argument(_SMALL, position, lambda t: t.to("meta")), ValueError, name),
        )
    ),
    BadInput("keys too narrow", bad_argument(_SMALL, 1, lambda t: t[..., :3]), ValueError, "keys"),
    BadInput("values of fewer keys", bad_argument(_SMALL, 2, lambda t: t[:, 1:]), ValueError, "values"),
    BadInput("drop_ratio of 1", bad_keyword(_SMALL, drop_ratio=1.0), ValueError, "drop_ratio"),
    BadInput("drop_ratio below 0", bad_keyword(_SMALL, drop_ratio=-0.1), ValueError, "drop_ratio"),
    BadInput("drop_ratio is NaN", bad_keyword(_SMALL, drop_ratio=float("nan")), ValueError, "drop_ratio"),
    BadInput("drop_ratio is a string", bad_keyword(_SMALL, drop_ratio="0.1"), TypeError, "drop_ratio"),
    BadInput("key_is_activated is an int", bad_keyword(_SMALL, key_is_activated=1), TypeError, "key_is_activated"),
    BadInput("scale is None", bad_keyword(_SMALL, scale=None), TypeError, "scale"),
    BadInput("scale is a huge int", bad_keyword(_SMALL, scale=10**400), ValueError, "scale"),
)


# --- benchmark --------------------------------------------------------------------------------------------------------
# The published form: keys activated once for all layers, a sort of every row, and a mask as large as the scores. Where the
# processor has no products of bfloat16, torch's are so slow that float32 in between is what a user would take.
def _in_float32(x: Tensor, keys: Tensor, values: Tensor, **kwargs: Any) -> Tensor:
    return reference.silu_attention(x.float(), keys.float(), values.float(), **kwargs).to(x.dtype)


def _cost(products: int) -> Callable[[Call], Cost]:
    """`products` of the size of the scores' own, and every tensor once."""

    def cost(call: Call) -> Cost:
        x, keys, values = call.tensors()
        moved = sum(t.numel() * t.element_size() for t in call.tensors()) + x.numel() // x.shape[2] * values.shape[2] * 4
        return Cost(flops=2.0 * products * x.numel() * keys.shape[1], bytes=float(moved))

    return cost


def _bench(rows: int, dtype: torch.dtype, *, backward: bool, ratio: float) -> BenchCase:
    peers = {"eager": reference.silu_attention, **({} if dtype == torch.float32 else {"in float32": _in_float32})}
    return BenchCase(
        f"silu_attention.2x{rows}x320x4096{'.backward' if backward else ''}",
        _call(2, rows, 320, 4096, 4096, candidates=1, drop_ratio=0.1, key_is_activated=True),
        ops.silu_attention,
        peers,
        _cost(6 if backward else 2),
        dtypes=(dtype,),
        backward=backward,
        compiled_peers=tuple(peers),
        target=Target((*peers, "compile"), ratio),
    )


def _tiny() -> Call:
    return Call((torch.randn(1, 2, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)), {"drop_ratio": 0.3})


CARDS = (
    Card(
        name="silu_attention",
        family="silu_attention",
        function=ops.silu_attention,
        reference=reference.silu_attention,
        ops=("mmkernels::silu_attention", "mmkernels::silu_attention_backward"),
        backends=ops.BACKENDS,
        samples=_SAMPLES,
        bad_inputs=_BAD,
        dtypes=DTYPES,
        systems=_SYSTEMS,
        summary="cross-attention without parameters or softmax, each row dropping its lowest scores",
        bench=tuple(
            _bench(rows, dtype, backward=backward, ratio=ratio)
            for rows, backward, ratios in (
                (128, False, (1.1, 1.1)),
                (512, False, (1.1, 1.1)),
                # Seven products to the peers' six: backward makes the scores again instead of keeping them.
                (128, True, (0.85, 0.9)),
                (512, True, (0.8, 0.85)),
            )
            for dtype, ratio in zip((torch.float32, torch.bfloat16), ratios, strict=True)
        ),
        overheads=(Overhead("silu_attention call, no gradient", _tiny, ops.silu_attention, grad=False, limit_us=20.0),),
    ),
)
