"""The results of a run: what they say, their JSON file, and the comparison with an earlier one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from mmkernels.bench.contest import OURS
from mmkernels.bench.machine import Machine
from mmkernels.bench.measure import Timing
from mmkernels.bench.overheads import OverheadResult
from mmkernels.bench.peaks import Peaks, peaks_from
from mmkernels.cards.card import Target

SCHEMA: Final = 1
# On a machine of two cores: 14 to 19 when idle, 76 to 88 beside one busy program, which doubled the times and need not
# widen their spread.
_DISTURBED: Final = 40.0
_LAUNCH_BOUND: Final = 0.5


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: `at_most` ratios are ours over the best peer's time, the others its inverse, or what
    else the target is `of`."""

    ratio: float
    limit: float
    at_most: bool
    of: str = "peers"

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit


@dataclass(frozen=True)
class Rates:
    """TFLOP/s, GB/s, and the part of what the machine's ceilings allow: 1 is the floor's own speed."""

    tflops: float
    gbps: float
    of_ceiling: float


@dataclass(frozen=True)
class CaseResult:
    """One case with one dtype. `timings` are those that are judged; `stock` repeats them under the stock allocator, and
    `graphs` short calls of a GPU from CUDA graphs, without what launching costs."""

    family: str
    name: str
    dtype: str
    backward: bool
    kernel: str
    timings: Mapping[str, Timing]
    failed: Mapping[str, str]
    flops: float
    bytes: float
    floor_ms: float
    preemptions: float  # by other programs, a second and thread of the measurement
    target: Target | None
    stock: Mapping[str, Timing] | None = None
    stock_preemptions: float = 0.0
    graphs: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def ours(self) -> Timing:
        return self.timings[OURS]

    @property
    def best_peer(self) -> str | None:
        """The fastest other contestant; None where there is none."""
        peers = [name for name in self.timings if name != OURS]
        return min(peers, key=lambda name: self.judged[name].median_ms, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the best peer."""
        return None if self.best_peer is None else self.judged[self.best_peer].median_ms / self.judged[OURS].median_ms

    @property
    def over_floor(self) -> float | None:
        return self.judged[OURS].median_ms / self.floor_ms if self.floor_ms > 0 else None

    @property
    def launch_bound(self) -> bool:
        """Launching takes us, or the fastest peer, more than half of the time: a model that replays a graph saves it, and
        one that does not is bound by it whatever the kernel does."""
        peers = [name for name in self.graphs if name != OURS]
        fastest = min(peers, key=lambda name: self.graphs[name].median_ms, default=OURS)
        return OURS in self.graphs and any(
            self.graphs[name].median_ms < _LAUNCH_BOUND * self.timings[name].median_ms for name in (OURS, fastest)
        )

    @property
    def judged(self) -> Mapping[str, Timing]:
        """The replays of a launch-bound case, and the calls of what cannot be captured; else all calls."""
        return {**self.timings, **self.graphs} if self.launch_bound else self.timings

    def rates(self, timing: Timing) -> Rates:
        """What a contestant of that time does of the case's least work."""
        seconds = timing.median_ms / 1e3
        return Rates(self.flops / seconds / 1e12, self.bytes / seconds / 1e9, self.floor_ms / timing.median_ms)

    @property
    def disturbed(self) -> bool:
        """Other programs took processors away too often: parallel code waits for its slowest thread."""
        return self.preemptions > _DISTURBED

    @property
    def stock_disturbed(self) -> bool:
        """The same of the times under the stock allocator, which another process measured later."""
        return self.stock_preemptions > _DISTURBED

    @property
    def verdict(self) -> Verdict | None:
        """None without a target, and where a contestant that it names failed, unless that is optional: the others would be a
        weaker test. Launch-bound calls are judged by their replays."""
        if self.target is None:
            return None
        times = self.judged
        if self.target.of != "peers":
            rates = self.rates(times[OURS])
            measured = rates.tflops if self.target.of == "TFLOP/s" else rates.of_ceiling
            return Verdict(measured, self.target.ratio, False, self.target.of)
        named = [_named(peer, (*self.timings, *self.failed), self.name) for peer in self.target.peers]
        contestants = [name for names in named for name in names]
        ran = [name for name in contestants if name not in self.failed]
        if not ran or (len(ran) < len(contestants) and not self.target.optional):
            return None
        best, ours = min(times[name].median_ms for name in ran), times[OURS].median_ms
        ratio = ours / best if self.target.at_most else best / ours
        return Verdict(ratio, self.target.ratio, self.target.at_most)


def _named(peer: str, contestants: tuple[str, ...], case: str) -> list[str]:
    """The contestants that a target means: "compile" is each of "compile:<peer>" too."""
    names = [name for name in contestants if name == peer or name.startswith(f"{peer}:")]
    if not names:
        raise ValueError(f"{case}: its target names {peer!r}, which is none of {', '.join(contestants)}")
    return names


@dataclass(frozen=True)
class Results:
    device: str
    allocator: str  # tuned, stock, or both (tuned is judged)
    seconds: float
    machine: Machine
    peaks: Peaks
    cases: tuple[CaseResult, ...]
    overheads: tuple[OverheadResult, ...]
    broken: Mapping[str, str] = field(default_factory=dict)  # the cases that have no result, and why


# --- JSON -------------------------------------------------------------------------------------------------------------
def _summary(case: CaseResult) -> dict[str, Any]:
    """What follows from the other fields, for programs that read the file."""
    verdict = case.verdict
    return {
        "best_peer": case.best_peer,
        "ratio": case.ratio,
        "over_floor": case.over_floor,
        "disturbed": case.disturbed,
        "stock_disturbed": case.stock_disturbed,
        "target_ratio": None if verdict is None else verdict.ratio,
        "target_met": None if verdict is None else verdict.met,
        "launch_bound": case.launch_bound,
        "rates": {name: asdict(case.rates(timing)) for name, timing in case.judged.items()},
    }


def to_record(results: Results) -> dict[str, Any]:
    record = {"schema": SCHEMA, **asdict(results)}
    for case, entry in zip(results.cases, record["cases"], strict=True):
        entry["summary"] = _summary(case)
    for overhead, entry in zip(results.overheads, record["overheads"], strict=True):
        entry["summary"] = {"us": overhead.ours.median_ms * 1e3, "holds": overhead.holds}
    return record


def _timings(record: Mapping[str, Any]) -> dict[str, Timing]:
    return {name: Timing(**timing) for name, timing in record.items()}


def case_from(record: Mapping[str, Any]) -> CaseResult:
    """The CaseResult that `dataclasses.asdict` and JSON made a record of."""
    fields = {name: value for name, value in record.items() if name != "summary"}
    target, stock = fields.pop("target"), fields.pop("stock")
    return CaseResult(
        **{**fields, "timings": _timings(fields["timings"]), "graphs": _timings(fields.get("graphs", {}))},
        target=None if target is None else Target(**{**target, "peers": tuple(target["peers"])}),
        stock=None if stock is None else _timings(stock),
    )


def overhead_from(record: Mapping[str, Any]) -> OverheadResult:
    """The OverheadResult that `dataclasses.asdict` and JSON made a record of."""
    fields = {name: value for name, value in record.items() if name != "summary"}
    return OverheadResult(**{**fields, "ours": Timing(**fields["ours"]), "clone": Timing(**fields["clone"])})


def write(results: Results, path: Path) -> None:
    path.write_text(json.dumps(to_record(results), indent=1) + "\n")


def read(path: Path) -> Results:
    """The results in a file that `write` made. OSError or ValueError, naming the file, where it is none."""
    try:
        record = json.loads(path.read_text())
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no JSON file of mmkernels bench: it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file of mmkernels bench: {error}") from None
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError(f"{path} is no JSON file of mmkernels bench: it states no schema")
    if record["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {record['schema']}; this version of mmkernels reads schema {SCHEMA}")
    try:
        return Results(
            device=record["device"],
            allocator=record["allocator"],
            seconds=record["seconds"],
            machine=Machine(**record["machine"]),
            peaks=peaks_from(record["peaks"]),
            cases=tuple(case_from(entry) for entry in record["cases"]),
            overheads=tuple(overhead_from(entry) for entry in record["overheads"]),
            broken=record.get("broken", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON file of mmkernels bench: {type(error).__name__}: {error}") from None


# --- comparison -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Change:
    """One case, or one overhead (dtype "", no ratio), then and now. Overheads are in milliseconds too."""

    name: str
    dtype: str
    before_ms: float
    now_ms: float
    before_ratio: float | None
    now_ratio: float | None

    @property
    def relative(self) -> float:
        """-0.1 where it now takes 10 % less time."""
        return self.now_ms / self.before_ms - 1


@dataclass(frozen=True)
class Comparison:
    """`differences` says what makes the times incomparable; `missing` names the new cases that the earlier run lacks."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    differences: tuple[str, ...]
    before: Machine


def judged_allocator(results: Results) -> str:
    return "stock" if results.allocator == "stock" else "tuned"


def compare(before: Results, now: Results) -> Comparison:
    """The present cases against the same cases of an earlier run."""
    differences = now.machine.differences(before.machine)
    for words, theirs, ours in (
        ("device", before.device, now.device),
        ("allocator", judged_allocator(before), judged_allocator(now)),
    ):
        if theirs != ours:
            differences.append(f"{words}: {theirs} then, {ours} now")
    earlier = {(case.name, case.dtype): case for case in before.cases}
    earlier_overheads = {overhead.name: overhead for overhead in before.overheads}
    changes, missing = [], []
    for case in now.cases:
        old = earlier.get((case.name, case.dtype))
        if old is None:
            missing.append(f"{case.name} {case.dtype}")
        else:
            changes.append(Change(case.name, case.dtype, old.ours.median_ms, case.ours.median_ms, old.ratio, case.ratio))
    for overhead in now.overheads:
        old_overhead = earlier_overheads.get(overhead.name)
        if old_overhead is None:
            missing.append(overhead.name)
        else:
            changes.append(Change(overhead.name, "", old_overhead.ours.median_ms, overhead.ours.median_ms, None, None))
    return Comparison(tuple(changes), tuple(missing), tuple(differences), before.machine)
