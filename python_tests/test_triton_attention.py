"""Attention in Triton without a GPU, beyond the samples of its card: every option interpreted, every tile compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import checks_of
from test_triton import TARGETS, assert_no_float_atomics, keeps_in_local_memory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
WITH_DOTS = {"forward_kernel", "queries_kernel", "keys_kernel", "bias_kernel"}

# Target, dtype, channels, whether with everything that a call can have; the others are in the exhaustive suite.
DEFAULT = {
    ("sm_80", "bf16", 64, True),
    ("sm_90", "bf16", 128, False),
    ("sm_100", "bf16", 64, False),
    ("gfx942", "bf16", 128, True),
}


# The same of tiny sequences, with their numbers of queries and keys.
TINY_DEFAULT = {
    ("sm_80", "bf16", 64, (16, 16), True),
    ("sm_90", "bf16", 6, (16, 16), False),
    ("sm_100", "fp32", 64, (32, 32), True),
    ("gfx942", "bf16", 64, (5, 30), True),
}


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16-brief", *(pytest.param(d, marks=pytest.mark.full) for d in ("bfloat16", "float16"))]
)
def test_interpreter(dtype: str) -> None:
    """Every option, alone and with others, against float64 (triton_attention.py)."""
    assert checks_of("triton_attention", dtype) > (20 if dtype.endswith("-brief") else 100)


class FakeDriver:
    """A GPU that is not there, as far as compiling for it asks."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0


