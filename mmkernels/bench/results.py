"""The results of a run: what they say, their JSON file, and the comparison with an earlier one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: `at_most` ratios are ours over the best peer's time, the others its inverse."""

    ratio: float
    limit: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit


@dataclass(frozen=True)
class CaseResult:
    """One case with one dtype. `timings` are those that are judged; `stock` repeats them under the stock allocator."""

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

    @property
    def ours(self) -> Timing:
        return self.timings[OURS]

    @property
    def best_peer(self) -> str | None:
        """The fastest other contestant; None where there is none."""
        peers = [name for name in self.timings if name != OURS]
        return min(peers, key=lambda name: self.timings[name].median_ms, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the best peer."""
        return None if self.best_peer is None else self.timings[self.best_peer].median_ms / self.ours.median_ms

    @property
    def over_floor(self) -> float | None:
        return self.ours.median_ms / self.floor_ms if self.floor_ms > 0 else None

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
        """None without a target, and where a contestant that it names failed: the others would be a weaker test."""
        if self.target is None:
            return None
        named = [_named(peer, (*self.timings, *self.failed), self.name) for peer in self.target.peers]
        contestants = [name for names in named for name in names]
        if any(name in self.failed for name in contestants):
            return None
        best = min(self.timings[name].median_ms for name in contestants)
        ratio = self.ours.median_ms / best if self.target.at_most else best / self.ours.median_ms
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
        **{**fields, "timings": _timings(fields["timings"])},
        target=None if target is None else Target(tuple(target["peers"]), target["ratio"], target["at_most"]),
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
