"""Attention of decoders: rotary positions, grouped heads, norms of queries and keys, projections included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.nn.attention import attend
from mmkernels.nn.linear import Linear, added
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.norm import RMSNorm
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.checks import check_int
from mmkernels.ops.qk_norm_rope import qk_norm_rope
from mmkernels.reference import qk_norm_rope as reference

Angles = tuple[Tensor, Tensor]


def rotary_angles(positions: Tensor, channels: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> Angles:
    """(cos, sin) [..., channels / 2] of positions [...]: channel pair p turns by position * base^(-2 p / channels).

    Args:
        positions: [L] or [B, L], integers or floats.
        channels: of a head, even.
        base: 10000 in RoFormer and LLaMA.
        dtype: float32, beside float64 queries float64; angles are computed in float64.

    Raises:
        ValueError: channels is odd.

    Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
    """
    if channels < 2 or channels % 2 != 0:
        raise ValueError(f"channels: expected an even number, got {channels}")
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
    angles = positions.to(torch.float64)[..., None] * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm: str | None = None,
    is_causal: bool = True,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    kernels: bool = True,
) -> Tensor:
    """:func:`mmkernels.qk_norm_rope` and :func:`mmkernels.attention` of q [B, H, L, D], k and v [B, Hk, L, D] ->
    [B, L, H D]; arguments as in both, the segments those of queries and keys."""
    on = kernels and op_takes(q, k, v, mask, segment_ids)
    if norm is not None or angles is not None:
        prepare: Any = qk_norm_rope if on else reference.qk_norm_rope
        cos, sin = (None, None) if angles is None else angles
        q, k = prepare(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, norm=norm)
    return attend(q, k, v, kernels, mask=mask, is_causal=is_causal, segment_ids=segment_ids)


class RotaryAttention(KernelSwitch):
    """o_proj(attention of q_proj(x), k_proj(x), v_proj(x), turned by their positions) + residual, causal or not.

    Parameters and state_dict keys are those of transformers' LLaMA: q_proj, k_proj, v_proj, o_proj, and with qk_norm those
    of Qwen3: q_norm, k_norm. The projections are :class:`Linear`, packed in eval mode.

    Args:
        dim: channels of x and of the output.
        num_heads: H.
        num_kv_heads: heads of k and v, each of which serves H / num_kv_heads neighbouring heads of q; H where None.
        head_dim: D, channels of a head; dim / num_heads where None.
        bias: whether the projections have a bias.
        qk_norm: True normalises each head of q and of k by an RMS norm over its channels, before it is turned.
        eps: of that norm.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch, as attention of tensors of other classes (DTensor) always does. May be
            set at any time.

    Raises:
        TypeError, ValueError: num_heads does not divide dim (without head_dim), or num_kv_heads not num_heads.

    Source: "LLaMA" (2023); grouped heads from "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
    Checkpoints" (2023).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        check_int(num_heads, "num_heads", 1)
        if head_dim is None and dim % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_int(num_kv_heads, "num_kv_heads", 1)
        if num_heads % num_kv_heads != 0:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads, {num_heads}, got {num_kv_heads}")
        super().__init__()
        self.num_heads, self.num_kv_heads, self.eps = num_heads, num_kv_heads, eps
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, inner, bias, device, dtype, packed_dtype=packed_dtype)
        self.k_proj = Linear(dim, kv_inner, bias, device, dtype, packed_dtype=packed_dtype)
        self.v_proj = Linear(dim, kv_inner, bias, device, dtype, packed_dtype=packed_dtype)
        self.o_proj = Linear(inner, dim, bias, device, dtype, packed_dtype=packed_dtype)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps, device=device, dtype=dtype)
            self.k_norm = RMSNorm(self.head_dim, eps, device=device, dtype=dtype)
        self.kernels = kernels

    def forward(
        self,
        x: Tensor,
        angles: Angles | None = None,
        residual: Tensor | None = None,
        *,
        is_causal: bool = True,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, dim] -> [B, L, dim].

        Args:
            x: in the dtype of the weights.
            angles: (cos, sin) of :func:`rotary_angles`, for all layers of a model the same; None turns nothing.
            residual: None, or what expands to the output's shape; added last.
            is_causal: whether token i sees tokens 0 to i only.
            mask: bool, broadcastable to [B, H, L, L]; True = sees.
            segment_ids: [B, L] integers; tokens see those of their own segment (documents of one row).

        Raises:
            TypeError, ValueError: with kernels, as :func:`mmkernels.qk_norm_rope` and :func:`mmkernels.attention`.
        """
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        normed = self.q_norm is not None and self.k_norm is not None
        out = turned_attention(
            q,
            k,
            v,
            angles,
            q_weight=self.q_norm.weight if self.q_norm is not None else None,
            k_weight=self.k_norm.weight if self.k_norm is not None else None,
            eps=self.eps,
            norm="rms" if normed else None,
            is_causal=is_causal,
            mask=mask,
            segment_ids=segment_ids,
            kernels=self.kernels,
        )
        return added(self.o_proj, out, residual)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, {super().extra_repr()}"
        )
