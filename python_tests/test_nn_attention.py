"""MultiheadAttention and CrossAttention: against torch's module and a plain formula, and when their weights are packed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_bits, assert_within_rule
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mk
from mmkernels.nn import CrossAttention, LayerNorm, Linear, MultiheadAttention, repack

E, H, N, L, S = 24, 4, 3, 5, 7  # channels, heads, batch, queries, keys


@pytest.fixture(autouse=True)
def _alone(threads: None) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch._dynamo.reset()


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Operators(TorchDispatchMode):
    """The operators that ran, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((op._schema.name, args))
        return op(*args, **(kwargs or {}))


def ops(module: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, int]]:
    """The operators of this package that a call ran, and how many packs each took."""
    with Operators() as operators:
        module(*args, **kwargs)
    return [
        (name.removeprefix("mmkernels::"), sum(isinstance(arg, Tensor) and arg.dtype == torch.uint8 for arg in args))
        for name, args in operators.seen
        if name.startswith("mmkernels::")
    ]


# --- the calls on which both modules agree ----------------------------------------------------------------------------
def ignored(*shape: int) -> Tensor:
    """Bool, True = ignore; every query sees the first key."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[..., 0] = False
    return mask


def causal(length: int = L, keys: int | None = None) -> Tensor:
    return torch.ones(length, length if keys is None else keys, dtype=torch.bool).triu(1)


# name: (options of the constructor, "self" | "cross" | "three" | "alone" (cross, of one sequence), arguments of forward)
Case = tuple[dict[str, Any], str, dict[str, Tensor | bool]]
CASES: dict[str, Case] = {
    "self": ({}, "self", {}),
    "self_batch_first": ({"batch_first": True}, "self", {}),
    "self_no_bias": ({"bias": False}, "self", {}),
    "self_causal": ({"batch_first": True}, "self", {"attn_mask": causal(), "is_causal": True}),
    "self_causal_float": ({}, "self", {"attn_mask": tokens(L, L).masked_fill(causal(), -torch.inf)}),
    "self_causal_padding": (
        {"batch_first": True},
        "self",
        {"attn_mask": causal(), "is_causal": True, "key_padding_mask": ignored(N, L)},
    ),
    "self_causal_bias_kv": ({"add_bias_kv": True}, "self", {"attn_mask": causal(), "is_causal": True}),
    "cross": ({}, "cross", {}),
    "cross_batch_first": ({"batch_first": True, "bias": False}, "cross", {}),
    "cross_causal": ({"batch_first": True}, "cross", {"attn_mask": causal(L, S), "is_causal": True}),
    "three": ({"batch_first": True}, "three", {}),
    "kdim_vdim": ({"kdim": 20, "vdim": 28, "batch_first": True}, "three", {"attn_mask": ignored(L, S)}),
    "kdim_vdim_no_bias": ({"kdim": 20, "vdim": 20, "bias": False}, "cross", {}),
    "bias_kv": ({"add_bias_kv": True, "batch_first": True}, "cross", {}),
    "zero_attn": ({"add_zero_attn": True}, "cross", {"key_padding_mask": tokens(N, S)}),
    "both_extra_bool": (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        "cross",
        {"attn_mask": ignored(N * H, L, S), "key_padding_mask": ignored(N, S)},
    ),
    "both_extra_float": (
        {"add_bias_kv": True, "add_zero_attn": True},
        "three",
        {"attn_mask": tokens(N * H, L, S), "key_padding_mask": tokens(N, S)},
    ),
    "padding_bool": ({"batch_first": True}, "cross", {"key_padding_mask": ignored(N, S)}),
    "padding_float": ({}, "cross", {"key_padding_mask": tokens(N, S).masked_fill(ignored(N, S), -torch.inf)}),
    "mask_bool_2d": ({}, "cross", {"attn_mask": ignored(L, S)}),
    "mask_bool_3d": ({"batch_first": True}, "cross", {"attn_mask": ignored(N * H, L, S)}),
    "mask_float_2d": ({"batch_first": True}, "cross", {"attn_mask": tokens(L, S)}),
    "mask_float_3d": ({}, "cross", {"attn_mask": tokens(N * H, L, S)}),
    "masks_bool": ({}, "cross", {"attn_mask": ignored(L, S), "key_padding_mask": ignored(N, S)}),
    "masks_float": ({}, "cross", {"attn_mask": tokens(L, S), "key_padding_mask": tokens(N, S)}),
    "masks_bool_float": ({}, "cross", {"attn_mask": ignored(L, S), "key_padding_mask": tokens(N, S)}),
    "masks_float_bool": ({}, "cross", {"attn_mask": tokens(N * H, L, S), "key_padding_mask": ignored(N, S)}),
    "sees_nothing": ({}, "cross", {"attn_mask": ignored(L, S) | (torch.arange(L) == 2)[:, None]}),
    "alone": ({}, "alone", {}),
    "alone_batch_first": ({"batch_first": True, "add_bias_kv": True}, "alone", {"attn_mask": tokens(H, L, S)}),
    "alone_masks": ({"batch_first": True}, "alone", {"attn_mask": ignored(H, L, S), "key_padding_mask": ignored(S)}),
}


def operands(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """query, or query and key, or query, key and value."""
    options, kind, _ = case
    if kind == "self":
        return [tokens(N, L, E, dtype=dtype) if options.get("batch_first") else tokens(L, N, E, dtype=dtype)]
    channels = {"cross": (E, options.get("kdim", E)), "alone": (E, E)}.get(
        kind, (E, options.get("kdim", E), options.get("vdim", E))
    )
    made = []
    for seed, (length, c) in enumerate(zip((L, S, S), channels, strict=False)):
        shape = (length,) if kind == "alone" else (N, length) if options.get("batch_first") else (length, N)
        made.append(tokens(*shape, c, dtype=dtype, seed=seed))
    return made


def triple(given: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value: the last of those given stands for the others."""
    query, key, value = [*given, given[-1], given[-1]][:3]
    return query, key, value


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def outputs(module: nn.Module, case: Case, dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of inputs, float masks and parameters; operands in dtype, rounded to another first."""
    given = [tensor.to(dtype).requires_grad_() for tensor in operands(case, rounded)]
    arguments = in_dtype(in_dtype(case[2], rounded), dtype)
    wanted = {f"grad of input {i}": tensor for i, tensor in enumerate(given)}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = wanted[f"grad of {name}"] = value.detach().clone().requires_grad_()
    wanted |= {f"grad of {name}": parameter for name, parameter in module.named_parameters()}
    query, key, value = triple(given)
    out, weights = module(query, key, value, need_weights=False, **arguments)
    assert weights is None
    upstream = tokens(*out.shape, dtype=rounded).to(dtype)
    grads = torch.autograd.grad(out, list(wanted.values()), upstream, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted.values(), strict=True)]
    return {"output": out.detach(), **dict(zip(wanted, zeros, strict=True))}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torchs_module(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    theirs = nn.MultiheadAttention(E, H, dtype=dtype, **case[0])
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = MultiheadAttention(E, H, dtype=dtype, **case[0])
    ours.load_state_dict(theirs.state_dict())
    oracle = outputs(copy.deepcopy(theirs).double(), case, torch.float64, dtype)
    plain, actual = outputs(theirs, case, dtype, dtype), outputs(ours, case, dtype, dtype)
    assert actual.keys() == oracle.keys()
    for what, value in actual.items():
        assert value.dtype == plain[what].dtype
        assert_within_rule(value, plain[what], oracle[what], what)
    for what, value in outputs(ours.eval(), case, dtype, dtype).items():
        assert_same_bits(value, actual[what], f"in eval mode, {what}")
    query, key, value = triple(operands(case, dtype))
    arguments = in_dtype(case[2], dtype)
    with torch.no_grad():  # with packs
        out = ours(query, key, value, need_weights=False, **arguments)[0]
        assert_within_rule(out, plain["output"], oracle["output"], "without gradients")
        products = {"self": 1, "cross": 2, "alone": 2, "three": 3}[case[1]] + ("vdim" in case[0] and case[1] == "cross")
        packed = case[1] == "self"
        expected = [("linear", int(packed))] * products + [("attention", 0), ("linear", 1)]
        assert ops(ours, query, key, value, need_weights=False, **arguments) == expected
        ours.kernels = False
        assert ops(ours, query, key, value, need_weights=False, **arguments) == []


def test_the_kernels_that_ran() -> None:
    module, x = MultiheadAttention(E, H).eval(), tokens(L, N, E)
    module(x, x, x, need_weights=False)
    ran = mk.last_kernels()[-3:]
    assert [name for name, _ in ran] == ["linear", "attention", "linear"]
    assert all(kernel.startswith("cpu/") for _, kernel in ran), ran
    module.train()(x, x, x, need_weights=False)[0].sum().backward()
    ran = mk.last_kernels()[-3:]
    assert [name for name, _ in ran] == ["linear_backward", "attention_backward", "linear_backward"]
    assert all(kernel.startswith("cpu/") for _, kernel in ran), ran


def test_projections_are_views() -> None:
    """One product, whose output attention reads in place, whatever the layout; its output is not copied where the batch
    comes first."""
    for batch_first in (True, False):
        module = MultiheadAttention(E, H, batch_first=batch_first).eval().requires_grad_(False)
        x, y = tokens(N, L, E), tokens(N, S, E)
        for key, shared in ((x, True), (y, False)):
            if not batch_first and not shared:
                key = tokens(S, L, E)
            with Operators() as operators:
                out, _ = module(x, key, key, need_weights=False)
            copies = [name for name, _ in operators.seen if name in ("aten::clone", "aten::copy_", "aten::cat")]
            assert len(copies) == (0 if batch_first else 1), copies
            (operands,) = (args[:3] for name, args in operators.seen if name == "mmkernels::attention")
            of_q, of_k, of_v = (tensor.untyped_storage().data_ptr() for tensor in operands)
            assert of_k == of_v and (of_q == of_k) == shared
            assert out.is_contiguous()


def test_weights_come_from_torchs_own_forward() -> None:
    theirs, ours = nn.MultiheadAttention(E, H), MultiheadAttention(E, H)
    ours.load_state_dict(theirs.state_dict())
    x = tokens(L, N, E)
    for arguments in ({}, {"average_attn_weights": False}, {"key_padding_mask": ignored(N, L)}):
        assert ops(ours, x, x, x, **arguments) == []
        for a, b in zip(ours(x, x, x, **arguments), theirs(x, x, x, **arguments), strict=True):
            assert_same_bits(a, b, "torch's own")


def test_is_an_nn_multihead_attention() -> None:
    for options in ({}, {"kdim": 8, "vdim": 12}, {"bias": False}, {"add_bias_kv": True}):
        torch.manual_seed(1)
        ours = MultiheadAttention(E, H, **options)
        torch.manual_seed(1)
        theirs = nn.MultiheadAttention(E, H, **options)
        assert isinstance(ours, nn.MultiheadAttention)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
        assert list(ours.eval().state_dict()) == list(theirs.state_dict()) and not list(ours.buffers())
        theirs.load_state_dict(ours.state_dict())
    with torch.device("meta"):
        module = MultiheadAttention(E, H, dtype=torch.bfloat16).eval()
        x = torch.empty(L, N, E, dtype=torch.bfloat16)
        assert module(x, x, x, need_weights=False)[0].shape == x.shape
    assert "kernels=True" in repr(module)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_torchs_encoder_layer(norm_first: bool, batch_first: bool) -> None:
    options = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    theirs = nn.TransformerEncoderLayer(E, H, **options)
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(E, H, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    x, padding = tokens(N, N, E), ignored(N, N)
    for arguments in ({}, {"src_key_padding_mask": padding}, {"src_mask": causal(N), "is_causal": True}):
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            out = module(x, **arguments)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert [name for name, _ in ops(ours, x, **arguments)] == ["linear", "attention", "linear"]
    with torch.no_grad():  # torch's own fast path reads the weights, and calls nobody
        wanted = theirs.eval()(x)
        torch.testing.assert_close(ours.eval()(x), wanted, rtol=1e-4, atol=1e-4)
        assert len(ops(ours, x)) == (0 if batch_first else 3)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert ops(ours, x) == [("linear", 1), ("attention", 0), ("linear", 1)]
            torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-4)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


# --- packs ------------------------------------------------------------------------------------------------------------
def by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def by_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def itself(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x, x, x, need_weights=False) if isinstance(module, MultiheadAttention) else module(x)
    return out[0] if isinstance(out, tuple) else out


def wanted_of(module: nn.Module, x: Tensor) -> Tensor:
    """What torch's module gives, with the weights as they are now."""
    theirs = nn.MultiheadAttention(E, H)
    theirs.load_state_dict(module.state_dict())
    return theirs(x, x, x, need_weights=False)[0].detach()


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file])
def test_copies_have_packs_of_their_own(copied: Callable[[nn.Module], Any]) -> None:
    x = tokens(N, L, E)
    for module in (MultiheadAttention(E, H), CrossAttention(E, H, qk_norm=True)):
        module.eval().requires_grad_(False)
        before = itself(module, x)
        twin = copied(module)
        assert type(twin) is type(module) and twin.kernels
        if isinstance(module, MultiheadAttention):
            assert twin._pack._packed is not None and twin._pack._packed is not module._pack._packed
            assert twin._pack._packed.weight is twin.in_proj_weight
        assert_same_bits(itself(twin, x), before, "copy")
        for parameter in twin.parameters():
            parameter.zero_()
        assert_same_bits(itself(module, x), before, "the original")
        assert itself(twin, x).abs().max() == 0
    without = len(pickle.dumps(MultiheadAttention(E, H)))
    assert len(pickle.dumps(MultiheadAttention(E, H).eval())) <= without + 8


