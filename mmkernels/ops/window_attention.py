"""Shifted-window attention from the packed projection to the grid: the operator, its checks and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.attention import tier_beyond_vectors
from mmkernels.ops.checks import check_float, check_gradient, check_int, check_matrix, check_parameter, check_rows
from mmkernels.ops.entry import (
    autocast_dtype,
    define,
    differentiable,
    implement,
    not_differentiable,
    stats_dtype,
    wants_gradient,
)
from mmkernels.reference import window_attention as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_TOKENS = 2**24  # of a window


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_qkv(qkv: Any) -> None:
    check_rows(qkv, "qkv", DTYPES)
    if not 4 <= qkv.dim() <= 5:
        raise ValueError(f"qkv: expected [B, H, W, 3*C] or [B, D, H, W, 3*C], got shape {tuple(qkv.shape)}")


def _check_heads(num_heads: Any, qkv: Tensor) -> None:
    check_int(num_heads, "num_heads", 1)
    if qkv.size(-1) == 0:
        raise ValueError("qkv: expected at least one channel, got none")
    if qkv.size(-1) % (3 * num_heads) != 0:
        raise ValueError(f"num_heads: expected heads that divide C, a third of qkv's {qkv.size(-1)}, got {num_heads}")


def _check_mask_value(mask_value: Any) -> None:
    check_float(mask_value, "mask_value")
    if math.isnan(mask_value) or mask_value == math.inf:
        raise ValueError(f"mask_value: expected a number or -inf, got {mask_value}")


def _check_sizes(value: Any, name: str, axes: int, minimum: int) -> None:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected {axes} ints, one an axis of the grid, got {type(value).__name__}")
    if len(value) != axes:
        raise ValueError(f"{name}: expected {axes} ints, one an axis of the grid, got {value!r}")
    for size in value:
        check_int(size, name, minimum)


def _check_window_attention(
    qkv: Any,
    rel_bias_table: Any,
    pad_value: Any,
    head_scale: Any,
    window: Any,
    shift: Any,
    num_heads: Any,
    scale: Any,
    bias_window: Any,
    pad_first: Any,
    norm_eps: Any,
    mask_value: Any,
    *_: Any,
) -> None:
    _check_qkv(qkv)
    axes = qkv.dim() - 2
    _check_heads(num_heads, qkv)
    _check_sizes(window, "window", axes, 1)
    tokens = math.prod(window)
    if tokens > MAX_TOKENS:
        raise ValueError(f"window: expected at most {MAX_TOKENS} tokens, got {tuple(window)}")
    _check_sizes(shift, "shift", axes, 0)
    if any(step >= extent for step, extent in zip(shift, window, strict=True)):
        raise ValueError(f"shift: expected less than the window, {tuple(window)}, on every axis, got {tuple(shift)}")
    _check_sizes(bias_window, "bias_window", axes, 1)
    if math.prod(bias_window) < tokens:
        raise ValueError(f"bias_window: expected at least the {tokens} tokens of the window, got {tuple(bias_window)}")
    if rel_bias_table is not None:
        rows = math.prod([2 * extent - 1 for extent in bias_window])
        dtypes = (qkv.dtype,) if qkv.dtype in (torch.float32, torch.float64) else (qkv.dtype, torch.float32)
        check_matrix(rel_bias_table, "rel_bias_table", "[relative positions, num_heads]", dtypes)
        if rel_bias_table.size(0) != rows or rel_bias_table.size(1) != num_heads:
            raise ValueError(f"rel_bias_table: expected shape ({rows}, {num_heads}), got {tuple(rel_bias_table.shape)}")
        if rel_bias_table.device != qkv.device:
            raise ValueError(f"rel_bias_table: expected the device of qkv, {qkv.device}, got {rel_bias_table.device}")
    check_parameter(pad_value, "pad_value", qkv.size(-1), qkv, "qkv")
    check_parameter(head_scale, "scale", num_heads, qkv, "qkv")
    check_float(scale, "scale")
    check_float(norm_eps, "norm_eps")
    _check_mask_value(mask_value)


def _check_window_attention_backward(
    grad_out: Any,
    qkv: Any,
    rel_bias_table: Any,
    pad_value: Any,
    head_scale: Any,
    out: Any,
    lse: Any,
    *rest: Any,
) -> None:
    _check_window_attention(qkv, rel_bias_table, pad_value, head_scale, *rest)
    shape = (*qkv.shape[:-1], qkv.size(-1) // 3)
    check_gradient(grad_out, "grad_out", shape, (qkv.dtype,), qkv)
    check_gradient(out, "out", shape, (qkv.dtype,), qkv)
    check_gradient(lse, "lse", _lse_shape(qkv, *rest[:3]), (stats_dtype(qkv),), qkv)


# --- operators --------------------------------------------------------------------------------------------------------
def _lse_shape(qkv: Tensor, window: Sequence[Any], shift: Sequence[Any], num_heads: Any) -> tuple[Any, Any, Any]:
    windows = math.prod([(size + extent - 1) // extent for size, extent in zip(qkv.shape[1:-1], window, strict=True)])
    return qkv.size(0) * windows, num_heads, math.prod(window)


def _fake_window_attention(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_window_attention(qkv, *rest)
    out = torch.empty((*qkv.shape[:-1], qkv.size(-1) // 3), dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty(_lse_shape(qkv, *rest[3:6]), dtype=stats_dtype(qkv), device=qkv.device)


def _fake_window_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_bias_table: Tensor | None,
    pad_value: Tensor | None,
    head_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _check_window_attention_backward(grad_out, qkv, rel_bias_table, pad_value, head_scale, *rest)

    def small(needed: bool, like: Tensor | None) -> Tensor:
        shape = like.shape if needed and like is not None else (0,)
        return torch.empty(shape, dtype=qkv.dtype if like is None else like.dtype, device=qkv.device)

    return (
        torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
        *(small(needed, like) for needed, like in zip(rest[-3:], (rel_bias_table, pad_value, head_scale), strict=True)),
    )


_TENSORS = "Tensor qkv, Tensor? rel_bias_table, Tensor? pad_value, Tensor? head_scale, "
_NUMBERS = (
    "SymInt[] window, SymInt[] shift, SymInt num_heads, float scale, SymInt[] bias_window, bool pad_first, float norm_eps, "
    "float mask_value"
)
_window_attention_op = define(f"window_attention({_TENSORS}{_NUMBERS}) -> (Tensor out, Tensor lse)", _fake_window_attention)
_window_attention_backward_op = define(
    f"window_attention_backward(Tensor grad_out, {_TENSORS}Tensor out, Tensor lse, {_NUMBERS}, bool need_table, "
    "bool need_pad, bool need_scale) -> (Tensor grad_qkv, Tensor grad_table, Tensor grad_pad, Tensor grad_scale)",
    _fake_window_attention_backward,
)


def _tier(arguments: backends.Arguments) -> str | None:
    tokens, dim = math.prod(arguments["window"]), arguments["qkv"].size(-1) // (3 * arguments["num_heads"])
    return tier_beyond_vectors(arguments["qkv"], [(tokens, tokens)], dim, dim)


def _triton_reason(arguments: backends.Arguments) -> str | None:
    from mmkernels.triton import window_attention as launches  # asked only where there is Triton

    qkv, window = arguments["qkv"], arguments["window"]
    channels = qkv.size(-1) // (3 * arguments["num_heads"])
    if channels > launches.MAX_CHANNELS:
        return f"heads of qkv have {channels} channels; the Triton kernels take {launches.MAX_CHANNELS}"
    if math.prod(window) > launches.MAX_TOKENS:
        return f"window has {math.prod(window)} tokens; the Triton kernels take {launches.MAX_TOKENS}"
    padded = math.prod(-(-size // extent) * extent for size, extent in zip(qkv.shape[1:-1], window, strict=True))
    if padded > launches.MAX_GRID:
        return f"the grid has {padded} tokens with its pads; the Triton kernels take {launches.MAX_GRID}"
    return None


BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, primary="qkv", tier_of=_tier),
    backends.triton(backends.HALF_AND_SINGLE, primary="qkv", extra=_triton_reason),
    backends.REFERENCE,
)

implement(
    _window_attention_op,
    BACKENDS,
    "qkv",
    check=_check_window_attention,
    triton=backends.triton_kernel("window_attention", "window_attention"),
    reference=reference.window_attention_op,
)
implement(
    _window_attention_backward_op,
    BACKENDS,
    "qkv",
    check=_check_window_attention_backward,
    triton=backends.triton_kernel("window_attention", "window_attention_backward"),
    reference=reference.window_attention_backward_op,
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.numbers = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 12
    need = ctx.needs_input_grad
    saved = ctx.saved_tensors
    gradients = _call_window_attention_backward(
        any(source is not None and source.requires_grad for source in (grad_out, *saved[:4])),
        grad_out.contiguous(),
        *saved,
        *ctx.numbers,
        *need[1:4],
    )
    return (*(gradient if needed else None for gradient, needed in zip(gradients, need[:4], strict=True)), *[None] * 8)


_call_window_attention_backward = not_differentiable(_window_attention_backward_op)
_call_window_attention = differentiable(_window_attention_op, _setup, _backward, twice=False)


def _call(*args: Any) -> Tensor:
    """The operator. Its entry makes every check at a tenth of the cost of those in Python; where it refuses, these say
    why."""
    if is_compiling():
        _check_window_attention(*args)
    try:
        return _call_window_attention(wants_gradient(*args[:4]), *args)[0]
    except Exception:
        _check_window_attention(*args)
        raise


# --- public function --------------------------------------------------------------------------------------------------
def _collapsed(qkv: Tensor) -> Tensor:
    """qkv with its tokens evenly spaced, as the kernels take them; copied where they are not."""
    span: Any = None
    for axis in range(qkv.dim() - 2, -1, -1):
        size, stride = qkv.size(axis), qkv.stride(axis)
        if size == 1:
            continue
        if span is not None and stride != span:
            return qkv.contiguous()
        span = stride * size
    return qkv


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.layout == torch.strided else value


def _cast(value: Any, dtype: torch.dtype, *, keep: torch.dtype | None = None) -> Any:
    """As autocast casts for a matrix product: float32 and half precision, but what is of the dtype `keep`."""
    taken = isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in (torch.float64, keep)
    return value.to(dtype) if taken else value


def window_attention(
    qkv: Tensor,
    rel_bias_table: Tensor | None,
    *,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    scale: float | Tensor | None = None,
    pad_value: Tensor | None = None,
    pad_order: Literal["roll_pad", "pad_roll"] = "roll_pad",
    bias_window: Sequence[int] | None = None,
    qk_norm: Literal["l2"] | None = None,
    mask_value: float = -100.0,
) -> Tensor:
    """Attention within the windows of a grid, shifted: all that a Swin block does between its two projections.

    Cyclic shift, padding, partition into windows, softmax(scale q k^T + bias + mask) v, and all the way back, in one pass
    that makes none of the tensors in between. On one axis of 5 tokens, with window 4 and shift 2, it sees::

        pad_order="roll_pad" (timm)    2 3 4 0 | 1 . . .        pad_order="pad_roll" (MONAI)    2 3 4 . | . . 0 1
        regions                        0 0 0 0 | 1 1 2 2        regions                         0 0 0 0 | 1 1 2 2

    where a dot is a pad, and a query adds `mask_value` to the scores of keys of other regions than its own. The regions are
    slices of the padded axis at -window and -shift, 9 of a plane and 27 of a volume; an axis without shift has one region.
    Pads are keys as good as others: what was published does not mask them.

    Args:
        qkv: [B, H, W, 3*C] or [B, D, H, W, 3*C], the channels as [q | k | v], each [num_heads, head_dim]; float32, bfloat16,
            float16 or float64; any strides with a contiguous last dimension (where the tokens are not evenly spaced,
            it is copied).
        rel_bias_table: [(2 w0 - 1)(2 w1 - 1).., num_heads] with the extents w of the bias window, or None; in the dtype of
            qkv, or float32 beside half precision.
        window: extents, one an axis of the grid. The grid is padded at the end of each axis to a multiple of them, so a
            window may be larger than the grid.
        shift: how far the grid is rolled back, one an axis, each less than the window's extent; (0, 0) is none.
        num_heads: H, which divides C.
        scale: factor of the scores: a number, a tensor [num_heads] (in the dtype of qkv, or float32 beside half
            precision), or None for head_dim ** -0.5.
        pad_value: [3*C], qkv of a pad, in the dtype of qkv, or float32 beside half precision; None is zeros. Published
            blocks pad before the projection, so there it is the projection's bias.
        pad_order: "roll_pad" rolls the grid and pads it then, as timm does; "pad_roll" pads and rolls the padded grid, as
            MONAI does.
        bias_window: the window that rel_bias_table was made for, where another one runs: its tokens, in order, then take
            the positions of the first tokens of `bias_window` (what MONAI does with windows that the grid clips; not where
            they are). None is `window`.
        qk_norm: "l2" divides q and k by max(|.|, 1e-12) over head_dim, as SwinV2 does; scale must then be given.
        mask_value: as above; -inf for none of the other regions' keys.

    Returns:
        [B, *grid, C], contiguous, in the dtype of qkv (under autocast, in that of its matrix products). The gradients of
        qkv, rel_bias_table, scale and pad_value are those of the published pipeline; there is no second derivative.

    Raises:
        TypeError: an argument that is no tensor or number, or of a dtype that does not fit qkv's.
        ValueError: shapes, devices or strides that do not fit; a shift that is not less than the window; qk_norm without
            scale.
        NotImplementedError: a second derivative.

    Source: "Swin Transformer" (2021); qk_norm and scale [num_heads]: "Swin Transformer V2" (2022); volumes and bias_window:
    "Swin UNETR" (2022), as MONAI has it.
    """
    if pad_order not in ("roll_pad", "pad_roll"):
        raise ValueError(f"pad_order: expected 'roll_pad' or 'pad_roll', got {pad_order!r}")
    if qk_norm not in (None, "l2"):
        raise ValueError(f"qk_norm: expected None or 'l2', got {qk_norm!r}")
    if qk_norm is not None and scale is None:
        raise ValueError(f"scale: expected a number or a tensor with qk_norm={qk_norm!r}, got None")
    if bias_window is not None and rel_bias_table is None:
        raise ValueError(f"bias_window: expected with rel_bias_table only, got {bias_window!r} without")
    if not isinstance(qkv, Tensor) or not 4 <= qkv.dim() <= 5 or qkv.layout != torch.strided:
        _check_qkv(qkv)
    cast = autocast_dtype(qkv)
    if cast is not None and qkv.dtype != torch.float64:
        qkv = _cast(qkv, cast)
        rel_bias_table, pad_value = (_cast(value, cast, keep=torch.float32) for value in (rel_bias_table, pad_value))
        scale = _cast(scale, cast, keep=torch.float32)
    check_int(num_heads, "num_heads", 1)
    # What the kernel's entry cannot see, or would take.
    _check_sizes(window, "window", qkv.dim() - 2, 1)
    _check_sizes(shift, "shift", qkv.dim() - 2, 0)
    _check_mask_value(mask_value)
    by_head: Tensor | None = None
    factor: Any = scale
    if isinstance(scale, Tensor):
        _check_qkv(qkv)
        _check_heads(num_heads, qkv)
        check_parameter(scale, "scale", num_heads, qkv, "qkv")
        by_head, factor = scale.to(stats_dtype(qkv)).contiguous(), 1.0
    elif scale is None:
        factor = max(qkv.size(-1) // (3 * num_heads), 1) ** -0.5
    return _call(
        _collapsed(qkv),
        _contiguous(rel_bias_table),
        _contiguous(pad_value),
        by_head,
        window,
        shift,
        num_heads,
        factor,
        window if bias_window is None else bias_window,
        pad_order == "pad_roll",
        reference.NORM_EPS if qk_norm == "l2" else 0.0,
        mask_value,
    )
