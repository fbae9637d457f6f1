"""Linear attention: features of queries and keys in place of a softmax over scores; the operator and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels import runtime
from mmkernels.ops import backends
from mmkernels.ops.attention import (
    cast_heads,
    check_cu_seqlens,
    check_heads,
    check_operand,
    check_plain,
    max_seqlen_of,
)
from mmkernels.ops.checks import check_float, check_gradient
from mmkernels.ops.entry import (
    define,
    differentiable,
    empty_heads,
    implement,
    not_differentiable,
    stats_dtype,
    wants_gradient,
)
from mmkernels.reference import linear_attention as reference

FEATURE_MAPS = reference.FEATURE_MAPS
MAX_TRITON_CHANNELS = {torch.float32: 64}  # the state of a head lies in registers, 128 x 128 of half precision at most


# --- checks -----------------------------------------------------------------------------------------------------------
def _check(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    state_s: Any,
    state_z: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    feature_map: int,
    is_causal: bool,
    normalize: bool,
    eps: float,
) -> None:
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_heads(q, k, v, packed)
    if packed:
        check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    batch = cu_seqlens_q.size(0) - 1 if packed else q.size(0)
    if mask is not None:
        check_plain(mask, "mask", (torch.bool,), q)
        keys = k.size(0 if packed else 2)
        if packed and tuple(mask.shape) != (keys,):
            raise ValueError(f"mask: expected one a packed key, shape ({keys},), got {tuple(mask.shape)}")
        if not packed and (mask.dim() != 2 or mask.size(0) not in (1, batch) or mask.size(1) != keys):
            raise ValueError(f"mask: expected shape ({batch} or 1, {keys}), got {tuple(mask.shape)}")
    state = (batch, k.size(1), k.size(-1), v.size(-1))
    for value, sizes in ((state_s, state), (state_z, state[:3])):
        if (value is None) != (state_s is None):
            raise ValueError("state: expected both sums (S, z), or None; got one of them")
        if value is not None:
            check_plain(value, "state", (stats_dtype(q),), q)
            if tuple(value.shape) != tuple(sizes):
                raise ValueError(f"state: expected (S {state}, z {state[:3]}), got {tuple(value.shape)}")
    if not 0 <= feature_map < len(FEATURE_MAPS):
        raise ValueError(f"feature_map: expected 0 to {len(FEATURE_MAPS) - 1}, got {feature_map}")
    if feature_map == reference.SOFTMAX and (is_causal or state_s is not None):
        raise ValueError("feature_map: 'softmax' goes over all keys: it cannot be causal, and has no state to go on from")
    if is_causal and q.size(0 if packed else 2) != k.size(0 if packed else 2):
        sizes = tuple(x.size(0 if packed else 2) for x in (q, k))
        raise ValueError(f"is_causal: expected as many keys as queries, got {sizes[1]} and {sizes[0]}")
    check_float(eps, "eps")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")


def _check_backward(
    grad_out: Any,
    grad_s: Any,
    grad_z: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    state_s: Any,
    state_z: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    final_s: Any,
    final_z: Any,
    *rest: Any,
) -> None:
    _check(q, k, v, mask, state_s, state_z, cu_seqlens_q, cu_seqlens_k, *rest)
    packed = cu_seqlens_q is not None
    check_operand(grad_out, "grad_out", "[T, H, D]" if packed else "[B, H, L, D]", q)
    if grad_out.shape != (*q.shape[:-1], v.size(-1)):
        raise ValueError(f"grad_out: expected {(*q.shape[:-1], v.size(-1))}, got {tuple(grad_out.shape)}")
    shape = _state_shape(q, k, v, cu_seqlens_q)
    for value, name, sizes in (
        (grad_s, "grad_s", shape),
        (grad_z, "grad_z", shape[:3]),
        (final_s, "final_s", shape),
        (final_z, "final_z", shape[:3]),
    ):
        check_gradient(value, name, sizes, (stats_dtype(q),), q)


def _state_shape(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Any, ...]:
    batch = q.size(0) if cu_seqlens_q is None else cu_seqlens_q.size(0) - 1
    return batch, k.size(1), k.size(-1), v.size(-1)


# --- operators --------------------------------------------------------------------------------------------------------
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, *rest)
    shape = _state_shape(q, k, v, rest[3])
    s, z = (torch.empty(sizes, dtype=stats_dtype(q), device=q.device) for sizes in (shape, shape[:3]))
    return empty_heads(q, (*q.shape[:-1], v.size(-1)), rest[3] is not None), s, z


def _fake_backward(grad_out: Tensor, grad_s: Any, grad_z: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_backward(grad_out, grad_s, grad_z, q, k, v, *rest)
    packed = rest[3] is not None
    return (
        *(empty_heads(q, tuple(x.shape), packed) for x in (q, k, v)),
        torch.empty_like(rest[5]),
        torch.empty_like(rest[6]),
    )


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? state_s, Tensor? state_z, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, "
)
_NUMBERS = "int feature_map, bool is_causal, bool normalize, float eps"
_op = define(f"linear_attention({_TENSORS}{_NUMBERS}) -> (Tensor out, Tensor final_s, Tensor final_z)", _fake)
_backward_op = define(
    f"linear_attention_backward(Tensor grad_out, Tensor? grad_s, Tensor? grad_z, {_TENSORS}Tensor final_s, "
    f"Tensor final_z, {_NUMBERS}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_state_s, "
    "Tensor grad_state_z)",
    _fake_backward,
)


def _triton_reason(arguments: backends.Arguments) -> str | None:
    q, channels = arguments["q"], max(arguments["q"].size(-1), arguments["v"].size(-1))
    limit = MAX_TRITON_CHANNELS.get(q.dtype, 128)
    return None if channels <= limit else f"q or v has {channels} channels; the Triton kernels take {limit} of {q.dtype}"


def _tier(arguments: backends.Arguments) -> str | None:
    is_bfloat16 = arguments["q"].dtype == torch.bfloat16
    return "avx512_bf16" if is_bfloat16 and runtime.has_bf16_pairs(without_tiles=True) else None


BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, primary="q", tier_of=_tier),
    backends.triton(backends.HALF_AND_SINGLE, primary="q", extra=_triton_reason),
    backends.REFERENCE,
)

implement(
    _op,
    BACKENDS,
    "q",
    check=_check,
    triton=backends.triton_kernel("linear_attention", "linear_attention"),
    reference=reference.linear_attention_op,
)
implement(
    _backward_op,
    BACKENDS,
    "q",
    check=_check_backward,
    triton=backends.triton_kernel("linear_attention", "linear_attention_backward"),
    reference=reference.linear_attention_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], output[1], output[2])
    ctx.how = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_s: Tensor | None, grad_z: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if grad_out is None and grad_s is None and grad_z is None:
        return (None,) * 12
    q, v = saved[0], saved[2]
    if grad_out is None:
        grad_out = q.new_zeros((*q.shape[:-1], v.size(-1)))
    elif grad_out.size(-1) > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    sources = (grad_out, grad_s, grad_z, *saved[:3], *saved[4:6])
    grads = _call_backward(
        any(source is not None and source.requires_grad for source in sources),
        grad_out,
        None if grad_s is None else grad_s.contiguous(),
        None if grad_z is None else grad_z.contiguous(),
        *saved,
        *ctx.how,
    )
    results: list[Any] = [None] * 12
    for position, gradient in zip((0, 1, 2, 4, 5), grads, strict=True):
        if ctx.needs_input_grad[position]:
            results[position] = gradient
    return tuple(results)


_call_backward = not_differentiable(_backward_op)
_call_op = differentiable(_op, _setup, _backward, twice=False)


def _call(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator. Its entry makes every check at a tenth of the cost of those in Python; where it refuses, these say
    why."""
    if is_compiling():
        _check(*args)
    try:
        return _call_op(wants_gradient(args[0], args[1], args[2], args[4], args[5]), *args)
    except Exception:
        _check(*args)
        raise


