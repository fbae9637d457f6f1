"""The cards of linear layers and MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    bias_dtype,
    with_argument,
)
from mmkernels.ops import linear as ops
from mmkernels.ops.packed_linear import DTYPES, PackedLinear, pack_linear
from mmkernels.reference import linear as reference

_LINEAR_SYSTEMS = ("all of them",)
_MLP_SYSTEMS = ("all of them", "Activator", "Mixtral", "4M", "MoVA")


def _normal(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, g: torch.Generator, scale: float = 1.0
) -> Tensor:
    return (scale * torch.randn(shape, generator=g)).to(device=device, dtype=dtype)


def _weight(rows: int, cols: int, device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return _normal((rows, cols), device, dtype, g, max(1, cols) ** -0.5)


def _linear_call(
    leading: tuple[int, ...],
    cols: int,
    rows: int,
    *,
    bias: str = "own",
    residual: tuple[int, ...] | None = None,
    activation: str | None = None,
) -> Make:
    """x [*leading, cols] and weight [rows, cols]; `bias`: own, none, or float32 (beside a half-precision x)."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        x, weight = _normal((*leading, cols), device, dtype, g), _weight(rows, cols, device, dtype, g)
        kwargs: dict[str, Any] = {} if activation is None else {"activation": activation}
        if residual is not None:
            kwargs["residual"] = _normal(residual, device, dtype, g)
        return Call((x, weight, None if bias == "none" else _normal((rows,), device, bias_dtype(bias, dtype), g)), kwargs)

    return make


def _mlp_call(
    leading: tuple[int, ...],
    cols: int,
    hidden: int,
    rows: int,
    *,
    gated: bool = False,
    bias: str = "own",
    residual: bool = False,
    activation: str | None = "gelu",
) -> Make:
    """x [*leading, cols], w_in [hidden, cols], w_out [rows, hidden]."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        x = _normal((*leading, cols), device, dtype, g)
        w_in, w_out = _weight(hidden, cols, device, dtype, g), _weight(rows, hidden, device, dtype, g)
        kept = bias_dtype(bias, dtype)
        biases = [_normal((size,), device, kept, g) for size in (hidden, rows, hidden)]
        kwargs: dict[str, Any] = {"activation": activation}
        if gated:
            kwargs["w_gate"] = _weight(hidden, cols, device, dtype, g)
            if bias != "none":
                kwargs["b_gate"] = biases[2]
        if residual:
            kwargs["residual"] = _normal((*leading, rows), device, dtype, g)
        return Call((x, w_in, w_out, *((None, None) if bias == "none" else biases[:2])), kwargs)

    return make


_STRIDED = {**STRIDED_TOKENS, "channels strided": lambda x: torch.stack((x, x), -1)[..., 0]}


def _samples(call: Callable[..., Make], rest: tuple[int, ...]) -> tuple[Sample, ...]:
    """What both ops are tried on; `rest` are sizes after x's leading dimensions."""
    small = call((2, 5), 7, *rest)
    return (
        Sample("small", small),
        Sample("odd sizes", call((3, 7), 19, *(2 * size + 5 for size in rest))),
        Sample("one row", call((1,), 9, *rest)),
        Sample("no leading dimension", call((), 9, *rest)),
        Sample("four dimensions", call((2, 1, 3), 8, *rest)),
        Sample("depth 1", call((2, 3), 1, *rest)),
        Sample("no depth", call((2, 3), 0, *rest), gradcheck=False),
        Sample("no rows", call((2, 0), 7, *rest), gradcheck=False),
        Sample("no columns", call((2, 3), 7, *(0 for _ in rest)), gradcheck=False),
        Sample("no bias", call((2, 5), 7, *rest, bias="none")),
        Sample("float32 parameters", call((2, 5), 7, *rest, bias="float32")),
        Sample("relu", call((2, 5), 7, *rest, activation="relu"), gradcheck=False),  # not smooth
        Sample("gelu_tanh", call((2, 5), 7, *rest, activation="gelu_tanh")),
        Sample("silu", call((2, 5), 7, *rest, activation="silu")),
        Sample("quick_gelu", call((2, 5), 7, *rest, activation="quick_gelu")),
        *(Sample(name, with_argument(small, 0, change)) for name, change in _STRIDED.items()),
        Sample("weight transposed", with_argument(small, 1, lambda w: w.t().contiguous().t())),
        Sample("weight of a slice", with_argument(small, 1, lambda w: torch.cat((w, w), 1)[:, : w.size(1)])),
        Sample("deeper than a block", call((1, 3), 1100, *rest), gradcheck=False),
        Sample("many blocks", call((260,), 33, *(150 + 10 * i for i, _ in enumerate(rest))), gradcheck=False),
    )


