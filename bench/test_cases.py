"""The cards' benchmark cases for pytest-benchmark, grouped by case and dtype: ``python -m pytest bench``.

It times one contestant after the other. What is to be judged comes from ``mmkernels bench``, which interleaves them.
"""

from __future__ import annotations

import pytest
import torch

from mmkernels.bench.contest import Contest, contestant_names
from mmkernels.bench.selection import dtype_name, select
from mmkernels.cards import all_cards
from mmkernels.cards.card import BenchCase

_CONTESTANTS = [
    pytest.param(case, dtype, name, id=f"{case.name}-{dtype_name(dtype)}-{name}")
    for _, case, dtype in select(all_cards()).cases
    for name in contestant_names(case)
]


@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=False)
@pytest.mark.parametrize(("case", "dtype", "name"), _CONTESTANTS)
def test_case(benchmark, bench_device: str, case: BenchCase, dtype: torch.dtype, name: str) -> None:
    contest = Contest(case, bench_device, dtype, only=name)
    if name in contest.failed:
        pytest.skip(contest.failed[name])
    benchmark.group = f"{case.name} {dtype_name(dtype)}"
    benchmark.extra_info.update(contestant=name, kernel=contest.kernel, flops=contest.cost.flops, bytes=contest.cost.bytes)
    step = contest.steps[name]

    def finished() -> None:
        step()
        if bench_device == "cuda":
            torch.cuda.synchronize()

    with contest.grad_mode():
        benchmark(finished if bench_device == "cuda" else step)
