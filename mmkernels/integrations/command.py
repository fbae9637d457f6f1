"""`mmkernels swap`: what the kernels would do in a model, whether the numbers hold, and what it gains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmkernels.arguments import device_of, dtype_of
from mmkernels.inspection import machine_line
from mmkernels.integrations.named import load_model, random_inputs
from mmkernels.integrations.swap import swap


def run(
    *,
    model: str,
    weights: Path | None,
    batch: int,
    dtype: str,
    device: str,
    int8: bool,
    only: Sequence[str] | None,
    skip: Sequence[str] | None,
    every: bool,
    verify: bool,
    seconds: float,
    json_path: Path | None,
) -> bool:
    """Loads a model, swaps it, and prints the report, the errors, the share of the kernels and the times.

    Args:
        model, weights: as :func:`mmkernels.integrations.named.load_model`.
        batch: at least 1. dtype: float32, bfloat16 or float16. device: cpu or cuda.
        int8, only, skip: as dtype=torch.int8, only and skip of :func:`mmkernels.swap`.
        every: print every module instead of a summary.
        verify: compare outputs and gradients with float64.
        seconds: to spend on timing; 0 times nothing.
        json_path: a file for the whole report.

    Returns:
        Whether the numbers hold (True where they are not verified).

    Raises:
        ValueError, OSError, ImportError: an argument is none of these, or the model cannot be made.
    """
    if batch < 1:
        raise ValueError(f"batch: expected 1 or more, got {batch}")
    target, number = device_of(device), dtype_of(dtype)
    console = Console()

    def say(text: Any) -> None:
        console.print(str(text), highlight=False, markup=False, soft_wrap=True)

    source, network = load_model(model, weights=weights)
    network = network.to(target, number)
    inputs = {name: value.to(target) for name, value in random_inputs(network, batch, number).items()}
    say(machine_line(target))
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    name, size = model.removeprefix(f"{source}:"), sum(parameter.numel() for parameter in network.parameters())
    say(f"{source} {name}, {size / 1e6:.1f} M parameters, {dtype}, {shapes}")
    report = swap(network, only=only, skip=skip, dtype=torch.int8 if int8 else None)
    for entry in report.entries if every else ():
        say(f"  {entry.status:>15} {entry.name or '(the model)'} {entry.cls}: {entry.runs or entry.reason}")
    say(report)
    arguments = tuple(inputs.values()) if source == "timm" else inputs
    found = report.verify(arguments) if verify else None
    covered = report.coverage(arguments)
    times = report.profile(arguments, seconds=seconds) if seconds > 0 else None
    for part in (found, covered, times):
        if part is not None:
            say(part)
    if json_path is not None:
        result = {"model": model, "dtype": dtype, "batch": batch, "machine": machine_line(target)}
        result |= report.as_data(found, covered, times)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return found is None or found.within_rule
