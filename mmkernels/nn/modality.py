"""Layers with weights of their own for each modality, which each token's modality chooses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.linear import check_activation
from mmkernels.nn.mlp import KernelSwitch, pair
from mmkernels.nn.parameters import new_parameter, uniform
from mmkernels.nn.tensor_classes import op_takes, op_takes_sharded
from mmkernels.ops.checks import check_int
from mmkernels.ops.moe import grouped_linear, moe_mlp
from mmkernels.ops.norm import layer_norm, rms_norm
from mmkernels.ops.routing import fixed_routing
from mmkernels.reference import moe as reference
from mmkernels.reference import norm as norm_reference
from mmkernels.reference.linear import activate


def _check_ids(modality_ids: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(modality_ids, Tensor):
        raise TypeError(f"modality_ids: expected a tensor of the leading shape of x, got {type(modality_ids).__name__}")
    if modality_ids.dtype != torch.int64:
        raise TypeError(f"modality_ids: expected torch.int64, got {modality_ids.dtype}")
    if modality_ids.shape != shape:
        raise ValueError(f"modality_ids: expected the leading shape of x, {tuple(shape)}, got {tuple(modality_ids.shape)}")


def _flat_ids(modality_ids: Any, x: Tensor) -> Tensor:
    _check_ids(modality_ids, tuple(x.shape[:-1]))
    return modality_ids.reshape(-1)


def check_modality_ids(modality_ids: Any, shape: tuple[int, ...], num_modalities: int) -> None:
    """int64 of that shape, each -1 to num_modalities - 1 (looked at on the CPU, outside of compiled graphs), for models
    that would otherwise learn it from a layer."""
    _check_ids(modality_ids, shape)
    if modality_ids.device.type == "cpu" and not torch.compiler.is_compiling() and modality_ids.numel() > 0:
        low, high = (int(bound) for bound in modality_ids.aminmax())
        if low < -1 or high >= num_modalities:
            raise ValueError(f"modality_ids: expected -1 to {num_modalities - 1}, got {low if low < -1 else high}")


class ModalityRMSNorm(KernelSwitch):
    """x / rms(x) times the gain of the token's modality, through :func:`mmkernels.rms_norm`.

    Parameters: weight [M, channels].

    Args:
        channels: C, over which x is normalised. num_modalities: M. eps: added to the mean square.
        kernels: True runs the op, False plain torch, as tensors of other classes (DTensor) always do. May be set any time.
        device, dtype: as in nn.RMSNorm.

    Raises:
        TypeError, ValueError: a size is no number of at least 1.

    Source: "Mixture-of-Transformers" (2024).
    """

    def __init__(
        self,
        channels: int,
        num_modalities: int,
        *,
        eps: float = 1e-5,
        kernels: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in {"channels": channels, "num_modalities": num_modalities}.items():
            check_int(value, name, 1)
        super().__init__()
        self.channels, self.num_modalities, self.eps = channels, num_modalities, eps
        self.weight = new_parameter((num_modalities, channels), device, dtype)
        nn.init.ones_(self.weight)
        self.kernels = kernels

    def forward(self, x: Tensor, modality_ids: Tensor) -> Tensor:
        """x [*tokens, channels], or [*tokens, H, channels] of tokens with heads, which share a gain -> the same shape.

        Args:
            x: in the dtype of the weight.
            modality_ids: int64 of the shape of the tokens, -1 to M - 1; of -1 the gain is modality 0's.

        Raises:
            TypeError, ValueError: modality_ids does not fit.
        """
        heads = x.dim() - 1 > modality_ids.dim()
        _check_ids(modality_ids, tuple(x.shape[: -2 if heads else -1]))
        gain = F.embedding(modality_ids.clamp(min=0), self.weight)
        norm: Any = rms_norm if self.kernels and op_takes(x) else norm_reference.rms_norm
        return norm(x, eps=self.eps) * (gain.unsqueeze(-2) if heads else gain)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_modalities={self.num_modalities}, eps={self.eps}, {super().extra_repr()}"


class ModalityLinear(KernelSwitch):
    """x[t] W[m]^T + bias[m] with m the modality of token t, through :func:`mmkernels.grouped_linear`.

    Parameters: weight [M, out_features, in_features], bias [M, out_features].

    Args:
        in_features, out_features: C and N.
        num_modalities: M.
        bias, device, dtype: as in nn.Linear.
        kernels: True runs the op, of DTensors too, False plain torch, as tensors of other classes always do. May be set at
            any time.

    Raises:
        TypeError, ValueError: a size is no number of at least 1.

    Source: "Mixture-of-Transformers" (2024).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_modalities: int,
        bias: bool = True,
        *,
        kernels: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"in_features": in_features, "out_features": out_features, "num_modalities": num_modalities}
        for name, value in sizes.items():
            check_int(value, name, 1)
        super().__init__()
        self.in_features, self.out_features, self.num_modalities = in_features, out_features, num_modalities
        self.weight = new_parameter((num_modalities, out_features, in_features), device, dtype)
        self.bias = new_parameter((num_modalities, out_features), device, dtype) if bias else None
        self.kernels = kernels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each modality as an nn.Linear of its own."""
        uniform(self.weight, self.in_features)
        if self.bias is not None:
            uniform(self.bias, self.in_features)

    def forward(self, x: Tensor, modality_ids: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features].

        Args:
            x: in the dtype of the weight.
            modality_ids: int64 of the leading shape of x, -1 to M - 1; -1 gives 0.

        Raises:
            TypeError, ValueError: modality_ids does not fit; with kernels, as :func:`mmkernels.grouped_linear`.
        """
        ids = _flat_ids(modality_ids, x)
        on = self.kernels and op_takes_sharded(x, ids, self.weight, self.bias)
        return (grouped_linear if on else reference.grouped_linear)(x, ids, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_modalities={self.num_modalities}, "
            f"bias={self.bias is not None}, {super().extra_repr()}"
        )