# --- public function --------------------------------------------------------------------------------------------------
def _mapped(q: Any, k: Any, feature_map: Any) -> tuple[Any, Any, int]:
    """q and k after a feature map of the caller's own, and the number of what is left to do."""
    if isinstance(feature_map, str):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: expected {', '.join(FEATURE_MAPS)} or a callable, got {feature_map!r}")
        return q, k, FEATURE_MAPS.index(feature_map)
    if not callable(feature_map):
        raise TypeError(f"feature_map: expected a name or a callable, got {type(feature_map).__name__}")
    return feature_map(q), feature_map(k), FEATURE_MAPS.index("identity")


def _sums(state: Any) -> tuple[Any, Any]:
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state: expected a pair (S, z) or None, got {type(state).__name__}")
    return tuple(
        value.contiguous() if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested else value
        for value in state
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: Literal["elu1", "relu", "softmax", "identity"] | Callable[[Tensor], Tensor] = "elu1",
    is_causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Any:
    """Linear attention: phi(q_i) S_i / (phi(q_i) . z_i + eps), with S_i = sum_j phi(k_j) v_j^T and z_i = sum_j phi(k_j).

    The sums go over all keys, or, `is_causal`, over j <= i. Time and memory are linear in the lengths: phi(q) and phi(k) are
    never made as tensors, causal attention goes in chunks, and what is kept for backward beside the operands is one state
    a head.

    ============  ==========================================================================================================
    feature_map   phi
    ============  ==========================================================================================================
    "elu1"        elu(x) + 1, that is x + 1 above 0 and exp(x) below
    "relu"        max(x, 0)
    "identity"    x
    "softmax"     Efficient Attention: out = softmax(q, over its channels) (softmax(k, over the keys)^T v). Each query's
                  weights sum to 1 by themselves, so nothing is divided, whatever `normalize` says. It cannot be causal,
                  and takes and gives no state
    a callable    is applied to q and to k before the op, with "identity" inside; it may change the number of channels
    ============  ==========================================================================================================

    Args:
        q: [B, H, Lq, D]; float32, bfloat16, float16 or float64; any strides with a contiguous last dimension, so that views
            of a packed projection need no copy. With cu_seqlens: packed tokens [Tq, H, D].
        k: [B, Hk, Lk, D]; Hk divides H: each of its heads serves H / Hk neighbouring heads of q. Packed: [Tk, Hk, D].
        v: [B, Hk, Lk, Dv], or packed [Tk, Hk, Dv]; Dv may differ from D.
        feature_map: as above.
        is_causal: query i sees the keys j <= i (and the initial state); Lq and Lk must be equal.
        normalize: False leaves the denominator out.
        eps: added to the denominator, at least 0. A query whose denominator is 0 (no key counts, or no feature is shared)
            has numerators of 0 too where features are not negative, and is then 0; with eps 0 it is NaN, as torch's formula
            is.
        mask: [B or 1, Lk] bool, packed [Tk]: True = the key counts, for every head.
        state: (S [B, Hk, D, Dv], z [B, Hk, D]), float32 (float64 beside float64), added to the sums: what earlier calls
            returned, for streaming; differentiable. B counts sequences where tokens are packed.
        return_state: also return the sums over all keys, the initial state included.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 or int64, where each sequence begins among the packed tokens; from 0 to Tq
            and Tk.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences, as mk.attention takes them; the kernels do without.

    Returns:
        out [B, H, Lq, Dv] in the dtype of q, laid out in memory as [B, Lq, H, Dv] (so that `out.transpose(1, 2).flatten(2)`
        copies nothing); packed [Tq, H, Dv]. With return_state: (out, (S, z)), of the shapes and dtype of `state`,
        differentiable. Sums are float32 (float64 for float64); on the CPU features are too, on CUDA they are rounded to the
        dtype of q, as torch would round them. Under autocast q, k and v are cast as F.scaled_dot_product_attention casts
        them. The bits are the same for any number of threads.

    Raises:
        TypeError: an argument that is no tensor or number, or of a dtype that does not fit q's.
        ValueError: shapes, devices or strides that do not fit; is_causal with Lq and Lk that differ; feature_map "softmax"
            with is_causal, state or return_state; cu_seqlens that do not ascend from 0 to the tokens.
        NotImplementedError: a second derivative.

    Source: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020); "softmax" from "Efficient
    Attention: Attention with Linear Complexities" (2018).
    """
    q, k, v = cast_heads(q, k, v)
    q, k, number = _mapped(q, k, feature_map)
    state_s, state_z = _sums(state)
    for value, name, cu in ((max_seqlen_q, "max_seqlen_q", cu_seqlens_q), (max_seqlen_k, "max_seqlen_k", cu_seqlens_k)):
        if value is not None:
            max_seqlen_of(value, name, cu, q)
    for flag, name in ((is_causal, "is_causal"), (normalize, "normalize"), (return_state, "return_state")):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    if return_state and number == reference.SOFTMAX:
        raise ValueError("feature_map: 'softmax' has no state that another call could go on from; got return_state=True")
    out, *final = _call(q, k, v, mask, state_s, state_z, cu_seqlens_q, cu_seqlens_k, number, is_causal, normalize, eps)
    return (out, tuple(final)) if return_state else out
