"""LayerNorm and RMS norm over the last dimension, alone and with what stands around them in a transformer block: the
residual and its gate before, the scale and shift of an adaptive norm after."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import check_float, check_gradient, check_parameter, check_rows, check_vectors
from mmkernels.ops.entry import (
    autocast_widens_norms,
    contiguous,
    define,
    differentiable,
    implement,
    not_differentiable,
    stats_dtype,
    wants_gradient,
)
from mmkernels.reference import norm as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_norm(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    scale_offset: float,
    *_: Any,
    name: str = "x",
) -> None:
    check_rows(x, name, DTYPES)
    if residual is not None:
        check_rows(residual, "residual", DTYPES, like=x, like_name=name)
    if gate is not None and residual is None:
        raise ValueError("gate: expected with residual only, which it multiplies x for; got no residual")
    check_parameter(weight, "weight", x.size(-1), x, name)
    check_parameter(bias, "bias", x.size(-1), x, name)
    for vectors, called in ((gate, "gate"), (shift, "shift"), (scale, "scale")):
        if vectors is not None:
            check_vectors(vectors, called, x, name)
    if (shift is None) != (scale is None):
        raise ValueError("scale: expected with shift, or neither")
    if shift is not None and scale is not None and (shift.shape == x.shape) != (scale.shape == x.shape):
        raise ValueError("scale: expected one vector a sample as shift, or one a token as shift")
    check_float(eps, "eps")
    check_float(scale_offset, "scale_offset")


def _check_norm_backward(
    grad_normed: Tensor | None,
    grad_summed: Tensor | None,
    normalised: Tensor,
    stats: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_offset: float,
    rms: bool,
    *_: Any,
) -> None:
    if (x is None) != (gate is None):
        raise ValueError("x: expected with gate only")
    _check_norm(normalised, normalised, gate, weight, bias, shift, scale, 0.0, scale_offset, name="normalised")
    if x is not None:
        check_rows(x, "x", DTYPES, like=normalised, like_name="normalised")
    check_gradient(grad_normed, "grad_normed", normalised.shape, (normalised.dtype, stats_dtype(normalised)), normalised)
    check_gradient(grad_summed, "grad_summed", normalised.shape, (normalised.dtype,), normalised)
    check_gradient(stats, "stats", _stats_shape(normalised, rms), (stats_dtype(normalised),), normalised)


def _stats_shape(x: Tensor, rms: bool) -> tuple[int, int]:
    return 1 if rms else 2, math.prod(x.shape[:-1])


# --- operators --------------------------------------------------------------------------------------------------------
def _fake_norm(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    scale_offset: float,
    rms: bool,
    float_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, residual, gate, weight, bias, shift, scale, eps, scale_offset)
    normed = torch.empty(x.shape, dtype=stats_dtype(x) if float_normed else x.dtype, device=x.device)
    summed = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty(_stats_shape(x, rms), dtype=stats_dtype(x), device=x.device)
    return normed, summed, stats


def _fake_norm_backward(
    grad_normed: Tensor | None,
    grad_summed: Tensor | None,
    normalised: Tensor,
    stats: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_offset: float,
    rms: bool,
    need_gate: bool,
    need_weight: bool,
    need_bias: bool,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(needed: bool, tensor: Tensor | None) -> Tensor:
        shape = tensor.shape if needed and tensor is not None else (0,)
        return torch.empty(shape, dtype=normalised.dtype if tensor is None else tensor.dtype, device=normalised.device)

    return (
        like(True, normalised),
        like(gate is not None, normalised),
        like(need_gate, gate),
        like(need_weight, weight),
        like(need_bias, bias),
        like(need_modulation, shift),
        like(need_modulation, scale),
    )


_norm_op = define(
    "norm(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, float eps, "
    "float scale_offset, bool rms, bool float_normed) -> (Tensor normed, Tensor summed, Tensor stats)",
    _fake_norm,
)
_norm_backward_op = define(
    "norm_backward(Tensor? grad_normed, Tensor? grad_summed, Tensor normalised, Tensor stats, Tensor? x, Tensor? gate, "
    "Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, float scale_offset, bool rms, bool need_gate, "
    "bool need_weight, bool need_bias, bool need_modulation) -> (Tensor grad_normalised, Tensor grad_x, Tensor grad_gate, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_shift, Tensor grad_scale)",
    _fake_norm_backward,
)


def _backends(primary: str) -> tuple[backends.Backend, ...]:
    return (
        backends.cpu(backends.VECTOR_TIERS, primary=primary),
        backends.triton(backends.HALF_AND_SINGLE, primary=primary, extra=backends.few_channels("norm", primary=primary)),
        backends.REFERENCE,
    )


BACKENDS = _backends("x")


implement(
    _norm_op, BACKENDS, "x", check=_check_norm, triton=backends.triton_kernel("norm", "norm"), reference=reference.norm_op
)
implement(
    _norm_backward_op,
    _backends("normalised"),
    "normalised",
    check=_check_norm_backward,
    triton=backends.triton_kernel("norm", "norm_backward"),
    reference=reference.norm_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, gate, weight, bias, shift, scale, _, scale_offset, rms, _ = inputs
    _, summed, stats = output
    ctx.save_for_backward(
        x if residual is None else summed, stats, None if gate is None else x, gate, weight, bias, shift, scale
    )
    ctx.plan = (scale_offset, rms)
    ctx.added = residual is not None
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    normalised, stats, x, gate, weight, bias, shift, scale = ctx.saved_tensors
    need_x, need_residual, need_gate, need_weight, need_bias, need_shift, need_scale, *_ = ctx.needs_input_grad
    sources = (grad_normed, grad_summed, normalised, x, gate, weight, bias, shift, scale)
    grad, grad_x, grad_gate, grad_weight, grad_bias, grad_shift, grad_scale = _call_norm_backward(
        any(source is not None and source.requires_grad for source in sources),
        contiguous(grad_normed),
        contiguous(grad_summed) if ctx.added else None,
        normalised,
        stats,
        x,
        gate,
        weight,
        bias,
        shift,
        scale,
        *ctx.plan,
        need_gate,
        need_weight,
        need_bias,
        need_shift or need_scale,
    )
    return (
        None if not need_x else grad if gate is None else grad_x,
        grad if need_residual else None,
        grad_gate if need_gate else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        grad_shift if need_shift else None,
        grad_scale if need_scale else None,
        None,
        None,
        None,
        None,
    )


_call_norm_backward = not_differentiable(_norm_backward_op)
_call_norm = differentiable(_norm_op, _setup, _backward, twice=False)


def _call(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator by its arguments up to `rms`. Its entry makes every check at a tenth of the cost of those in Python;
    where it refuses, these say why."""
    if is_compiling():
        _check_norm(*args)
    try:
        x = args[0]
        return _call_norm(wants_gradient(*args[:7]), *args, not x.is_cpu and autocast_widens_norms(x.device))
    except Exception:
        _check_norm(*args)
        raise


