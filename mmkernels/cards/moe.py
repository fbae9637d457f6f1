"""The cards of experts: sparse feed-forward layers, and linear layers chosen token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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
    bias_dtype,
    drawer,
    with_argument,
)
from mmkernels.ops import moe as ops
from mmkernels.ops.packed_linear import DTYPES, pack_linear
from mmkernels.reference import moe as reference
from mmkernels.reference.linear import activate
from mmkernels.reference.routing import Routing

_MOE_SYSTEMS = ("M3ViT", "Uni-MoE", "IMP", "Mixtral", "PILL")
_GROUPED_SYSTEMS = ("MoT", "Mixture-of-Mamba", "ONE-PEACE")


def _normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Of the scale of a layer with as many inputs as the last dimension has."""
    scale = max(1, shape[-1]) ** -0.5 if len(shape) == 3 else 1.0
    return (scale * torch.randn(shape, generator=g)).to(device=device, dtype=dtype)


def draw_ids(shape: tuple[int, ...], experts: int, spread: str, g: torch.Generator) -> Tensor:
    """`spread`: even, one (all slots to one expert), few (half of the experts empty), or unused (slots, too)."""
    if spread == "one":
        return torch.full(shape, experts - 1)
    low = -1 if spread == "unused" else 0
    return torch.randint(low, max(1, experts // 2) if spread == "few" else experts, shape, generator=g)


def _moe_call(
    leading: tuple[int, ...],
    channels: int,
    hidden: int,
    outputs: int,
    experts: int,
    slots: int,
    *,
    spread: str = "even",
    gated: bool = False,
    bias: str = "own",
    residual: bool = False,
    activation: str | None = "gelu",
) -> Make:
    """x [*leading, channels] and a routing of its tokens; weights of `experts` experts. `bias`: own, none, or float32."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        x = torch.randn((*leading, channels), generator=g).to(device=device, dtype=dtype)
        tokens = math.prod(leading)
        ids = draw_ids((tokens, slots), experts, spread, g).to(device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = torch.rand((tokens, slots), generator=g).to(device=device, dtype=wide)
        w_in = _normal((experts, hidden, channels), device, dtype, g)
        w_out = _normal((experts, outputs, hidden), device, dtype, g)
        kept = bias_dtype(bias, dtype)
        biases = [_normal((experts, size), device, kept, g) for size in (hidden, outputs, hidden)]
        kwargs: dict[str, Any] = {"activation": activation}
        if gated:
            kwargs["w_gate"] = _normal((experts, hidden, channels), device, dtype, g)
            if bias != "none":
                kwargs["b_gate"] = biases[2]
        if residual:
            kwargs["residual"] = torch.randn((*leading, outputs), generator=g).to(device=device, dtype=dtype)
        routing = Routing(ids, weights, experts, ids.numel())
        return Call((x, routing, w_in, w_out, *((None, None) if bias == "none" else biases[:2])), kwargs)

    return make


def _grouped_call(
    leading: tuple[int, ...], channels: int, outputs: int, groups: int, *, spread: str = "even", bias: str = "own"
) -> Make:
    """x [*leading, channels], a group for each token."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        x = torch.randn((*leading, channels), generator=g).to(device=device, dtype=dtype)
        ids = draw_ids(leading, groups, spread, g).to(device)
        weight = _normal((groups, outputs, channels), device, dtype, g)
        kept = None if bias == "none" else _normal((groups, outputs), device, bias_dtype(bias, dtype), g)
        return Call((x, ids, weight, kept))

    return make


# Weights of experts that lie in memory as no new tensor does.
_STRIDED_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "of a slice of rows": lambda w: torch.cat((w, w), 1)[:, w.size(1) :],
    "of a slice of columns": lambda w: torch.cat((w, w), 2)[..., : w.size(2)],
    "of every other expert": lambda w: torch.stack((w, w), 1)[:, 1],
    "last": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}
_SMALL = _moe_call((2, 5), 7, 11, 6, 4, 2)
_GATED = _moe_call((2, 5), 7, 11, 6, 4, 2, gated=True, activation="silu")
_MOE_SAMPLES = (
    Sample("small", _SMALL),
    Sample("odd sizes", _moe_call((3, 7), 19, 37, 17, 5, 3)),
    Sample("gated", _GATED),
    Sample("gated, odd sizes", _moe_call((23,), 19, 37, 17, 5, 3, gated=True, activation="silu")),
    Sample("gated, no bias", _moe_call((9,), 7, 11, 6, 4, 2, gated=True, bias="none", activation="gelu")),
    Sample("one token", _moe_call((1,), 9, 8, 9, 4, 2)),
    Sample("no leading dimension", _moe_call((), 9, 64, 33, 8, 6)),
    Sample("four dimensions", _moe_call((2, 1, 3), 8, 5, 8, 3, 2)),
    Sample("one slot", _moe_call((11,), 7, 9, 6, 4, 1)),
    Sample("one slot, unused ones", _moe_call((11,), 7, 9, 6, 4, 1, spread="unused", residual=True)),
    Sample("one slot, residual", _moe_call((11,), 7, 9, 6, 4, 1, residual=True)),
    Sample("no slots", _moe_call((5,), 7, 9, 6, 4, 0), gradcheck=False),
    Sample("unused slots", _moe_call((13,), 7, 9, 6, 4, 3, spread="unused", residual=True)),
    Sample("empty experts", _moe_call((13,), 7, 9, 6, 8, 2, spread="few", gated=True)),
    Sample("all to one expert", _moe_call((13,), 7, 9, 6, 5, 2, spread="one")),
    Sample("one expert", _moe_call((6,), 7, 9, 6, 1, 1)),
    Sample("more slots than experts", _moe_call((6,), 7, 9, 6, 2, 4)),
    Sample("depth 1", _moe_call((4,), 1, 3, 2, 3, 2)),
    Sample("no hidden units", _moe_call((4,), 5, 0, 2, 3, 2), gradcheck=False),
    Sample("no channels", _moe_call((4,), 0, 3, 2, 3, 2), gradcheck=False),
    Sample("no outputs", _moe_call((4,), 5, 3, 0, 3, 2), gradcheck=False),
    Sample("no rows", _moe_call((2, 0), 7, 11, 6, 4, 2), gradcheck=False),
    Sample("no bias", _moe_call((2, 5), 7, 11, 6, 4, 2, bias="none")),
    Sample("float32 parameters", _moe_call((2, 5), 7, 11, 6, 4, 2, bias="float32", gated=True)),
    Sample("relu", _moe_call((2, 5), 7, 11, 6, 4, 2, activation="relu"), gradcheck=False),  # not smooth
    Sample("gelu_tanh", _moe_call((2, 5), 7, 11, 6, 4, 2, activation="gelu_tanh")),
    Sample("quick_gelu", _moe_call((2, 5), 7, 11, 6, 4, 2, activation="quick_gelu")),
    Sample("no activation", _moe_call((2, 5), 7, 11, 6, 4, 2, activation=None)),
    Sample("x strided", with_argument(_SMALL, 0, lambda x: torch.stack((x, x), -1)[..., 0])),
    Sample("x of a slice", with_argument(_SMALL, 0, lambda x: torch.cat((x, x), 2)[..., 3 : 3 + x.size(2)])),
    *(Sample(f"w_in {name}", with_argument(_SMALL, 2, change)) for name, change in _STRIDED_WEIGHTS.items()),
    *(Sample(f"w_out {name}", with_argument(_GATED, 3, change)) for name, change in _STRIDED_WEIGHTS.items()),
    Sample("deeper than a block", _moe_call((40,), 1100, 7, 6, 2, 2), gradcheck=False),
    Sample("many experts", _moe_call((40,), 33, 20, 33, 64, 2), gradcheck=False),
    Sample("M3ViT, ViT-S", _moe_call((197,), 384, 384, 384, 16, 4), gradcheck=False),
    Sample("groups of rows", _moe_call((105,), 8, 8000, 6, 1, 2), gradcheck=False),
    Sample("groups of rows, one slot", _moe_call((210,), 8, 8000, 6, 1, 1), gradcheck=False),
    Sample(
        "Mixtral's experts", _moe_call((512,), 768, 2048, 768, 8, 2, gated=True, bias="none"), gradcheck=False, full=True
    ),
)
_GROUPED_SMALL = _grouped_call((2, 5), 7, 6, 3)
_GROUPED_SAMPLES = (
    Sample("small", _GROUPED_SMALL),
    Sample("odd sizes", _grouped_call((3, 7), 19, 17, 4)),
    Sample("one token", _grouped_call((1,), 9, 8, 3)),
    Sample("unused tokens", _grouped_call((17,), 9, 8, 3, spread="unused")),
    Sample("empty groups", _grouped_call((9,), 9, 8, 6, spread="few")),
    Sample("all to one group", _grouped_call((9,), 9, 8, 3, spread="one")),
    Sample("no bias", _grouped_call((2, 5), 7, 6, 3, bias="none")),
    Sample("float32 parameters", _grouped_call((2, 5), 7, 6, 3, bias="float32")),
    Sample("no rows", _grouped_call((2, 0), 7, 6, 3), gradcheck=False),
    Sample("no channels", _grouped_call((4,), 0, 6, 3), gradcheck=False),
    Sample("x strided", with_argument(_GROUPED_SMALL, 0, lambda x: torch.stack((x, x), -1)[..., 0])),
    *(Sample(f"weight {name}", with_argument(_GROUPED_SMALL, 2, change)) for name, change in _STRIDED_WEIGHTS.items()),
    Sample("deeper than a block", _grouped_call((5,), 1100, 6, 2), gradcheck=False),
    Sample("MoT, ViT-S", _grouped_call((2, 197), 384, 384, 3), gradcheck=False),
)


# --- bad input ----------------------------------------------------------------------------------------------------------
def _routing(**changed: Any) -> Callable[[Routing], Routing]:
    def change(routing: Routing) -> Routing:
        return Routing(**{**{name: getattr(routing, name) for name in routing.__dataclass_fields__}, **changed})

    return change


def _bad_weight(call: Make, position: int, name: str) -> tuple[BadInput, ...]:
    return (
        BadInput(f"{name} is a list", bad_argument(call, position, lambda w: w.tolist()), TypeError, name),
        BadInput(f"{name} is a matrix", bad_argument(call, position, lambda w: w[0]), ValueError, name),
        BadInput(f"{name} of another dtype", bad_argument(call, position, lambda w: w.double()), TypeError, name),
        BadInput(f"{name} on another device", bad_argument(call, position, lambda w: w.to("meta")), ValueError, name),
    )


_MOE_BAD = (
    BadInput("x is a list", bad_argument(_SMALL, 0, lambda x: x.tolist()), TypeError, "x"),
    BadInput("x of integers", bad_argument(_SMALL, 0, lambda x: x.int()), TypeError, "x"),
    BadInput("x is a number", bad_argument(_SMALL, 0, lambda x: x.sum()), ValueError, "x"),
    BadInput("x too narrow", bad_argument(_SMALL, 0, lambda x: x[..., 1:]), ValueError, "w_in"),
    BadInput("routing is a tensor", bad_argument(_SMALL, 1, lambda routing: routing.expert_ids), TypeError, "routing"),
    BadInput(
        "routing of fewer tokens",
        bad_argument(_SMALL, 1, _routing(expert_ids=torch.zeros(3, 2, dtype=torch.int64))),
        ValueError,
        "routing",
    ),
    BadInput(
        "weights of another shape", bad_argument(_SMALL, 1, _routing(weights=torch.zeros(10, 3))), ValueError, "routing"
    ),
    *_bad_weight(_SMALL, 2, "w_in"),
    *_bad_weight(_SMALL, 3, "w_out"),
    BadInput("w_out of fewer experts", bad_argument(_SMALL, 3, lambda w: w[:3]), ValueError, "w_out"),
    BadInput("w_gate of another shape", bad_keyword(_GATED, w_gate=torch.zeros(4, 12, 7)), ValueError, "w_gate"),
    BadInput("b_in too short", bad_argument(_SMALL, 4, lambda b: b[:, 1:]), ValueError, "b_in"),
    BadInput("b_in a vector", bad_argument(_SMALL, 4, lambda b: b[0]), ValueError, "b_in"),
    BadInput("b_out is a list", bad_argument(_SMALL, 5, lambda b: b.tolist()), TypeError, "b_out"),
    BadInput("b_out of another dtype", bad_argument(_SMALL, 5, lambda b: b.double()), TypeError, "b_out"),
    BadInput("b_gate without w_gate", bad_keyword(_SMALL, b_gate=torch.zeros(4, 11)), ValueError, "b_gate"),
    BadInput("an unknown activation", bad_keyword(_SMALL, activation="swish"), ValueError, "activation"),
    BadInput("residual of another shape", bad_keyword(_SMALL, residual=torch.zeros(2, 5, 7)), ValueError, "residual"),
    BadInput(
        "residual of another dtype", bad_keyword(_SMALL, residual=torch.zeros(2, 5, 6).double()), TypeError, "residual"
    ),
    BadInput(
        "half of a lora", bad_keyword(_SMALL, lora=ops.ExpertLora(1.0, down_in=torch.zeros(4, 2, 7))), ValueError, "lora"
    ),
)
_GROUPED_BAD = (
    BadInput("x is a list", bad_argument(_GROUPED_SMALL, 0, lambda x: x.tolist()), TypeError, "x"),
    BadInput("x too narrow", bad_argument(_GROUPED_SMALL, 0, lambda x: x[..., 1:]), ValueError, "weight"),
    BadInput("group_ids of floats", bad_argument(_GROUPED_SMALL, 1, lambda ids: ids.float()), TypeError, "group_ids"),
    BadInput("group_ids of fewer tokens", bad_argument(_GROUPED_SMALL, 1, lambda ids: ids[:1]), ValueError, "group_ids"),
    BadInput(
        "group_ids on another device", bad_argument(_GROUPED_SMALL, 1, lambda ids: ids.to("meta")), ValueError, "group_ids"
    ),
    *_bad_weight(_GROUPED_SMALL, 2, "weight"),
    BadInput("bias too short", bad_argument(_GROUPED_SMALL, 3, lambda b: b[:, 1:]), ValueError, "bias"),
    BadInput("bias is a list", bad_argument(_GROUPED_SMALL, 3, lambda b: b.tolist()), TypeError, "bias"),
    BadInput(
        "bias beside a packed weight",
        bad_argument(_GROUPED_SMALL, 2, lambda w: pack_linear(w.contiguous())),
        ValueError,
        "bias",
    ),
)


# --- benchmark ----------------------------------------------------------------------------------------------------------
def _loop(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    b_in: None = None,
    b_out: None = None,
    *,
    w_gate: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A loop over the experts with index_add, as transformers' MixtralExperts runs eagerly."""
    out = torch.zeros_like(x)
    for expert in range(w_in.size(0)):
        token, slot = torch.where(routing.expert_ids == expert)
        chosen = x[token]
        hidden = F.linear(chosen, w_in[expert])
        if w_gate is None:
            hidden = activate(hidden, activation)
        else:
            hidden = activate(F.linear(chosen, w_gate[expert]), activation) * hidden
        rows = F.linear(hidden, w_out[expert]) * routing.weights[token, slot, None]
        out = out.index_add(0, token, rows.to(x.dtype))
    return out


def _grouped_mm(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    b_in: None = None,
    b_out: None = None,
    *,
    w_gate: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A sort and torch's grouped products, as transformers' experts run with "grouped_mm"."""
    ids = routing.expert_ids.flatten()
    order = ids.argsort(stable=True)
    token = order // routing.expert_ids.size(1)
    ends = torch.bincount(ids, minlength=w_in.size(0)).cumsum(0).to(torch.int32)
    chosen = x[token]
    hidden = torch._grouped_mm(chosen, w_in.transpose(1, 2), offs=ends)
    if w_gate is None:
        hidden = activate(hidden, activation)
    else:
        hidden = activate(torch._grouped_mm(chosen, w_gate.transpose(1, 2), offs=ends), activation) * hidden
    rows = torch._grouped_mm(hidden, w_out.transpose(1, 2), offs=ends) * routing.weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, rows.to(x.dtype))


def _moe_cost(passes: int) -> Callable[[Call], Cost]:
    """Products of the slots, and the weights of the experts that have any once."""

    def cost(call: Call) -> Cost:
        x, routing, w_in, w_out = call.args[:4]
        weights = [w_in, w_out, *(w for w in (call.kwargs.get("w_gate"),) if w is not None)]
        products = 2.0 * routing.expert_ids.numel() * sum(w[0].numel() for w in weights)
        active = routing.expert_ids.unique().numel()
        moved = active * sum(w[0].numel() for w in weights) * x.element_size() + 2 * x.numel() * x.element_size()
        return Cost(flops=passes * products, bytes=float(passes * moved))

    return cost


def _moe_bench(name: str, make: Make, ratios: tuple[float, float], *, backward: bool = False) -> tuple[BenchCase, ...]:
    """One case a dtype: float32 and bfloat16 are promised their own ratios."""
    return tuple(
        BenchCase(
            f"{name}.backward" if backward else name,
            make,
            ops.moe_mlp,
            {"loop": _loop, "grouped_mm": _grouped_mm},
            _moe_cost(3 if backward else 1),
            dtypes=(dtype,),
            backward=backward,
            compiled_peers=("grouped_mm",),
            target=Target(("loop", "grouped_mm", "compile"), ratio),
        )
        for dtype, ratio in zip((torch.float32, torch.bfloat16), ratios, strict=True)
    )


def _bench_call(tokens: int, experts: int, slots: int, *, gated: bool = False) -> Make:
    hidden = 2048 if gated else 3072
    return _moe_call(
        (tokens,), 768, hidden, 768, experts, slots, gated=gated, bias="none", activation="silu" if gated else "gelu"
    )


_MOE_BENCH = (
    *(
        case
        for tokens, ratios in ((4096, (1.05, 1.6)), (64, (1.5, 1.5)))
        for experts, slots in ((8, 1), (8, 2), (16, 2), (32, 1), (32, 2))
        for case in _moe_bench(f"moe_mlp.T{tokens}_E{experts}_k{slots}", _bench_call(tokens, experts, slots), ratios)
    ),
    *(
        case
        for tokens, ratios in ((4096, (1.05, 1.6)), (64, (1.5, 1.5)))
        for case in _moe_bench(f"moe_mlp.swiglu.T{tokens}_E8_k2", _bench_call(tokens, 8, 2, gated=True), ratios)
    ),
    *_moe_bench("moe_mlp.T4096_E8_k2", _bench_call(4096, 8, 2), (1.05, 2.0), backward=True),
    *_moe_bench("moe_mlp.T4096_E32_k2", _bench_call(4096, 32, 2), (1.05, 2.0), backward=True),
    *_moe_bench("moe_mlp.swiglu.T4096_E8_k2", _bench_call(4096, 8, 2, gated=True), (1.05, 2.0), backward=True),
)


# Experts that fill a GPU: of 128, 8 a token, as language models of some thirty billion parameters have them.
def _gpu_call(tokens: int, experts: int, slots: int, channels: int, hidden: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        draw = drawer(device, dtype, g)
        weights, ids = draw(tokens, experts).float().softmax(-1).topk(slots)
        w_in, w_gate = (draw(experts, hidden, channels) * channels**-0.5 for _ in range(2))
        w_out = draw(experts, channels, hidden) * hidden**-0.5
        routing = Routing(ids, weights, experts, ids.numel())
        return Call((draw(tokens, channels), routing, w_in, w_out, None, None), {"w_gate": w_gate, "activation": "silu"})

    return make


_MOE_GPU = tuple(
    BenchCase(
        f"moe_mlp.gpu.T{tokens}_E128_k8{'.backward' if backward else ''}",
        _gpu_call(tokens, 128, 8, 2048, 768),
        ops.moe_mlp,
        {"grouped_mm": _grouped_mm},
        _moe_cost(3 if backward else 1),
        dtypes=(torch.bfloat16,),
        backward=backward,
        target=Target((), tflops, of="TFLOP/s"),
        devices=("cuda",),
    )
    for tokens, backward, tflops in ((32768, False, 330.0), (32768, True, 260.0), (8192, False, 290.0))
)


def _masked(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A loop over boolean masks, as MoT and Mixture-of-Mamba have it."""
    out = x.new_empty((*x.shape[:-1], weight.size(1)))
    for group in range(weight.size(0)):
        mask = ids == group
        out[mask] = F.linear(x[mask], weight[group], None if bias is None else bias[group])
    return out


def _grouped_cost(call: Call) -> Cost:
    x, _, weight = call.args[:3]
    tokens = x.numel() // x.size(-1)
    moved = x.numel() + weight.numel() + tokens * weight.size(1)
    return Cost(flops=2.0 * tokens * weight[0].numel(), bytes=float(moved * x.element_size()))


_GROUPED_BENCH = tuple(
    BenchCase(
        f"grouped_linear.4096x{channels}x{outputs}_G3",
        _grouped_call((4096,), channels, outputs, 3, bias="none"),
        ops.grouped_linear,
        {"masked loop": _masked},
        _grouped_cost,
        dtypes=(dtype,),
        compiled_peers=("masked loop",),
        target=Target(("masked loop", "compile"), ratio),
    )
    for channels, outputs in ((768, 768), (768, 2304))
    for dtype, ratio in ((torch.float32, 1.05), (torch.bfloat16, 2.0))
)


CARDS = (
    Card(
        name="moe_mlp",
        family="moe",
        function=ops.moe_mlp,
        reference=reference.moe_mlp,
        ops=("mmkernels::moe_mlp", "mmkernels::moe_mlp_backward"),
        backends=ops.MOE_BACKENDS,
        samples=_MOE_SAMPLES,
        bad_inputs=_MOE_BAD,
        dtypes=DTYPES,
        systems=_MOE_SYSTEMS,
        summary="sparse experts, plain or gated, without padding, drops or atomics; weights packed once, int8 too",
        bench=(*_MOE_BENCH, *_MOE_GPU),
    ),
    Card(
        name="grouped_linear",
        family="moe",
        function=ops.grouped_linear,
        reference=reference.grouped_linear,
        ops=("mmkernels::grouped_linear", "mmkernels::grouped_linear_backward"),
        backends=ops.GROUPED_BACKENDS,
        samples=_GROUPED_SAMPLES,
        bad_inputs=_GROUPED_BAD,
        dtypes=DTYPES,
        systems=_GROUPED_SYSTEMS,
        summary="a linear layer for each modality or expert, chosen token by token",
        bench=_GROUPED_BENCH,
    ),
)
