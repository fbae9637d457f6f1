"""The cards of tokens in the order of their experts and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.cards.card import (
    BadInput,
    BenchCase,
    Call,
    Card,
    Cost,
    Make,
    Sample,
    Target,
    bad_argument,
    bad_keyword,
    with_argument,
)
from mmkernels.cards.moe import draw_ids
from mmkernels.ops import permute as ops
from mmkernels.reference import permute as reference
from mmkernels.reference.moe import Dispatch, dispatch

_SYSTEMS = ("M3ViT", "Uni-MoE", "Mixtral")


def _places(tokens: int, slots: int, experts: int, spread: str, device: torch.device, g: torch.Generator) -> Dispatch:
    return Dispatch(*(value.to(device) for value in dispatch(draw_ids((tokens, slots), experts, spread, g), experts)))


def _permute_call(
    leading: tuple[int, ...], channels: int, experts: int, slots: int, *, spread: str = "even", most: int | None = None
) -> Make:
    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        x = torch.randn((*leading, channels), generator=g).to(device=device, dtype=dtype)
        places = _places(math.prod(leading), slots, experts, spread, device, g)
        return Call((x, places), {} if most is None else {"max_slots": most})

    return make


def _unpermute_call(
    leading: tuple[int, ...],
    channels: int,
    experts: int,
    slots: int,
    *,
    spread: str = "even",
    most: int | None = None,
    weights: str = "float32",
) -> Make:
    """`weights`: float32, own (the dtype of the rows), or none."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        tokens = math.prod(leading)
        places = _places(tokens, slots, experts, spread, device, g)
        count = tokens * slots if most is None else most
        rows = torch.randn((count, channels), generator=g).to(device=device, dtype=dtype)
        if weights == "none":
            return Call((rows, places))
        kept = dtype if weights == "own" or dtype == torch.float64 else torch.float32
        return Call((rows, places, torch.rand((tokens, slots), generator=g).to(device=device, dtype=kept)))

    return make


def _samples(call: Callable[..., Make]) -> tuple[Sample, ...]:
    small = call((2, 5), 7, 4, 2)
    return (
        Sample("small", small),
        Sample("odd sizes", call((3, 7), 19, 5, 3)),
        Sample("one token", call((1,), 9, 4, 2)),
        Sample("one slot", call((11,), 7, 4, 1)),
        Sample("no slots", call((5,), 7, 4, 0), gradcheck=False),
        Sample("unused slots", call((13,), 7, 4, 3, spread="unused")),
        Sample("empty experts", call((13,), 7, 8, 2, spread="few")),
        Sample("all to one expert", call((13,), 7, 5, 2, spread="one")),
        Sample("more slots than experts", call((6,), 7, 2, 4)),
        Sample("rows of all slots in use", call((9,), 7, 3, 2, most=18)),
        Sample("no channels", call((4,), 0, 3, 2), gradcheck=False),
        Sample("one channel", call((4,), 1, 3, 2)),
        Sample("no rows", call((0,), 7, 3, 2), gradcheck=False),
        Sample("whole vectors", call((9,), 64, 3, 2, spread="unused")),
        Sample("vectors and a tail", call((9,), 173, 3, 2, spread="unused")),
        Sample("strided", with_argument(small, 0, lambda x: torch.stack((x, x), -1)[..., 0])),
        Sample("of a slice", with_argument(small, 0, lambda x: torch.cat((x, x), -1)[..., 3 : 3 + x.size(-1)])),
        Sample(
            "odd offset",
            with_argument(small, 0, lambda x: torch.cat((x.flatten(), x.flatten()))[1 : 1 + x.numel()].view_as(x)),
        ),
        Sample("M3ViT, ViT-S", call((2, 197), 384, 16, 4), gradcheck=False),
    )


def _with_order(call: Make, change: Callable[[Tensor], Any]) -> Callable[[torch.device], Call]:
    return bad_argument(call, 1, lambda places: places._replace(order=change(places.order)))


_SMALL, _SMALL_BACK = _permute_call((2, 5), 7, 4, 2), _unpermute_call((2, 5), 7, 4, 2)


def _bad(call: Make, name: str) -> tuple[BadInput, ...]:
    return (
        BadInput(f"{name} is a list", bad_argument(call, 0, lambda x: x.tolist()), TypeError, name),
        BadInput(f"{name} of integers", bad_argument(call, 0, lambda x: x.int()), TypeError, name),
        BadInput("dispatch is a tensor", bad_argument(call, 1, lambda p: p.order), TypeError, "dispatch"),
        BadInput("order is a list", _with_order(call, lambda order: order.tolist()), TypeError, "dispatch"),
        BadInput("order of another dtype", _with_order(call, lambda order: order.int()), TypeError, "dispatch"),
        BadInput("order too short", _with_order(call, lambda order: order[1:]), ValueError, "dispatch"),
        BadInput("order on another device", _with_order(call, lambda order: order.to("meta")), ValueError, "dispatch"),
        BadInput(
            "positions a vector",
            bad_argument(call, 1, lambda p: p._replace(positions=p.positions.flatten())),
            ValueError,
            "dispatch",
        ),
    )


