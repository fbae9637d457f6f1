"""Token rolling beyond its card: shapes under torch.compile, splits of the batch, special values, the wide outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits, assert_within_rule, gradients, to_double
from torch import Tensor

import mmkernels as mk
from mmkernels.cards.card import Call
from mmkernels.reference import token_roll as reference


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_direction_and_segments() -> None:
    """out[t] = x[t - shift]: after the first token f tokens of the frame before, at the end f tokens of the frame after."""
    x = torch.arange(3.0).view(3, 1, 1).expand(3, 17, 2).contiguous()  # every token holds its frame's number
    out = mk.token_roll(x, 3)
    assert out[:, 0, 0].tolist() == [0, 1, 2]
    assert out[:, 1, 0].tolist() == out[:, 2, 0].tolist() == [2, 0, 1]
    assert out[:, 3, 0].tolist() == out[:, 14, 0].tolist() == [0, 1, 2]
    assert out[:, 15, 0].tolist() == out[:, 16, 0].tolist() == [1, 2, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ranges(data: st.DataObject) -> None:
    """Random videos and random disjoint ranges give the reference's bits, and rolling back gives x."""
    batch, frames, count, channels = (data.draw(st.integers(1, high)) for high in (3, 5, 40, 70))
    cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=12)))
    ranges = tuple((a, b, data.draw(st.integers(-9, 9))) for a, b in zip(cuts[::2], cuts[1::2], strict=False))
    x = tokens(batch * frames, count, channels)
    out = mk.token_roll(x, frames, ranges=ranges)
    assert_same_bits(out, reference.token_roll(x, frames, ranges=ranges), "roll")
    back = mk.token_roll(out, frames, ranges=tuple((a, b, -shift) for a, b, shift in ranges))
    assert_same_bits(back, x, "rolled back")


