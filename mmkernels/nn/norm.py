"""torch's normalisation modules over the last dimension, run by the ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.norm import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension: x [..., C] -> [..., C].

    Parameters and state_dict keys are those of nn.LayerNorm, so either loads the other's weights.

    Args:
        channels: C.
        eps: added to the variance.
        elementwise_affine, bias, device, dtype: as in nn.LayerNorm.
        kernels: True runs :func:`mmkernels.layer_norm`, False F.layer_norm, as tensors of other classes (DTensor) always do.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernels: bool = True,
    ) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=elementwise_affine, bias=bias, device=device, dtype=dtype)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.kernels and op_takes(x, self.weight, self.bias):
            return layer_norm(laid_out(x), self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernels={self.kernels}"


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension: x [..., C] -> [..., C].

    Parameters and state_dict keys are those of nn.RMSNorm, so either loads the other's weights.

    Args:
        channels: C.
        eps: added to the mean square; None is, as in nn.RMSNorm, the machine epsilon of the dtype of x.
        elementwise_affine, device, dtype: as in nn.RMSNorm.
        kernels: True runs :func:`mmkernels.rms_norm`, False F.rms_norm, as tensors of other classes (DTensor) always do.
    """

    def __init__(
        self,
        channels: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernels: bool = True,
    ) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=elementwise_affine, device=device, dtype=dtype)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.kernels and op_takes(x, self.weight):
            return rms_norm(laid_out(x), self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernels={self.kernels}"
