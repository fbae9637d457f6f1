"""From which length on EcoFormer's attention is faster than softmax attention: `python bench/crossover.py FOLDER` writes
crossover.json and crossover.png there. Both are this package's, float32, [8, 1, N, 32], 16 bits, 25 supports, two threads,
medians of interleaved rounds. Under malloc's settings of `mmkernels bench --allocator tuned` it shows the kernels alone."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime

matplotlib.use("agg")
from matplotlib import pyplot

LENGTHS = (8, 16, 32, 49, 64, 96, 128, 196, 256, 392, 512, 784, 1024, 1568, 2048, 3136)
CHANNELS, SUPPORTS, BITS = 32, 25, 16


def medians(contestants: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in rounds of all."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 15:
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each length")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    supports = torch.nn.functional.normalize(torch.randn(1, SUPPORTS, CHANNELS), dim=-1)
    projection, mean = torch.randn(1, BITS, SUPPORTS), torch.rand(1, SUPPORTS)
    rows = []
    for length in LENGTHS:
        qk, v = torch.randn(8, 1, length, CHANNELS), torch.randn(8, 1, length, CHANNELS)
        contestants = {
            "softmax": lambda qk=qk, v=v: mk.attention(qk, qk, v),
            "ecoformer": lambda qk=qk, v=v: mk.ecoformer_attention(qk, v, supports, projection, mean),
        }
        with torch.inference_mode():
            rows.append({"length": length, **medians(contestants, arguments.seconds)})
        print(rows[-1], flush=True)
    crossover = next((row["length"] for row in rows if row["ecoformer"] < row["softmax"]), None)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    record = {"isa": runtime.isa(), "torch": torch.__version__, "crossover": crossover, "milliseconds": rows}
    (arguments.folder / "crossover.json").write_text(json.dumps(record, indent=1) + "\n")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, label in (("softmax", "mk.attention"), ("ecoformer", "mk.ecoformer_attention")):
        axes.loglog(LENGTHS, [row[name] for row in rows], marker="o", label=label)
    axes.set(
        xlabel="tokens", ylabel="ms", title=f"[8, 1, N, {CHANNELS}] float32: EcoFormer is faster from N = {crossover} on"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.folder / "crossover.png", dpi=120)


if __name__ == "__main__":
    main()