@settings(max_examples=40, deadline=None)
@given(channels=st.integers(1, 140), rows=st.integers(1, 4), count=st.integers(1, 9), half=st.booleans())
def test_layer_norm_of_any_width(channels: int, rows: int, count: int, half: bool) -> None:
    """Every tail of every vector width, forward and backward."""
    dtype = torch.bfloat16 if half else torch.float32
    weight, bias = tokens(channels, dtype=dtype), tokens(channels + 1, dtype=dtype)[1:]
    call = Call((tokens(rows, count, channels, dtype=dtype), rows, weight, bias, 1e-5))
    for ours, plain, truth in zip(
        (*call.of(mk.token_roll_layer_norm), *gradients(mk.token_roll_layer_norm, call)),
        (*call.of(reference.token_roll_layer_norm), *gradients(reference.token_roll_layer_norm, call)),
        (*to_double(call).of(reference.token_roll_layer_norm), *gradients(reference.token_roll_layer_norm, to_double(call))),
        strict=True,
    ):
        # Of a few numbers whose terms cancel, torch's own may be right by luck.
        lucky = 4 * torch.finfo(ours.dtype).eps * max(1.0, truth.abs().max().item())
        assert_within_rule(ours, plain, truth, f"{channels} channels", extra=lucky)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_bit_pattern_is_carried(dtype: torch.dtype, isa: str) -> None:
    """Rolling moves bits: NaN payloads, signed zeros and subnormals arrive as they were, from the fused op too."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(
        torch.iinfo(integers).min, torch.iinfo(integers).max, (6, 33, 37), dtype=integers, generator=generator
    )
    x = bits.view(dtype)
    assert_same_bits(mk.token_roll(x, 3), reference.token_roll(x, 3), "roll")
    rolled = mk.token_roll_layer_norm(x, 3, None, None, 1e-6)[1]
    assert_same_bits(rolled, reference.token_roll(x, 3), "rolled")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_rows(value: float, isa: str) -> None:
    x = tokens(6, 17, 19)
    x[2, 4, 7] = value
    ours = mk.token_roll_layer_norm(x, 3, None, None, 1e-6)[0]
    plain = reference.token_roll_layer_norm(x, 3, None, None, 1e-6)[0]
    assert torch.equal(ours.isfinite(), plain.isfinite())
    assert torch.equal(ours.isnan(), plain.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, isa: str) -> None:
    """One video alone gives the bits that it gives among others."""
    x, weight, bias = tokens(12, 50, 96, dtype=dtype), tokens(96, dtype=dtype), tokens(96, dtype=dtype)
    together = mk.token_roll_layer_norm(x, 3, weight, bias, 1e-6)
    for video in range(4):
        alone = mk.token_roll_layer_norm(x[3 * video : 3 * video + 3], 3, weight, bias, 1e-6)
        for a, b in zip(together, alone, strict=True):
            assert_same_bits(a[3 * video : 3 * video + 3], b, f"video {video}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_normed_beside_half_precision(dtype: torch.dtype, isa: str) -> None:
    """What autocast on CUDA asks for: normed in float32, from the operator itself."""
    x, weight, bias = tokens(6, 17, 27, dtype=dtype), tokens(27), tokens(28)[1:]
    leaves = [t.requires_grad_() for t in (x.clone(), weight.clone(), bias.clone())]
    normed, rolled, _ = torch.ops.mmkernels.token_roll_layer_norm(leaves[0], 3, 8, [], *leaves[1:], 1e-6, True, True)
    assert normed.dtype == torch.float32 and rolled.dtype == dtype
    expected = [t.detach().requires_grad_() for t in (x, weight, bias)]
    plain = reference.token_roll_layer_norm(expected[0].float(), 3, *expected[1:], 1e-6)[0]
    truth = reference.token_roll_layer_norm(x.double(), 3, weight.double(), bias.double(), 1e-6)[0]
    assert_within_rule(normed, plain, truth, "normed")
    upstream = tokens(6, 17, 27)
    ours = torch.autograd.grad(normed, leaves, upstream)
    theirs = torch.autograd.grad(plain, expected, upstream)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    oracle = torch.autograd.grad(
        reference.token_roll_layer_norm(doubles[0], 3, *doubles[1:], 1e-6)[0], doubles, upstream.double()
    )
    for a, b, c in zip(ours, theirs, oracle, strict=True):
        assert_within_rule(a, b, c, "gradient")


def test_gradient_that_is_expanded_or_missing() -> None:
    x = tokens(6, 17, 9).requires_grad_()
    weight = tokens(9).requires_grad_()
    for loss in (
        lambda n, r: n.sum(),  # the upstream gradient is one expanded number
        lambda n, r: r.transpose(0, 1).reshape(-1).square().sum(),  # normed got none, rolled a strided one
        lambda n, r: (n * r).sum(),
    ):
        ours = torch.autograd.grad(loss(*mk.token_roll_layer_norm(x, 3, weight, None, 1e-6)), (x, weight), allow_unused=True)
        theirs = torch.autograd.grad(
            loss(*reference.token_roll_layer_norm(x, 3, weight, None, 1e-6)), (x, weight), allow_unused=True
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(weight) if a is None else a, torch.zeros_like(weight) if b is None else b
            )


def test_only_the_parameters_or_only_x_require_grad() -> None:
    x, weight, bias = tokens(6, 17, 9), tokens(9), tokens(10)[1:]
    for wanted in ("x", "weight", "bias"):
        named = {"x": x.clone(), "weight": weight.clone(), "bias": bias.clone()}
        named[wanted].requires_grad_()
        normed, _ = mk.token_roll_layer_norm(named["x"], 3, named["weight"], named["bias"], 1e-6)
        expected, _ = reference.token_roll_layer_norm(named["x"], 3, named["weight"], named["bias"], 1e-6)
        upstream = tokens(6, 17, 9)
        torch.testing.assert_close(
            torch.autograd.grad(normed, named[wanted], upstream), torch.autograd.grad(expected, named[wanted], upstream)
        )


def test_new_sizes_do_not_recompile() -> None:
    """Batch, tokens and frames are symbolic in the schema: after one dynamic compilation no size makes another."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x, t: mk.token_roll(x, t), fullgraph=True, dynamic=True, backend=counter)
    for batch, frames, count in ((2, 3, 17), (5, 4, 29), (3, 6, 50), (7, 2, 33)):
        x = tokens(batch * frames, count, 8)
        assert_same_bits(compiled(x, frames), mk.token_roll(x, frames), "compiled")
    assert counter.frame_count == 1


def test_exports() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mk.token_roll(x, 3)

    x = tokens(6, 17, 8)
    program = torch.export.export(Block(), (x,))
    assert_same_bits(program.module()(x), mk.token_roll(x, 3), "exported")


def test_inference_mode_and_no_grad() -> None:
    x = tokens(6, 17, 8).requires_grad_()
    with torch.inference_mode():
        assert not mk.token_roll(x, 3).requires_grad
    with torch.no_grad():
        assert not mk.token_roll(x, 3).requires_grad
    assert mk.token_roll(x, 3).requires_grad


def test_float_equal_ranges_are_refused_after_an_equal_call() -> None:
    """1.0 == 1, but a range of floats is a mistake, whatever was called before."""
    x = tokens(6, 17, 8)
    mk.token_roll(x, 3, ranges=((1, 5, 1),))
    with pytest.raises(TypeError, match=r"^ranges: "):
        mk.token_roll(x, 3, ranges=((1, 5, 1.0),))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^num_frames: "):
        mk.token_roll(x, 3.0)  # type: ignore[arg-type]


