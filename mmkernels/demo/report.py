"""The report of a demo run, as data, as Markdown, as JSON and as tables on a terminal."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmkernels.demo.measure import Comparison, OutputError, quartiles
from mmkernels.demo.video import Clip

NOTE = (
    "The weights are random and the words are hashed to ids, because nothing is downloaded: what the model says of this "
    "video means nothing. The times, and how close two computations of the same model come, do not depend on that."
)

_TIME_HEAD = ("", "plain torch, ms", "kernels, ms", "ratio")
_ERROR_HEAD = ("output", "max value", "kernels", "plain", "between", "allowed", "passes")


@dataclass(frozen=True)
class Report:
    """All that a run found."""

    machine: str
    model: str
    parameters: int
    blocks: int
    dtype: str
    text: str
    clip: Clip
    times: tuple[Comparison, Comparison]
    """The whole model, then one block's roll and LayerNorm alone."""
    errors: Sequence[OutputError]
    kernels: Sequence[tuple[str, str]]
    """(op, kernel) pairs of one forward pass."""

    @property
    def share(self) -> float:
        """The part of the plain model's time that its rolls and LayerNorms before attention take."""
        model, norm = self.times
        return self.blocks * norm.plain_median / model.plain_median

    def time_rows(self) -> list[tuple[str, ...]]:
        return [(row.name, _timing(row.plain), _timing(row.kernels), f"{row.ratio:.2f}x") for row in self.times]

    def error_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                f"{row.largest:.3g}",
                *(f"{value:.1e}" for value in (row.kernels, row.plain, row.between, row.allowed)),
                "yes" if row.passes else "NO",
            )
            for row in self.errors
        ]

    def kernel_lines(self) -> list[str]:
        counts = Counter(self.kernels)
        return [f"mk.{op}: {kernel}, {count} calls in a forward pass" for (op, kernel), count in counts.items()]

    def time_lines(self) -> list[str]:
        """What to make of the times."""
        noise = [
            f"{row.name}: the quartiles overlap, so the ratio is within the noise." for row in self.times if not row.differs
        ]
        share = (
            f"The {self.blocks} rolls with their LayerNorms are about {self.share:.1%} of the plain model's time; most of "
            "the rest are products and attention, which have kernels too."
        )
        busy = [
            f"{row.name}: torch's threads got only {row.occupancy:.0%} of the processor time they could use. The "
            "machine was busy or kept them on one core: do not trust these times. OMP_PROC_BIND=true keeps threads apart."
            for row in self.times
            if row.starved
        ]
        return [*noise, share, *busy]


def _timing(samples: Sequence[float]) -> str:
    values = (1e3 * seconds for seconds in (statistics.median(samples), *quartiles(samples)))
    median, low, high = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{median} ({low} to {high})"


# --- files ------------------------------------------------------------------------------------------------------------
def write_markdown(path: Path, report: Report) -> None:
    """`frames.png` is expected beside it."""
    clip = report.clip
    frames = ", ".join(f"{index} ({second:.2f} s)" for index, second in zip(clip.indices, clip.seconds, strict=True))
    rounds = [len(row.plain) for row in report.times]
    parts = [
        "# All-in-one with and without the kernels",
        report.machine,
        f"Model: {report.model}, {report.parameters / 1e6:.1f} M parameters, {report.dtype}, batch 1. "
        f'Video: {clip.name}, {clip.length} frames, of which {frames}. Sentence: "{report.text}".',
        NOTE,
        "## Times",
        f"Medians (lower to upper quartile) of {rounds[0]} rounds of the model and {rounds[1]} of the op; in each round "
        "plain torch and the kernels take turns, in random order. The ratio says how many times faster the kernels are.",
        _markdown_table(_TIME_HEAD, report.time_rows()),
        "\n".join(f"- {line}" for line in report.time_lines()),
        "## Largest errors",
        "Of the model with kernels and of plain torch, against plain torch in float64; and between the two. "
        "The kernels are allowed twice plain torch's own error, plus 2 eps of the largest value.",
        _markdown_table(_ERROR_HEAD, report.error_rows()),
        "## Kernels that ran",
        "\n".join(f"- {line}" for line in report.kernel_lines()),
        "## What rolls",
        "Before every block the marked patches' tokens come from the neighbouring frame; the last frame is the first one's "
        "previous one.",
        "![The sampled frames, and the frames after the roll](frames.png)",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def write_json(path: Path, report: Report) -> None:
    """The numbers of the Markdown report; times in seconds."""
    clip = report.clip
    data: dict[str, Any] = {
        "machine": report.machine,
        "model": {"name": report.model, "parameters": report.parameters, "dtype": report.dtype},
        "note": NOTE,
        "text": report.text,
        "video": {"name": clip.name, "length": clip.length, "indices": clip.indices, "seconds": clip.seconds},
        "times": [
            {
                **asdict(row),
                "plain_median": row.plain_median,
                "kernels_median": row.kernels_median,
                "ratio": row.ratio,
                "differs": row.differs,
            }
            for row in report.times
        ],
        "share_of_model": report.share,
        "errors": [{**asdict(row), "passes": row.passes} for row in report.errors],
        "kernels": [{"op": op, "kernel": kernel, "calls": count} for (op, kernel), count in Counter(report.kernels).items()],
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# --- terminal ---------------------------------------------------------------------------------------------------------
def print_tables(console: Console, report: Report) -> None:
    """Times and errors."""
    for title, head, rows in (
        (f"{report.model}, {report.dtype}: median times (quartiles)", _TIME_HEAD, report.time_rows()),
        ("largest errors against float64", _ERROR_HEAD, report.error_rows()),
    ):
        table = Table(title=title)
        for column, name in enumerate(head):
            table.add_column(name, justify="right" if column else "left", no_wrap=column > 0)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in (*report.time_lines(), *report.kernel_lines(), NOTE):
        console.print(line, highlight=False, markup=False)
