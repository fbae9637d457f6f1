"""Linear layers and MLPs beyond their cards: every edge of the blocks, packed weights, staleness, int8, special values."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits, assert_within_rule, bfloat16_kernel, gradients, to_double
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards.card import Call
from mmkernels.ops.backends import choose
from mmkernels.ops.linear import LINEAR_BACKENDS, MLP_BACKENDS
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference import linear as reference

SINGLE_AND_HALF = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def layer(rows: int, depth: int, cols: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, depth], weight [cols, depth], bias [cols]."""
    weight = drawn(cols, depth, dtype=torch.float32, seed=1) * max(1, depth) ** -0.5
    return drawn(rows, depth, dtype=dtype), weight.to(dtype), drawn(cols, dtype=dtype, seed=2)


def assert_all_within_rule(ours: list[Any], plain: list[Any], truth: list[Any], terms: Tensor, what: str) -> None:
    """The rule, for results that may be single numbers: where large terms cancel in one, torch's own may be right by luck,
    so the largest of all results, and the largest sum of a product's terms without their signs, give the scale."""
    scale = max(*(c.abs().max().item() for c in truth), terms.max().item())
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        assert_within_rule(a, b, c, f"result {i} of {what}", extra=2 * torch.finfo(a.dtype).eps * scale)


# --- every edge ---------------------------------------------------------------------------------------------------------
# Below, at and above every panel's and vector's size, and what lies between.
_SIZES = st.one_of(st.integers(1, 70), st.sampled_from((1, 3, 4, 6, 7, 8, 14, 15, 16, 17, 31, 32, 33, 48, 64, 70)))


@settings(max_examples=150, deadline=None)
@given(m=_SIZES, n=_SIZES, k=_SIZES, kind=st.sampled_from(DTYPES), isa=st.sampled_from(runtime.available_isas()))
def test_any_sizes(m: int, n: int, k: int, kind: torch.dtype, isa: str) -> None:
    """Forward and backward of any M, N and K, from a weight as it lies, transposed or packed: the rule, the same bits."""
    x, weight, bias = layer(m, k, n, kind)
    call = Call((x, weight, bias))
    with runtime.forced_isa(isa):
        ours = [mk.linear(x, weight, bias), *gradients(mk.linear, call)]
        assert_same_bits(ours[0], mk.linear(x, weight.t().contiguous().t(), bias), "transposed")
        assert_same_bits(ours[0], mk.linear(x, mk.pack_linear(weight, bias)), "packed")
    plain = [reference.linear(x, weight, bias), *gradients(reference.linear, call)]
    truth = [to_double(call).of(reference.linear), *gradients(reference.linear, to_double(call))]
    terms = x.double().abs() @ weight.double().abs().T
    assert_all_within_rule(ours, plain, truth, terms, f"{m} x {k} x {n}")


@settings(max_examples=40, deadline=None)
@given(m=_SIZES, n=_SIZES, k=_SIZES, h=_SIZES, gated=st.booleans(), kind=st.sampled_from(SINGLE_AND_HALF))
def test_any_mlp(m: int, n: int, k: int, h: int, gated: bool, kind: torch.dtype) -> None:
    x, w_in, b_in = layer(m, k, h, kind)
    _, w_out, b_out = layer(m, h, n, kind)
    kwargs: dict[str, Any] = {"activation": "silu"}
    if gated:
        kwargs |= {"w_gate": layer(m, k, h, kind)[1].flip(0), "b_gate": b_in.flip(0)}
    call = Call((x, w_in, w_out, b_in, b_out), kwargs)
    ours = [call.of(mk.mlp), *gradients(mk.mlp, call)]
    plain = [call.of(reference.mlp), *gradients(reference.mlp, call)]
    truth = [to_double(call).of(reference.mlp), *gradients(reference.mlp, to_double(call))]
    terms = (x.double().abs() @ w_in.double().abs().T) @ w_out.double().abs().T
    assert_all_within_rule(ours, plain, truth, terms, f"{m} x {k} x {h} x {n}")


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, isa: str) -> None:
    """A row alone gives the bits that it gives among others, whatever the blocks and groups."""
    x, weight, bias = layer(2000, 1100, 70, dtype)  # so many that threads keep to their own rows
    w_out = layer(1, 70, 40, dtype)[1]
    together, mlp = mk.linear(x, weight, bias, activation="gelu"), mk.mlp(x, weight, w_out, bias)
    for begin, end in ((0, 1), (1, 7), (7, 120), (120, 300), (1700, 2000)):
        assert_same_bits(mk.linear(x[begin:end], weight, bias, activation="gelu"), together[begin:end], "linear")
        assert_same_bits(mk.mlp(x[begin:end], weight, w_out, bias), mlp[begin:end], "mlp")
    assert_same_bits(mk.linear(x, weight[:33], bias[:33], activation="gelu"), together[:, :33].contiguous(), "columns")