class ModalityMlp(KernelSwitch):
    """A feed-forward layer for each modality, gated or not, with norms of each modality's own.

    out = out_norm(W_out hidden_norm(h) + b_out), h = activation(W_in x + b_in), or activation(W_gate x + b_gate) times
    (W_in x + b_in), with the weights and norms of the token's modality. Without a norm on h this is one call of
    :func:`mmkernels.moe_mlp`, with it one of :func:`mmkernels.grouped_linear` for each matrix.

    Parameters: w_in, w_gate [M, hidden, dim], w_out [M, dim, hidden], b_in, b_gate [M, hidden], b_out [M, dim],
    hidden_norm_weight, hidden_norm_bias [M, hidden], out_norm_weight [M, dim].

    Args:
        dim: C. hidden: H. num_modalities: M.
        gated: whether there is a gate. MoT: True with "silu"; ONE-PEACE: True with "gelu".
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        bias: of the inner and the outer layer, or a pair (ONE-PEACE: (False, True)).
        out_norm: an RMSNorm of the output (MoT). hidden_norm: a LayerNorm of h (ONE-PEACE). norm_eps: of both.
        kernels: True runs the ops, of DTensors all but the norms, False plain torch, as tensors of other classes always do.
            May be set at any time.
        device, dtype: as in nn.Linear.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: "Mixture-of-Transformers" (2024); "ONE-PEACE" (2023).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_modalities: int,
        *,
        gated: bool = False,
        activation: str | None = "gelu",
        bias: bool | tuple[bool, bool] = True,
        out_norm: bool = False,
        hidden_norm: bool = False,
        norm_eps: float = 1e-5,
        kernels: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        for name, value in {"dim": dim, "hidden": hidden, "num_modalities": num_modalities}.items():
            check_int(value, name, 1)
        super().__init__()
        self.dim, self.hidden, self.num_modalities = dim, hidden, num_modalities
        self.gated, self.activation, self.norm_eps = gated, activation, norm_eps
        inner, outer = pair(bias)
        modalities = num_modalities
        shapes: dict[str, tuple[int, ...] | None] = {
            "w_in": (modalities, hidden, dim),
            "w_out": (modalities, dim, hidden),
            "w_gate": (modalities, hidden, dim) if gated else None,
            "b_in": (modalities, hidden) if inner else None,
            "b_out": (modalities, dim) if outer else None,
            "b_gate": (modalities, hidden) if gated and inner else None,
            "hidden_norm_weight": (modalities, hidden) if hidden_norm else None,
            "hidden_norm_bias": (modalities, hidden) if hidden_norm else None,
            "out_norm_weight": (modalities, dim) if out_norm else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else new_parameter(shape, device, dtype))
        self.kernels = kernels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each modality as nn.Linear and norms of its own."""
        for name, inputs in (("in", self.dim), ("out", self.hidden), ("gate", self.dim)):
            for kind in ("w", "b"):
                if (parameter := getattr(self, f"{kind}_{name}")) is not None:
                    uniform(parameter, inputs)
        for name, value in (("hidden_norm_weight", 1.0), ("hidden_norm_bias", 0.0), ("out_norm_weight", 1.0)):
            if (parameter := getattr(self, name)) is not None:
                nn.init.constant_(parameter, value)

    def forward(self, x: Tensor, modality_ids: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim].

        Args:
            x: in the dtype of the weights.
            modality_ids: int64 of the leading shape of x, -1 to M - 1; -1 gives 0.

        Raises:
            TypeError, ValueError: modality_ids does not fit; with kernels, as :func:`mmkernels.moe_mlp`.
        """
        ids = _flat_ids(modality_ids, x)
        on = self.kernels and op_takes_sharded(x, ids, *self.parameters())
        if self.hidden_norm_weight is None:
            weights = {name: getattr(self, name) for name in ("w_in", "w_out", "b_in", "b_out", "w_gate", "b_gate")}
            routing = fixed_routing(ids, self.num_modalities)
            out = (moe_mlp if on else reference.moe_mlp)(x, routing, activation=self.activation, **weights)
        else:
            grouped = grouped_linear if on else reference.grouped_linear
            hidden = grouped(x, ids, self.w_in, self.b_in)
            if self.w_gate is None:
                hidden = activate(hidden, self.activation)
            else:
                hidden = activate(grouped(x, ids, self.w_gate, self.b_gate), self.activation) * hidden
            norm: Any = layer_norm if self.kernels and op_takes(hidden) else norm_reference.layer_norm
            normed = norm(hidden, eps=self.norm_eps)
            gain, shift = (
                self._of(parameter, ids, hidden) for parameter in (self.hidden_norm_weight, self.hidden_norm_bias)
            )
            out = grouped(torch.addcmul(shift, normed, gain), ids, self.w_out, self.b_out)
        if self.out_norm_weight is None:
            return out
        norm = rms_norm if self.kernels and op_takes(out) else norm_reference.rms_norm
        normed = norm(out, eps=self.norm_eps)
        return normed * self._of(self.out_norm_weight, ids, out)

    @staticmethod
    def _of(vectors: Tensor, ids: Tensor, beside: Tensor) -> Tensor:
        """Each token's vector, in the shape of `beside`; modality 0's for tokens of none, whose output is 0 anyway."""
        return F.embedding(ids.clamp(min=0), vectors).view(beside.shape)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, num_modalities={self.num_modalities}, gated={self.gated}, "
            f"activation={self.activation}, {super().extra_repr()}"
        )
