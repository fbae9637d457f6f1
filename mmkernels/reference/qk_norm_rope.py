"""Norm of queries and keys over the channels of a head, and their rotary embedding: the definition.

Sources: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021); QK-norm as in "Query-Key Normalization for
Transformers" (2020, L2), "Scaling Vision Transformers to 22 Billion Parameters" (2023, LayerNorm) and
"Mixture-of-Transformers" (2025, RMS norm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = (None, "rms", "l2", "layer")  # as the operators number them


def _normed(x: Tensor, weight: Tensor | None, eps: float, norm: str | None) -> Tensor:
    mixed = weight is not None and weight.dtype != x.dtype
    wide = x.to(weight.dtype) if weight is not None else x
    inside = None if mixed else weight
    if norm == "rms":
        normed = F.rms_norm(wide, x.shape[-1:], inside, eps)
    elif norm == "layer":
        normed = F.layer_norm(wide, x.shape[-1:], inside, None, eps)
    elif norm == "l2":
        normed = F.normalize(wide, dim=-1, eps=eps)
        return normed if weight is None else normed * weight
    else:
        return x
    return normed * weight if mixed and weight is not None else normed


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pair p of the first 2 P channels turned by the angle whose cos[..., p] and sin[..., p] these are."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    pairs = cos.shape[-1]
    rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :pairs], rotated[..., pairs:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((torch.stack(turned, -1).flatten(-2), rest) if interleaved else (*turned, rest), -1)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm: str | None = "rms",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """(q, k), each normalised over the channels of a head and rotated; no gradient reaches cos and sin."""

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        out = _normed(x, weight, eps, norm)
        if cos is not None and sin is not None:
            out = _turned(out, cos.detach(), sin.detach(), interleaved)
        return out.to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


# --- the operators' own signatures, for devices without kernels ---------------------------------------------------------
def _statistics(x: Tensor, eps: float, norm: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """(the normalised rows h, 1 / what divides them, what share of h sum(g h) the gradient of x loses)."""
    if norm is None:
        ones = torch.ones_like(x[..., :1])
        return x, ones, 0 * ones
    if norm == "l2":
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd, share = 1 / length.clamp_min(eps), (length >= eps).to(x.dtype)
    else:
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        share = torch.ones_like(rstd) / x.shape[-1]
    return x * rstd, rstd, share


def qk_norm_rope_op(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::qk_norm_rope."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        out, _, _ = _statistics(x.to(wide), eps, NORMS[norm])
        if weight is not None:
            out = out * weight.to(wide)
        if cos is not None and sin is not None:
            out = _turned(out, cos.to(wide), sin.to(wide), interleaved)
        return out.to(x.dtype, copy=True).contiguous()

    return one(q, q_weight), one(k, k_weight)


def qk_norm_rope_backward_op(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
    need_q_weight: bool,
    need_k_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::qk_norm_rope_backward: gradients of q, k and their weights; empty where not needed, or where
    no gradient came."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def one(x: Tensor, gradient: Tensor | None, weight: Tensor | None, need_weight: bool) -> tuple[Tensor, Tensor]:
        dtype_of_weight = x.dtype if weight is None else weight.dtype
        if gradient is None:
            return x.new_empty(0), x.new_empty(0, dtype=dtype_of_weight)
        u = gradient.to(wide)
        if cos is not None and sin is not None:
            u = _turned(u, cos.to(wide), -sin.to(wide), interleaved)
        hat, rstd, share = _statistics(x.to(wide), eps, NORMS[norm])
        g = u if weight is None else u * weight.to(wide)
        grad = g - hat * ((g * hat).sum(-1, keepdim=True) * share)
        if NORMS[norm] == "layer":
            grad = grad - g.mean(-1, keepdim=True)
        needed = need_weight and weight is not None
        of_weight = (u * hat).flatten(0, -2).sum(0) if needed else x.new_empty(0)
        return (grad * rstd).to(x.dtype).contiguous(), of_weight.to(dtype_of_weight)

    grad_x, grad_q_weight = one(q, grad_q, q_weight, need_q_weight)
    grad_y, grad_k_weight = one(k, grad_k, k_weight, need_k_weight)
    return grad_x, grad_y, grad_q_weight, grad_k_weight
