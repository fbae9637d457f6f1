"""How the Triton kernels of all families are launched: the make of the GPU, blocks, options."""

from __future__ import annotations

from typing import Any

import torch
import triton


def make() -> str:
    """Whose GPUs this torch is for."""
    return "cuda" if torch.version.hip is None else "hip"


def block(size: int) -> int:
    """The block that holds so many channels or tokens: a power of two, and not too small for a matrix product."""
    return max(16, triton.next_power_of_2(size))


def options(warps: int, stages: int | None = None) -> dict[str, Any]:
    """Launch options. No fused multiply-adds of the compiler's choosing: they would make a product differ from itself where
    two kernels compute it, and a gradient that is zero come out as rounding noise."""
    given: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    return given if stages is None else {**given, "num_stages": stages}
