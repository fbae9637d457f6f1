"""Linear layers and MLPs, plain and gated, with their activation and residual in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels import runtime
from mmkernels.ops import backends
from mmkernels.ops.checks import check_gradient, check_matrix, check_parameter, check_tokens
from mmkernels.ops.entry import autocast_dtype, define, differentiable, implement, not_differentiable, wants_gradient
from mmkernels.ops.packed_linear import DTYPES, PackedLinear, cast, cast_weight, check_pack, current_packs, unpack
from mmkernels.reference import linear as reference

ACTIVATIONS = reference.ACTIVATIONS
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

WeightLike: TypeAlias = Tensor | PackedLinear


# --- checks -----------------------------------------------------------------------------------------------------------
def activation_code(activation: Any) -> int:
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"activation: expected a name or None, got {type(activation).__name__}")
    if activation not in _CODES:
        raise ValueError(f"activation: expected one of {', '.join(map(str, ACTIVATIONS))}, got {activation!r}")
    return _CODES[activation]


def check_weight(weight: Any, name: str, shape: tuple[Any, ...], x: Tensor, packed: Tensor | None) -> None:
    """[N, K], or with a `shape` of three sizes [E, N, K], in the dtype of x (of any dtype beside its packed form); None in
    `shape` is any size."""
    check_matrix(weight, name, "[N, K]" if len(shape) == 2 else "[E, N, K]", DTYPES)
    if weight.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {weight.device}")
    if packed is None and weight.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    if any(want is not None and got != want for got, want in zip(weight.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(weight.shape)}")


def _check_residual(residual: Any, x: Tensor, cols: Any) -> None:
    if residual is None:
        return
    shape = (*x.shape[:-1], cols)
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a tensor {tuple(shape)} or None, got {type(residual).__name__}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected the device of x, {x.device}, got {residual.device}")
    if tuple(residual.shape) != shape:
        raise ValueError(f"residual: expected the shape of the output, {tuple(shape)}, or one that expands to it, "
                         f"got {tuple(residual.shape)}")  # fmt: skip


def _check_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    current: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    *_: Any,
) -> None:
    check_tokens(x, "x", "[..., K]", DTYPES)
    check_weight(weight, "weight", (None, x.shape[-1]), x, packed)
    check_parameter(bias, "bias", weight.shape[0], x, "x")
    _check_residual(residual, x, weight.shape[0])


def _check_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre: Tensor | None, bias: Tensor | None, *_: Any
) -> None:
    _check_linear(x, weight, None, None, bias, None, 0)
    shape = (*x.shape[:-1], weight.shape[0])
    check_gradient(grad, "grad", shape, (x.dtype,), x)
    check_gradient(pre, "pre", shape, (x.dtype,), x)


def _check_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    packed_in: Tensor | None,
    packed_out: Tensor | None,
    packed_gate: Tensor | None,
    current: Tensor | None,
    residual: Tensor | None,
    *_: Any,
) -> None:
    check_tokens(x, "x", "[..., K]", DTYPES)
    check_weight(w_in, "w_in", (None, x.shape[-1]), x, packed_in)
    hidden = w_in.shape[0]
    if w_gate is not None:
        check_weight(w_gate, "w_gate", tuple(w_in.shape), x, packed_gate)
    elif b_gate is not None:
        raise ValueError("b_gate: expected None where there is no w_gate")
    check_weight(w_out, "w_out", (None, hidden), x, packed_out)
    check_parameter(b_in, "b_in", hidden, x, "x")
    check_parameter(b_out, "b_out", w_out.shape[0], x, "x")
    check_parameter(b_gate, "b_gate", hidden, x, "x")
    _check_residual(residual, x, w_out.shape[0])


def _check_mlp_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    *_: Any,
) -> None:
    _check_mlp(x, w_in, w_out, w_gate, b_in, b_out, b_gate, None, None, None, None, None)
    check_gradient(grad, "grad", (*x.shape[:-1], w_out.shape[0]), (x.dtype,), x)
    check_gradient(pre, "pre", (*x.shape[:-1], w_in.shape[0]), (x.dtype,), x)
    if w_gate is not None:
        check_gradient(pre_gate, "pre_gate", (*x.shape[:-1], w_in.shape[0]), (x.dtype,), x)


# --- operators --------------------------------------------------------------------------------------------------------
def _new(x: Tensor, cols: Any) -> Tensor:
    return torch.empty((*x.shape[:-1], cols), dtype=x.dtype, device=x.device)


def new_or_none(needed: bool, shape: tuple[Any, ...], like: Tensor) -> Tensor:
    return torch.empty(shape if needed else (0,), dtype=like.dtype, device=like.device)


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    current: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    need_pre: bool,
) -> tuple[Tensor, Tensor]:
    _check_linear(x, weight, packed, current, bias, residual, activation)
    cols = weight.shape[0]
    return _new(x, cols), new_or_none(need_pre, (*x.shape[:-1], cols), x)


def _fake_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor | None,
    bias: Tensor | None,
    activation: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_linear_backward(grad, x, weight, pre, bias)
    return (
        new_or_none(need_x, tuple(x.shape), x),
        new_or_none(need_weight, tuple(weight.shape), x),
        new_or_none(need_bias, (weight.shape[0],), x if bias is None else bias),
    )


def _fake_mlp(x: Tensor, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_mlp(x, w_in, w_out, w_gate, *rest)
    hidden, need_pre = (*x.shape[:-1], w_in.shape[0]), rest[-1]
    pre_gate = new_or_none(need_pre and w_gate is not None, hidden, x)
    return _new(x, w_out.shape[0]), new_or_none(need_pre, hidden, x), pre_gate


def _fake_mlp_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _check_mlp_backward(grad, x, w_in, w_out, w_gate, b_in, b_out, b_gate, pre, pre_gate)
    need = reference.mlp_needs(needs)
    hidden, gated = w_in.shape[0], w_gate is not None

    def bias(name: str, size: Any, like: Tensor | None) -> Tensor:
        return new_or_none(need[name] and (name != "b_gate" or gated), (size,), x if like is None else like)

    return (
        new_or_none(need["x"], tuple(x.shape), x),
        new_or_none(need["w_in"], tuple(w_in.shape), x),
        new_or_none(need["w_out"], tuple(w_out.shape), x),
        new_or_none(need["w_gate"] and gated, tuple(w_in.shape), x),
        bias("b_in", hidden, b_in),
        bias("b_out", w_out.shape[0], b_out),
        bias("b_gate", hidden, b_gate),
    )


_linear_op = define(
    "linear(Tensor x, Tensor weight, Tensor? packed, Tensor? current, Tensor? bias, Tensor? residual, int activation, "
    "bool need_pre) -> (Tensor out, Tensor pre)",
    _fake_linear,
)
_linear_backward_op = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? pre, Tensor? bias, int activation, bool need_x, "
    "bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_linear_backward,
)
_mlp_op = define(
    "mlp(Tensor x, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_out, Tensor? b_gate, "
    "Tensor? packed_in, Tensor? packed_out, Tensor? packed_gate, Tensor? current, Tensor? residual, int activation, "
    "bool need_pre) -> (Tensor out, Tensor pre, Tensor pre_gate)",
    _fake_mlp,
)
_mlp_backward_op = define(
    "mlp_backward(Tensor grad, Tensor x, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_out, "
    "Tensor? b_gate, Tensor pre, Tensor pre_gate, int activation, int needs) -> (Tensor grad_x, Tensor grad_w_in, "
    "Tensor grad_w_out, Tensor grad_w_gate, Tensor grad_b_in, Tensor grad_b_out, Tensor grad_b_gate)",
    _fake_mlp_backward,
)


def _no_gate(arguments: backends.Arguments) -> str | None:
    return "without w_gate there is nothing for it to fuse" if arguments["w_gate"] is None else None


def matrix_tier(*weights: str) -> Callable[[backends.Arguments], str | None]:
    """Matrix tiles multiply bfloat16, and int8 of packed weights; AVX512_BF16 bfloat16; other calls run vectors."""

    def tier(arguments: backends.Arguments) -> str | None:
        kinds = {getattr(arguments.get(name), "dtype", None) for name in weights}
        is_int8, is_bfloat16 = torch.int8 in kinds, arguments["x"].dtype == torch.bfloat16
        if (is_int8 or is_bfloat16) and runtime.isa() == "amx":
            return "amx"
        return "avx512_bf16" if is_bfloat16 and not is_int8 and runtime.has_bf16_pairs() else None

    return tier


LINEAR_BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, tier_of=matrix_tier("weight")),
    backends.torch_cuda("a plain matrix product is best left to cuBLAS"),
    backends.REFERENCE,
)
MLP_BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, tier_of=matrix_tier("w_in")),
    backends.triton(backends.HALF_AND_SINGLE, extra=_no_gate),
    backends.torch_cuda("plain matrix products are best left to cuBLAS"),
    backends.REFERENCE,
)


implement(
    _linear_op, LINEAR_BACKENDS, "x", check=_check_linear, torch_formula=reference.linear_op, reference=reference.linear_op
)
implement(
    _linear_backward_op,
    LINEAR_BACKENDS,
    "x",
    check=_check_linear_backward,
    torch_formula=reference.linear_backward_op,
    reference=reference.linear_backward_op,
)
implement(
    _mlp_op,
    MLP_BACKENDS,
    "x",
    check=_check_mlp,
    triton=backends.triton_kernel("linear", "mlp"),
    torch_formula=reference.mlp_op,
    reference=reference.mlp_op,
)
implement(
    _mlp_backward_op,
    MLP_BACKENDS,
    "x",
    check=_check_mlp_backward,
    triton=backends.triton_kernel("linear", "mlp_backward"),
    torch_formula=reference.mlp_backward_op,
    reference=reference.mlp_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def like_x(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """The weight that int8 was made of may have another dtype than x."""
    return weight if weight is None or weight.dtype == x.dtype else weight.to(x.dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, bias, _, activation, _ = inputs
    ctx.save_for_backward(x, weight, output[1] if activation else None, bias)
    ctx.activation = activation
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    x, weight, pre, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    sources = (grad, x, weight)
    grad_x, grad_weight, grad_bias = _call_linear_backward(
        any(source.requires_grad for source in sources),
        grad.contiguous(),
        x,
        like_x(weight, x),
        pre,
        bias,
        ctx.activation,
        need[0],
        need[1],
        bias is not None and need[4],
    )
    return (
        grad_x if need[0] else None,
        grad_weight.to(weight.dtype) if need[1] else None,
        None,
        None,
        grad_bias if need[4] else None,
        grad if need[5] else None,
        None,
        None,
    )


_call_linear_backward = not_differentiable(_linear_backward_op)
_call_linear = differentiable(_linear_op, _linear_setup, _linear_backward, twice=False)


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.activation = inputs[12]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _mlp_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    results: list[Any] = [None] * 14
    if grad is None:
        return tuple(results)
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    inputs, (pre, pre_gate) = saved[:7], saved[7:]
    x = inputs[0]
    # mlp's first inputs are those that MLP_GRADIENTS names, in its order.
    wanted = ctx.needs_input_grad[: len(reference.MLP_GRADIENTS)]
    needs = sum(1 << bit for bit, need in enumerate(wanted) if need)
    gradients = _call_mlp_backward(
        any(value is not None and value.requires_grad for value in (grad, *inputs)),
        grad.contiguous(),
        x,
        *(like_x(weight, x) for weight in inputs[1:4]),
        *inputs[4:],
        pre,
        pre_gate,
        ctx.activation,
        needs,
    )
    for position, gradient in enumerate(gradients):
        if wanted[position]:
            results[position] = gradient.to(inputs[position].dtype)
    results[11] = grad if ctx.needs_input_grad[11] else None
    return tuple(results)


_call_mlp_backward = not_differentiable(_mlp_backward_op)
_call_mlp = differentiable(_mlp_op, _mlp_setup, _mlp_backward, twice=False)


# --- public functions -------------------------------------------------------------------------------------------------
def _laid_out(x: Any) -> Any:
    """x with rows that lie evenly in memory, which is x itself unless it is a slice of another kind."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_contiguous() or x.dim() == 0:
        return x
    return x if x.dim() == 2 and x.stride(-1) == 1 else x.contiguous()


