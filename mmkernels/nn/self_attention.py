"""Self-attention of vision transformers, its projections included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.nn.attention import attend
from mmkernels.nn.linear import Linear, added
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.norm import LayerNorm


class SelfAttention(KernelSwitch):
    """proj(attention of qkv(x)) + residual, through :func:`mmkernels.linear` and :func:`mmkernels.attention`.

    Parameters and state_dict keys are those of timm's Attention: qkv, proj, and with qk_norm q_norm and k_norm. Both layers
    are :class:`Linear`, packed in eval mode; attention reads the packed projection in place, and the residual is added in
    the last product.

    Args:
        dim: channels of x and of the output.
        num_heads: H.
        head_dim: D, channels of a head; dim / num_heads where None.
        qkv_bias, proj_bias: whether the projections have a bias.
        qk_norm: True normalises each head of q and of k by a :class:`LayerNorm` over its channels.
        dropout: probability, in training, with which a weight of the softmax is dropped.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch, as attention of tensors of other classes (DTensor) always does. May be
            set at any time.

    Raises:
        ValueError: num_heads does not divide dim (without head_dim), or dropout or packed_dtype is out of range.

    Source: "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (2021).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        if num_heads < 1 or (head_dim is None and dim % num_heads != 0):
            raise ValueError(f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.dropout = dropout
        inner = num_heads * self.head_dim
        self.qkv = Linear(dim, 3 * inner, qkv_bias, device, dtype, packed_dtype=packed_dtype)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm:
            self.q_norm = LayerNorm(self.head_dim, device=device, dtype=dtype)
            self.k_norm = LayerNorm(self.head_dim, device=device, dtype=dtype)
        self.proj = Linear(inner, dim, proj_bias, device, dtype, packed_dtype=packed_dtype)
        self.kernels = kernels

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x [B, N, dim] -> [B, N, dim].

        Args:
            x: in the dtype of the weights (beside int8, any of at most 32 bits).
            residual: None, or what expands to the output's shape; added last.
            mask: bool, broadcastable to [B, H, N, N]; True = sees. A query that sees nothing has an output of proj.bias.
            bias: broadcastable to [B, H, N, N], added to the scores; in the dtype of x or float32.
            is_causal: whether token i sees tokens 0 to i only (of those that mask shows).

        Raises:
            TypeError, ValueError: with kernels, as :func:`mmkernels.linear` and :func:`mmkernels.attention`.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout_p = self.dropout if self.training else 0.0
        out = attend(q, k, v, self.kernels, mask=mask, bias=bias, is_causal=is_causal, dropout_p=dropout_p)
        return added(self.proj, out, residual)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout}, {super().extra_repr()}"