_LINEAR_SAMPLES = (
    *_samples(_linear_call, (6,)),
    Sample("gelu", _linear_call((2, 5), 7, 6, activation="gelu")),
    Sample("residual", _linear_call((2, 5), 7, 6, activation="gelu", residual=(2, 5, 6))),
    Sample("residual expanded", _linear_call((2, 5), 7, 6, residual=(6,))),
    Sample("residual of each sample", _linear_call((2, 5), 7, 6, residual=(2, 1, 6))),
    Sample("depth in pieces", _linear_call((3,), 20000, 5), gradcheck=False),
    Sample("ViT-B/16", _linear_call((2, 197), 768, 768, activation="gelu"), gradcheck=False),
    Sample("ViT-L/16", _linear_call((1576,), 1024, 4096, activation="gelu"), gradcheck=False, full=True),
)
_MLP_SAMPLES = (
    *_samples(_mlp_call, (11, 6)),
    Sample("gated", _mlp_call((2, 5), 7, 11, 6, gated=True)),
    Sample("gated, odd sizes", _mlp_call((3, 7), 19, 37, 17, gated=True, activation="silu")),
    Sample("gated, no bias", _mlp_call((2, 5), 7, 11, 6, gated=True, bias="none", activation="silu")),
    Sample("gated, float32 parameters", _mlp_call((2, 5), 7, 11, 6, gated=True, bias="float32")),
    Sample("gated, quick_gelu", _mlp_call((3, 7), 19, 37, 17, gated=True, activation="quick_gelu")),
    Sample("gated, no activation", _mlp_call((2, 5), 7, 11, 6, gated=True, activation=None)),
    Sample("no activation", _mlp_call((2, 5), 7, 11, 6, activation=None)),
    Sample("residual", _mlp_call((2, 5), 7, 11, 6, gated=True, activation="relu", residual=True), gradcheck=False),
    Sample("groups of rows", _mlp_call((300,), 20, 3000, 10), gradcheck=False),
    Sample("ViT-B/16", _mlp_call((197,), 768, 1024, 768, gated=True, activation="silu"), gradcheck=False),
    Sample("ViT-L/16", _mlp_call((1576,), 1024, 4096, 1024), gradcheck=False, full=True),
)


# --- bad input ----------------------------------------------------------------------------------------------------------
def _bad_inputs(call: Make, weights: dict[str, int], biases: dict[str, int]) -> tuple[BadInput, ...]:
    """`weights` and `biases`: positions by name."""
    return (
        BadInput("x is a list", bad_argument(call, 0, lambda x: x.tolist()), TypeError, "x"),
        BadInput("x of integers", bad_argument(call, 0, lambda x: x.int()), TypeError, "x"),
        BadInput("x is sparse", bad_argument(call, 0, lambda x: x.to_sparse()), TypeError, "x"),
        BadInput("x is a number", bad_argument(call, 0, lambda x: x.sum()), ValueError, "x"),
        BadInput("x too narrow", bad_argument(call, 0, lambda x: x[..., 1:].contiguous()), ValueError, next(iter(weights))),
        *(
            bad
            for name, at in weights.items()
            for bad in (
                BadInput(f"{name} is a vector", bad_argument(call, at, lambda w: w[0]), ValueError, name),
                BadInput(f"{name} is a list", bad_argument(call, at, lambda w: w.tolist()), TypeError, name),
                BadInput(f"{name} too narrow", bad_argument(call, at, lambda w: w[:, 1:]), ValueError, name),
                BadInput(f"{name} is half beside float32", bad_argument(call, at, lambda w: w.half()), TypeError, name),
                BadInput(f"{name} is int8", bad_argument(call, at, lambda w: w.to(torch.int8)), TypeError, name),
                BadInput(f"{name} on another device", bad_argument(call, at, lambda w: w.to("meta")), ValueError, name),
                BadInput(f"{name} is sparse", bad_argument(call, at, lambda w: w.to_sparse()), TypeError, name),
            )
        ),
        *(
            bad
            for name, at in biases.items()
            for bad in (
                BadInput(f"{name} too short", bad_argument(call, at, lambda b: b[1:]), ValueError, name),
                BadInput(f"{name} is a matrix", bad_argument(call, at, lambda b: b[None]), ValueError, name),
                BadInput(f"{name} is double beside float32", bad_argument(call, at, lambda b: b.double()), TypeError, name),
                BadInput(f"{name} on another device", bad_argument(call, at, lambda b: b.to("meta")), ValueError, name),
            )
        ),
        BadInput("an unknown activation", bad_keyword(call, activation="swish"), ValueError, "activation"),
        BadInput("activation is a function", bad_keyword(call, activation=torch.relu), TypeError, "activation"),
        BadInput("residual of another shape", bad_keyword(call, residual=torch.zeros(3, 3)), ValueError, "residual"),
        BadInput("residual of another dtype", bad_keyword(call, residual=torch.zeros(6).double()), TypeError, "residual"),
        BadInput("residual is a number", bad_keyword(call, residual=1.0), TypeError, "residual"),
        BadInput("residual elsewhere", bad_keyword(call, residual=torch.zeros(6, device="meta")), ValueError, "residual"),
    )


