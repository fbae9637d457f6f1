"""Parameter-free cross-attention: scores of activated queries and keys, without softmax, the lowest of each row dropped."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import check_float, check_gradient, check_tensor
from mmkernels.ops.entry import (
    autocast_dtype,
    define,
    differentiable,
    implement,
    not_differentiable,
    stats_dtype,
    wants_gradient,
)
from mmkernels.ops.linear import matrix_tier
from mmkernels.ops.packed_linear import DTYPES, cast
from mmkernels.reference import silu_attention as reference


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_beside(value: Tensor, name: str, shape: str, sizes: tuple[Any, Any, Any], x: Tensor) -> None:
    """Of the dtype and device of x; None in `sizes` is any size."""
    check_tensor(value, name, shape, DTYPES)
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    if any(want is not None and got != want for got, want in zip(value.shape, sizes, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: expected {shape} of sizes ({wanted}), got {tuple(value.shape)}")


def _check(
    x: Tensor, keys: Tensor, values: Tensor, drop_ratio: float, key_is_activated: bool, scale: float, *_: Any
) -> None:
    check_tensor(x, "x", "[B, L, D]", DTYPES)
    _check_beside(keys, "keys", "[B, M, D]", (x.shape[0], None, x.shape[2]), x)
    _check_beside(values, "values", "[B, M, Dv]", (x.shape[0], keys.shape[1], None), x)
    check_float(drop_ratio, "drop_ratio")
    if not 0 <= drop_ratio < 1:
        raise ValueError(f"drop_ratio: expected at least 0 and below 1, got {drop_ratio}")
    check_float(scale, "scale")


def _check_backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    threshold: Tensor,
    drop_ratio: float,
    key_is_activated: bool,
    scale: float,
    *_: Any,
) -> None:
    _check(x, keys, values, drop_ratio, key_is_activated, scale)
    check_gradient(grad, "grad", (*x.shape[:2], values.shape[2]), (x.dtype,), x)
    check_gradient(threshold, "threshold", tuple(x.shape[:2]), (stats_dtype(x),), x)


# --- operators --------------------------------------------------------------------------------------------------------
def _fake(
    x: Tensor, keys: Tensor, values: Tensor, drop_ratio: float, key_is_activated: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _check(x, keys, values, drop_ratio, key_is_activated, scale)
    out = torch.empty((*x.shape[:2], values.shape[2]), dtype=x.dtype, device=x.device)
    return out, torch.empty(x.shape[:2], dtype=stats_dtype(x), device=x.device)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    threshold: Tensor,
    drop_ratio: float,
    key_is_activated: bool,
    scale: float,
    need_x: bool,
    need_keys: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(grad, x, keys, values, threshold, drop_ratio, key_is_activated, scale)

    def like(tensor: Tensor, needed: bool) -> Tensor:
        return torch.empty(tensor.shape if needed else (0,), dtype=x.dtype, device=x.device)

    return like(x, need_x), like(keys, need_keys), like(values, need_values)


_op = define(
    "silu_attention(Tensor x, Tensor keys, Tensor values, float drop_ratio, bool key_is_activated, float scale) -> "
    "(Tensor out, Tensor threshold)",
    _fake,
)
_backward_op = define(
    "silu_attention_backward(Tensor grad, Tensor x, Tensor keys, Tensor values, Tensor threshold, float drop_ratio, "
    "bool key_is_activated, float scale, bool need_x, bool need_keys, bool need_values) -> "
    "(Tensor grad_x, Tensor grad_keys, Tensor grad_values)",
    _fake_backward,
)


def _few_keys(arguments: backends.Arguments) -> str | None:
    """Forward holds a whole row of scores, and backward must make them as forward did: one reason for both."""
    limit = importlib.import_module("mmkernels.triton.silu_attention").MAX_KEYS
    keys = arguments["keys"].shape[1]
    return None if keys <= limit else f"there are {keys} keys; the Triton kernels take {limit}"


BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, tier_of=matrix_tier("keys")),
    backends.triton(backends.HALF_AND_SINGLE, extra=_few_keys),
    backends.REFERENCE,
)

implement(
    _op,
    BACKENDS,
    "x",
    check=_check,
    triton=backends.triton_kernel("silu_attention", "silu_attention"),
    reference=reference.silu_attention_op,
)
implement(
    _backward_op,
    BACKENDS,
    "x",
    check=_check_backward,
    triton=backends.triton_kernel("silu_attention", "silu_attention_backward"),
    reference=reference.silu_attention_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, keys, values, *ctx.plan = inputs
    ctx.save_for_backward(x, keys, values, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    x, keys, values, threshold = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = _call_backward(
        any(source.requires_grad for source in (grad, x, keys, values)),
        grad.contiguous(),
        x,
        keys,
        values,
        threshold,
        *ctx.plan,
        *needs,
    )
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None, None)


_call_backward = not_differentiable(_backward_op)
_call = differentiable(_op, _setup, _backward, twice=False)


# --- public function --------------------------------------------------------------------------------------------------
def _laid_out(value: Any) -> Any:
    """With a contiguous last dimension; what is no such tensor is left to the checks."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.dim() != 3:
        return value
    return value if value.stride(2) == 1 or value.shape[2] <= 1 else value.contiguous()


