"""The elementary functions and activations of the CPU core's vectors, through the test extension."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import assert_within_rule, floats_of_every_exponent
from torch import Tensor

from mmkernels import runtime

TIERS = [name for name in runtime.available_isas() if name != "amx"]  # AMX has tiles, not vectors of its own

# Largest error in units in the last place: with fma, and without (the generic tier).
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "exp": (torch.exp, 1.5, 2.0),
    "exp2": (torch.exp2, 2.25, 2.5),
    "erf": (torch.erf, 1.25, 1.5),
    "tanh": (torch.tanh, 1.75, 1.75),
    "sigmoid": (torch.sigmoid, 2.75, 2.75),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x.clone(),
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
SMALLEST_NORMAL = 2.0**-126
SPECIAL = [math.inf, -math.inf, math.nan, -0.0, 0.0, 1e-45, -1e-45, 1e-40, 100.0, -100.0, 1e20, -1e20, 3.4e38, -3.4e38]

over_tiers = pytest.mark.parametrize("tier", TIERS)
over_functions = pytest.mark.parametrize("name", FUNCTIONS)
over_activations = pytest.mark.parametrize("name", ACTIVATIONS)


def ours(blocks: ModuleType, tier: str, name: str, x: Tensor) -> Tensor:
    function = blocks.math if x.dtype == torch.float32 else blocks.math_of_doubles
    return torch.from_numpy(function(tier, name, x.numpy()))


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def ulps(result: Tensor, exact: Tensor) -> Tensor:
    """The error in units in the last place of `exact` (float64). Infinity counts as the number after the largest, and 0 as
    right where `exact` is subnormal: exp and sigmoid flush."""
    exact, value = exact.clamp(max=2.0**128), result.double().clamp(max=2.0**128)
    exponent = (exact.view(torch.int64) & (0x7FF << 52)).view(torch.float64).clamp_(SMALLEST_NORMAL, 2.0**127)
    error = (value - exact).abs_().div_(exponent.mul_(2.0**-23))
    return torch.where((value == 0) & (exact.abs() < SMALLEST_NORMAL), 0.0, error)


def largest_error(blocks: ModuleType, tier: str, name: str, x: Tensor) -> tuple[float, float]:
    """The largest error in ulps over the finite numbers of `x`, and where; NaN if any result is NaN."""
    x = x[x.isfinite() & ((x < 127.5) if name == "exp2" else True)]  # from where exp2 says infinity
    if x.numel() == 0:
        return 0.0, 0.0
    error, place = ulps(ours(blocks, tier, name, x), FUNCTIONS[name][0](x.double())).max(0)  # max keeps NaN
    return error.item(), x[place].item()


def check(name: str, tier: str, error: float, place: float) -> None:
    bound = FUNCTIONS[name][2 if tier == "generic" else 1]
    what = f"{name}, {tier}: largest error {error:.3f} ulp at {float(place).hex()} ({place!r})"
    print(what)
    assert error <= bound, f"{what}; allowed {bound}"


@over_tiers
@over_functions
def test_functions_at_every_exponent(blocks: ModuleType, tier: str, name: str) -> None:
    every = torch.from_numpy(floats_of_every_exponent(200))
    dense = torch.linspace(-110, 110, 400_001)
    check(name, tier, *largest_error(blocks, tier, name, torch.cat([every, dense, dense / 20])))


@pytest.mark.full
@over_tiers
@over_functions
def test_functions_at_every_float(blocks: ModuleType, tier: str, name: str) -> None:
    worst, chunk = (0.0, 0.0), 1 << 17
    for start in range(0, 1 << 32, chunk):
        bits = np.arange(start, start + chunk, dtype=np.uint32)
        found = largest_error(blocks, tier, name, torch.from_numpy(bits.view(np.float32)))
        if not found[0] <= worst[0]:
            worst = found
            assert not math.isnan(found[0]), f"{name}, {tier}: NaN near {bits[0]:#x}"
    check(name, tier, *worst)


@over_tiers
def test_special_values(blocks: ModuleType, tier: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-45, 100.0, -100.0])
    expected = {
        "exp": [math.inf, 0.0, math.nan, 1.0, 1.0, 1.0, 1.0, math.inf, 0.0],
        "exp2": [math.inf, 0.0, math.nan, 1.0, 1.0, 1.0, 1.0, 2.0**100, 2.0**-100],
        "erf": [1.0, -1.0, math.nan, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0],
        "tanh": [1.0, -1.0, math.nan, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0],
        "sigmoid": [1.0, 0.0, math.nan, 0.5, 0.5, 0.5, 0.5, 1.0, 0.0],
    }
    for name, values in expected.items():
        wanted, got = torch.tensor(values), ours(blocks, tier, name, x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(got.signbit()[3:], wanted.signbit()[3:]), name


@over_tiers
def test_limits(blocks: ModuleType, tier: str) -> None:
    """exp overflows and flushes just where float does, exp2 a little before; erf and tanh never leave [-1, 1]."""
    edge = torch.tensor([88.72283, 88.72284, -87.33654, -87.33656])
    large, infinite, small, flushed = ours(blocks, tier, "exp", edge).tolist()
    assert large < math.inf and infinite == math.inf
    assert small >= SMALLEST_NORMAL and flushed == 0
    edge = torch.tensor([127.49999, 127.50001, -126.0, -127.0, 31.0])
    large, infinite, small, flushed, whole = ours(blocks, tier, "exp2", edge).tolist()
    assert large < math.inf and infinite == math.inf
    assert small == SMALLEST_NORMAL and flushed == 0 and whole == 2.0**31
    x = torch.linspace(-20, 20, 1_000_001)
    for name in ("erf", "tanh", "sigmoid"):
        assert ours(blocks, tier, name, x).abs().max() == 1, name
    for name in ("erf", "tanh"):
        assert torch.equal(ours(blocks, tier, name, -x), -ours(blocks, tier, name, x)), f"{name} is odd"


@over_tiers
def test_nan_payloads_stay_nan(blocks: ModuleType, tier: str) -> None:
    """Whatever bits a NaN carries: they must not become the exponent of a number."""
    mantissas = np.concatenate([np.arange(1, 4096), 1 << np.arange(23), np.arange(0x7FF000, 0x800000)])
    bits = np.concatenate([mantissas | 0x7F800000, mantissas | 0xFF800000]).astype(np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    names = [*FUNCTIONS, *ACTIVATIONS, *(f"{name}_gradient" for name in ACTIVATIONS if name not in ("none", "relu"))]
    for name in names:
        assert ours(blocks, tier, name, x).isnan().all(), name


def inputs_of_activations() -> dict[str, Tensor]:
    return {
        "normal": torch.randn(100_003, generator=torch.Generator().manual_seed(0)),
        "grid": torch.linspace(-8, 8, 1_000_001),
        "far": torch.linspace(-200, 200, 1_000_001),
    }


@over_tiers
@over_activations
def test_activations(blocks: ModuleType, tier: str, name: str) -> None:
    for what, x in inputs_of_activations().items():
        plain, oracle = ACTIVATIONS[name](x), ACTIVATIONS[name](x.double())
        assert_within_rule(ours(blocks, tier, name, x), plain, oracle, f"{name} of {what}")


@over_tiers
@over_activations
def test_gradients_of_activations(blocks: ModuleType, tier: str, name: str) -> None:
    for what, x in inputs_of_activations().items():
        plain, oracle = gradient_of(ACTIVATIONS[name], x), gradient_of(ACTIVATIONS[name], x.double())
        assert_within_rule(ours(blocks, tier, f"{name}_gradient", x), plain, oracle, f"gradient of {name} of {what}")


@over_tiers
@over_activations
def test_activations_of_special_values(blocks: ModuleType, tier: str, name: str) -> None:
    """NaN, infinite or finite where torch's float64 is, and then the same. (Its float32 is no measure: with AVX-512 the gelu
    of infinity is NaN, and the gradient of gelu_tanh is NaN for finite numbers whose square overflows.)"""
    x = torch.tensor(SPECIAL * 3)  # more than one register of each tier
    value, slope = ours(blocks, tier, name, x), ours(blocks, tier, f"{name}_gradient", x)
    torch.testing.assert_close(value, ACTIVATIONS[name](x.double()).float(), rtol=1e-6, atol=1e-30, equal_nan=True)
    wanted = gradient_of(ACTIVATIONS[name], x.double()).float()
    torch.testing.assert_close(slope, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", [*FUNCTIONS, *ACTIVATIONS, *(f"{name}_gradient" for name in ACTIVATIONS)])
def test_doubles_of_the_generic_tier(blocks: ModuleType, name: str) -> None:
    """Good enough for gradcheck: a few units in the last place of float64."""
    x = torch.cat([torch.linspace(-30, 30, 10_001), torch.tensor(SPECIAL)]).double()
    if name in FUNCTIONS:
        wanted = FUNCTIONS[name][0](x)
    elif name in ACTIVATIONS:
        wanted = ACTIVATIONS[name](x)
    else:
        wanted = gradient_of(ACTIVATIONS[name.removesuffix("_gradient")], x)
    torch.testing.assert_close(ours(blocks, "generic", name, x), wanted, rtol=1e-14, atol=1e-14, equal_nan=True)


def test_unknown_functions_are_refused(blocks: ModuleType) -> None:
    with pytest.raises(ValueError, match="no function cosh"):
        blocks.math("generic", "cosh", np.zeros(1, dtype=np.float32))
    if "avx2" in TIERS:
        with pytest.raises(ValueError, match="no function exp of this type in tier avx2"):
            blocks.math_of_doubles("avx2", "exp", np.zeros(1))
