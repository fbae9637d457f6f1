"""MoE: when the experts' weights are packed, and that no call is served an old pack."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_same_bits
from test_nn_linear import Graphs, Ops, by_bytes, by_file, by_pickle
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.nn import MoE, repack

C, H, E = 24, 40, 4
WEIGHTS = ("w_in", "w_out", "w_gate")


@pytest.fixture(autouse=True)
def _alone(threads: None) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch._dynamo.reset()


def experts(**options: Any) -> MoE:
    """In eval mode, frozen, so that packs serve."""
    options = {"gated": True, "activation": "silu", "bias": True, **options}
    return MoE(C, H, E, 2, **options).eval().requires_grad_(False)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def packs(module: MoE) -> list[mk.PackedLinear | None]:
    return [pack._packed for pack in module._expert_packs.values()]


def taken(module: nn.Module, x: Tensor) -> int:
    """How many packs moe_mlp was called with."""
    with Ops() as seen:
        module(x)
    return next(count for name, count in seen.ran if name == "moe_mlp")


def unpacked(module: MoE, x: Tensor, **other: Tensor) -> Tensor:
    """What the weights as they are now give, or these others."""
    return mk.moe_mlp(x, module.route(x), activation=module.activation, **{**module.expert_weights(), **other})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [5, 150])
def test_packs_change_no_bit(dtype: torch.dtype, count: int, isa: str) -> None:
    for options in ({}, {"bias": False}, {"gated": False, "out_dim": 17}):
        module, x = experts(dtype=dtype, **options), tokens(count, C, dtype=dtype)
        assert taken(module, x) == (3 if module.gated else 2)
        assert_same_bits(module(x), unpacked(module, x), str(options))


def test_eval_packs_and_train_drops() -> None:
    module, x = MoE(C, H, E, 2, gated=True).requires_grad_(False), tokens(3, C)
    assert packs(module) == [None] * 3 and taken(module, x) == 0 and packs(module) == [None] * 3
    nn.Sequential(module).eval()  # a parent's eval() reaches it
    first = packs(module)
    assert None not in first and taken(module, x) == 3
    module.eval()
    assert all(a is b for a, b in zip(packs(module), first, strict=True))
    module.train()
    assert packs(module) == [None] * 3 and taken(module, x) == 0
    module.eval().kernels = False
    module.eval()
    assert packs(module) == [None] * 3
    module.kernels = True
    assert taken(module, x) == 3


def test_a_call_that_wants_a_gradient_of_a_weight_takes_it_unpacked() -> None:
    module, x = experts(), tokens(3, C)
    module.w_out.requires_grad_()
    assert taken(module, x) == 2
    module(x).sum().backward()
    assert module.w_out.grad is not None
    with torch.no_grad():
        assert taken(module, x) == 3
    module.requires_grad_(False)
    x.requires_grad_()
    assert taken(module, x) == 3
    given = torch.autograd.grad(module(x).sum(), x)[0]
    wanted = torch.autograd.grad(unpacked(module, x).sum(), x)[0]
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_changed_weight_is_never_served_stale(name: str) -> None:
    module, x = experts(), tokens(7, C)
    weight, bias = module.get_parameter(name), module.get_parameter(f"b{name[1:]}")

    def check(packed: int = 3) -> None:
        out = module(x)
        assert not torch.equal(out, before[-1])
        assert_same_bits(out, unpacked(module, x), "as the weights are now")
        assert taken(module, x) == packed
        before.append(out)

    before = [module(x)]
    weight.mul_(2)
    check()
    weight.detach()[1, 3] = 7  # shares the counter
    check()
    bias.add_(3)
    check()
    for _ in range(4):  # the allocator soon gives the address of the first weight again
        weight.data = weight.data * 1.5
        weight.data = weight.data * 1.5
        check()
    weight.data.mul_(2)  # nobody counts this
    module.repack()
    check()
    weight.numpy()[:] *= 0.5
    assert repack(module) is module
    check()
    setattr(module, name, nn.Parameter(weight * 0.5, requires_grad=False))
    module(x)
    check()
    # Contiguous over the experts alone: a pack of it would be of a copy.
    module.get_parameter(name).data = weight.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    check(2)
    module.get_parameter(name).mul_(3)
    check(2)
    assert module._expert_packs[name[2:]]._packed.weight is module.get_parameter(name), "none of a copy"


def test_other_weights_for_one_call() -> None:
    module, x = experts(), tokens(5, C)
    before = module(x)
    other = {"w_in": module.w_in * 2}
    out = torch.func.functional_call(module, other, (x,))
    assert not torch.equal(out, before)
    assert_same_bits(out, unpacked(module, x, **other), "the weights of the call")
    assert_same_bits(module(x), before, "its own again")


def test_loading_and_conversion_pack_anew() -> None:
    module, x = experts(), tokens(5, C)
    old = packs(module)
    module.load_state_dict(MoE(C, H, E, 2, gated=True, bias=True).state_dict())
    for new, previous, name in zip(packs(module), old, module._expert_packs, strict=True):
        assert (
            new is not None and new is not previous and new.weight is module.get_parameter(f"w_{name}") and new.is_current()
        )
    assert_same_bits(module(x), unpacked(module, x), "loaded")
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        module.to(dtype)
        assert all(pack is not None and pack.dtype == dtype and pack.is_current() for pack in packs(module))
        assert_same_bits(module(x.to(dtype)), unpacked(module, x.to(dtype)), str(dtype))
    assert packs(module.to("meta")) == [None] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file])
def test_copies_have_packs_of_their_own(copied: Callable[[nn.Module], Any]) -> None:
    module, x = experts(), tokens(3, C)
    before, twin = module(x), copied(module)
    for a, b, name in zip(packs(module), packs(twin), module._expert_packs, strict=True):
        assert b is not None and b is not a and b.weight is twin.get_parameter(f"w_{name}")
    assert_same_bits(twin(x), before, "copy")
    twin.w_in.zero_()
    assert_same_bits(module(x), before, "the original")
    assert not torch.equal(twin(x), before)


def test_files_hold_the_plain_weights_alone() -> None:
    module = MoE(64, 64, E, 2)
    for save in (pickle.dumps, by_bytes):
        without = len(save(module.train()))
        assert len(save(module.eval())) <= without + 8
    assert list(module.state_dict()) == ["router", "w_in", "w_out"] and not list(module.buffers())


def test_compiled_right_after_eval_with_packs_as_inputs() -> None:
    module, x, graphs = experts(), tokens(5, C), Graphs()
    compiled = graphs.compile(module)
    with torch.no_grad():
        assert_same_bits(compiled(x), module(x), "compiled")
        assert graphs.packs() == 3
        module.w_gate.mul_(2)  # the graph looks while it runs
        assert_same_bits(compiled(x), unpacked(module, x), "written to")
    assert len(graphs.graphs) == 1


def test_int8() -> None:
    module, x = experts(packed_dtype=torch.int8, shared_hidden=16), tokens(50, C)
    truth = copy.deepcopy(module).double()
    truth.kernels = False
    wanted = truth(x.double())
    assert taken(module, x) == 3 and all(pack.dtype == torch.int8 for pack in packs(module))
    assert module.shared.fc2.packed_dtype == torch.int8
    error = (module(x).double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert 1e-4 < error < 0.03, "quantised, and no worse than 8 bits make it"
    assert taken(copy.deepcopy(module), x) == 3 and copy.deepcopy(module).packed_dtype == torch.int8
    with pytest.raises(ValueError, match=r"packed_dtype: expected None .* or torch.int8, got torch.bfloat16"):
        MoE(C, H, E, 2, packed_dtype=torch.bfloat16)
    for options in ({"lora_rank": 2}, {"schedule": "streaming", "experts": {}}):
        with pytest.raises(ValueError, match="packed_dtype: expected None with schedule 'streaming' or a lora_rank"):
            MoE(C, H, E, 2, packed_dtype=torch.int8, **options)


def test_low_rank_additions_are_not_packed() -> None:
    module, x = experts(lora_rank=2), tokens(5, C)
    assert taken(module, x) == 0 and packs(module) == [None] * 3
    before = module(x)
    module.lora_up_in.fill_(0.1)
    assert not torch.equal(module(x), before)
