"""The results as tables for a terminal or a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mmkernels.bench.contest import OURS
from mmkernels.bench.measure import Timing
from mmkernels.bench.results import CaseResult, Comparison, Results

_PLAIN_WIDTH: Final = 160
_SHORT_DTYPES: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def make_console() -> Console:
    """The terminal's own width; 160 columns and no colours where stdout is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def _short(dtype: str) -> str:
    return _SHORT_DTYPES.get(dtype, dtype)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{_number(value)}x"


def _median(timing: Timing | None) -> str:
    return "" if timing is None else _number(timing.median_ms)


def _spread(timing: Timing) -> str:
    return f"{_number(timing.median_ms)} ± {_number(timing.iqr_ms)}"


def _table(title: str, columns: Iterable[tuple[str, bool]]) -> Table:
    """`columns`: heading, and whether it holds numbers. The first one folds where the others leave no room."""
    table = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, (heading, numbers) in enumerate(columns):
        table.add_column(escape(heading), justify="right" if numbers else "left", overflow="fold", no_wrap=index > 0)
    return table


def _add(table: Table, cells: Sequence[str | Text]) -> None:
    table.add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in cells))


def _rows(cases: Iterable[CaseResult], table: Table) -> Iterator[tuple[CaseResult, str]]:
    """The cases with what is left of their names under a row of its own for the part before the first dot."""
    heading = ""
    for case in cases:
        head, dot, rest = case.name.partition(".")
        if dot and head != heading:
            _add(table, [Text(head, style="bold")])
        heading = head if dot else ""
        yield case, f" {rest}" if dot else case.name


# --- header -----------------------------------------------------------------------------------------------------------
def _header(results: Results) -> list[str]:
    machine = results.machine
    settings = {
        "tuned": "tuned (malloc keeps its pages: see mmkernels.bench.supervisor.TUNED)",
        "stock": "stock; targets and ratios are meant for the tuned one",
        "both": "tuned, which is judged, and stock beside it",
    }
    copies = ", ".join(f"{_number(gbps)} ({size >> 20} MiB)" for size, gbps in results.peaks.copy_gbps)
    arithmetic = ", ".join(f"{_short(name)} {gflops:.0f}" for name, gflops in results.peaks.gflops.items())
    return [
        f"mmkernels {machine.mmkernels}{f' at {machine.commit}' if machine.commit else ''}, {machine.date}",
        f"machine: {f'{machine.gpu}, ' if machine.gpu else ''}{machine.cpu}, tier {machine.isa}, {machine.threads} threads; "
        f"load before the run {machine.load:g}",
        f"software: torch {machine.torch}, Python {machine.python}, {machine.platform}",
        f"allocator: {settings[results.allocator] if results.device == 'cpu' else 'does not matter on CUDA'}; "
        f"{results.seconds:g} s a case, interleaved in shuffled order; medians ± interquartile range",
        f"peaks: {arithmetic} GFLOP/s; copies in GB/s read and written, by bytes moved: {copies}",
    ]


# --- tables -----------------------------------------------------------------------------------------------------------
def _verdict(case: CaseResult) -> Text:
    verdict = case.verdict
    if verdict is None:
        return Text("not judged" if case.target else "")
    sign, word = "≤" if verdict.at_most else "≥", "met" if verdict.met else "MISSED"
    unit = {"peers": "", "floor": " of floor"}.get(verdict.of, f" {verdict.of}")
    ratio = f"{verdict.ratio:.0f}" if verdict.ratio >= 100 else f"{verdict.ratio:.2f}"
    text = f"{ratio}{sign}{verdict.limit:g}{unit} {word}{'?' if case.disturbed else ''}"
    return Text(text, style="green" if verdict.met else "bold red")


def _main(results: Results) -> Table:
    both, rated = results.allocator == "both", results.device == "cuda"
    columns = [
        ("case", False),
        ("dtype", False),
        ("kernel", False),
        ("ours, ms", True),
        ("best peer, ms", True),
        ("faster", True),
        *((("TFLOP/s", True), ("GB/s", True)) if rated else ()),
        ("floor", True),
        ("/floor", True),
        ("target", False),
        *((("stock", True),) if both else ()),
    ]
    table = _table("Times" + ("; g: of a CUDA graph, where launching takes most of a call" if rated else ""), columns)
    for case, name in _rows(results.cases, table):
        peer = case.best_peer
        cells: list[str | Text] = [
            name,
            _short(case.dtype),
            case.kernel,
            _spread(case.judged[OURS]) + (" g" if case.launch_bound else ""),
            "" if peer is None else f"{peer} {_median(case.judged[peer])}",
            _times(case.ratio),
            *(_rates(case, case.judged[OURS]) if rated else ()),
            _number(case.floor_ms),
            _times(case.over_floor),
            _verdict(case),
        ]
        stock = _median((case.stock or {}).get(OURS)) + ("?" if case.stock_disturbed else "")
        _add(table, [*cells, stock] if both else cells)
    return table


def _rates(case: CaseResult, timing: Timing) -> tuple[str, str]:
    rates = case.rates(timing)
    return _number(rates.tflops) if case.flops else "", _number(rates.gbps)


