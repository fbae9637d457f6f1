"""The card of shifted-window attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.cards import peers
from mmkernels.cards.card import (
    BadInput,
    BenchCase,
    Call,
    Card,
    Cost,
    Make,
    Overhead,
    Sample,
    Target,
    drawer,
    with_argument,
)
from mmkernels.ops import window_attention as ops
from mmkernels.reference import window_attention as reference


# --- calls ------------------------------------------------------------------------------------------------------------
def _call(
    batch: int,
    grid: Sequence[int],
    channels: int,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    *,
    table: str = "own",
    pad: str = "none",
    by_head: bool = False,
    **kwargs: Any,
) -> Make:
    """`table` and `pad`: none, own (the dtype of qkv) or float32; `by_head` draws a scale for each head."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def draw(*size: int, kind: str = "own") -> Tensor:
            kept = torch.float32 if kind == "float32" and dtype != torch.float64 else dtype
            return torch.randn(size, generator=g).to(device=device, dtype=kept)

        qkv = draw(batch, *grid, 3 * channels)
        more: dict[str, Any] = {"window": tuple(window), "shift": tuple(shift), "num_heads": heads, **kwargs}
        positions = math.prod(2 * extent - 1 for extent in more.get("bias_window", window))
        rel_bias_table = None if table == "none" else draw(positions, heads, kind=table)
        if pad != "none":
            more["pad_value"] = draw(3 * channels, kind=pad)
        if by_head:
            more["scale"] = (1 + draw(heads, kind="float32").abs()) * more.get("scale", 1.0)
        return Call((qkv, rel_bias_table), more)

    return make


_SMALL = _call(2, (6, 6), 8, 2, (3, 3), (1, 1))

# A grid's qkv as no new tensor lies in memory; the first and third need no copy.
_STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "channel slice": lambda x: torch.cat((x, x, x), -1)[..., x.size(-1) : 2 * x.size(-1)],
    "one sample expanded": lambda x: x[:1].expand_as(x),
    "odd offset": lambda x: torch.cat((x.flatten(), x.flatten()))[1 : 1 + x.numel()].view_as(x),
    "rows slice": lambda x: torch.cat((x, x), 1)[:, 1 : 1 + x.size(1)],
    "columns slice": lambda x: torch.cat((x, x), 2)[:, :, 1 : 1 + x.size(2)],
}

