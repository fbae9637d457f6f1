"""What one call costs where the kernel itself is nothing: checks, dispatch, autograd's bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from mmkernels.bench.contest import OURS
from mmkernels.bench.measure import Timing, interleave
from mmkernels.cards.card import Card, Overhead

_CALLS: Final = 2000
_MIN_ROUNDS: Final = 9
_MAX_SECONDS: Final = 0.5


@dataclass(frozen=True)
class OverheadResult:
    """Times are those of one call. `clone` is ``x.clone()`` of the same tensor: what the leanest operator of torch costs."""

    family: str
    name: str
    ours: Timing
    clone: Timing
    limit_us: float

    @property
    def holds(self) -> bool:
        return self.ours.median_ms * 1e3 <= self.limit_us


def measure_overhead(card: Card, overhead: Overhead, seconds: float, *, seed: int = 0) -> OverheadResult:
    """The forward call alone, in batches of 2000, interleaved with clones of its first tensor."""
    call = overhead.make()
    x = call.tensors()[0]
    if overhead.grad:
        x.requires_grad_()
    steps = {OURS: partial(overhead.run, *call.args, **call.kwargs), "clone": x.clone}
    times = interleave(steps, min(seconds, _MAX_SECONDS), seed=seed, calls=_CALLS, min_rounds=_MIN_ROUNDS)
    return OverheadResult(card.family, overhead.name, times[OURS], times["clone"], overhead.limit_us)
