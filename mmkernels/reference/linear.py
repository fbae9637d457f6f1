"""Linear layers and MLPs, plain and gated: the definition.

Sources of the gated forms: "GLU Variants Improve Transformer" (2020): SwiGLU, GeGLU and ReGLU are a SiLU, GELU or ReLU gate;
of quick_gelu: "Gaussian Error Linear Units (GELUs)" (2016), and the code of CLIP, "Learning Transferable Visual Models From
Natural Language Supervision" (2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# By the number that the operators take for an activation.
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "quick_gelu")

# quick_gelu is x sigmoid(QUICK_GELU x).
QUICK_GELU = 1.702


def activate(x: Tensor, activation: str | None) -> Tensor:
    """`gelu` is x times the normal distribution's own function, `gelu_tanh` its approximation by tanh, `quick_gelu` that by
    a sigmoid."""
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(QUICK_GELU * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias."""
    if bias is None or bias.dtype == x.dtype:
        return F.linear(x, weight, bias)
    return (F.linear(x, weight) + bias).to(x.dtype)  # a float32 bias beside half precision


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual."""
    out = activate(affine(x, weight, bias), activation)
    return out if residual is None else out + residual


def mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    """h W_out^T + b_out + residual, with h = activation(x W_in^T + b_in), or with a gate
    h = activation(x W_gate^T + b_gate) (x W_in^T + b_in)."""
    hidden = affine(x, w_in, b_in)
    hidden = activate(hidden, activation) if w_gate is None else activate(affine(x, w_gate, b_gate), activation) * hidden
    out = affine(hidden, w_out, b_out)
    return out if residual is None else out + residual


# --- the operators' own signatures, for devices without kernels ---------------------------------------------------------
def _kept(value: Tensor, needed: bool) -> Tensor:
    return value if needed else value.new_empty(0)


def linear_op(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    current: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    need_pre: bool,
) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::linear: the output, and what went into the activation (or empty)."""
    pre = affine(x, weight.to(x.dtype), bias)
    out = activate(pre, ACTIVATIONS[activation])
    out = out if residual is None else out + residual
    return out.clone() if out is pre else out, _kept(pre, need_pre)


def through(grad: Tensor, pre: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """(gradient before the activation, activated value). Without autograd, below which operators run."""
    name = ACTIVATIONS[activation]
    value = activate(pre, name)
    if name is None:
        return grad, value
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, pre, 0), value
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, pre), value
    if name == "quick_gelu":
        share = torch.sigmoid(QUICK_GELU * pre)
        return grad * (share + pre * (QUICK_GELU * share * (1 - share))), value
    return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh" if name == "gelu_tanh" else "none"), value


def as_rows(value: Tensor) -> Tensor:
    """[..., C] as a matrix."""
    return value.flatten(0, -2) if value.dim() > 1 else value[None]


def _of_weight(grad: Tensor, x: Tensor, needed: bool) -> Tensor:
    return as_rows(grad).T @ as_rows(x) if needed else x.new_empty(0)


def _of_bias(grad: Tensor, bias: Tensor | None, needed: bool) -> Tensor:
    like = grad if bias is None else bias
    return as_rows(grad).sum(0, dtype=like.dtype) if needed else like.new_empty(0)


def linear_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor | None,
    bias: Tensor | None,
    activation: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::linear_backward: gradients of x, weight and bias (empty where not needed)."""
    before = grad.clone() if pre is None else through(grad, pre, activation)[0]
    grad_x = before @ weight if need_x else x.new_empty(0)
    return grad_x, _of_weight(before, x, need_weight), _of_bias(before, bias, need_bias)


def mlp_op(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
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
    """The operator mmkernels::mlp: the output, and what the two first products gave (or empty)."""
    pre = affine(x, w_in.to(x.dtype), b_in)
    name = ACTIVATIONS[activation]
    if w_gate is None:
        gate, hidden = x.new_empty(0), activate(pre, name)
    else:
        gate = affine(x, w_gate.to(x.dtype), b_gate)
        hidden = activate(gate, name) * pre
    out = affine(hidden, w_out.to(x.dtype), b_out)
    return out if residual is None else out + residual, _kept(pre, need_pre), _kept(gate, need_pre)


# Which gradients mlp_backward makes, by bit.
MLP_GRADIENTS = ("x", "w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")


def mlp_needs(needs: int) -> dict[str, bool]:
    """The bits by name."""
    return {name: bool(needs >> bit & 1) for bit, name in enumerate(MLP_GRADIENTS)}


def mlp_backward_op(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::mlp_backward: the gradients that MLP_GRADIENTS names (empty where not needed)."""
    of_hidden = grad @ w_out
    if w_gate is None:
        before, hidden = through(of_hidden, pre, activation)
        before_gate = before
    else:
        before_gate, value = through(of_hidden * pre, pre_gate, activation)
        before, hidden = of_hidden * value, value * pre
    return mlp_gradients(grad, x, w_in, w_gate, b_in, b_out, b_gate, hidden, before, before_gate, needs)


def mlp_gradients(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    hidden: Tensor,
    before: Tensor,
    before_gate: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What follows from the hidden activations and the gradients before the activation, by matrix products alone."""
    need = mlp_needs(needs)
    grad_x = x.new_empty(0)
    if need["x"]:
        grad_x = before @ w_in
        if w_gate is not None:
            grad_x = grad_x + before_gate @ w_gate
    return (
        grad_x,
        _of_weight(before, x, need["w_in"]),
        _of_weight(grad, hidden, need["w_out"]),
        _of_weight(before_gate, x, need["w_gate"] and w_gate is not None),
        _of_bias(before, b_in, need["b_in"]),
        _of_bias(grad, b_out, need["b_out"]),
        _of_bias(before_gate, b_gate, need["b_gate"] and w_gate is not None),
    )
