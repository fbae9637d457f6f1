"""Experts spread over processes: the numbers of one process, gradients, ranks without tokens, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from support import assert_same_bits, assert_within_rule
from torch import Tensor

import mmkernels as mk
from mmkernels.nn import MoE

C, H, N, E = 12, 20, 9, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 2},
    "gated": {"top_k": 3, "gated": True, "activation": "silu", "bias": True, "out_dim": N, "shared_hidden": 7},
    "softmax": {"top_k": 2, "kind": "softmax_topk", "bias": True, "num_tasks": 2},
    "one_slot": {"top_k": 1, "kind": "sigmoid_topk"},
    "top_p": {"top_k": None, "kind": "softmax_topk", "top_p": 0.5, "normalize": True},
    "lora": {"top_k": 2, "gated": True, "lora_rank": 3, "lora_alpha": 6.0},
}
COUNTS = (7, 0, 12, 1)  # of the ranks' tokens


def of_experts(name: str) -> bool:
    return name[:2] in ("w_", "b_") or name.startswith("lora_")


def modules(name: str, rank: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[MoE, MoE]:
    """All experts in one process, and this rank's share of them."""
    torch.manual_seed(4)
    whole = MoE(C, H, E, **OPTIONS[name])
    with torch.no_grad():
        for key, parameter in whole.named_parameters():
            if key.startswith("lora_up"):
                parameter.normal_()
    spread = MoE(C, H, E, **OPTIONS[name], process_group=dist.group.WORLD)
    own = slice(rank * E // size, (rank + 1) * E // size)
    spread.load_state_dict({key: value[own] if of_experts(key) else value for key, value in whole.state_dict().items()})
    return whole.to(dtype), spread.to(dtype)


def tokens(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def closely(actual: Tensor | None, wanted: Tensor | None, what: str) -> None:
    if actual is None or wanted is None:
        assert actual is wanted is None, what
        return
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")


def forward_and_gradients(rank: int, size: int, name: str, *, of_x: bool = True) -> None:
    whole, spread = modules(name, rank, size)
    inputs = [tokens(r, COUNTS[r], C).requires_grad_(of_x) for r in range(size)]
    width = whole.out_dim
    upstreams = [tokens(100 + r, COUNTS[r], width) for r in range(size)]

    mk.last_kernels(clear=True)
    out, routing = spread(inputs[rank], return_routing=True)
    assert all(kernel.startswith("cpu/") for _, kernel in mk.last_kernels())
    wanted, alone = whole(inputs[rank], return_routing=True)
    assert_same_bits(out, wanted, f"{name}, rank {rank}: out")
    assert_same_bits(routing.weights, alone.weights, "weights")
    with torch.no_grad():
        assert_same_bits(spread(inputs[rank]), wanted, "without gradients")
        residual = tokens(200 + rank, *out.shape)
        assert_same_bits(spread(inputs[rank], residual=residual), whole(inputs[rank], residual=residual), "residual")

    wanted_x = torch.autograd.grad(wanted, inputs[rank], upstreams[rank])[0] if of_x else None
    out.backward(upstreams[rank])
    closely(inputs[rank].grad, wanted_x, f"{name}, rank {rank}: grad x")
    # An expert's gradient is that of all ranks' tokens; the router's is of a rank's own, as in data parallelism.
    whole(torch.cat(inputs)).backward(torch.cat(upstreams))
    own = slice(rank * E // size, (rank + 1) * E // size)
    for key, parameter in spread.named_parameters():
        gradient, all_of = parameter.grad, whole.get_parameter(key).grad
        if gradient is None:
            assert all_of is None
            continue
        if not of_experts(key):
            dist.all_reduce(gradient)
        closely(gradient, all_of[own] if of_experts(key) else all_of, f"{name}, rank {rank}: grad {key}")


def others(rank: int, size: int) -> None:
    """Half precision, plain torch, ranks that no token goes to, copies."""
    whole, spread = modules("gated", rank, size)
    x = tokens(rank, 2, 5, C)
    only_the_first = torch.full((E,), float("-inf"))
    only_the_first[: E // size] = 0
    if size == 4:  # three experts a token, of two: those that are away come last
        only_the_first[2] = 0
    assert_same_bits(spread(x, selection=only_the_first), whole(x, selection=only_the_first), "one rank's experts")
    spread(x, selection=only_the_first).sum().backward()
    if rank == size - 1:
        assert not spread.w_in.grad.any()
    assert_same_bits(copy.deepcopy(spread)(x), spread(x), "deepcopy")
    spread.kernels = False
    torch.testing.assert_close(spread(x), whole(x))
    whole, spread = modules("gated", rank, size, torch.bfloat16)
    x = x.bfloat16()
    plain, exact = copy.deepcopy(whole), copy.deepcopy(whole).double()
    plain.kernels = exact.kernels = False
    assert_within_rule(spread(x), plain(x), exact(x.double()), "bfloat16")


def groups(rank: int, size: int) -> None:
    """Two groups side by side, each with all experts."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(4)
    whole = MoE(C, H, E, 2)
    spread = MoE(C, H, E, 2, process_group=halves[rank // 2])
    own = slice(rank % 2 * E // 2, (rank % 2 + 1) * E // 2)
    spread.load_state_dict({key: value[own] if of_experts(key) else value for key, value in whole.state_dict().items()})
    x = tokens(rank, 5, C)
    assert_same_bits(spread(x), whole(x), f"rank {rank}")


def errors(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts: expected a multiple of the {size} ranks of process_group, got 5"):
        MoE(C, H, 5, 2, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="process_group: expected None with schedule 'streaming'"):
        MoE(C, H, E, 2, schedule="streaming", experts={}, process_group=dist.group.WORLD)


def everything(rank: int, size: int) -> None:
    for name in OPTIONS:
        forward_and_gradients(rank, size, name)
    forward_and_gradients(rank, size, "gated", of_x=False)
    others(rank, size)
    if size == 4:
        groups(rank, size)
    errors(rank, size)


@pytest.mark.parametrize("size", [2, 4])
def test_the_numbers_of_one_process(size: int, tmp_path: Path) -> None:
    run_in_processes(size, tmp_path, everything)


def test_not_a_group() -> None:
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup, got int"):
        MoE(C, H, E, 2, process_group=3)
