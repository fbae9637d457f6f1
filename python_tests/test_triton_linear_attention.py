"""Linear attention in Triton without a GPU, beyond the samples of its card: every tile compiled, bad lengths interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_triton import TARGETS
from test_triton_attention import DTYPES, assert_kernel_fits, compiling

from mmkernels.reference.linear_attention import FEATURE_MAPS

WITH_DOTS = {"sums_kernel", "queries_kernel", "queries_backward_kernel", "keys_backward_kernel"}

# Target, dtype, channels, causal; the others are in the exhaustive suite.
DEFAULT = {
    ("sm_80", "fp32", 64, True),
    ("sm_90", "bf16", 128, True),
    ("sm_100", "bf16", 64, False),
    ("gfx942", "bf16", 128, True),
}


def calls(dtype: torch.dtype, channels: int, causal: bool) -> Iterator[tuple[Any, ...]]:
    """Arguments of the operator: plain, and with all that a call can have."""

    def new(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    q, k, v = new(2, 4, 300, channels), new(2, 2, 300, channels), new(2, 2, 300, channels)
    elu1, softmax = (FEATURE_MAPS.index(name) for name in ("elu1", "softmax"))
    yield q, k, v, None, None, None, None, None, elu1, causal, True, 1e-6
    state = new(2, 2, channels, channels, kind=torch.float32), new(2, 2, channels, kind=torch.float32)
    lengths = torch.tensor([0, 300, 600])
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    yield *packed, new(600, kind=torch.bool), *state, lengths, lengths, elu1, causal, True, 1e-6
    if not causal:
        yield q, k, v, new(1, 300, kind=torch.bool), None, None, None, None, softmax, False, True, 1e-6


@pytest.mark.parametrize(
    ("target", "dtype", "channels", "causal"),
    [
        pytest.param(*case, id=f"{target}-{dtype}-{channels}-{'causal' if causal else 'all'}", marks=marks)
        for target in TARGETS
        for dtype in DTYPES
        for channels in ((64,) if dtype == "fp32" else (64, 72, 128))
        for causal in (False, True)
        if (case := (target, dtype, channels, causal))
        and (marks := [] if case in DEFAULT else [pytest.mark.full]) is not None
    ],
)
def test_tiles_compile_and_fit(
    target: str, dtype: str, channels: int, causal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the launches launch, compiled for a GPU that is not there: its shared memory, its registers, its instructions."""
    from mmkernels.triton import linear_attention as launches

    compiled = compiling(target, monkeypatch)
    for args in calls(DTYPES[dtype], channels, causal):
        out, *final = launches.linear_attention(*args)
        launches.linear_attention_backward(out, *final, *args[:8], *final, *args[8:])
    names = {name for name, _ in compiled}
    assert names == WITH_DOTS | {"join_kernel"} | (set() if causal else {"top_kernel"})
    for name, kernel in compiled:
        with_matrix = name in WITH_DOTS and (dtype != "fp32" or target == "gfx942")
        assert_kernel_fits(name, kernel, target, with_matrix, tmp_path)
