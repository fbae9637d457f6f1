"""Checks of arguments, shared by the families. Each raises with the argument's name, what it takes and what it got."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_tensor(value: Any, name: str, shape: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A dense tensor of as many dimensions as `shape` ("[B*T, N, C]") names, of one of `dtypes`, its last one contiguous."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor {shape}, got layout {value.layout}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {', '.join(map(str, dtypes))}, got {value.dtype}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(value.shape)}")
    if value.stride(-1) != 1 and value.size(-1) > 1 and value.numel() > 0:
        raise ValueError(f"{name}: the last dimension must be contiguous, got strides {value.stride()}; call .contiguous()")
    return value


def check_parameter(value: Any, name: str, size: int, beside: Tensor, beside_name: str) -> None:
    """None, or a vector of `size` elements on `beside`'s device, in its dtype or (beside half precision) in float32."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{size}] or None, got {type(value).__name__}")
    if value.device != beside.device:
        raise ValueError(f"{name}: expected the device of {beside_name}, {beside.device}, got {value.device}")
    if value.dtype != beside.dtype and not (
        value.dtype == torch.float32 and beside.dtype in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(
            f"{name}: expected the dtype of {beside_name}, {beside.dtype} (or float32 beside half precision), "
            f"got {value.dtype}"
        )
    if value.dim() != 1 or value.size(0) != size:
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(value.shape)}")


def check_int(value: Any, name: str, minimum: int) -> None:
    """An int (or a symbolic one, under torch.compile) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
