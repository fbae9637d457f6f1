"""Run by test_triton_glu.py in a process of its own, under TRITON_INTERPRET=1: gated MLPs on CPU tensors, for what the
samples of their card leave out: every activation, many tiles, exact ones, numbers that overflow. Prints a line a check."""

from __future__ import annotations

import sys

import torch
from support import assert_same_bits
from torch import Tensor
from triton_compare import compare

from mmkernels.reference import linear as reference
from mmkernels.triton import linear as kernels

ALL_GRADIENTS = (1 << len(reference.MLP_GRADIENTS)) - 1
W_OUT = 1 << reference.MLP_GRADIENTS.index("w_out")
HALVES = (torch.bfloat16, torch.float16)

# Leading dimensions of x, K, H, N.
SHAPES = {
    "small": ((2, 5), 7, 11, 6),
    "many tiles, the last one cut": ((3, 7), 19, 193, 17),
    "two whole tiles": ((64,), 8, 32, 8),
    "no leading dimension": ((), 9, 11, 6),
    "no rows": ((2, 0), 7, 11, 6),
    "no hidden": ((2, 3), 7, 0, 6),
    "no depth": ((2, 3), 0, 11, 6),
    "no columns": ((2, 3), 7, 11, 0),
}


def check_mlp(shape: str, dtype: torch.dtype, activation: int, biases: str, residual: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    leading, depth, hidden, cols = SHAPES[shape]
    kept = torch.float32 if biases == "float32" else dtype

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype)

    x = draw(*leading, depth, scale=2.0)
    w_in, w_gate = (draw(hidden, depth, scale=max(1, depth) ** -0.5) for _ in range(2))
    w_out = draw(cols, hidden, scale=max(1, hidden) ** -0.5)
    b_in, b_out, b_gate = (None if biases == "none" else draw(n, dtype=kept) for n in (hidden, cols, hidden))
    weights = (w_in, w_out, w_gate, b_in, b_out, b_gate)
    rest = (None, None, None, None, draw(*leading, cols) if residual else None, activation)

    what = f"{shape}, {reference.ACTIVATIONS[activation]}, {dtype}, biases {biases}, residual {residual}"
    out, pre, pre_gate = compare(kernels.mlp, reference.mlp_op, (x, *weights, *rest, True), f"forward {what}")
    alone, *kept_for_backward = kernels.mlp(x, *weights, *rest, False)
    assert_same_bits(alone, out, f"{what}: without a backward pass")
    assert all(value.numel() == 0 for value in kept_for_backward)

    args = (draw(*leading, cols), x, *weights, pre, pre_gate, activation)
    of_all = compare(kernels.mlp_backward, reference.mlp_backward_op, (*args, ALL_GRADIENTS), f"backward {what}")
    some = kernels.mlp_backward(*args, ALL_GRADIENTS & ~W_OUT)
    for name, first, second in zip(reference.MLP_GRADIENTS, of_all, some, strict=True):
        if name == "w_out":
            assert second.numel() == 0
        else:
            assert_same_bits(first, second, f"{what}: gradient of {name} without that of w_out")


def glu(gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor]:
    hidden = torch.empty_like(gate)
    kernels._launch(kernels.glu_kernel, gate, up, hidden, activation=activation)
    return (hidden,)


def glu_backward(upstream: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor, Tensor]:
    of_gate, of_up, hidden = (torch.empty_like(gate) for _ in range(3))
    tensors = (upstream, gate, up, of_gate, of_up, hidden)
    kernels._launch(kernels.glu_backward_kernel, *tensors, activation=activation, NEED_HIDDEN=True)
    return of_gate, of_up, hidden


def plain_glu(gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor]:
    return (reference.activate(gate, reference.ACTIVATIONS[activation]) * up,)


def plain_glu_backward(upstream: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, ...]:
    leaves = (gate.detach().requires_grad_(), up.detach().requires_grad_())
    (hidden,) = plain_glu(*leaves, activation)
    return *torch.autograd.grad(hidden, leaves, upstream), hidden.detach()


def check_kernels(dtype: torch.dtype, activation: int) -> None:
    """The kernels alone: where activations bend, and as far out as the dtype goes."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.linspace(-12, 12, 2777).to(dtype)
    up, upstream = (torch.randn(gate.shape, generator=generator).to(dtype) for _ in range(2))
    what = f"{reference.ACTIVATIONS[activation]}, {dtype}"
    (hidden,) = compare(glu, plain_glu, (gate, up, activation), f"kernel {what}")
    *_, again = compare(glu_backward, plain_glu_backward, (upstream, gate, up, activation), f"backward kernel {what}")
    assert_same_bits(hidden, again, f"{what}: hidden in backward")

    far = torch.tensor([0.0, 1e-30, 1.0, 20.0, 90.0, 200.0, 6e4, 1e13, torch.inf, torch.nan]).to(dtype)
    far = torch.cat((far, -far))
    ones = torch.ones_like(far)
    ours = (*glu(far, ones, activation), *glu_backward(ones, far, ones, activation))
    far, ones = far.double(), ones.double()  # torch's float32 gelu of infinity is NaN on some machines
    theirs = (*plain_glu(far, ones, activation), *plain_glu_backward(ones, far, ones, activation))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(dtype), equal_nan=True, msg=lambda text: f"{what}: far out: {text}")


for code in range(len(reference.ACTIVATIONS)):
    for dtype in (torch.float32, *HALVES):
        check_kernels(dtype, code)
        check_mlp("small", dtype, code, "own", False)
        check_mlp("many tiles, the last one cut", dtype, code, "none", True)
        if dtype in HALVES:
            check_mlp("small", dtype, code, "float32", True)
for shape in SHAPES:
    check_mlp(shape, torch.float32, reference.ACTIVATIONS.index("silu"), "own", True)
sys.exit(0)