def unit_stride(weight: Any, dims: int = 2) -> Any:
    """A matrix, or with `dims` of 3 matrices, with one dimension contiguous; what is none is left to the checks."""
    if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.is_contiguous() or weight.dim() != dims:
        return weight
    return weight if 1 in weight.stride()[-2:] else weight.contiguous()


def _expanded(residual: Any, x: Any, weight: Any) -> Any:
    """The residual in the output's shape; what cannot be expanded is left to the checks."""
    if not isinstance(residual, Tensor) or not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.dim() == 0:
        return residual
    shape = (*x.shape[:-1], weight.shape[0]) if weight.dim() > 0 else x.shape
    if residual.shape != shape:
        try:
            residual = residual.expand(shape)
        except RuntimeError:
            return residual
    return _laid_out(residual)


def linear(
    x: Tensor,
    weight: WeightLike,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, in one pass over the output.

    Args:
        x: [..., K]; float32, bfloat16, float16 or float64; any strides (what is no contiguous slice is copied first).
        weight: [N, K] in the dtype of x, as nn.Linear keeps it, or its transposed view; or a :class:`PackedLinear`, which
            has its own bias.
        bias: [N] or None; in the dtype of x, or float32 beside half precision.
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        residual: None, or what expands to the output's shape, in the dtype of x; added last.

    Returns:
        [..., N] in the dtype of x, or under autocast in autocast's; sums in float32 (float64 for float64 x), rounded once.
        Gradients of x, weight, bias and residual, not twice. The bits are the same for any number of threads, and for any
        batch that a row stands in.

    Raises:
        TypeError: x or weight is no dense tensor of these dtypes, or they differ.
        ValueError: shapes or devices do not fit, activation is none of these, bias beside a packed weight.
        NotImplementedError: a second derivative.

    On CUDA this is torch's own formula: a plain matrix product is best left to cuBLAS.

    Source: nn.Linear; the epilogue's fusions are those of the published systems' blocks.
    """
    given = weight
    weight, bias, packed = unpack(weight, bias, "weight", "bias")
    code = activation_code(activation)
    late = None
    if isinstance(x, Tensor) and (dtype := autocast_dtype(x)) is not None:
        x, bias = cast(x, dtype), cast(bias, dtype)
        weight, packed = cast_weight(given, weight, packed, dtype)
        residual, late = late_residual(residual, x)
    check_pack(given, packed, x, "weight")
    x, weight = _laid_out(x), unit_stride(weight)
    if residual is not None:
        residual = _expanded(residual, x, weight)
    if is_compiling():
        _check_linear(x, weight, packed, None, bias, residual, code)
    try:
        grad = wants_gradient(x, weight, bias, residual)
        current = current_packs([weight], [packed])
        out = _call_linear(grad, x, weight, packed, current, bias, residual, code, grad and code != 0)[0]
    except Exception:
        _check_linear(x, weight, packed, None, bias, residual, code)
        raise
    return out if late is None else out + late


def mlp(
    x: Tensor,
    w_in: WeightLike,
    w_out: WeightLike,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    w_gate: WeightLike | None = None,
    b_gate: Tensor | None = None,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """A transformer's feed-forward layer, plain or gated, without a tensor of hidden activations.

    h W_out^T + b_out + residual, with h = activation(x W_in^T + b_in), or with `w_gate`
    h = activation(x W_gate^T + b_gate) (x W_in^T + b_in): SwiGLU with "silu", GeGLU with "gelu", ReGLU with "relu".

    Args:
        x: [..., K]; float32, bfloat16, float16 or float64; any strides (what is no contiguous slice is copied first).
        w_in, w_gate: [H, K] in the dtype of x, or each a :class:`PackedLinear`, which has its own bias.
        w_out: [N, H], or a PackedLinear.
        b_in, b_gate, b_out: [H], [H], [N] or None; in the dtype of x, or float32 beside half precision.
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu"; of the gate where there is one.
        residual: None, or what expands to the output's shape, in the dtype of x; added last.

    Returns:
        [..., N] in the dtype of x, or under autocast in autocast's. Groups of rows pass both products while their hidden
        activations are in the cache. Where a gradient is wanted, what went into the activation is kept, [..., H] (twice that
        with a gate), and the hidden activations are computed again in backward.

    Raises:
        TypeError: x or a weight is no dense tensor of these dtypes, or they differ.
        ValueError: shapes or devices do not fit, activation is none of these, a bias beside a packed weight.
        NotImplementedError: a second derivative.

    On CUDA the products are cuBLAS's, and the gate is a Triton kernel between them.

    Source: "Attention Is All You Need" (2017); "GLU Variants Improve Transformer" (2020).
    """
    given = (w_in, w_out, w_gate)
    w_in, b_in, packed_in = unpack(w_in, b_in, "w_in", "b_in")
    w_out, b_out, packed_out = unpack(w_out, b_out, "w_out", "b_out")
    packed_gate = None
    if w_gate is not None:
        w_gate, b_gate, packed_gate = unpack(w_gate, b_gate, "w_gate", "b_gate")
    code = activation_code(activation)
    late = None
    if isinstance(x, Tensor) and (dtype := autocast_dtype(x)) is not None:
        x, b_in, b_out, b_gate = (cast(tensor, dtype) for tensor in (x, b_in, b_out, b_gate))
        w_in, packed_in = cast_weight(given[0], w_in, packed_in, dtype)
        w_out, packed_out = cast_weight(given[1], w_out, packed_out, dtype)
        w_gate, packed_gate = cast_weight(given[2], w_gate, packed_gate, dtype)
        residual, late = late_residual(residual, x)
    packs = (packed_in, packed_out, packed_gate)
    for packed, weight, name in zip(packs, given, ("w_in", "w_out", "w_gate"), strict=True):
        check_pack(weight, packed, x, name)
    x, w_in, w_out, w_gate = _laid_out(x), unit_stride(w_in), unit_stride(w_out), unit_stride(w_gate)
    if residual is not None:
        residual = _expanded(residual, x, w_out)
    arguments = (x, w_in, w_out, w_gate, b_in, b_out, b_gate, *packs)
    if is_compiling():
        _check_mlp(*arguments, None, residual)
    try:
        grad = wants_gradient(*arguments[:7], residual)
        weights = [w_in, w_out] if w_gate is None else [w_in, w_out, w_gate]
        current = current_packs(weights, list(packs[: len(weights)]))
        out = _call_mlp(grad, *arguments, current, residual, code, grad)[0]
    except Exception:
        _check_mlp(*arguments, None, residual)
        raise
    return out if late is None else out + late


# --- autocast ---------------------------------------------------------------------------------------------------------
def late_residual(residual: Any, x: Tensor) -> tuple[Any, Tensor | None]:
    """(what the kernel adds, what is added after the call, by torch's rules of promotion)."""
    if isinstance(residual, Tensor) and residual.dtype != x.dtype:
        return None, residual
    return residual, None
