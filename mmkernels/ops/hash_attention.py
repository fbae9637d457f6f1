"""Hashed binary attention: tokens become short binary codes, and attention among them costs additions alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import check_beside, check_float, check_gradient, check_int, check_tensor
from mmkernels.ops.entry import (
    define,
    differentiable,
    implement,
    not_differentiable,
    stats_dtype,
    wants_gradient,
)
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference import hash_attention as reference

MAX_BITS = 32
SELF_TERMS = ("own", "all")


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_hash(qk: Tensor, supports: Tensor, projection: Tensor, mean: Tensor, *_: Any) -> None:
    check_tensor(qk, "qk", "[B, H, N, D]", DTYPES)
    heads, channels = qk.shape[1], qk.shape[3]
    if channels < 1:
        raise ValueError(f"qk: expected at least one channel, got shape {tuple(qk.shape)}")
    check_tensor(supports, "supports", "[H, m, D]", DTYPES)
    check_beside(supports, "supports", qk, "qk")
    if supports.shape[0] != heads or supports.shape[1] < 1 or supports.shape[2] != channels:
        raise ValueError(
            f"supports: expected [H, m, D] or [1, H, m, D] with H {heads}, D {channels} and m at least 1, "
            f"got {tuple(supports.shape)}"
        )
    check_tensor(projection, "projection", "[H, bits, m]", DTYPES)
    check_beside(projection, "projection", qk, "qk")
    if projection.shape[0] != heads or projection.shape[2] != supports.shape[1] or not 1 <= projection.shape[1] <= MAX_BITS:
        raise ValueError(
            f"projection: expected [H, bits, m] with H {heads}, 1 to {MAX_BITS} bits and m {supports.shape[1]}, "
            f"got {tuple(projection.shape)}"
        )
    check_tensor(mean, "mean", "[H, m]", DTYPES)
    check_beside(mean, "mean", qk, "qk")
    if tuple(mean.shape) != (heads, supports.shape[1]):
        raise ValueError(
            f"mean: expected [H, m] or [1, H, 1, m] with H {heads} and m {supports.shape[1]}, got {tuple(mean.shape)}"
        )


def _check_offset(offset: Any, bits: int) -> None:
    check_float(offset, "offset")
    if not bits < offset < math.inf:
        raise ValueError(f"offset: expected more than the {bits} bits, so that every denominator is positive, got {offset}")


def _check_codes(codes: Any, name: str, shape: tuple[Any, Any, Any], v: Tensor) -> None:
    if isinstance(codes, Tensor) and codes.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, as mk.hash_codes gives, got {codes.dtype}")
    check_tensor(codes, name, "[B, H, N]", (torch.int32,))
    if codes.device != v.device:
        raise ValueError(f"{name}: expected the device of v, {v.device}, got {codes.device}")
    if any(want is not None and got != want for got, want in zip(codes.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected [B, H, N] of sizes ({wanted}), got {tuple(codes.shape)}")


def _check_attention(v: Tensor, codes_q: Tensor, codes_k: Tensor, bits: int, offset: float, own: bool) -> None:
    check_tensor(v, "v", "[B, H, N, Dv]", DTYPES)
    batch, heads, keys, _ = v.shape
    _check_codes(codes_k, "codes_k", (batch, heads, keys), v)
    _check_codes(codes_q, "codes_q", (batch, heads, keys if own else None), v)
    _check_bits(bits)
    _check_offset(offset, bits)


def _check_bits(bits: Any) -> None:
    check_int(bits, "bits", 1)
    if bits > MAX_BITS:
        raise ValueError(f"bits: expected 1 to {MAX_BITS}, got {bits}")


def _check_attention_backward(grad: Tensor, codes_q: Tensor, codes_k: Tensor, bits: int, offset: float, own: bool) -> None:
    check_tensor(grad, "grad", "[B, H, N, Dv]", DTYPES)
    check_gradient(grad, "grad", tuple(grad.shape), DTYPES, grad)
    batch, heads, queries, _ = grad.shape
    _check_codes(codes_q, "codes_q", (batch, heads, queries), grad)
    _check_codes(codes_k, "codes_k", (batch, heads, queries if own else None), grad)
    _check_bits(bits)
    _check_offset(offset, bits)


def _check_ecoformer(
    qk: Tensor, v: Tensor, supports: Tensor, projection: Tensor, mean: Tensor, offset: float, *_: Any
) -> None:
    _check_hash(qk, supports, projection, mean)
    check_tensor(v, "v", "[B, H, N, Dv]", DTYPES)
    if v.dtype != qk.dtype:
        raise TypeError(f"v: expected the dtype of qk, {qk.dtype}, got {v.dtype}")
    if v.device != qk.device:
        raise ValueError(f"v: expected the device of qk, {qk.device}, got {v.device}")
    if v.shape[:3] != qk.shape[:3]:
        raise ValueError(f"v: expected [B, H, N, Dv] beside qk {tuple(qk.shape)}, got {tuple(v.shape)}")
    _check_offset(offset, projection.shape[1])


def _state_size(bits: Any, width: Any) -> Any:
    """S, z, the sum of v, and sigma."""
    return bits * width + bits + width + 1


def _check_ecoformer_backward(
    grad: Tensor,
    qk: Tensor,
    v: Tensor,
    supports: Tensor,
    projection: Tensor,
    mean: Tensor,
    codes: Tensor,
    inside: Tensor,
    sums: Tensor,
    offset: float,
    *_: Any,
) -> None:
    _check_ecoformer(qk, v, supports, projection, mean, offset)
    check_gradient(grad, "grad", tuple(v.shape), (v.dtype,), v)
    check_gradient(codes, "codes", tuple(qk.shape[:3]), (torch.int32,), qk)
    check_gradient(inside, "inside", tuple(qk.shape[:3]), (torch.int32,), qk)
    state = _state_size(projection.shape[1], v.shape[3])
    check_gradient(sums, "sums", (*qk.shape[:2], state), (stats_dtype(qk),), qk)


# --- operators --------------------------------------------------------------------------------------------------------
def _fake_codes(qk: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    _check_hash(qk, supports, projection, mean)
    return torch.empty(qk.shape[:3], dtype=torch.int32, device=qk.device)


def _fake_attention(v: Tensor, codes_q: Tensor, codes_k: Tensor, bits: int, offset: float, own: bool) -> Tensor:
    _check_attention(v, codes_q, codes_k, bits, offset, own)
    return torch.empty((*codes_q.shape, v.shape[3]), dtype=v.dtype, device=v.device)


def _fake_attention_backward(grad: Tensor, codes_q: Tensor, codes_k: Tensor, bits: int, offset: float, own: bool) -> Tensor:
    _check_attention_backward(grad, codes_q, codes_k, bits, offset, own)
    return torch.empty((*codes_k.shape, grad.shape[3]), dtype=grad.dtype, device=grad.device)


def _fake_ecoformer(
    qk: Tensor,
    v: Tensor,
    supports: Tensor,
    projection: Tensor,
    mean: Tensor,
    offset: float,
    own: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_ecoformer(qk, v, supports, projection, mean, offset)
    state = _state_size(projection.shape[1], v.shape[3])

    def kept(shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if keep else (0,), dtype=dtype, device=qk.device)

    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        kept(qk.shape[:3], torch.int32),
        kept(qk.shape[:3], torch.int32),
        kept((*qk.shape[:2], state), stats_dtype(qk)),
    )


def _fake_ecoformer_backward(
    grad: Tensor,
    qk: Tensor,
    v: Tensor,
    supports: Tensor,
    projection: Tensor,
    mean: Tensor,
    codes: Tensor,
    inside: Tensor,
    sums: Tensor,
    offset: float,
    own: bool,
    need_qk: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    _check_ecoformer_backward(grad, qk, v, supports, projection, mean, codes, inside, sums, offset)

    def like(tensor: Tensor, needed: bool) -> Tensor:
        return torch.empty(tensor.shape if needed else (0,), dtype=qk.dtype, device=qk.device)

    return like(qk, need_qk), like(v, need_v)


_codes_op = define("hash_codes(Tensor qk, Tensor supports, Tensor projection, Tensor mean) -> Tensor", _fake_codes)
_attention_op = define(
    "hash_attention(Tensor v, Tensor codes_q, Tensor codes_k, int bits, float offset, bool own) -> Tensor",
    _fake_attention,
)
_attention_backward_op = define(
    "hash_attention_backward(Tensor grad, Tensor codes_q, Tensor codes_k, int bits, float offset, bool own) -> Tensor",
    _fake_attention_backward,
)
_ecoformer_op = define(
    "ecoformer_attention(Tensor qk, Tensor v, Tensor supports, Tensor projection, Tensor mean, float offset, bool own, "
    "bool keep) -> (Tensor out, Tensor codes, Tensor inside, Tensor sums)",
    _fake_ecoformer,
)
_ecoformer_backward_op = define(
    "ecoformer_attention_backward(Tensor grad, Tensor qk, Tensor v, Tensor supports, Tensor projection, Tensor mean, "
    "Tensor codes, Tensor inside, Tensor sums, float offset, bool own, bool need_qk, bool need_v) -> "
    "(Tensor grad_qk, Tensor grad_v)",
    _fake_ecoformer_backward,
)


def _backends(primary: str) -> tuple[backends.Backend, ...]:
    return (backends.cpu(backends.VECTOR_TIERS, primary=primary), backends.cuda(primary=primary), backends.REFERENCE)


HASH_BACKENDS = _backends("qk")
ATTENTION_BACKENDS = _backends("v")
BACKWARD_BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, primary="qk"),
    backends.Backend("cuda", lambda arguments: "the backward pass has no CUDA kernel of its own", lambda arguments: "cuda"),
    backends.torch_cuda("the backward pass is a chain of products, which torch's own kernels make", primary="qk"),
    backends.REFERENCE,
)

implement(_codes_op, HASH_BACKENDS, "qk", check=_check_hash, reference=reference.hash_codes)
implement(_attention_op, ATTENTION_BACKENDS, "v", check=_check_attention, reference=reference.hash_attention_op)
implement(
    _attention_backward_op,
    _backends("grad"),
    "grad",
    check=_check_attention_backward,
    reference=reference.hash_attention_backward_op,
)
implement(_ecoformer_op, HASH_BACKENDS, "qk", check=_check_ecoformer, reference=reference.ecoformer_attention_op)
implement(
    _ecoformer_backward_op,
    BACKWARD_BACKENDS,
    "qk",
    check=_check_ecoformer_backward,
    torch_formula=reference.ecoformer_attention_backward_op,
    reference=reference.ecoformer_attention_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _setup_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward_codes(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
    return (None,) * 4


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes_q, codes_k, *ctx.plan = inputs
    ctx.save_for_backward(codes_q, codes_k)


def _backward_attention(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_v = None
    if ctx.needs_input_grad[0]:
        grad_v = _call_attention_backward(grad.requires_grad, grad.contiguous(), *ctx.saved_tensors, *ctx.plan)
    return grad_v, None, None, None, None, None


def _backward_of_attention_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Attention is linear in v, so that its gradient's gradient is attention."""
    twice = None
    if ctx.needs_input_grad[0]:
        twice = _call_attention(grad.requires_grad, grad, *ctx.saved_tensors, *ctx.plan)
    return twice, None, None, None, None, None


