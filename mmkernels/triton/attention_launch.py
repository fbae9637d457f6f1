"""How kernels of attention in Triton, with windows and without, and of experts and routing are launched: blocks, options."""

from __future__ import annotations

from typing import Any

import torch
import triton

Tile = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, warps, stages


def make() -> str:
    """Whose GPUs this torch is for."""
    return "cuda" if torch.version.hip is None else "hip"


def block(size: int) -> int:
    """The block that holds so many channels or tokens: a power of two, and not too small for a matrix product."""
    return max(16, triton.next_power_of_2(size))


def options(warps: int, stages: int) -> dict[str, Any]:
    """Launch options; no fused multiply-adds of the compiler's choosing, as in the other families."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
