"""The norm of queries and keys over the channels of a head and their rotary embedding, in one pass before attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import check_beside, check_float, check_parameter, check_tensor
from mmkernels.ops.entry import define, differentiable, implement, not_differentiable, wants_gradient
from mmkernels.reference import qk_norm_rope as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = {norm: number for number, norm in enumerate(reference.NORMS)}


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_heads(q: Any, k: Any) -> None:
    check_tensor(q, "q", "[B, H, L, D]", DTYPES)
    check_tensor(k, "k", "[B, H, L, D]", DTYPES)
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected the dtype of q, {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k: expected the device of q, {q.device}, got {k.device}")
    if k.size(0) != q.size(0) or k.size(3) != q.size(3):
        raise ValueError(f"k: expected B = {q.size(0)} and D = {q.size(3)} of q, got shape {tuple(k.shape)}")


def _check_angles(value: Any, name: str, q: Tensor) -> None:
    check_tensor(value, name, "[L, P]" if isinstance(value, Tensor) and value.dim() == 2 else "[B, L, P]", DTYPES)
    check_beside(value, name, q, "q")
    batch, length, pairs = (1, *value.shape)[-3:]
    if length != q.size(2) or pairs > q.size(3) // 2 or batch not in (1, q.size(0)):
        raise ValueError(
            f"{name}: expected [L, P] or [B, L, P] with B = {q.size(0)} or 1, L = {q.size(2)} and at most {q.size(3) // 2} "
            f"pairs, half of the channels of q; got {tuple(value.shape)}"
        )


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
) -> None:
    _check_heads(q, k)
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'}: expected with {'sin' if cos is None else 'cos'}, or neither")
    if cos is not None and sin is not None:
        _check_angles(cos, "cos", q)
        _check_angles(sin, "sin", q)
        if sin.shape[-1] != cos.shape[-1] or sin.dtype != cos.dtype:
            raise ValueError(
                f"sin: expected the {cos.shape[-1]} pairs and the dtype of cos, {cos.dtype}, got {sin.shape[-1]} and "
                f"{sin.dtype}"
            )
        if k.size(2) != q.size(2):
            raise ValueError(f"k: expected the {q.size(2)} tokens of q, which cos and sin are for, got {k.size(2)}")
    for weight, name in ((q_weight, "q_weight"), (k_weight, "k_weight")):
        check_parameter(weight, name, q.size(3), q, "q")
        if norm == 0 and weight is not None:
            raise ValueError(f"{name}: expected None without a norm, got a tensor {tuple(weight.shape)}")
    check_float(eps, "eps")
    if not 0 <= norm < len(reference.NORMS):
        raise ValueError(f"norm: expected 0 to {len(reference.NORMS) - 1}, got {norm}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: expected a bool, got {type(interleaved).__name__}")


def _check_backward(grad_q: Tensor | None, grad_k: Tensor | None, q: Tensor, k: Tensor, *more: Any) -> None:
    _check(q, k, *more[:-2])
    for gradient, name, like in ((grad_q, "grad_q", q), (grad_k, "grad_k", k)):
        if gradient is None:
            continue
        check_tensor(gradient, name, "[B, H, L, D]", (q.dtype,))
        if gradient.shape != like.shape or gradient.device != q.device:
            raise ValueError(
                f"{name}: expected shape {tuple(like.shape)} on {q.device}, got {tuple(gradient.shape)} on {gradient.device}"
            )


# --- operators --------------------------------------------------------------------------------------------------------
def _fake(q: Tensor, k: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    _check(q, k, *more)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=q.dtype, device=q.device)


def _fake_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
    need_q_weight: bool,
    need_k_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(needed: bool, tensor: Tensor | None) -> Tensor:
        shape = tensor.shape if needed and tensor is not None else (0,)
        return torch.empty(shape, dtype=q.dtype if tensor is None else tensor.dtype, device=q.device)

    has_q, has_k = grad_q is not None, grad_k is not None
    return like(has_q, q), like(has_k, k), like(has_q and need_q_weight, q_weight), like(has_k and need_k_weight, k_weight)


_op = define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, float eps, int norm, "
    "bool interleaved) -> (Tensor q_out, Tensor k_out)",
    _fake,
)
_backward_op = define(
    "qk_norm_rope_backward(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? q_weight, "
    "Tensor? k_weight, float eps, int norm, bool interleaved, bool need_q_weight, bool need_k_weight) -> "
    "(Tensor of_q, Tensor of_k, Tensor of_q_weight, Tensor of_k_weight)",
    _fake_backward,
)

BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, primary="q"),
    backends.triton(backends.HALF_AND_SINGLE, primary="q", extra=backends.few_channels("qk_norm_rope", primary="q")),
    backends.REFERENCE,
)

implement(
    _op,
    BACKENDS,
    "q",
    check=_check,
    triton=backends.triton_kernel("qk_norm_rope", "qk_norm_rope"),
    reference=reference.qk_norm_rope_op,
)
implement(
    _backward_op,
    BACKENDS,
    "q",
    check=_check_backward,
    triton=backends.triton_kernel("qk_norm_rope", "qk_norm_rope_backward"),
    reference=reference.qk_norm_rope_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _rows(gradient: Tensor | None) -> Tensor | None:
    """A gradient as kernels take it: any strides with a contiguous last dimension."""
    return gradient if gradient is None or gradient.stride(-1) == 1 else gradient.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, q_weight, k_weight, eps, norm, interleaved = inputs
    normalises = norm != 0
    ctx.save_for_backward(q if normalises else None, k if normalises else None, cos, sin, q_weight, k_weight)
    ctx.plan = (eps, norm, interleaved)
    ctx.set_materialize_grads(not normalises)


def _backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
    q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
    need_q, need_k, _, _, need_q_weight, need_k_weight, *_ = ctx.needs_input_grad
    again = any(t is not None and t.requires_grad for t in (grad_q, grad_k, q, k, q_weight, k_weight))
    if q is None:  # a rotation alone: its transpose is the rotation back, and needs neither q nor k
        back = None if sin is None else -sin
        of_q, of_k = _call_op(again, _rows(grad_q), _rows(grad_k), cos, back, None, None, *ctx.plan)
        return of_q if need_q else None, of_k if need_k else None, *[None] * 7
    grad_q = grad_q if need_q or need_q_weight else None
    grad_k = grad_k if need_k or need_k_weight else None
    of_q, of_k, of_q_weight, of_k_weight = _call_backward(
        again,
        _rows(grad_q),
        _rows(grad_k),
        q,
        k,
        cos,
        sin,
        q_weight,
        k_weight,
        *ctx.plan,
        need_q_weight,
        need_k_weight,
    )
    return (
        of_q if need_q and grad_q is not None else None,
        of_k if need_k and grad_k is not None else None,
        None,
        None,
        of_q_weight if need_q_weight and grad_q is not None else None,
        of_k_weight if need_k_weight and grad_k is not None else None,
        None,
        None,
        None,
    )


_call_backward = not_differentiable(_backward_op)
_call_op = differentiable(_op, _setup, _backward, twice=False)


# --- public function --------------------------------------------------------------------------------------------------
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm: Literal["rms", "l2", "layer"] | None = "rms",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as attention takes them: normalised over the channels of a head, then rotated by their positions.

    Args:
        q: [B, H, L, D]; float32, bfloat16, float16 or float64; any strides with a contiguous last dimension, such as a view
            of a packed QKV projection.
        k: [B, Hk, Lk, D] in the dtype of q, with strides of its own; Lk is L where cos is given.
        cos, sin: [L, P] or [B, L, P] (B may be 1), one angle for each pair of channels, P <= D / 2; both in the dtype of q,
            or float32 beside bfloat16 and float16. The first 2 P channels are rotated, the others pass. None: no rotation.
            They are constants: no gradient reaches them. transformers gives each angle twice: of its cos and sin [B, L, R]
            take `cos[..., : R // 2]`, a view; where it repeats each in place (GPT-J), `cos[..., ::2].contiguous()`.
        q_weight, k_weight: [D] or None, factors after the norm; in the dtype of q, or float32 beside bfloat16 and float16.
        eps: added to the mean square or the variance; with "l2" the least length.
        norm: "rms": x / sqrt(mean(x^2) + eps); "l2": x / max(|x|, eps); "layer": (x - mean) / sqrt(var + eps); None: none,
            and no weight.
        interleaved: what makes a pair: channels i and i + P (False: GPT-NeoX, Llama) or 2 i and 2 i + 1 (True: GPT-J).

    Returns:
        (q, k), new and contiguous, [B, H, L, D] and [B, Hk, Lk, D], in the dtype of q, which is rounded to once; statistics
        and rotation are float32 (float64 for float64). Backward keeps q and k themselves, and nothing without a norm.

    Raises:
        TypeError: q or k is no dense floating-point tensor, a dtype does not fit that of q, eps no float, interleaved no
            bool.
        ValueError: shapes, strides or devices that do not fit, cos without sin, an unknown norm, a weight without a norm.
        NotImplementedError: a second derivative.

    Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021). "rms" with eps 1e-5 is
    "Mixture-of-Transformers" (2025), whose modalities have weights of their own: a call for each, before they are merged.
    "layer" is IMP (2023) and the variant of 4M; None with cos and sin PILL's LLaMA.
    """
    if norm is not None and not isinstance(norm, str):
        raise TypeError(f"norm: expected 'rms', 'l2', 'layer' or None, got {type(norm).__name__}")
    number = _NUMBERS.get(norm)
    if number is None:
        raise ValueError(f"norm: expected 'rms', 'l2', 'layer' or None, got {norm!r}")
    args = (q, k, cos, sin, q_weight, k_weight, eps, number, interleaved)
    if is_compiling():
        _check(*args)
    try:
        return _call_op(wants_gradient(q, k, q_weight, k_weight), *args)
    except Exception:
        _check(*args)  # the operator's entry makes every check at a tenth of the cost; where it refuses, these say why
        raise
