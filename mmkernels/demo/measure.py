"""What the demo measures: errors against float64, and times side by side."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.models.all_in_one import AllInOne, AllInOneOutput
from mmkernels.nn import TokenRollLayerNorm

Inputs = tuple[Tensor, Tensor, Tensor]
"""(text_ids, text_mask, video), as the model's forward takes them."""

# One sample of a short operation spans at least this long, in seconds, so that the clock's own cost vanishes.
_SHORTEST_SAMPLE = 5e-3

# Threads that wait for each other spin, so a process that has its processors to itself comes close to 1. One that shares
# them, or whose two threads the system keeps on one core, is several times slower, and not evenly so.
_LEAST_OCCUPANCY = 0.7


@dataclass(frozen=True)
class OutputError:
    """The largest errors of one output against float64."""

    name: str
    largest: float
    """max |float64's output|"""
    kernels: float
    plain: float
    between: float
    """max |kernels - plain torch|"""
    allowed: float
    """The rule: twice plain torch's own error, plus 2 eps of the dtype times `largest`."""

    @property
    def passes(self) -> bool:
        return self.kernels <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """Times of one thing with plain torch and with the kernels, in seconds, one of each a round."""

    name: str
    plain: tuple[float, ...]
    kernels: tuple[float, ...]
    occupancy: float | None = None
    """On the CPU: the processor time that the process got, over the wall time and torch's threads."""

    @property
    def starved(self) -> bool:
        """Whether torch's threads waited for a processor, so that the times say more of the machine than of the code."""
        return self.occupancy is not None and self.occupancy < _LEAST_OCCUPANCY

    @property
    def plain_median(self) -> float:
        return statistics.median(self.plain)

    @property
    def kernels_median(self) -> float:
        return statistics.median(self.kernels)

    @property
    def ratio(self) -> float:
        """How many times faster the kernels are."""
        return self.plain_median / self.kernels_median

    @property
    def differs(self) -> bool:
        """Whether the two lie apart by more than their own spread: the quartiles do not overlap."""
        (plain_low, plain_high), (low, high) = quartiles(self.plain), quartiles(self.kernels)
        return plain_low > high or low > plain_high


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """(lower, upper)"""
    low, high = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return low, high


def output_errors(oracle: AllInOneOutput, kernels: AllInOneOutput, plain: AllInOneOutput) -> list[OutputError]:
    """One row an output; `oracle` is in float64, the other two in the dtype measured."""
    rows = []
    for name, exact, ours, theirs in zip(AllInOneOutput._fields, oracle, kernels, plain, strict=True):

        def error(got: Tensor, exact: Tensor = exact) -> float:
            return float((got.double() - exact).abs().max())

        largest = float(exact.abs().max())
        allowed = 2 * error(theirs) + 2 * torch.finfo(theirs.dtype).eps * largest
        between = float((ours.double() - theirs.double()).abs().max())
        rows.append(OutputError(name, largest, error(ours), error(theirs), between, allowed))
    return rows


def compare_models(model: AllInOne, inputs: Inputs, rounds: int, on_sample: Callable[[], None]) -> Comparison:
    """Times whole forward passes."""

    def run(kernels: bool) -> Callable[[], object]:
        def call() -> object:
            model.kernels = kernels
            return model(*inputs)

        return call

    return _compare("whole model", run(False), run(True), 1, rounds, inputs[2].device, on_sample)


def compare_norms(model: AllInOne, inputs: Inputs, rounds: int, on_sample: Callable[[], None]) -> Comparison:
    """Times the roll and LayerNorm of one block alone, on random tokens of the model's shape."""
    text_ids, _, video = inputs
    num_frames, num_text = video.shape[1], text_ids.shape[1]
    ranges = model.ranges(num_text)
    norm = model.transformer.blocks[0].norm1
    norm.kernels = True
    channels = norm.normalized_shape[0]
    plain = TokenRollLayerNorm(channels, eps=norm.eps, device=video.device, dtype=video.dtype, kernels=False)
    plain.load_state_dict(norm.state_dict())
    rows = video.shape[0] * num_frames
    num_tokens = num_text + model.transformer.pos_embed.shape[1]
    x = torch.randn(rows, num_tokens, channels, generator=torch.Generator().manual_seed(0)).to(video)
    name = f"roll + LayerNorm [{rows}, {num_tokens}, {channels}]"

    def call_plain() -> object:
        return plain(x, num_frames, ranges)

    def call_kernels() -> object:
        return norm(x, num_frames, ranges)

    once = _seconds(call_plain, 10, video.device)
    calls = max(1, round(_SHORTEST_SAMPLE / once))
    return _compare(name, call_plain, call_kernels, calls, rounds, video.device, on_sample)


def _compare(
    name: str,
    plain: Callable[[], object],
    kernels: Callable[[], object],
    calls: int,
    rounds: int,
    device: torch.device,
    on_sample: Callable[[], None],
) -> Comparison:
    order = [(plain, list[float]()), (kernels, list[float]())]
    samples = [times for _, times in order]
    shuffle = random.Random(0).shuffle
    for function, _ in order:
        _seconds(function, calls, device)
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        shuffle(order)
        for function, times in order:
            times.append(_seconds(function, calls, device))
            on_sample()
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    occupancy = cpu / (wall * torch.get_num_threads()) if device.type == "cpu" else None
    return Comparison(name, tuple(samples[0]), tuple(samples[1]), occupancy)


def _seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean time of `calls` calls in a row."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
