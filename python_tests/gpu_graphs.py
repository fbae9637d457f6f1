"""A CUDA graph of a function, and what may not happen while one is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def not_waiting(device: torch.device) -> Iterator[None]:
    """RuntimeError where something inside waits for the GPU, without a word from the GPU itself: a capture that such a call
    breaks off leaves torch's allocator in the middle of it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], list[Any]], device: torch.device) -> tuple[Callable[[], None], list[Any]]:
    """A replay and the results that it overwrites. On the CPU a replay calls the function again, which lets tests of what is
    around a graph run there."""
    if device.type != "cuda":
        results = function()
        return lambda: _overwrite(results, function()), results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # compiles, and lets libraries set themselves up
        with not_waiting(device):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    # What was there after the capture is what memory held: a replay that writes nothing must not look right.
    for result in results:
        if isinstance(result, Tensor):
            result.fill_(float("nan") if result.is_floating_point() else 1)
    return graph.replay, results


def _overwrite(results: list[Any], new: list[Any]) -> None:
    for result, value in zip(results, new, strict=True):
        if isinstance(result, Tensor):
            result.detach().copy_(value.detach())