# "small", "no rows", "float32 parameters" and "ViT" are names that the generic suite looks for. Where there are pads, some
# share a region with tokens: a gradient of exp(-100) is a subnormal number that has no accuracy to compare.
_SAMPLES = (
    Sample("small", _SMALL),
    Sample("odd sizes", _call(3, (5, 7), 9, 3, (3, 2), (2, 0), pad="own")),
    Sample("no shift", _call(2, (6, 4), 8, 2, (3, 2), (0, 0))),
    Sample("shift on one axis", _call(2, (6, 6), 8, 2, (3, 3), (0, 2))),
    Sample("roll, then pad", _call(2, (5, 7), 8, 2, (4, 4), (2, 1), pad="own")),
    Sample("pad, then roll", _call(2, (5, 7), 8, 2, (4, 4), (2, 1), pad="own", pad_order="pad_roll")),
    Sample("pads of zeros", _call(2, (5, 7), 8, 2, (4, 4), (2, 1))),
    Sample("pads of zeros, no shift", _call(2, (5, 7), 8, 2, (4, 4), (0, 0), pad_order="pad_roll")),
    Sample("pad_value without pads", _call(2, (4, 4), 8, 2, (2, 2), (1, 1), pad="own")),
    Sample("window larger than the grid", _call(2, (3, 2), 8, 2, (5, 4), (4, 3), pad="own")),
    Sample(
        "window larger than the grid, pad first", _call(2, (3, 2), 8, 2, (5, 4), (4, 3), pad="own", pad_order="pad_roll")
    ),
    Sample("window of the whole grid", _call(2, (4, 5), 8, 2, (4, 5), (0, 0))),
    Sample("window of one token", _call(2, (3, 4), 8, 2, (1, 1), (0, 0), table="none")),
    Sample("volume", _call(2, (4, 4, 6), 8, 2, (2, 2, 3), (1, 1, 1))),
    Sample("volume, no shift", _call(1, (4, 2, 3), 8, 2, (2, 2, 3), (0, 0, 0))),
    Sample("volume, roll, then pad", _call(1, (3, 5, 4), 6, 2, (2, 3, 3), (0, 2, 1), pad="own")),
    Sample("volume, pad, then roll", _call(1, (3, 5, 4), 6, 2, (2, 3, 3), (1, 1, 2), pad="own", pad_order="pad_roll")),
    Sample("clipped window", _call(2, (4, 6), 8, 2, (4, 5), (0, 2), pad="own", bias_window=(5, 5), pad_order="pad_roll")),
    Sample("clipped volume", _call(1, (2, 3, 2), 6, 2, (2, 3, 2), (0, 0, 0), bias_window=(4, 4, 4), pad_order="pad_roll")),
    Sample("no table", _call(2, (5, 7), 8, 2, (4, 4), (2, 1), table="none", pad="own")),
    Sample("scale by head", _call(2, (6, 6), 8, 2, (3, 3), (1, 1), by_head=True, scale=0.4)),
    Sample("cosine attention", _call(2, (5, 7), 8, 2, (4, 4), (2, 1), pad="own", qk_norm="l2", by_head=True, scale=5.0)),
    Sample("cosine attention, one scale", _call(2, (6, 6), 8, 2, (3, 3), (1, 1), qk_norm="l2", scale=10.0)),
    Sample("cosine attention, pads of zeros", _call(2, (5, 7), 8, 2, (4, 4), (0, 0), qk_norm="l2", by_head=True)),
    Sample("scale", _call(2, (6, 6), 8, 2, (3, 3), (1, 1), scale=0.1)),
    Sample("mask of -inf", _call(2, (5, 7), 8, 2, (4, 4), (2, 1), pad="own", mask_value=-math.inf)),
    Sample("weak mask", _call(2, (6, 6), 8, 2, (3, 3), (1, 1), mask_value=-1.5)),
    Sample("float32 parameters", _call(2, (5, 7), 8, 2, (4, 4), (2, 1), table="float32", pad="float32")),
    Sample("one head of one channel", _call(2, (6, 6), 1, 1, (3, 3), (1, 1))),
    Sample("vector tails", _call(1, (6, 7), 83, 1, (6, 7), (3, 3))),
    Sample("no rows", _call(0, (6, 6), 8, 2, (3, 3), (1, 1), pad="own"), gradcheck=False),
    Sample("no tokens", _call(2, (0, 6), 8, 2, (3, 3), (1, 1), pad="own"), gradcheck=False),
    *(Sample(name, with_argument(_call(2, (5, 6), 8, 2, (3, 3), (1, 1)), 0, change)) for name, change in _STRIDED.items()),
    Sample("volume of ragged windows", _call(1, (8, 9, 7), 32, 2, (7, 7, 7), (3, 3, 3), pad="own"), gradcheck=False),
    Sample("Swin ViT, stage 1", _call(2, (28, 28), 96, 3, (7, 7), (3, 3)), gradcheck=False),
    Sample("Swin UNETR, stage 1", _call(1, (21, 21, 21), 48, 3, (7, 7, 7), (3, 3, 3)), gradcheck=False, full=True),
)


# --- bad input --------------------------------------------------------------------------------------------------------
def _replaced(which: int | str, value: Any) -> Callable[[torch.device], Call]:
    """A good call with one argument replaced, or by what `value` makes of it."""
    make = _call(2, (5, 7), 8, 2, (4, 4), (2, 1), pad="own", by_head=True, bias_window=(4, 4))

    def bad(device: torch.device) -> Call:
        call = make(device, torch.float32, torch.Generator())
        args, kwargs = list(call.args), dict(call.kwargs)
        holder: Any = args if isinstance(which, int) else kwargs
        before = holder[which] if isinstance(which, int) else holder.get(which)
        holder[which] = value(before) if callable(value) else value
        return Call(tuple(args), kwargs)

    return bad


def _without_scale(device: torch.device) -> Call:
    call = _SMALL(device, torch.float32, torch.Generator())
    return Call(call.args, {**call.kwargs, "qk_norm": "l2"})


def _without_table(device: torch.device) -> Call:
    call = _SMALL(device, torch.float32, torch.Generator())
    return Call((call.args[0], None), {**call.kwargs, "bias_window": (3, 3)})


