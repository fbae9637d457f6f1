"""What a swap gained, and where the time goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmkernels.bench.measure import Timing, clock_of, interleave
from mmkernels.calls import call, tensors

_SHOWN = 8


@dataclass(frozen=True)
class OperatorTime:
    """An operator's own time in one forward pass.

    Attributes:
        name: as torch's profiler has it: "aten::addmm", "mmkernels::linear".
        ms: milliseconds, without what it calls.
        calls: how often it ran.
    """

    name: str
    ms: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """What `report.profile` found.

    Attributes:
        before, after: the times of a forward pass.
        operators_before, operators_after: where they went, longest first, of one pass under torch's profiler.
    """

    before: Timing
    after: Timing
    operators_before: tuple[OperatorTime, ...]
    operators_after: tuple[OperatorTime, ...]

    @property
    def ratio(self) -> float:
        """How many times faster the swapped model is."""
        return self.before.median_ms / self.after.median_ms

    def __str__(self) -> str:
        lines = [
            f"{self.before.median_ms:.2f} ms before, {self.after.median_ms:.2f} ms after: {self.ratio:.2f} times as fast"
        ]
        for title, operators in (("before", self.operators_before), ("after", self.operators_after)):
            total = sum(operator.ms for operator in operators)
            lines.append(f"  {title}: ms of its own, part, calls, operator")
            lines += [
                f"  {operator.ms:10.3f} {operator.ms / max(total, 1e-12):6.1%} {operator.calls:5} {operator.name}"
                for operator in operators[:_SHOWN]
            ]
        return "\n".join(lines)


def measure_profile(before: nn.Module, after: nn.Module, inputs: Any, seconds: float) -> Profile:
    found = [*before.parameters(), *tensors(inputs, "").values()]
    device = str(found[0].device) if found else "cpu"
    with torch.inference_mode():
        timings = interleave(
            {"before": lambda: call(before, inputs), "after": lambda: call(after, inputs)},
            seconds,
            clock=clock_of(device),
        )
        operators = [_operators(model, inputs, device) for model in (before, after)]
    return Profile(timings["before"], timings["after"], *operators)


def _operators(model: nn.Module, inputs: Any, device: str) -> tuple[OperatorTime, ...]:
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        call(model, inputs)
    found = [
        OperatorTime(event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3, event.count)
        for event in profiler.key_averages()
    ]
    return tuple(sorted((operator for operator in found if operator.ms > 0), key=lambda operator: -operator.ms))
