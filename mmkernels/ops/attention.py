"""Softmax attention with every mask and bias: the operator, its checks and its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels import runtime
from mmkernels.ops import backends, hopper_attention
from mmkernels.ops.checks import INT64_MAX, check_float, check_gradient, check_tensor
from mmkernels.ops.entry import (
    autocast_dtype,
    define,
    differentiable,
    empty_heads,
    implement,
    not_differentiable,
    stats_dtype,
    wants_gradient,
)
from mmkernels.reference import attention as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


# --- checks -----------------------------------------------------------------------------------------------------------
def check_operand(value: Any, name: str, shape: str, q: Tensor) -> None:
    check_tensor(value, name, shape, DTYPES)
    if value.dtype != q.dtype:
        raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {value.dtype}")
    _check_device(value, name, q)


def _check_device(value: Tensor, name: str, q: Tensor) -> None:
    if value.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {value.device}")


def check_plain(value: Any, name: str, dtypes: tuple[torch.dtype, ...], q: Tensor) -> None:
    """A dense tensor beside q, of one of `dtypes`, whatever its strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested tensor' if value.is_nested else value.layout}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    _check_device(value, name, q)


def _sizes(q: Tensor, k: Tensor, packed: bool) -> tuple[Any, Any, Any, Any]:
    """(H, Hk, Lq, Lk); for packed sequences Lq and Lk are the tokens of all."""
    return (q.size(1), k.size(1), q.size(0), k.size(0)) if packed else (q.size(1), k.size(1), q.size(2), k.size(2))


def check_heads(q: Any, k: Any, v: Any, packed: bool) -> None:
    """Operands of heads that fit each other: [B, H, L, D], or packed [T, H, D]."""
    shape = "[T, H, D]" if packed else "[B, H, L, D]"
    check_tensor(q, "q", shape, DTYPES)
    check_operand(k, "k", shape, q)
    check_operand(v, "v", shape, q)
    if not packed and k.size(0) != q.size(0):
        raise ValueError(f"k: expected the batch of q, {q.size(0)}, got {k.size(0)}")
    if k.size(-1) != q.size(-1):
        raise ValueError(f"k: expected the channels of q, {q.size(-1)}, got {k.size(-1)}")
    if q.size(-1) == 0:
        raise ValueError("q: expected at least one channel, got none")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: expected k's shape but for the last dimension, {tuple(k.shape)}, got {tuple(v.shape)}")
    heads, kv_heads, _, _ = _sizes(q, k, packed)
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"k: expected heads that divide q's {heads}, got {kv_heads}")


def check_cu_seqlens(cu_seqlens_q: Any, cu_seqlens_k: Any, q: Tensor) -> None:
    """Both there, of one length, integers beside q. What they hold is checked where it is read."""
    for cu, name in ((cu_seqlens_q, "cu_seqlens_q"), (cu_seqlens_k, "cu_seqlens_k")):
        if cu is None:
            raise ValueError(f"{name}: expected with the other cu_seqlens, or neither; got None")
        check_plain(cu, name, INDEX_DTYPES, q)
        if cu.dim() != 1 or cu.size(0) < 1:
            raise ValueError(f"{name}: expected [B + 1], got shape {tuple(cu.shape)}")
    if cu_seqlens_k.size(0) != cu_seqlens_q.size(0):
        raise ValueError(
            f"cu_seqlens_k: expected as many as cu_seqlens_q, {cu_seqlens_q.size(0)}, got {cu_seqlens_k.size(0)}"
        )


def _check_scores(value: Any, name: str, dtypes: tuple[torch.dtype, ...], q: Tensor, k: Tensor, cu: Tensor | None) -> None:
    """Broadcastable to [B, H, Lq, Lk]; of packed sequences the last two are those of the longest, or longer."""
    check_plain(value, name, dtypes, q)
    if value.dim() > 4:
        raise ValueError(f"{name}: expected at most the 4 dimensions of [B, H, Lq, Lk], got shape {tuple(value.shape)}")
    batch = q.size(0) if cu is None else cu.size(0) - 1
    heads, _, len_q, len_k = _sizes(q, k, cu is not None)
    full = (batch, heads, len_q, len_k)[4 - value.dim() :]
    for dim, (size, expected) in enumerate(zip(value.shape, full, strict=True)):
        free = cu is not None and dim + 4 - value.dim() >= 2
        if size != 1 and size != expected and not free:
            raise ValueError(f"{name}: expected a shape broadcastable to {full}, got {tuple(value.shape)}")


