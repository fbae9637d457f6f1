"""M3ViT: a ViT for many tasks whose every second block sends tokens to a few of its experts, by a gate of the task.

Source: "M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator Co-design"
(NeurIPS 2022). Headline: M3ViT-small, C = 384, 12 blocks of 12 heads, 16 experts of 384 hidden channels, 4 of them a token;
PASCAL-Context with 5 tasks on 512 x 512 pixels, NYUD-v2 with 2 on 480 x 640. Names of modules are timm's and the published
code's but for the experts and gates, which are stacked here; :meth:`M3ViT.load_pretrained` takes the published ones.

Where paper and code differ, this is the code:

- The paper's task embedding is an MLP of ReLU with 64 channels; the code's is linear, GELU, linear, LayerNorm, of any width.
- The weights of a token's experts are its softmax over all experts, as they are: they do not sum to 1.
- The code's default gate cannot be built; the one that its README uses has noise of a standard deviation / E, and 0 there.
  With noise its load loss compares logits with probabilities: `published_thresholds`.
- Its option to route by the block's input instead of norm2's output is not here, nor are dropout and stochastic depth.

The output is that of the last block, without a norm: every task's decoder has its own. A loss for the gates is
``0.01 * sum(r.losses.importance + r.losses.load for r in output.routings)``; the load has no gradient without noise.

``schedule="streaming"`` is the paper's computation reordering: experts stay in a file, tokens queue for each, and memory
holds two experts, one that computes and one that is being read, whatever E, K, the task and the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models.base import Model, Rule
from mmkernels.nn import LayerNorm, Mlp, MoE, SelfAttention
from mmkernels.ops.checks import check_int
from mmkernels.reference.routing import Routing

GATES = ("multi", "conditioned")
_EPS = 1e-6


class M3ViTOutput(NamedTuple):
    """What the model gives."""

    tokens: Tensor
    """[B, 1 + rows * columns, C], the class token first"""
    routings: tuple[Routing, ...]
    """of the blocks with experts, whose losses are computed when they are asked for"""

    def features(self, rows: int) -> Tensor:
        """The patches as a view [B, C, rows, columns]."""
        return self.tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, -1))


class PatchEmbed(nn.Module):
    """Patches of images: [B, in_channels, height, width] -> [B, patches, C] in raster order."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class TaskFeature(Model):
    """What a task is to its gate: norm(fc2(gelu(fc1(one-hot of the task)))), [task_dim]."""

    def __init__(self, num_tasks: int, task_dim: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.mlp = Mlp(num_tasks, task_dim, task_dim)
        self.norm = LayerNorm(task_dim, eps=_EPS)

    def forward(self, task: int) -> Tensor:
        one_hot = self.mlp.fc1.weight.new_zeros(1, self.num_tasks)
        one_hot[0, task] = 1
        return self.norm(self.mlp(one_hot))[0]


_RULES = (
    Rule(r"(.*\.|)gate\.(?P<index>\d+)\.w_gate", r"\1router", torch.t),
    Rule(r"(.*\.|)gate\.w_gate", r"\1router", lambda gate: gate.T[None]),
    Rule(r"(.*\.|)gate\.(?P<index>\d+)\.w_noise", r"\1router_noise", torch.t),
    Rule(r"(.*\.|)gate\.w_noise", r"\1router_noise", lambda gate: gate.T[None]),
    Rule(r"(.*\.|)experts\.htoh4\.weight", r"\1w_in"),
    Rule(r"(.*\.|)experts\.htoh4\.bias", r"\1b_in"),
    Rule(r"(.*\.|)experts\.h4toh\.weight", r"\1w_out"),
    Rule(r"(.*\.|)experts\.h4toh\.bias", r"\1b_out"),
    Rule(r"gate_task_represent\.(fc[12])\.(.*)", r"task_feature.mlp.\1.\2"),
    Rule(r"gate_task_represent\.norm\.(.*)", r"task_feature.norm.\1"),
)


class M3ViTBlock(Model):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), the latter dense or of experts.

    Args:
        dim: C. num_heads: H. hidden: channels of the dense layer, or of each expert.
        num_experts: E; 0 makes the block dense, and all arguments behind it of no use.
        top_k: experts a token. num_tasks, task_dim, noise_std, published_thresholds, schedule, experts, expert_prefix: as in
            :class:`mmkernels.nn.MoE`.
        kernels, seed: as in :class:`M3ViT`.
    """

    published: ClassVar[Sequence[Rule]] = _RULES

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        num_experts: int = 0,
        top_k: int = 4,
        num_tasks: int = 1,
        task_dim: int = 0,
        noise_std: float | None = None,
        published_thresholds: bool = False,
        schedule: Literal["resident", "streaming"] = "resident",
        experts: str | Path | Mapping[str, Tensor] | None = None,
        expert_prefix: str = "",
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=_EPS)
        self.mlp: Any
        if num_experts == 0:
            self.mlp = Mlp(dim, hidden)
        else:
            self.mlp = MoE(
                dim,
                hidden,
                num_experts,
                top_k,
                kind="softmax_topk",
                bias=True,
                num_tasks=num_tasks,
                task_dim=task_dim,
                noise_std=noise_std,
                published_thresholds=published_thresholds,
                schedule=schedule,
                experts=experts,
                expert_prefix=expert_prefix,
            )
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self,
        x: Tensor,
        task: int = 0,
        task_feature: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x [B, N, C] -> (the same shape, the routing or None of a dense block); noise and generator as in MoE.forward."""
        x = self.attn(self.norm1(x), x)
        if not isinstance(self.mlp, MoE):
            return self.mlp(self.norm2(x), x), None
        return self.mlp(
            self.norm2(x),
            task,
            task_feature=task_feature,
            residual=x,
            noise=noise,
            generator=generator,
            return_routing=True,
        )


