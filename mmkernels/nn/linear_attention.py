"""Linear attention with its projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels.nn.linear import Linear
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.linear_attention import FEATURE_MAPS, linear_attention
from mmkernels.reference import linear_attention as reference


class LinearAttention(KernelSwitch):
    """proj(linear_attention(q, k, v)) with q, k and v from one projection of x, whose output attention reads in place.

    Parameters are those of the two layers qkv and proj, each a :class:`Linear`, packed in eval mode. The rows of qkv's
    weight are those of q's heads, then k's, then v's.

    Args:
        embed_dim: channels of x and of the output.
        num_heads: H. A head has embed_dim / H channels.
        num_kv_heads: heads of k and v, each of which serves H / num_kv_heads neighbouring heads of q; H where None.
        feature_map, is_causal, normalize, eps: as in :func:`mmkernels.linear_attention`.
        qkv_bias, proj_bias: whether the layers have a bias.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch, as attention of tensors of other classes (DTensor) always does. May be
            set at any time.

    Raises:
        ValueError: num_heads does not divide embed_dim, num_kv_heads does not divide num_heads, feature_map is unknown, or
            "softmax" with is_causal; packed_dtype as in :class:`Linear`.

    Source: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        feature_map: Literal["elu1", "relu", "softmax", "identity"] | Callable[[Tensor], Tensor] = "elu1",
        is_causal: bool = False,
        normalize: bool = True,
        eps: float = 1e-6,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of embed_dim, {embed_dim}, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads, {num_heads}, got {num_kv_heads}")
        if isinstance(feature_map, str) and feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: expected {', '.join(FEATURE_MAPS)} or a callable, got {feature_map!r}")
        if feature_map == "softmax" and is_causal:
            raise ValueError("feature_map: 'softmax' goes over all keys: it cannot be causal")
        super().__init__()
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.feature_map, self.is_causal, self.normalize, self.eps = feature_map, is_causal, normalize, eps
        width = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.qkv = Linear(embed_dim, width, qkv_bias, device, dtype, packed_dtype=packed_dtype)
        self.proj = Linear(embed_dim, embed_dim, proj_bias, device, dtype, packed_dtype=packed_dtype)
        self.kernels = kernels

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attention among the tokens of x.

        Args:
            x: [B, L, embed_dim].
            mask: [B or 1, L] bool: True = the token counts as a key.
            state: the sums that an earlier call returned, for streaming; as :func:`mmkernels.linear_attention`.
            return_state: also return the sums.

        Returns:
            [B, L, embed_dim], or with return_state (that, state).

        Raises:
            TypeError, ValueError: x of another shape; with kernels, as :func:`mmkernels.linear` and
                :func:`mmkernels.linear_attention`.
        """
        if x.dim() != 3 or x.size(-1) != self.embed_dim:
            raise ValueError(f"x: expected [B, L, {self.embed_dim}], got shape {tuple(x.shape)}")
        joint = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = joint.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
        attend = linear_attention if self.kernels and op_takes(q, k, v, mask, *(state or ())) else reference.linear_attention
        results = attend(
            q,
            k,
            v,
            feature_map=self.feature_map,
            is_causal=self.is_causal,
            normalize=self.normalize,
            eps=self.eps,
            mask=mask,
            state=state,
            return_state=return_state,
        )
        out, final = results if return_state else (results, None)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return (out, final) if return_state else out

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"feature_map={self.feature_map!r}, is_causal={self.is_causal}, {super().extra_repr()}"
        )
