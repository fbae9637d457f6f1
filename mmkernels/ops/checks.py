"""Checks of arguments, shared by the families. Each raises with the argument's name, what it takes and what it got."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INT64_MAX = 2**63 - 1
MAX_DIMS = 16  # of a tensor whose leading dimensions are free (csrc/common/tensor.h)


def check_tensor(value: Any, name: str, shape: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A dense tensor of as many dimensions as `shape` ("[B*T, N, C]") names, of one of `dtypes`, its last one contiguous."""
    _check_dense(value, name, shape, dtypes)
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(value.shape)}")
    check_last_dimension(value, name)
    return value


def check_tokens(value: Any, name: str, shape: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A dense tensor of 1 to MAX_DIMS dimensions, of one of `dtypes`, whatever its strides."""
    _check_dense(value, name, shape, dtypes)
    if not 1 <= value.dim() <= MAX_DIMS:
        raise ValueError(f"{name}: expected {shape} of 1 to {MAX_DIMS} dimensions, got shape {tuple(value.shape)}")
    return value


def check_matrix(value: Any, name: str, shape: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A dense matrix, or matrices, of as many dimensions as `shape` ("[N, K]") names, of one of `dtypes`, whatever its
    strides."""
    _check_dense(value, name, shape, dtypes)
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(value.shape)}")
    return value


def check_rows(
    value: Any, name: str, dtypes: tuple[torch.dtype, ...], *, like: Tensor | None = None, like_name: str = ""
) -> Tensor:
    """A dense tensor [..., C] of one of `dtypes`, its last dimension contiguous; `like`: of its shape, dtype and device."""
    check_tokens(value, name, "[..., C]", dtypes)
    check_last_dimension(value, name)
    if like is not None:
        if value.shape != like.shape:
            raise ValueError(f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(value.shape)}")
        if value.dtype != like.dtype:
            raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {value.dtype}")
        if value.device != like.device:
            raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {value.device}")
    return value


def check_vectors(value: Any, name: str, beside: Tensor, beside_name: str) -> None:
    """Vectors over the last dimension of `beside` [B, ..., C]: one a sample ([B, C] or [B, 1, ..., C]) or one a row (its
    shape); on its device, in its dtype or (beside half precision) in float32."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    _check_layout(value, name)
    check_beside(value, name, beside, beside_name)
    shape = beside.shape
    by_sample = beside.dim() > 1 and (
        value.shape == (shape[0], shape[-1]) or value.shape == (shape[0], *[1] * (beside.dim() - 2), shape[-1])
    )
    if not by_sample and value.shape != shape:
        raise ValueError(
            f"{name}: expected one vector a sample, [B, C] or [B, 1, C], or one a token, the shape of {beside_name}; got "
            f"{tuple(value.shape)} beside {beside_name} {tuple(shape)}"
        )
    check_last_dimension(value, name)


def check_parameter(value: Any, name: str, size: int, beside: Tensor, beside_name: str) -> None:
    """None, or a vector of `size` elements on `beside`'s device, in its dtype or (beside half precision) in float32."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{size}] or None, got {type(value).__name__}")
    _check_layout(value, name)
    check_beside(value, name, beside, beside_name)
    if value.dim() != 1 or value.size(0) != size:
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(value.shape)}")


def check_biases(value: Any, name: str, shape: tuple[Any, Any], beside: Tensor, beside_name: str) -> None:
    """None, or vectors of `shape` [E, N] on `beside`'s device, in its dtype or (beside half precision) in float32."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {tuple(shape)} or None, got {type(value).__name__}")
    _check_layout(value, name)
    check_beside(value, name, beside, beside_name)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")


def check_beside(value: Tensor, name: str, beside: Tensor, beside_name: str) -> None:
    """A tensor on `beside`'s device, in its dtype or (beside half precision) in float32."""
    if value.device != beside.device:
        raise ValueError(f"{name}: expected the device of {beside_name}, {beside.device}, got {value.device}")
    if value.dtype != beside.dtype and not (
        value.dtype == torch.float32 and beside.dtype in (torch.bfloat16, torch.float16)
    ):
        raise TypeError(
            f"{name}: expected the dtype of {beside_name}, {beside.dtype} (or float32 beside half precision), "
            f"got {value.dtype}"
        )


def check_int(value: Any, name: str, minimum: int) -> None:
    """An int (or a symbolic one, under torch.compile) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum or (isinstance(value, int) and value > INT64_MAX):
        raise ValueError(f"{name}: expected at least {minimum} and at most 2^63 - 1, got {value}")


def check_float(value: Any, name: str) -> None:
    """A number that fits a float."""
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a float, got an int that is too large for one") from None


def check_gradient(
    value: Tensor | None, name: str, shape: tuple[Any, ...], dtypes: tuple[torch.dtype, ...], beside: Tensor
) -> None:
    """None, or a contiguous gradient of this shape on `beside`'s device."""
    if value is None:
        return
    if tuple(value.shape) != tuple(shape) or not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor of shape {tuple(shape)}, got shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {', '.join(map(str, dtypes))}, got {value.dtype}")
    if value.device != beside.device:
        raise ValueError(f"{name}: expected the device {beside.device}, got {value.device}")


def _check_dense(value: Any, name: str, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    _check_layout(value, name)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {', '.join(map(str, dtypes))}, got {value.dtype}")


def _check_layout(value: Tensor, name: str) -> None:
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_last_dimension(value: Tensor, name: str) -> None:
    if value.stride(-1) != 1 and value.size(-1) > 1 and value.numel() > 0:
        raise ValueError(f"{name}: the last dimension must be contiguous, got strides {value.stride()}; call .contiguous()")
