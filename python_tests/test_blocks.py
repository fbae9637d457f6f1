"""The building blocks of the CPU core, through the test extension: conversions, sums, tiles."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from support import floats_of_every_exponent

from mmkernels import runtime

TIERS = [name for name in runtime.available_isas() if name != "amx"]  # AMX has tiles, not vectors of its own
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

over_tiers = pytest.mark.parametrize("tier", TIERS)
over_types = pytest.mark.parametrize("name", TYPES)
over_forms = pytest.mark.parametrize("scalars", [False, True], ids=["vectors", "scalars"])


def assert_equal_but_for_nan(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    integers = torch.int32 if theirs.dtype == torch.float32 else torch.int16
    same = ours.view(integers) == theirs.view(integers)
    if not same.all():
        assert (ours[~same].isnan() & theirs[~same].isnan()).all()


@over_tiers
@over_types
@over_forms
def test_every_half_widens_exactly(blocks: ModuleType, tier: str, name: str, scalars: bool) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    ours = torch.from_numpy(blocks.widen(tier, name, scalars, bits))
    assert_equal_but_for_nan(ours, torch.from_numpy(bits.view(np.int16)).view(TYPES[name]).float())


def check_narrowing(blocks: ModuleType, tier: str, name: str, scalars: bool, values: np.ndarray) -> None:
    ours = torch.from_numpy(blocks.narrow(tier, name, scalars, values).view(np.int16)).view(TYPES[name])
    assert_equal_but_for_nan(ours, torch.from_numpy(values).to(TYPES[name]))


@over_tiers
@over_types
@over_forms
def test_narrowing_rounds_as_torch_does(blocks: ModuleType, tier: str, name: str, scalars: bool) -> None:
    """To nearest, ties to even, overflow to infinity, subnormals kept, NaN stays NaN: a sample of every exponent."""
    check_narrowing(blocks, tier, name, scalars, floats_of_every_exponent(200))


@pytest.mark.full
@over_tiers
@over_types
@over_forms
def test_narrowing_of_every_float(blocks: ModuleType, tier: str, name: str, scalars: bool) -> None:
    for start in range(0, 1 << 32, 1 << 22):
        bits = np.arange(start, start + (1 << 22), dtype=np.uint64).astype(np.uint32)
        check_narrowing(blocks, tier, name, scalars, bits.view(np.float32))


@over_tiers
def test_sum_of_a_register(blocks: ModuleType, tier: str) -> None:
    """Every lane counts once: powers of two add up without rounding."""
    width = blocks.width(tier)
    values = 2.0 ** np.arange(width, dtype=np.float32)
    assert blocks.sum(tier, values) == 2.0**width - 1


@over_tiers
def test_sums_of_a_square(blocks: ModuleType, tier: str) -> None:
    """Lane i is the sum of row i, of which every lane counts once."""
    width = blocks.width(tier)
    square = 2.0 ** np.arange(width, dtype=np.float32) * (1 + np.arange(width, dtype=np.float32)[:, None])
    assert blocks.sums(tier, square.ravel()).tolist() == [(2.0**width - 1) * (1 + row) for row in range(width)]


@over_tiers
def test_fma(blocks: ModuleType, tier: str) -> None:
    assert blocks.fma(tier, 3.0, 5.0, 7.0) == 22.0
    if tier != "generic":  # a true one rounds once
        a = 1 + 2.0**-12
        assert blocks.fma(tier, a, a, -(1 + 2.0**-11)) == 2.0**-24


def test_unknown_tiers_are_refused(blocks: ModuleType) -> None:
    with pytest.raises(ValueError, match="no vectors of tier"):
        blocks.width("sse9")


def test_amx_tile(blocks: ModuleType) -> None:
    """Where the tier is offered, a tile product equals torch's; elsewhere it is refused instead of crashing."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((16, 32), (32, 16)))
    c = torch.randn((16, 16), generator=generator)
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()
    bits = [t.view(torch.int16).numpy().view(np.uint16).reshape(-1) for t in (a, pairs)]
    assert blocks.amx_usable() == (runtime.best_isa() == "amx")
    if blocks.amx_usable():
        ours = torch.from_numpy(blocks.amx_tile_product(*bits, c.numpy().reshape(-1))).view(16, 16)
        torch.testing.assert_close(ours, c + a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="does not offer amx"):
            blocks.amx_tile_product(*bits, c.numpy().reshape(-1))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (16, 16, 32), (17, 33, 2), (32, 16, 95), (40, 70, 33), (5, 49, 64)], ids=str)
@pytest.mark.parametrize("a_columns", [False, True])
@pytest.mark.parametrize("b_columns", [False, True])
def test_amx_panels(blocks: ModuleType, sizes: tuple[int, int, int], a_columns: bool, b_columns: bool) -> None:
    """Operands packed from their rows and from their columns, with padding of every kind; added to what is there, or not."""
    rows, cols, depth = sizes
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, depth), (depth, cols)))
    c = torch.randn((rows + 31) // 32 * 32, (cols + 31) // 32 * 32, generator=generator)
    packed = [
        t.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)
        for t in (a.T if a_columns else a, b if b_columns else b.T)
    ]
    for accumulate in (False, True):
        arguments = (*packed, a_columns, b_columns, rows, cols, c.numpy().reshape(-1), accumulate)
        if not blocks.amx_usable():
            with pytest.raises(ValueError, match="does not offer amx"):
                blocks.amx_panel_product(*arguments)
            continue
        ours = torch.from_numpy(blocks.amx_panel_product(*arguments)).view(c.shape)[:rows, :cols]
        torch.testing.assert_close(ours, a.float() @ b.float() + accumulate * c[:rows, :cols], rtol=1e-5, atol=1e-4)
