"""Shifted-window attention beyond its card: published blocks, where tokens go, masks, modules, memory.

The published blocks are written out here as timm (planes: roll, then pad) and MONAI (planes and volumes: pad, then roll)
have them, from tensors of windows and masks made by slices, and share no code with the package.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits, assert_within_rule, cotangents, gradients, to_double
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.cards.card import Call
from mmkernels.nn import WindowAttention
from mmkernels.reference import window_attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positions(window: Sequence[int]) -> int:
    return math.prod(2 * extent - 1 for extent in window)


# --- the published blocks -----------------------------------------------------------------------------------------------
def partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """[B, *padded, C] -> [B * W, n, C], windows in raster order: one after the other, as slices."""
    starts = itertools.product(*(range(0, size, extent) for size, extent in zip(x.shape[1:-1], window, strict=True)))
    pieces = [x[(slice(None), *(slice(at, at + w) for at, w in zip(start, window, strict=True)))] for start in starts]
    return torch.stack([piece.flatten(1, -2) for piece in pieces], 1).flatten(0, 1)


def reverse(windows: Tensor, window: Sequence[int], padded: Sequence[int]) -> Tensor:
    starts = list(itertools.product(*(range(0, size, extent) for size, extent in zip(padded, window, strict=True))))
    by_sample = windows.unflatten(0, (-1, len(starts)))
    out = windows.new_zeros(by_sample.size(0), *padded, windows.size(-1))
    for number, start in enumerate(starts):
        place = (slice(None), *(slice(at, at + w) for at, w in zip(start, window, strict=True)))
        out[place] = by_sample[:, number].unflatten(1, tuple(window))
    return out


def region_mask(padded: Sequence[int], window: Sequence[int], shift: Sequence[int], value: float) -> Tensor:
    """compute_mask of MONAI, get_attn_mask of timm: later slices write over earlier ones, [-0:] over all."""
    image = torch.zeros(1, *padded, 1)
    slices = [(slice(-w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shift, strict=True)]
    for number, part in enumerate(itertools.product(*slices)):
        image[(slice(None), *part)] = number
    regions = partition(image, window).squeeze(-1)
    apart = (regions[:, None, :] - regions[:, :, None]) != 0
    return torch.zeros(apart.shape, dtype=torch.float64).masked_fill(apart, value)


def published_index(window: Sequence[int]) -> Tensor:
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)
    relative = coordinates[:, :, None] - coordinates[:, None, :]
    index = torch.zeros(relative.shape[1:], dtype=torch.int64)
    for axis, extent in enumerate(window):
        index += (relative[axis] + extent - 1) * math.prod(2 * w - 1 for w in window[axis + 1 :])
    return index


def published_block(
    x: Tensor,
    weights: dict[str, Tensor],
    window: Sequence[int],
    shift: Sequence[int],
    heads: int,
    *,
    pad_first: bool,
    table_window: Sequence[int] | None = None,
    logit_scale: Tensor | None = None,
    mask_value: float = -100.0,
) -> Tensor:
    """The attention of a block, projections included: x [B, *grid, C]. `logit_scale`: SwinV2's cosine attention."""
    grid, axes = x.shape[1:-1], tuple(range(1, x.dim() - 1))
    ends = [(0, -size % extent) for size, extent in zip(grid, window, strict=True)]
    padding = (0, 0, *itertools.chain(*reversed(ends)))
    back = [-step for step in shift]
    moved = torch.roll(F.pad(x, padding), back, axes) if pad_first else F.pad(torch.roll(x, back, axes), padding)
    windows, padded = partition(moved, window), moved.shape[1:-1]

    count, tokens, channels = windows.shape
    qkv = F.linear(windows, weights["qkv.weight"], weights.get("qkv.bias"))
    q, k, v = qkv.reshape(count, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4).unbind(0)
    if logit_scale is None:
        scores = (q * (channels // heads) ** -0.5) @ k.transpose(-2, -1)
    else:
        factor = logit_scale.clamp(max=math.log(100.0)).exp()[:, None, None]
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * factor
    index = published_index(window if table_window is None else table_window)[:tokens, :tokens]
    scores = scores + weights["relative_position_bias_table"][index].permute(2, 0, 1)
    if any(shift):
        mask = region_mask(padded, window, shift, mask_value).to(scores.dtype)
        scores = (scores.unflatten(0, (-1, mask.size(0))) + mask[:, None]).flatten(0, 1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, channels)

    # The published block projects here; that is token by token, so pads change nothing.
    out = reverse(F.linear(out, weights["proj.weight"], weights["proj.bias"]), window, padded)
    crop = (slice(None), *(slice(size) for size in grid))
    return torch.roll(out, list(shift), axes)[crop] if pad_first else torch.roll(out[crop], list(shift), axes)


BLOCKS = (
    ((14, 14), (7, 7), (3, 3)),
    ((14, 14), (7, 7), (0, 0)),
    ((10, 15), (7, 7), (3, 3)),
    ((9, 8), (4, 3), (2, 1)),
    ((9, 8), (4, 3), (0, 2)),
    ((5, 6), (7, 7), (3, 3)),
    ((8, 8, 8), (4, 4, 4), (2, 2, 2)),
    ((5, 6, 9), (4, 3, 2), (1, 0, 1)),
    ((4, 4, 4), (2, 2, 2), (0, 0, 0)),
)
over_blocks = pytest.mark.parametrize(("grid", "window", "shift"), BLOCKS, ids=str)


def block_weights(window: Sequence[int], channels: int, heads: int, *, qkv_bias: bool = True) -> dict[str, Tensor]:
    shapes = {
        "relative_position_bias_table": (positions(window), heads),
        "qkv.weight": (3 * channels, channels),
        "qkv.bias": (3 * channels,),
        "proj.weight": (channels, channels),
        "proj.bias": (channels,),
    }
    drawn = {name: rows(*shape, dtype=torch.float64, seed=seed) * 0.3 for seed, (name, shape) in enumerate(shapes.items())}
    if not qkv_bias:
        del drawn["qkv.bias"]
    return {name: weight.requires_grad_() for name, weight in drawn.items()}


def assert_same_results(ours: Tensor, theirs: Tensor, wanted: Sequence[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    upstream = rows(*ours.shape, dtype=ours.dtype, seed=77)
    for a, b in zip(torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@over_blocks
@pytest.mark.parametrize("pad_first", [False, True])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_block_of_swin(grid: Any, window: Any, shift: Any, pad_first: bool, qkv_bias: bool, kernels: bool) -> None:
    """The module on random weights: outputs and every gradient, in float64, the grid never clipping the window."""
    weights = block_weights(window, 12, 3, qkv_bias=qkv_bias)
    x = rows(2, *grid, 12, dtype=torch.float64, seed=50).requires_grad_()
    theirs = published_block(x, weights, window, shift, 3, pad_first=pad_first)
    module = WindowAttention(
        12,
        3,
        window,
        shift,
        qkv_bias,
        "pad_roll" if pad_first else "roll_pad",
        clip=False,
        dtype=torch.float64,
        kernels=kernels,
    )
    ours = torch.func.functional_call(module, weights, (x,))
    assert_same_results(ours, theirs, [x, *weights.values()])


@over_blocks
def test_block_of_swin_v2(grid: Any, window: Any, shift: Any) -> None:
    """Cosine attention with a learnt scale by head, which reaches its limit in one of them."""
    weights = block_weights(window, 12, 3)
    logit_scale = torch.tensor([1.5, 5.0, -0.5], dtype=torch.float64, requires_grad=True)
    x = rows(2, *grid, 12, dtype=torch.float64, seed=50).requires_grad_()
    theirs = published_block(x, weights, window, shift, 3, pad_first=False, logit_scale=logit_scale)
    out = mk.window_attention(
        F.linear(x, weights["qkv.weight"], weights["qkv.bias"]),
        weights["relative_position_bias_table"],
        window=window,
        shift=shift,
        num_heads=3,
        scale=logit_scale.clamp(max=math.log(100.0)).exp(),
        pad_value=weights["qkv.bias"],
        qk_norm="l2",
    )
    ours = F.linear(out, weights["proj.weight"], weights["proj.bias"])
    assert_same_results(ours, theirs, [x, logit_scale, *weights.values()])


@pytest.mark.parametrize("grid", [(6, 6, 6), (6, 9, 5), (7, 7, 7), (8, 3, 14), (5, 9), (4, 4)], ids=str)
def test_clipped_windows_are_monais(grid: Any) -> None:
    """Where the grid clips the window, the first rows and columns of the whole window's index, and no shift on that axis."""
    full, steps = (7,) * len(grid), (3,) * len(grid)
    window = [min(size, 7) for size in grid]
    shift = [0 if size <= 7 else 3 for size in grid]
    weights = block_weights(full, 12, 3)
    x = rows(1, *grid, 12, dtype=torch.float64, seed=50).requires_grad_()
    for kernels in (True, False):
        theirs = published_block(x, weights, window, shift, 3, pad_first=True, table_window=full)
        module = WindowAttention(12, 3, full, steps, pad_order="pad_roll", dtype=torch.float64, kernels=kernels)
        assert_same_results(torch.func.functional_call(module, weights, (x,)), theirs, [x, *weights.values()])


def test_clipped_index_is_not_geometric() -> None:
    """A window of 2x2 by the index of 3x3: its third token sits at (0, 2), not at (1, 0)."""
    index = reference.relative_position_index((3, 3), 4, torch.device("cpu"))
    assert index[2, 0] == 2 * 5 + 4 and index[3, 0] == 3 * 5 + 2


# --- where tokens go ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pad_first", [False, True])
def test_placement_is_the_docstrings(pad_first: bool) -> None:
    source, region = reference.placement((5,), (4,), (2,), pad_first, torch.device("cpu"))
    pads = [[2, 3, 4, 5], [5, 5, 0, 1]] if pad_first else [[2, 3, 4, 0], [1, 5, 5, 5]]
    assert source.tolist() == pads and region.tolist() == [[0, 0, 0, 0], [1, 1, 2, 2]]


def assert_within_rule_of_reference(call: Call, what: str, luck: float = 4e-6) -> None:
    """Outputs and gradients; `luck` as in assert_equal_functions of test_attention.py, of the largest of each."""
    upstream = cotangents([call.of(reference.window_attention)])
    ours, plain = mk.window_attention, reference.window_attention
    for a, b, truth in zip(
        (call.of(ours), *gradients(ours, call, upstream)),
        (call.of(plain), *gradients(plain, call, upstream)),
        (to_double(call).of(plain), *gradients(plain, to_double(call), upstream)),
        strict=True,
    ):
        if a is not None:
            assert_within_rule(
                a,
                b,
                truth,
                what,
                extra=(luck if a.dtype != call.args[0].dtype else 4e-6) * max(1.0, truth.abs().max().item()),
            )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_grid(data: st.DataObject) -> None:
    """Grids, windows, shifts and heads of any size, both orders of padding, within the rule."""
    axes = data.draw(st.integers(2, 3))
    grid = [data.draw(st.integers(1, 9)) for _ in range(axes)]
    window = [data.draw(st.integers(1, 5)) for _ in range(axes)]
    shift = [data.draw(st.integers(0, extent - 1)) for extent in window]
    heads, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    kept = data.draw(st.sampled_from((dtype, torch.float32)))
    table = rows(positions(window), heads, dtype=kept, seed=5) if data.draw(st.booleans()) else None
    more: dict[str, Any] = {"window": window, "shift": shift, "num_heads": heads}
    more["pad_order"] = data.draw(st.sampled_from(("roll_pad", "pad_roll")))
    if data.draw(st.booleans()):
        more["pad_value"] = rows(3 * heads * channels, dtype=kept, seed=6)
    if data.draw(st.booleans()):
        more["scale"] = rows(heads, seed=7).abs() + 0.5
        if channels > 1:  # the norm of one number is its sign, whose gradient is nothing but rounding
            more["qk_norm"] = "l2"
    call = Call((rows(2, *grid, 3 * heads * channels, dtype=dtype), table), more)
    # A float32 gradient beside half precision comes of numbers in half precision; where few are summed up, or they cancel,
    # which of two formulas has the luck is no matter.
    assert_within_rule_of_reference(call, f"{grid} in windows of {window}", luck=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=str)
def test_windows_of_49_tokens_with_pads(shift: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    """Swin's windows on a grid that they do not divide: outputs and gradients, of pads too, within the rule."""
    more = {"window": (7, 7), "shift": shift, "num_heads": 2, "pad_value": rows(3 * 2 * 32, dtype=dtype, seed=6)}
    call = Call((rows(2, 10, 12, 3 * 2 * 32, dtype=dtype), rows(positions((7, 7)), 2, dtype=dtype, seed=5)), more)
    assert_within_rule_of_reference(call, f"shift {shift}")


def test_windows_do_not_see_each_other(isa: str) -> None:
    """A NaN stays in its window."""
    x = rows(1, 8, 8, 3 * 4)
    x[0, 1, 1, 4] = math.nan  # a key
    out = mk.window_attention(x, None, window=(4, 4), shift=(0, 0), num_heads=1)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, :4] = True
    assert torch.equal(out.isnan().any(-1)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_of_minus_infinity_separates_regions(dtype: torch.dtype, isa: str) -> None:
    """What other regions hold changes nothing, to the bit."""
    x = rows(1, 8, 8, 3 * 8, dtype=dtype)
    other = x.clone()
    other[:, :2] += 1  # rows 0 and 1 come round to the foot of the last windows
    call = {"window": (4, 4), "shift": (2, 2), "num_heads": 2, "mask_value": -math.inf}
    assert_same_bits(
        mk.window_attention(x, None, **call)[:, 2:], mk.window_attention(other, None, **call)[:, 2:], "other regions"
    )


def test_zero_shift_on_one_axis_has_one_region() -> None:
    """[-0:] of the published slices is the whole axis: the roll of the other axis alone separates."""
    _, region = reference.placement((8, 8), (4, 4), (0, 2), False, torch.device("cpu"))
    assert len(region.unique()) == 3
    _, nothing = reference.placement((8, 8), (4, 4), (0, 0), False, torch.device("cpu"))
    assert len(nothing.unique()) == 1


def test_pads_take_part() -> None:
    """Pads are keys: their value shows in windows that have some, and its gradient is theirs alone."""
    x, table = rows(1, 5, 4, 12), rows(49, 2)
    call = {"window": (4, 4), "shift": (0, 0), "num_heads": 2}
    zeros, ones = (mk.window_attention(x, table, pad_value=torch.full((12,), p), **call) for p in (0.0, 1.0))
    torch.testing.assert_close(zeros[:, :4], ones[:, :4], rtol=0, atol=0)
    assert (zeros[:, 4:] - ones[:, 4:]).abs().min() > 0
    torch.testing.assert_close(zeros, mk.window_attention(x, table, **call))
    pad = torch.ones(12, requires_grad=True)
    (gradient,) = torch.autograd.grad(mk.window_attention(x, table, pad_value=pad, **call).sum(), pad)
    assert gradient[:4].abs().max() == 0 and gradient[4:].abs().min() > 0  # a pad's own query is dropped


def test_pad_value_without_pads_has_no_gradient() -> None:
    pad = rows(12).requires_grad_()
    out = mk.window_attention(rows(1, 4, 4, 12), None, window=(2, 2), shift=(1, 1), num_heads=2, pad_value=pad)
    assert torch.autograd.grad(out.sum(), pad)[0].abs().max() == 0


@pytest.mark.parametrize("wanted", ["qkv", "table", "pad_value", "scale"])
def test_only_one_input_requires_grad(wanted: str) -> None:
    named = {"qkv": rows(2, 5, 6, 24), "table": rows(49, 2), "pad_value": rows(24, seed=4), "scale": rows(2, seed=5).abs()}
    named[wanted].requires_grad_()
    results = [
        f(
            named["qkv"],
            named["table"],
            window=(4, 4),
            shift=(1, 2),
            num_heads=2,
            pad_value=named["pad_value"],
            scale=named["scale"],
        )
        for f in (mk.window_attention, reference.window_attention)
    ]
    upstream = rows(2, 5, 6, 8, seed=9)
    ours, theirs = (torch.autograd.grad(out, named[wanted], upstream)[0] for out in results)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- the pipeline and the module ----------------------------------------------------------------------------------------
@over_blocks
@pytest.mark.parametrize("pad_order", ["roll_pad", "pad_roll"])
def test_pipeline_is_the_definition(grid: Any, window: Any, shift: Any, pad_order: str) -> None:
    """What the benchmark measures against computes the same."""
    x, table = rows(2, *grid, 24, dtype=torch.float64), rows(positions(window), 2, dtype=torch.float64)
    pad = rows(24, dtype=torch.float64, seed=4)
    call = {"window": window, "shift": shift, "num_heads": 2, "pad_value": pad, "pad_order": pad_order}
    torch.testing.assert_close(reference.pipeline(x, table, **call), reference.window_attention(x, table, **call))


def test_module_loads_published_weights() -> None:
    """timm's keys, and MONAI's with its index beside them."""
    module = WindowAttention(12, 3, (7, 7), (3, 3))
    expected = {"relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(module.state_dict()) == expected
    weights = {name: weight.detach().float() for name, weight in block_weights((7, 7), 12, 3).items()}
    module.load_state_dict({**weights, "relative_position_index": published_index((7, 7))})
    assert_same_bits(module.qkv.weight, weights["qkv.weight"], "qkv.weight")
    whole = nn.Sequential(module)
    whole.load_state_dict({**whole.state_dict(), "0.relative_position_index": published_index((7, 7))})


def test_module_switches_its_kernels() -> None:
    module = WindowAttention(12, 3, (4, 4), (2, 2)).eval()
    assert module.kernels and module.qkv.kernels and "kernels=True" in repr(module)
    x = rows(2, 9, 10, 12)
    with torch.no_grad():
        on = module(x)
        module.kernels = False
        assert not module.qkv.kernels and not module.proj.kernels
        torch.testing.assert_close(on, module(x), rtol=1e-4, atol=1e-5)


def test_module_in_half_precision() -> None:
    module, x = WindowAttention(12, 3, (4, 4), (2, 2), dtype=torch.bfloat16), rows(2, 9, 10, 12, dtype=torch.bfloat16)
    on = module(x)
    module.kernels = False
    assert on.dtype == torch.bfloat16
    torch.testing.assert_close(on, module(x), rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"window_size": (7,)}, "window_size"),
        ({"window_size": (7, 0)}, "window_size"),
        ({"shift": (7, 0)}, "shift"),
        ({"shift": (1,)}, "shift"),
        ({"num_heads": 5}, "num_heads"),
        ({"pad_order": "pad"}, "pad_order"),
    ],
    ids=str,
)
def test_module_refuses(change: dict[str, Any], argument: str) -> None:
    good: dict[str, Any] = {"dim": 12, "num_heads": 3, "window_size": (7, 7), "shift": (3, 3)}
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        WindowAttention(**{**good, **change})


# --- memory -------------------------------------------------------------------------------------------------------------
_MEASURE = """
    import torch
    import mmkernels as mk
    from mmkernels.reference.window_attention import pipeline

    def status(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024

    function = {function}
    qkv, table = torch.randn(1, 35, 35, 35, 144, requires_grad=True), torch.randn(13**3, 3, requires_grad=True)
    more = dict(window=(7, 7, 7), shift=(3, 3, 3), num_heads=3)
    function(qkv[:, :7, :7, :7], table, **more).sum().backward()  # what is loaded and started once
    qkv.grad = table.grad = None
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from here
    before = status("VmRSS")
    with torch.set_grad_enabled({backward}):
        out = function(qkv, table, **more)
    if {backward}:
        out.backward(torch.ones_like(out))
    print(status("VmHWM") - before)
"""


def peak_bytes(function: str, backward: bool) -> int:
    code = textwrap.dedent(_MEASURE).format(function=function, backward=backward)
    root = Path(mk.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_a_tenth_of_the_published_memory(backward: bool) -> None:
    """The first stage of Swin UNETR on a grid of 35^3: what the process grows by at its peak."""
    ours, theirs = peak_bytes("mk.window_attention", backward), peak_bytes("pipeline", backward)
    assert ours < theirs / 10, f"{ours / 2**20:.0f} MiB beside {theirs / 2**20:.0f} MiB"
