"""The generic suite: what every op must do, read off its card. A new family is tested by declaring its card."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    CPU,
    as_tuple,
    assert_same_bits,
    assert_within_rule,
    check_autocast,
    cotangents,
    differentiable,
    draw,
    gradients,
    is_dense,
    leaves,
    sample_ids,
    to_double,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmkernels as mk
from mmkernels import runtime
from mmkernels.bench.contest import contestant_names
from mmkernels.cards import all_cards, card_of
from mmkernels.cards.card import BadInput, Call, Card, Sample
from mmkernels.ops import entry
from mmkernels.ops.backends import Explanation

CARDS = all_cards()


def over_samples(*, full: bool = False, keep: Any = lambda sample: True) -> pytest.MarkDecorator:
    pairs = [(card, sample) for card, sample in sample_ids(CARDS, full=full) if keep(sample)]
    return pytest.mark.parametrize(("card", "sample"), pairs, ids=[f"{c.name}-{s.name}".replace(" ", "_") for c, s in pairs])


over_cards = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
over_differentiable_cards = pytest.mark.parametrize(
    "card", [card for card in CARDS if card.differentiable], ids=lambda card: card.name
)


def of_first(card: Card, call: Call) -> tuple[Callable[[Tensor], Any], Tensor]:
    """The op as a function of the first argument that can have a gradient, and this argument."""
    position = next(i for i, a in enumerate(call.args) if isinstance(a, Tensor) and a.is_floating_point())

    def function(x: Tensor) -> Any:
        return card.function(*call.args[:position], x, *call.args[position + 1 :], **call.kwargs)

    return function, call.args[position]


def run_all(card: Card, call: Call) -> list[Any]:
    """Outputs and gradients."""
    return [*as_tuple(call.of(card.function)), *gradients(card.function, call)]


# --- forward and backward against float64 -------------------------------------------------------------------------------
def check_forward(card: Card, sample: Sample, dtype: torch.dtype, isa: str) -> None:
    call = draw(sample, dtype)
    versions = [t._version for t in call.tensors()]
    before = [t.clone() for t in call.tensors()]
    runtime.last_kernels(clear=True)
    with runtime.poisoned_outputs():
        outputs = as_tuple(call.of(card.function))
    # Several public ops may share one operator, whose name is then none of theirs.
    forward = {name.removeprefix("mmkernels::") for name in card.ops if not name.endswith("_backward")}
    ran = [kernel for op, kernel in runtime.last_kernels() if op in forward]
    expected = mk.explain(card.function, *call.args, **call.kwargs)
    assert ran == [expected.kernel], f"ran {ran}, explain said {expected.kernel}"
    tier = expected.kernel.removeprefix("cpu/").removesuffix("_bf16")
    assert expected.kernel.startswith("cpu/") and tier in runtime.ISA_NAMES
    if dtype != torch.float64:
        # A fast path cannot rot into a lower tier unseen: at least AVX2 runs as itself, AMX may run AVX-512.
        assert tier == isa or isa == "amx"

    plain, oracle = as_tuple(call.of(card.reference)), as_tuple(to_double(call).of(card.reference))
    assert len(outputs) == len(plain)
    for i, (ours, theirs, truth) in enumerate(zip(outputs, plain, oracle, strict=True)):
        if theirs is None:
            assert ours is None
            continue
        assert ours.dtype == theirs.dtype and ours.device == theirs.device
        assert is_dense(ours)
        assert all(ours.data_ptr() != t.data_ptr() or t.numel() == 0 for t in call.tensors()), "an output aliases an input"
        assert_within_rule(ours, theirs, truth, f"output {i}")
    assert versions == [t._version for t in call.tensors()]
    for tensor, copy in zip(call.tensors(), before, strict=True):
        assert_same_bits(tensor, copy, "an input changed")


@over_samples()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward(card: Card, sample: Sample, dtype: torch.dtype, isa: str) -> None:
    if dtype in card.dtypes:
        check_forward(card, sample, dtype, isa)


@over_samples()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_writing_past_the_cache(card: Card, sample: Sample, dtype: torch.dtype, isa: str) -> None:
    """What calls beyond the cache's size do, at every sample's size; and the same bits as through the cache."""
    with runtime.assumed_cache_bytes(0):
        check_forward(card, sample, dtype, isa)
        check_backward(card, sample, dtype)
        past = run_all(card, draw(sample, dtype))
    for i, (a, b) in enumerate(zip(past, run_all(card, draw(sample, dtype)), strict=True)):
        assert_same_bits(a, b, f"result {i}")


@pytest.mark.full
@over_samples(full=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_of_big_samples(card: Card, sample: Sample, dtype: torch.dtype, isa: str) -> None:
    check_forward(card, sample, dtype, isa)


def check_backward(card: Card, sample: Sample, dtype: torch.dtype) -> None:
    call = draw(sample, dtype)
    upstream = cotangents(as_tuple(call.of(card.reference)))
    with runtime.poisoned_outputs():
        ours = gradients(card.function, call, upstream)
    plain = gradients(card.reference, call, upstream)
    oracle = gradients(card.reference, to_double(call), upstream)
    for i, (gradient, theirs, truth) in enumerate(zip(ours, plain, oracle, strict=True)):
        assert (gradient is None) == (truth is None), f"gradient {i}"
        if gradient is not None:
            assert gradient.dtype == theirs.dtype
            assert_within_rule(gradient, theirs, truth, f"gradient {i}")


@over_samples()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_backward(card: Card, sample: Sample, dtype: torch.dtype, isa: str) -> None:
    if dtype in card.dtypes:
        check_backward(card, sample, dtype)


@pytest.mark.full
@over_samples(full=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_of_big_samples(card: Card, sample: Sample, dtype: torch.dtype, isa: str) -> None:
    check_backward(card, sample, dtype)


@over_samples(keep=lambda sample: sample.gradcheck)
def test_gradcheck(card: Card, sample: Sample) -> None:
    """The op's own backward in float64 against finite differences of its own forward."""
    call, wanted = leaves(draw(sample, torch.float64))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        replaced = iter(tensors)
        outputs = call.map_tensors(lambda t: next(replaced) if t.is_floating_point() else t).of(card.function)
        return tuple(differentiable(as_tuple(outputs)))

    dense = [t.detach().contiguous().requires_grad_() for t in wanted]  # finite differences need memory of their own
    assert torch.autograd.gradcheck(function, dense, fast_mode=True)


