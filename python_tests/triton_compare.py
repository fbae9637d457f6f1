"""Operators interpreted and held against their definition, for the triton_*.py that run them."""

from __future__ import annotations

from typing import Any

import torch
import triton_rounding  # noqa: F401
from support import assert_within_rule
from torch import Tensor


def double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def run(function: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    torch.use_deterministic_algorithms(True)  # fresh memory is then filled with NaN: nothing may stay unwritten
    outputs = function(*args)
    torch.use_deterministic_algorithms(False)
    return outputs


def finite(x: Tensor, truth: Tensor) -> Tensor:
    """0 in place of the infinities of the truth, which x must share."""
    hidden = truth.isinf()
    assert torch.equal(x[hidden].double(), truth[hidden]), "infinities differ"
    return x.masked_fill(hidden, 0)


def compare(
    function: Any, plain: Any, args: tuple[Any, ...], what: str, noise: float | tuple[float, ...] = 0.0
) -> tuple[Tensor, ...]:
    """Runs `function`, holds it against `plain` in float64 and in its own dtype, and returns its outputs."""
    outputs = run(function, args)
    extra = noise if isinstance(noise, tuple) else (noise,) * len(outputs)
    for i, (ours, theirs, truth) in enumerate(zip(outputs, plain(*args), plain(*double(args)), strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{what}: output {i}: {ours.dtype}, {ours.shape}"
        assert_within_rule(
            finite(ours, truth), finite(theirs, truth), finite(truth, truth), f"{what}: output {i}", extra=extra[i]
        )
    print("checked", what)
    return outputs
