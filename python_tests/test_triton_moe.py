"""Routing and experts in Triton without a GPU: every option interpreted, every tile compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import checks_of
from test_triton import TARGETS
from test_triton_attention import DTYPES, MATRIX, assert_kernel_fits, compiling

ALL_GRADIENTS = 255
WITH_DOTS = {"hidden_kernel", "product_kernel", "hidden_backward_kernel", "grad_matrices_kernel"}
SORTS = {"count_kernel", "scan_kernel", "scatter_kernel"}
OF_ALL = {*WITH_DOTS, *SORTS, "combine_kernel", "slot_weights_kernel", "grad_biases_kernel"}
PARTS = {
    "gated": OF_ALL,
    "mlp": OF_ALL,
    "grouped": {*SORTS, "product_kernel", "grad_matrices_kernel", "grad_biases_kernel"},
    "routing": {*SORTS, "route_kernel", "route_backward_kernel"},
}

# Target, dtype, part, how the numbers lie; the others are in the exhaustive suite.
DEFAULT = {
    ("sm_80", "fp32", "gated", "odd"),
    ("sm_90", "bf16", "gated", "whole"),
    ("sm_100", "bf16", "grouped", "whole"),
    ("gfx942", "bf16", "mlp", "whole"),
    ("sm_90", "bf16", "routing", "whole"),
}


@pytest.mark.parametrize(
    "dtype",
    [
        "float32-brief",
        "bfloat16-brief",
        *(pytest.param(d, marks=pytest.mark.full) for d in ("float32", "bfloat16", "float16")),
    ],
)
def test_interpreter(dtype: str) -> None:
    """Every operator and option against float64 (triton_moe.py)."""
    assert checks_of("triton_moe", dtype) > 100


def call_experts(dtype: torch.dtype, part: str, lie: str) -> None:
    from mmkernels.triton import moe

    tokens, slots, experts, depth, hidden, columns = (512, 2, 8, 256, 512, 256) if lie != "odd" else (511, 3, 7, 100, 74, 51)

    def new(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    def matrices(rows: int, cols: int) -> torch.Tensor:
        return new(experts, cols, rows).mT if lie == "transposed" else new(experts, rows, cols)

    x, ids = new(tokens, depth), new(tokens, slots, kind=torch.int64)
    w_in, b_in = matrices(hidden, depth), new(experts, hidden)
    if part == "grouped":
        out = moe.grouped_linear(x, ids[:, 0], w_in, None, None, b_in)
        moe.grouped_linear_backward(out, x, ids[:, 0], w_in, b_in, True, True, True)
        return
    w_gate, b_gate = (matrices(hidden, depth), b_in) if part == "gated" else (None, None)
    weights = new(tokens, slots, kind=torch.float32)
    args = (x, ids, weights, w_in, matrices(columns, hidden), w_gate, b_in, new(experts, columns), b_gate)
    for activation in (2, 4):  # gelu, the one with the most registers, and silu
        rest = (None, None, None, None, new(tokens, columns), activation, tokens * slots)
        out, pre, pre_gate = moe.moe_mlp(*args, *rest, True)
        moe.moe_mlp(*args, *rest, False)
        moe.moe_mlp_backward(out, *args, pre, pre_gate, activation, ALL_GRADIENTS)


def call_routing(dtype: torch.dtype, lie: str) -> None:
    from mmkernels.triton import routing

    for experts in (128,) if lie == "whole" else (1, 60, 256, 1024, 2048, 4096):
        logits = torch.zeros((300, experts), dtype=dtype)
        selection = torch.zeros(experts)
        groups = 4 if experts % 4 == 0 else 1
        for score, normalize in ((0, True),) if lie == "whole" else ((0, True), (0, False), (1, True), (1, False)):
            plain = (logits, None, 1, score, normalize, 1.0, 1, 1, 0, -1)
            ids, weights, sums, _ = routing.route(*plain)
            routing.route(logits, selection, 1, score, normalize, 0.5, groups, min(2, groups), 1, 10)
            routing.route_backward(weights, sums, logits, ids, score, normalize)


def cases() -> Iterator[Any]:
    for target in TARGETS:
        for dtype in DTYPES:
            for part in PARTS:
                for lie in ("whole", "odd") if part == "routing" else ("whole", "odd", "transposed"):
                    case = (target, dtype, part, lie)
                    yield pytest.param(*case, id="-".join(case), marks=[] if case in DEFAULT else [pytest.mark.full])


@pytest.mark.parametrize(("target", "dtype", "part", "lie"), list(cases()))
def test_tiles_compile_and_fit(
    target: str, dtype: str, part: str, lie: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the launches launch, compiled for a GPU that is not there: its shared memory, its registers, its instructions."""
    compiled = compiling(target, monkeypatch)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # nothing runs, and what was to be written may be an index
    if part == "routing":
        call_routing(DTYPES[dtype], lie)
    else:
        call_experts(DTYPES[dtype], part, lie)
    assert {name for name, _ in compiled} == PARTS[part]
    for name, kernel in compiled:
        assert_kernel_fits(name, kernel, target, name in WITH_DOTS and (dtype != "fp32" or target == "gfx942"), tmp_path)
        if name in WITH_DOTS and dtype != "fp32":
            assert MATRIX[target] in kernel.asm["ptx" if target.startswith("sm_") else "amdgcn"], f"{name}: {MATRIX[target]}"
