"""Feed-forward layers of transformers, plain and gated.

Names of parameters are those of timm's layers, so that its checkpoints load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.nn.linear import Linear, activated, added, check_activation, operand, untouched, untouched_linear
from mmkernels.nn.norm import LayerNorm, RMSNorm
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.nn.token_roll import TokenRoll, TokenRollLayerNorm
from mmkernels.ops.linear import mlp

NORMS = (None, "product", "factors")


def pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, value)


def _drops(layer: nn.Module) -> bool:
    """Whether calling a dropout layer changes what it is given (or may, where something stands in its place)."""
    return not untouched(layer, nn.Dropout) or (layer.training and layer.p > 0)


def dropped(layer: nn.Module, x: Tensor, drop: nn.Module, residual: Tensor | None) -> Tensor:
    """drop(layer(x)) + residual, in one pass where nothing is dropped."""
    if not _drops(drop):
        return added(layer, x, residual)
    out = drop(layer(x))
    return out if residual is None else out + residual


def normed_factors(x: Tensor, gate: nn.Module, value: nn.Module, activation: str | None, norm: nn.Module) -> Tensor:
    """norm(activation(gate(x))) * norm(value(x))."""
    return norm(activated(gate, x, activation)) * norm(value(x))


def feed_forward(
    x: Tensor,
    fc_in: nn.Module,
    fc_out: nn.Module,
    activation: str | None,
    drop_in: nn.Module,
    drop_out: nn.Module,
    residual: Tensor | None,
    gate: nn.Module | None = None,
) -> Tensor:
    """drop_out(fc_out(drop_in(h))) + residual, with h = activation(fc_in(x)) or activation(gate(x)) * fc_in(x).

    One op where nothing is dropped from h and nobody listens to the layers, one op a layer otherwise.
    """
    taken = None if _drops(drop_in) or not op_takes(x, residual) else _operands(fc_in, fc_out, gate)
    if taken is None:
        hidden = activated(fc_in, x, activation) if gate is None else activated(gate, x, activation) * fc_in(x)
        return dropped(fc_out, drop_in(hidden), drop_out, residual)
    (w_in, b_in), (w_out, b_out), (w_gate, b_gate) = taken
    late = _drops(drop_out)
    out = mlp(
        laid_out(x),
        w_in,
        w_out,
        b_in,
        b_out,
        w_gate=w_gate,
        b_gate=b_gate,
        activation=activation,
        residual=None if late else residual,
    )
    if not late:
        return out
    out = drop_out(out)
    return out if residual is None else out + residual


def _operands(*layers: nn.Module | None) -> list[tuple[Any, Any]] | None:
    """What one op takes of these layers; None where they have to be called."""
    taken: list[tuple[Any, Any]] = []
    for layer in layers:
        if layer is None:
            taken.append((None, None))
            continue
        pair = operand(layer) if untouched_linear(layer) else None  # type: ignore[arg-type]
        if pair is None:
            return None
        taken.append(pair)
    return taken


class KernelSwitch(nn.Module):
    """A module whose `kernels` is that of everything inside: linear layers, norms and other such modules."""

    _kernels: bool

    @property
    def kernels(self) -> bool:
        """Whether the layers run the kernels."""
        return self._kernels

    @kernels.setter
    def kernels(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, KernelSwitch):
                module._kernels = on
            elif isinstance(module, (Linear, LayerNorm, RMSNorm, TokenRoll, TokenRollLayerNorm)):
                module.kernels = on

    def extra_repr(self) -> str:
        return f"kernels={self.kernels}"


class Mlp(KernelSwitch):
    """fc2(activation(fc1(x))) + residual, timm's Mlp through :func:`mmkernels.mlp`.

    Parameters and state_dict keys are those of timm's Mlp without a norm: fc1.weight, fc1.bias, fc2.weight, fc2.bias. Both
    layers are :class:`Linear`, packed in eval mode. Where the hidden activations are dropped (in training), or somebody
    listens to fc1 or fc2 (a hook, an adapter in its place, a parametrization), they run one after the other.

    Args:
        in_features: K. hidden_features, out_features: K where None.
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        bias: of both layers, or a pair (of fc1, of fc2).
        drop: probability, as in nn.Dropout, of the hidden activations and of the output (not of the residual), or a pair.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch. May be set at any time.

    Raises:
        ValueError: activation, drop or packed_dtype is out of range.

    Source: "Attention Is All You Need" (2017).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str | None = "gelu",
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        check_activation(activation)
        super().__init__()
        hidden_features, out_features = hidden_features or in_features, out_features or in_features
        biases, drops = pair(bias), pair(drop)
        self.activation = activation
        self.fc1 = Linear(in_features, hidden_features, biases[0], device, dtype, packed_dtype=packed_dtype)
        self.drop1 = nn.Dropout(drops[0])
        self.fc2 = Linear(hidden_features, out_features, biases[1], device, dtype, packed_dtype=packed_dtype)
        self.drop2 = nn.Dropout(drops[1])
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features].

        Args:
            x: in the dtype of the weights (beside int8, any of at most 32 bits).
            residual: None, or what expands to the output's shape; added last.

        Raises:
            TypeError, ValueError: with kernels, as :func:`mmkernels.mlp`.
        """
        return feed_forward(x, self.fc1, self.fc2, self.activation, self.drop1, self.drop2, residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, {super().extra_repr()}"


class GluMlp(KernelSwitch):
    """fc2(activation(fc1_g(x)) * fc1_x(x)) + residual: SwiGLU, GeGLU or ReGLU through :func:`mmkernels.mlp`.

    Parameters and state_dict keys are those of timm's SwiGLU: fc1_g (the gate), fc1_x, fc2, and norm where there is one.
    Checkpoints of timm's GluMlp and SwiGLUPacked, whose one fc1 holds both, load where `gate_last` says which half is the
    gate. The layers are :class:`Linear`, packed in eval mode; where somebody listens to one of them, where there is a norm,
    or where the hidden activations are dropped, they run one after the other.

    Args:
        in_features: K. hidden_features: H, of the gate and of the value each (timm's GluMlp counts both); K where None.
        out_features: K where None.
        activation: of the gate: "silu" (SwiGLU), "gelu" (GeGLU), "relu" (ReGLU), "gelu_tanh" or None.
        bias, drop: of the inner and the outer layers, or a pair, as in :class:`Mlp`.
        norm: None; "product", a LayerNorm of activation(gate) * value, as timm's; or "factors", one LayerNorm module on each
            of both, as Activator's.
        norm_eps: added to the variance.
        gate_last: the order of the halves in a checkpoint with one fc1: True where the gate is the second (timm's GluMlp by
            default), False where it is the first (SwiGLUPacked); None takes no such checkpoint.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch. May be set at any time.

    Raises:
        ValueError: activation, norm, drop or packed_dtype is out of range.
        RuntimeError: load_state_dict of a checkpoint with one fc1, without gate_last.

    Source: "GLU Variants Improve Transformer" (2020); norm: "Activator: GLU Activations as The Core Functions of a Vision
    Transformer" (2024) for "factors".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str | None = "silu",
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        gate_last: bool | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        check_activation(activation)
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(map(str, NORMS))}, got {norm!r}")
        super().__init__()
        hidden_features, out_features = hidden_features or in_features, out_features or in_features
        biases, drops = pair(bias), pair(drop)
        self.activation = activation
        self.norm_of = norm
        self.gate_last = gate_last
        self.fc1_g = Linear(in_features, hidden_features, biases[0], device, dtype, packed_dtype=packed_dtype)
        self.fc1_x = Linear(in_features, hidden_features, biases[0], device, dtype, packed_dtype=packed_dtype)
        self.drop1 = nn.Dropout(drops[0])
        self.norm: nn.Module = nn.Identity()
        if norm is not None:
            self.norm = LayerNorm(hidden_features, eps=norm_eps, device=device, dtype=dtype)
        self.fc2 = Linear(hidden_features, out_features, biases[1], device, dtype, packed_dtype=packed_dtype)
        self.drop2 = nn.Dropout(drops[1])
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features].

        Args:
            x: in the dtype of the weights (beside int8, any of at most 32 bits).
            residual: None, or what expands to the output's shape; added last.

        Raises:
            TypeError, ValueError: with kernels, as :func:`mmkernels.mlp`.
        """
        if self.norm_of is None:
            return feed_forward(x, self.fc1_x, self.fc2, self.activation, self.drop1, self.drop2, residual, gate=self.fc1_g)
        if self.norm_of == "factors":
            hidden = self.drop1(normed_factors(x, self.fc1_g, self.fc1_x, self.activation, self.norm))
        else:
            hidden = self.norm(self.drop1(activated(self.fc1_g, x, self.activation) * self.fc1_x(x)))
        return dropped(self.fc2, hidden, self.drop2, residual)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("weight", "bias"):
            both = f"{prefix}fc1.{name}"
            if both not in state_dict:
                continue
            if self.gate_last is None:
                error_msgs.append(f"{both} holds gate and value; GluMlp(gate_last=...) says which half is the gate")
                continue
            # Copies: parameters assigned from halves of one tensor would share its memory.
            halves = [half.clone() for half in state_dict.pop(both).chunk(2)]
            value, gate = halves if self.gate_last else halves[::-1]
            state_dict[f"{prefix}fc1_g.{name}"], state_dict[f"{prefix}fc1_x.{name}"] = gate, value
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, norm={self.norm_of}, gate_last={self.gate_last}, {super().extra_repr()}"