def test_a_changed_weight_is_never_served_stale() -> None:
    module, x = MultiheadAttention(E, H).eval().requires_grad_(False), tokens(L, N, E)

    def check(packs: int = 1) -> None:
        wanted = wanted_of(module, x)
        torch.testing.assert_close(itself(module, x), wanted, rtol=1e-4, atol=1e-4)
        assert ops(module, x, x, x, need_weights=False)[0] == ("linear", packs)

    check()
    module.in_proj_weight.mul_(2)
    check()
    module.in_proj_bias.add_(1)
    check()
    module.in_proj_weight.data = module.in_proj_weight.data * 1.5
    check()
    module.load_state_dict(nn.MultiheadAttention(E, H).state_dict())
    check()
    module.in_proj_weight.data.mul_(2)  # not counted
    assert repack(nn.Sequential(module)) is not None
    check()
    module.train()
    assert module._pack._packed is None
    module.in_proj_weight.data.mul_(2)
    module.eval()
    check()
    module.requires_grad_(True)
    check(packs=0)  # it is about to be trained
    module.requires_grad_(False)
    wanted = wanted_of(module, x).double()
    assert module.double()._pack._packed.dtype == torch.float64
    torch.testing.assert_close(itself(module, x.double()), wanted, rtol=1e-4, atol=1e-4)
    module.kernels = False
    assert not module.out_proj.kernels
    module.eval()
    assert module._pack._packed is None and module.out_proj._pack._packed is None
    assert MultiheadAttention(E, H, kdim=8).eval()._pack._packed is None


