"""transformers' experts, which its mixtures of experts share one decorator for, run by mk.moe_mlp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.parts import DTYPES, UNKNOWN, activation_name
from mmkernels.integrations.rules import Rule, Swapped, note
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.moe import moe_mlp
from mmkernels.ops.routing import fixed_routing

# Implementations that compute the same; others ("deepgemm", "sonicmoe") somebody has chosen for what they are.
_SAME = (None, "eager", "batched_mm", "grouped_mm", "mmkernels")


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts by :func:`mmkernels.moe_mlp`, where that knows them; by their own eager forward otherwise.

    Args:
        module: its weights as the decorator describes them (has_gate, has_bias, is_transposed, is_concatenated). Where they
            are transposed, each call copies them.
        hidden_states: [T, C]. top_k_index, top_k_weights: [T, K]; an index of num_experts stands for no expert.
    """
    reason = unlike(module) or _reason(module, hidden_states)
    if reason is None:
        return _run(module, hidden_states, top_k_index, top_k_weights)
    note(module, reason)
    out: Tensor = _eager_forward(type(module))(module, hidden_states, top_k_index, top_k_weights)
    return out


def unlike(module: Any) -> str | None:
    """Why the op computes something else than these experts; None where it computes the same."""
    if module.has_gate and type(module)._apply_gate.__name__ != "_default_apply_gate":
        return "experts with a gate of their own"
    if activation_name(module.act_fn) == UNKNOWN:
        return f"experts with the activation {type(module.act_fn).__name__}"
    if not module.is_concatenated:
        return "experts whose gates lie between the rows of what they gate"
    if getattr(module, "has_post_expert_norm", False):
        return "experts with a norm after each"
    return None


def _reason(module: Any, x: Tensor) -> str | None:
    weight = module.gate_up_proj if module.has_gate else module.up_proj
    if not op_takes(x, weight, module.down_proj):
        return "tensors of another class"
    if weight.dtype not in DTYPES or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        return f"experts in {weight.dtype} beside {x.dtype}"
    return None


def _run(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    num_experts = module.num_experts
    index = index.masked_fill(index >= num_experts, -1)
    first = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    b_first, b_out = None, None
    if module.has_bias:
        b_first, b_out = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias
    if module.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    w_gate = b_gate = None
    if module.has_gate:
        w_gate, first = first.chunk(2, 1)
        if b_first is not None:
            b_gate, b_first = b_first.chunk(2, 1)
    return moe_mlp(
        x,
        fixed_routing(index, num_experts, weights),
        first,
        down,
        b_first,
        b_out,
        w_gate=w_gate,
        b_gate=b_gate,
        activation=activation_name(module.act_fn),
    )


def _wrapper(cls: type) -> Any:
    """The forward that transformers' decorator gave to the class or to one that it derives from; None without."""
    for base in cls.__mro__:
        forward = base.__dict__.get("forward")
        code = getattr(forward, "__code__", None)
        if code is not None and {"experts_interface", "original_forward"} <= set(code.co_freevars):
            return forward
    return None


def _eager_forward(cls: type) -> Any:
    forward = _wrapper(cls)
    return forward.__closure__[forward.__code__.co_freevars.index("original_forward")].cell_contents


class SwappedExperts(Swapped):
    """A module of experts, whatever of the implementations that compute the same its config asks for."""

    @staticmethod
    def refuses(module: Any) -> str | None:
        if module.is_transposed:
            return "its weights are transposed: each call would copy them"
        return unlike(module)

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        implementation = self.config._experts_implementation
        reason = f"experts_implementation={implementation!r}" if implementation not in _SAME else None
        reason = reason or unlike(self) or _reason(self, hidden_states)
        if reason is not None:
            out: Tensor = self.original(reason, hidden_states, top_k_index, top_k_weights)
            return out
        return _run(self, hidden_states, top_k_index, top_k_weights)


EXPERTS_RULE = Rule("", SwappedExperts, ("mk.moe_mlp",), refuses=SwappedExperts.refuses)


def are_experts(cls: type[nn.Module]) -> bool:
    """Whether the class's own forward is the one that transformers' decorator makes."""
    return _wrapper(cls) is cls.forward
