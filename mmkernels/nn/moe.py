"""Sparse mixtures of experts: a router, experts of which each token passes a few, shared experts that all tokens pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.expert_parallel import Group, parallel_moe
from mmkernels.nn.expert_streaming import ExpertStream
from mmkernels.nn.linear import check_activation
from mmkernels.nn.mlp import GluMlp, KernelSwitch, Mlp
from mmkernels.nn.packed import Packing, WeightPack
from mmkernels.nn.parameters import new_parameter, uniform
from mmkernels.nn.tensor_classes import op_takes_sharded
from mmkernels.ops.checks import check_float, check_int
from mmkernels.ops.entry import autocast_dtype
from mmkernels.ops.linear import linear
from mmkernels.ops.moe import moe_mlp, with_lora
from mmkernels.ops.routing import KINDS, Routing, check_capacity, route
from mmkernels.reference import moe as reference
from mmkernels.reference import routing as routing_reference

SCHEDULES = ("resident", "streaming")
NOISY_KINDS = ("noisy_topk", "softmax_topk")
NOISE_FLOOR = 0.01  # of a learned standard deviation (Shazeer; M3ViT)


def expert_shapes(
    experts: int, dim: int, hidden: int, out_dim: int, *, gated: bool, bias: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of the experts' weights by their names in a module and in a file."""
    shapes: dict[str, tuple[int, ...]] = {"w_in": (experts, hidden, dim), "w_out": (experts, out_dim, hidden)}
    if gated:
        shapes["w_gate"] = (experts, hidden, dim)
    if bias:
        shapes |= {f"b_{name[2:]}": shape[:2] for name, shape in list(shapes.items())}
    return shapes


