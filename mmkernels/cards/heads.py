"""Samples, bad inputs and costs of ops on heads: q, k and v [B, H, L, D], or packed [T, H, D]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.cards.card import BadInput, Call, Cost, Make

OPERANDS = ("q", "k", "v")

# [B, H, L, D] with a contiguous last dimension that lies in memory as no new tensor does.
STRIDED_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "token slice": lambda x: torch.cat((x, x), 2)[:, :, 1 : 1 + x.size(2)],
    "channel slice": lambda x: torch.cat((x, x, x), 3)[..., x.size(3) : 2 * x.size(3)],
    "batch last but one": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "one head expanded": lambda x: x[:, :1].expand_as(x),
    "odd offset": lambda x: torch.cat((x.flatten(), x.flatten()))[1 : 1 + x.numel()].view_as(x),
}


def projection_call(batch: int, heads: int, kv_heads: int, length: int, channels: int, **kwargs: Any) -> Make:
    """q, k and v are views of one projection [B, L, (H + 2 Hk) D]."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        joint = torch.randn(batch, length, heads + 2 * kv_heads, channels, generator=g).to(device=device, dtype=dtype)
        return Call(tuple(x.transpose(1, 2) for x in joint.split((heads, kv_heads, kv_heads), 2)), dict(kwargs))

    return make


def with_named(make: Make, name: str, value: Any) -> Make:
    """The call with the argument of that name replaced, or by what `value` makes of it."""

    def changed(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        call = make(device, dtype, g)
        named = dict(zip(OPERANDS, call.args, strict=True)) | call.kwargs
        named[name] = value(named.get(name)) if callable(value) else value
        return Call(tuple(named.pop(operand) for operand in OPERANDS), named)

    return changed


def strided(make: Make, change: Callable[[Tensor], Tensor]) -> Make:
    """The call with q, k and v changed."""
    for name in OPERANDS:
        make = with_named(make, name, change)
    return make


def bad(make: Make, name: str, what: str, value: Any, error: type[Exception], argument: str | None = None) -> BadInput:
    """`argument`: the one that the message names, where that is not the one that was replaced."""
    changed = with_named(make, name, value)
    return BadInput(
        f"{name} {what}", lambda device: changed(device, torch.float32, torch.Generator()), error, argument or name
    )


def bad_operand(dense: Make, packed: Make, name: str) -> tuple[BadInput, ...]:
    return (
        bad(dense, name, "of three dimensions", lambda x: x[0], ValueError),
        bad(packed, name, "of four dimensions, packed", lambda x: x[None], ValueError),
        bad(dense, name, "with a strided last dimension", lambda x: torch.cat((x, x), 3)[..., ::2], ValueError),
        bad(dense, name, "of integers", lambda x: x.int(), TypeError),
        bad(dense, name, "a list", lambda x: x.tolist(), TypeError),
        bad(dense, name, "sparse", lambda x: x.to_sparse(), TypeError),
    )


def bad_beside(dense: Make, name: str) -> tuple[BadInput, ...]:
    """k or v that does not fit q."""
    return (
        bad(dense, name, "of another dtype", lambda x: x.double(), TypeError),
        bad(dense, name, "on another device", lambda x: x.to("meta"), ValueError),
        bad(dense, name, "of another batch", lambda x: x[:1], ValueError),
    )


def bad_lengths(packed: Make, name: str) -> tuple[BadInput, ...]:
    """cu_seqlens_q or cu_seqlens_k."""
    return (
        bad(packed, name, "missing", None, ValueError),
        bad(packed, name, "of two dimensions", lambda x: x[None], ValueError),
        bad(packed, name, "empty", lambda x: x[:0], ValueError),
        bad(packed, name, "of floats", lambda x: x.float(), TypeError),
        bad(packed, name, "a list", lambda x: x.tolist(), TypeError),
        bad(packed, name, "on another device", lambda x: x.to("meta"), ValueError),
        bad(packed, name, "of another number of sequences", lambda x: x[:2], ValueError, "cu_seqlens_k"),
    )


def attention_cost(call: Call, *, backward: bool) -> Cost:
    """Two products forward, five backward; every operand, the output and their gradients once a pass."""
    (q, k, v), bias = call.args, call.kwargs.get("bias")
    products = 2 * q.numel() // q.size(-1) * k.size(2) * (q.size(-1) + v.size(-1))
    if call.kwargs.get("is_causal"):
        products /= 2
    operands = sum(x.numel() * x.element_size() for x in (q, k, v, bias) if x is not None)
    out = q.numel() // q.size(-1) * v.size(-1) * q.element_size()
    if backward:
        return Cost(flops=3.5 * products, bytes=float(3 * operands + 3 * out))
    return Cost(flops=float(products), bytes=float(operands + out))