def compiling(target: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The list that from now on gets (name, compiled kernel) of whatever is launched, for a GPU that is not there."""
    import triton
    from triton.runtime.jit import JITFunction

    from mmkernels.triton import launch, pinned

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "make", lambda: "cuda" if target.startswith("sm_") else "hip")
    monkeypatch.setattr(pinned, "architecture", lambda: target)
    monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver(target))
    return compiled


def assert_kernel_fits(name: str, kernel: Any, target: str, with_matrix: bool, folder: Path) -> None:
    """Its shared memory, its registers, its instructions. Where no table is pinned, tiles are for the small GPUs of the make
    too."""
    from mmkernels.triton import pinned

    shared, most = kernel.metadata.shared, TARGETS[target] if pinned.tables(target) else min(TARGETS[target], 99 * 1024)
    assert shared <= most, f"{name}: {shared} bytes of shared memory"
    if target.startswith("sm_"):
        assert not keeps_in_local_memory(kernel.asm["cubin"], folder), f"{name}: registers spill"
    else:  # scalar registers may spill: they go to lanes of vector registers
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spills and set(spills) == {"0"}, f"{name}: registers spill: {spills}"
    assert_no_float_atomics(kernel.asm, name)
    if with_matrix:
        assembly = kernel.asm["ptx" if target.startswith("sm_") else "amdgcn"]
        # Tiles too small for the instructions of whole warp groups take those of warps.
        assert MATRIX[target] in assembly or "mma.sync" in assembly, f"{name}: no matrix instructions"


def calls(dtype: torch.dtype, channels: int, rich: bool) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Arguments of the operator, and whether to go backward: many queries and one."""

    def new(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    heads, kv_heads, len_k = 4, 2, 1024
    for len_q in (256, 1):
        q, k, v = (new(2, h, n, channels) for h, n in ((heads, len_q), (kv_heads, len_k), (kv_heads, len_k)))
        extra: tuple[Any, ...] = (None,) * 9
        numbers: tuple[Any, ...] = (0.1, 0.0, 0.0, -1, 0, False, 0, 0)
        if rich:
            ids = new(2, len_q, kind=torch.int64), new(2, len_q, kind=torch.int64), new(2, len_k, kind=torch.int64)
            mask = new(2, 1, len_q, len_k, kind=torch.bool)
            extra = (new(1, heads, len_q, len_k), mask, *ids, None, None, new(2, kv_heads, len_k), new(1, kind=torch.int64))
            numbers = (0.1, 30.0, 0.1, 99, 0, True, 0, 0)
        yield (q, k, v, *extra, *numbers), len_q > 1


@pytest.mark.parametrize(
    ("target", "dtype", "channels", "rich"),
    [
        pytest.param(*case, id=f"{target}-{dtype}-{channels}-{'rich' if rich else 'plain'}", marks=marks)
        for target in TARGETS
        for dtype in DTYPES
        for channels in (64, 72, 128, 256)
        for rich in (False, True)
        if (case := (target, dtype, channels, rich)) and (marks := [] if case in DEFAULT else [pytest.mark.full]) is not None
    ],
)
def test_tiles_compile_and_fit(
    target: str, dtype: str, channels: int, rich: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the launches launch, compiled for a GPU that is not there: its shared memory, its registers, its instructions."""
    from mmkernels.triton import attention as launches

    compiled = compiling(target, monkeypatch)
    for args, backward in calls(DTYPES[dtype], channels, rich):
        out, lse = launches.attention(*args)
        if backward:
            launches.attention_backward(out, lse, *args[:12], out, lse, *args[12:], rich, rich)
    assert {name for name, _ in compiled} >= (WITH_DOTS if rich else WITH_DOTS - {"bias_kernel"}) | {"combine_kernel"}
    for name, kernel in compiled:
        with_matrix = name in WITH_DOTS and (dtype != "fp32" or target == "gfx942")
        assert_kernel_fits(name, kernel, target, with_matrix, tmp_path)


@pytest.mark.parametrize(
    ("target", "channels"),
    [
        ("sm_90", 64),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("sm_90", 128), *((t, 64) for t in TARGETS if t != "sm_90"))
        ),
    ],
)
def test_programs_that_share_tiles_compile_and_fit(
    target: str, channels: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The forward kernel where a table pins how many programs a multiprocessor has."""
    from mmkernels.triton import attention as launches
    from mmkernels.triton import pinned

    compiled = compiling(target, monkeypatch)
    args, _ = next(calls(torch.bfloat16, channels, False))
    with pinned.trial(f"attention resident half {channels}", (2,)):
        launches.attention(*args)
    ((name, kernel),) = compiled
    assert name == "forward_kernel"
    assert_kernel_fits(name, kernel, target, True, tmp_path)


@pytest.mark.parametrize(
    ("target", "dtype", "channels", "length", "rich"),
    [
        pytest.param(*case, id="-".join(map(str, (*case[:3], *length, "rich" if rich else "plain"))), marks=marks)
        for target in TARGETS
        for dtype in DTYPES
        for channels in (6, 32, 64)
        for length in ((16, 16), (32, 32), (5, 30), (30, 5))
        for rich in (False, True)
        if (case := (target, dtype, channels, length, rich))
        and (marks := [] if case in TINY_DEFAULT else [pytest.mark.full]) is not None
    ],
)
def test_tiny_tiles_compile_and_fit(
    target: str,
    dtype: str,
    channels: int,
    length: tuple[int, int],
    rich: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The same of sequences so short that several share a tile."""
    from mmkernels.triton import attention as launches

    compiled = compiling(target, monkeypatch)

    def new(*shape: int, kind: torch.dtype = DTYPES[dtype]) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    len_q, len_k = length
    q, k, v = (new(9, 4, n, channels) for n in (len_q, len_k, len_k))
    bias, mask = (new(1, 4, len_q, len_k), new(9, 1, len_q, len_k, kind=torch.bool)) if rich else (None, None)
    args = (q, k, v, bias, mask, *(None,) * 7, 0.1, 0.0, 0.0, 3 if rich else -1, 0 if rich else -1, rich, 0, 0)
    out, lse = launches.attention(*args)
    launches.attention_backward(out, lse if rich else None, *args[:12], out, lse, *args[12:], rich, False)
    names = {name for name, _ in compiled}
    assert names == {"tiny_forward_kernel", "tiny_backward_kernel"} | ({"bias_kernel"} if rich else set())
    for name, kernel in compiled:
        assert_kernel_fits(name, kernel, target, dtype != "fp32" or target == "gfx942", tmp_path)
