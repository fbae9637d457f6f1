"""Temporal token rolling, alone and fused with the LayerNorm that follows it in a transformer block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import INT64_MAX, check_float, check_gradient, check_int, check_parameter, check_tensor
from mmkernels.ops.entry import (
    autocast_widens_norms,
    contiguous,
    define,
    differentiable,
    implement,
    not_differentiable,
    stats_dtype,
)
from mmkernels.reference import token_roll as reference

Range = reference.Range

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHAPE = "[B*T, N, C]"

# What the operators take for (divisor, ranges): a divisor and no ranges, or 0 and the ranges laid flat.
_Plan = tuple[int, tuple[int, ...]]


# --- checks -----------------------------------------------------------------------------------------------------------
def _flat_ranges(ranges: Any, num_tokens: int, num_frames: int) -> tuple[int, ...]:
    try:
        triples = [(start, stop, shift) for start, stop, shift in ranges]
    except (TypeError, ValueError):
        raise TypeError(f"ranges: expected (start, stop, shift) triples of ints, got {ranges!r}") from None
    for value in (number for triple in triples for number in triple):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"ranges: expected ints, got {value!r}")
    end = 0
    flat: list[int] = []
    for start, stop, shift in sorted(triples):
        if not (0 <= start <= stop <= num_tokens):
            raise ValueError(f"ranges: ({start}, {stop}, {shift}) does not lie within the {num_tokens} tokens of x")
        if start == stop:
            continue  # names no token, so it overlaps nothing
        if start < end:
            raise ValueError(f"ranges: ({start}, {stop}, {shift}) overlaps the range that ends at {end}")
        flat += (start, stop, shift if -INT64_MAX <= shift <= INT64_MAX else shift % num_frames)
        end = stop
    return tuple(flat)


def _plan(x: Any, num_frames: Any, divisor: Any, ranges: Any) -> _Plan:
    check_tensor(x, "x", _SHAPE, DTYPES)
    check_int(num_frames, "num_frames", 1)
    if x.size(0) % num_frames != 0:
        raise ValueError(f"num_frames: {num_frames} does not divide the {x.size(0)} rows of x {_SHAPE}")
    if ranges is not None:
        return 0, _flat_ranges(ranges, x.size(1), num_frames)
    check_int(divisor, "divisor", 1)
    fold = x.size(1) // divisor
    if fold > 0 and 2 * fold + 1 > x.size(1):
        raise ValueError(
            f"divisor: {divisor} gives two ranges of {fold} tokens, which overlap in {x.size(1)} tokens; take a larger one"
        )
    return divisor, ()


# --- operators --------------------------------------------------------------------------------------------------------
# For the kernels that are not compiled code, which checks its arguments itself.
def _check_roll(x: Tensor, num_frames: int, divisor: int, ranges: Sequence[int], *_: Any) -> None:
    if divisor > 0:
        _plan(x, num_frames, divisor, None)
        return
    if len(ranges) % 3 != 0:
        raise ValueError(f"ranges: expected (start, stop, shift) triples, got {len(ranges)} numbers")
    _plan(x, num_frames, 1, [(ranges[i], ranges[i + 1], ranges[i + 2]) for i in range(0, len(ranges), 3)])


def _check_norm(
    x: Tensor,
    num_frames: int,
    divisor: int,
    ranges: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> None:
    _check_roll(x, num_frames, divisor, ranges)
    check_parameter(weight, "weight", x.size(2), x, "x")
    check_parameter(bias, "bias", x.size(2), x, "x")


def _check_norm_backward(
    grad_normed: Tensor | None,
    grad_rolled: Tensor | None,
    x: Tensor,
    stats: Tensor,
    num_frames: int,
    divisor: int,
    ranges: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> None:
    _check_norm(x, num_frames, divisor, ranges, weight, bias)
    check_gradient(grad_normed, "grad_normed", x.shape, (x.dtype, stats_dtype(x)), x)
    check_gradient(grad_rolled, "grad_rolled", x.shape, (x.dtype,), x)
    check_gradient(stats, "stats", (2, x.size(0), x.size(1)), (stats_dtype(x),), x)


def _fake_roll(x: Tensor, num_frames: int, divisor: int, ranges: Sequence[int], inverse: bool = False) -> Tensor:
    _check_roll(x, num_frames, divisor, ranges)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_norm(
    x: Tensor,
    num_frames: int,
    divisor: int,
    ranges: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    need_rolled: bool,
    float_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, num_frames, divisor, ranges, weight, bias)
    normed = torch.empty(x.shape, dtype=stats_dtype(x) if float_normed else x.dtype, device=x.device)
    rolled = torch.empty(x.shape if need_rolled else (0,), dtype=x.dtype, device=x.device)
    stats = torch.empty((2, x.shape[0], x.shape[1]), dtype=stats_dtype(x), device=x.device)
    return normed, rolled, stats


def _fake_norm_backward(
    grad_normed: Tensor | None,
    grad_rolled: Tensor | None,
    x: Tensor,
    stats: Tensor,
    num_frames: int,
    divisor: int,
    ranges: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def parameter(needed: bool, like: Tensor | None) -> Tensor:
        return torch.empty((x.shape[2] if needed else 0,), dtype=x.dtype if like is None else like.dtype, device=x.device)

    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return grad_x, parameter(need_weight, weight), parameter(need_bias, bias)


_roll_op = define(
    "token_roll(Tensor x, SymInt num_frames, SymInt divisor, SymInt[] ranges, bool inverse=False) -> Tensor", _fake_roll
)
_norm_op = define(
    "token_roll_layer_norm(Tensor x, SymInt num_frames, SymInt divisor, SymInt[] ranges, Tensor? weight, Tensor? bias, "
    "float eps, bool need_rolled, bool float_normed) -> (Tensor normed, Tensor rolled, Tensor stats)",
    _fake_norm,
)
_norm_backward_op = define(
    "token_roll_layer_norm_backward(Tensor? grad_normed, Tensor? grad_rolled, Tensor x, Tensor stats, SymInt num_frames, "
    "SymInt divisor, SymInt[] ranges, Tensor? weight, Tensor? bias, bool need_weight, bool need_bias) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_norm_backward,
)


ROLL_BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, generic_only=()),
    backends.cuda(),
    backends.triton(backends.HALF_AND_SINGLE),
    backends.REFERENCE,
)
NORM_BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS),
    backends.cuda(),
    backends.triton(backends.HALF_AND_SINGLE, extra=backends.few_channels("token_roll")),
    backends.REFERENCE,
)


implement(
    _roll_op,
    ROLL_BACKENDS,
    "x",
    check=_check_roll,
    triton=backends.triton_kernel("token_roll", "token_roll"),
    reference=reference.token_roll_op,
)
implement(
    _norm_op,
    NORM_BACKENDS,
    "x",
    check=_check_norm,
    triton=backends.triton_kernel("token_roll", "token_roll_layer_norm"),
    reference=reference.token_roll_layer_norm_op,
)
implement(
    _norm_backward_op,
    NORM_BACKENDS,
    "x",
    check=_check_norm_backward,
    triton=backends.triton_kernel("token_roll", "token_roll_layer_norm_backward"),
    reference=reference.token_roll_layer_norm_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _roll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.plan = inputs


def _roll_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    num_frames, divisor, ranges, *inverse = ctx.plan
    forward = bool(inverse and inverse[0])
    return _call_roll(gradient.requires_grad, gradient.contiguous(), num_frames, divisor, ranges, not forward), *[None] * 4


_call_roll = differentiable(_roll_op, _roll_setup, _roll_backward, twice=True)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, num_frames, divisor, ranges, weight, bias, _, _, _ = inputs
    ctx.save_for_backward(x, output[2], weight, bias)
    ctx.plan = (num_frames, divisor, ranges)
    ctx.need_rolled = inputs[7]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, grad_normed: Tensor | None, grad_rolled: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, stats, weight, bias = ctx.saved_tensors
    sources = (grad_normed, grad_rolled, x, weight)
    grad_x, grad_weight, grad_bias = _call_norm_backward(
        any(source is not None and source.requires_grad for source in sources),
        contiguous(grad_normed),
        contiguous(grad_rolled) if ctx.need_rolled else None,
        x,
        stats,
        *ctx.plan,
        weight,
        bias,
        weight is not None and ctx.needs_input_grad[4],
        bias is not None and ctx.needs_input_grad[5],
    )
    return (
        grad_x if ctx.needs_input_grad[0] else None,
        None,
        None,
        None,
        grad_weight if ctx.needs_input_grad[4] else None,
        grad_bias if ctx.needs_input_grad[5] else None,
        None,
        None,
        None,
    )


_call_norm_backward = not_differentiable(_norm_backward_op)
_call_norm = differentiable(_norm_op, _norm_setup, _norm_backward, twice=False)


# --- public functions -------------------------------------------------------------------------------------------------
def token_roll(x: Tensor, num_frames: int, *, divisor: int = 8, ranges: Sequence[Range] | None = None) -> Tensor:
    """Rolls some tokens of every frame to a neighbouring frame of the same video: out[t] = x[(t - shift) mod T].

    Args:
        x: tokens [B*T, N, C], the T frames of a video in consecutive rows; float32, bfloat16, float16 or float64; any
            strides with a contiguous last dimension.
        num_frames: T.
        divisor: without `ranges`, f = N // divisor tokens after the first one come from the frame before (shift +1) and
            the last f tokens from the frame after (shift -1); the first token and the middle stay. f = 0 moves nothing.
        ranges: (start, stop, shift) triples instead: tokens start..stop-1 come from `shift` frames before. Disjoint, in
            any order; tokens in none stay. A tuple of tuples is the cheapest to pass.

    Returns:
        [B*T, N, C], contiguous, never a view of x. The gradient is the inverse roll, exact, to any order.

    Raises:
        TypeError: x is no dense floating-point tensor, num_frames or divisor no int, ranges no triples of ints.
        ValueError: x has another rank or a strided last dimension, num_frames does not divide B*T, the ranges overlap or
            leave [0, N).

    Source: "All in One: Exploring Unified Video-Language Pre-training" (CVPR 2023), variant v=0. Its v=1 (a random half
    of the tokens) and v=2 at layer 0 are given by `ranges`. What the published code does by accident is not copied: for
    N < 8 it rolls every token, first one included; v=2 in deeper layers zeroes tokens; v=3 confuses tokens with channels.
    """
    if ranges is not None or type(num_frames) is not int or type(divisor) is not int or divisor < 1 or is_compiling():
        plan = _plan(x, num_frames, divisor, ranges)
        return _call_roll(x.requires_grad, x, num_frames, *plan)
    # The kernel's entry makes every check that is left, at a tenth of the cost; where it refuses, those here say why.
    try:
        return _call_roll(x.requires_grad, x, num_frames, divisor, ())
    except Exception:
        _plan(x, num_frames, divisor, ranges)
        raise


def token_roll_layer_norm(
    x: Tensor,
    num_frames: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    divisor: int = 8,
    ranges: Sequence[Range] | None = None,
    need_rolled: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`token_roll`, then LayerNorm over C, in one pass that writes both.

    A block that rolls before it normalises needs the rolled tokens again for its residual: (normed, rolled).

    Args:
        x, num_frames, divisor, ranges: as in :func:`token_roll`. `ranges` may index a joint [text; visual] row.
        weight, bias: [C] or None; in the dtype of x, or float32 beside bfloat16 and float16.
        eps: added to the variance.
        need_rolled: False writes the normed tokens alone and gives None for the rolled ones.

    Returns:
        (normed, rolled), each [B*T, N, C] in the dtype of x; under autocast on CUDA normed is float32, as F.layer_norm's is.
        Mean and variance are float32 (float64 for float64 x).

    Raises:
        TypeError, ValueError: as :func:`token_roll`; weight or bias of another dtype, device or length than fits x.
        NotImplementedError: a second derivative.

    Source: as :func:`token_roll`; the block is the pre-norm ViT block.
    """
    plan = _plan(x, num_frames, divisor, ranges)
    check_parameter(weight, "weight", x.size(2), x, "x")
    check_parameter(bias, "bias", x.size(2), x, "x")
    check_float(eps, "eps")
    requires_grad = (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )
    float_normed = autocast_widens_norms(x.device)
    normed, rolled, _ = _call_norm(requires_grad, x, num_frames, *plan, weight, bias, eps, need_rolled, float_normed)
    return normed, rolled if need_rolled else None
