"""Feed-forward layers, one for each skill, of which a task activates a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels.nn.linear import check_activation
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.parameters import new_parameter, uniform
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.checks import check_int
from mmkernels.ops.linear import mlp
from mmkernels.reference import linear as reference

REDUCTIONS = ("mean", "sum")


class SkillMlp(KernelSwitch):
    """The mean or the sum of what the active skills' feed-forward layers give.

    The skills are the same for all tokens of a call, so the active layers are one wider layer, a call of
    :func:`mmkernels.mlp`; the others compute nothing, and their gradients are 0.

    Parameters: w_in, w_gate [S, hidden, dim], w_out [S, dim, hidden], b_in, b_gate [S, hidden], b_out [S, dim].

    Args:
        dim: C. hidden: H, of each skill. num_skills: S.
        reduce: "mean" or "sum".
        gated: activation(x W_gate^T) * (x W_in^T) instead of activation(x W_in^T).
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        bias: whether the layers have biases.
        kernels: True runs the op, False plain torch, as tensors of other classes (DTensor) always do. May be set any time.
        device, dtype: as in nn.Linear.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: "One Model, Multiple Modalities: A Sparsely Activated Approach for Text, Sound, Image, Video and Code" (2022),
    whose code is not public; the mean is that of "SkillNet-NLU" (2022).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_skills: int,
        *,
        reduce: Literal["mean", "sum"] = "mean",
        gated: bool = False,
        activation: str | None = "gelu",
        bias: bool = True,
        kernels: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        for name, value in {"dim": dim, "hidden": hidden, "num_skills": num_skills}.items():
            check_int(value, name, 1)
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        super().__init__()
        self.dim, self.hidden, self.num_skills = dim, hidden, num_skills
        self.reduce, self.activation = reduce, activation
        shapes: dict[str, tuple[int, ...] | None] = {
            "w_in": (num_skills, hidden, dim),
            "w_gate": (num_skills, hidden, dim) if gated else None,
            "w_out": (num_skills, dim, hidden),
            "b_in": (num_skills, hidden) if bias else None,
            "b_gate": (num_skills, hidden) if bias and gated else None,
            "b_out": (num_skills, dim) if bias else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else new_parameter(shape, device, dtype))
        self.kernels = kernels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each skill as nn.Linear layers of its own."""
        for name, inputs in (("in", self.dim), ("gate", self.dim), ("out", self.hidden)):
            for kind in ("w", "b"):
                if (parameter := getattr(self, f"{kind}_{name}")) is not None:
                    uniform(parameter, inputs)

    def forward(self, x: Tensor, skills: Sequence[int]) -> Tensor:
        """x [..., dim] -> [..., dim].

        Args:
            x: in the dtype of the weights.
            skills: the active ones, at least one, each 0 to S - 1 and named once.

        Raises:
            TypeError, ValueError: skills does not fit; with kernels, as :func:`mmkernels.mlp`.
        """
        active = list(skills)
        for skill in active:
            check_int(skill, "skills", 0)
        if not active or max(active) >= self.num_skills or len(set(active)) < len(active):
            raise ValueError(f"skills: expected different ones of 0 to {self.num_skills - 1}, got {active}")

        def joined(name: str, dim: int = 0) -> Any:
            parameter = getattr(self, name)
            return None if parameter is None else torch.cat([parameter[skill] for skill in active], dim)

        b_out = None if self.b_out is None else sum(self.b_out[skill] for skill in active)
        weights = (joined("w_in"), joined("w_out", 1), joined("b_in"), b_out)
        gate = {"w_gate": joined("w_gate"), "b_gate": joined("b_gate")}
        on = self.kernels and op_takes(x, *weights, *gate.values())
        out = (mlp if on else reference.mlp)(x, *weights, **gate, activation=self.activation)
        return out / len(active) if self.reduce == "mean" and len(active) > 1 else out

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, num_skills={self.num_skills}, reduce={self.reduce!r}, "
            f"gated={self.w_gate is not None}, activation={self.activation}, {super().extra_repr()}"
        )