@pytest.mark.parametrize("depth", [1, 2, 24, 31, 96, 128])
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_few_depths_give_the_bits_of_packed_rows(dtype: torch.dtype, depth: int, isa: str) -> None:
    """Rows that lie close together are multiplied where they are, rows far apart are packed; a last panel of a vector's
    columns or fewer has no second vector. What lies between the rows is not read."""
    for rows, cols in ((1, 5), (19, 16), (1500, 24), (1500, 48)):
        x, weight, bias = layer(rows, depth, cols, dtype)
        apart = torch.full((rows, 1200), torch.nan, dtype=dtype)[:, :depth].copy_(x)
        near = torch.full((rows, depth + 2), torch.nan, dtype=dtype)[:, :depth].copy_(x)
        wider = layer(1, depth, 70, dtype)[1]
        wider[:cols] = weight
        packed = mk.linear(apart, weight, bias, activation="gelu")
        for name, close in {"side by side": x, "near": near}.items():
            assert_same_bits(mk.linear(close, weight, bias, activation="gelu"), packed, name)
        assert_same_bits(mk.linear(x, wider)[:, :cols].contiguous(), mk.linear(x, weight), "columns of a wider layer")
        assert_within_rule(
            packed,
            *(reference.linear(*(t.to(d) for t in (x, weight, bias)), activation="gelu") for d in (dtype, torch.float64)),
            "packed",
        )


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_bits_do_not_depend_on_the_threads(dtype: torch.dtype, isa: str, threads: None) -> None:
    """Few rows (a task packs the weight's columns), many (the weight is packed once, threads keep to their own rows), packed
    and not; hidden activations that several threads put into one panel; gradients, of many rows too."""
    results: list[list[Tensor]] = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        made: list[Tensor] = []
        for rows in (100, 2000):
            x, weight, bias = layer(rows, 1100, 200, dtype)
            w_out = layer(1, 200, 40, dtype)[1]
            made += [mk.linear(x, weight, bias), mk.linear(x, mk.pack_linear(weight, bias)), mk.mlp(x, weight, w_out, bias)]
        made += [g for g in gradients(mk.linear, Call((x, weight, bias))) if g is not None]
        results.append(made)
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(a, b, f"result {i}")


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_go_where_torch_sends_them(dtype: torch.dtype, value: float, isa: str) -> None:
    x, weight, bias = layer(9, 40, 21, dtype)
    x[3, 5] = value
    wide = (x.double(), weight.double(), bias.double())  # torch's float32 gelu of infinity is NaN on some machines
    for activation in reference.ACTIVATIONS:
        ours, plain = mk.linear(x, weight, bias, activation=activation), reference.linear(*wide, activation=activation)
        assert torch.equal(ours.isfinite(), plain.isfinite()), activation
        assert torch.equal(ours.isnan(), plain.isnan()), activation
    weight[2, 7] = value
    assert torch.equal(mk.linear(x, weight).isfinite(), reference.linear(x, weight).isfinite())