_BAD_INPUTS = (
    BadInput("three dimensions", _replaced(0, lambda x: x[0]), ValueError, "qkv"),
    BadInput("six dimensions", _replaced(0, lambda x: x[None, None]), ValueError, "qkv"),
    BadInput("last dimension strided", _replaced(0, lambda x: torch.cat((x, x), -1)[..., ::2]), ValueError, "qkv"),
    BadInput("no channels", _replaced(0, lambda x: x[..., :0]), ValueError, "qkv"),
    BadInput("integers", _replaced(0, lambda x: x.int()), TypeError, "qkv"),
    BadInput("complex numbers", _replaced(0, lambda x: x.to(torch.complex64)), TypeError, "qkv"),
    BadInput("a list", _replaced(0, lambda x: x.tolist()), TypeError, "qkv"),
    BadInput("sparse", _replaced(0, lambda x: x.to_sparse()), TypeError, "qkv"),
    BadInput("table of another window", _replaced(1, lambda t: t[:-1]), ValueError, "rel_bias_table"),
    BadInput("table of other heads", _replaced(1, lambda t: t[:, :1]), ValueError, "rel_bias_table"),
    BadInput("table with an axis more", _replaced(1, lambda t: t[None]), ValueError, "rel_bias_table"),
    BadInput("table is half beside float32", _replaced(1, lambda t: t.half()), TypeError, "rel_bias_table"),
    BadInput("table is a list", _replaced(1, lambda t: t.tolist()), TypeError, "rel_bias_table"),
    BadInput("table on another device", _replaced(1, lambda t: t.to("meta")), ValueError, "rel_bias_table"),
    BadInput("window of three", _replaced("window", (4, 4, 4)), ValueError, "window"),
    BadInput("window is an int", _replaced("window", 4), TypeError, "window"),
    BadInput("window of floats", _replaced("window", (4.0, 4)), TypeError, "window"),
    BadInput("window of nothing", _replaced("window", (4, 0)), ValueError, "window"),
    BadInput("window of too much", _replaced("window", (2**40, 2**40)), ValueError, "window"),
    BadInput("shift of one", _replaced("shift", (1,)), ValueError, "shift"),
    BadInput("shift is None", _replaced("shift", None), TypeError, "shift"),
    BadInput("shift backwards", _replaced("shift", (-1, 0)), ValueError, "shift"),
    BadInput("shift of a window", _replaced("shift", (0, 4)), ValueError, "shift"),
    BadInput("shift is a bool", _replaced("shift", (True, 0)), TypeError, "shift"),
    BadInput("heads that do not divide", _replaced("num_heads", 3), ValueError, "num_heads"),
    BadInput("no heads", _replaced("num_heads", 0), ValueError, "num_heads"),
    BadInput("num_heads is a float", _replaced("num_heads", 2.0), TypeError, "num_heads"),
    BadInput("scale is a string", _replaced("scale", "1"), TypeError, "scale"),
    BadInput("scale of other heads", _replaced("scale", lambda s: s[:1]), ValueError, "scale"),
    BadInput("scale is a matrix", _replaced("scale", lambda s: s[:, None]), ValueError, "scale"),
    BadInput("scale is double", _replaced("scale", lambda s: s.double()), TypeError, "scale"),
    BadInput("scale on another device", _replaced("scale", lambda s: s.to("meta")), ValueError, "scale"),
    BadInput("cosine attention without scale", _without_scale, ValueError, "scale"),
    BadInput("pad_value too short", _replaced("pad_value", lambda p: p[:-1]), ValueError, "pad_value"),
    BadInput("pad_value is a number", _replaced("pad_value", 0.0), TypeError, "pad_value"),
    BadInput("pad_value is half beside float32", _replaced("pad_value", lambda p: p.half()), TypeError, "pad_value"),
    BadInput("pad_value on another device", _replaced("pad_value", lambda p: p.to("meta")), ValueError, "pad_value"),
    BadInput("unknown pad_order", _replaced("pad_order", "pad"), ValueError, "pad_order"),
    BadInput("bias_window too small", _replaced("bias_window", (3, 4)), ValueError, "bias_window"),
    BadInput("bias_window of one", _replaced("bias_window", (16,)), ValueError, "bias_window"),
    BadInput("bias_window without table", _without_table, ValueError, "bias_window"),
    BadInput("unknown qk_norm", _replaced("qk_norm", "rms"), ValueError, "qk_norm"),
    BadInput("mask_value is a string", _replaced("mask_value", "-inf"), TypeError, "mask_value"),
    BadInput("mask_value is NaN", _replaced("mask_value", math.nan), ValueError, "mask_value"),
    BadInput("mask_value is inf", _replaced("mask_value", math.inf), ValueError, "mask_value"),
)