# --- compiled, autocast, transforms -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["self", "both_extra_bool"])
def test_compiled(name: str) -> None:
    case = CASES[name]
    module = MultiheadAttention(E, H, **case[0]).eval()
    query, key, value = triple(operands(case, torch.float32))
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(
            call(query, key, value, need_weights=False, **case[2])[0],
            module(query, key, value, need_weights=False, **case[2])[0],
            "compiled",
        )
        for parameter in module.parameters():
            parameter.mul_(2)
        assert_same_bits(
            call(query, key, value, need_weights=False, **case[2])[0],
            module(query, key, value, need_weights=False, **case[2])[0],
            "after a write",
        )
    results = []
    for each in (call, module):
        module.zero_grad()
        each(query, key, value, need_weights=False, **case[2])[0].square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_cross_attention() -> None:
    module = CrossAttention(E, H, num_kv_heads=2, kv_dim=20, qk_norm=True).eval()
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = {"mask": ~ignored(L, S), "bias": tokens(H, L, S)}
    x, context = tokens(N, L, E), tokens(N, S, 20)
    with torch.no_grad():
        assert_same_bits(call(x, context, **arguments), module(x, context, **arguments), "compiled")
    results = []
    for each in (call, module):
        module.zero_grad()
        each(x, context, **arguments).square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_is_drawn_anew() -> None:
    module, x = MultiheadAttention(E, H, dropout=0.5).train(), tokens(L, N, E)
    call = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], fullgraph=True, backend="aot_eager")
    assert not torch.equal(call(x), call(x))
    call(x).sum().backward()
    assert module.in_proj_weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["self_batch_first", "mask_float_3d", "both_extra_bool"])