def test_which_arguments_require_grad(isa: str) -> None:
    """Each alone: only the gradients that are wanted are made."""
    x, weight, bias = layer(9, 12, 7)
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": drawn(9, 7)}
    for wanted in tensors:
        ours = {name: t.clone().requires_grad_(name == wanted) for name, t in tensors.items()}
        theirs = {name: t.clone().requires_grad_(name == wanted) for name, t in tensors.items()}
        mk.linear(**ours, activation="gelu").square().sum().backward()
        reference.linear(**theirs, activation="gelu").square().sum().backward()
        torch.testing.assert_close(ours[wanted].grad, theirs[wanted].grad)


# --- packed weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_gives_the_same_bits(dtype: torch.dtype, isa: str) -> None:
    x, weight, bias = layer(37, 90, 53, dtype)
    packed = mk.pack_linear(weight, bias)
    assert_same_bits(mk.linear(x, packed, activation="silu"), mk.linear(x, weight, bias, activation="silu"), "linear")
    w_out = layer(1, 53, 20, dtype)[1]
    assert_same_bits(mk.mlp(x, packed, mk.pack_linear(w_out)), mk.mlp(x, weight, w_out, bias), "mlp")
    gate = weight.flip(0)
    assert_same_bits(
        mk.mlp(x, packed, w_out, w_gate=mk.pack_linear(gate)), mk.mlp(x, weight, w_out, bias, w_gate=gate), "gated"
    )
    assert_same_bits(mk.mlp(x, packed, w_out, w_gate=gate), mk.mlp(x, weight, w_out, bias, w_gate=gate), "half packed")


def test_bfloat16_has_products_of_its_own(isa: str) -> None:
    """Where the processor has them, packed or not, forward and backward; int8 weights beside bfloat16 are another's."""
    x, weight, bias = layer(9, 41, 37, torch.bfloat16)
    leaf = x.clone().requires_grad_()
    for w in (weight, mk.pack_linear(weight)):
        mk.last_kernels(clear=True)
        assert mk.explain(mk.linear, x, w).kernel == bfloat16_kernel()
        mk.linear(x, w)
        mk.linear(leaf, weight, bias).sum().backward()
        assert {kernel for op, kernel in mk.last_kernels() if "linear" in op} == {bfloat16_kernel()}
    assert "bf16" not in mk.explain(mk.linear, x, mk.pack_linear(weight, dtype=torch.int8)).kernel


def test_packed_weights_are_read() -> None:
    """The pack is what is multiplied: another weight's bytes under the same header give that weight's product."""
    x, weight, _ = layer(5, 30, 20)
    packed, other = mk.pack_linear(weight), mk.pack_linear(2 * weight)
    panels = packed.panels()
    assert panels is not None and other.panels() is not None
    panels[64:] = other.panels()[64:]
    assert_same_bits(mk.linear(x, packed), mk.linear(x, 2 * weight), "the other weight")


@pytest.mark.parametrize("dtype", [*SINGLE_AND_HALF, torch.int8], ids=str)
def test_a_weight_changed_in_place_is_never_served_stale(dtype: torch.dtype) -> None:
    x, weight, bias = layer(6, 40, 30)
    kind = torch.float32 if dtype == torch.int8 else dtype
    x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
    packed = mk.pack_linear(weight, bias, dtype=dtype)

    def fresh() -> Tensor:
        return mk.linear(x, mk.pack_linear(weight, bias, dtype=dtype))

    compiled = torch.compile(mk.linear, fullgraph=True, backend="aot_eager")
    compiled(x, packed)
    for change in (
        lambda: weight.mul_(2),
        lambda: weight[3].zero_(),
        lambda: torch.nn.init.ones_(weight),
        lambda: weight.copy_(drawn(*weight.shape)),
    ):
        change()
        assert_same_bits(compiled(x, packed), fresh(), "in a graph that was compiled before")
        assert_same_bits(mk.linear(x, packed), fresh(), "in place")
        assert_same_bits(compiled(x, packed), fresh(), "in a graph, packed again")
    weight.data = drawn(*weight.shape, seed=9).to(kind)  # other memory: seen by its address
    assert_same_bits(compiled(x, packed), fresh(), "other memory, in a graph")
    assert_same_bits(mk.linear(x, packed), fresh(), "other memory")
    weight.data.mul_(3)  # torch does not count this one
    packed.repack()
    assert_same_bits(mk.linear(x, packed), fresh(), "repacked")


