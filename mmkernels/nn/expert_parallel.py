"""Experts spread over the ranks of a process group: tokens travel to the experts they chose, and what these give back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.ops.moe import dispatch
from mmkernels.ops.routing import Routing, fixed_routing


class Group:
    """A process group in a module: copies of the module share it."""

    def __init__(self, group: Any) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def share(self, num_experts: int) -> int:
        """How many experts each rank owns."""
        if num_experts % self.size != 0:
            raise ValueError(
                f"num_experts: expected a multiple of the {self.size} ranks of process_group, got {num_experts}"
            )
        return num_experts // self.size


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks they belong to; the gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.way_back = received, sent, group
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _AllToAll.apply(grad, *ctx.way_back), None, None, None


def in_slot_order(values: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """[T, N] in the dtype of the weights: each token's rows of `values` at its positions, times their weights, one after the
    other as the kernels add them (a sum over the dimension would add in an order of its own)."""
    total = torch.zeros((positions.size(0), values.size(1)), dtype=weights.dtype, device=values.device)
    if values.size(0) == 0:  # a row to read where no slot is in use, with a way back for gradients: all ranks take it
        values = values.sum(0, keepdim=True)
    for slot in range(positions.size(1)):
        place = positions[:, slot]
        term = values[place.clamp(min=0)].to(weights.dtype) * weights[:, slot, None]
        total = torch.where((place >= 0)[:, None], total + term, total)
    return total


def parallel_moe(
    x: Tensor,
    routing: Routing,
    group: Group,
    function: Callable[..., Tensor],
    *,
    residual: Tensor | None,
    **options: Any,
) -> Tensor:
    """:func:`mmkernels.moe_mlp` (or its reference), `function`, with the experts of all ranks; `options` are its weights,
    this rank's, and its activation.

    Sums are one process's, in the order of the slots; in half precision what each expert gives is rounded on its way.
    """
    rows = x.reshape(-1, x.shape[-1])
    slots = routing.expert_ids.size(1)
    order, offsets, positions = dispatch(routing.expert_ids, routing.num_experts)
    to_send = offsets.diff()
    to_receive = torch.empty_like(to_send)
    dist.all_to_all_single(to_receive, to_send, group=group.group)
    own = routing.num_experts // group.size
    sent = to_send.view(group.size, own).sum(1).tolist()
    received = to_receive.view(group.size, own).sum(1).tolist()
    arrived = _AllToAll.apply(rows[order[: sum(sent)] // slots], sent, received, group.group)
    named = torch.arange(own, device=x.device).repeat(group.size)
    expert_ids = named.repeat_interleave(to_receive, output_size=sum(received))
    given = function(arrived, fixed_routing(expert_ids, own), **options)
    values = _AllToAll.apply(given, received, sent, group.group)
    out = in_slot_order(values, positions, routing.weights).to(values.dtype).view(*x.shape[:-1], values.shape[1])
    return out if residual is None else out + residual