@over_differentiable_cards
def test_second_derivative_is_right_or_refused(card: Card) -> None:
    sample = next((s for s in card.samples if s.name == "small"), card.samples[0])
    call, wanted = leaves(draw(sample, torch.float64))
    outputs = differentiable(as_tuple(call.of(card.function)))
    upstream = [u.requires_grad_() for u in cotangents(outputs)]
    first = torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True)
    first = tuple(gradient for gradient in first if gradient is not None)
    if card.twice_differentiable:
        again = torch.autograd.grad([g.square().sum() for g in first], upstream)
        reference_call, reference_wanted = leaves(draw(sample, torch.float64))
        reference = differentiable(as_tuple(reference_call.of(card.reference)))
        their_first = torch.autograd.grad(reference, reference_wanted, upstream, create_graph=True)
        theirs = torch.autograd.grad([g.square().sum() for g in their_first], upstream)
        for ours, expected in zip(again, theirs, strict=True):
            torch.testing.assert_close(ours, expected)
    else:
        for sources in (wanted, upstream):
            with pytest.raises(NotImplementedError, match="twice"):
                torch.autograd.grad([g.square().sum() for g in first], sources, retain_graph=True, allow_unused=True)


@over_differentiable_cards
def test_activation_checkpointing(card: Card) -> None:
    """torch.utils.checkpoint computes again what backward reads, and lets it read that once."""
    call = draw(next((s for s in card.samples if s.name == "small"), card.samples[0]), torch.float32)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(card.function, *args, use_reentrant=False, **kwargs)

    expected = gradients(card.function, call)
    for i, (ours, theirs) in enumerate(zip(gradients(checkpointed, call), expected, strict=True)):
        assert_same_bits(ours, theirs, f"gradient {i}")
    inside, wanted = leaves(call)
    outputs = differentiable(as_tuple(inside.of(checkpointed)))
    again = torch.autograd.grad(outputs, wanted, cotangents(outputs), create_graph=True, allow_unused=True)
    for i, (ours, theirs) in enumerate(zip(again, expected, strict=True)):
        assert_same_bits(ours, theirs, f"gradient {i} under create_graph")


# --- bits ---------------------------------------------------------------------------------------------------------------
@over_cards
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(card: Card, dtype: torch.dtype, isa: str, threads: None) -> None:
    sample = next(s for s in reversed(card.samples) if not s.gradcheck and not s.full and "ViT" in s.name)
    call = draw(sample, dtype)
    torch.set_num_threads(1)
    expected = run_all(card, call)
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        for i, (once, again) in enumerate(zip(expected, run_all(card, call), strict=True)):
            assert_same_bits(once, again, f"result {i} with {count} threads")