def _setup_ecoformer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.offset, ctx.own, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_ecoformer(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    gradients = _call_ecoformer_backward(
        any(source.requires_grad for source in (grad, *saved[:2])), grad.contiguous(), *saved, ctx.offset, ctx.own, *needs
    )
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *(None,) * 6)


_call_ecoformer_backward = not_differentiable(_ecoformer_backward_op)
_call_codes = differentiable(_codes_op, _setup_codes, _backward_codes, twice=True)
_call_attention = differentiable(_attention_op, _setup_attention, _backward_attention, twice=True)
_call_attention_backward = differentiable(
    _attention_backward_op, _setup_attention, _backward_of_attention_backward, twice=True
)
_call_ecoformer = differentiable(_ecoformer_op, _setup_ecoformer, _backward_ecoformer, twice=False)


# --- public functions -------------------------------------------------------------------------------------------------
def _laid_out(value: Any) -> Any:
    """With a contiguous last dimension; what is no such tensor is left to the checks."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.dim() == 0:
        return value
    return value if value.stride(-1) == 1 or value.shape[-1] <= 1 else value.contiguous()


def _without(value: Any, dims: int, shape: tuple[int, ...]) -> Any:
    """A parameter as kernels take it, contiguous: of `dims` dimensions, those of size one that are stored beside taken away
    where `shape` says so."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return value
    if value.dim() == len(shape) > dims and all(want in (-1, got) for got, want in zip(value.shape, shape, strict=True)):
        value = value.reshape([size for size, want in zip(value.shape, shape, strict=True) if want == -1])
    return value.contiguous()


