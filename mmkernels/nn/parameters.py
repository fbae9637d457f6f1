"""Parameters of layers that hold the matrices of several, and their initial values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def new_parameter(
    shape: tuple[int, ...], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def uniform(tensor: Tensor, inputs: int) -> None:
    """nn.Linear's initial values for that many inputs."""
    bound = 1 / math.sqrt(max(1, inputs))
    nn.init.uniform_(tensor, -bound, bound)