@over_cards
def test_tiers_agree(card: Card) -> None:
    """The tiers sum in different orders, so they differ by rounding; each is within the rule, so twice the rule apart."""
    for sample in card.samples:
        if sample.full:
            continue
        call = draw(sample, torch.float32)
        oracle, plain = as_tuple(to_double(call).of(card.reference)), as_tuple(call.of(card.reference))
        for name in runtime.available_isas():
            with runtime.forced_isa(name):
                for ours, theirs, truth in zip(as_tuple(call.of(card.function)), plain, oracle, strict=True):
                    if ours is not None:
                        assert_within_rule(ours, theirs, truth, f"{sample.name} on {name}")


# --- bad input ----------------------------------------------------------------------------------------------------------
BAD = [(card, bad) for card in CARDS for bad in card.bad_inputs]
over_bad_inputs = pytest.mark.parametrize(("card", "bad"), BAD, ids=[f"{c.name}-{b.name}".replace(" ", "_") for c, b in BAD])


@over_bad_inputs
def test_bad_input_names_the_argument(card: Card, bad: BadInput) -> None:
    call = bad.make(CPU)
    with pytest.raises(bad.error, match=rf"^{bad.argument}: ") as caught:
        call.of(card.function)
    assert type(caught.value) is bad.error
    assert len(str(caught.value)) > len(bad.argument) + 12, "a message says what it takes and what it got"


@over_bad_inputs
def test_explain_refuses_what_the_call_refuses(card: Card, bad: BadInput) -> None:
    call = bad.make(CPU)
    with pytest.raises(bad.error, match=rf"^{bad.argument}: "):
        mk.explain(card.function, *call.args, **call.kwargs)


