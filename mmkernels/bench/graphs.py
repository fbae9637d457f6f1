"""Short calls of a GPU from CUDA graphs: the kernels without what Python and the driver take to launch them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from mmkernels.bench.contest import OURS
from mmkernels.bench.measure import Step, Timing, cuda_clock, interleave

_SHORT_MS: Final = 0.3  # beyond it, launches hide behind the kernels of the call before
_CALLS: Final = 10  # in one graph, so that its own launch is a small part


def is_short(timings: Mapping[str, Timing]) -> bool:
    return min(timing.median_ms for timing in timings.values()) < _SHORT_MS


def replayed(steps: Mapping[str, Step], seconds: float, *, seed: int = 0) -> dict[str, Timing]:
    """Times what can be captured, interleaved, milliseconds a call: for nothing where our own step cannot.

    Run it inside the contest's grad_mode.
    """
    graphs = {name: graph.replay for name, step in steps.items() if (graph := _capture(step)) is not None}
    if OURS not in graphs:
        return {}
    timings = interleave(graphs, seconds, clock=cuda_clock, seed=seed)
    return {name: Timing(t.median_ms / _CALLS, t.q1_ms / _CALLS, t.q3_ms / _CALLS, t.rounds) for name, t in timings.items()}


def _capture(step: Step) -> torch.cuda.CUDAGraph | None:
    """A graph of some calls; None of a step that waits for the GPU, which is asked before: a capture that breaks off leaves
    torch's allocator in the middle of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            step()
            torch.cuda.set_sync_debug_mode("error")
            step()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            step()
    return graph
