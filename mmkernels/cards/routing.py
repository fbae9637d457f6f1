"""The card of routing tokens to experts."""

from __future__ import annotations

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
    Overhead,
    Sample,
    Target,
    bad_argument,
    bad_keyword,
    with_argument,
)
from mmkernels.ops import routing as ops
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference import routing as reference

_SYSTEMS = ("M3ViT", "Uni-MoE", "IMP", "Mixtral", "DeepSeek-V3", "GShard")


def _call(tokens: int, experts: int, top_k: int | None, *, selection: str = "none", **kwargs: Any) -> Make:
    """logits [tokens, experts]; `selection`: none, shared ([E]) or own ([T, E])."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        logits = torch.randn(tokens, experts, generator=g).to(device=device, dtype=dtype)
        given = dict(kwargs)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if selection != "none":
            shape = (experts,) if selection == "shared" else (tokens, experts)
            given["selection"] = torch.randn(shape, generator=g).to(device=device, dtype=wide)
        return Call((logits, top_k), given)

    return make


def _with_ties(make: Make) -> Make:
    """Whole rows, and halves of rows, of one value."""

    def tie(logits: Tensor) -> Tensor:
        tied = logits.clone()
        tied[0] = 1
        tied[1::2, : logits.size(1) // 2] = 0.5
        return tied

    return with_argument(make, 0, tie)


def _away(make: Make) -> Make:
    """Experts that are away: a logit of minus infinity."""
    return with_argument(make, 0, lambda logits: logits.clone().index_fill_(1, torch.tensor([1]), -torch.inf))


_SMALL = _call(7, 5, 2)
_STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "rows strided": lambda x: torch.cat((x, x), 1)[:, : x.size(1)],
    "experts strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "one row expanded": lambda x: x[:1].expand_as(x),
}
_SAMPLES = (
    Sample("small", _SMALL),
    Sample("odd sizes", _call(37, 13, 3)),
    Sample("one token", _call(1, 6, 2)),
    Sample("one expert", _call(5, 1, 1), gradcheck=False),  # no gradient but of constants
    Sample("one slot", _call(9, 4, 1, kind="softmax_topk")),
    Sample("all experts", _call(6, 5, None, kind="softmax_topk")),
    Sample("no rows", _call(0, 5, 2), gradcheck=False),
    Sample("softmax over all", _call(7, 5, 2, kind="softmax_topk")),
    Sample("softmax over all, normalised", _call(7, 5, 2, kind="softmax_topk", normalize=True)),
    Sample("sigmoids", _call(7, 5, 2, kind="sigmoid_topk")),
    Sample("sigmoids, normalised", _call(7, 5, 2, kind="sigmoid_topk", normalize=True)),
    Sample("ties", _with_ties(_call(6, 8, 3)), gradcheck=False),  # a tie is no place to differentiate at
    Sample("ties of sigmoids", _with_ties(_call(6, 8, 3, kind="sigmoid_topk")), gradcheck=False),
    Sample("experts away", _away(_call(6, 5, 2)), gradcheck=False),
    Sample("many slots", _call(9, 24, 12)),
    Sample("many experts", _call(21, 300, 4)),
    Sample("capacity", _call(11, 4, 2, capacity=3)),
    Sample("capacity, softmax over all", _call(11, 4, 2, capacity=3, kind="softmax_topk")),
    Sample("capacity of nothing", _call(5, 4, 2, capacity=0), gradcheck=False),
    Sample("capacity factor", _call(24, 4, 2, capacity_factor=1.0)),
    Sample("top p", _call(11, 6, 3, top_p=0.6, kind="softmax_topk")),
    Sample("top p, normalised", _call(11, 6, None, top_p=0.6)),
    Sample("groups", _call(9, 12, 3, num_groups=4, top_groups=2)),
    Sample("groups by two", _call(9, 12, 3, num_groups=4, top_groups=2, group_score="top2", kind="sigmoid_topk")),
    Sample("ties of groups", _with_ties(_call(6, 12, 3, num_groups=4, top_groups=2)), gradcheck=False),
    Sample("fewer slots than groups", _call(9, 12, 1, num_groups=6, top_groups=5)),
    Sample("selection", _call(9, 6, 2, selection="shared", kind="sigmoid_topk", normalize=True)),
    Sample("selection of each token", _call(9, 6, 2, selection="own")),
    Sample("expert choice", _call(12, 4, None, kind="expert_choice")),
    Sample("expert choice, few slots", _call(12, 6, 2, kind="expert_choice", capacity=5)),
    Sample("expert choice in groups", _call(12, 4, None, kind="expert_choice", capacity=3, group_size=6)),
    Sample("expert choice of ties", _with_ties(_call(8, 4, None, kind="expert_choice")), gradcheck=False),
    *(Sample(name, with_argument(_SMALL, 0, change)) for name, change in _STRIDED.items()),
    Sample("M3ViT, ViT-S", _call(1025, 16, 4, kind="softmax_topk"), gradcheck=False),
)


# --- bad input ----------------------------------------------------------------------------------------------------------
_BAD = (
    BadInput("logits is a list", bad_argument(_SMALL, 0, lambda x: x.tolist()), TypeError, "logits"),
    BadInput("logits of integers", bad_argument(_SMALL, 0, lambda x: x.int()), TypeError, "logits"),
    BadInput("logits of one dimension", bad_argument(_SMALL, 0, lambda x: x[0]), ValueError, "logits"),
    BadInput("no experts", bad_argument(_SMALL, 0, lambda x: x[:, :0]), ValueError, "logits"),
    BadInput("top_k of zero", bad_argument(_SMALL, 1, lambda _: 0), ValueError, "top_k"),
    BadInput("top_k beyond the experts", bad_argument(_SMALL, 1, lambda _: 6), ValueError, "top_k"),
    BadInput("top_k is a float", bad_argument(_SMALL, 1, lambda _: 2.0), TypeError, "top_k"),
    BadInput("an unknown kind", bad_keyword(_SMALL, kind="topk"), ValueError, "kind"),
    BadInput("kind is a number", bad_keyword(_SMALL, kind=1), TypeError, "kind"),
    BadInput("negative capacity", bad_keyword(_SMALL, capacity=-1), ValueError, "capacity"),
    BadInput("capacity is a float", bad_keyword(_SMALL, capacity=1.5), TypeError, "capacity"),
    BadInput("capacity twice", bad_keyword(_SMALL, capacity=2, capacity_factor=1.0), ValueError, "capacity_factor"),
    BadInput("negative capacity factor", bad_keyword(_SMALL, capacity_factor=-0.5), ValueError, "capacity_factor"),
    BadInput("top_p above 1", bad_keyword(_SMALL, top_p=1.5), ValueError, "top_p"),
    BadInput("top_p is a name", bad_keyword(_SMALL, top_p="half"), TypeError, "top_p"),
    BadInput("groups that do not divide", bad_keyword(_SMALL, num_groups=2), ValueError, "num_groups"),
    BadInput("more groups than there are", bad_keyword(_SMALL, num_groups=5, top_groups=6), ValueError, "top_groups"),
    BadInput("an unknown group score", bad_keyword(_SMALL, group_score="mean"), ValueError, "group_score"),
    BadInput("selection of another length", bad_keyword(_SMALL, selection=torch.zeros(4)), ValueError, "selection"),
    BadInput("selection of another dtype", bad_keyword(_SMALL, selection=torch.zeros(5).double()), TypeError, "selection"),
    BadInput("selection is a list", bad_keyword(_SMALL, selection=[0.0] * 5), TypeError, "selection"),
    BadInput("group_size for tokens", bad_keyword(_SMALL, group_size=7), ValueError, "group_size"),
    BadInput(
        "group_size that does not divide", bad_keyword(_SMALL, kind="expert_choice", group_size=3), ValueError, "group_size"
    ),
    BadInput("top_p for experts", bad_keyword(_SMALL, kind="expert_choice", top_p=0.5), ValueError, "top_p"),
    BadInput("noise without a deviation", bad_keyword(_SMALL, kind="noisy_topk"), ValueError, "noise_std"),
    BadInput("deviation of another shape", bad_keyword(_SMALL, noise_std=torch.ones(5)), ValueError, "noise_std"),
    BadInput("noise of another shape", bad_keyword(_SMALL, noise_std=1.0, noise=torch.ones(5)), ValueError, "noise"),
    BadInput("noise is a number", bad_keyword(_SMALL, noise_std=1.0, noise=1.0), TypeError, "noise"),
)


# --- benchmark ----------------------------------------------------------------------------------------------------------
def _eager(logits: Tensor, top_k: int, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, top-k and renormalisation as transformers' Mixtral has them, and the loads."""
    probabilities = logits.float().softmax(-1)
    weights, ids = probabilities.topk(top_k, -1)
    return ids, weights / weights.sum(-1, keepdim=True), probabilities.sum(0)