def _hash_arguments(qk: Any, supports: Any, projection: Any, mean: Any) -> tuple[Any, ...]:
    return (
        _laid_out(qk),
        _without(supports, 3, (1, -1, -1, -1)),
        _without(projection, 3, ()),
        _without(mean, 2, (1, -1, 1, -1)),
    )


def _offset(offset: Any, bits: int) -> float:
    if offset is None:
        return reference.default_offset(bits)
    if isinstance(offset, str):
        if offset != "power_of_two":
            raise ValueError(f"offset: expected None, a number or 'power_of_two', got {offset!r}")
        return reference.power_of_two_offset(bits)
    _check_offset(offset, bits)
    return float(offset)


def _own(self_term: Any) -> bool:
    if not isinstance(self_term, str):
        raise TypeError(f"self_term: expected 'own' or 'all', got {type(self_term).__name__}")
    if self_term not in SELF_TERMS:
        raise ValueError(f"self_term: expected 'own' or 'all', got {self_term!r}")
    return self_term == "own"


def hash_codes(qk: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    """Binary codes of tokens by kernelised hashing: bit r is set where y_r > 0, y = projection (k - mean).

    u = qk / |qk| (without eps), d_j = |u - supports_j|^2, sigma the mean of d over all tokens and supports of a sample and
    head, k_j = exp(-d_j / (2 sigma)): a token's code depends on the tokens beside it.

    Args:
        qk: [B, H, N, D], query and key in one; float32, bfloat16, float16 or float64; any strides (a strided last dimension
            is copied first).
        supports: [H, m, D] or [1, H, m, D], of length one; in the dtype of qk, or float32 beside half precision.
        projection: [H, bits, m] with 1 to 32 bits, as supports.
        mean: [H, m] or [1, H, 1, m], as supports.

    Returns:
        int32 [B, H, N], contiguous; bits from `bits` on are 0. Computed in float32 (float64 for float64 qk), under autocast
        too; a bit whose y is within rounding of 0 may fall either way, but the same way for any number of threads. A bit
        whose y is 0 or NaN is not set: after a zero row of qk, whose length has no inverse, sigma is NaN and with it every
        code of the head 0. Not differentiable (`mk.ecoformer_attention` is).

    Raises:
        TypeError: an argument is no dense floating-point tensor, or dtypes do not fit.
        ValueError: shapes or devices do not fit; more than 32 bits.

    Source: "EcoFormer: Energy-Saving Attention with Linear Complexity" (2022): 16 bits, 25 supports.
    """
    arguments = _hash_arguments(qk, supports, projection, mean)
    if is_compiling():
        _check_hash(*arguments)
    try:
        return _call_codes(False, *arguments)
    except Exception:
        _check_hash(*arguments)
        raise


def hash_attention(
    codes_q: Tensor,
    codes_k: Tensor,
    v: Tensor,
    *,
    bits: int,
    offset: float | str | None = None,
    self_term: str = "own",
) -> Tensor:
    """Linear attention of binary codes: h in {-1, +1}^bits stands for a code, and h.h' + c for a similarity.

    With S = sum_j h_j v_j^T, z = sum_j h_j and N keys, out_n = (h_n S + c own_n) / (h_n.z + N c). own_n is v_n for
    self_term "own", which published checkpoints were trained with (the weights then do not sum to one), or sum_j v_j for
    "all": the mean of the values with weights h_n.h_j + c.

    Args:
        codes_q: int32 [B, H, Lq], as `mk.hash_codes` gives them: bit r set for +1. Bits from `bits` on do not count.
        codes_k: int32 [B, H, N]; with self_term "own" Lq = N.
        v: [B, H, N, Dv]; float32, bfloat16, float16 or float64; any strides (a strided last dimension is copied first).
        bits: 1 to 32.
        offset: c, a number above `bits`; None: bits + 1, the published code's; "power_of_two": the least power of two that
            is at least bits + 1, the paper's.
        self_term: "own" or "all".

    Returns:
        [B, H, Lq, Dv], contiguous, in the dtype of v; computed in float32 (float64 for float64 v), under autocast too. Its
        gradient is that of v, any number of times. An infinite value makes NaN of its column. The bits are the same for any
        number of threads.

    Raises:
        TypeError: codes are not int32, v is no dense floating-point tensor, bits no int, offset no number.
        ValueError: shapes or devices do not fit; bits, offset or self_term out of range.

    Source: "EcoFormer: Energy-Saving Attention with Linear Complexity" (2022).
    """
    own = _own(self_term)
    _check_bits(bits)
    arguments = (_laid_out(v), _laid_out(codes_q), _laid_out(codes_k), bits, _offset(offset, bits), own)
    if is_compiling():
        _check_attention(*arguments)
    try:
        return _call_attention(wants_gradient(v), *arguments)
    except Exception:
        _check_attention(*arguments)
        raise


def ecoformer_attention(
    qk: Tensor,
    v: Tensor,
    supports: Tensor,
    projection: Tensor,
    mean: Tensor,
    *,
    self_term: str = "own",
    offset: float | str | None = None,
) -> Tensor:
    """`mk.hash_codes` and `mk.hash_attention` of one tensor of queries and keys in one op, with the gradient of training.

    Args:
        qk, supports, projection, mean: as in `mk.hash_codes`.
        v: [B, H, N, Dv], in the dtype of qk.
        self_term, offset: as in `mk.hash_attention`.

    Returns:
        [B, H, N, Dv], contiguous, in the dtype of v; computed in float32 (float64 for float64 qk), under autocast too.
        Gradients of qk and v, not twice; none of supports, projection and mean. The sign passes a gradient straight through
        where -1 < y < 1 and stops it elsewhere; it goes on through the kernel, sigma and the length of qk. Where y is 0 the
        feature is -1, as in `mk.hash_codes` (the published code has 0 there). Where a y is NaN, as after a zero row of qk,
        all outputs and gradients of that head are. The bits are the same for any number of threads.

    Raises:
        TypeError: an argument is no dense floating-point tensor, or dtypes do not fit.
        ValueError: shapes or devices do not fit; offset or self_term out of range.
        NotImplementedError: a second derivative.

    Source: "EcoFormer: Energy-Saving Attention with Linear Complexity" (2022).
    """
    own = _own(self_term)
    tensors = _hash_arguments(qk, supports, projection, mean)
    if not isinstance(tensors[2], Tensor) or tensors[2].dim() != 3:
        _check_hash(*tensors)
    grad = wants_gradient(qk, v) if isinstance(qk, Tensor) and isinstance(v, Tensor) else False
    arguments = (tensors[0], _laid_out(v), *tensors[1:], _offset(offset, tensors[2].shape[1]), own, grad)
    if is_compiling():
        _check_ecoformer(*arguments)
    try:
        return _call_ecoformer(grad, *arguments)[0]
    except Exception:
        _check_ecoformer(*arguments)
        raise
