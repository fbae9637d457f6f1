"""What scripts that time whole models share: malloc's tuned settings, and a file that has each case once it is measured."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmkernels.bench.machine import this_machine
from mmkernels.bench.supervisor import TUNED


def restart_tuned() -> None:
    """Starts this program anew under malloc's tuned settings, unless it runs under them."""
    if any(os.environ.get(name) != value for name, value in TUNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)


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
