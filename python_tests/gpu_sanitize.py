"""Small calls of every card, forward and backward, for compute-sanitizer: python gpu_sanitize.py cuda|triton|cpu [--brief].

`--brief` makes one call of each card, for tools that take long over each access to shared memory. Numbers are drawn on the
CPU and nothing is compared, so that hardly a kernel runs which is not ours; what comes out is looked at elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from gpu_jobs import Options, cards_of
from support import as_tuple, cotangents, differentiable, draw, gradients

from mmkernels.cards.card import Card, Sample

DTYPES = (torch.bfloat16, torch.float32)
# Names of samples that are there where they make sense: tails of tiles, strides, rows that see nothing, empty experts.
TELLING = ("odd sizes", "vector tails", "token slice", "odd offset", "packed, everything", "unused slots", "empty experts")


def samples(card: Card, *, brief: bool) -> Iterator[tuple[Sample, torch.dtype]]:
    yield card.samples[0], DTYPES[0]
    if not brief:
        yield card.samples[0], DTYPES[1]
        yield from ((sample, DTYPES[0]) for sample in card.samples if sample.name in TELLING)


def call(card: Card, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    drawn = draw(sample, dtype, device)
    with torch.no_grad():
        outputs = differentiable(as_tuple(drawn.of(card.function)))
    if card.differentiable:
        gradients(card.function, drawn, cotangents(outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("cuda", "triton", "cpu"))
    parser.add_argument("--brief", action="store_true")
    given = parser.parse_args()
    options = Options(given.backend, torch.device("cpu" if given.backend == "cpu" else "cuda"))
    count = 0
    for card in cards_of(options):
        for sample, dtype in samples(card, brief=given.brief):
            call(card, sample, dtype, options.device)
            count += 1
        if options.device.type == "cuda":
            torch.cuda.synchronize()
        print("called", card.name, flush=True)
    print(f"{count} calls")


if __name__ == "__main__":
    main()
