"""What the options of the commands mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def device_of(name: str) -> torch.device:
    """ValueError where it is neither the CPU nor a GPU that torch sees."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device: {name} was asked for, and torch sees {torch.cuda.device_count()} GPUs here")
    return device


def dtype_of(name: str, names: Sequence[str] = ("float32", "bfloat16", "float16")) -> torch.dtype:
    """ValueError where it is none of `names`."""
    if name not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
