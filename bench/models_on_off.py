"""The models of mmkernels.models with their kernels on and off, interleaved in one run.

`python bench/models_on_off.py FILE [--model NAME ...]` adds the medians of each case to FILE as soon as it has them; it runs
under malloc's settings of `mmkernels bench --allocator tuned`, unless --stock is given. Two threads, random weights, random
inputs, eval mode without gradients."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import mmkernels as mk
from mmkernels.bench.measure import interleave
from mmkernels.bench.rows import RowFile, restart_tuned

Inputs = tuple[Tensor, ...]


def floats(*shape: int) -> Callable[[int, torch.dtype], Inputs]:
    """One floating input of this shape behind the batch."""
    return lambda batch, dtype: (torch.randn(batch, *shape).to(dtype),)


# name of create_model -> the inputs of a batch in a dtype, and the batch
MODELS: dict[str, tuple[Callable[[int, torch.dtype], Inputs], int]] = {
    "crossvit_15": (floats(3, 240, 240), 8),
    "crossvit_18": (floats(3, 240, 240), 8),
    "tnt_s": (floats(3, 224, 224), 8),
    "swin_unetr_encoder": (floats(4, 96, 96, 96), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", action="append", choices=MODELS, help="all of them if not given; may be given again")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="both if not given")
    parser.add_argument("--batch", type=int, help="instead of the model's own")
    parser.add_argument("--stock", action="store_true", help="malloc as it comes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case")
    arguments = parser.parse_args()
    if not arguments.stock:
        restart_tuned()
    torch.set_num_threads(2)
    rows = RowFile(arguments.file, "stock" if arguments.stock else "tuned")
    for name in arguments.model or MODELS:
        make, own_batch = MODELS[name]
        batch = arguments.batch or own_batch
        for dtype in arguments.dtype or ("float32", "bfloat16"):
            torch.manual_seed(0)
            inputs = make(batch, getattr(torch, dtype))
            # A model for each: a switch between two calls would be timed too.
            models = {kind: mk.models.create_model(name, kernels=kind == "on") for kind in ("on", "off")}
            steps = {kind: partial(model.eval().to(getattr(torch, dtype)), *inputs) for kind, model in models.items()}
            with torch.no_grad():
                timings = interleave(steps, arguments.seconds)
            row = {"model": name, "dtype": dtype, "batch": batch}
            row |= {"times_faster": timings["off"].median_ms / timings["on"].median_ms}
            rows.add(row | {kind: asdict(timing) for kind, timing in timings.items()})


if __name__ == "__main__":
    main()