# --- public functions -------------------------------------------------------------------------------------------------
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension: (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        x: [..., C], any leading dimensions; float32, bfloat16, float16 or float64; any strides with a contiguous last
            dimension.
        weight, bias: [C] or None; in the dtype of x, or float32 beside bfloat16 and float16.
        eps: added to the variance.

    Returns:
        [..., C], contiguous, in the dtype of x; under autocast on CUDA float32, as F.layer_norm's is. Mean and variance
        are float32 (float64 for float64 x).

    Raises:
        TypeError: x is no dense floating-point tensor, weight or bias of a dtype that does not fit it, eps no float.
        ValueError: x is a scalar or has a strided last dimension, weight or bias of another device or length than fits x.
        NotImplementedError: a second derivative.

    Source: "Layer Normalization" (2016).
    """
    return _call(x, None, None, weight, bias, None, None, eps, 1.0, False)[0]


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last dimension: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [..., C], as in :func:`layer_norm`.
        weight: [C] or None; in the dtype of x, or float32 beside bfloat16 and float16.
        eps: added to the mean square.

    Returns:
        [..., C], contiguous, in the dtype of x; under autocast on CUDA float32, as F.rms_norm's is.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`layer_norm`.

    Source: "Root Mean Square Layer Normalization" (2019).
    """
    return _call(x, None, None, weight, None, None, None, eps, 1.0, True)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x + residual and its LayerNorm, in one pass that writes both: (normed, summed).

    Args:
        x: [..., C], as in :func:`layer_norm`.
        residual: as x, in its shape and dtype; its strides are its own.
        weight, bias: [C] or None; in the dtype of x, or float32 beside bfloat16 and float16.
        eps: added to the variance.

    Returns:
        (normed, summed), each [..., C] and contiguous. summed is rounded to the dtype of x, and what is normalised is the
        rounded sum; normed is as the result of :func:`layer_norm`.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`layer_norm`; a residual of another shape, dtype or device.

    Source: "Layer Normalization" (2016), in the pre-norm transformer block.
    """
    _require(residual, "residual")
    return _call(x, residual, None, weight, bias, None, None, eps, 1.0, False)[:2]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x + residual and its RMS norm, in one pass that writes both: (normed, summed).

    Args:
        x: [..., C], as in :func:`layer_norm`.
        residual: as x, in its shape and dtype; its strides are its own.
        weight: [C] or None; in the dtype of x, or float32 beside bfloat16 and float16.
        eps: added to the mean square.

    Returns:
        (normed, summed), as :func:`add_layer_norm`.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`add_layer_norm`.

    Source: "Root Mean Square Layer Normalization" (2019), in the pre-norm transformer block.
    """
    _require(residual, "residual")
    return _call(x, residual, None, weight, None, None, None, eps, 1.0, True)[:2]


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    scale_offset: float = 1.0,
    norm: Literal["layer", "rms"] = "layer",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Any:
    """The adaptive norm of diffusion transformers: norm(x) * (scale_offset + scale) + shift; with a residual,
    summed = residual + gate * x comes first and is returned too.

    Args:
        x: tokens [B, N, C] (or [B, ..., C]), as in :func:`layer_norm`.
        shift, scale: one vector a sample, [B, C] or [B, 1, C], or one a token, [B, N, C]; in the dtype of x, or float32
            beside bfloat16 and float16; any strides with a contiguous last dimension, such as the parts of one projection.
        weight, bias: [C] or None: the norm's own; bias for the layer norm only.
        eps: added to the variance or the mean square.
        scale_offset: 1.0 is DiT's form, 0.0 MDT's, whose scale is the whole factor.
        norm: "layer" or "rms".
        residual: as x, or None.
        gate: as shift, or None for 1; only with residual.

    Returns:
        out [B, N, C]; (out, summed) where residual is given. out is in the dtype of x, under autocast on CUDA float32;
        summed is rounded to the dtype of x, and what is normalised is the rounded sum.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`add_layer_norm`; shift, scale or gate of another shape, dtype
            or device than fits x; a gate without residual; an unknown norm, or a bias with "rms".

    Source: "Scalable Diffusion Models with Transformers" (2023): scale_offset 1, no weight. "Multimodal Diffusion
    Transformer" (2024): scale_offset 0, with a weight, eps 1e-5. Papers and code agree; only the published code of MDT says
    that it has no 1 + scale.
    """
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm: expected 'layer' or 'rms', got {norm!r}")
    if norm == "rms" and bias is not None:
        raise ValueError("bias: expected None with norm='rms', which has none")
    _require(shift, "shift")
    _require(scale, "scale")
    if isinstance(shift, Tensor) and isinstance(scale, Tensor) and shift.shape != scale.shape:
        shift, scale = _in_one_form(x, shift, scale)
    out, summed, _ = _call(x, residual, gate, weight, bias, shift, scale, eps, scale_offset, norm == "rms")
    return out if residual is None else (out, summed)


def _require(value: Any, name: str) -> None:
    if value is None:
        raise TypeError(f"{name}: expected a tensor, got None")


def _in_one_form(x: Any, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One of them one vector a sample, the other one a token: both one a token, without a copy."""
    check_rows(x, "x", DTYPES)
    check_vectors(shift, "shift", x, "x")
    check_vectors(scale, "scale", x, "x")
    if (shift.shape == x.shape) == (scale.shape == x.shape):
        return shift, scale

    def expanded(vectors: Tensor) -> Tensor:
        if vectors.shape == x.shape:
            return vectors
        return vectors.reshape(x.size(0), *[1] * (x.dim() - 2), x.size(-1)).expand(x.shape)

    return expanded(shift), expanded(scale)
