"""A Triton kernel that spills on purpose, for the test of the gate (Triton reads a kernel's source from its file)."""

import triton
import triton.language as tl


@triton.jit
def greedy_kernel(x, out, BLOCK: tl.constexpr):
    """Holds BLOCK numbers in one warp's registers across a reduction that needs all of them twice."""
    c = tl.arange(0, BLOCK)
    value = tl.load(x + c)
    tl.store(out + c, value - tl.sum(value) + tl.max(value * value))