def _graphs_and_rates(family: str, cases: Sequence[CaseResult]) -> Iterator[Table]:
    """What only a GPU has: replays of short calls, and every contestant's rates beside the ceilings."""
    names = list(dict.fromkeys(name for case in cases for name in case.timings))
    columns = [("case", False), ("dtype", False), *((name, True) for name in names)]
    short = [case for case in cases if case.graphs]
    if short:
        table = _table(f"Short calls of {family} from CUDA graphs: median ms", columns)
        for case, shown in _rows(short, table):
            _add(table, [shown, _short(case.dtype), *(_median(case.graphs.get(name)) for name in names)])
        yield table
    table = _table(f"Rates of {family}: TFLOP/s, GB/s, part of what the ceilings allow", columns)
    for case, shown in _rows(cases, table):
        cells = []
        for name in names:
            timing = case.judged.get(name)
            rates = () if timing is None else (*_rates(case, timing), f"{case.rates(timing).of_ceiling:.0%}")
            cells.append(" ".join(text for text in rates if text))
        _add(table, [shown, _short(case.dtype), *cells])
    yield table


def _contestants(family: str, cases: Sequence[CaseResult], *, stock: bool) -> Table:
    names = list(dict.fromkeys(name for case in cases for name in (*case.timings, *case.failed)))
    columns: list[tuple[str, bool]] = [("case", False), ("dtype", False), *((name, True) for name in names)]
    if stock:
        table = _table(f"All contestants of {family} under the stock allocator: median ms", columns)
    else:
        judging = [("rounds", True), ("judged against", False)]
        table = _table(f"All contestants of {family}: median ms", [*columns, *judging])
    for case, shown in _rows(cases, table):
        times = (case.stock or {}) if stock else case.timings
        cells = ["failed" if name in case.failed else _median(times.get(name)) for name in names]
        judged = [str(case.ours.rounds), ", ".join(case.target.peers) if case.target else ""]
        _add(table, [shown, _short(case.dtype), *cells, *([] if stock else judged)])
    return table


def _overheads(results: Results) -> Table:
    columns = [("overhead of one call", False), ("ours, µs", True), ("x.clone(), µs", True), ("limit, µs", True)]
    table = _table("Overheads", [*columns, ("holds", False), ("batches of 2000", True)])
    for overhead in results.overheads:
        ours, clone = (f"{t.median_ms * 1e3:.2f} ± {t.iqr_ms * 1e3:.2f}" for t in (overhead.ours, overhead.clone))
        holds = Text("yes", style="green") if overhead.holds else Text("NO", style="bold red")
        _add(table, [overhead.name, ours, clone, f"{overhead.limit_us:g}", holds, str(overhead.ours.rounds)])
    return table


def _changes(comparison: Comparison) -> Table:
    before = comparison.before
    title = f"Against the run of {before.date}{f' at {before.commit}' if before.commit else ''}"
    columns = [("case", False), ("dtype", False), ("ms then", True), ("now", True), ("change", True)]
    table = _table(title, [*columns, ("faster than best peer then", True), ("now", True)])
    for change in comparison.changes:
        times = (f"{_number(ms)}" if change.dtype else f"{ms * 1e3:.2f} µs" for ms in (change.before_ms, change.now_ms))
        ratios = (_times(change.before_ratio), _times(change.now_ratio))
        _add(table, [change.name, _short(change.dtype), *times, f"{change.relative:+.1%}", *ratios])
    return table


def show(results: Results, comparison: Comparison | None, console: Console) -> None:
    """Prints the header, the main table, all contestants by family, the overheads and the comparison."""

    def line(text: str, **style: Any) -> None:
        console.print(text, markup=False, soft_wrap=True, **style)

    for text in _header(results):
        line(text)
    if results.cases:
        console.print()
        console.print(_main(results))
        for family in dict.fromkeys(case.family for case in results.cases):
            cases = [case for case in results.cases if case.family == family]
            for stock in (False, True) if results.allocator == "both" else (False,):
                console.print()
                console.print(_contestants(family, cases, stock=stock))
            for extra in _graphs_and_rates(family, cases) if results.device == "cuda" else ():
                console.print()
                console.print(extra)
        disturbed = sum(case.disturbed or case.stock_disturbed for case in results.cases)
        if disturbed:
            console.print()
            share = f"{disturbed} of {len(results.cases)} cases"
            line(f"Other programs disturbed {share} (marked with ?): measure again on an idle machine.", style="bold red")
    for name, error in results.broken.items():
        line(f"BROKEN: {name}: {error}", style="bold red")
    for case in results.cases:
        for name, error in case.failed.items():
            line(f"failed: {case.name} {case.dtype}, {name}: {error}", style="bold red")
    if results.overheads:
        console.print()
        console.print(_overheads(results))
    if comparison is not None:
        console.print()
        for difference in comparison.differences:
            line(f"NOT COMPARABLE, {difference}", style="bold red")
        if comparison.missing:
            line(f"not in the earlier run: {', '.join(comparison.missing)}")
        console.print(_changes(comparison))
