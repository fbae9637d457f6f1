"""Benchmark cases of attention that fill a GPU, in bfloat16.

About 16384 tokens of 2048 channels (of all heads) where sequences are long, as attention is commonly timed; windows, words
and frames in numbers whose tensors no cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmkernels.cards import peers
from mmkernels.cards.card import BenchCase, Call, Make, Target, drawer
from mmkernels.cards.heads import attention_cost
from mmkernels.ops.attention import attention

_TOKENS, _CHANNELS = 16384, 2048
_BY_TORCH = ("sdpa", "flex", "plain", "compile")


def _call(batch: int, heads: int, length: int, channels: int, *, bias: bool = False, **kwargs: Any) -> Make:
    """`bias`: one for all, [1, heads, length, length]."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        draw = drawer(device, dtype, g)
        q, k, v = (draw(batch, heads, length, channels) for _ in range(3))
        return Call((q, k, v), {**kwargs, **({"bias": draw(1, heads, length, length)} if bias else {})})

    return make


def _case(
    name: str,
    make: Make,
    contestants: dict[str, Callable[..., Any]],
    ratio: float | None,
    *,
    backward: bool = False,
) -> BenchCase:
    """`ratio`: to the fastest of what comes with torch; None where nothing was promised."""
    compiled_peers = ("plain",) if "plain" in contestants else ()
    known = {name.partition(":")[0] for name in contestants} | ({"compile"} if compiled_peers else set())
    named = tuple(name for name in _BY_TORCH if name in known)
    return BenchCase(
        f"attention.gpu.{name}{'.backward' if backward else ''}",
        make,
        attention,
        contestants,
        lambda call: attention_cost(call, backward=backward),
        dtypes=(torch.bfloat16,),
        backward=backward,
        compiled_peers=compiled_peers,
        target=None if ratio is None else Target(named, ratio, optional=True),
        devices=("cuda",),
    )


_SDPA = peers.of_each_kernel(peers.sdpa)
_PLAIN = {"plain": peers.plain}
_PACKAGE = {"flash_attn": peers.flash_attn} if peers.installed("flash_attn") else {}
_BIASED = {**_SDPA, "flex": peers.compiled(peers.flex_of_bias), **_PLAIN}

_BIASES = {
    "window49_4096x3x49x32": _call(4096, 3, 49, 32, bias=True),
    "window343_686x3x343x16": _call(686, 3, 343, 16, bias=True),
    "bias_64x12x197x64": _call(64, 12, 197, 64, bias=True),
}


def _long(length: int, channels: int, **kwargs: Any) -> Make:
    return _call(round(_TOKENS / length), _CHANNELS // channels, length, channels, **kwargs)


BENCH = (
    *(
        _case(f"L{length}_d{channels}", _long(length, channels), {**_SDPA, **_PACKAGE}, ratio)
        for length, ratio in ((197, 1.2), (512, 1.2), (1024, 0.9), (4096, 0.9))
        for channels in (64, 128)
    ),
    *(_case(name, make, _BIASED, 1.2) for name, make in _BIASES.items() if name.startswith("window")),
    *(_case(f"{name}.learned", make, _BIASED, 2.0, backward=True) for name, make in _BIASES.items()),
    *(
        _case(name, _call(*sizes), {**_SDPA, **_PLAIN}, 3.0)
        for name, sizes in {
            "tnt_50176x4x16x6": (50176, 4, 16, 6),
            "tnt_50176x4x16x10": (50176, 4, 16, 10),
            "temporal_6272x12x16x64": (6272, 12, 16, 64),
        }.items()
    ),
    _case(
        "causal_L4096_d128",
        _long(4096, 128, is_causal=True),
        {**_SDPA, **_PACKAGE, "flex": peers.flex_causal},
        0.9,
    ),
    _case("L1024_d64", _long(1024, 64), {**_SDPA, **_PACKAGE}, None, backward=True),
)