def test_compiled_graphs_take_the_pack_as_an_input() -> None:
    x, weight, bias = layer(6, 40, 30)
    packed = mk.pack_linear(weight, bias)
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: mk.linear(x, packed), fullgraph=True, backend=backend)
    assert_same_bits(compiled(x), mk.linear(x, packed), "compiled")
    inputs = [node.meta["example_value"] for node in seen[0].graph.nodes if node.op == "placeholder"]
    assert any(value.dtype == torch.uint8 for value in inputs)
    assert not list(seen[0].buffers()) and not list(seen[0].parameters())


def test_copies_hold_the_plain_weight(isa: str) -> None:
    x, weight, bias = layer(6, 40, 30)
    packed = mk.pack_linear(weight, bias)
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(stream, weights_only=False)]
    for other in copies:
        assert other.weight.data_ptr() != weight.data_ptr()
        assert_same_bits(mk.linear(x, other), mk.linear(x, packed), "copy")
    weight.zero_()
    assert mk.linear(x, copies[0]).abs().sum() > 0, "a copy is of its own weight"
    assert pickle.dumps(packed).find(b"MMKpack1"[::-1]) < 0, "no tier's layout is pickled"
    with runtime.forced_isa("generic"):  # made for one tier, used in another
        assert_same_bits(mk.linear(x, packed), mk.linear(x, weight, bias), "another tier")


def test_gradients_go_to_the_plain_weight() -> None:
    x, weight, bias = (t.requires_grad_() for t in layer(6, 40, 30))
    upstream = drawn(6, 30)
    ours = torch.autograd.grad(mk.linear(x, mk.pack_linear(weight, bias), activation="gelu"), (x, weight, bias), upstream)
    theirs = torch.autograd.grad(mk.linear(x, weight, bias, activation="gelu"), (x, weight, bias), upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b, "gradient")


def test_weights_made_in_inference_mode() -> None:
    """Their writes are not counted, so the pack keeps a copy."""
    with torch.inference_mode():
        x, weight, bias = layer(6, 40, 30)
        expected = mk.linear(x, weight, bias)
        packed = mk.pack_linear(weight, bias)
        weight.zero_()
        assert_same_bits(mk.linear(x, packed), expected, "packed")


def test_bad_packs_are_refused() -> None:
    weight = drawn(6, 7)
    for arguments, error, name in (
        ({"weight": weight[0]}, ValueError, "weight"),
        ({"weight": weight.int()}, TypeError, "weight"),
        ({"weight": "w"}, TypeError, "weight"),
        ({"weight": weight, "bias": drawn(7)}, ValueError, "bias"),
        ({"weight": weight, "dtype": torch.int32}, TypeError, "dtype"),
        ({"weight": weight, "dtype": "int8"}, TypeError, "dtype"),
        ({"weight": weight.double(), "dtype": torch.int8}, TypeError, "dtype"),
    ):
        with pytest.raises(error, match=rf"^{name}: "):
            mk.pack_linear(**arguments)


