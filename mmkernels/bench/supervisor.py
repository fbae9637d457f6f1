"""Starts the measured process under a stated allocator setting, and collects what it streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import IO, Any, Final

from mmkernels.bench.machine import Machine
from mmkernels.bench.peaks import Peaks, peaks_from
from mmkernels.bench.results import CaseResult, Results, case_from, overhead_from
from mmkernels.bench.worker import Event, Request

# glibc's malloc gives every tensor over 32 MiB back to the system and fetches fresh pages for the next one; the page faults
# double the time of whatever allocates, ours and torch's. Kept pages show the kernels instead.
TUNED: Final = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "67108864"}
ALLOCATORS: Final = ("tuned", "stock", "both")

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-m", "mmkernels.bench.worker")
_STDERR_LINES: Final = 15


def worker_environment(allocator: str) -> dict[str, str]:
    """This process's environment with malloc's settings replaced by those of `allocator`, tuned or stock."""
    kept = {name: value for name, value in os.environ.items() if name not in TUNED}
    return {**kept, **TUNED} if allocator == "tuned" else kept


def run_worker(request: Request, allocator: str, on_event: Callable[[Event], None]) -> None:
    """Runs one worker to its end. ChildProcessError, with the last lines of its stderr, where it does not get there."""
    command = (*WORKER_COMMAND, json.dumps(asdict(request)))
    done, running = False, "start"
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(
            command,
            env=worker_environment(allocator),
            # `python -m` looks in the current folder first, and in a checkout that is the source without its libraries.
            cwd=tempfile.gettempdir(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                done = done or event["event"] == "done"
                running = event.get("what", running)
                on_event(event)
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        if code != 0 or not done:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ChildProcessError(f"the benchmark's {allocator} worker {how} during: {running}\n{_tail(stderr)}")


def _tail(stderr: IO[str]) -> str:
    stderr.seek(0)
    lines = stderr.read().splitlines()
    return "\n".join(f"  {line}" for line in lines[-_STDERR_LINES:]) or "  (it wrote nothing to stderr)"


class _Collector:
    """Keeps what a worker streams."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.records: dict[str, list[Any]] = {"machine": [], "peaks": [], "case": [], "overhead": []}
        self.broken: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "start":
            self.report(event["what"])
        elif kind == "broken":
            self.broken[event["case"]] = event["error"]
        elif kind in self.records:
            self.records[kind].append(event.get("result", event.get(kind)))

    @property
    def machine(self) -> Machine:
        return Machine(**self.records["machine"][0])

    @property
    def peaks(self) -> Peaks:
        return peaks_from(self.records["peaks"][0])

    @property
    def cases(self) -> list[CaseResult]:
        return [case_from(record) for record in self.records["case"]]


def measure(request: Request, allocator: str, report: Callable[[str], None]) -> Results:
    """Runs the worker, or with allocator "both" a tuned one and then a stock one.

    Args:
        report: is told what starts, each time something does.
    """
    both = allocator == "both"
    judged = _Collector(lambda what: report(f"{what}, tuned allocator" if both else what))
    run_worker(request, "tuned" if both else allocator, judged)
    cases = judged.cases
    if both:
        stock = _Collector(lambda what: report(f"{what}, stock allocator"))
        run_worker(replace(request, overheads=False), "stock", stock)
        judged.broken |= stock.broken
        again = {(case.name, case.dtype): case for case in stock.cases}
        cases = [
            replace(case, stock=other.timings, stock_preemptions=other.preemptions)
            for case in cases
            if (other := again.get((case.name, case.dtype))) is not None
        ]
    return Results(
        device=request.device,
        allocator=allocator,
        seconds=request.seconds,
        machine=judged.machine,
        peaks=judged.peaks,
        cases=tuple(cases),
        overheads=tuple(overhead_from(record) for record in judged.records["overhead"]),
        broken=judged.broken,
    )