# --- benchmark --------------------------------------------------------------------------------------------------------
def _cost(backward: bool) -> Callable[[Call], Cost]:
    """Two products of the windows' tokens forward, five more backward; qkv and out cross the bus, backward qkv, the
    gradients of both and out again."""

    def cost(call: Call) -> Cost:
        qkv, window = call.args[0], call.kwargs["window"]
        padded = math.prod(-(-size // extent) * extent for size, extent in zip(qkv.shape[1:-1], window, strict=True))
        products = 2.0 * qkv.size(0) * padded * math.prod(window) * (qkv.size(-1) // 3)
        moved = qkv.numel() * qkv.element_size() / 3
        return Cost(flops=products * (7 if backward else 2), bytes=moved * (12 if backward else 4))

    return cost


def _bench(name: str, make: Make) -> tuple[BenchCase, ...]:
    return tuple(
        BenchCase(
            f"window_attention.{name}{'.backward' if backward else ''}",
            make,
            ops.window_attention,
            {"published": reference.pipeline},
            _cost(backward),
            dtypes=(dtype,),
            backward=backward,
            compiled_peers=("published",),
            target=Target(("published", "compile"), ratio),
        )
        for backward, ratios in ((False, (3.0, 6.0)), (True, (2.0, 3.0)))
        for dtype, ratio in zip((torch.float32, torch.bfloat16), ratios, strict=True)
    )


def _flex(qkv: Tensor, rel_bias_table: Tensor, *, window: Sequence[int], shift: Sequence[int], num_heads: int) -> Tensor:
    """The same with FlexAttention, which adds biases and masks as it makes the scores; for grids that windows divide."""
    from torch.nn.attention.flex_attention import flex_attention

    grid, axes, tokens = qkv.shape[1:-1], tuple(range(1, qkv.dim() - 1)), math.prod(window)
    pieces = [part for size, extent in zip(grid, window, strict=True) for part in (size // extent, extent)]
    split = (0, *range(1, len(pieces) + 1, 2), *range(2, len(pieces) + 1, 2), len(pieces) + 1)
    x = torch.roll(qkv, [-step for step in shift], axes).reshape(qkv.size(0), *pieces, -1).permute(split)
    q, k, v = x.reshape(-1, tokens, 3, num_heads, qkv.size(-1) // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    bias = rel_bias_table[reference.relative_position_index(window, tokens, qkv.device)].permute(2, 0, 1).contiguous()
    _, region = reference.placement(grid, window, shift, False, qkv.device)

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        of_window = b % region.size(0)
        return score + bias[h, i, j] + torch.where(region[of_window, i] == region[of_window, j], 0.0, -100.0)

    out = flex_attention(q, k, v, score_mod=add).transpose(1, 2).reshape(qkv.size(0), *pieces[::2], *window, -1)
    together = [
        axis for pair in zip(range(1, 1 + len(grid)), range(1 + len(grid), 1 + 2 * len(grid)), strict=True) for axis in pair
    ]
    out = out.permute(0, *together, out.dim() - 1).reshape(*qkv.shape[:-1], -1)
    return torch.roll(out, list(shift), axes)


def _gpu_call(batch: int, grid: Sequence[int], channels: int, heads: int, window: Sequence[int]) -> Make:
    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        draw = drawer(device, dtype, g)
        table = draw(math.prod(2 * extent - 1 for extent in window), heads)
        shift = tuple(extent // 2 for extent in window)
        return Call((draw(batch, *grid, 3 * channels), table), {"window": tuple(window), "shift": shift, "num_heads": heads})

    return make


_GPU = tuple(
    BenchCase(
        f"window_attention.gpu.{name}{'.backward' if backward else ''}",
        make,
        ops.window_attention,
        {
            "published": reference.pipeline,
            **peers.of_each_kernel(reference.pipeline),
            "flex": peers.compiled(_flex),
        },
        _cost(backward),
        dtypes=(torch.bfloat16,),
        backward=backward,
        compiled_peers=("published",),
        target=Target(("published", "sdpa", "flex", "compile"), ratio, optional=True),
        devices=("cuda",),
    )
    for backward, ratio in ((False, 1.2), (True, 2.0))
    for name, make in (
        ("64x56x56", _gpu_call(64, (56, 56), 96, 3, (7, 7))),  # the first stages of Swin-T and of Swin UNETR
        ("2x49x49x49", _gpu_call(2, (49, 49, 49), 48, 3, (7, 7, 7))),
    )
)


def _tiny() -> Call:
    return _call(1, (4, 4), 8, 2, (2, 2), (1, 1))(torch.device("cpu"), torch.float32, torch.Generator())


CARDS = (
    Card(
        name="window_attention",
        family="window_attention",
        function=ops.window_attention,
        reference=reference.window_attention,
        ops=("mmkernels::window_attention", "mmkernels::window_attention_backward"),
        backends=ops.BACKENDS,
        samples=_SAMPLES,
        bad_inputs=_BAD_INPUTS,
        dtypes=ops.DTYPES,
        systems=("Swin UNETR", "DAFormer", "Mask2Former", "DeepInteraction++"),
        summary="shifted-window attention of planes and volumes, from the qkv projection to the output projection",
        bench=(
            *_bench("8x56x56", _call(8, (56, 56), 96, 3, (7, 7), (3, 3))),
            *_bench("1x35x35x35", _call(1, (35, 35, 35), 48, 3, (7, 7, 7), (3, 3, 3))),
            *_GPU,
        ),
        overheads=(
            Overhead("window_attention call, no gradient", _tiny, ops.window_attention, grad=False, limit_us=40.0),
            Overhead("window_attention call, with gradient", _tiny, ops.window_attention, grad=True, limit_us=60.0),
        ),
    ),
)
