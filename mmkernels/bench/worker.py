"""The measured process: ``python -m mmkernels.bench.worker REQUEST``, started by :mod:`mmkernels.bench.supervisor`.

It is a process of its own because malloc reads its settings once, when a process starts. It streams its results, one JSON
object a line, on stdout.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mmkernels.bench.contest import Contest, one_line
from mmkernels.bench.graphs import is_short, replayed
from mmkernels.bench.machine import this_machine
from mmkernels.bench.measure import clock_of, interleave
from mmkernels.bench.overheads import measure_overhead
from mmkernels.bench.peaks import Peaks, peaks
from mmkernels.bench.results import CaseResult
from mmkernels.bench.selection import dtype_name, select
from mmkernels.cards import all_cards
from mmkernels.cards.card import BenchCase, Card

Event = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to measure. `overheads` is off where another allocator's worker has them already."""

    family: str | None = None
    case: str | None = None
    dtypes: tuple[str, ...] = ()
    device: str = "cpu"
    seconds: float = 2.0
    seed: int = 0
    overheads: bool = True
    limit_s: float | None = None  # no case starts later than this


def _preemptions() -> int:
    """How often the system has taken a processor from this process so far although it wanted to go on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure_case(card: Card, case: BenchCase, dtype: torch.dtype, request: Request, ceilings: Peaks) -> CaseResult:
    """One case with one dtype, all contestants interleaved."""
    contest = Contest(case, request.device, dtype, seed=request.seed)
    preempted, start = _preemptions(), time.perf_counter()
    with contest.grad_mode():
        timings = interleave(contest.steps, request.seconds, clock=clock_of(request.device), seed=request.seed)
        graphs = {}
        if torch.device(request.device).type == "cuda" and is_short(timings):
            graphs = replayed(contest.steps, request.seconds, seed=request.seed)
    preemptions = (_preemptions() - preempted) / (time.perf_counter() - start) / torch.get_num_threads()
    name = dtype_name(dtype)
    return CaseResult(
        family=card.family,
        name=case.name,
        dtype=name,
        backward=case.backward,
        kernel=contest.kernel,
        timings=timings,
        failed=contest.failed,
        flops=contest.cost.flops,
        bytes=contest.cost.bytes,
        floor_ms=ceilings.floor_ms(contest.cost.flops, contest.cost.bytes, name),
        preemptions=round(preemptions, 2),
        target=case.target,
        graphs=graphs,
    )


def events(request: Request, cards: Sequence[Card]) -> Iterator[Event]:
    """The run as a stream: machine, peaks, then for each case or overhead what starts and what came out, and done. A case
    in which our own op raises, or that the limit leaves no time for, is broken; the others are measured all the same."""
    chosen = select(cards, family=request.family, case=request.case, dtypes=request.dtypes, device=request.device)
    yield {"event": "machine", "machine": asdict(this_machine(request.device))}
    yield {"event": "start", "what": "peaks of this machine"}
    ceilings = peaks(request.device)
    yield {"event": "peaks", "peaks": asdict(ceilings)}
    end = float("inf") if request.limit_s is None else time.perf_counter() + request.limit_s
    for card, case, dtype in chosen.cases:
        if time.perf_counter() > end:
            error = f"not measured within the limit of {request.limit_s:g} s"
            yield {"event": "broken", "case": f"{case.name} {dtype_name(dtype)}", "error": error}
            continue
        yield {"event": "start", "what": f"{case.name} {dtype_name(dtype)}"}
        try:
            result = measure_case(card, case, dtype, request, ceilings)
        except Exception as error:
            yield {"event": "broken", "case": f"{case.name} {dtype_name(dtype)}", "error": one_line(error)}
            continue
        yield {"event": "case", "result": asdict(result)}
    for card, overhead in chosen.overheads if request.overheads else ():
        yield {"event": "start", "what": overhead.name}
        yield {"event": "overhead", "result": asdict(measure_overhead(card, overhead, request.seconds, seed=request.seed))}
    yield {"event": "done"}


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    # Whatever else prints goes to stderr, so that stdout holds events only.
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        for event in events(request, all_cards()):
            print(json.dumps(event), file=stream, flush=True)


if __name__ == "__main__":
    main()
