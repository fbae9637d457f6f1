"""Normalisation beyond its cards: widths and groups, special values, splits of the batch, modules, the raw operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, gradients, to_double
from torch import Tensor, nn

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards.card import Call
from mmkernels.nn import LayerNorm, RMSNorm
from mmkernels.reference import norm as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_all_within_rule(name: str, call: Call, what: str) -> None:
    """Outputs and gradients of mk.<name> against its reference. Where a row has few numbers that are nearly equal, the
    rounding of their mean shows in all of them, and which of two formulas has the luck is no matter."""
    luck = 4e-6 if call.tensors()[0].shape[-1] < 16 else 0.0
    ours, plain = getattr(mk, name), getattr(reference, name)
    upstream = cotangents(as_tuple(call.of(plain)))
    for a, b, truth in zip(
        (*as_tuple(call.of(ours)), *gradients(ours, call, upstream)),
        (*as_tuple(call.of(plain)), *gradients(plain, call, upstream)),
        (*as_tuple(to_double(call).of(plain)), *gradients(plain, to_double(call), upstream)),
        strict=True,
    ):
        assert_within_rule(a, b, truth, what, extra=luck * max(1.0, truth.abs().max().item()))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 140),
    count=st.integers(1, 70),
    rms=st.booleans(),
    added=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_width(channels: int, count: int, rms: bool, added: bool, dtype: torch.dtype) -> None:
    """Every tail of every vector width, blocks of rows that are not full, forward and backward."""
    x, residual = rows(count, channels, dtype=dtype), rows(count, channels, dtype=dtype, seed=4)
    weight, bias = rows(channels, dtype=dtype), rows(channels + 1, dtype=dtype)[1:]
    parameters = (weight,) if rms else (weight, bias)
    if channels < 3:  # a layer norm of one or two numbers has a gradient of nothing but rounding: test_one_channel
        rms, parameters = True, (weight,)
    name = f"{'add_' if added else ''}{'rms' if rms else 'layer'}_norm"
    assert_all_within_rule(name, Call((x, *((residual,) if added else ()), *parameters)), f"{count} rows of {channels}")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_groups(data: st.DataObject) -> None:
    """Samples, tokens and channels of any size, vectors one a sample or one a token, each in either dtype."""
    batch, tokens, channels = (data.draw(st.integers(low, high)) for low, high in ((1, 9), (1, 40), (3, 40)))
    dtype = data.draw(st.sampled_from(DTYPES))

    def vectors(seed: int) -> Tensor:
        shape = data.draw(st.sampled_from(((batch, channels), (batch, 1, channels), (batch, tokens, channels))))
        return rows(*shape, dtype=data.draw(st.sampled_from((dtype, torch.float32))), seed=seed)

    norm = data.draw(st.sampled_from(("layer", "rms")))
    more: dict[str, Any] = {"norm": norm, "scale_offset": data.draw(st.sampled_from((0.0, 1.0)))}
    if data.draw(st.booleans()):
        more["residual"] = rows(batch, tokens, channels, dtype=dtype, seed=5)
        if data.draw(st.booleans()):
            more["gate"] = vectors(6)
    if data.draw(st.booleans()):
        more["weight"] = rows(channels, dtype=dtype, seed=7)
        if norm == "layer":
            more["bias"] = rows(channels, dtype=dtype, seed=8)
    call = Call((rows(batch, tokens, channels, dtype=dtype), vectors(9), vectors(10)), more)
    assert_all_within_rule("modulate", call, f"{batch}x{tokens}x{channels}")


def test_one_channel(isa: str) -> None:
    """The layer norm of one number is the bias, whatever the number; its gradient is exactly 0."""
    x, weight, bias = rows(50, 1).requires_grad_(), torch.tensor([3.0], requires_grad=True), torch.tensor([0.5])
    out = mk.layer_norm(x, weight, bias)
    assert_same_bits(out, torch.full((50, 1), 0.5), "normed")
    for gradient in torch.autograd.grad(out, (x, weight), rows(50, 1)):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_modulation_is_what_the_formula_says(offset: float) -> None:
    """Spelled out in float64 for one row: norm(residual + gate x) (scale_offset + scale) + shift."""
    x, residual, gate, shift, scale = (rows(2, 3, 5, seed=seed).double() for seed in range(5))
    gate, shift, scale = gate[:, 0], shift[:, 0], scale[:, 0]
    out, summed = mk.modulate(x, shift, scale, scale_offset=offset, residual=residual, gate=gate)
    row = residual[1, 2] + gate[1] * x[1, 2]
    torch.testing.assert_close(summed[1, 2], row)
    normed = (row - row.mean()) / (row.var(correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(out[1, 2], normed * (offset + scale[1]) + shift[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_rows(value: float, name: str, dtype: torch.dtype, isa: str) -> None:
    x = rows(6, 17, 35, dtype=dtype)
    x[2, 4, 7] = value
    ours, plain = getattr(mk, name)(x), getattr(reference, name)(x)
    assert torch.equal(ours.isfinite(), plain.isfinite())
    assert torch.equal(ours.isnan(), plain.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_round_as_torch_rounds(dtype: torch.dtype, isa: str) -> None:
    """Every bit pattern but NaNs: x + residual is torch's own sum, infinities and subnormals included."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    generator = torch.Generator().manual_seed(5)
    limits = torch.iinfo(integers)
    x, residual = (
        torch.randint(limits.min, limits.max, (64, 83), dtype=integers, generator=generator).view(dtype) for _ in range(2)
    )
    x, residual = (torch.where(t.isnan(), 0, t) for t in (x, residual))
    for cache in (0, 2**40):
        with runtime.assumed_cache_bytes(cache):
            summed = mk.add_rms_norm(x, residual)[1]
        expected = x + residual
        assert torch.equal(summed.isnan(), expected.isnan())
        assert_same_bits(torch.where(summed.isnan(), 0, summed), torch.where(expected.isnan(), 0, expected), "summed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 96, 83])
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, channels: int, isa: str) -> None:
    """One sample alone gives the bits that it gives among others, through the cache and past it."""
    x, residual = rows(4, 37, channels, dtype=dtype), rows(4, 37, channels, dtype=dtype, seed=4)
    shift, scale = rows(4, channels, dtype=dtype), rows(4, channels, dtype=dtype, seed=5)
    together = (
        *mk.add_layer_norm(x, residual, shift[0], scale[0]),
        mk.rms_norm(x, shift[0]),
        mk.modulate(x, shift, scale),
    )
    for sample in range(4):
        part = slice(sample, sample + 1)
        with runtime.assumed_cache_bytes(0 if sample % 2 else 2**40):
            alone = (
                *mk.add_layer_norm(x[part], residual[part], shift[0], scale[0]),
                mk.rms_norm(x[part], shift[0]),
                mk.modulate(x[part], shift[part], scale[part]),
            )
        for a, b in zip(together, alone, strict=True):
            assert_same_bits(a[part], b, f"sample {sample}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_float32_normed_beside_half_precision(dtype: torch.dtype, rms: bool, isa: str) -> None:
    """What autocast on CUDA asks for: normed in float32, from the operator itself, and its gradient in float32."""
    named = {"x": rows(3, 17, 43, dtype=dtype), "shift": rows(3, 43), "scale": rows(3, 43, seed=4), "weight": rows(43)}

    def ours(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mmkernels.norm(x, None, None, weight, None, shift, scale, 1e-6, 1.0, rms, True)[0]

    def plain(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        norm = "rms" if rms else "layer"
        return reference.modulate(x.to(weight.dtype), shift, scale, weight=weight, norm=norm)  # type: ignore[return-value]

    call = Call((), named)
    assert call.of(ours).dtype == torch.float32
    for a, b, truth in zip(
        (call.of(ours), *gradients(ours, call)),
        (call.of(plain), *gradients(plain, call)),
        (to_double(call).of(plain), *gradients(plain, to_double(call))),
        strict=True,
    ):
        assert_within_rule(a, b, truth, "wide")


def test_gradient_that_is_expanded_or_missing() -> None:
    x, residual, shift, scale = (
        t.requires_grad_() for t in (rows(3, 17, 9), rows(3, 17, 9, seed=4), rows(3, 9), rows(3, 9))
    )
    losses: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda out, summed: out.sum(),  # the upstream gradient is one expanded number
        lambda out, summed: summed.transpose(0, 1).reshape(-1).square().sum(),  # out got none, summed a strided one
        lambda out, summed: (out * summed).sum(),
    )
    for token_wise in (False, True):
        vectors = [t[:, None].expand(3, 17, 9) for t in (shift, scale)] if token_wise else [shift, scale]
        for loss in losses:
            wanted = (x, residual, shift, scale)
            ours = torch.autograd.grad(
                loss(*mk.modulate(x, *vectors, residual=residual, gate=shift)), wanted, allow_unused=True
            )
            theirs = torch.autograd.grad(
                loss(*reference.modulate(x, *vectors, residual=residual, gate=shift)), wanted, allow_unused=True
            )
            for a, b, tensor in zip(ours, theirs, wanted, strict=True):
                zero = torch.zeros_like(tensor)
                torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_unused_norm_sends_no_nan() -> None:
    """A row whose norm is NaN gives its sum's gradient untouched where the norm went unused."""
    x = rows(2, 5, 9)
    x[1, 2, 3] = torch.inf
    x.requires_grad_()
    _, summed = mk.add_layer_norm(x, rows(2, 5, 9))
    assert_same_bits(torch.autograd.grad(summed, x, torch.ones(2, 5, 9))[0], torch.ones(2, 5, 9), "gradient")


@pytest.mark.parametrize("wanted", ["x", "residual", "gate", "weight", "bias", "shift", "scale"])
def test_only_one_input_requires_grad(wanted: str) -> None:
    named = {name: rows(3, 9, seed=seed) for seed, name in enumerate(("gate", "shift", "scale"))}
    named |= {"weight": rows(9), "bias": rows(10)[1:], "x": rows(3, 17, 9), "residual": rows(3, 17, 9, seed=8)}
    named[wanted] = named[wanted].clone().requires_grad_()
    upstream = rows(3, 17, 9, seed=20)
    ours = torch.autograd.grad(mk.modulate(**named)[0], named[wanted], upstream)
    theirs = torch.autograd.grad(reference.modulate(**named)[0], named[wanted], upstream)
    torch.testing.assert_close(ours, theirs)


def test_layouts() -> None:
    """Operands with strides of their own, in five dimensions; nested and sparse tensors are refused."""
    x = rows(2, 3, 4, 5, 16).permute(0, 2, 1, 3, 4)
    residual = rows(4, 2, 5, 3, 16, seed=4).permute(1, 0, 3, 2, 4)
    gate = rows(2, 8, 16)[:, 3]
    shift, scale = rows(2, 32).chunk(2, 1)
    ours = mk.modulate(x, shift, scale, residual=residual, gate=gate)
    theirs = reference.modulate(x, shift, scale, residual=residual, gate=gate)
    torch.testing.assert_close(ours, theirs)
    nested = torch.nested.nested_tensor([rows(3, 8), rows(5, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^x: expected a dense"):
        mk.layer_norm(nested)
    with pytest.raises(TypeError, match=r"^weight: expected a dense"):
        mk.layer_norm(rows(3, 8), rows(8).to_sparse())


def test_explain_and_trace() -> None:
    x = rows(3, 8)
    explanation = mk.explain(mk.add_layer_norm, x, x)
    assert explanation.op == "add_layer_norm" and explanation.kernel == f"cpu/{runtime.isa()}"
    assert str(explanation).startswith("mk.add_layer_norm would run cpu/")
    runtime.last_kernels(clear=True)
    mk.add_layer_norm(x, x)
    assert runtime.last_kernels() == [("norm", explanation.kernel)]
    assert mk.explain("rms_norm", x.double()).kernel == "cpu/generic"


def test_new_sizes_do_not_recompile() -> None:
    """Sizes are symbolic: after one dynamic compilation no batch and no number of tokens makes another."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(mk.modulate, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens in ((2, 17), (5, 29), (3, 50), (7, 33)):
        x, shift, scale = rows(batch, tokens, 8), rows(batch, 8), rows(batch, 8, seed=4)
        assert_same_bits(compiled(x, shift, scale), mk.modulate(x, shift, scale), "compiled")
    assert counter.frame_count == 1


def test_exports() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            normed, summed = mk.add_rms_norm(self.norm(x), x)
            return normed + summed

    block, x = Block(), rows(6, 17, 8)
    program = torch.export.export(block, (x,))
    assert_same_bits(program.module()(x), block(x), "exported")


def test_inference_mode_and_no_grad() -> None:
    x = rows(6, 8).requires_grad_()
    with torch.inference_mode():
        assert not mk.layer_norm(x).requires_grad
    with torch.no_grad():
        assert not mk.add_rms_norm(x, x)[0].requires_grad
    assert all(t.requires_grad for t in mk.add_rms_norm(x, x))
    assert all(t.requires_grad for t in mk.add_layer_norm(x.detach(), x.detach(), rows(8).requires_grad_())[:1])


def test_the_same_tensor_as_x_and_residual() -> None:
    x = rows(6, 17, 8).requires_grad_()
    upstream = (rows(6, 17, 8, seed=4), rows(6, 17, 8, seed=5))
    ours = torch.autograd.grad(mk.add_layer_norm(x, x), x, upstream)
    theirs = torch.autograd.grad(reference.add_layer_norm(x, x), x, upstream)
    torch.testing.assert_close(ours, theirs)


def test_changing_the_sum_before_backward_is_noticed() -> None:
    x = rows(6, 8).requires_grad_()
    normed, summed = mk.add_layer_norm(x, rows(6, 8))
    summed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


def test_autocast_leaves_the_dtype_on_the_cpu() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in DTYPES:
            x = rows(3, 8, dtype=dtype)
            assert mk.layer_norm(x).dtype == F.layer_norm(x, (8,)).dtype == dtype
            assert mk.rms_norm(x).dtype == F.rms_norm(x, (8,)).dtype == dtype


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ours, theirs", [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)])
def test_modules_are_torchs(ours: Any, theirs: Any, affine: bool) -> None:
    """They load torch's weights, and give torch's results, with kernels and without."""
    plain = theirs(12, elementwise_affine=affine)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    x = rows(3, 5, 12)
    for kernels in (True, False):
        module = ours(12, elementwise_affine=affine, kernels=kernels)
        module.load_state_dict(plain.state_dict())
        assert isinstance(module, theirs) and f"kernels={kernels}" in repr(module)
        torch.testing.assert_close(module(x), plain(x))
        half = module.bfloat16()(x.bfloat16())
        torch.testing.assert_close(half, theirs.forward(plain.bfloat16(), x.bfloat16()), rtol=0.02, atol=0.02)
        plain.float()


def test_rms_norm_without_eps() -> None:
    """eps None is the machine epsilon of the input, which a row of tiny numbers shows."""
    x = torch.full((2, 8), 1e-4)
    torch.testing.assert_close(RMSNorm(8)(x), nn.RMSNorm(8)(x))
    assert not torch.allclose(RMSNorm(8)(x), RMSNorm(8, eps=1e-5)(x))


def test_raw_operator_refuses_what_does_not_fit() -> None:
    """What a compiled graph calls: the kernel's own checks raise RuntimeError and name the argument, never read wild."""
    x, vector = rows(3, 5, 8), rows(3, 8)
    good: dict[str, Tensor | None] = dict.fromkeys(("residual", "gate", "weight", "bias", "shift", "scale"))
    good |= {"x": x, "residual": x}

    def call(**changed: Any) -> None:
        t = {**good, **changed}
        torch.ops.mmkernels.norm(
            t["x"], t["residual"], t["gate"], t["weight"], t["bias"], t["shift"], t["scale"], 1e-6, 1.0, False, False
        )

    call()
    call(gate=vector, weight=x[0, 0], bias=x[0, 0], shift=vector, scale=vector[:, None])
    for changed, name in (
        ({"x": torch.tensor(1.0)}, "x"),
        ({"x": torch.zeros([1] * 17)}, "x"),
        ({"x": x.int()}, "x"),
        ({"x": x.transpose(1, 2)}, "x"),
        ({"residual": x[:2]}, "residual"),
        ({"residual": x.double()}, "residual"),
        ({"residual": x.transpose(1, 2).contiguous().transpose(1, 2)}, "residual"),
        ({"residual": None, "gate": vector}, "gate"),
        ({"gate": vector[:2]}, "gate"),
        ({"gate": vector.half()}, "gate"),
        ({"gate": vector[0]}, "gate"),
        ({"weight": x[0, 0, :3]}, "weight"),
        ({"bias": x[0, 0].double()}, "bias"),
        ({"shift": vector}, "scale"),
        ({"shift": vector, "scale": x}, "scale"),
        ({"shift": vector[None], "scale": vector[None]}, "shift"),
        ({"shift": torch.stack((vector, vector), 1), "scale": vector}, "shift"),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            call(**changed)


def test_raw_backward_refuses_what_does_not_fit() -> None:
    """The operator behind the gradients checks every tensor before a kernel writes."""
    x, vector = rows(3, 5, 8), rows(3, 8)
    good = {"grad_normed": x, "grad_summed": x, "normalised": x, "stats": rows(2, 15), "x": x, "gate": vector}
    good |= {"weight": x[0, 0], "bias": x[0, 0], "shift": vector, "scale": vector}

    def call(rms: bool = False, **changed: Any) -> None:
        tensors = {**good, **changed}
        torch.ops.mmkernels.norm_backward(*tensors.values(), 1.0, rms, True, True, True, True)

    call()
    for name, value in (
        ("grad_normed", x[:2]),
        ("grad_normed", x.transpose(0, 1).contiguous().transpose(0, 1)),
        ("grad_normed", x.double()),
        ("grad_summed", x.half()),
        ("stats", rows(2, 15).double()),
        ("stats", rows(1, 15)),
        ("x", None),
        ("x", x[:2]),
        ("gate", vector[:2]),
        ("weight", x[0, 0, :3]),
        ("bias", x[0, 0].double()),
        ("shift", x),
        ("scale", None),
    ):
        error = "scale" if name == "shift" else name
        with pytest.raises(RuntimeError, match=rf"mmkernels: {error}: "):
            call(**{name: value})
    with pytest.raises(RuntimeError, match="mmkernels: stats: "):
        call(rms=True)


def test_memory_that_cannot_be_had() -> None:
    """As torch says it, in the type that whoever looks for a batch size catches."""
    x = torch.zeros(2**10).expand(2**20, 2**20, 2**10)  # 4 PiB that take 4 KiB
    with pytest.raises(torch.OutOfMemoryError, match="an output of 4503599627370496 bytes"):
        mk.layer_norm(x)


def test_calls_from_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, shift, scale = rows(6, 50, 64), rows(6, 64), rows(6, 64, seed=4)
    expected = mk.modulate(x, shift, scale)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: mk.modulate(x, shift, scale), range(100)):
            assert_same_bits(out, expected, "from a thread")
