"""Timing several contestants side by side.

Clocks drift by 15 to 30 % within minutes, so only what was interleaved is compared; and a fixed order would give each
contestant the cache that always the same other one left behind, so every round has an order of its own.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final

import torch

Step = Callable[[], object]
Clock = Callable[[Step, int], float]

_MIN_ROUNDS: Final = 15
_MIN_LONG_ROUNDS: Final = 5
_LONG_ROUND_MS: Final = 500.0
# One reading of the clock covers at least this long, so that the clock itself is below 1 % of it.
_MIN_READING_MS: Final = 0.05
# On a GPU it also covers the time from a call to the kernel's start, which is a call's own only where no other is before it.
_MIN_CUDA_READING_MS: Final = 1.0
_WARM_UPS: Final = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over the rounds, and the quartiles as its spread."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    rounds: int

    @property
    def iqr_ms(self) -> float:
        return self.q3_ms - self.q1_ms


def timing_of(readings: list[float]) -> Timing:
    """The Timing of at least two readings in milliseconds."""
    q1, median, q3 = statistics.quantiles(readings, n=4, method="inclusive")
    return Timing(median, q1, q3, len(readings))


def wall_clock(step: Step, calls: int) -> float:
    """Milliseconds a call on the CPU. What a call returns is freed within the time, as it is for whoever makes the call."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) * 1e3 / calls


def cuda_clock(step: Step, calls: int) -> float:
    """Milliseconds a call between two events of the current CUDA stream."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / calls


def clock_of(device: str) -> Clock:
    return cuda_clock if torch.device(device).type == "cuda" else wall_clock


def _min_reading_ms(clock: Clock) -> float:
    return _MIN_CUDA_READING_MS if clock is cuda_clock else _MIN_READING_MS


def interleave(
    steps: Mapping[str, Step],
    seconds: float,
    *,
    clock: Clock = wall_clock,
    seed: int = 0,
    calls: int | None = None,
    min_rounds: int | None = None,
) -> dict[str, Timing]:
    """Times every step once a round, in an order shuffled anew each round, for `seconds`.

    Args:
        steps: what to time, by name; each is warmed up first, outside the time.
        calls: calls a reading; by default as many as make the shortest step long enough to read, the same for all steps,
            because repeated calls find the cache warmer.
        min_rounds: rounds that happen even beyond `seconds`; by default 15, or 5 where a round takes over half a second.
    """
    for step in steps.values():
        for _ in range(_WARM_UPS):
            step()
    once = [clock(step, 1) for step in steps.values()]
    if calls is None:
        calls = max(1, ceil(_min_reading_ms(clock) / max(min(once), 1e-6)))
    if min_rounds is None:
        min_rounds = _MIN_LONG_ROUNDS if sum(once) * calls > _LONG_ROUND_MS else _MIN_ROUNDS
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    readings: dict[str, list[float]] = {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < min_rounds or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                readings[name].append(clock(steps[name], calls))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: timing_of(values) for name, values in readings.items()}