class M3ViT(Model):
    """M3ViT's encoder: images [B, in_channels, height, width] and a task -> :class:`M3ViTOutput`.

    Args:
        dim: C. num_heads: H. depth: blocks, of which the second, the fourth, ... have experts.
        image_size: height and width of the images, multiples of patch_size; one number for both.
        num_tasks: gates; or what the one conditioned gate can tell apart.
        gate: "multi", one a task, or "conditioned", one of [token ; feature of the task].
        num_experts: E. top_k: experts a token. mlp_ratio, expert_ratio: hidden channels / C, of dense blocks and of experts.
        task_dim: channels of the feature of a task, for the conditioned gate.
        noise_std: standard deviation of the noise of the gates in training; None: none.
        published_thresholds: the load loss of a noisy gate as published; see the head of this file.
        schedule: "resident", or "streaming": the experts' weights stay where `experts` says. For inference.
        experts: for streaming: a safetensors file of this model's (resident) state_dict, or a mapping of such tensors.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: see the head of this file.
    """

    published: ClassVar[Sequence[Rule]] = _RULES

    def __init__(
        self,
        dim: int = 384,
        num_heads: int = 12,
        *,
        depth: int = 12,
        image_size: int | tuple[int, int] = 512,
        patch_size: int = 16,
        in_channels: int = 3,
        num_tasks: int = 5,
        gate: Literal["multi", "conditioned"] = "multi",
        num_experts: int = 16,
        top_k: int = 4,
        mlp_ratio: float = 4.0,
        expert_ratio: float = 1.0,
        task_dim: int = 64,
        noise_std: float | None = None,
        published_thresholds: bool = False,
        schedule: Literal["resident", "streaming"] = "resident",
        experts: str | Path | Mapping[str, Tensor] | None = None,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate: expected one of {', '.join(GATES)}, got {gate!r}")
        check_int(num_tasks, "num_tasks", 1)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height < 1 or width < 1 or height % patch_size != 0 or width % patch_size != 0:
            raise ValueError(f"image_size: expected multiples of patch_size={patch_size}, got {image_size}")
        self.image_size, self.in_channels, self.num_tasks = (height, width), in_channels, num_tasks
        self.patch_embed = PatchEmbed(in_channels, dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (height // patch_size) * (width // patch_size), dim))
        conditioned = gate == "conditioned"
        self.task_feature = TaskFeature(num_tasks, task_dim) if conditioned else None

        def block(number: int) -> M3ViTBlock:
            if number % 2 == 0:
                return M3ViTBlock(dim, num_heads, int(dim * mlp_ratio))
            return M3ViTBlock(
                dim,
                num_heads,
                int(dim * expert_ratio),
                num_experts=num_experts,
                top_k=top_k,
                num_tasks=1 if conditioned else num_tasks,
                task_dim=task_dim if conditioned else 0,
                noise_std=noise_std,
                published_thresholds=published_thresholds,
                schedule=schedule,
                experts=experts,
                expert_prefix=f"blocks.{number}.mlp." if schedule == "streaming" else "",
            )

        self.blocks = nn.ModuleList(block(number) for number in range(depth))
        streams = [block.mlp.stream for block in self.blocks if isinstance(block.mlp, MoE) and block.mlp.stream is not None]
        for stream in streams[1:]:
            stream.share_buffers(streams[0])
        self.finish(kernels=kernels, seed=seed)

    @property
    def expert_buffer_bytes(self) -> int:
        """What streaming holds of the experts: two of them, after the first call."""
        streams = (block.mlp.stream for block in self.blocks if isinstance(block.mlp, MoE))
        return sum({id(s.buffers): s.buffer_bytes for s in streams if s is not None}.values())

    def forward(self, images: Tensor, task: int = 0, *, generator: torch.Generator | None = None) -> M3ViTOutput:
        """Tokens of the last block and the routings.

        Args:
            images: floating point in the dtype of the weights.
            task: 0 to num_tasks - 1; which gate every block with experts uses.
            generator: of the gates' noise.

        Raises:
            TypeError, ValueError: images or task do not fit.
        """
        expected = (self.in_channels, *self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images: expected [B, {', '.join(map(str, expected))}], got {tuple(images.shape)}")
        check_int(task, "task", 0)
        if task >= self.num_tasks:
            raise ValueError(f"task: expected 0 to {self.num_tasks - 1}, got {task}")
        x = torch.cat((self.cls_token.expand(images.size(0), -1, -1), self.patch_embed(images)), dim=1) + self.pos_embed
        feature = None if self.task_feature is None else self.task_feature(task)
        gate = 0 if feature is not None else task
        routings = []
        for block in self.blocks:
            x, routing = block(x, gate, feature, generator=generator)
            if routing is not None:
                routings.append(routing)
        return M3ViTOutput(x, tuple(routings))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "m3vit_small": M3ViT,
    "m3vit_small_nyud": partial(M3ViT, image_size=(480, 640), num_tasks=2),
    "m3vit_block": partial(M3ViTBlock, 384, 12, 384, num_experts=16, num_tasks=5),
}
