"""How DTensors run through the linear, expert and routing ops: tokens sharded, weights replicated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkernels.reference.linear import MLP_GRADIENTS, mlp_needs
from mmkernels.reference.moe import MOE_GRADIENTS, moe_needs

Strategies = list[tuple[list[Any], list[Any]]]

_registered = False


def register_sharding() -> None:
    """Tells DTensor how the operators of linear, mlp, grouped_linear, moe_mlp and route, and their backward ones, take
    sharded tensors; after this :func:`mmkernels.linear` and the others take DTensors. Once a process; further calls do
    nothing.

    Tokens may be sharded along any of their dimensions (experts, groups and routing: along the first), with weights
    replicated: outputs are sharded alike, gradients of weights are partial sums, statistics of a routing too. Otherwise
    DTensor replicates. A routing with a capacity, and expert choice, which depend on all tokens, run replicated only.
    Of the modules (:mod:`mmkernels.nn`) MoE and those of modalities run these ops on DTensors and call this themselves, the
    others run plain torch on them; under FSDP2 all see plain tensors, and run kernels.

    Raises:
        ImportError: torch is built without torch.distributed.
        NotImplementedError: in a backward pass of moe_mlp whose tokens are sharded along some dimensions of a mesh only.

    Source: torch.distributed.tensor; "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023).
    """
    global _registered
    if _registered:
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding as register

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rule in _RULES.items():
        op = getattr(torch.ops.mmkernels, name).default
        register(op)(_with_replicated(rule, len(op._schema.returns)))
        # What a call gives depends on all its numbers, booleans too, by which torch does not tell calls apart of itself.
        numbers = [i for i, argument in enumerate(op._schema.arguments) if "Tensor" not in str(argument.type)]
        if numbers:
            propagator.op_to_schema_info[op] = RuntimeSchemaInfo(numbers[0], needs_pytree=True)
    _registered = True


def _with_replicated(rule: Callable[..., Strategies], results: int) -> Callable[..., Strategies]:
    def strategies(*args: Any) -> Strategies:
        from torch.distributed.tensor import Replicate

        sharded = rule(*args)
        if rule is _moe_mlp_backward and sharded:
            return sharded
        return [([Replicate()] * results, _inputs(args, {})), *sharded]

    return strategies


def _inputs(args: Sequence[Any], sharded: dict[int, Any]) -> list[Any]:
    """`sharded` by position, all other tensors replicated."""
    from torch.distributed.tensor import Replicate

    return [sharded.get(i, Replicate()) if hasattr(arg, "placements") else None for i, arg in enumerate(args)]


def _along(dim: int, args: Sequence[Any], positions: Sequence[int], outputs: str) -> tuple[list[Any], list[Any]]:
    """Tensors at `positions` sharded along `dim`; of `outputs` each is sharded, partial or (no tensor at all) replicated."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    placements = {"s": Shard(dim), "p": Partial(), "r": Replicate()}
    there = [position for position in positions if hasattr(args[position], "shape") and len(args[position].shape) > 1]
    return [placements[output] for output in outputs], _inputs(args, {position: Shard(dim) for position in there})


def _gradients(names: Sequence[str], of_tokens: Sequence[str], needed: dict[str, bool], absent: Sequence[str]) -> str:
    """A gradient that is not needed is an empty tensor."""
    made = [name for name in names if needed[name] and name not in absent]
    return "".join(("s" if name in of_tokens else "p") if name in made else "r" for name in names)


def _absent(names: Sequence[str], values: Sequence[Any]) -> list[str]:
    return [name for name, value in zip(names, values, strict=True) if value is None]


def _linear(x: Any, *rest: Any) -> Strategies:
    need_pre = rest[-1]
    return [_along(dim, (x, *rest), (0, 5), "ss" if need_pre else "sr") for dim in range(len(x.shape) - 1)]


def _linear_backward(grad: Any, *rest: Any) -> Strategies:
    outputs = "".join(kind if need else "r" for kind, need in zip("spp", rest[-3:], strict=True))
    return [_along(dim, (grad, *rest), (0, 1, 3), outputs) for dim in range(len(grad.shape) - 1)]


def _mlp(x: Any, *rest: Any) -> Strategies:
    w_gate, need_pre = rest[2], rest[-1]
    outputs = "s" + ("s" if need_pre else "r") + ("s" if need_pre and w_gate is not None else "r")
    return [_along(dim, (x, *rest), (0, 11), outputs) for dim in range(len(x.shape) - 1)]


def _mlp_backward(grad: Any, *rest: Any) -> Strategies:
    # The gate's gradients alone are empty where there is no such tensor, the others where they are not needed.
    absent = ["w_gate", "b_gate"] if rest[3] is None else []
    outputs = _gradients(MLP_GRADIENTS, ("x",), mlp_needs(rest[-1]), absent)
    return [_along(dim, (grad, *rest), (0, 1, 8, 9), outputs) for dim in range(len(grad.shape) - 1)]


def _grouped_linear(*args: Any) -> Strategies:
    return [_rows(args, (0, 1), "s")]


def _grouped_linear_backward(*args: Any) -> Strategies:
    return [_rows(args, (0, 1, 2), "".join(kind if need else "r" for kind, need in zip("spp", args[-3:], strict=True)))]


def _moe_mlp(*args: Any) -> Strategies:
    w_gate, need_pre = args[5], args[-1]
    # Each rank keeps room for as many slots as all tokens have, whatever the size that the mesh knows of.
    outputs = "s" + ("s" if need_pre else "r") + ("s" if need_pre and w_gate is not None else "r")
    return [_rows(args, (0, 1, 2, 13), outputs)]


def _moe_mlp_backward(*args: Any) -> Strategies:
    from torch.distributed.tensor import Shard

    # What the forward pass kept is in the order of a rank's own experts: it can be neither gathered nor cut, so it says what
    # the backward pass has to do.
    kept = {placement == Shard(0) for placement in args[10].placements}
    if len(kept) > 1:
        raise NotImplementedError("moe_mlp: gradients of tokens that are sharded along some dimensions of a mesh only")
    if kept == {False}:
        return []
    absent = _absent(MOE_GRADIENTS, (args[1], *args[3:10]))
    outputs = _gradients(MOE_GRADIENTS, ("x", "weights"), moe_needs(args[-1]), absent)
    return [_rows(args, (0, 1, 2, 3, 10, 11), outputs)]


def _rows(args: Sequence[Any], positions: Sequence[int], outputs: str) -> tuple[list[Any], list[Any]]:
    """Along the tokens, in ids of one dimension too."""
    from torch.distributed.tensor import Shard

    placements, inputs = _along(0, args, positions, outputs)
    for position in positions:
        if hasattr(args[position], "shape") and args[position].shape != (0,):
            inputs[position] = Shard(0)
    return placements, inputs


def _route(*args: Any) -> Strategies:
    return [] if args[-1] >= 0 else [_along(0, args, (0, 1), "spsp")]


def _route_backward(*args: Any) -> Strategies:
    return [_along(0, args, (0, 2, 3), "s")]


def _replicated_only(*args: Any) -> Strategies:
    return []


_RULES: dict[str, Callable[..., Strategies]] = {
    "linear": _linear,
    "linear_backward": _linear_backward,
    "mlp": _mlp,
    "mlp_backward": _mlp_backward,
    "grouped_linear": _grouped_linear,
    "grouped_linear_backward": _grouped_linear_backward,
    "moe_mlp": _moe_mlp,
    "moe_mlp_backward": _moe_mlp_backward,
    "route": _route,
    "route_backward": _route_backward,
    "expert_choice": _replicated_only,
}