def _check_rows_of(value: Any, name: str, length: Any, q: Tensor, packed: bool) -> None:
    """One integer a token: [B or 1, L], of packed sequences [T]."""
    check_plain(value, name, INDEX_DTYPES, q)
    if packed:
        if value.dim() != 1 or value.size(0) != length:
            raise ValueError(f"{name}: expected one a packed token, shape ({length},), got {tuple(value.shape)}")
    elif value.dim() != 2 or value.size(1) != length or (value.size(0) != 1 and value.size(0) != q.size(0)):
        raise ValueError(f"{name}: expected shape ({q.size(0)} or 1, {length}), got {tuple(value.shape)}")


def _check_attention(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    mask: Any,
    limits: Any,
    segment_ids_q: Any,
    segment_ids_k: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    value_gate: Any,
    seed: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    window_left: Any,
    window_right: Any,
    bottom_right: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
) -> None:
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_heads(q, k, v, packed)
    _, _, len_q, len_k = _sizes(q, k, packed)
    if packed:
        check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    wide = (q.dtype, torch.float32) if q.dtype != torch.float64 else (torch.float64,)
    if bias is not None:
        _check_scores(bias, "bias", wide, q, k, cu_seqlens_q)
    if mask is not None:
        _check_scores(mask, "mask", (torch.bool,), q, k, cu_seqlens_q)
    if limits is not None:
        _check_rows_of(limits, "limits", len_q, q, packed)
    if (segment_ids_q is None) != (segment_ids_k is None):
        missing = "segment_ids_q" if segment_ids_q is None else "segment_ids_k"
        raise ValueError(f"{missing}: expected with the segment ids of the other side, or neither; got None")
    if segment_ids_q is not None:
        _check_rows_of(segment_ids_q, "segment_ids_q", len_q, q, packed)
        _check_rows_of(segment_ids_k, "segment_ids_k", len_k, q, packed)
    if value_gate is not None:
        check_plain(value_gate, "value_gate", wide, q)
        if value_gate.shape != v.shape[:-1]:
            raise ValueError(
                f"value_gate: expected one a key and head, {tuple(v.shape[:-1])}, got {tuple(value_gate.shape)}"
            )
    check_float(scale, "scale")
    check_float(softcap, "softcap")
    if softcap < 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    check_float(dropout_p, "dropout_p")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if seed is not None:
        check_plain(seed, "seed", (torch.int64,), q)
        if seed.numel() != 1:
            raise ValueError(f"seed: expected one number, got shape {tuple(seed.shape)}")
    elif dropout_p > 0:
        raise ValueError("seed: expected a number where dropout_p is positive, got None")


def _check_attention_backward(
    grad_out: Any,
    grad_lse: Any,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    mask: Any,
    limits: Any,
    segment_ids_q: Any,
    segment_ids_k: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    value_gate: Any,
    seed: Any,
    out: Any,
    lse: Any,
    *rest: Any,
) -> None:
    _check_attention(
        q, k, v, bias, mask, limits, segment_ids_q, segment_ids_k, cu_seqlens_q, cu_seqlens_k, value_gate, seed, *rest[:8]
    )
    for value, name in ((grad_out, "grad_out"), (out, "out")):
        check_operand(value, name, "[T, H, D]" if cu_seqlens_q is not None else "[B, H, L, D]", q)
        if value.shape != (*q.shape[:-1], v.size(-1)):
            raise ValueError(f"{name}: expected {(*q.shape[:-1], v.size(-1))}, got {tuple(value.shape)}")
    check_gradient(grad_lse, "grad_lse", q.shape[:-1], (stats_dtype(q),), q)
    check_gradient(lse, "lse", q.shape[:-1], (stats_dtype(q),), q)


