"""What scripts that time whole models share: malloc's tuned settings, a training step, a file of what is measured so far."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmkernels.bench.machine import this_machine
from mmkernels.bench.supervisor import TUNED
from mmkernels.calls import tensors


def restart_tuned() -> None:
    """Starts this program anew under malloc's tuned settings, unless it runs under them."""
    if any(os.environ.get(name) != value for name, value in TUNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)


def training_step(model: nn.Module, forward: Callable[[], Any]) -> Callable[[], None]:
    """A step of AdamW on the mean squares of whatever floats `forward` gives."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        sum(output.float().square().mean() for output in tensors(forward(), "output").values()).backward()
        optimizer.step()

    return step


class RowFile:
    """A JSON file of measured cases; those that it has stay.

    Args:
        path: the file.
        allocator: "tuned" or "stock", written into a new file.
    """

    def __init__(self, path: Path, allocator: str) -> None:
        self.path = path
        self.record: dict[str, Any] = {"allocator": allocator, "milliseconds": []}
        if path.exists():
            self.record = json.loads(path.read_text())

    def add(self, row: dict[str, Any]) -> None:
        """Writes the case with the machine of this moment, and prints it."""
        self.record["milliseconds"].append(row | {"machine": asdict(this_machine("cpu"))})
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")
        print(row, flush=True)