_PERMUTE_BAD = (
    *_bad(_SMALL, "x"),
    BadInput("x is a number", bad_argument(_SMALL, 0, lambda x: x.sum()), ValueError, "x"),
    BadInput("x of fewer tokens", bad_argument(_SMALL, 0, lambda x: x[:1]), ValueError, "x"),
    BadInput("max_slots is a float", bad_keyword(_SMALL, max_slots=2.0), TypeError, "max_slots"),
    BadInput("max_slots below 0", bad_keyword(_SMALL, max_slots=-1), ValueError, "max_slots"),
    BadInput("more rows than slots", bad_keyword(_SMALL, max_slots=21), ValueError, "max_slots"),
)
_UNPERMUTE_BAD = (
    *_bad(_SMALL_BACK, "rows"),
    BadInput("rows a vector", bad_argument(_SMALL_BACK, 0, lambda rows: rows[0]), ValueError, "rows"),
    BadInput("more rows than slots", bad_argument(_SMALL_BACK, 0, lambda rows: torch.cat((rows, rows))), ValueError, "rows"),
    BadInput("weights are a list", bad_argument(_SMALL_BACK, 2, lambda w: w.tolist()), TypeError, "weights"),
    BadInput("weights of integers", bad_argument(_SMALL_BACK, 2, lambda w: w.int()), TypeError, "weights"),
    BadInput("weights of fewer slots", bad_argument(_SMALL_BACK, 2, lambda w: w[:, 1:]), ValueError, "weights"),
    BadInput("weights on another device", bad_argument(_SMALL_BACK, 2, lambda w: w.to("meta")), ValueError, "weights"),
)


# --- benchmark ----------------------------------------------------------------------------------------------------------
def _index(x: Tensor, places: Dispatch) -> Tensor:
    """torch's gather, where all slots are in use."""
    return x.index_select(0, places.order // places.positions.size(1))


def _gathered_sum(rows: Tensor, places: Dispatch, weights: Tensor) -> Tensor:
    """The rows of each token gathered and multiplied, and their sum."""
    chosen = rows.index_select(0, places.positions.flatten()).view(*places.positions.shape, -1)
    return (chosen * weights[..., None].to(rows.dtype)).sum(1)


def _index_add(rows: Tensor, places: Dispatch, weights: Tensor) -> Tensor:
    """The rows multiplied in place and added to their tokens', as most models have it."""
    token = places.order // places.positions.size(1)
    rows = rows * weights.flatten()[places.order, None].to(rows.dtype)
    return rows.new_zeros((weights.size(0), rows.size(1))).index_add(0, token, rows)


def _cost(of_tokens: int, of_rows: int) -> Callable[[Call], Cost]:
    """How often all tokens cross the memory bus, and all rows."""

    def cost(call: Call) -> Cost:
        positions, channels = call.args[1].positions, call.args[0].size(-1)
        crossing = of_tokens * positions.size(0) + of_rows * positions.numel()
        return Cost(flops=0.0, bytes=float(crossing * channels * call.args[0].element_size()))

    return cost


_SIZES = ((4096, 768, 8, 2), (256, 4096, 8, 2))
_PERMUTE_BENCH = tuple(
    BenchCase(
        f"permute_tokens.T{tokens}_C{channels}_E{experts}_k{slots}",
        _permute_call((tokens,), channels, experts, slots),
        ops.permute_tokens,
        {"index_select": _index},
        _cost(1, 1),
        compiled_peers=("index_select",),
        target=Target(("index_select", "compile"), 1.15, at_most=True),
    )
    for tokens, channels, experts, slots in _SIZES
)
_UNPERMUTE_BENCH = tuple(
    BenchCase(
        f"unpermute_tokens.T{tokens}_C{channels}_E{experts}_k{slots}{'.backward' if backward else ''}",
        _unpermute_call((tokens,), channels, experts, slots),
        ops.unpermute_tokens,
        {"gathered sum": _gathered_sum, "index_add": _index_add},
        _cost(2, 3) if backward else _cost(1, 1),  # backward reads one gradient and the rows, and writes one
        backward=backward,
        compiled_peers=("gathered sum",),
        target=Target(("gathered sum", "index_add", "compile"), 1.1),
    )
    for tokens, channels, experts, slots in _SIZES
    for backward in (False, True)
)

CARDS = (
    Card(
        name="permute_tokens",
        family="permute",
        function=ops.permute_tokens,
        reference=reference.permute_tokens,
        ops=("mmkernels::permute_tokens", "mmkernels::unpermute_tokens"),
        backends=ops.PERMUTE_BACKENDS,
        samples=_samples(_permute_call),
        bad_inputs=_PERMUTE_BAD,
        dtypes=ops.DTYPES,
        systems=_SYSTEMS,
        summary="tokens in the order of their experts, without padding, for experts of one's own",
        twice_differentiable=True,
        bench=_PERMUTE_BENCH,
    ),
    Card(
        name="unpermute_tokens",
        family="permute",
        function=ops.unpermute_tokens,
        reference=reference.unpermute_tokens,
        ops=("mmkernels::unpermute_tokens", "mmkernels::unpermute_tokens_backward"),
        backends=ops.UNPERMUTE_BACKENDS,
        samples=(
            *_samples(_unpermute_call),
            Sample("no weights", _unpermute_call((13,), 7, 4, 3, spread="unused", weights="none")),
            Sample("weights in the dtype of the rows", _unpermute_call((13,), 7, 4, 3, weights="own")),
            Sample("weights strided", with_argument(_SMALL_BACK, 2, lambda w: w.T.contiguous().T)),
        ),
        bad_inputs=_UNPERMUTE_BAD,
        dtypes=ops.DTYPES,
        systems=_SYSTEMS,
        summary="what experts of one's own made, weighted and summed by token in a fixed order, without atomics",
        bench=_UNPERMUTE_BENCH,
    ),
)
