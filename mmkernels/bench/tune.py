"""``mmkernels tune``: finds the tiles of the Triton kernels for the GPU at hand, and pins them in a table.

The workloads are the benchmark's own cases. What a case's kernels ask mmkernels.triton.pinned for is recorded; then one tile
after the other is led from where it stands to its best neighbour, and on from there, until none is better. A tile is judged
by the time of whole calls, in which nothing else differs, and only if their results stay what they were.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.table import Table as Shown
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmkernels import runtime
from mmkernels.bench.contest import as_leaf, differentiable
from mmkernels.bench.machine import this_machine
from mmkernels.bench.selection import dtype_name, select
from mmkernels.bench.table import make_console
from mmkernels.cards import all_cards
from mmkernels.cards.card import BenchCase
from mmkernels.triton import pinned
from mmkernels.triton.pinned import Tile

Results = list[Tensor]

# What a field of a tile may be; those that are in no dictionary here go from 1 on.
_LEAST: Final = {**dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_E", "BLOCK"), 16), **pinned.COUNTS}
_MOST: Final = {"warps": 16, "stages": 6, "resident": 4}
_MOST_BLOCK: Final = 256

_GAIN: Final = 0.98  # a neighbour that takes more of the time is no better: readings differ by a percent by themselves
_WORKLOADS: Final = 3  # that judge one tile, those that take longest
_READINGS: Final = 3
_READING_MS: Final = 30


@dataclass(frozen=True)
class Workload:
    """One case. `step` makes the call, backward included, and returns all that came out."""

    step: Callable[[], Results]


Maker = Callable[[], Workload]
Clock = Callable[[Workload], float]  # milliseconds of one call


@dataclass(frozen=True)
class Found:
    """One tile: what it was, what it is now, and the share of the time of whole calls that is left."""

    name: str
    fields: tuple[str, ...]
    before: Tile
    after: Tile
    share: float
    tried: int


# --- workloads --------------------------------------------------------------------------------------------------------
def workload(case: BenchCase, device: str, dtype: torch.dtype, *, seed: int = 0) -> Workload:
    generator = torch.Generator().manual_seed(seed)
    call = case.make(torch.device(device), dtype, generator)
    if not case.backward:

        def forward() -> Results:
            with torch.no_grad():
                return [out for out in tree_leaves(call.of(case.run)) if isinstance(out, Tensor)]

        return Workload(forward)
    call = call.map_tensors(as_leaf)
    leaves = [tensor for tensor in call.tensors() if tensor.requires_grad]
    upstream = [torch.randn(out.shape, generator=generator).to(out) for out in differentiable(call.of(case.run))]

    def backward() -> Results:
        outputs = differentiable(call.of(case.run))
        gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        return [*(out.detach() for out in outputs), *(grad for grad in gradients if grad is not None)]

    return Workload(backward)


def gpu_clock(work: Workload) -> float:
    """Median of replays of a CUDA graph of the call, which hold no time of the host's; of calls, where it has no graph."""
    from triton.testing import do_bench, do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(work.step, rep=_READING_MS, return_mode="median"))
    except RuntimeError:
        return float(do_bench(work.step, rep=_READING_MS, return_mode="median"))


def agree(ours: Results, expected: Results) -> bool:
    """Whether results are the same but for the order of sums; a tile that a compiler takes may still be computed wrong."""
    eps = max((torch.finfo(x.dtype).eps for x in expected if x.is_floating_point()), default=0.0)
    for a, b in zip(ours, expected, strict=True):
        if a.shape != b.shape or not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return False
        a, b = (torch.where(finite, x, 0).double() for x in (a, b))
        if b.numel() > 0 and (a - b).abs().max() > (8 * eps + 1e-5) * b.abs().max():
            return False
    return True