# --- operators --------------------------------------------------------------------------------------------------------
def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, *rest)
    out = empty_heads(q, (*q.shape[:-1], v.size(-1)), rest[5] is not None)
    return out, torch.empty(q.shape[:-1], dtype=stats_dtype(q), device=q.device)


def _fake_attention_backward(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check_attention_backward(grad_out, grad_lse, q, k, v, *rest)
    bias, cu_seqlens_q, value_gate = rest[0], rest[5], rest[7]
    need_bias, need_gate = rest[-2:]
    packed = cu_seqlens_q is not None

    def small(needed: bool, like: Tensor | None) -> Tensor:
        shape = like.shape if needed and like is not None else (0,)
        return torch.empty(shape, dtype=q.dtype if like is None else like.dtype, device=q.device)

    return (
        *(empty_heads(q, tuple(x.shape), packed) for x in (q, k, v)),
        small(need_bias, bias),
        small(need_gate, value_gate),
    )


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? limits, Tensor? segment_ids_q, "
    "Tensor? segment_ids_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? value_gate, Tensor? seed, "
)
_NUMBERS = (
    "float scale, float softcap, float dropout_p, SymInt window_left, SymInt window_right, bool bottom_right, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_attention_op = define(f"attention({_TENSORS}{_NUMBERS}) -> (Tensor out, Tensor lse)", _fake_attention)
_attention_backward_op = define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, {_TENSORS}Tensor out, Tensor lse, {_NUMBERS}, bool need_bias, "
    "bool need_gate) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_gate)",
    _fake_attention_backward,
)


def _triton_reason(arguments: backends.Arguments) -> str | None:
    channels = max(arguments["q"].size(-1), arguments["v"].size(-1))
    return None if channels <= 256 else f"q or v has {channels} channels; the Triton kernels take 256"


def tier_beyond_vectors(x: Tensor, pairs: Iterable[tuple[int, int]], dim: int, value_dim: int) -> str | None:
    """ "amx" or "avx512_bf16" where it takes one of the `pairs` of rows and keys: the rule is the compiled library's own."""
    if (autocast_dtype(x) or x.dtype) != torch.bfloat16:
        return None
    takers = (runtime.library.mmk_attention_beyond_vectors(rows, keys, dim, value_dim) for rows, keys in pairs)
    taker: bytes | None = next(filter(None, takers), None)
    return None if taker is None else taker.decode().removeprefix("cpu/")


def _tier(arguments: backends.Arguments) -> str | None:
    q, k, cu_q, cu_k = (arguments[name] for name in ("q", "k", "cu_seqlens_q", "cu_seqlens_k"))
    group = q.size(1) // k.size(1)
    lengths = [(q.size(2), k.size(2))] if cu_q is None else zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)
    pairs = ((group * len_q, len_k) for len_q, len_k in lengths)
    return tier_beyond_vectors(q, pairs, q.size(-1), arguments["v"].size(-1))


_CPU = backends.cpu(backends.VECTOR_TIERS, primary="q", tier_of=_tier)
_TRITON = backends.triton(backends.HALF_AND_SINGLE, primary="q", extra=_triton_reason)
BACKENDS = (_CPU, backends.cuda(primary="q", extra=hopper_attention.reason), _TRITON, backends.REFERENCE)
BACKWARD_BACKENDS = (_CPU, _TRITON, backends.REFERENCE)