def test_autocast(name: str) -> None:
    case = CASES[name]
    theirs, ours = nn.MultiheadAttention(E, H, **case[0]).eval(), MultiheadAttention(E, H, **case[0]).eval()
    ours.load_state_dict(theirs.state_dict())
    query, key, value = triple(operands(case, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (m(query, key, value, need_weights=False, **case[2])[0] for m in (ours, theirs))
    assert a.dtype == b.dtype == torch.bfloat16
    oracle = copy.deepcopy(theirs).double()
    wanted = oracle(*(t.double() for t in (query, key, value)), **in_dtype(case[2], torch.float64))[0]
    assert_within_rule(a, b, wanted, "autocast")
    cross = CrossAttention(E, H).eval()
    with torch.autocast("cpu", torch.bfloat16):
        x = tokens(N, L, E)
        on = cross(x)
        cross.kernels = False
        assert on.dtype == cross(x).dtype == torch.bfloat16
        assert_within_rule(on, cross(x), copy.deepcopy(cross).double()(x.double()), "autocast")


class Tagged(Tensor):
    """A subclass that its own functions keep."""


def test_other_tensors_run_plain_torch() -> None:
    for module in (MultiheadAttention(E, H, batch_first=True).eval(), CrossAttention(E, H).eval()):
        x = tokens(N, L, E)
        out = itself(module, x.as_subclass(Tagged))
        assert type(out) is Tagged
        torch.testing.assert_close(out.as_subclass(Tensor), itself(module, x))
    module = MultiheadAttention(E, H, batch_first=True).eval().requires_grad_(False)
    x = torch.nested.nested_tensor([tokens(3, E), tokens(5, E)])
    assert itself(module, x).is_nested


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_what_may_stand_in_the_place_of_the_weights() -> None:
    module, x = MultiheadAttention(E, H).eval().requires_grad_(False), tokens(L, N, E)
    other = {name: nn.Parameter(value * 2, False) for name, value in module.named_parameters()}
    twin = copy.deepcopy(module)
    twin.load_state_dict(other)
    own = module._pack._packed
    out = torch.func.functional_call(module, other, (x, x, x), {"need_weights": False})[0]
    torch.testing.assert_close(out, itself(twin, x))
    assert module._pack._packed is own
    module.in_proj_weight.mul_(2)
    wanted = itself(module, x)
    module.in_proj_weight.div_(2)
    parametrize.register_parametrization(module, "in_proj_weight", Scaled())
    torch.testing.assert_close(itself(module.eval(), x), wanted)
    assert ops(module, x, x, x, need_weights=False)[0] == ("linear", 0) and module._pack._packed is None
    gradient = torch.func.grad(lambda x: itself(twin, x).sum())(x)
    x = x.clone().requires_grad_()
    itself(twin, x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)


# --- dropout ----------------------------------------------------------------------------------------------------------
def test_dropout() -> None:
    """Values of one and a uniform softmax: an output is the sum of the weights that are kept."""
    p, keys = 0.3, 64
    multihead = MultiheadAttention(E, H, dropout=p, batch_first=True)
    cross = CrossAttention(E, H, dropout=p)
    with torch.no_grad():
        for parameter in (*multihead.parameters(), *cross.parameters()):
            parameter.zero_()
        multihead.in_proj_bias[2 * E :] = 1
        cross.v.bias.fill_(1)
        for layer in (multihead.out_proj, cross.proj):
            layer.weight.copy_(torch.eye(E))
    x = torch.zeros(8, keys, E)
    for module in (multihead, cross):
        for kernels in (True, False):
            module.kernels = kernels
            torch.manual_seed(1)
            first = itself(module.train(), x)
            assert not torch.equal(itself(module, x), first)  # drawn anew
            torch.manual_seed(1)
            assert torch.equal(itself(module, x), first)  # from torch's generator
            assert not torch.equal(first[0], first[1]) and not torch.equal(first[..., 0], first[..., E // H])
            kept = first[..., :: E // H] * keys * (1 - p)  # of 64, binomial
            torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
            assert abs(kept.mean().item() - keys * (1 - p)) < 0.5
            assert abs(kept.var().item() - keys * p * (1 - p)) < 1.5
            torch.testing.assert_close(itself(module.eval(), x), torch.ones_like(x))
    everything = MultiheadAttention(E, H, dropout=1.0).train()
    assert itself(everything, x).abs().max() == 0 and ops(everything, x, x, x, need_weights=False) == []


def test_dropout_has_its_gradient() -> None:
    module = MultiheadAttention(8, 2, dropout=0.4, dtype=torch.float64).train()
    x = tokens(4, 2, 8, dtype=torch.float64).requires_grad_()

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return itself(module, x)

    assert torch.autograd.gradcheck(call, (x,))


def test_nothing_to_do() -> None:
    theirs, cross = nn.MultiheadAttention(E, H), CrossAttention(E, H)
    ours = MultiheadAttention(E, H)
    ours.load_state_dict(theirs.state_dict())
    for length, keys, batch in ((0, S, N), (L, S, 0), (L, 0, N)):
        x, y = tokens(length, batch, E), tokens(keys, batch, E)
        out = ours(x, y, y, need_weights=False)[0]
        assert out.shape == x.shape
        if keys > 0:
            torch.testing.assert_close(out, theirs(x, y, y, need_weights=False)[0])
        else:
            torch.testing.assert_close(out, ours.out_proj.bias.expand_as(x))
        assert cross(x.transpose(0, 1), y.transpose(0, 1)).shape == (batch, length, E)


# --- cross attention --------------------------------------------------------------------------------------------------
CROSS: dict[str, tuple[dict[str, Any], dict[str, Tensor], int]] = {  # options, arguments, queries
    "plain": ({}, {}, L),
    "one_query": ({"qkv_bias": True}, {}, 1),
    "other_width": ({"kv_dim": 20, "qkv_bias": False, "proj_bias": False}, {}, L),
    "heads": ({"kv_dim": 20, "head_dim": 16, "num_kv_heads": 2}, {"mask": ~ignored(N, 1, L, S)}, L),
    "one_kv_head": ({"num_kv_heads": 1, "qk_norm": True}, {"bias": tokens(H, L, S)}, L),
    "mask_and_bias": ({"qk_norm": True}, {"mask": ~ignored(L, S), "bias": tokens(N, 1, 1, S)}, L),
    "sees_nothing": ({}, {"mask": ~ignored(L, S) & (torch.arange(L) != 2)[:, None], "bias": tokens(L, S)}, L),
}


def formula(module: CrossAttention, x: Tensor, context: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    def heads(layer: nn.Linear, x: Tensor, norm: nn.Module, count: int) -> Tensor:
        x = F.linear(x, layer.weight, layer.bias).unflatten(-1, (count, module.head_dim))
        if isinstance(norm, LayerNorm):
            x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-5)
        return x.transpose(1, 2).repeat_interleave(module.num_heads // count, 1)

    q = heads(module.q, x, module.q_norm, module.num_heads)
    k = heads(module.k, context, module.k_norm, module.num_kv_heads)
    v = heads(module.v, context, nn.Identity(), module.num_kv_heads)
    scores = q @ k.transpose(-1, -2) * module.head_dim**-0.5
    scores = scores if bias is None else scores + bias
    weights = scores.softmax(-1)
    if mask is not None:
        weights = scores.masked_fill(~mask, -1e30).softmax(-1) * mask.any(-1, keepdim=True)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return F.linear(out, module.proj.weight, module.proj.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_is_the_plain_formula(name: str, dtype: torch.dtype) -> None:
    options, given, queries = CROSS[name]
    module = CrossAttention(E, H, dtype=dtype, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    oracle = copy.deepcopy(module).double()
    x, context = tokens(N, queries, E, dtype=dtype), tokens(N, S, module.kv_dim, dtype=dtype, seed=6)
    given = {"mask": None, "bias": None, **in_dtype(given, dtype)}

    def results(call: Callable[..., Tensor], module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, context)]
        arguments = dict(given)
        if arguments["bias"] is not None:
            arguments["bias"] = arguments["bias"].detach().to(dtype).requires_grad_()
        wanted = [*leaves, *([] if arguments["bias"] is None else [arguments["bias"]]), *module.parameters()]
        out = call(*leaves, **arguments)
        upstream = tokens(*out.shape, dtype=x.dtype).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]

    names = ["output", "grad x", "grad context", *["grad bias"] * (given["bias"] is not None)]
    names += [name for name, _ in module.named_parameters()]
    exact = results(lambda *a, **k: formula(oracle, *a, **k), oracle, torch.float64)
    plain = results(lambda *a, **k: formula(module, *a, **k), module, dtype)
    # A bias of the keys moves all scores of a query alike: its gradient is 0, and errs as that of the weight beside it.
    scale = dict(zip(names, (2 * torch.finfo(dtype).eps * tensor.abs().max().item() for tensor in exact), strict=True))
    for kernels in (True, False):
        module.kernels = kernels
        for what, a, b, c in zip(names, results(module, module, dtype), plain, exact, strict=True):
            extra = scale[what.replace("bias", "weight")] if what in ("k.bias", "k_norm.bias") else 0.0
            assert_within_rule(a, b, c, f"{what}, kernels={kernels}", extra=extra)
    module.kernels = True
    module.eval()
    with torch.no_grad():  # with packs
        assert_within_rule(module(x, context, **given), plain[0], exact[0], "without gradients")
        kinds = [entry for entry in ops(module, x, context, **given) if entry[0] != "norm"]
        assert kinds == [("linear", 1)] * 3 + [("attention", 0), ("linear", 1)]
        module.kernels = False
        assert ops(module, x, context, **given) == []


def test_cross_attention_alone() -> None:
    module, x = CrossAttention(E, H).eval(), tokens(N, L, E)
    assert_same_bits(module(x), module(x, x), "context=None")
    names = [f"{name}.{kind}" for name in ("q", "k", "v", "q_norm", "k_norm", "proj") for kind in ("weight", "bias")]
    assert list(CrossAttention(E, H, qk_norm=True).state_dict()) == names
    assert list(module.state_dict()) == [name for name in names if "norm" not in name]
    assert CrossAttention(E, H, head_dim=16, num_kv_heads=2).k.weight.shape == (32, E)
    eight_bits = CrossAttention(E, H, packed_dtype=torch.int8).eval()
    eight_bits.load_state_dict(module.state_dict())
    error = (eight_bits(x) - module(x)).norm() / module(x).norm()
    assert 0 < error < 3e-2
    assert all(layer.packed_dtype == torch.int8 for layer in eight_bits.modules() if isinstance(layer, Linear))
    assert "num_kv_heads=4" in repr(module)


def test_whoever_listens_to_a_layer_hears_it() -> None:
    module, x = CrossAttention(E, H, qk_norm=True).eval(), tokens(N, L, E)
    for name, child in module.named_children():
        heard: list[Tensor] = []
        hook = child.register_forward_hook(lambda module, args, out, heard=heard: heard.append(out))
        module(x)
        hook.remove()
        assert len(heard) == 1, name


# --- errors -----------------------------------------------------------------------------------------------------------
def test_errors_of_multihead_attention() -> None:
    module = MultiheadAttention(E, H, kdim=20, vdim=28)
    query, key, value = tokens(L, N, E), tokens(S, N, 20), tokens(S, N, 28)
    bad: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, r"query: expected 3 dimensions, .* got shape \(5, 3, 24, 1\)", (query[..., None], key, value), {}),
        (ValueError, "key: expected 3 dimensions, as query has", (query, key[0], value), {}),
        (ValueError, "query: expected 24 channels", (query[..., 1:], key, value), {}),
        (ValueError, "key: expected 20 channels", (query, query, value), {}),
        (ValueError, "value: expected 28 channels", (query, key, key), {}),
        (ValueError, "key: expected the batch of query, 3, got 2", (query, key[:, 1:], value[:, 1:]), {}),
        (ValueError, "value: expected key's shape", (query, key, value[1:]), {}),
        (ValueError, r"key_padding_mask: expected shape \(3, 7\)", (query, key, value), {"key_padding_mask": ignored(S, N)}),
        (ValueError, r"attn_mask: expected shape \(5, 7\) or \(12, 5, 7\), got \(7, 5\)", (query, key, value),
         {"attn_mask": ignored(S, L)}),
        (ValueError, "attn_mask: expected shape", (query, key, value), {"attn_mask": ignored(N, L, S)}),
        (ValueError, "attn_mask: expected shape", (query, key, value), {"attn_mask": ignored(N, H, L, S)}),
        (TypeError, "attn_mask: expected bool or floats, got torch.int64", (query, key, value),
         {"attn_mask": ignored(L, S).long()}),
        (ValueError, "attn_mask: expected the mask that is_causal", (query, key, value), {"is_causal": True}),
        (TypeError, "weight: expected the dtype of x", (query.double(), key.double(), value.double()), {}),
    ]  # fmt: skip
    for error, match, args, kwargs in bad:
        with pytest.raises(error, match=match):
            module(*args, need_weights=False, **kwargs)
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(7,\)"):
        module(query[:, 0], key[:, 0], value[:, 0], key_padding_mask=ignored(N, S), need_weights=False)
    with pytest.raises(AssertionError, match="divisible"):
        MultiheadAttention(E, 5)


def test_errors_of_cross_attention() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim, 24, got 5"):
        CrossAttention(E, 5)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads, 4, got 3"):
        CrossAttention(E, H, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\), got 1.0"):
        CrossAttention(E, H, dropout=1.0)
    with pytest.raises(ValueError, match="packed_dtype"):
        CrossAttention(E, H, packed_dtype=torch.bfloat16)
    for kernels in (True, False):
        module = CrossAttention(E, H, kv_dim=20, kernels=kernels)
        with pytest.raises(ValueError, match=r"x: expected \[B, L, 24\], got shape \(5, 24\)"):
            module(tokens(L, E), tokens(N, S, 20))
        with pytest.raises(ValueError, match=r"context: expected \[B, L, 20\], got shape \(3, 5, 24\)"):
            module(tokens(N, L, E))
    module.kernels = True
    with pytest.raises(ValueError, match="k: expected the batch of q, 3, got 2"):
        module(tokens(N, L, E), tokens(2, S, 20))
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool"):
        module(tokens(N, L, E), tokens(N, S, 20), mask=torch.ones(L, S))
    with pytest.raises(ValueError, match="bias: expected a shape broadcastable"):
        module(tokens(N, L, E), tokens(N, S, 20), bias=torch.ones(S, L))
