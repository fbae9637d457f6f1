"""Sharded tensors and modules: FSDP2 over two processes, and DTensors through the ops, against one process."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_processes
from support import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

import mmkernels as mk
from mmkernels.nn import GluMlp, LayerNorm, Mlp, ModalityLinear, ModalityMlp, MoE, NestedMlp
from mmkernels.ops.sharding import register_sharding

C, H, N, E, T = 12, 20, 9, 6, 10


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- FSDP2 ------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(C)
        self.moe = MoE(C, H, E, 2, gated=True, activation="silu", bias=True, shared_hidden=8)
        self.modal = ModalityMlp(C, H, 2, gated=True, activation="silu", out_norm=True)
        self.mlp = GluMlp(C, H)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        out, routing = self.moe(self.norm(x), residual=x, return_routing=True)
        out = out + self.modal(out, ids)
        return self.mlp(out, out), routing.losses.z


def loss_of(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    total = 0
    for block in model:
        x, z = block(x, ids)
        total = total + z
    return x.square().mean() + 0.1 * total


def fsdp(rank: int, size: int) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(Block(), Block())
    torch.manual_seed(0)
    sharded = nn.Sequential(Block(), Block())
    for block in sharded:
        fully_shard(block)
    fully_shard(sharded)
    x, ids = random(size, 7, C, seed=1), (random(size, 7, seed=2) > 0).long()
    wanted = sum(loss_of(whole, x[r], ids[r]) for r in range(size)) / size
    wanted.backward()
    mk.last_kernels(clear=True)
    loss = loss_of(sharded, x[rank], ids[rank])
    loss.backward()
    ran = mk.last_kernels(clear=True)
    assert {"route", "moe_mlp", "moe_mlp_backward", "mlp", "mlp_backward"} <= {op for op, _ in ran}
    assert all(kernel.startswith("cpu/") for _, kernel in ran), ran
    torch.testing.assert_close(loss, loss_of(whole, x[rank], ids[rank]))
    torch.distributed.all_reduce(loss := loss.detach())
    torch.testing.assert_close(loss / size, wanted.detach())
    for (name, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, other.grad, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    optimizer = torch.optim.SGD(sharded.parameters(), 0.1)
    optimizer.step()
    torch.optim.SGD(whole.parameters(), 0.1).step()
    torch.testing.assert_close(loss_of(sharded, x[rank], ids[rank]), loss_of(whole, x[rank], ids[rank]))


# --- DTensors through the ops -----------------------------------------------------------------------------------------
def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


IDS = torch.arange(T) % 4 - 1
SLOTS = torch.stack((torch.arange(T) % E, (torch.arange(T) * 3 + 1) % E), 1)


def moe(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor, *rest: Tensor) -> Tensor:
    options = dict(zip(("b_in", "b_out", "w_gate"), rest, strict=False))
    return mk.moe_mlp(x, mk.fixed_routing(ids, E, weights), w_in, w_out, activation="silu", **options)


def routed(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    routing = mk.route(mk.linear(x, router), 2)
    return mk.moe_mlp(x, routing, w_in, w_out) + routing.losses.z + routing.losses.load_balance


EXPERTS = ((E, H, C), (E, N, H))
# What is called, its tensors, and how many of the first of them have tokens.
CALLS: dict[str, tuple[Callable[..., Any], list[Tensor], int]] = {
    "linear": (mk.linear, inputs((T, C), (N, C), (N,)), 1),
    "linear_gelu": (
        lambda x, residual, weight: mk.linear(x, weight, activation="gelu", residual=residual),
        inputs((T, 3, C), (T, 3, N), (N, C)),
        2,
    ),
    "mlp": (mk.mlp, inputs((T, C), (H, C), (N, H), (H,), (N,)), 1),
    "mlp_gated": (
        lambda x, w_in, w_out, w_gate: mk.mlp(x, w_in, w_out, w_gate=w_gate, activation="silu"),
        inputs((T, 3, C), (H, C), (N, H), (H, C)),
        1,
    ),
    "grouped_linear": (mk.grouped_linear, [*inputs((T, C)), IDS, *inputs((3, N, C), (3, N))], 2),
    "moe_mlp": (moe, [*inputs((T, C)), SLOTS, *inputs((T, 2), *EXPERTS)], 3),
    "moe_mlp_gated": (moe, [*inputs((T, C)), SLOTS, *inputs((T, 2), *EXPERTS, (E, H), (E, N), (E, H, C))], 3),
    "routed": (routed, inputs((T, C), (E, C), *EXPERTS), 1),
}


def leaves(values: list[Tensor]) -> list[Tensor]:
    return [value.detach().requires_grad_() if value.is_floating_point() else value for value in values]


def dtensors(rank: int, size: int) -> None:
    register_sharding()
    register_sharding()
    mesh = init_device_mesh("cpu", (size,))
    for name, (call, tensors, of_tokens) in CALLS.items():
        for placement, of_gradient in itertools.product((Shard(0), Replicate()), repeat=2):
            whole = leaves(tensors)
            placed = leaves(
                [
                    distribute_tensor(value.detach(), mesh, [placement if i < of_tokens else Replicate()])
                    for i, value in enumerate(tensors)
                ]
            )
            wanted = call(*whole)
            mk.last_kernels(clear=True)
            out = call(*placed)
            ran = mk.last_kernels(clear=True)
            assert ran and all(kernel.startswith("cpu/") for _, kernel in ran), (name, ran)
            assert isinstance(out, DTensor) and out.placements == (placement,), (name, out.placements)
            if name == "routed":
                torch.testing.assert_close(out.full_tensor(), wanted)
            else:
                assert_same_bits(out.full_tensor(), wanted, name)
            with torch.no_grad():
                torch.testing.assert_close(call(*placed).full_tensor(), wanted)
            upstream = random(*wanted.shape, seed=77)
            wanted.backward(upstream)
            out.backward(distribute_tensor(upstream, mesh, [of_gradient]))
            for i, (ours, theirs) in enumerate(zip(placed, whole, strict=True)):
                if theirs.requires_grad:
                    torch.testing.assert_close(
                        ours.grad.full_tensor(),
                        theirs.grad,
                        rtol=1e-5,
                        atol=1e-5,
                        msg=lambda text, n=(name, i): f"{n}: {text}",
                    )


def meshes(rank: int, size: int) -> None:
    """Two dimensions: tokens over both, or over one, where the experts' gradients are refused."""
    register_sharding()
    mesh = init_device_mesh("cpu", (2, size // 2))
    call, tensors, of_tokens = CALLS["moe_mlp"]
    wanted = call(*tensors)
    for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(0)], [Replicate(), Replicate()]):
        everywhere = [Replicate()] * 2
        placed = [distribute_tensor(v, mesh, placements if i < of_tokens else everywhere) for i, v in enumerate(tensors)]
        assert_same_bits(call(*placed).full_tensor(), wanted, str(placements))
        placed = leaves(placed)
        out = call(*placed)
        if placements[0] != placements[1]:
            with pytest.raises((NotImplementedError, RuntimeError), match="sharded along some dimensions of a mesh only"):
                out.sum().backward()
            continue
        out.backward(distribute_tensor(random(T, N, seed=77), mesh, everywhere))
        whole = leaves(tensors)
        call(*whole).backward(random(T, N, seed=77))
        for ours, theirs in zip(placed, whole, strict=True):
            if theirs.requires_grad:
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-5, atol=1e-5)


MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether each token has a modality
    "mlp": (lambda: Mlp(C, H), False),
    "nested": (lambda: NestedMlp(C, H, (5, H)), False),
    "moe": (lambda: MoE(C, H, E, 2, shared_hidden=8, bias=True), False),
    "moe_capacity": (lambda: MoE(C, H, E, 2, capacity_factor=0.8), False),
    "expert_choice": (lambda: MoE(C, H, E, None, kind="expert_choice"), False),
    "modality_linear": (lambda: ModalityLinear(C, H, 3), True),
    "modality_mlp": (lambda: ModalityMlp(C, H, 3, gated=True, activation="silu", out_norm=True), True),
    "one_peace": (lambda: ModalityMlp(C, H, 3, gated=True, hidden_norm=True), True),
}


def modules(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    x = random(T, C, seed=3)
    for name, (make, by_modality) in MODULES.items():
        torch.manual_seed(1)
        whole = make()
        torch.manual_seed(1)
        placed = make()
        distribute_module(placed, mesh)
        arguments = [x, IDS] if by_modality else [x]
        out = placed(*(distribute_tensor(value, mesh, [Shard(0)]) for value in arguments))
        wanted = whole(*arguments)
        torch.testing.assert_close(out.full_tensor(), wanted, msg=lambda text, name=name: f"{name}: {text}")
        upstream = random(*wanted.shape, seed=77)
        out.backward(distribute_tensor(upstream, mesh, [Shard(0)]))
        wanted.backward(upstream)
        for (key, ours), theirs in zip(placed.named_parameters(), whole.parameters(), strict=True):
            gradient, what = ours.grad.full_tensor(), f"{name}, gradient of {key}"
            torch.testing.assert_close(
                gradient, theirs.grad, rtol=1e-5, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}"
            )


def everything(rank: int, size: int) -> None:
    fsdp(rank, size)
    modules(rank, size)
    dtensors(rank, size)


def test_two_processes_are_one(tmp_path: Path) -> None:
    run_in_processes(2, tmp_path, everything)


def test_a_mesh_of_two_dimensions(tmp_path: Path) -> None:
    run_in_processes(4, tmp_path, meshes)


def test_import_stays_small(tmp_path: Path) -> None:
    code = "import sys, mmkernels.nn; assert 'mmkernels.ops.sharding' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
