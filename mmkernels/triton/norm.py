"""LayerNorm and RMS norm in Triton, with residual and gate before them and scale and shift after: forward and backward.

Index glossary: a row is one vector of C channels; rows are counted through the leading dimensions, row = sample * inner +
token, and every operand has a stride over samples (outer) and one over tokens (inner), 0 where it is broadcast. A group is
the rows that share one vector of a gradient, a piece a fixed part of a group. No float atomics: sums over rows are kept
for each piece and added up in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton import launch, pinned
from mmkernels.triton.pinned import Tile

MAX_CHANNELS = 4096  # a row lives in one program's registers, and in backward so do its running sums: twice as many spill

# BLOCK_C -> warps of forward and of backward where no table pins others: what spills nowhere (python_tests/test_triton.py
# compiles all of it). Forward has fewer where a norm has its own operands alone: a thread then has 16 bytes or more of each,
# and more rows are on their way at once.
_WARPS = {64: (1, 1), 256: (1, 2), 1024: (8, 4), MAX_CHANNELS: (16, 8)}
_PLAIN_WARPS = {64: 1, 256: 1, 1024: 2, MAX_CHANNELS: 8}


# What differs from call to call and makes no kernel faster, such as where the numbers of the rows begin: never a reason to
# compile one anew.
_SIZES = ["inner", "group_rows", "group_pieces", "mean_out", "rstd_out", "mean_in", "rstd_in"]


@triton.jit
def _load(pointer, offset, c, inside):
    return tl.load(pointer + offset + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, offset, c, inside, value):
    tl.store(pointer + offset + c, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def norm_kernel(
    x, residual, gate, weight, bias, shift, scale, normed, summed, mean_out, rstd_out,
    x_outer, x_inner, residual_outer, residual_inner, gate_outer, gate_inner,
    shift_outer, shift_inner, scale_outer, scale_inner, inner, channels, eps, scale_offset,
    HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MODULATED: tl.constexpr, RMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program sums and normalises one row; grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // inner
    token = row % inner
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    value = _load(x, sample * x_outer + token * x_inner, c, inside)
    if HAS_RESIDUAL:
        if HAS_GATE:
            value = value * _load(gate, sample * gate_outer + token * gate_inner, c, inside)
        value = value + _load(residual, sample * residual_outer + token * residual_inner, c, inside)
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + row * channels + c, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if not RMS:
        mean = tl.sum(value) / channels
        value = tl.where(inside, value - mean, 0.0)
        tl.store(mean_out + row, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value) / channels + eps)
    tl.store(rstd_out + row, rstd)
    value = value * rstd
    if HAS_WEIGHT:
        value = value * _load(weight, 0, c, inside)
    if HAS_BIAS:
        value = value + _load(bias, 0, c, inside)
    if MODULATED:
        value = value * (scale_offset + _load(scale, sample * scale_outer + token * scale_inner, c, inside))
        value = value + _load(shift, sample * shift_outer + token * shift_inner, c, inside)
    _store(normed, row * channels, c, inside, value)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    grad_normed, grad_summed, normalised, x, gate, weight, scale, mean_in, rstd_in, grad_normalised, grad_x,
    sum_hat, sum_plain, sum_gate,
    normalised_outer, normalised_inner, x_outer, x_inner, gate_outer, gate_inner, scale_outer, scale_inner,
    inner, channels, group_rows, group_pieces, scale_offset,
    HAS_NORMED: tl.constexpr, HAS_SUMMED: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    MODULATED: tl.constexpr, BY_ROW: tl.constexpr, GATE_BY_ROW: tl.constexpr, RMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program takes one piece of a group: the gradients of its rows, and the piece's sums; grid: (pieces,).

    With h the normalised row and g = grad_normed * weight * (scale_offset + scale):
    gradient = rstd (g - mean(g) - h mean(g h)) + grad_summed, for the RMS norm without mean(g).
    """
    piece = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    sums_hat = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sums_plain = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sums_gate = tl.zeros((BLOCK_C,), dtype=tl.float32)
    part = piece % group_pieces
    first = piece // group_pieces * group_rows
    begin = first + group_rows * part // group_pieces
    end = first + group_rows * (part + 1) // group_pieces
    for row in range(begin, end):
        sample = row // inner
        token = row % inner
        gradient = tl.zeros((BLOCK_C,), dtype=tl.float32)
        if HAS_NORMED:
            rstd = tl.load(rstd_in + row)
            hat = _load(normalised, sample * normalised_outer + token * normalised_inner, c, inside)
            if not RMS:
                hat = hat - tl.load(mean_in + row)
            hat = hat * rstd
            upstream = _load(grad_normed, row * channels, c, inside)
            scaled = upstream
            if MODULATED:
                scaled = upstream * (scale_offset + _load(scale, sample * scale_outer + token * scale_inner, c, inside))
            if BY_ROW:
                sums_hat += scaled * hat
                sums_plain += scaled
            else:
                sums_hat += upstream * hat
                sums_plain += upstream
            if HAS_WEIGHT:
                scaled = scaled * _load(weight, 0, c, inside)
            gradient = scaled - hat * (tl.sum(scaled * hat) / channels)
            if not RMS:
                gradient = gradient - tl.sum(scaled) / channels
            gradient = gradient * rstd
        if HAS_SUMMED:
            gradient += _load(grad_summed, row * channels, c, inside)
        _store(grad_normalised, row * channels, c, inside, gradient)
        if HAS_GATE:
            _store(
                grad_x, row * channels, c, inside,
                gradient * _load(gate, sample * gate_outer + token * gate_inner, c, inside),
            )  # fmt: skip
            if not GATE_BY_ROW:
                sums_gate += gradient * _load(x, sample * x_outer + token * x_inner, c, inside)
    _store(sum_hat, piece * channels, c, inside, sums_hat)
    _store(sum_plain, piece * channels, c, inside, sums_plain)
    if HAS_GATE and not GATE_BY_ROW:
        _store(sum_gate, piece * channels, c, inside, sums_gate)