def _sorted(route: Callable[..., Any]) -> Callable[..., Any]:
    """With the sort by experts that follows."""

    def run(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        ids = route(logits, *args, **kwargs)[0]
        return torch.argsort(ids.flatten(), stable=True), torch.bincount(ids.flatten(), minlength=logits.size(1))

    return run


def _run_sorted(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
    from mmkernels.ops.moe import dispatch

    return dispatch(ops.route(logits, *args, **kwargs).expert_ids, logits.size(1))


def _cost(call: Call) -> Cost:
    logits = call.args[0]
    return Cost(flops=4.0 * logits.numel(), bytes=float(logits.numel() * logits.element_size() + 12 * logits.size(0) * 2))


_BENCH = (
    BenchCase(
        "route.4096_E16_k2.sorted",
        _call(4096, 16, 2),
        _run_sorted,
        {"eager": _sorted(_eager)},
        _cost,
        compiled_peers=("eager",),
        target=Target(("eager", "compile"), 1.0),
    ),
    BenchCase(
        "route.4096_E16_k2.backward",
        _call(4096, 16, 2),
        lambda logits, top_k: ops.route(logits, top_k).weights,
        {"eager": lambda logits, top_k: _eager(logits, top_k)[1]},
        _cost,
        backward=True,
        compiled_peers=("eager",),
        target=Target(("eager", "compile"), 1.0),
    ),
)


CARDS = (
    Card(
        name="route",
        family="routing",
        function=ops.route,
        reference=reference.route,
        ops=("mmkernels::route", "mmkernels::expert_choice", "mmkernels::route_backward"),
        backends=ops.BACKENDS,
        samples=_SAMPLES,
        bad_inputs=_BAD,
        dtypes=DTYPES,
        systems=_SYSTEMS,
        summary="routers of sparse experts and their losses: top-k of softmax or sigmoids, noisy, groups, capacity, top-p, "
        "expert choice",
        bench=_BENCH,
        overheads=(
            Overhead("route call, no gradient", lambda: Call((torch.randn(2, 4), 2)), ops.route, grad=False, limit_us=25.0),
        ),
    ),
)
