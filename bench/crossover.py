"""From which length on EcoFormer's attention is faster than softmax attention: `python bench/crossover.py FOLDER` writes
crossover.json and crossover.png there. Both are this package's, float32, [8, 1, N, 32], 16 bits, 25 supports, two threads,
medians of interleaved rounds. Under malloc's settings of `mmkernels bench --allocator tuned` it shows the kernels alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch

import mmkernels as mk
from mmkernels.bench.machine import this_machine
from mmkernels.bench.measure import interleave

matplotlib.use("agg")
from matplotlib import pyplot

LENGTHS = (8, 16, 32, 49, 64, 96, 128, 196, 256, 392, 512, 784, 1024, 1568, 2048, 3136)
CHANNELS, SUPPORTS, BITS = 32, 25, 16


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
            timings = interleave(contestants, arguments.seconds)
        rows.append({"length": length, **{name: timing.median_ms for name, timing in timings.items()}})
        print(rows[-1], flush=True)
    crossover = next((row["length"] for row in rows if row["ecoformer"] < row["softmax"]), None)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": asdict(this_machine("cpu")), "crossover": crossover, "milliseconds": rows}
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
