"""Window attention in Triton without a GPU, beyond the samples of its card: windows of many blocks interpreted, every tile
compiled."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import checks_of
from test_triton import TARGETS
from test_triton_attention import DTYPES, assert_kernel_fits, compiling

# Grid, window, channels of a head: every way in which a table of tiles is read. Blocks end at the window's own, and a small
# window has one kernel for all of backward.
SHAPES = {
    "2x2": ((8, 8), (2, 2), 32),
    "5x5": ((20, 20), (5, 5), 32),
    "7x7": ((56, 56), (7, 7), 32),
    "7x7x7": ((35, 35, 35), (7, 7, 7), 16),
    "7x7x7, 32 channels": ((35, 35, 35), (7, 7, 7), 32),
    "8x8, 64 channels": ((64, 64), (8, 8), 64),
    "7x7x7, 64 channels": ((35, 35, 35), (7, 7, 7), 64),
    "7x7, 72 channels": ((56, 56), (7, 7), 72),
    "7x7x7, 128 channels": ((14, 14, 14), (7, 7, 7), 128),
    "4x4, 256 channels": ((16, 16), (4, 4), 256),
    "12x12, 256 channels": ((24, 24), (12, 12), 256),
}
KINDS = (
    "plain",
    "pads",
    "rich",
)  # of calls: what backward does at once, that with pads, and everything that a call can have

# Target, dtype, shape, kind; the others are in the exhaustive suite.
DEFAULT = {
    ("sm_80", "bf16", "7x7", "pads"),
    ("sm_90", "bf16", "7x7", "plain"),
    ("sm_100", "bf16", "7x7", "rich"),
    ("gfx942", "bf16", "7x7x7", "bare"),
}


def arguments(dtype: torch.dtype, shape: str, kind: str) -> tuple[Any, ...]:
    """Of the operator."""
    grid, window, channels = SHAPES[shape]
    heads, padded = 3, kind in ("pads", "rich")
    if padded:
        grid = tuple(size + 1 for size in grid)
    table = torch.zeros(math.prod(2 * extent - 1 for extent in window), heads, dtype=dtype)
    pad = torch.zeros(3 * heads * channels, dtype=dtype)
    shift = tuple(extent // 2 if kind != "bare" else 0 for extent in window)
    return (
        torch.zeros(1, *grid, 3 * heads * channels, dtype=dtype),
        table if kind != "bare" else None,
        pad if padded else None,
        torch.ones(heads) if kind == "rich" else None,
        window,
        shift,
        heads,
        0.2,
        window,
        kind == "rich",
        1e-12 if kind == "rich" else 0.0,
        -100.0,
    )


@pytest.mark.parametrize(
    "dtype",
    [
        *("float32-brief", "bfloat16-brief"),
        *(pytest.param(d, marks=pytest.mark.full) for d in ("float32", "bfloat16", "float16")),
    ],
)
def test_interpreter(dtype: str) -> None:
    """Every option against float64 (triton_window_attention.py)."""
    assert checks_of("triton_window_attention", dtype) > (10 if dtype.endswith("-brief") else 60)


@pytest.mark.parametrize(
    ("target", "dtype", "shape", "kind"),
    [
        pytest.param(*case, id="-".join(case), marks=[] if case in DEFAULT else [pytest.mark.full])
        for case in itertools.product(TARGETS, DTYPES, SHAPES, KINDS)
    ],
)
def test_tiles_compile_and_fit(
    target: str, dtype: str, shape: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the launches launch, compiled for a GPU that is not there: its shared memory, its registers, its instructions."""
    from mmkernels.triton import window_attention as launches

    compiled = compiling(target, monkeypatch)
    args = arguments(DTYPES[dtype], shape, kind)
    out, lse = launches.window_attention(*args)
    need = (parameter is not None for parameter in args[1:4])
    launches.window_attention_backward(out, *args[:4], out, lse, *args[4:], *need)
    _, window, channels = SHAPES[shape]
    whole = kind != "rich" and math.prod(window) <= (32 if dtype == "fp32" else 64) and channels <= 32
    expected = {"places_kernel", "forward_kernel", *(("whole_kernel",) if whole else ("queries_kernel", "keys_kernel"))}
    if kind != "bare":
        expected |= {"table_kernel"} if whole else {"pairs_kernel", "table_kernel"}
    assert {name for name, _ in compiled} == expected
    for name, kernel in compiled:
        with_matrix = name not in ("places_kernel", "table_kernel") and (dtype != "fp32" or target == "gfx942")
        assert_kernel_fits(name, kernel, target, with_matrix, tmp_path)


@pytest.mark.parametrize(
    ("grid", "window", "channels", "what"),
    [
        ((14, 14), (7, 7), 256, None),
        ((14, 14), (7, 7), 257, "heads of qkv have 257 channels"),
        ((64, 64), (64, 64), 8, None),
        ((64, 65), (64, 65), 8, "window has 4160 tokens"),
        ((2**14, 2**14), (8, 8), 1, None),
        ((2**14, 2**14), (7, 8), 1, "the grid has 268484608 tokens"),
    ],
)
def test_reasons(grid: tuple[int, ...], window: tuple[int, ...], channels: int, what: str | None) -> None:
    """What the kernels leave to the reference, and why."""
    from mmkernels.ops.window_attention import _triton_reason

    qkv = torch.empty(1, *grid, 3 * 2 * channels, device="meta")
    reason = _triton_reason({"qkv": qkv, "window": window, "num_heads": 2})
    assert reason is None if what is None else reason is not None and reason.startswith(what)
