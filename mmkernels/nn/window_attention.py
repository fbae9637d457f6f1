"""Shifted-window attention as a module.

Names of parameters are those of timm's and MONAI's WindowAttention, so that checkpoints of either load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels.nn.linear import Linear, added
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.window_attention import window_attention
from mmkernels.reference.window_attention import pipeline


def clipped(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(window, shift) on a grid: an axis that is no longer than the window is the window there, and is not shifted."""
    small = [size <= extent for size, extent in zip(grid, window, strict=True)]
    fitted = tuple(max(size, 1) if s else extent for size, extent, s in zip(grid, window, small, strict=True))
    return fitted, tuple(0 if s else step for step, s in zip(shift, small, strict=True))


class WindowAttention(KernelSwitch):
    """The attention of a Swin block, shift and windows included: x [B, *grid, C] -> [B, *grid, C].

    proj(window_attention(qkv(x))) + residual. Parameters and state_dict keys are those of timm's WindowAttention:
    relative_position_bias_table, qkv.weight, qkv.bias, proj.weight, proj.bias; the relative_position_index that MONAI's
    files hold beside them is passed over. Pads are zeros before the projection, so that after it they are its bias, as
    published. Both layers are :class:`Linear`, packed in eval mode. There is no dropout of attention weights.

    Args:
        dim: C.
        num_heads: H, which divides dim.
        window_size: extents of the window, one an axis: 2 for planes, 3 for volumes.
        shift: one an axis, each less than the window's extent, or None for none.
        qkv_bias: whether the first projection has a bias.
        pad_order: "roll_pad" (timm) or "pad_roll" (MONAI), as in :func:`mmkernels.window_attention`.
        clip: on an axis of the grid that is no longer than the window, the window is the axis and there is no shift, as
            timm's and MONAI's blocks have it. The table is then read as MONAI reads it (`bias_window`). False pads such an
            axis to the window, as timm's `always_partition`.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        kernels: True runs the ops, False the published pipeline in plain torch, as tensors of other classes (DTensor) always
            do. May be set at any time.

    Raises:
        ValueError: window_size is not of 2 or 3 axes, shift does not fit it, num_heads does not divide dim, or pad_order is
            neither of the two.

    Source: "Swin Transformer" (2021); volumes: "Swin UNETR" (2022).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        shift: Sequence[int] | None = None,
        qkv_bias: bool = True,
        pad_order: Literal["roll_pad", "pad_roll"] = "roll_pad",
        clip: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernels: bool = True,
    ) -> None:
        window_size = tuple(window_size)
        shift = (0,) * len(window_size) if shift is None else tuple(shift)
        if len(window_size) not in (2, 3) or min(window_size) < 1:
            raise ValueError(f"window_size: expected 2 or 3 extents of at least 1, got {window_size}")
        if len(shift) != len(window_size) or any(not 0 <= s < w for s, w in zip(shift, window_size, strict=True)):
            raise ValueError(f"shift: expected one an axis, from 0 to less than the window {window_size}, got {shift}")
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads: expected heads that divide dim, {dim}, got {num_heads}")
        if pad_order not in ("roll_pad", "pad_roll"):
            raise ValueError(f"pad_order: expected 'roll_pad' or 'pad_roll', got {pad_order!r}")
        super().__init__()
        self.num_heads = num_heads
        self.window_size, self.shift = window_size, shift
        self.pad_order, self.clip = pad_order, clip
        positions = math.prod(2 * extent - 1 for extent in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(positions, num_heads, device=device, dtype=dtype))
        self.qkv = Linear(dim, 3 * dim, qkv_bias, device, dtype)
        self.proj = Linear(dim, dim, True, device, dtype)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, *grid, C] -> [B, *grid, C].

        Args:
            x: in the dtype of the weights.
            residual: None, or what expands to the output's shape; added last.

        Raises:
            TypeError, ValueError: with kernels, as :func:`mmkernels.window_attention`.
        """
        qkv = self.qkv(x)
        window, shift = self.window_size, self.shift
        if self.clip and qkv.dim() == len(window) + 2:
            window, shift = clipped(qkv.shape[1:-1], window, shift)
        run = window_attention if self.kernels and op_takes(qkv, self.relative_position_bias_table) else pipeline
        out = run(
            qkv,
            self.relative_position_bias_table,
            window=window,
            shift=shift,
            num_heads=self.num_heads,
            pad_value=self.qkv.bias,
            pad_order=self.pad_order,
            bias_window=self.window_size,
        )
        return added(self.proj, out, residual)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}, pad_order={self.pad_order!r}, "
            f"clip={self.clip}, {super().extra_repr()}"
        )
