"""Run by test_triton_window_attention.py in a process of its own, under TRITON_INTERPRET=1: window attention on CPU tensors,
with tiles small enough that every loop turns. Arguments: dtypes, with "-brief" after them for the cases of BRIEF alone.
Prints a line a check."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from support import assert_same_bits
from torch import Tensor
from triton_compare import compare, run

from mmkernels.reference import window_attention as reference
from mmkernels.triton import window_attention as launches

TILE = 16
SCALE_NOISE = (
    4e-6  # beyond the rule: the gradient of a head's scale is one number, where plain torch may err by chance little
)


@dataclass
class Case:
    """One call. Parameters: "" for none, "own" for the dtype of qkv, or "float32"."""

    grid: tuple[int, ...] = (5, 9)
    window: tuple[int, ...] = (5, 4)
    shift: tuple[int, ...] = (2, 1)
    batch: int = 1
    heads: int = 1
    channels: int = 8  # of a head
    table: str = "own"
    pad: str = ""
    head_scale: bool = False
    scale: float = 0.4
    bias_window: tuple[int, ...] | None = None
    pad_first: bool = False
    norm_eps: float = 0.0
    mask_value: float = -100.0
    whole: bool = False  # whether one kernel does all of backward, where it may
    far: float = 0.0  # how far from 0 the rows of the table are


CASES = {
    "plane": Case(),
    "plane, whole": Case(whole=True),
    "plane of many windows, whole": Case(grid=(6, 10), window=(2, 2), shift=(1, 1), heads=2, whole=True),
    "no shift": Case(shift=(0, 0), grid=(5, 8)),
    "one block": Case(window=(4, 4), grid=(8, 4), shift=(2, 3), heads=2),
    "pads": Case(grid=(4, 9), pad="own", heads=2),
    "pads, whole": Case(grid=(4, 9), pad="own", heads=2, whole=True),
    "pads first": Case(grid=(4, 9), pad="own", pad_first=True),
    "pads first, whole": Case(grid=(4, 9), pad="own", pad_first=True, whole=True),
    "pads of zeros": Case(grid=(4, 6), pad_first=True, batch=2),
    "pads in float32": Case(grid=(4, 6), pad="float32", table="float32", batch=2),
    "pads in float32, whole": Case(grid=(4, 6), pad="float32", table="float32", batch=2, whole=True),
    "volume": Case(grid=(3, 6, 3), window=(3, 3, 3), shift=(0, 1, 2), heads=2),
    "volume, whole": Case(grid=(3, 6, 3), window=(3, 3, 3), shift=(0, 1, 2), heads=2, whole=True),
    "volume, pads": Case(grid=(4, 2, 3), window=(3, 2, 4), shift=(1, 1, 3), pad="own", pad_first=True),
    "volume, pads, whole": Case(grid=(4, 2, 3), window=(3, 2, 4), shift=(2, 0, 3), pad="own", whole=True),
    "clipped window": Case(window=(5, 4), grid=(5, 4), shift=(0, 1), bias_window=(5, 6)),
    "clipped window, whole": Case(window=(5, 4), grid=(5, 4), shift=(0, 1), bias_window=(7, 5), whole=True),
    "clipped volume": Case(grid=(2, 3, 4), window=(2, 3, 4), shift=(0, 0, 0), bias_window=(4, 4, 4), whole=True),
    "no table": Case(table=""),
    "no table, whole": Case(table="", whole=True),
    "mask of -inf": Case(mask_value=-math.inf, pad="own"),
    "mask of -inf, whole": Case(mask_value=-math.inf, pad="own", whole=True),
    "weak mask": Case(mask_value=-0.5),
    "scale a head": Case(head_scale=True, heads=3),
    "scale a head, whole": Case(head_scale=True, heads=3, whole=True),
    "cosine": Case(norm_eps=1e-12, head_scale=True, heads=2, scale=5.0),
    "cosine, whole": Case(norm_eps=1e-12, head_scale=True, heads=2, scale=5.0, whole=True),
    "cosine, pads": Case(norm_eps=1e-12, head_scale=True, scale=5.0, pad="own", grid=(4, 9)),
    "cosine, pads, whole": Case(norm_eps=1e-12, head_scale=True, scale=5.0, pad="float32", grid=(4, 9), whole=True),
    "cosine, pads of zeros": Case(norm_eps=1e-12, scale=5.0, grid=(4, 6)),
    "cosine, pads of zeros, whole": Case(norm_eps=1e-12, scale=5.0, grid=(4, 6), whole=True),
    "lengths below eps": Case(norm_eps=5.0, head_scale=True, grid=(5, 8), whole=True),
    "lengths below eps, many blocks": Case(norm_eps=5.0, head_scale=True, grid=(5, 8)),
    "odd channels": Case(channels=19, pad="own", grid=(4, 9)),
    "72 channels": Case(channels=72, grid=(5, 4), shift=(0, 0), whole=True),
    "far out": Case(far=5000.0, grid=(5, 8)),
    "far out, whole": Case(far=-5000.0, grid=(5, 8), whole=True),
    "tiny": Case(grid=(3, 3), window=(1, 1), shift=(0, 0), channels=1),
}

# What the samples of the card leave out: windows of many blocks, and what half precision could break.
BRIEF = {
    torch.float32: ("plane", "pads first", "volume, pads", "clipped window", "mask of -inf", "cosine, pads"),
    torch.bfloat16: (
        "pads in float32",
        "pads in float32, whole",
        "volume, pads, whole",
        "mask of -inf, whole",
        "cosine, pads, whole",
        "cosine, pads of zeros",
    ),
}


def arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """The operator's arguments."""
    generator = torch.Generator().manual_seed(2)
    bias_window = case.bias_window or case.window

    def draw(*shape: int, kind: str = "own") -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.float32 if kind == "float32" else dtype)

    rows, width = math.prod(2 * extent - 1 for extent in bias_window), 3 * case.heads * case.channels
    return (
        draw(case.batch, *case.grid, width),
        draw(rows, case.heads, kind=case.table) + case.far if case.table else None,
        draw(width, kind=case.pad) if case.pad else None,
        case.scale * (1 + draw(case.heads, kind="float32").abs()) if case.head_scale else None,
        case.window,
        case.shift,
        case.heads,
        1.0 if case.head_scale else case.scale,
        bias_window,
        case.pad_first,
        case.norm_eps,
        case.mask_value,
    )


