"""``mmkernels bench``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmkernels.bench import plots, results, table
from mmkernels.bench.selection import Selection, select
from mmkernels.bench.supervisor import ALLOCATORS, measure
from mmkernels.bench.worker import Request
from mmkernels.cards import all_cards


def run(
    *,
    family: str | None = None,
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    case: str | None = None,
    json_path: Path | None = None,
    plot_folder: Path | None = None,
    compare_path: Path | None = None,
    allocator: str = "both",
    seconds: float = 2.0,
    limit_s: float | None = None,
) -> results.Results:
    """Measures what the filters select, prints it, and writes what was asked for.

    Args:
        family, case, dtypes: filters, see :func:`mmkernels.bench.selection.select`.
        device: "cpu" or "cuda".
        json_path, plot_folder: where to write; folders are made.
        compare_path: JSON file of an earlier run.
        allocator: "tuned", "stock" or "both" (tuned is judged).
        seconds: to spend on each case; rounds that would leave too few readings go beyond it.
        limit_s: no case starts later than so many seconds after the peaks are known.

    Raises:
        ValueError, OSError, ImportError: a mistake in the arguments, found before anything is measured.
        ChildProcessError: the measured process broke down; or some case has no result, because an op raised or the limit
            came first: then the others were measured, shown and written.
    """
    chosen = _check(family, device, dtypes, case, allocator, seconds)
    before = None if compare_path is None else results.read(compare_path)
    if plot_folder is not None:
        plots.require_matplotlib()
        plot_folder.mkdir(parents=True, exist_ok=True)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        if json_path.is_dir():
            raise ValueError(f"json: {json_path} is a folder, expected a file")
    console = table.make_console()
    if device == "cuda" and allocator != "tuned":
        console.print("CUDA has an allocator of its own: measuring once, malloc's settings do not matter.")
        allocator = "tuned"
    request = Request(family=family, case=case, dtypes=tuple(dtypes or ()), device=device, seconds=seconds, limit_s=limit_s)
    with _progress(console, _steps(chosen, allocator)) as report:
        measured = measure(request, allocator, report)
    table.show(measured, None if before is None else results.compare(before, measured), console)
    if json_path is not None:
        results.write(measured, json_path)
    if plot_folder is not None:
        plots.write_plots(measured, plot_folder)
    if measured.broken:
        raise ChildProcessError("; ".join(f"{case}: {error}" for case, error in measured.broken.items()))
    return measured


def _check(
    family: str | None, device: str, dtypes: Sequence[str] | None, case: str | None, allocator: str, seconds: float
) -> Selection:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
        raise ValueError(f"device: cuda cannot be used, {reason}")
    if allocator not in ALLOCATORS:
        raise ValueError(f"allocator: expected one of {', '.join(ALLOCATORS)}, got {allocator!r}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds: expected a number above 0, got {seconds}")
    return select(all_cards(), family=family, case=case, dtypes=dtypes, device=device)


def _steps(chosen: Selection, allocator: str) -> int:
    """How often a worker says that something starts: peaks, every case, and the overheads of the first worker."""
    workers = 2 if allocator == "both" else 1
    return workers * (1 + len(chosen.cases)) + len(chosen.overheads)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, else a line on stderr for what starts."""
    if not console.is_terminal:
        count = 0

        def report(what: str) -> None:
            nonlocal count
            count += 1
            print(f"[{count}/{total}] {what}", file=sys.stderr, flush=True)

        yield report
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        started = False

        def show(what: str) -> None:
            nonlocal started
            bar.update(task, description=what, advance=1 if started else 0)
            started = True

        yield show
