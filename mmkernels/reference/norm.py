"""Normalisation with what stands around it in a transformer block: the definition.

Sources: "Layer Normalization" (2016); "Root Mean Square Layer Normalization" (2019); adaptive layer norm as in "Scalable
Diffusion Models with Transformers" (2023) and "Multimodal Diffusion Transformer" (2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if weight is not None and weight.dtype != x.dtype:
        return (F.rms_norm(x.to(weight.dtype), x.shape[-1:], None, eps) * weight).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of the sum, the sum)."""
    summed = x + residual
    return layer_norm(summed, weight, bias, eps), summed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(RMS norm of the sum, the sum)."""
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def _beside(vectors: Tensor, x: Tensor) -> Tensor:
    """[B, C] as [B, 1, ..., C]; what has the rank of x already stays."""
    if vectors.dim() == x.dim():
        return vectors
    return vectors.reshape(vectors.shape[0], *[1] * (x.dim() - 2), vectors.shape[-1])


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    scale_offset: float = 1.0,
    norm: str = "layer",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(residual + gate x) (scale_offset + scale) + shift, and with a residual the sum too."""
    summed = x
    if residual is not None:
        summed = (residual + (x if gate is None else _beside(gate, x) * x)).to(x.dtype)
    normed = layer_norm(summed, weight, bias, eps) if norm == "layer" else rms_norm(summed, weight, eps)
    out = normed * (scale_offset + _beside(scale, x)) + _beside(shift, x)
    out = out.to(normed.dtype)
    return out if residual is None else (out, summed)


# --- the operators' own signatures, for devices without kernels ---------------------------------------------------------
def _combined(
    x: Tensor, wide: torch.dtype, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, scale_offset: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """weight, bias and scale_offset + scale in the statistics' dtype."""
    factor = None if scale is None else scale_offset + _beside(scale, x).to(wide)
    return None if weight is None else weight.to(wide), None if bias is None else bias.to(wide), factor


def norm_op(
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
    """The operator mmkernels::norm: (normed, summed or empty, [mean; rstd], or [rstd] for the RMS norm)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    summed = x
    if residual is not None:
        added = x.to(wide) if gate is None else _beside(gate, x).to(wide) * x.to(wide)
        summed = (residual.to(wide) + added).to(x.dtype)
    row = summed.to(wide)
    mean = row.mean(-1)
    centred = row if rms else row - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    weights, biases, factor = _combined(x, wide, weight, bias, scale, scale_offset)
    normed = centred * rstd[..., None]
    if weights is not None:
        normed = normed * weights
    if biases is not None:
        normed = normed + biases
    if factor is not None and shift is not None:
        normed = normed * factor + _beside(shift, x).to(wide)
    normed = normed.to(wide if float_normed else x.dtype)
    stats = torch.stack((rstd.flatten(),) if rms else (mean.flatten(), rstd.flatten()))
    return normed, x.new_empty(0) if residual is None else summed, stats


def norm_backward_op(
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
    """The operator mmkernels::norm_backward: gradients of the normalised row (the residual's, and x's without a gate), of x
    with a gate, and of gate, weight, bias, shift and scale; empty where not needed."""
    wide = stats.dtype
    leading = normalised.shape[:-1]
    rstd = stats[-1].reshape(leading)[..., None]
    row = normalised.to(wide)
    hat = row * rstd if rms else (row - stats[0].reshape(leading)[..., None]) * rstd
    upstream = torch.zeros_like(hat) if grad_normed is None else grad_normed.to(wide)
    weights, biases, factor = _combined(normalised, wide, weight, bias, scale, scale_offset)
    affine = hat if weights is None else hat * weights
    if biases is not None:
        affine = affine + biases
    scaled = upstream if factor is None else upstream * factor
    g = scaled if weights is None else scaled * weights
    centred = g - hat * (g * hat).mean(-1, keepdim=True)
    if not rms:
        centred = centred - g.mean(-1, keepdim=True)
    grad = centred * rstd
    if grad_normed is None:
        grad = torch.zeros_like(hat)
    if grad_summed is not None:
        grad = grad + grad_summed

    def of(needed: bool, like: Tensor | None, value: Tensor) -> Tensor:
        dtype = normalised.dtype if like is None else like.dtype
        if not needed or like is None:
            return normalised.new_empty(0, dtype=dtype)
        if like.dim() == 1 and value.dim() > 1:
            return value.flatten(0, -2).sum(0).to(dtype)
        return value.sum_to_size(_beside(like, normalised).shape).reshape(like.shape).to(dtype)

    gated = gate is not None and x is not None
    return (
        grad.to(normalised.dtype),
        (grad * _beside(gate, normalised)).to(normalised.dtype) if gated else normalised.new_empty(0),
        of(need_gate, gate, grad * x if gated else grad),
        of(need_weight, weight, scaled * hat),
        of(need_bias, bias, scaled),
        of(need_modulation, shift, upstream),
        of(need_modulation, scale, upstream * affine),
    )
