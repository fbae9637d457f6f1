"""Tests in several processes of one gloo group."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT_S = 60.0


def _work(rank: int, size: int, rendezvous: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # Whoever waits for a process that has failed gives up before the test does.
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT_S / 2)
    )
    try:
        function(rank, size, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_in_processes(size: int, folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """function(rank, size, *arguments) in `size` processes; its first error is raised, and a hang is ended."""
    mp.set_forkserver_preload(["mmkernels.nn", "torch.distributed", "pytest"])  # imported once, not by each process
    context = mp.start_processes(
        _work,
        (size, str(folder / "rendezvous"), function, arguments),
        nprocs=size,
        join=False,
        daemon=True,
        start_method="forkserver",
    )
    deadline = time.monotonic() + LIMIT_S
    try:
        while not context.join(timeout=0.1):
            assert time.monotonic() < deadline, f"the processes did not end in {LIMIT_S} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
