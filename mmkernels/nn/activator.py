"""Activator's block: gated linear units in the place of attention.

Source: "Activator: GLU Activations as The Core Functions of a Vision Transformer" (2024). Module and parameter names are
those of the published code. It normalises twice with one module where one would expect two: both factors of the gated unit
with one LayerNorm, and the inputs of the unit and of the feed-forward layer with another one. So do these modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.nn.linear import Linear, added
from mmkernels.nn.mlp import KernelSwitch, feed_forward, normed_factors
from mmkernels.nn.norm import LayerNorm


class ActivatorGatingUnit(nn.Module):
    """proj_3(norm(gelu(proj_1(x))) * norm(proj_2(x))) + residual: [..., d_model] -> [..., d_model]."""

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        packed_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj_1 = Linear(d_model, d_ffn, device=device, dtype=dtype, packed_dtype=packed_dtype)
        self.proj_2 = Linear(d_model, d_ffn, device=device, dtype=dtype, packed_dtype=packed_dtype)
        self.proj_3 = Linear(d_ffn, d_model, device=device, dtype=dtype, packed_dtype=packed_dtype)
        self.norm = LayerNorm(d_ffn, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return added(self.proj_3, normed_factors(x, self.proj_1, self.proj_2, "gelu", self.norm), residual)


class ActivatorFeedForward(nn.Module):
    """Linear, GELU, Linear with dropout after both, + residual: [..., d_model] -> [..., d_model]."""

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        packed_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Linear(d_model, d_ffn, device=device, dtype=dtype, packed_dtype=packed_dtype),
            nn.GELU(),
            nn.Dropout(dropout),
            Linear(d_ffn, d_model, device=device, dtype=dtype, packed_dtype=packed_dtype),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc_in, _, drop_in, fc_out, drop_out = self.net
        return feed_forward(x, fc_in, fc_out, "gelu", drop_in, drop_out, residual)


class ActivatorBlock(KernelSwitch):
    """One block of Activator: tokens [..., d_model] -> [..., d_model], each on its own.

    x + unit(norm(x)), then x + ffn(norm(x)) with the same norm, where unit(x) = proj_3(LN(gelu(proj_1 x)) * LN(proj_2 x)).
    The linear layers run :func:`mmkernels.linear` and :func:`mmkernels.mlp`.

    Args:
        d_model: C. d_ffn: the inner width.
        dropout: probability, in the feed-forward layer alone.
        feed_forward: False leaves the second half out, as the published code's variant of GEGLU only.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch. May be set at any time.

    Raises:
        ValueError: dropout or packed_dtype is out of range.

    Source: see the head of this file.
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        feed_forward: bool = True,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model, device=device, dtype=dtype)
        self.actgu = ActivatorGatingUnit(d_model, d_ffn, device, dtype, packed_dtype=packed_dtype)
        self.ffn = (
            ActivatorFeedForward(d_model, d_ffn, dropout, device, dtype, packed_dtype=packed_dtype) if feed_forward else None
        )
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model], in the dtype of the weights -> [..., d_model].

        Raises:
            TypeError, ValueError: with kernels, as :func:`mmkernels.linear`.
        """
        x = self.actgu(self.norm(x), x)
        return x if self.ffn is None else self.ffn(self.norm(x), x)