# --- launches -----------------------------------------------------------------------------------------------------------
def _block_c(channels: int) -> int:
    return next(block for block in _WARPS if block >= channels)


def _warps(kind: str, block_c: int, rich: bool) -> Tile:
    """Of a kernel for rows of that block; `rich` calls have more than a norm's own operands."""
    default = _PLAIN_WARPS[block_c] if kind == "forward" and not rich else _WARPS[block_c][kind == "backward"]
    return pinned.tile(("norm", kind, block_c, rich and "rich"), (default,), pinned.WARPS)


def _inner(x: Tensor) -> int:
    """Rows of one sample."""
    return math.prod(x.shape[1:-1])


def _operand(name: str, tensor: Tensor | None, x: Tensor) -> dict[str, Any]:
    """The pointer and the two strides of what has the shape of x, or one vector for each of its samples."""
    if tensor is None:
        return {name: x, f"{name}_outer": 0, f"{name}_inner": 0}
    if tensor.shape == x.shape:
        samples = x.shape[0] if x.dim() > 1 else 1
        tensor = tensor.reshape(samples, _inner(x), x.shape[-1])  # copies where no two strides walk the leading dimensions
        return {name: tensor, f"{name}_outer": tensor.stride(0), f"{name}_inner": tensor.stride(1)}
    return {name: tensor, f"{name}_outer": tensor.stride(0), f"{name}_inner": 0}


def _vector(tensor: Tensor | None, x: Tensor) -> Tensor:
    return x if tensor is None else tensor.contiguous()


