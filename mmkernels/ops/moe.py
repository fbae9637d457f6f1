"""Experts: feed-forward layers of which each token passes a few, and linear layers of which it passes one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import check_biases, check_gradient, check_int, check_last_dimension, check_matrix, check_tokens
from mmkernels.ops.entry import (
    autocast_dtype,
    define,
    differentiable,
    implement,
    not_differentiable,
    stats_dtype,
    wants_gradient,
)
from mmkernels.ops.linear import (
    WeightLike,
    activation_code,
    check_weight,
    late_residual,
    like_x,
    matrix_tier,
    new_or_none,
    unit_stride,
)
from mmkernels.ops.packed_linear import DTYPES, cast, cast_weight, check_pack, current_packs, unpack
from mmkernels.reference import moe as reference
from mmkernels.reference.linear import as_rows
from mmkernels.reference.moe import Dispatch
from mmkernels.reference.routing import Routing

__all__ = ["Dispatch", "ExpertLora", "dispatch", "grouped_linear", "moe_mlp"]


# --- checks -----------------------------------------------------------------------------------------------------------
def check_ids(value: Any, name: str, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {value.dtype}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(value.shape)}")


def _check_order(expert_ids: Any, num_experts: int) -> None:
    check_ids(expert_ids, "expert_ids", "[T, K]")
    check_int(num_experts, "num_experts", 1)


def _check_moe(
    x: Any,
    expert_ids: Any,
    weights: Any,
    w_in: Any,
    w_out: Any,
    w_gate: Any,
    b_in: Any,
    b_out: Any,
    b_gate: Any,
    packed_in: Tensor | None,
    packed_out: Tensor | None,
    packed_gate: Tensor | None,
    current: Tensor | None,
    residual: Any,
    activation: int,
    max_slots: int,
    *_: Any,
) -> None:
    check_matrix(x, "x", "[T, C]", DTYPES)
    check_last_dimension(x, "x")
    check_ids(expert_ids, "routing", "[T, K]")
    if expert_ids.shape[0] != x.shape[0]:
        raise ValueError(f"routing: expected one row for each of the {x.shape[0]} tokens, got {tuple(expert_ids.shape)}")
    for value, name in ((expert_ids, "routing"), (weights, "routing")):
        if value.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    if weights.shape != expert_ids.shape or weights.dtype != stats_dtype(x):
        raise ValueError(
            f"routing: expected weights {tuple(expert_ids.shape)} in {stats_dtype(x)}, got {tuple(weights.shape)} in "
            f"{weights.dtype}"
        )
    check_weight(w_in, "w_in", (None, None, x.shape[1]), x, packed_in)
    experts, hidden = w_in.shape[:2]
    check_weight(w_out, "w_out", (experts, None, hidden), x, packed_out)
    if w_gate is not None:
        check_weight(w_gate, "w_gate", (experts, hidden, x.shape[1]), x, packed_gate)
    elif b_gate is not None:
        raise ValueError("b_gate: expected None where there is no w_gate")
    check_biases(b_in, "b_in", (experts, hidden), x, "x")
    check_biases(b_out, "b_out", (experts, w_out.shape[1]), x, "x")
    check_biases(b_gate, "b_gate", (experts, hidden), x, "x")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual: expected a tensor or None, got {type(residual).__name__}")
        shape = (x.shape[0], w_out.shape[1])
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")
        if tuple(residual.shape) != shape or residual.device != x.device:
            raise ValueError(f"residual: expected the output's shape and device, got {tuple(residual.shape)}")
    check_int(max_slots, "max_slots", 0)


def _check_moe_backward(
    grad: Any,
    x: Any,
    expert_ids: Any,
    weights: Any,
    w_in: Any,
    w_out: Any,
    w_gate: Any,
    b_in: Any,
    b_out: Any,
    b_gate: Any,
    pre: Any,
    pre_gate: Any,
    *_: Any,
) -> None:
    _check_moe(x, expert_ids, weights, w_in, w_out, w_gate, b_in, b_out, b_gate, None, None, None, None, None, 0, 0)
    check_gradient(grad, "grad", (x.shape[0], w_out.shape[1]), (x.dtype,), x)
    check_gradient(pre, "pre", (pre.shape[0], w_in.shape[1]), (x.dtype,), x)
    if w_gate is not None:
        check_gradient(pre_gate, "pre_gate", tuple(pre.shape), (x.dtype,), x)


def _check_grouped(x: Any, group_ids: Any, weight: Any, packed: Tensor | None, current: Any, bias: Any) -> None:
    check_matrix(x, "x", "[T, C]", DTYPES)
    check_last_dimension(x, "x")
    check_ids(group_ids, "group_ids", "[T]")
    if group_ids.device != x.device:
        raise ValueError(f"group_ids: expected the device of x, {x.device}, got {group_ids.device}")
    if group_ids.shape[0] != x.shape[0]:
        raise ValueError(f"group_ids: expected one for each of the {x.shape[0]} tokens, got {tuple(group_ids.shape)}")
    check_weight(weight, "weight", (None, None, x.shape[1]), x, packed)
    check_biases(bias, "bias", tuple(weight.shape[:2]), x, "x")


def _check_grouped_backward(grad: Any, x: Any, group_ids: Any, weight: Any, bias: Any, *_: Any) -> None:
    _check_grouped(x, group_ids, weight, None, None, bias)
    check_gradient(grad, "grad", (x.shape[0], weight.shape[1]), (x.dtype,), x)


# --- operators --------------------------------------------------------------------------------------------------------
def _fake_order(expert_ids: Tensor, num_experts: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_order(expert_ids, num_experts)
    shape, device = expert_ids.shape, expert_ids.device
    return (
        torch.empty((shape[0] * shape[1],), dtype=torch.int64, device=device),
        torch.empty((num_experts + 1,), dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
    )


def _fake_moe(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_moe(x, *rest)
    w_in, w_out, w_gate, max_slots, need_pre = rest[2], rest[3], rest[4], rest[14], rest[15]
    kept = (max_slots, w_in.shape[1])
    return (
        torch.empty((x.shape[0], w_out.shape[1]), dtype=x.dtype, device=x.device),
        new_or_none(need_pre, kept, x),
        new_or_none(need_pre and w_gate is not None, kept, x),
    )


def _fake_moe_backward(grad: Tensor, x: Tensor, expert_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check_moe_backward(grad, x, expert_ids, *rest)
    need = reference.moe_needs(rest[-1])
    inputs = (x, *rest[:7])
    return tuple(
        x.new_empty(0) if value is None else new_or_none(need[name], tuple(value.shape), value)
        for name, value in zip(reference.MOE_GRADIENTS, inputs, strict=True)
    )


def _fake_grouped(x: Tensor, group_ids: Tensor, weight: Tensor, packed: Any, current: Any, bias: Any) -> Tensor:
    _check_grouped(x, group_ids, weight, packed, current, bias)
    return torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device)


def _fake_grouped_backward(
    grad: Tensor, x: Tensor, group_ids: Tensor, weight: Tensor, bias: Any, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_grouped_backward(grad, x, group_ids, weight, bias)
    return (
        new_or_none(need_x, tuple(x.shape), x),
        new_or_none(need_weight, tuple(weight.shape), weight),
        new_or_none(need_bias, tuple(weight.shape[:2]), x if bias is None else bias),
    )


_order_op = define(
    "expert_order(Tensor expert_ids, SymInt num_experts) -> (Tensor order, Tensor offsets, Tensor positions)", _fake_order
)
_EXPERTS = (
    "Tensor x, Tensor expert_ids, Tensor weights, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_out, "
    "Tensor? b_gate, "
)
_moe_op = define(
    f"moe_mlp({_EXPERTS}Tensor? packed_in, Tensor? packed_out, Tensor? packed_gate, Tensor? current, Tensor? residual, "
    "int activation, SymInt max_slots, bool need_pre) -> (Tensor out, Tensor pre, Tensor pre_gate)",
    _fake_moe,
)
_moe_backward_op = define(
    f"moe_mlp_backward(Tensor grad, {_EXPERTS}Tensor pre, Tensor pre_gate, int activation, int needs) -> (Tensor grad_x, "
    "Tensor grad_weights, Tensor grad_w_in, Tensor grad_w_out, Tensor grad_w_gate, Tensor grad_b_in, Tensor grad_b_out, "
    "Tensor grad_b_gate)",
    _fake_moe_backward,
)
_grouped_op = define(
    "grouped_linear(Tensor x, Tensor group_ids, Tensor weight, Tensor? packed, Tensor? current, Tensor? bias) -> Tensor",
    _fake_grouped,
)
_grouped_backward_op = define(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor group_ids, Tensor weight, Tensor? bias, bool need_x, "
    "bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_grouped_backward,
)

ORDER_BACKENDS = (
    backends.cpu(("generic",), primary="expert_ids"),
    backends.cuda(primary="expert_ids"),
    backends.triton((torch.int64,), primary="expert_ids"),
    backends.REFERENCE,
)
MOE_BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, tier_of=matrix_tier("w_in")),
    backends.triton(backends.HALF_AND_SINGLE),
    backends.REFERENCE,
)
GROUPED_BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, tier_of=matrix_tier("weight")),
    backends.triton(backends.HALF_AND_SINGLE),
    backends.REFERENCE,
)

implement(
    _order_op,
    ORDER_BACKENDS,
    "expert_ids",
    check=_check_order,
    reference=reference.expert_order_op,
    triton=backends.triton_kernel("moe", "expert_order"),
)
implement(
    _moe_op,
    MOE_BACKENDS,
    "x",
    check=_check_moe,
    reference=reference.moe_mlp_op,
    triton=backends.triton_kernel("moe", "moe_mlp"),
)
implement(
    _moe_backward_op,
    MOE_BACKENDS,
    "x",
    check=_check_moe_backward,
    reference=reference.moe_mlp_backward_op,
    triton=backends.triton_kernel("moe", "moe_mlp_backward"),
)
implement(
    _grouped_op,
    GROUPED_BACKENDS,
    "x",
    check=_check_grouped,
    reference=reference.grouped_linear_op,
    triton=backends.triton_kernel("moe", "grouped_linear"),
)
implement(
    _grouped_backward_op,
    GROUPED_BACKENDS,
    "x",
    check=_check_grouped_backward,
    reference=reference.grouped_linear_backward_op,
    triton=backends.triton_kernel("moe", "grouped_linear_backward"),
)


# --- autograd ---------------------------------------------------------------------------------------------------------
# The operator's inputs that have gradients, in the order of MOE_GRADIENTS.
_DIFFERENTIABLE = (0, 2, 3, 4, 5, 6, 7, 8)
_RESIDUAL, _INPUTS = 13, 17


def _moe_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.activation = inputs[14]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _moe_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    results: list[Any] = [None] * _INPUTS
    if grad is None:
        return tuple(results)
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    inputs, kept = saved[:9], saved[9:]
    x = inputs[0]
    wanted = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
    needs = sum(1 << bit for bit, need in enumerate(wanted) if need)
    gradients = _call_moe_backward(
        any(value is not None and value.requires_grad for value in (grad, *inputs)),
        grad.contiguous(),
        *inputs[:3],
        *(like_x(weight, x) for weight in inputs[3:6]),
        *inputs[6:],
        *kept,
        ctx.activation,
        needs,
    )
    for position, need, gradient in zip(_DIFFERENTIABLE, wanted, gradients, strict=True):
        if need:
            results[position] = gradient.to(inputs[position].dtype)
    results[_RESIDUAL] = grad if ctx.needs_input_grad[_RESIDUAL] else None
    return tuple(results)


_call_moe_backward = not_differentiable(_moe_backward_op)
_call_moe = differentiable(_moe_op, _moe_setup, _moe_backward, twice=False)


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, group_ids, weight, _, _, bias = inputs
    ctx.save_for_backward(x, group_ids, weight, bias)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, group_ids, weight, bias = ctx.saved_tensors
    need_x, _, need_weight, _, _, need_bias = ctx.needs_input_grad
    of_x, of_weight, of_bias = _call_grouped_backward(
        any(value is not None and value.requires_grad for value in (grad, x, weight, bias)),
        grad.contiguous(),
        x,
        group_ids,
        like_x(weight, x),
        bias,
        need_x,
        need_weight,
        need_bias,
    )
    return (
        of_x if need_x else None,
        None,
        of_weight.to(weight.dtype) if need_weight else None,
        None,
        None,
        of_bias if need_bias else None,
    )


_call_grouped_backward = not_differentiable(_grouped_backward_op)
_call_grouped = differentiable(_grouped_op, _grouped_setup, _grouped_backward, twice=False)
_call_order = not_differentiable(_order_op)


# --- public functions -------------------------------------------------------------------------------------------------
def dispatch(expert_ids: Tensor, num_experts: int) -> Dispatch:
    """Sorts the slots of a routing by expert, stably: what :func:`moe_mlp` does first.

    Args:
        expert_ids: [T, K] int64, -1 to num_experts - 1; -1 is an unused slot.
        num_experts: E.

    Returns:
        A :class:`Dispatch` (order [T K], offsets [E + 1], positions [T, K]), int64: order[positions[t, k]] = t K + k.

    Raises:
        TypeError, ValueError: expert_ids of another dtype, rank or range.
    """
    try:
        return Dispatch(*_call_order(False, dense(expert_ids), num_experts))
    except Exception:
        _check_order(expert_ids, num_experts)
        raise


class ExpertLora(NamedTuple):
    """Low-rank additions to the experts' weights, W + scale up down (LoRA, "Low-Rank Adaptation of Large Language Models",
    2021; the experts of Uni-MoE), of rank R; None where a weight has none.

    Attributes:
        down_in [E, R, C], up_in [E, H, R]: of w_in. down_out [E, R, H], up_out [E, N, R]: of w_out. down_gate [E, R, C],
        up_gate [E, H, R]: of w_gate.
        scale: alpha / R.
    """

    scale: float
    down_in: Tensor | None = None
    up_in: Tensor | None = None
    down_out: Tensor | None = None
    up_out: Tensor | None = None
    down_gate: Tensor | None = None
    up_gate: Tensor | None = None


def with_lora(weight: Any, down: Tensor | None, up: Tensor | None, scale: float, name: str) -> Any:
    """weight [E, N, K] + scale up [E, N, R] down [E, R, K], or the weight itself without factors."""
    if down is None and up is None:
        return weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"lora: expected {name} as a tensor, got {type(weight).__name__}")
    if down is None or up is None:
        raise ValueError(f"lora: expected both factors of {name}, or neither")
    rank = down.shape[1] if down.dim() == 3 else None
    if rank is None or down.shape != (weight.shape[0], rank, weight.shape[2]) or up.shape != (*weight.shape[:2], rank):
        raise ValueError(
            f"lora: expected [E, R, {weight.shape[2]}] and [E, {weight.shape[1]}, R] beside {name}, got {tuple(down.shape)} "
            f"and {tuple(up.shape)}"
        )
    return torch.baddbmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scale)


def dense_rows(x: Any) -> Any:
    """[T, C] with contiguous rows; what is no such tensor is left to the checks."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dim() < 1:
        return x
    rows = x if x.dim() == 2 else as_rows(x)
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def dense(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.layout == torch.strided else value


def _check_routing(routing: Any, x: Any) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing (mk.route, mk.fixed_routing), got {type(routing).__name__}")
    check_tokens(x, "x", "[..., C]", DTYPES)
    tokens = math.prod(x.shape[:-1])
    if routing.expert_ids.dim() != 2 or routing.expert_ids.shape[0] != tokens:
        raise ValueError(f"routing: expected one row for each of the {tokens} tokens, got {tuple(routing.expert_ids.shape)}")


def moe_mlp(
    x: Tensor,
    routing: Routing,
    w_in: WeightLike,
    w_out: WeightLike,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    w_gate: WeightLike | None = None,
    b_gate: Tensor | None = None,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
    lora: ExpertLora | None = None,
) -> Tensor:
    """A sparse mixture of experts: each token's feed-forward layers, weighted and summed, without padding, drops or atomics.

    out[t] = sum_k weights[t, k] f_e(x[t]) + residual[t] with e = expert_ids[t, k]; f_e(x) = h W_out[e]^T + b_out[e], with
    h = activation(x W_in[e]^T + b_in[e]), or with `w_gate` h = activation(x W_gate[e]^T + b_gate[e]) times
    (x W_in[e]^T + b_in[e]).

    Args:
        x: [..., C], T tokens in all; float32, bfloat16, float16 or float64.
        routing: of these T tokens, K slots each, to E experts: :func:`mmkernels.route` or :func:`mmkernels.fixed_routing`.
        w_in, w_gate: [E, H, C] in the dtype of x, any stride between experts, or each a :class:`PackedLinear` of such (int8
            for inference).
        w_out: [E, N, H], or a PackedLinear.
        b_in, b_gate, b_out: [E, H], [E, H], [E, N] or None; in the dtype of x, or float32 beside half precision.
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu"; of the gate where there is one.
        residual: None, or of the output's shape and dtype; added last: a skip connection, or what shared experts give.
        lora: low-rank additions to the weights.

    Returns:
        [..., N] in the dtype of x, or under autocast in autocast's; a token without slots in use gives its residual, or 0.
        Sums over the slots are float32 in their order, rounded once. Gradients of x, the weights (routing's and experts'),
        biases, residual and lora, not twice. Where a gradient is wanted, what went into the activation is kept, [S, H] for
        the S slots that can be in use (twice that with a gate); what the experts gave is never kept. The bits are the same
        for any number of threads, and a token's for any other tokens beside it.

    Raises:
        TypeError: an argument of another type, or dtypes differ.
        ValueError: shapes or devices do not fit, activation is none of these, an expert id out of range (on CUDA such a slot
            counts as unused), a bias beside a packed weight.
        NotImplementedError: a second derivative.

    Source: "Outrageously Large Neural Networks" (2017); "Mixtral of Experts" (2024); no padding: "MegaBlocks" (2022).
    """
    _check_routing(routing, x)
    if lora is not None:
        w_in = with_lora(w_in, lora.down_in, lora.up_in, lora.scale, "w_in")
        w_out = with_lora(w_out, lora.down_out, lora.up_out, lora.scale, "w_out")
        w_gate = with_lora(w_gate, lora.down_gate, lora.up_gate, lora.scale, "w_gate")
    given = (w_in, w_out, w_gate)
    w_in, b_in, packed_in = unpack(w_in, b_in, "w_in", "b_in")
    w_out, b_out, packed_out = unpack(w_out, b_out, "w_out", "b_out")
    packed_gate = None
    if w_gate is not None:
        w_gate, b_gate, packed_gate = unpack(w_gate, b_gate, "w_gate", "b_gate")
    code = activation_code(activation)
    late = None
    if (dtype := autocast_dtype(x)) is not None:
        x, b_in, b_out, b_gate = (cast(tensor, dtype) for tensor in (x, b_in, b_out, b_gate))
        w_in, packed_in = cast_weight(given[0], w_in, packed_in, dtype)
        w_out, packed_out = cast_weight(given[1], w_out, packed_out, dtype)
        w_gate, packed_gate = cast_weight(given[2], w_gate, packed_gate, dtype)
        residual, late = late_residual(residual, x)
    packs = (packed_in, packed_out, packed_gate)
    for packed, weight, name in zip(packs, given, ("w_in", "w_out", "w_gate"), strict=True):
        check_pack(weight, packed, x, name)
    w_in, w_out, w_gate = unit_stride(w_in, 3), unit_stride(w_out, 3), unit_stride(w_gate, 3)
    leading = x.shape[:-1]
    arguments = (
        dense_rows(x),
        dense(routing.expert_ids),
        dense(routing.weights.to(stats_dtype(x))),
        w_in,
        w_out,
        w_gate,
        dense(b_in),
        dense(b_out),
        dense(b_gate),
        *packs,
    )
    if residual is not None:
        residual = dense_rows(residual)
    max_slots = routing.max_slots
    if is_compiling():
        _check_moe(*arguments, None, residual, code, max_slots)
    try:
        grad = wants_gradient(arguments[0], *arguments[2:9], residual)
        weights = [w_in, w_out] if w_gate is None else [w_in, w_out, w_gate]
        current = current_packs(weights, list(packs[: len(weights)]))
        out = _call_moe(grad, *arguments, current, residual, code, max_slots, grad)[0]
    except Exception:
        _check_moe(*arguments, None, residual, code, max_slots)
        raise
    out = out.view(*leading, out.shape[1])
    return out if late is None else out + late


def grouped_linear(x: Tensor, group_ids: Tensor, weight: WeightLike, bias: Tensor | None = None) -> Tensor:
    """x[t] W[g]^T + bias[g] with g = group_ids[t]: a linear layer for each modality (or expert), chosen token by token.

    Args:
        x: [..., C], T tokens in all; float32, bfloat16, float16 or float64.
        group_ids: the leading shape of x, or [T]; int64, -1 to G - 1; -1 gives 0.
        weight: [G, N, C] in the dtype of x, any stride between groups, or a :class:`PackedLinear` of such.
        bias: [G, N] or None; in the dtype of x, or float32 beside half precision.

    Returns:
        [..., N] in the dtype of x, or under autocast in autocast's. Gradients of x, weight and bias, not twice. The bits are
        the same for any number of threads, and a token's for any other tokens beside it.

    Raises:
        TypeError: an argument of another type, or dtypes differ.
        ValueError: shapes or devices do not fit, a group id out of range (on CUDA it counts as -1), a bias beside a packed
            weight.
        NotImplementedError: a second derivative.

    Source: "Mixture-of-Transformers" (2024); "Mixture-of-Mamba" (2025).
    """
    given = weight
    weight, bias, packed = unpack(weight, bias, "weight", "bias")
    check_tokens(x, "x", "[..., C]", DTYPES)
    if (dtype := autocast_dtype(x)) is not None:
        x, bias = cast(x, dtype), cast(bias, dtype)
        weight, packed = cast_weight(given, weight, packed, dtype)
    check_pack(given, packed, x, "weight")
    weight = unit_stride(weight, 3)
    leading = x.shape[:-1]
    if isinstance(group_ids, Tensor) and group_ids.shape == leading:
        group_ids = group_ids.reshape(-1)
    rows, group_ids, bias = dense_rows(x), dense(group_ids), dense(bias)
    if is_compiling():
        _check_grouped(rows, group_ids, weight, packed, None, bias)
    try:
        grad = wants_gradient(rows, weight, bias)
        out = _call_grouped(grad, rows, group_ids, weight, packed, current_packs([weight], [packed]), bias)
    except Exception:
        _check_grouped(rows, group_ids, weight, packed, None, bias)
        raise
    return out.view(*leading, out.shape[1])