class MoE(Packing, KernelSwitch):
    """A sparse mixture of experts: sum_k weights[t, k] f_e(x[t]) with e = expert_ids[t, k], plus what shared experts give.

    The router computes in float32 whatever the dtype of x, under autocast too. Auxiliary losses are never collected
    anywhere: ``forward(..., return_routing=True)`` returns the :class:`mmkernels.Routing`, whose ``losses`` are computed
    when they are asked for.

    In eval mode on the CPU the experts' weights are kept packed beside themselves, which takes their memory again, as those
    of :class:`Linear` are, by the same rules; those with low-rank additions are not.

    Parameters: router [num_tasks, E, dim + task_dim], router_noise of the same shape with noise_std="learned"; w_in and
    w_gate [E, hidden, dim], w_out [E, out_dim, hidden], b_in and b_gate [E, hidden], b_out [E, out_dim]; lora_down_in
    [E, R, dim], lora_up_in [E, hidden, R] and so on for w_out and w_gate; shared.* of :class:`Mlp` or :class:`GluMlp`. With
    a process group the experts' first dimension is this rank's share, E / W.

    Args:
        dim: C, channels of x. hidden: H, of each expert.
        num_experts: E. top_k: slots a token, K; None: E, which expert_choice and top_p do with.
        out_dim: N; dim where None.
        kind, normalize, capacity_factor, top_p, num_groups, top_groups, group_score, group_size, published_thresholds: as in
            :func:`mmkernels.route`. Of M3ViT: "softmax_topk"; Uni-MoE and Mixtral: "topk_softmax"; IMP: "expert_choice".
        gated: experts are activation(x W_gate^T) * (x W_in^T) W_out^T, SwiGLU with activation "silu".
        activation: None, "gelu" (by erf), "gelu_tanh", "quick_gelu", "silu" or "relu".
        bias: whether experts have biases (the router never has).
        num_tasks: one gate a task, which ``forward(x, task=i)`` chooses by (M3ViT's multi-gate).
        task_dim: one gate of [x ; task_feature], with that many channels of the feature (M3ViT's task-conditioned gate).
        shared_hidden: hidden channels of shared experts together; 0: none.
        noise_std: None, a float, or "learned" (softplus(x router_noise^T) + 0.01); the noise's standard deviation, for
            noisy_topk and softmax_topk; in training only. M3ViT's own is its command line's value / E.
        lora_rank: R of low-rank additions to all weights of the experts (Uni-MoE); 0: none. lora_alpha: their scale is
            lora_alpha / R; R where None.
        packed_dtype: None, or torch.int8 to quantise the weights of experts, shared ones too, in eval mode, as in
            :class:`Linear`.
        kernels: True runs the ops, DTensors too (:mod:`mmkernels.ops.sharding`), False plain torch, as tensors of other
            classes always do. May be set at any time.
        schedule: "resident", or "streaming": weights of the experts stay where `experts` says, and a call holds two experts
            at a time, one that computes and one that is being read. For inference.
        experts: for streaming: the path of a safetensors file, or a mapping of tensors (of any device), with the names and
            shapes above. expert_prefix: what its names begin with.
        process_group: the experts are spread over its W ranks, rank r owns E / W from r E / W on. Every rank gives its own
            tokens; all have to call together. Routing (capacity and losses too) is of a rank's own tokens.
        device, dtype: as in nn.Linear.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, or of no use beside the others.

    Source: "Outrageously Large Neural Networks" (2017); "Mixtral of Experts" (2024); "M3ViT" (2022); "Uni-MoE" (2024);
    "IMP" (2023); shared experts: "DeepSeekMoE" (2024).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int | None,
        *,
        out_dim: int | None = None,
        kind: str = "topk_softmax",
        normalize: bool = False,
        gated: bool = False,
        activation: str | None = "gelu",
        bias: bool = False,
        num_tasks: int = 1,
        task_dim: int = 0,
        shared_hidden: int = 0,
        capacity_factor: float | None = None,
        noise_std: float | Literal["learned"] | None = None,
        top_p: float | None = None,
        num_groups: int = 1,
        top_groups: int | None = None,
        group_score: str = "max",
        group_size: int | None = None,
        published_thresholds: bool = False,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
        schedule: Literal["resident", "streaming"] = "resident",
        experts: str | Path | Mapping[str, Tensor] | None = None,
        expert_prefix: str = "",
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        out_dim = dim if out_dim is None else out_dim
        at_least_1 = {"dim": dim, "hidden": hidden, "out_dim": out_dim, "num_experts": num_experts, "num_tasks": num_tasks}
        for name, value in at_least_1.items():
            check_int(value, name, 1)
        for name, value in {"task_dim": task_dim, "shared_hidden": shared_hidden, "lora_rank": lora_rank}.items():
            check_int(value, name, 0)
        if num_tasks > 1 and task_dim:
            raise ValueError(f"task_dim: expected 0 beside num_tasks {num_tasks}, got {task_dim}")
        _check_routing(kind, top_k, num_experts, top_p, noise_std)
        check_capacity(kind, capacity_factor, group_size)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
        streams = schedule == "streaming"
        if streams != (experts is not None):
            raise ValueError(f"experts: expected {'a file or tensors' if streams else 'None'} with schedule {schedule!r}")
        if streams and lora_rank:
            raise ValueError(f"lora_rank: expected 0 with schedule 'streaming', got {lora_rank}")
        if streams and process_group is not None:
            raise ValueError("process_group: expected None with schedule 'streaming'")
        if packed_dtype is not None and (streams or lora_rank):
            raise ValueError(f"packed_dtype: expected None with schedule 'streaming' or a lora_rank, got {packed_dtype}")
        packs = {name: WeightPack(packed_dtype) for name in ("in", "out", "gate")}
        super().__init__()
        self.dim, self.hidden, self.out_dim, self.num_experts, self.top_k = dim, hidden, out_dim, num_experts, top_k
        self.kind, self.gated, self.activation, self.schedule = kind, gated, activation, schedule
        self.num_tasks, self.task_dim, self.noise_std = num_tasks, task_dim, noise_std
        self.published_thresholds = published_thresholds
        self.route_options: dict[str, Any] = {
            "normalize": normalize,
            "capacity_factor": capacity_factor,
            "top_p": top_p,
            "num_groups": num_groups,
            "top_groups": top_groups,
            "group_score": group_score,
            "group_size": group_size,
        }
        self.group = None if process_group is None else Group(process_group)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = new_parameter((num_tasks, num_experts, dim + task_dim), **factory)
        self.router_noise = nn.Parameter(torch.empty_like(self.router)) if noise_std == "learned" else None
        shapes = expert_shapes(num_experts, dim, hidden, out_dim, gated=gated, bias=bias)
        self.stream = None
        if experts is not None:
            self.stream = ExpertStream(experts, shapes, expert_prefix)
        else:
            owned = num_experts if self.group is None else self.group.share(num_experts)
            shapes = {name: (owned, *shape[1:]) for name, shape in shapes.items()}
        for name in ("w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate"):
            made = self.stream is None and name in shapes
            self.register_parameter(name, new_parameter(shapes[name], **factory) if made else None)
        self._expert_packs = packs
        self.lora_rank = lora_rank
        self.lora_scale = (lora_rank if lora_alpha is None else lora_alpha) / max(1, lora_rank)
        for name in ("in", "out", "gate"):
            down = up = None
            if lora_rank and f"w_{name}" in shapes:
                count, rows, cols = shapes[f"w_{name}"]
                down = new_parameter((count, lora_rank, cols), **factory)
                up = new_parameter((count, rows, lora_rank), **factory)
            self.register_parameter(f"lora_down_{name}", down)
            self.register_parameter(f"lora_up_{name}", up)
        self.shared: Mlp | GluMlp | None = None
        if shared_hidden:
            layers = GluMlp if gated else Mlp
            self.shared = layers(dim, shared_hidden, out_dim, activation, bias, packed_dtype=packed_dtype, **factory)
        self.kernels = kernels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as an nn.Linear of its own, the router too; low-rank additions begin as 0."""
        uniform(self.router, self.dim + self.task_dim)
        if self.router_noise is not None:
            nn.init.zeros_(self.router_noise)
        for name, inputs in (("in", self.dim), ("out", self.hidden), ("gate", self.dim)):
            for kind in ("w", "b"):
                if (parameter := getattr(self, f"{kind}_{name}")) is not None:
                    uniform(parameter, inputs)
            if (down := getattr(self, f"lora_down_{name}")) is not None:
                uniform(down, inputs)
                nn.init.zeros_(getattr(self, f"lora_up_{name}"))

    # --- routing ------------------------------------------------------------------------------------------------------
    def router_logits(self, x: Tensor, task: int = 0, task_feature: Tensor | None = None) -> Tensor:
        """[T, E] in float32 (float64 of float64 x); arguments as in forward."""
        return self._logits(x, self._gate(self.router, task), task_feature)

    def _gate(self, gates: Tensor, task: int) -> Tensor:
        check_int(task, "task", 0)
        if task >= self.num_tasks:
            raise ValueError(f"task: expected 0 to {self.num_tasks - 1}, got {task}")
        return gates[task]

    def _logits(self, x: Tensor, gate: Tensor, task_feature: Tensor | None) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Asked first: there are devices without autocast.
        cast = autocast_dtype(x) is not None
        with torch.autocast(x.device.type, enabled=False) if cast else contextlib.nullcontext():
            rows, gate = x.reshape(-1, self.dim).to(wide), gate.to(wide)
            of_x = gate[:, : self.dim]
            logits = linear(rows, of_x) if self.kernels and op_takes_sharded(rows, of_x) else F.linear(rows, of_x)
            if task_feature is None:
                return logits
            # The feature's part is the same for all tokens that share it, so it is computed once for them.
            of_feature = F.linear(task_feature.to(wide), gate[:, self.dim :])
            return logits + of_feature.expand(*x.shape[:-1], self.num_experts).reshape(-1, self.num_experts)

    def _check_feature(self, x: Tensor, task_feature: Tensor | None) -> None:
        if not self.task_dim:
            if task_feature is not None:
                raise ValueError("task_feature: expected None, the module has task_dim 0")
        elif not isinstance(task_feature, Tensor):
            raise TypeError(f"task_feature: expected a tensor [..., {self.task_dim}], got {type(task_feature).__name__}")
        elif (
            task_feature.dim() < 1
            or task_feature.dim() > x.dim()
            or task_feature.shape[-1] != self.task_dim
            or any(size not in (1, of_x) for size, of_x in zip(task_feature.shape[-2::-1], x.shape[-2::-1], strict=False))
        ):
            raise ValueError(
                f"task_feature: expected what expands to {(*x.shape[:-1], self.task_dim)}, got {tuple(task_feature.shape)}"
            )

    def route(
        self,
        x: Tensor,
        task: int = 0,
        *,
        task_feature: Tensor | None = None,
        selection: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """Where the tokens of x go; arguments as in forward."""
        if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected [..., {self.dim}], got {tuple(x.shape) if isinstance(x, Tensor) else type(x)}")
        self._check_feature(x, task_feature)
        group_size = self.route_options["group_size"]
        if group_size is not None and (tokens := x.numel() // self.dim) % group_size != 0:
            raise ValueError(f"group_size: expected a divisor of the {tokens} tokens, got {group_size}")
        logits = self.router_logits(x, task, task_feature)
        options, kind = dict(self.route_options), self.kind
        if self.training and self.noise_std is not None and self.noise_std != 0:
            std: Any = self.noise_std
            if self.router_noise is not None:
                std = F.softplus(self._logits(x, self._gate(self.router_noise, task), task_feature)) + NOISE_FLOOR
            options |= {"noise_std": std, "noise": noise, "generator": generator}
            options["published_thresholds"] = self.published_thresholds
        elif kind == "noisy_topk":
            kind = "topk_softmax"
        function = route if self.kernels and op_takes_sharded(logits, selection) else routing_reference.route
        return function(logits, self.top_k, kind=kind, selection=selection, **options)

    # --- experts ------------------------------------------------------------------------------------------------------
    def expert_weights(self) -> dict[str, Tensor | None]:
        """What :func:`mmkernels.moe_mlp` takes of this module, low-rank additions added."""
        taken = {name: getattr(self, name) for name in ("w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")}
        for name in ("in", "out", "gate"):
            down, up = getattr(self, f"lora_down_{name}"), getattr(self, f"lora_up_{name}")
            taken[f"w_{name}"] = with_lora(taken[f"w_{name}"], down, up, self.lora_scale, f"w_{name}")
        return taken

    @property
    def packed_dtype(self) -> torch.dtype | None:
        """torch.int8, or None: the weights' own."""
        return self._expert_packs["in"].dtype

    def _packs(self) -> Iterable[tuple[WeightPack, str, str]]:
        if self.lora_rank:  # what the op takes is another weight in every call
            return ()
        return [(pack, f"w_{name}", f"b_{name}") for name, pack in self._expert_packs.items()]

    def _packed(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The same with packs in place of what is packed, each with its bias."""
        if self.training:
            return weights
        for pack, weight, bias in self._packs():
            if weights[weight] is not None and (packed := pack.of(weights[weight], weights[bias])) is not None:
                weights = {**weights, weight: packed, bias: None}
        return weights

    def forward(
        self,
        x: Tensor,
        task: int = 0,
        *,
        task_feature: Tensor | None = None,
        residual: Tensor | None = None,
        selection: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_routing: bool = False,
    ) -> Any:
        """x [..., dim], T tokens -> [..., out_dim].

        Args:
            x: in the dtype of the weights.
            task: which gate, 0 to num_tasks - 1.
            task_feature: what expands to [..., task_dim]: [task_dim], or one a sample, [B, 1, task_dim] of x [B, L, dim].
            residual: None, or of the output's shape and dtype; added last.
            selection: [E] or [T, E]; as in :func:`mmkernels.route`, like noise [T, E] and generator (in training).
            return_routing: also return the routing, whose ``losses`` are the auxiliary ones.

        Returns:
            [..., out_dim] in the dtype of x, or with return_routing (that, :class:`mmkernels.Routing`).

        Raises:
            TypeError, ValueError: task, task_feature or x do not fit; with kernels, as :func:`mmkernels.route` and
                :func:`mmkernels.moe_mlp`.
            RuntimeError: gradients are wanted of the streaming schedule.
        """
        if self.stream is not None and torch.is_grad_enabled():
            raise RuntimeError("schedule: 'streaming' is for inference; expected a call under torch.no_grad()")
        routing = self.route(x, task, task_feature=task_feature, selection=selection, noise=noise, generator=generator)
        if self.shared is not None:
            residual = self.shared(x, residual)
        if self.stream is not None:
            out = self.stream.run(x, routing, self.activation, residual, kernels=self.kernels)
        else:
            weights = self.expert_weights()
            on = self.kernels and op_takes_sharded(x, residual, *weights.values())
            options = {"activation": self.activation, "residual": residual, **(self._packed(weights) if on else weights)}
            if self.group is not None:
                out = parallel_moe(x, routing, self.group, moe_mlp if on else reference.moe_mlp, **options)
            else:
                out = (moe_mlp if on else reference.moe_mlp)(x, routing, **options)
        return (out, routing) if return_routing else out

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, out_dim={self.out_dim}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, kind={self.kind!r}, gated={self.gated}, activation={self.activation}, "
            f"schedule={self.schedule!r}, packed_dtype={self.packed_dtype}, {super().extra_repr()}"
        )


def _check_routing(kind: Any, top_k: Any, num_experts: int, top_p: Any, noise_std: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if top_k is not None:
        check_int(top_k, "top_k", 1)
        if top_k > num_experts:
            raise ValueError(f"top_k: expected at most num_experts, {num_experts}, got {top_k}")
    elif kind != "expert_choice" and top_p is None:
        raise ValueError(f"top_k: expected a number of experts with kind {kind!r}, got None")
    if noise_std is None:
        if kind == "noisy_topk":
            raise ValueError("noise_std: expected a number or 'learned' with kind 'noisy_topk', got None")
        return
    if kind not in NOISY_KINDS:
        raise ValueError(f"noise_std: expected None with kind {kind!r}; it is for {' and '.join(NOISY_KINDS)}")
    if isinstance(noise_std, str):
        if noise_std != "learned":
            raise ValueError(f"noise_std: expected None, a number or 'learned', got {noise_std!r}")
        return
    check_float(noise_std, "noise_std")
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std: expected a number of at least 0, got {noise_std}")