def test_module_moves_between_threads() -> None:
    """Calls from many Python threads at once: no shared state but the trace."""
    from concurrent.futures import ThreadPoolExecutor

    x = tokens(6, 50, 64)
    expected = mk.token_roll(x, 3)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: mk.token_roll(x, 3), range(200)):
            assert_same_bits(out, expected, "from a thread")


def test_raw_operator_refuses_bad_numbers() -> None:
    """What a compiled graph calls: the kernel's own checks raise RuntimeError and name the argument, never read wild."""
    x = tokens(6, 17, 8)
    op = torch.ops.mmkernels.token_roll
    for arguments, name in (
        ((x, 4, 8, []), "num_frames"),
        ((x, 0, 8, []), "num_frames"),
        ((x[0], 3, 8, []), "x"),
        ((x, 3, 2, []), None),
        ((x[:, :16], 3, 2, []), "divisor"),
        ((x, 3, 0, [1, 5]), "ranges"),
        ((x, 3, 0, [1, 18, 1]), "ranges"),
        ((x, 3, 0, [-1, 3, 1]), "ranges"),
        ((x, 3, 0, [4, 8, 1, 1, 3, 1]), "ranges"),
        ((x.int(), 3, 8, []), "x"),
        ((x, 3, 0, [0, 4, 1, 2, 2, 1]), None),  # an empty range overlaps nothing
        ((x, 3, 0, [0, 4, 1, 99, 99, 1]), "ranges"),
    ):
        if name is None:
            op(*arguments)
            continue
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            op(*arguments)


def test_raw_backward_refuses_what_does_not_fit() -> None:
    """The operator behind the gradients checks every tensor before a kernel writes."""
    x = tokens(6, 17, 8)
    stats = torch.ops.mmkernels.token_roll_layer_norm(x, 3, 8, [], None, None, 1e-6, True, False)[2]
    good = {"grad_normed": x, "grad_rolled": x, "x": x, "stats": stats, "weight": x[0, 0], "bias": x[0, 0]}
    op = torch.ops.mmkernels.token_roll_layer_norm_backward

    def call(**changed: Tensor | None) -> None:
        t = {**good, **changed}
        op(t["grad_normed"], t["grad_rolled"], t["x"], t["stats"], 3, 8, [], t["weight"], t["bias"], True, True)

    call()
    for name, value in (
        ("grad_normed", x[:3]),
        ("grad_normed", x.transpose(0, 1).contiguous().transpose(0, 1)),
        ("grad_normed", x.double()),
        ("grad_rolled", x.half()),
        ("stats", stats.double()),
        ("stats", stats[:1]),
        ("weight", x[0, 0, :3]),
        ("weight", x[0, 0].half()),
        ("bias", torch.zeros(3, dtype=torch.uint8)),
        ("bias", x[0, 0].double()),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            call(**{name: value})


def test_numbers_beyond_64_bits() -> None:
    """Refused with the argument's name where they mean nothing; a shift is one modulo the frames."""
    x = tokens(6, 17, 8)
    for arguments, name in (
        ({"divisor": 2**70}, "divisor"),
        ({"num_frames": 2**70}, "num_frames"),
        ({"ranges": ((1, 2**70, 1),)}, "ranges"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            mk.token_roll(**{"x": x, "num_frames": 3, **arguments})
    with pytest.raises(ValueError, match=r"^eps: "):
        mk.token_roll_layer_norm(x, 3, None, None, 10**400)
    big = 3 * 2**70 + 1
    assert_same_bits(mk.token_roll(x, 3, ranges=((1, 5, big),)), mk.token_roll(x, 3, ranges=((1, 5, 1),)), "big shift")


def test_an_empty_range_overlaps_nothing() -> None:
    x = tokens(6, 17, 8)
    assert_same_bits(
        mk.token_roll(x, 3, ranges=((0, 4, 1), (2, 2, 5))), mk.token_roll(x, 3, ranges=((0, 4, 1),)), "empty range"
    )


def test_layouts_that_are_not_dense() -> None:
    x, weight = tokens(6, 17, 8), tokens(8)
    nested = torch.nested.nested_tensor([x[0], x[1, :5]], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^x: expected a dense"):
        mk.token_roll(nested, 2)
    with pytest.raises(TypeError, match=r"^weight: expected a dense"):
        mk.token_roll_layer_norm(x, 3, weight.to_sparse(), None, 1e-6)


def test_memory_that_cannot_be_had() -> None:
    """As torch says it, in the type that whoever looks for a batch size catches."""
    x = torch.zeros(2**10).expand(2**20, 2**20, 2**10)  # 4 PiB that take 4 KiB
    with pytest.raises(torch.OutOfMemoryError, match="an output of 4503599627370496 bytes"):
        mk.token_roll(x, 2)