def test_raw_operators_refuse_what_does_not_fit() -> None:
    """What compiled graphs call: checked in the kernel's entry, nothing is read or written wild."""
    x, weight, bias = layer(6, 40, 30)
    packed = mk.pack_linear(weight).panels()
    assert packed is not None
    ops = torch.ops.mmkernels

    def linear(**changed: Any) -> None:
        t = {"x": x, "weight": weight, "packed": packed, "current": None, "bias": bias, "residual": None, **changed}
        ops.linear(*t.values(), 2, False)

    linear()
    for changed, name in (
        ({"x": x[:, :3]}, "weight"),
        ({"weight": weight[:3]}, "packed"),
        ({"packed": packed[:100].clone()}, "packed"),
        ({"packed": packed[:10].clone()}, "packed"),
        ({"packed": torch.zeros_like(packed)}, "packed"),
        ({"packed": packed.view(torch.float32) if packed.numel() % 4 == 0 else x}, "packed"),
        ({"current": x}, "current"),
        ({"current": torch.ones(0, dtype=torch.bool)}, "current"),
        ({"bias": bias[:3]}, "bias"),
        ({"residual": x}, "residual"),
        ({"residual": drawn(6, 30, dtype=torch.bfloat16)}, "residual"),
        ({"x": x.int()}, "x"),
        ({"x": drawn(12, 80)[::2, ::2], "packed": None}, "x"),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            linear(**changed)
    for arguments in ((x, weight, None, None, None, None, 9, False), (x, weight, None, None, None, None, -1, False)):
        with pytest.raises(RuntimeError, match=r"mmkernels: activation: "):
            ops.linear(*arguments)
    with pytest.raises(RuntimeError, match=r"mmkernels: pre: "):
        ops.linear_backward(drawn(6, 30), x, weight, None, None, 2, True, True, False)
    with pytest.raises(RuntimeError, match=r"mmkernels: grad: "):
        ops.linear_backward(drawn(6, 29), x, weight, None, None, 0, True, True, False)
    with pytest.raises(RuntimeError, match=r"mmkernels: dtype: "):
        ops.pack_linear(weight, 1, 0)


# --- int8 ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_int8_against_float64(dtype: torch.dtype, isa: str) -> None:
    """The product of what was quantised is exact but for the last rounding; the quantisation itself errs by about 1 %."""
    x, weight, bias = layer(70, 300, 45, dtype)
    packed = mk.pack_linear(weight, bias, dtype=torch.int8)
    ours = mk.linear(x, packed).double()

    def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.float().abs().amax(1, keepdim=True) / 127
        return (rows.float() * (1 / scale)).round().clamp(-127, 127).double(), scale.double()

    (a, a_scale), (b, b_scale) = quantised(x), quantised(weight)
    exact = (a @ b.T) * a_scale * b_scale.T + bias.double()
    assert (ours - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    truth = reference.linear(x.double(), weight.double(), bias.double())
    error = ((ours - truth).norm() / truth.norm()).item()
    print(f"int8 {isa} {dtype}: relative error {error:.4f}")
    assert error < 0.015
    w_out = layer(1, 45, 20, dtype)[1]
    hidden = mk.linear(x, packed, activation="gelu")
    mlp = mk.mlp(x, packed, mk.pack_linear(w_out, dtype=torch.int8)).double()
    expected = reference.linear(hidden.double(), w_out.double())
    assert (mlp - expected).norm() / expected.norm() < 0.02
    # Either product alone: the hidden activations go into panels, or are quantised row by row.
    for w_in, last in ((packed, w_out), (mk.pack_linear(weight, bias), mk.pack_linear(w_out, dtype=torch.int8))):
        mixed = mk.mlp(x, w_in, last).double()
        assert (mixed - expected).norm() / expected.norm() < 0.02


def test_int8_rows_of_special_values(isa: str) -> None:
    x, weight, _ = layer(5, 40, 30)
    x[0], x[1, 3], x[2, 4] = 0, torch.nan, torch.inf
    weight[7] = 0
    out = mk.linear(x, mk.pack_linear(weight, dtype=torch.int8))
    assert out[0].abs().max() == 0 and out[1].isnan().all() and out[2].isnan().all()
    assert out[3:].isfinite().all() and out[3:, 7].abs().max() == 0


def test_int8_gradients_are_those_of_the_plain_weight() -> None:
    x, weight, bias = (t.requires_grad_() for t in layer(6, 40, 30))
    packed = mk.pack_linear(weight, bias, dtype=torch.int8)
    upstream = drawn(6, 30)
    for a, b in zip(
        torch.autograd.grad(mk.linear(x, packed), (x, weight, bias), upstream),
        torch.autograd.grad(mk.linear(x, weight, bias), (x, weight, bias), upstream),
        strict=True,
    ):
        assert_same_bits(a, b, "gradient")


# --- around torch -------------------------------------------------------------------------------------------------------
def test_new_sizes_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda *args: mk.mlp(*args), fullgraph=True, dynamic=True, backend=counter)
    for rows, depth, hidden, cols in ((5, 9, 20, 11), (17, 12, 33, 8), (40, 30, 21, 5)):
        x, w_in, b_in = layer(rows, depth, hidden)
        w_out = layer(1, hidden, cols)[1]
        assert_same_bits(compiled(x, w_in, w_out, b_in), mk.mlp(x, w_in, w_out, b_in), "compiled")
    assert counter.frame_count == 1


def test_exports() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(40, 30)

        def forward(self, x: Tensor) -> Tensor:
            return mk.linear(x, self.layer.weight, self.layer.bias, activation="gelu")

    block, x = Block(), drawn(6, 40)
    program = torch.export.export(block, (x,))
    assert_same_bits(program.module()(x), block(x), "exported")


def test_autocast_uses_a_pack_of_its_dtype() -> None:
    x, weight, bias = layer(6, 40, 30)
    for packed in (mk.pack_linear(weight, bias, dtype=torch.bfloat16), mk.pack_linear(weight, bias)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = mk.linear(x, packed), mk.linear(x, weight, bias)
        assert ours.dtype == torch.bfloat16
        assert_same_bits(ours, theirs, "under autocast")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        residual = mk.linear(x, weight, residual=drawn(6, 30))
    assert residual.dtype == torch.float32, "torch's own sum of bfloat16 and float32"


def test_threads_of_python() -> None:
    """Many Python threads at once: each has working memory of its own."""
    from concurrent.futures import ThreadPoolExecutor

    x, weight, bias = layer(50, 64, 96)
    w_out = layer(1, 96, 64)[1]
    expected = mk.mlp(x, weight, w_out, bias)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: mk.mlp(x, weight, w_out, bias), range(100)):
            assert_same_bits(out, expected, "from a thread")


def test_memory_of_an_mlp_does_not_grow_with_the_rows() -> None:
    """No tensor of hidden activations is made where no gradient is wanted."""
    import resource

    w_in, w_out = layer(1, 8, 4096)[1], layer(1, 4096, 8)[1]
    mk.mlp(drawn(512, 8), w_in, w_out)
    x = torch.zeros(40_000, 8)  # hidden activations would take 655 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mk.mlp(x, w_in, w_out)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 64, f"{grown:.0f} MB"


def test_explain_knows_packs_and_says_what_is_left_to_torch() -> None:
    x, weight, bias = layer(6, 40, 30)
    assert mk.explain(mk.linear, x, mk.pack_linear(weight, bias)).kernel == f"cpu/{min_isa()}"
    assert mk.explain("mlp", x, weight, weight.t()).kernel == f"cpu/{min_isa()}"
    with FakeTensorMode():
        there = [torch.empty(shape, device="cuda") for shape in ((6, 40), (30, 40), (40, 30))]
        assert str(choose("linear", LINEAR_BACKENDS, {"x": there[0]})).splitlines() == [
            "mk.linear would run torch: a plain matrix product is best left to cuBLAS",
            "  not cpu: x is on cuda",
        ]
        gated = choose("mlp", MLP_BACKENDS, {"x": there[0], "w_gate": there[1]})
        plain = choose("mlp", MLP_BACKENDS, {"x": there[0], "w_gate": None})
    assert gated.kernel == "triton" and plain.kernel == "torch" and "cuBLAS" in str(plain)


def min_isa() -> str:
    return "avx512" if runtime.isa() == "amx" else runtime.isa()