def _packed(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    return pack_linear(weight, bias)


_LINEAR_BAD = (
    *_bad_inputs(_linear_call((2, 5), 7, 6), {"weight": 1}, {"bias": 2}),
    BadInput("bias beside a packed weight", bad_argument(_linear_call((2, 5), 7, 6), 1, _packed), ValueError, "bias"),
    BadInput(
        "packed for another dtype",
        lambda device: Call((torch.zeros(2, 7, device=device), pack_linear(torch.zeros(6, 7, device=device).bfloat16()))),
        TypeError,
        "weight",
    ),
)
_GATED = _mlp_call((2, 5), 7, 11, 6, gated=True)
_MLP_BAD = (
    *_bad_inputs(_mlp_call((2, 5), 7, 11, 6), {"w_in": 1, "w_out": 2}, {"b_in": 3, "b_out": 4}),
    BadInput("w_gate of another shape", bad_keyword(_GATED, w_gate=torch.zeros(12, 7)), ValueError, "w_gate"),
    BadInput("w_gate is a number", bad_keyword(_GATED, w_gate=1.0), TypeError, "w_gate"),
    BadInput("b_gate too short", bad_keyword(_GATED, b_gate=torch.zeros(10)), ValueError, "b_gate"),
    BadInput("b_gate without w_gate", bad_keyword(_GATED, w_gate=None), ValueError, "b_gate"),
)


# --- benchmark ----------------------------------------------------------------------------------------------------------
class _OncePerWeights:
    """f(weights) once for a case's weights: packing them, compiling for them. Cases come one after the other."""

    def __init__(self, prepare: Callable[..., Callable[..., Any]]) -> None:
        self._prepare = prepare
        self._weights: tuple[Any, ...] = ()
        self._prepared: Callable[..., Any] | None = None

    def __call__(self, x: Tensor, *weights: Any, **kwargs: Any) -> Any:
        given = (*weights, *(value for value in kwargs.values() if isinstance(value, Tensor)))
        if self._prepared is None or any(a is not b for a, b in zip(given, self._weights, strict=False)):
            self._prepared = self._prepare(*weights, **kwargs)
            self._weights = given
        return self._prepared(x)


def _frozen(formula: Callable[..., Any]) -> _OncePerWeights:
    """torch.compile with freezing, which packs weights too: they are constants of its graph."""

    class Frozen(nn.Module):
        def __init__(self, *weights: Any, **kwargs: Any) -> None:
            super().__init__()
            self._kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
            self._names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
            for name in self._names:
                self.register_buffer(name, kwargs[name])
            self._count = len(weights)
            for i, weight in enumerate(weights):
                self.register_buffer(f"weight{i}", weight)

        def forward(self, x: Tensor) -> Tensor:
            weights = [getattr(self, f"weight{i}") for i in range(self._count)]
            return formula(x, *weights, **self._kwargs, **{name: getattr(self, name) for name in self._names})

    def prepare(*weights: Any, **kwargs: Any) -> Callable[..., Any]:
        return torch.compile(Frozen(*weights, **kwargs).eval(), dynamic=False, options={"freezing": True})

    return _OncePerWeights(prepare)


def _packed_linear(dtype: torch.dtype | None = None) -> _OncePerWeights:
    def prepare(weight: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Callable[..., Any]:
        packed = pack_linear(weight, bias, dtype=dtype)
        return lambda x: ops.linear(x, packed, **kwargs)

    return _OncePerWeights(prepare)


def _packed_mlp(w_in: Tensor, w_out: Tensor, b_in: Any = None, b_out: Any = None, **kwargs: Any) -> Callable[..., Any]:
    into, out = pack_linear(w_in, b_in), pack_linear(w_out, b_out)
    if "w_gate" in kwargs:
        kwargs["w_gate"] = pack_linear(kwargs["w_gate"], kwargs.pop("b_gate", None))
    return lambda x: ops.mlp(x, into, out, **kwargs)


def _cost(*passes: int) -> Callable[[Call], Cost]:
    """Products of a call times `passes`, and every tensor once."""

    def cost(call: Call) -> Cost:
        x, tensors = call.args[0], call.tensors()
        rows = x.numel() // x.shape[-1]
        products = sum(2 * rows * weight.numel() for weight in tensors[1:] if weight.dim() == 2)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return Cost(flops=float(sum(passes) * products), bytes=float(moved))

    return cost


def _bench(
    name: str,
    make: Make,
    run: Callable[..., Any],
    formula: Callable[..., Any],
    ratios: tuple[float, float],
) -> tuple[BenchCase, ...]:
    """One case a dtype: float32 and bfloat16 are promised their own ratios."""
    return tuple(
        BenchCase(
            name,
            make,
            run,
            {"eager": formula, "frozen": _frozen(formula)},
            _cost(1),
            dtypes=(dtype,),
            compiled_peers=("eager",),
            target=Target(("eager", "compile", "frozen"), ratio),
        )
        for dtype, ratio in zip((torch.float32, torch.bfloat16), ratios, strict=True)
    )


def _training(name: str, make: Make, run: Callable[..., Any], formula: Callable[..., Any], ratio: float) -> BenchCase:
    return BenchCase(
        name,
        make,
        run,
        {"eager": formula},
        _cost(1, 2),
        backward=True,
        compiled_peers=("eager",),
        target=Target(("eager", "compile"), ratio),
    )


_SHAPES = (
    (64, 768, 3072, 1.4),
    (197, 768, 768, 1.4),
    (197, 768, 3072, 1.4),
    (1576, 768, 3072, 1.0),
    (1576, 3072, 768, 1.0),
    # Many tokens of few channels: the words of TNT, PVT's first stage.
    (25088, 24, 48, 0.97),
    (25088, 96, 24, 0.97),
    (25088, 32, 256, 0.97),
)

_LINEAR_BENCH = (
    *(
        case
        for rows, depth, cols, ratio in _SHAPES
        for case in _bench(
            f"linear.{rows}x{depth}x{cols}",
            _linear_call((rows,), depth, cols),
            _packed_linear(),
            reference.linear,
            (0.97, ratio),
        )
    ),
    _training("linear.197x768x3072.backward", _linear_call((197,), 768, 3072), ops.linear, reference.linear, 0.97),
    *(
        BenchCase(
            f"linear.int8.197x{depth}x{cols}",
            _linear_call((197,), depth, cols),
            _packed_linear(torch.int8),
            {"bfloat16 packed": _packed_linear()},
            _cost(1),
            dtypes=(torch.bfloat16,),
            target=Target(("bfloat16 packed",), 1.4),
        )
        for depth, cols in ((768, 768), (768, 3072), (3072, 768))
    ),
)

_MLP_BENCH = (
    *(
        case
        for rows, ratios in ((197, (1.1, 1.8)), (1576, (1.0, 1.15)))
        for name, make in (
            ("gelu", _mlp_call((rows,), 768, 3072, 768)),
            ("swiglu", _mlp_call((rows,), 768, 2048, 768, gated=True, bias="none", activation="silu")),
        )
        for case in _bench(f"mlp.{name}.{rows}x768", make, _OncePerWeights(_packed_mlp), reference.mlp, ratios)
    ),
    _training("mlp.gelu.197x768.backward", _mlp_call((197,), 768, 3072, 768), ops.mlp, reference.mlp, 1.0),
)


def _tiny() -> Call:
    return Call((torch.randn(2, 8), torch.randn(8, 8), torch.randn(8)))


CARDS = (
    Card(
        name="linear",
        family="linear",
        function=ops.linear,
        reference=reference.linear,
        ops=("mmkernels::linear", "mmkernels::linear_backward"),
        backends=ops.LINEAR_BACKENDS,
        samples=_LINEAR_SAMPLES,
        bad_inputs=_LINEAR_BAD,
        dtypes=DTYPES,
        systems=_LINEAR_SYSTEMS,
        summary="a linear layer with its activation and residual; weights packed once, int8 too (`mk.pack_linear`)",
        bench=_LINEAR_BENCH,
        overheads=(Overhead("linear call, no gradient", _tiny, ops.linear, grad=False, limit_us=12.0),),
    ),
    Card(
        name="mlp",
        family="linear",
        function=ops.mlp,
        reference=reference.mlp,
        ops=("mmkernels::mlp", "mmkernels::mlp_backward"),
        backends=ops.MLP_BACKENDS,
        samples=_MLP_SAMPLES,
        bad_inputs=_MLP_BAD,
        dtypes=DTYPES,
        systems=_MLP_SYSTEMS,
        summary="a feed-forward layer, plain or gated (SwiGLU, GeGLU, ReGLU), without a tensor of hidden activations",
        bench=_MLP_BENCH,
    ),
)