def norm(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    scale_offset: float,
    rms: bool,
    float_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::norm."""
    normed = torch.empty(x.shape, dtype=torch.float32 if float_normed else x.dtype, device=x.device)
    summed = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    rows = math.prod(x.shape[:-1])
    stats = torch.empty((1 if rms else 2, rows), dtype=torch.float32, device=x.device)
    if normed.numel() == 0:
        return normed, summed, stats.fill_(torch.nan)  # the statistics of no channels
    block_c = _block_c(x.shape[-1])
    norm_kernel[(rows,)](
        **_operand("x", x, x),
        **_operand("residual", residual, x),
        **_operand("gate", gate, x),
        **_operand("shift", shift, x),
        **_operand("scale", scale, x),
        weight=_vector(weight, x),
        bias=_vector(bias, x),
        normed=normed,
        summed=summed,
        mean_out=stats[0],
        rstd_out=stats[-1],
        inner=_inner(x),
        channels=x.shape[-1],
        eps=eps,
        scale_offset=scale_offset,
        HAS_RESIDUAL=residual is not None,
        HAS_GATE=gate is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        MODULATED=scale is not None,
        RMS=rms,
        BLOCK_C=block_c,
        **launch.options(*_warps("forward", block_c, residual is not None or scale is not None)),
    )
    return normed, summed, stats


def _affine(normalised: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    """The normalised row before scale and shift, from the statistics."""
    mean, rstd = (of_rows.view(*normalised.shape[:-1], 1) for of_rows in (stats[0], stats[-1]))
    value = (normalised.float() if rms else normalised.float() - mean) * rstd
    if weight is not None:
        value = value * weight
    return value if bias is None else value + bias


def norm_backward(
    grad_normed: Tensor | None,
    grad_summed: Tensor | None,
    normalised: Tensor,
    stats: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    scale_offset: float,
    rms: bool,
    need_gate: bool,
    need_weight: bool,
    need_bias: bool,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::norm_backward."""
    shape, channels, device = normalised.shape, normalised.shape[-1], normalised.device
    rows = math.prod(shape[:-1])
    by_row = scale is not None and scale.shape == shape
    gate_by_row = gate is not None and gate.shape == shape
    by_sample = (scale is not None and not by_row) or (gate is not None and not gate_by_row)
    groups = shape[0] if by_sample else 1
    group_rows = rows // max(1, groups)
    # Enough pieces to fill a GPU, few enough that their sums are little beside the gradients; cut by size alone.
    group_pieces = max(1, min(1024 // max(1, groups), group_rows // 8))
    pieces = groups * group_pieces
    sums = torch.zeros(
        (3 if gate is not None and not gate_by_row else 2, pieces, channels), dtype=torch.float32, device=device
    )

    def new(needed: bool, like: Tensor | None) -> Tensor:
        dtype = normalised.dtype if like is None else like.dtype
        return torch.empty(like.shape if needed and like is not None else (0,), dtype=dtype, device=device)

    grad_normalised, grad_x = new(True, normalised), new(gate is not None, normalised)
    if gate is not None and gate_by_row:  # in its dtype, for the product with x below
        grad_normalised = grad_normalised.to(gate.dtype)
    if grad_normalised.numel() > 0:
        block_c = _block_c(channels)
        backward_kernel[(pieces,)](
            **_operand("normalised", normalised, normalised),
            **_operand("x", x, normalised),
            **_operand("gate", gate, normalised),
            **_operand("scale", scale, normalised),
            grad_normed=normalised if grad_normed is None else grad_normed,
            grad_summed=normalised if grad_summed is None else grad_summed,
            weight=_vector(weight, normalised),
            mean_in=stats[0],
            rstd_in=stats[-1],
            grad_normalised=grad_normalised,
            grad_x=grad_x,
            sum_hat=sums[0],
            sum_plain=sums[1],
            sum_gate=sums[-1],
            inner=_inner(normalised),
            channels=channels,
            group_rows=group_rows,
            group_pieces=group_pieces,
            scale_offset=scale_offset,
            HAS_NORMED=grad_normed is not None,
            HAS_SUMMED=grad_summed is not None,
            HAS_GATE=gate is not None,
            HAS_WEIGHT=weight is not None,
            MODULATED=scale is not None,
            BY_ROW=by_row,
            GATE_BY_ROW=gate_by_row,
            RMS=rms,
            BLOCK_C=block_c,
            **launch.options(*_warps("backward", block_c, gate is not None or scale is not None)),
        )
    # Two sums and not one of both: results that become gradients as they are may not share memory.
    hat, plain = (of.view(groups, group_pieces, channels).sum(1) for of in sums[:2])

    def reduced(needed: bool, like: Tensor | None, value: Tensor) -> Tensor:
        if not needed or like is None:
            return new(False, like)
        return value.reshape(like.shape).to(like.dtype)

    if scale is not None and not by_row:
        affine = hat if weight is None else hat * weight
        grad_scale = reduced(need_modulation, scale, affine if bias is None else affine + plain * bias)
        grad_shift = reduced(need_modulation, shift, plain)
        factor = scale_offset + scale.reshape(groups, channels).float()
        hat, plain = hat * factor, plain * factor
    elif by_row and need_modulation:  # products of what is there already: the kernel has no registers left for them
        upstream = torch.zeros_like(grad_normalised) if grad_normed is None else grad_normed
        grad_shift = reduced(True, shift, upstream.clone())
        grad_scale = reduced(True, scale, upstream * _affine(normalised, stats, weight, bias, rms))
    else:
        grad_shift, grad_scale = new(False, shift), new(False, scale)
    if gate_by_row:
        grad_gate = reduced(need_gate, gate, grad_normalised * x)
        grad_normalised = grad_normalised.to(normalised.dtype)
    else:
        grad_gate = reduced(need_gate, gate, sums[-1].view(groups, group_pieces, channels).sum(1))
    grad_weight, grad_bias = reduced(need_weight, weight, hat.sum(0)), reduced(need_bias, bias, plain.sum(0))
    return grad_normalised, grad_x, grad_gate, grad_weight, grad_bias, grad_shift, grad_scale


# --- what can be launched, for the gate that compiles all of it without a GPU -------------------------------------------
def _signature(
    pointers: dict[str, str], operands: tuple[str, ...], sizes: tuple[str, ...], floats: tuple[str, ...]
) -> dict[str, str]:
    strides = {f"{name}_{which}": "i64" for name in operands for which in ("outer", "inner")}
    return {
        **{name: f"*{kind}" for name, kind in pointers.items()},
        **strides,
        **dict.fromkeys(sizes, "i32"),
        **dict.fromkeys(floats, "fp32"),
    }


def configurations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constants, options) of every tile and element type that the launches above can choose, with all
    that a call can have (and forward without), once with one vector a sample and once with one a row."""
    for x, normed in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32")):
        for block_c, (warps, backward_warps) in _WARPS.items():
            pointers = dict.fromkeys(("x", "residual", "gate", "weight", "bias", "shift", "scale", "summed"), x)
            signature = _signature(
                {**pointers, "normed": normed, "mean_out": "fp32", "rstd_out": "fp32"},
                ("x", "residual", "gate", "shift", "scale"),
                ("inner", "channels"),
                ("eps", "scale_offset"),
            )
            flags = dict.fromkeys(("HAS_RESIDUAL", "HAS_GATE", "HAS_WEIGHT", "HAS_BIAS", "MODULATED"), True)
            yield norm_kernel, signature, {**flags, "RMS": False, "BLOCK_C": block_c}, launch.options(warps)
            plain = {**dict.fromkeys(flags, False), "HAS_WEIGHT": True, "HAS_BIAS": True}
            options = launch.options(_PLAIN_WARPS[block_c])
            yield norm_kernel, signature, {**plain, "RMS": False, "BLOCK_C": block_c}, options
            backward_pointers = dict.fromkeys(
                ("grad_summed", "normalised", "x", "gate", "weight", "scale", "grad_normalised", "grad_x"),
                x,
            )  # fmt: skip
            sums = dict.fromkeys(("mean_in", "rstd_in", "sum_hat", "sum_plain", "sum_gate"), "fp32")
            signature = _signature(
                {**backward_pointers, **sums, "grad_normed": normed},
                ("normalised", "x", "gate", "scale"),
                ("inner", "channels", "group_rows", "group_pieces"),
                ("scale_offset",),
            )
            flags = dict.fromkeys(("HAS_NORMED", "HAS_SUMMED", "HAS_GATE", "HAS_WEIGHT", "MODULATED"), True)
            for by_row in (False, True):
                if by_row:  # a float32 gate of every row wants the gradient that it is multiplied with in float32
                    signature = {**signature, "grad_normalised": f"*{normed}"}
                constants = {**flags, "BY_ROW": by_row, "GATE_BY_ROW": by_row, "RMS": False, "BLOCK_C": block_c}
                yield backward_kernel, signature, constants, launch.options(backward_warps)