implement(
    _attention_op,
    BACKENDS,
    "q",
    check=_check_attention,
    triton=backends.triton_kernel("attention", "attention"),
    cuda=hopper_attention.attention,
    reference=reference.attention_op,
)
implement(
    _attention_backward_op,
    BACKWARD_BACKENDS,
    "q",
    check=_check_attention_backward,
    triton=backends.triton_kernel("attention", "attention_backward"),
    reference=reference.attention_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.numbers = inputs[12:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    out = saved[12]
    if grad_out is None and grad_lse is None:
        return (None,) * 20
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.size(-1) > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    need = ctx.needs_input_grad
    sources = (grad_out, grad_lse, saved[0], saved[1], saved[2], saved[3], saved[10])
    grad_q, grad_k, grad_v, grad_bias, grad_gate = _call_attention_backward(
        any(source is not None and source.requires_grad for source in sources),
        grad_out,
        None if grad_lse is None else grad_lse.contiguous(),
        *saved,
        *ctx.numbers,
        need[3],
        need[10],
    )
    results: list[Any] = [None] * 20
    for position, gradient in ((0, grad_q), (1, grad_k), (2, grad_v), (3, grad_bias), (10, grad_gate)):
        if need[position]:
            results[position] = gradient
    return tuple(results)


_call_attention_backward = not_differentiable(_attention_backward_op)
_call_attention = differentiable(_attention_op, _setup, _backward, twice=False)


def _call(*args: Any) -> tuple[Tensor, Tensor]:
    """The operator. Its entry makes every check at a tenth of the cost of those in Python; where it refuses, these say
    why."""
    if is_compiling():
        _check_attention(*args)
    try:
        return _call_attention(wants_gradient(args[0], args[1], args[2], args[3], args[10]), *args)
    except Exception:
        _check_attention(*args)
        raise


# --- public functions -------------------------------------------------------------------------------------------------
def _four(value: Any) -> Any:
    """The missing leading dimensions of [B, H, Lq, Lk]; what has too many is left to the checks."""
    if not isinstance(value, Tensor) or value.dim() >= 4 or value.layout != torch.strided:
        return value
    return value[(None,) * (4 - value.dim())]


def _window(window_size: Any, is_causal: bool) -> tuple[Any, Any]:
    """(left, right) with -1 for unlimited; causal is a right side of 0."""
    left: Any = -1
    right: Any = -1
    if window_size is not None:
        if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
            raise TypeError(f"window_size: expected (left, right) or None, got {window_size!r}")
        for size in window_size:
            if size is not None and (isinstance(size, bool) or not isinstance(size, (int, torch.SymInt))):
                raise TypeError(f"window_size: expected two ints or None, got {window_size!r}")
            if size is not None and (size < 0 or (isinstance(size, int) and size > INT64_MAX)):
                raise ValueError(
                    f"window_size: expected sizes from 0 to 2^63 - 1, or None for unlimited; got {window_size!r}"
                )
        left, right = (-1 if size is None else size for size in window_size)
    return left, 0 if is_causal else right


def max_seqlen_of(value: Any, name: str, cu_seqlens: Any, q: Any) -> Any:
    if value is None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_cpu or cu_seqlens.dim() != 1 or cu_seqlens.size(0) < 2:
            return 0  # the CPU kernels read the lengths themselves
        if not isinstance(q, Tensor) or cu_seqlens.device != q.device:
            return 0  # left to the checks
        return int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
    if value < 0 or (isinstance(value, int) and value > INT64_MAX):
        raise ValueError(f"{name}: expected a length from 0 to 2^63 - 1, got {value}")
    return value


def _seed_tensor(seed: Any, dropout_p: Any, q: Any) -> Tensor | None:
    if isinstance(seed, Tensor):
        return seed
    if not isinstance(q, Tensor) or (seed is None and not (isinstance(dropout_p, (int, float)) and dropout_p > 0)):
        return None
    if seed is None:
        return torch.randint(INT64_MAX, (1,), dtype=torch.int64, device=q.device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor of one number, or None; got {type(seed).__name__}")
    if not -(2**63) <= seed <= INT64_MAX:
        raise ValueError(f"seed: expected a 64-bit number, got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=q.device)


def cast_heads(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    dtype = autocast_dtype(q) if isinstance(q, Tensor) else None
    if dtype is None:
        return q, k, v
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Literal["top_left", "bottom_right"] = "top_left",
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    limits: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    value_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention: softmax(softcap(scale q k^T) + bias, over the visible keys) (value_gate v).

    No tensor of scores is ever made. Every combination of the arguments is legal, forward and backward.

    ===========================  =========================================================================================
    a query i sees the key j     where all that are given agree
    ===========================  =========================================================================================
    mask                         mask[..., i, j] is True
    is_causal                    j <= at(i)
    window_size=(left, right)    at(i) - left <= j <= at(i) + right; None is unlimited
    limits                       j < limits[b, i]
    segment_ids_q, _k            segment_ids_q[b, i] == segment_ids_k[b, j]
    cu_seqlens_q, _k             both in the same sequence, whose lengths are then Lq and Lk
    ===========================  =========================================================================================

    `causal_alignment` says where a query stands among the keys: "top_left", at(i) = i (torch's meaning), or "bottom_right",
    at(i) = i + Lk - Lq (decoding: the last query sees every key). For Lq = 3, Lk = 5, and x = sees::

        top_left   x . . . .      bottom_right   x x x . .
                   x x . . .                     x x x x .
                   x x x . .                     x x x x x

    Args:
        q: [B, H, Lq, D]; float32, bfloat16, float16 or float64; any strides with a contiguous last dimension, so that views
            of a packed projection need no copy. With cu_seqlens: packed tokens [Tq, H, D].
        k: [B, Hk, Lk, D]; Hk divides H: each of its heads serves H / Hk neighbouring heads of q. Packed: [Tk, Hk, D].
        v: [B, Hk, Lk, Dv], or packed [Tk, Hk, Dv]; Dv may differ from D.
        bias: broadcastable to [B, H, Lq, Lk], added to the scores; in the dtype of q, or float32 beside half precision;
            differentiable. With cu_seqlens, Lq and Lk are those of the longest sequences, or longer.
        mask: bool, broadcastable as bias is; True = sees.
        is_causal, causal_alignment, window_size: as above.
        scale: factor of the scores; None is D ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap), before the bias; None is none.
        limits: [B or 1, Lq] int32 or int64; packed [Tq].
        segment_ids_q, segment_ids_k: [B or 1, Lq] and [B or 1, Lk] int32 or int64; packed [Tq] and [Tk].
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 or int64, where each sequence begins among the packed tokens; from 0 to Tq
            and Tk.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences; None asks cu_seqlens (on a GPU that waits for it).
        value_gate: [B, Hk, Lk], packed [Tk, Hk]: a factor of each value; in the dtype of q or float32; differentiable.
        dropout_p: probability in [0, 1) with which a weight is dropped; the others are divided by 1 - dropout_p.
        seed: of the dropout: an int or an int64 tensor of one number; None draws one from torch's generator. The same seed
            drops the same weights, on every device.
        return_lse: also return the logarithm of the sums of exponentials.

    Returns:
        out [B, H, Lq, Dv] in the dtype of q, laid out in memory as [B, Lq, H, Dv] (so that `out.transpose(1, 2).flatten(2)`
        copies nothing); packed [Tq, H, Dv]. With return_lse: (out, lse), lse [B, H, Lq] or [Tq, H], float32 (float64 for
        float64), differentiable. A query that sees nothing has out 0, lse -inf and no gradient. Under autocast q, k and v
        are cast as F.scaled_dot_product_attention casts them.

    Raises:
        TypeError: an argument that is no tensor or number, or of a dtype that does not fit q's.
        ValueError: shapes, devices or strides that do not fit; cu_seqlens that do not ascend from 0 to the tokens.
        NotImplementedError: a second derivative.

    Source: "Attention Is All You Need" (2017); tiled as in "FlashAttention" (2022); value_gate from "PILL" (2023).
    """
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment: expected 'top_left' or 'bottom_right', got {causal_alignment!r}")
    left, right = _window(window_size, is_causal)
    q, k, v = cast_heads(q, k, v)
    if isinstance(softcap, (int, float)) and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if scale is None and isinstance(q, Tensor) and q.dim() > 0:
        scale = max(q.size(-1), 1) ** -0.5
    out, lse = _call(
        q,
        k,
        v,
        _four(bias),
        _four(mask),
        limits,
        segment_ids_q,
        segment_ids_k,
        cu_seqlens_q,
        cu_seqlens_k,
        value_gate,
        _seed_tensor(seed, dropout_p, q),
        scale,
        0.0 if softcap is None else softcap,
        dropout_p,
        left,
        right,
        causal_alignment == "bottom_right",
        0 if cu_seqlens_q is None else max_seqlen_of(max_seqlen_q, "max_seqlen_q", cu_seqlens_q, q),
        0 if cu_seqlens_k is None else max_seqlen_of(max_seqlen_k, "max_seqlen_k", cu_seqlens_k, q),
    )
    return (out, lse) if return_lse else out
