"""Triton kernels that the gates must not let through (Triton reads a kernel's source from its file)."""

import triton
import triton.language as tl


@triton.jit
def greedy_kernel(x, out, BLOCK: tl.constexpr):
    """Holds BLOCK numbers in one warp's registers across a reduction that needs all of them twice."""
    c = tl.arange(0, BLOCK)
    value = tl.load(x + c)
    tl.store(out + c, value - tl.sum(value) + tl.max(value * value))


@triton.jit
def adding_kernel(x, out, BLOCK: tl.constexpr):
    """Adds the sums of all blocks to one number, in whatever order they come."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + c)))
