"""Operators interpreted and held against their definition, for the triton_*.py that run them."""

from __future__ import annotations

from typing import Any

import torch
import triton_rounding  # noqa: F401
from support import as_tuple, assert_within_rule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


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


def assert_laid_out_as_declared(name: str, args: tuple[Any, ...], outputs: tuple[Tensor, ...], what: str) -> None:
    """Outputs lie in memory as the operator's fake kernel says, which compiled graphs rely on, and share memory neither with
    an argument nor with each other, which they take for granted."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        declared = as_tuple(getattr(torch.ops.mmkernels, name.removeprefix("mmkernels::"))(*fakes))
    taken = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
    for i, (ours, fake) in enumerate(zip(outputs, declared, strict=True)):
        assert ours.shape == fake.shape and ours.dtype == fake.dtype, f"{what}: output {i}: {ours.shape}, {ours.dtype}"
        if ours.numel() > 0:  # nobody asks for the stride of a dimension of size 1
            pairs = zip(ours.shape, ours.stride(), fake.stride(), strict=True)
            assert all(size == 1 or got == want for size, got, want in pairs), f"{what}: output {i}: {ours.stride()}"
        assert ours.untyped_storage()._cdata not in taken, f"{what}: output {i} shares memory"
        taken.add(ours.untyped_storage()._cdata)
