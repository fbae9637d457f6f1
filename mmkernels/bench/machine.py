"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import mmkernels
from mmkernels import runtime


@dataclass(frozen=True)
class Machine:
    cpu: str
    isa: str
    threads: int
    gpu: str | None
    torch: str
    python: str
    platform: str
    mmkernels: str
    commit: str | None
    date: str
    load: float  # processes that wanted to run in the minute before

    def differences(self, other: Machine) -> list[str]:
        """What makes times of `other` and of this machine incomparable, in words."""
        fields = {"processor": "cpu", "tier": "isa", "threads": "threads", "GPU": "gpu", "torch": "torch"}
        pairs = ((words, getattr(other, name), getattr(self, name)) for words, name in fields.items())
        return [f"{words}: {theirs} then, {ours} now" for words, theirs, ours in pairs if theirs != ours]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git(*arguments: str) -> str | None:
    folder = Path(mmkernels.__file__).parent
    try:
        done = subprocess.run(("git", *arguments), cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit of the package's source, "-dirty" where tracked files differ; None for an installed copy.

    Git must track the package itself: a copy in an environment inside some other checkout is not of that checkout's commit.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def this_machine(device: str) -> Machine:
    return Machine(
        cpu=cpu_model(),
        isa=runtime.isa(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None,
        torch=torch.__version__,
        python=sys.version.split()[0],
        platform=platform.platform(),
        mmkernels=mmkernels.__version__,
        commit=commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load=round(os.getloadavg()[0], 2),
    )
