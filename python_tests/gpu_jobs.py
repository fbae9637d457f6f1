"""The jobs of a GPU script, in several processes.

Triton compiles on the CPU, one kernel after the other in a process, so one process would leave most cores idle; and an
illegal access ends a process's use of the GPU, which must not end the tests of the others. A process claims its next job by
a file that nobody has made, and writes the outcome into it; one that broke is replaced. All jobs run, whatever fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmkernels import runtime
from mmkernels.cards import all_cards
from mmkernels.cards.card import Card

_BROKEN = 75  # exit status of a process that the GPU no longer serves
_POLL_S = 0.2
_PROGRESS_S = 15.0


@dataclass(frozen=True)
class Job:
    """`run` raises where something is wrong; what it returns is a remark that the report repeats."""

    name: str
    run: Callable[[], str | None]


@dataclass(frozen=True)
class Options:
    """`backend`: cuda (with the compiled library), triton (without), or cpu, where the scripts themselves are tested."""

    backend: str
    device: torch.device


Prepare = Callable[[Options], list[Job]]


def cards_of(options: Options) -> list[Card]:
    """Without the library, those that run otherwise than with it: they have kernels in it, or sort experts by it."""
    by_library = {card.family for card in all_cards() if any(backend.name == "cuda" for backend in card.backends)}
    by_library |= {"moe", "routing"}
    return [card for card in all_cards() if options.backend != "triton" or card.family in by_library]


def main(description: str, prepare: Prepare, *, processes: int | None = None) -> None:
    """The command line of a script: exit status 0 where every job ran and passed.

    Args:
        prepare: the jobs, the same ones in every process.
        processes: by default as many as there are cores; fewer where a job needs much of the GPU's memory.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("backend", choices=("cuda", "triton", "cpu"))
    parser.add_argument("--processes", type=int, default=processes or os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="jobs whose name contains this text")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no job starts later than this; the rest fails")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of claims: this is one of the processes
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    _check_backend(given.backend)
    options = Options(given.backend, torch.device("cpu" if given.backend == "cpu" else "cuda"))
    jobs = [job for job in prepare(options) if given.only in job.name]
    if given.folder is not None:
        _work(jobs, given.folder, given.until)
    elif not jobs:
        parser.error(f"no job's name contains {given.only!r}")
    elif not _oversee(jobs, given):
        sys.exit(1)


def _check_backend(backend: str) -> None:
    if backend == "cpu":
        return
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA GPU here")
    library, wanted = runtime.cuda_library_missing, backend == "cuda"
    if (library is None) != wanted:
        sys.exit(f"backend {backend}: the CUDA library is {'in use' if library is None else f'not in use: {library}'}")
    if runtime.triton_missing() is not None:
        sys.exit(f"backend {backend}: {runtime.triton_missing()}")


# --- one of the processes -------------------------------------------------------------------------------------------------
def _work(jobs: list[Job], folder: Path, until: float) -> None:
    torch.set_num_threads(1)
    for index, job in enumerate(jobs):
        if time.time() > until:
            return
        claim = folder / str(index)
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        start, text, passed = time.time(), "", True
        try:
            text = job.run() or ""
        except Exception as error:
            text, passed = traceback.format_exc(), False
            broken = "CUDA" in str(error)  # of such an error many stay with the process
        claim.write_text(json.dumps({"passed": passed, "text": text, "seconds": round(time.time() - start, 2)}))
        if not passed and broken:
            os._exit(_BROKEN)  # without torch's own farewell to the GPU, which may wait for ever


# --- the one that starts them ----------------------------------------------------------------------------------------------
def _oversee(jobs: list[Job], given: Any) -> bool:
    start = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            *(sys.executable, sys.argv[0], given.backend, "--only", given.only),
            *("--folder", name, "--until", str(start + given.seconds)),
        ]
        running = [subprocess.Popen(command) for _ in range(min(given.processes, len(jobs)))]
        shown, restarts = start, 0
        while running:
            time.sleep(_POLL_S)
            claimed = len(list(folder.iterdir()))
            if time.time() - shown > _PROGRESS_S:
                shown = time.time()
                print(f"{claimed} of {len(jobs)} started after {shown - start:.0f} s", flush=True)
            ended = [process for process in running if process.poll() is not None]
            running = [process for process in running if process.returncode is None]
            broken = [process for process in ended if process.returncode != 0]
            restarts += len(broken)
            # One that broke without a job would have another do the same.
            if restarts <= claimed < len(jobs) and time.time() < start + given.seconds:
                running += [subprocess.Popen(command) for _ in broken]
        return _report(jobs, folder, time.time() - start)


def _report(jobs: list[Job], folder: Path, seconds: float) -> bool:
    """Prints what failed, crashed or was not run, the remarks, and the totals; whether all passed."""
    counts = {"passed": 0, "FAILED": 0, "CRASHED": 0, "NOT RUN": 0}
    left: list[str] = []
    slowest: list[tuple[float, str]] = []
    for index, job in enumerate(jobs):
        claim = folder / str(index)
        if not claim.exists():
            counts["NOT RUN"] += 1
            left.append(job.name)
            continue
        record = json.loads(claim.read_text() or '{"passed": false, "text": "", "seconds": 0}')
        outcome = "passed" if record["passed"] else "FAILED" if record["text"] else "CRASHED"
        counts[outcome] += 1
        slowest.append((record["seconds"], job.name))
        if outcome != "passed" or record["text"]:
            print(f"{job.name}: {record['text'].rstrip() if outcome == 'passed' else outcome}")
        if outcome == "FAILED":
            print(record["text"])
    if left:
        print(f"not run: {', '.join(left[:20])}{' and more' if len(left) > 20 else ''}")
    print("slowest:", ", ".join(f"{name} {spent:.0f} s" for spent, name in sorted(slowest, reverse=True)[:5]))
    print(f"{len(jobs)} jobs in {seconds:.0f} s:", ", ".join(f"{count} {what}" for what, count in counts.items() if count))
    return counts["passed"] == len(jobs)