# --- torch's own machinery ----------------------------------------------------------------------------------------------
class RecordOperators(TorchDispatchMode):
    """Collects the calls of mmkernels' operators, with copies of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mmkernels":
            self.calls.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args), kwargs))
        return func(*args, **kwargs)


OPCHECKED = (
    "small",
    "expert choice",
    "odd sizes",
    "joint row",
    "no rows",
    "no weight, no bias",
    "normed only",
    "packed, everything",
)


@over_samples(keep=lambda s: s.name in OPCHECKED)
def test_opcheck(card: Card, sample: Sample) -> None:
    with RecordOperators() as recorded:
        gradients(card.function, draw(sample, torch.float32))
    assert {func._schema.name for func, _, _ in recorded.calls} <= set(card.ops)
    for func, args, kwargs in recorded.calls:
        differentiable = "backward" not in func._schema.name
        args = tuple(
            a.requires_grad_() if differentiable and isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        )
        torch.library.opcheck(func, args, kwargs)


@over_cards
def test_every_operator_of_the_card_is_checked(card: Card) -> None:
    with RecordOperators() as recorded:
        for sample in card.samples:
            if sample.name in OPCHECKED:
                gradients(card.function, draw(sample, torch.float32))
    assert {func._schema.name for func, _, _ in recorded.calls} == set(card.ops)


@over_samples(keep=lambda s: s.name in ("small", "joint row"))
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(card: Card, sample: Sample, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(card.function, fullgraph=True, backend=backend)
    call = draw(sample, torch.float32)
    for eager, other in zip(as_tuple(call.of(card.function)), as_tuple(call.of(compiled)), strict=True):
        assert_same_bits(eager, other, "output")
    for eager, other in zip(gradients(card.function, call), gradients(compiled, call), strict=True):
        assert_same_bits(eager, other, "gradient")


@over_cards
def test_bad_input_raises_in_a_compiled_graph(card: Card) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(card.function, fullgraph=True, backend="eager")
    bad = next(b for b in card.bad_inputs if b.name == "frames do not divide the batch" or b.error is ValueError)
    with pytest.raises(Exception, match=bad.argument):
        bad.make(CPU).of(compiled)


@over_samples(keep=lambda s: s.name in ("small", "float32 parameters"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_gives_what_torch_gives(card: Card, sample: Sample, dtype: torch.dtype) -> None:
    check_autocast(card, draw(sample, dtype))


@over_cards
def test_functorch_transforms(card: Card) -> None:
    """torch.func.grad gives the same gradients; vmap works, or raises."""
    function, first = of_first(card, draw(card.samples[0], torch.float32))

    def loss(x: Tensor) -> Tensor:
        return sum(o.square().sum() for o in as_tuple(function(x)) if isinstance(o, Tensor))

    if card.differentiable:
        x = first.clone().requires_grad_()
        expected = torch.autograd.grad(loss(x), x)[0]
        torch.testing.assert_close(torch.func.grad(loss)(first), expected)

    stacked = torch.stack((first, 2 * first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it loops
        together = torch.func.vmap(lambda v: as_tuple(function(v))[0])(stacked)
    for one, value in zip(together, stacked, strict=True):
        torch.testing.assert_close(one, as_tuple(function(value))[0])


@over_differentiable_cards
def test_forward_mode_is_refused(card: Card) -> None:
    function, first = of_first(card, draw(card.samples[0], torch.float32))
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            function(x)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp"):
        torch.func.jvp(lambda v: as_tuple(function(v))[0], (first,), (torch.ones_like(first),))


@over_differentiable_cards
def test_compiled_around_functorch(card: Card) -> None:
    """torch.compile around torch.func.grad steps out to eager code and is right; around jvp it raises, never answers 0."""
    of_one, first = of_first(card, draw(card.samples[0], torch.float32))

    def function(x: Tensor) -> Tensor:
        return as_tuple(of_one(x))[0]

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda value: function(value).square().sum())(x)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo says that it steps out
        compiled = torch.compile(gradient, backend="aot_eager")(first)
        torch.testing.assert_close(compiled, gradient(first))
        torch._dynamo.reset()
        tangent = torch.compile(lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1], backend="aot_eager")
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            tangent(first)


@over_differentiable_cards
def test_second_derivative_through_the_operator(card: Card) -> None:
    """What compiled and exported graphs call is as honest as the eager function: right, or refused."""
    sample = card.samples[0]
    with RecordOperators() as recorded:
        leaves(draw(sample, torch.float64))[0].of(card.function)
    func, args, kwargs = recorded.calls[0]
    args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    output = as_tuple(func(*args, **kwargs))[0]
    first = torch.autograd.grad(output.square().sum(), args[0], create_graph=True)[0]
    if card.twice_differentiable:
        assert torch.autograd.grad(first.square().sum(), args[0])[0].abs().sum() > 0
    else:
        with pytest.raises(NotImplementedError, match="twice"):
            torch.autograd.grad(first.square().sum() + args[0].sum(), args[0])


# --- fallbacks ----------------------------------------------------------------------------------------------------------
@over_cards
def test_reference_takes_over_where_no_kernel_can(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel takes a call, the operator runs the reference, warns once, and refuses under MMKERNELS_STRICT=1."""
    elsewhere = Explanation(card.name, "reference", {"cpu": "x is elsewhere", "reference": None})
    monkeypatch.setattr(entry, "choose", lambda op, backends, arguments: elsewhere)
    for sample in card.samples:
        if sample.full or "ViT" in sample.name:
            continue
        with RecordOperators() as recorded:
            gradients(card.function, draw(sample, torch.float32))
        for func, args, kwargs in recorded.calls:
            expected = as_tuple(func(*args, **kwargs))
            fallback = entry.PYTHON_KERNELS[func._schema.name]
            runtime.last_kernels(clear=True)
            runtime._warn_once.cache_clear()
            with (
                pytest.warns(mk.FallbackWarning, match="slow reference: cpu: x is elsewhere"),
                torch._C._AutoDispatchBelowAutograd(),  # where eager calls run it
            ):
                got = as_tuple(fallback(*args, **kwargs))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # once is enough
                fallback(*args, **kwargs)
            assert {kernel for _, kernel in runtime.last_kernels()} == {"reference"}
            monkeypatch.setenv("MMKERNELS_STRICT", "1")
            with pytest.raises(RuntimeError, match="MMKERNELS_STRICT"):
                fallback(*args, **kwargs)
            monkeypatch.delenv("MMKERNELS_STRICT")
            for ours, theirs in zip(expected, got, strict=True):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


# --- what the card promises ---------------------------------------------------------------------------------------------
@over_cards
def test_docstring_and_names(card: Card) -> None:
    documentation = inspect.getdoc(card.function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in documentation, f"mk.{card.name} has no {section}"
    for parameter in inspect.signature(card.function).parameters:
        assert parameter in documentation, f"mk.{card.name} does not document {parameter}"
    assert getattr(mk, card.name) is card.function, "a public op is reached as mk.<name>"
    assert card_of(card.name) is card and card_of(card.function) is card


@over_cards
def test_card_is_whole(card: Card) -> None:
    names = [s.name for s in card.samples]
    assert len(names) == len(set(names)) and len(card.bad_inputs) > 5 and card.bench and card.systems
    for case in card.bench:
        assert case.target is not None or case.devices == ("cuda",)  # there some lines only inform
        if case.target is not None:
            # A target that names "sdpa" means "sdpa:flash" and the others too.
            contestants = {part for name in contestant_names(case) for part in (name, name.partition(":")[0])}
            assert set(case.target.peers) <= contestants and bool(case.target.peers) == (case.target.of == "peers")
