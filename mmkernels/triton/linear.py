"""Gated MLPs in Triton: what stands between their matrix products, which stay torch's. Forward and backward.

Every kernel treats its tensors as flat: [..., H], contiguous, a tile of BLOCK elements a program. It computes in float32 and
rounds once. Outputs may be written over inputs: a program reads its tile before it writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.reference import linear as reference
from mmkernels.triton import launch

BLOCK = 1024
_OF_W_OUT = 1 << reference.MLP_GRADIENTS.index("w_out")

# Without fused multiply-adds, backward makes the very hidden activations that forward made.
_OPTIONS = launch.options(4)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """(activation, derivative) of float32 x, by the names of reference.ACTIVATIONS. NaN stays NaN.

    (1 + tanh(u)) / 2 is sigmoid(2 u), so that gelu_tanh needs neither tanh nor a difference of nearly equal numbers.
    """
    if ACTIVATION == "relu":
        value = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * share
        slope = share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        share = tl.sigmoid(u)
        value = x * share
        # 1 - share loses digits where the factor after it is large.
        slope = share + x * (share * tl.sigmoid(-u)) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACTIVATION == "silu" or ACTIVATION == "quick_gelu":
        factor: tl.constexpr = 1.702 if ACTIVATION == "quick_gelu" else 1.0
        share = tl.sigmoid(factor * x)
        value = x * share
        slope = share + value * (factor * (1.0 - share))
    else:
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def glu_kernel(gate, up, hidden, elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """hidden = activation(gate) * up; grid: (cdiv(elements, BLOCK),)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    value, _ = activate(tl.load(gate + i, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    value *= tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + i, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def glu_backward_kernel(
    grad_hidden,
    gate,
    up,
    grad_gate,
    grad_up,
    hidden,
    elements,
    ACTIVATION: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of gate and up, and hidden once more; grid: (cdiv(elements, BLOCK),)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    upstream = tl.load(grad_hidden + i, mask=inside, other=0.0).to(tl.float32)
    value, slope = activate(tl.load(gate + i, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    factor = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_gate + i, (upstream * factor * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + i, (upstream * value).to(grad_up.dtype.element_ty), mask=inside)
    if NEED_HIDDEN:
        tl.store(hidden + i, (value * factor).to(hidden.dtype.element_ty), mask=inside)


# --- launches -----------------------------------------------------------------------------------------------------------
def _launch(kernel: Any, *tensors: Tensor, activation: int, **constants: Any) -> None:
    elements = tensors[0].numel()
    if elements > 0:
        name = reference.ACTIVATIONS[activation]
        kernel[(triton.cdiv(elements, BLOCK),)](
            *tensors, elements=elements, ACTIVATION=name, **constants, BLOCK=BLOCK, **_OPTIONS
        )


def mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    packed_in: Tensor | None,
    packed_out: Tensor | None,
    packed_gate: Tensor | None,
    current: Tensor | None,
    residual: Tensor | None,
    activation: int,
    need_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::mlp, with a gate."""
    up = reference.affine(x, w_in.to(x.dtype), b_in)
    gate = reference.affine(x, w_gate.to(x.dtype), b_gate)
    hidden = torch.empty_like(up) if need_pre else up
    _launch(glu_kernel, gate, up, hidden, activation=activation)
    out = reference.affine(hidden, w_out.to(x.dtype), b_out)
    if residual is not None:
        out += residual
    return (out, up, gate) if need_pre else (out, x.new_empty(0), x.new_empty(0))


def mlp_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::mlp_backward, with a gate."""
    of_up = grad @ w_out  # the gradient of hidden, and then in its place that of up
    of_gate = torch.empty_like(pre_gate)
    need_hidden = bool(needs & _OF_W_OUT)
    hidden = torch.empty_like(pre) if need_hidden else pre
    _launch(
        glu_backward_kernel, of_up, pre_gate, pre, of_gate, of_up, hidden, activation=activation, NEED_HIDDEN=need_hidden
    )
    return reference.mlp_gradients(grad, x, w_in, w_gate, b_in, b_out, b_gate, hidden, of_up, of_gate, needs)


# --- what can be launched, for the gate that compiles all of it without a GPU -------------------------------------------
def configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of every activation and element type that the launches above can choose."""
    for kernel, flags in ((glu_kernel, {}), (glu_backward_kernel, {"NEED_HIDDEN": True})):
        for activation in reference.ACTIVATIONS:
            constants = {"ACTIVATION": activation, **flags, "BLOCK": BLOCK}
            tensors = kernel.arg_names[: kernel.arg_names.index("elements")]
            for x in ("fp32", "bf16", "fp16"):
                yield kernel, {**dict.fromkeys(tensors, f"*{x}"), "elements": "i64"}, constants, _OPTIONS
