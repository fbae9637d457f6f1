"""The cards of token rolling."""

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
    drawer,
    with_argument,
)
from mmkernels.ops import token_roll as ops
from mmkernels.reference import token_roll as reference

_EPS = 1e-6
_SYSTEMS = ("All-in-one",)


def _tokens(rows: int, tokens: int, channels: int, device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.randn((rows, tokens, channels), generator=g).to(device=device, dtype=dtype)


def _roll_call(rows: int, tokens: int, channels: int, frames: int, **kwargs: Any) -> Make:
    return lambda device, dtype, g: Call((_tokens(rows, tokens, channels, device, dtype, g), frames), dict(kwargs))


def _norm_call(rows: int, tokens: int, channels: int, frames: int, *, affine: str = "both", **kwargs: Any) -> Make:
    """`affine`: both, weight, none, or float32 (parameters in float32 beside a half-precision x)."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        x = _tokens(rows, tokens, channels, device, dtype, g)
        kept = torch.float32 if affine == "float32" and dtype != torch.float64 else dtype
        weight = (1 + 0.1 * torch.randn(channels, generator=g)).to(device=device, dtype=kept)
        bias = (0.1 * torch.randn(channels, generator=g)).to(device=device, dtype=kept)
        parameters = (None if affine == "none" else weight, None if affine in ("none", "weight") else bias)
        return Call((x, frames, *parameters, _EPS), dict(kwargs))

    return make


_SINGLE_TOKENS = tuple((i, i + 1, 1) for i in (1, 2, 5, 6, 9, 13, 20))
_JOINT = ((6, 8, 1), (15, 17, -1))  # 5 text tokens before 12 visual ones, divisor 6


def _samples(call: Callable[..., Make]) -> tuple[Sample, ...]:
    return (
        Sample("small", call(6, 17, 8, 3)),
        Sample("odd sizes", call(10, 29, 7, 5)),
        Sample("one frame", call(2, 17, 8, 1)),
        Sample("two frames", call(4, 19, 5, 2)),
        Sample("fewer tokens than divisor", call(3, 7, 4, 3)),
        Sample("one token, one channel", call(3, 1, 1, 3)),
        Sample("divisor 3", call(8, 10, 3, 4, divisor=3)),
        Sample("divisor 1000", call(2, 17, 3, 2, divisor=1000)),
        Sample("single tokens", call(4, 23, 5, 4, ranges=_SINGLE_TOKENS)),
        Sample("joint row", call(6, 17, 8, 3, ranges=_JOINT)),
        Sample("ranges out of order", call(6, 17, 8, 3, ranges=((9, 17, -1), (0, 4, 1), (4, 4, 7)))),
        Sample("shifts beyond the frames", call(6, 9, 4, 3, ranges=[(0, 3, 7), (3, 5, -4), (5, 9, 3)])),
        Sample("no range", call(4, 9, 4, 2, ranges=())),
        Sample("vector tails", call(2, 9, 83, 2)),
        Sample("no rows", call(0, 17, 8, 3), gradcheck=False),
        Sample("no tokens", call(6, 0, 8, 3), gradcheck=False),
        Sample("no channels", call(6, 17, 0, 3), gradcheck=False),
        *(Sample(name, with_argument(call(6, 17, 9, 3), 0, change)) for name, change in STRIDED_TOKENS.items()),
        Sample("ViT-B/16", call(6, 197, 768, 3), gradcheck=False),
        Sample("beyond the cache", call(96, 197, 768, 8), gradcheck=False, full=True),
    )


def _bad(call: Callable[..., Make]) -> tuple[BadInput, ...]:
    def make(*shape: int, **kwargs: Any) -> Callable[[torch.device], Call]:
        return lambda device: call(*shape, **kwargs)(device, torch.float32, torch.Generator())

    def changed(change: Callable[[Call], Call]) -> Callable[[torch.device], Call]:
        return lambda device: change(make(6, 17, 8, 3)(device))

    def with_x(value: Callable[[Tensor], Any]) -> Callable[[torch.device], Call]:
        return changed(lambda c: Call((value(c.args[0]), *c.args[1:]), c.kwargs))

    def with_frames(value: Any) -> Callable[[torch.device], Call]:
        return changed(lambda c: Call((c.args[0], value, *c.args[2:]), c.kwargs))

    def with_ranges(*ranges: Any) -> Callable[[torch.device], Call]:
        return make(6, 17, 8, 3, ranges=ranges)

    return (
        BadInput("rank 2", with_x(lambda x: x[0]), ValueError, "x"),
        BadInput("rank 4", with_x(lambda x: x[None]), ValueError, "x"),
        BadInput("integers", with_x(lambda x: x.int()), TypeError, "x"),
        BadInput("complex numbers", with_x(lambda x: x.to(torch.complex64)), TypeError, "x"),
        BadInput("a list", with_x(lambda x: x.tolist()), TypeError, "x"),
        BadInput("sparse", with_x(lambda x: x.to_sparse()), TypeError, "x"),
        BadInput("last dimension strided", with_x(lambda x: torch.cat((x, x), 2)[..., ::2]), ValueError, "x"),
        BadInput("frames do not divide the batch", with_frames(4), ValueError, "num_frames"),
        BadInput("no frames", with_frames(0), ValueError, "num_frames"),
        BadInput("negative frames", with_frames(-3), ValueError, "num_frames"),
        BadInput("fractional frames", with_frames(3.0), TypeError, "num_frames"),
        BadInput("boolean frames", with_frames(True), TypeError, "num_frames"),
        BadInput("divisor 0", make(6, 17, 8, 3, divisor=0), ValueError, "divisor"),
        BadInput("ranges of the divisor overlap", make(6, 16, 8, 3, divisor=2), ValueError, "divisor"),
        BadInput("divisor 1", make(6, 17, 8, 3, divisor=1), ValueError, "divisor"),
        BadInput("divisor is a string", make(6, 17, 8, 3, divisor="8"), TypeError, "divisor"),
        BadInput("ranges overlap", with_ranges((1, 5, 1), (4, 8, -1)), ValueError, "ranges"),
        BadInput("range past the end", with_ranges((10, 18, 1)), ValueError, "ranges"),
        BadInput("range before the start", with_ranges((-1, 3, 1)), ValueError, "ranges"),
        BadInput("range backwards", with_ranges((5, 3, 1)), ValueError, "ranges"),
        BadInput("pairs", with_ranges((5, 7)), TypeError, "ranges"),
        BadInput("ranges of floats", with_ranges((1, 5, 1.0)), TypeError, "ranges"),
        BadInput("ranges is a number", make(6, 17, 8, 3, ranges=3), TypeError, "ranges"),
    )


def _bad_norm() -> tuple[BadInput, ...]:
    def with_argument(index: int, value: Any) -> Callable[[torch.device], Call]:
        def make(device: torch.device) -> Call:
            call = _norm_call(6, 17, 8, 3)(device, torch.float32, torch.Generator())
            args = list(call.args)
            args[index] = value(args[index]) if callable(value) else value
            return Call(tuple(args), call.kwargs)

        return make

    return (
        *_bad(_norm_call),
        BadInput("weight too short", with_argument(2, lambda w: w[:7]), ValueError, "weight"),
        BadInput("weight is a matrix", with_argument(2, lambda w: w[None]), ValueError, "weight"),
        BadInput("weight is half beside float32", with_argument(2, lambda w: w.half()), TypeError, "weight"),
        BadInput("weight is a list", with_argument(2, lambda w: w.tolist()), TypeError, "weight"),
        BadInput("weight on another device", with_argument(2, lambda w: w.to("meta")), ValueError, "weight"),
        BadInput("bias too long", with_argument(3, lambda b: torch.cat((b, b))), ValueError, "bias"),
        BadInput("bias on another device", with_argument(3, lambda b: b.to("meta")), ValueError, "bias"),
        BadInput("eps is a string", with_argument(4, "1e-6"), TypeError, "eps"),
    )


# --- benchmark --------------------------------------------------------------------------------------------------------
# The peers are the fastest plain formulas found: one concatenation of slices, no index tensors.
def _torch_roll(x: Tensor, num_frames: int) -> Tensor:
    batch_frames, tokens, channels = x.shape
    fold = tokens // 8
    video = x.view(batch_frames // num_frames, num_frames, tokens, channels)
    parts = (
        video[:, :, :1],
        torch.roll(video[:, :, 1 : 1 + fold], 1, 1),
        video[:, :, 1 + fold : tokens - fold],
        torch.roll(video[:, :, tokens - fold :], -1, 1),
    )
    return torch.cat(parts, 2).view(batch_frames, tokens, channels)


def _torch_roll_layer_norm(
    x: Tensor, num_frames: int, weight: Tensor, bias: Tensor, eps: float, need_rolled: bool = True
) -> tuple[Tensor, Tensor | None]:
    rolled = _torch_roll(x, num_frames)
    return F.layer_norm(rolled, rolled.shape[-1:], weight, bias, eps), rolled if need_rolled else None


def _moved(call: Call, reads: int, writes: int) -> Cost:
    x = call.args[0]
    return Cost(flops=0.0, bytes=float((reads + writes) * x.numel() * x.element_size()))


_VIDEOS = (("8x3x197x768", 24, 3), ("8x8x197x768", 64, 8))  # All-in-one-B: batch 8, 3 or 8 frames

_ROLL_BENCH = tuple(
    BenchCase(
        f"token_roll.{name}",
        _roll_call(rows, 197, 768, frames),
        ops.token_roll,
        {
            "clone": lambda x, num_frames: x.clone(),
            "eager": _torch_roll,
            "reference": lambda x, num_frames: reference.token_roll(x, num_frames),
        },
        lambda call: _moved(call, 1, 1),
        compiled_peers=("eager",),
        target=Target(("clone",), 1.15, at_most=True),
    )
    for name, rows, frames in _VIDEOS
)

_NORM_BENCH = tuple(
    BenchCase(
        f"token_roll_layer_norm.{name}{suffix}",
        _norm_call(rows, 197, 768, frames, need_rolled=need_rolled),
        ops.token_roll_layer_norm,
        {"eager": _torch_roll_layer_norm, "reference": reference.token_roll_layer_norm},
        lambda call, moves=moves: _moved(call, *moves),  # type: ignore[misc]
        compiled_peers=("eager",),
        backward=backward,
        target=Target(("eager", "compile"), ratio),
    )
    for name, rows, frames in _VIDEOS
    for suffix, need_rolled, moves, backward, ratio in (
        ("", True, (1, 2), False, 1.3),
        (".normed_only", False, (1, 1), False, 1.6),
        # forward 1 + 2; backward reads x and two gradients, and writes one
        (".backward", True, (4, 3), True, 2.0),
    )
)


# Videos that no cache of a GPU holds.
_GPU_SHAPE, _GPU_FRAMES = (1024, 197, 768), 8


def _on_gpu(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
    return Call((drawer(device, dtype, g)(*_GPU_SHAPE), _GPU_FRAMES))


def _norm_on_gpu(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
    draw = drawer(device, dtype, g)
    channels = _GPU_SHAPE[-1]
    return Call((draw(*_GPU_SHAPE), _GPU_FRAMES, 1 + 0.1 * draw(channels), 0.1 * draw(channels), _EPS))


def _gpu_case(
    name: str,
    make: Make,
    run: Callable[..., Any],
    peers: dict[str, Callable[..., Any]],
    moves: tuple[int, int],
    *,
    backward: bool = False,
) -> BenchCase:
    return BenchCase(
        f"{name}.gpu.{'x'.join(map(str, _GPU_SHAPE))}{'.backward' if backward else ''}",
        make,
        run,
        peers,
        lambda call: _moved(call, *moves),
        dtypes=(torch.bfloat16,),
        backward=backward,
        target=None if backward else Target((), 0.85, of="floor"),
        devices=("cuda",),
    )


_ROLL_GPU = _gpu_case(
    "token_roll", _on_gpu, ops.token_roll, {"clone": lambda x, num_frames: x.clone(), "eager": _torch_roll}, (1, 1)
)
_NORM_GPU = tuple(
    _gpu_case(
        "token_roll_layer_norm",
        _norm_on_gpu,
        ops.token_roll_layer_norm,
        {"eager": _torch_roll_layer_norm},
        moves,
        backward=backward,
    )
    for moves, backward in (((1, 2), False), ((4, 3), True))
)


def _tiny() -> Call:
    return Call((torch.randn(2, 8, 4), 2))


_OVERHEADS = (
    Overhead("token_roll call, no gradient", _tiny, ops.token_roll, grad=False, limit_us=6.0),
    Overhead("token_roll call, with gradient", _tiny, ops.token_roll, grad=True, limit_us=16.0),
)

CARDS = (
    Card(
        name="token_roll",
        family="token_roll",
        function=ops.token_roll,
        reference=reference.token_roll,
        ops=("mmkernels::token_roll",),
        backends=ops.ROLL_BACKENDS,
        samples=_samples(_roll_call),
        bad_inputs=_bad(_roll_call),
        dtypes=ops.DTYPES,
        systems=_SYSTEMS,
        summary="rolls some tokens of every frame to a neighbouring frame",
        twice_differentiable=True,
        bench=(*_ROLL_BENCH, _ROLL_GPU),
        overheads=_OVERHEADS,
    ),
    Card(
        name="token_roll_layer_norm",
        family="token_roll",
        function=ops.token_roll_layer_norm,
        reference=reference.token_roll_layer_norm,
        ops=("mmkernels::token_roll_layer_norm", "mmkernels::token_roll_layer_norm_backward"),
        backends=ops.NORM_BACKENDS,
        samples=(
            *_samples(_norm_call),
            Sample("no weight, no bias", _norm_call(6, 17, 9, 3, affine="none")),
            Sample("no bias", _norm_call(6, 17, 9, 3, affine="weight")),
            Sample("float32 parameters", _norm_call(6, 17, 9, 3, affine="float32")),
            Sample("normed only", _norm_call(6, 17, 9, 3, need_rolled=False)),
            Sample("large mean", with_argument(_norm_call(6, 17, 64, 3), 0, lambda x: x + 100)),
        ),
        bad_inputs=_bad_norm(),
        dtypes=ops.DTYPES,
        systems=_SYSTEMS,
        summary="token_roll and the LayerNorm after it, in one pass that writes both",
        bench=(*_NORM_BENCH, *_NORM_GPU),
    ),
)