# --- the search -------------------------------------------------------------------------------------------------------
def neighbours(fields: tuple[str, ...], tile: Tile) -> Iterator[Tile]:
    """Tiles with one number more or less: a stage, a resident program, or twice or half of all else."""
    for i, field in enumerate(fields):
        sizes = (tile[i] + 1, tile[i] - 1) if field in pinned.COUNTS else (tile[i] * 2, tile[i] // 2)
        for size in sizes:
            if _LEAST.get(field, 1) <= size <= _MOST.get(field, _MOST_BLOCK):
                yield (*tile[:i], size, *tile[i + 1 :])


def climb(
    fields: tuple[str, ...], start: Tile, share: Callable[[Tile, Tile], float | None], stop: Callable[[], bool]
) -> tuple[Tile, int]:
    """(the best tile on the way uphill, how many were tried). `share(tile, best)` is what part of the best one's time a tile
    takes, None where it cannot run; the search ends where no neighbour is better, or with `stop`."""
    best, tried = start, {start}
    while True:
        before = best
        for tile in neighbours(fields, before):
            if stop():
                return best, len(tried) - 1
            if tile in tried:
                continue
            tried.add(tile)
            took = share(tile, best)
            if took is not None and took < _GAIN:
                best = tile
        if best == before:
            return best, len(tried) - 1


def _share(name: str, works: Sequence[Workload], clock: Clock) -> Callable[[Tile, Tile], float | None]:
    """The function that `climb` asks, of a tile that these calls ask for."""
    expected = [work.step() for work in works]

    def timed(tile: Tile, work: Workload) -> float:
        with pinned.trial(name, tile):
            return clock(work)

    def share(tile: Tile, best: Tile) -> float | None:
        logs = 0.0
        try:
            for work, results in zip(works, expected, strict=True):
                with pinned.trial(name, tile):
                    if not agree(work.step(), results):
                        return None
                pairs = [timed(tile, work) / timed(best, work) for _ in range(_READINGS)]
                logs += math.log(sorted(pairs)[_READINGS // 2])
        except Exception as error:  # too much shared memory, or what a compiler cannot do: no tile for this GPU
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            return None
        return math.exp(logs / len(works))

    return share


def search(makers: Mapping[str, Maker], clock: Clock, seconds: float, report: Callable[[str], None]) -> list[Found]:
    """Tunes all that the workloads ask for, for up to `seconds` a tile.

    Args:
        makers: by name of a workload what makes it; only those that judge a tile are in memory at once.
        clock: milliseconds of a workload.
        report: told what starts.
    """
    asked: dict[str, tuple[pinned.Seen, list[str]]] = {}
    durations: dict[str, float] = {}
    for user, make in makers.items():
        report(f"what {user} asks for")
        work = make()
        with pinned.watching() as seen:
            work.step()
        durations[user] = clock(work) if seen else 0.0
        for name, what in seen.items():
            asked.setdefault(name, (what, []))[1].append(user)
    found = []
    with ExitStack() as chosen:
        for name, (what, users) in asked.items():
            report(name)
            longest = sorted(users, key=lambda user: -durations[user])[:_WORKLOADS]
            judges = [makers[user]() for user in longest]
            share = _share(name, judges, clock)
            end = time.monotonic() + seconds
            best, tried = climb(what.fields, what.tile, share, lambda end=end: time.monotonic() > end)  # type: ignore[misc]
            left = 1.0 if best == what.tile else share(best, what.tile) or 1.0
            if left >= 1.0:  # what looked better on the way is not, held against where it began
                best, left = what.tile, 1.0
            chosen.enter_context(pinned.trial(name, best))
            found.append(Found(name, what.fields, what.tile, best, left, tried))
    return found


# --- the command ------------------------------------------------------------------------------------------------------
def run(
    *,
    family: str | None = None,
    dtypes: Sequence[str] | None = None,
    case: str | None = None,
    seconds: float = 60.0,
    out: Path | None = None,
) -> list[Found]:
    """Tunes what the filters select on the current GPU and writes the table.

    Args:
        family, case, dtypes: filters, see :func:`mmkernels.bench.selection.select`.
        seconds: to spend on each tile, at most; a neighbour that has begun is finished.
        out: the file; by default the user's own table, which calls use from the next process on. Other tiles that it pins
            stay.

    Raises:
        ValueError, OSError: no GPU, no Triton, a mistake in the arguments.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune needs a GPU, and torch finds none")
    if runtime.triton_missing() is not None:
        raise ValueError(f"tune needs Triton: {runtime.triton_missing()}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds: expected a number above 0, got {seconds}")
    import triton

    architecture = pinned.architecture()
    assert architecture is not None
    path = pinned.user_path(architecture) if out is None else out
    before = pinned.read(path) if path.exists() else None
    if before is not None and before.made["architecture"] != architecture:
        raise ValueError(f"out: {path} is a table of {before.made['architecture']}, and this GPU is {architecture}")
    chosen = select(all_cards(), family=family, case=case, dtypes=dtypes, device="cuda").cases
    makers = {f"{e.name} {dtype_name(dtype)}": partial(workload, e, "cuda", dtype) for _, e, dtype in chosen}
    console = make_console()
    found = search(makers, gpu_clock, seconds, lambda what: print(what, file=sys.stderr, flush=True))
    machine = this_machine("cuda")
    made = {
        "architecture": architecture,
        "gpu": machine.gpu,
        "mmkernels": machine.mmkernels,
        "commit": machine.commit,
        "torch": machine.torch,
        "triton": triton.__version__,
        "date": machine.date,
        "measured": True,
    }
    tiles = {one.name: dict(zip(one.fields, one.after, strict=True)) for one in found}
    kept = before.tiles if before is not None and before.made.get("mmkernels") == machine.mmkernels else {}
    table = pinned.Table(path, made, {**kept, **tiles})
    pinned.write(table)
    console.print(shown(found))
    console.print(f"{len(tiles)} tiles pinned in {path}", markup=False, soft_wrap=True)
    return found


def shown(found: Sequence[Found]) -> Shown:
    table = Shown(title="Tiles", title_justify="left")
    for heading in ("tile", "fields", "before", "after", "time left", "tried"):
        table.add_column(heading)
    for one in found:
        sizes = (" x ".join(map(str, tile)) for tile in (one.before, one.after))
        table.add_row(one.name, ", ".join(one.fields), *sizes, f"{one.share:.3f}", str(one.tried))
    return table