def check(name: str, case: Case, dtype: torch.dtype) -> None:
    args = arguments(case, dtype)
    what = f"{name}, {dtype}"
    out, lse = compare(launches.window_attention, reference.window_attention_op, args, f"forward {what}")
    assert out.is_contiguous() and lse.is_contiguous(), what
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    backward = (grad_out, *args[:4], out, lse, *args[4:])
    need = tuple(parameter is not None for parameter in args[1:4])
    reference_op = reference.window_attention_backward_op
    noise = (0.0, 0.0, 0.0, SCALE_NOISE)
    grads = compare(launches.window_attention_backward, reference_op, (*backward, *need), f"backward {what}", noise)
    fewer = run(launches.window_attention_backward, (*backward, False, False, False))
    assert all(grad.numel() == 0 for grad in fewer[1:]), what
    assert_same_bits(grads[0], fewer[0], f"{what}: without the gradients of parameters")


table = launches._tile


def small(*call: Any) -> tuple[dict[str, int], dict[str, Any]]:
    blocks, options = table(*call)
    return {**blocks, "BLOCK_M": TILE, "BLOCK_N": TILE}, options


# Some windows a part, and some parts.
launches._SPAN, launches._PROGRAMS = 3, 2
is_whole = launches._is_whole
for argument in sys.argv[1:]:
    dtype = getattr(torch, argument.removesuffix("-brief"))
    for name in BRIEF[dtype] if argument.endswith("-brief") else CASES:
        case = CASES[name]
        launches._tile = table if case.whole else small
        launches._is_whole = is_whole if case.whole else lambda *_: False
        check(name, case, dtype)
sys.exit(0)
