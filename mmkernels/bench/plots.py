"""The results as pictures: a bar chart for each family."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from mmkernels.bench.contest import OURS
from mmkernels.bench.results import CaseResult, Results

_LOG_FROM: Final = 12.0  # the shortest bar of a linear scale would be a sliver
_OURS_COLOUR: Final = "#c0392b"
_PEER_COLOURS: Final = ("#34608d", "#e0a030", "#5b9f6b", "#8e7cc3", "#7f8c8d", "#46b1c9", "#a0703c", "#2f3e46")
_BAR_INCHES: Final = 0.2
_GROUP_GAP: Final = 0.8  # in bars


def require_matplotlib() -> None:
    """ImportError that says what to install, before anything was measured in vain."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'mmkernels[bench]'") from None


def _figure(title: str, cases: Sequence[CaseResult]) -> Any:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for case in cases for name in case.timings))
    peers = [name for name in names if name != OURS]
    colours = {OURS: _OURS_COLOUR, **dict(zip(peers, cycle(_PEER_COLOURS)))}
    bars = sum(len(case.timings) for case in cases)
    height = (bars + _GROUP_GAP * len(cases)) * _BAR_INCHES + 1.6
    figure = Figure(figsize=(11, max(3.0, height)), layout="constrained")
    axes = figure.add_subplot()
    top, ticks, labelled = 0.0, [], set()
    for case in cases:
        for index, (name, timing) in enumerate(case.timings.items()):
            label = None if name in labelled else name
            labelled.add(name)
            axes.barh(top + index, timing.median_ms, 0.9, color=colours[name], label=label)
            axes.annotate(
                f"{timing.median_ms:.3g}",
                (timing.median_ms, top + index),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        last = top + len(case.timings) - 1
        label = None if "floor" in labelled else "floor"
        labelled.add("floor")
        axes.plot([case.floor_ms] * 2, [top - 0.6, last + 0.6], color="black", linewidth=1.6, linestyle="--", label=label)
        ticks.append(((top + last) / 2, f"{case.name}\n{case.dtype}"))
        top = last + 1 + _GROUP_GAP
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(top - _GROUP_GAP - 0.2, -0.8)
    shown = [
        value for case in cases for value in (case.floor_ms, *(t.median_ms for t in case.timings.values())) if value > 0
    ]
    if max(shown) / min(shown) > _LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(min(shown) * 0.7, max(shown) * 1.5)
    else:
        axes.set_xlim(0, max(shown) * 1.1)
    axes.set_xlabel("milliseconds (median; less is better)")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(6, len(labelled)), fontsize=8, frameon=False)
    return figure


def write_plots(results: Results, folder: Path) -> list[Path]:
    """One PNG for each family, named after the family and the device; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = results.machine
    paths = []
    for family in dict.fromkeys(case.family for case in results.cases):
        cases = [case for case in results.cases if case.family == family]
        title = (
            f"{family}: {machine.gpu or f'{machine.cpu}, {machine.isa}, {machine.threads} threads'}, torch {machine.torch}"
        )
        path = folder / f"{family}_{results.device}.png"
        _figure(title, cases).savefig(path, dpi=120)
        paths.append(path)
    return paths