def _of_one_dtype(*tensors: Any) -> bool:
    return len({tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}) == 1


def silu_attention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    drop_ratio: float = 0.0,
    key_is_activated: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Cross-attention without parameters, softmax or heads: (S * keep) values with S = scale * silu(x) silu(keys)^T.

    In each row of S, keep is 1 where a score is at least t, the element of rank floor(drop_ratio * M) in ascending order
    (from 0), else 0: that many of the lowest scores are dropped, and ties with t are kept. Scores have their sign, so that
    negative ones go first.

    Args:
        x: [B, L, D]; float32, bfloat16, float16 or float64; any strides (a strided last dimension is copied first).
        keys: [B, M, D], as x.
        values: [B, M, Dv], as x.
        drop_ratio: the part of the M keys that each row drops, at least 0 and below 1; 0 keeps all.
        key_is_activated: keys are silu(keys) already, as where many layers share them.
        scale: a factor of the scores.

    Returns:
        [B, L, Dv], contiguous, in the dtype of x, or under autocast in autocast's (into which operands of one dtype are not
        cast on the CPU, where it would gain nothing). silu(x) and silu(keys) are rounded to
        the dtype of x; scores, thresholds and sums are float32 (float64 for float64 x). On the CPU the scores enter the
        second product as they are, on CUDA rounded to the dtype of x. Gradients of x, keys and values, not twice; keep is a
        constant in them. Forward saves one number a row, which separates the dropped scores from the kept, and backward
        makes the scores again, bit for bit. The bits are the same for any number of threads.

    Raises:
        TypeError: x, keys or values is no dense floating-point tensor, or they differ in dtype; drop_ratio or scale is no
            float, key_is_activated no bool.
        ValueError: shapes or devices do not fit; drop_ratio out of range.
        NotImplementedError: a second derivative.

    Source: "ADEM-VL: Adaptive and Embedded Fusion for Efficient Vision-Language Tuning" (2024): scale 1, drop_ratio 0.1.
    """
    late = autocast_dtype(x) if isinstance(x, Tensor) and x.dtype != torch.float64 else None
    if late is not None and not (x.is_cpu and _of_one_dtype(x, keys, values)):
        x, keys, values = (cast(value, late) for value in (x, keys, values))
    x, keys, values = _laid_out(x), _laid_out(keys), _laid_out(values)
    if not isinstance(key_is_activated, bool):
        raise TypeError(f"key_is_activated: expected a bool, got {type(key_is_activated).__name__}")
    arguments = (x, keys, values, drop_ratio, key_is_activated, scale)
    if is_compiling():
        _check(*arguments)
    try:
        out = _call(wants_gradient(x, keys, values), *arguments)[0]
    except Exception:
        _check(*arguments)
        raise
    return out if late is None else out.to(late)
