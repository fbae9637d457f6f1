"""IMP: one encoder for videos, images and text, whose last layers are mixtures in which experts choose their tokens.

Source: "Alternating Gradient Descent and Mixture-of-Experts for Integrated Multimodal Perception" (NeurIPS 2023). Headline:
IMP-MoE-L, C = 1024, 24 layers of 16 heads, 4096 hidden channels; B: 768, 12, 12, 3072; the last 6 layers have 16 experts,
of which each takes its share of the tokens (capacity factor 1), so that a token uses as much as in the dense model: on
average one expert, in fact none to all 16. The published labels, 90 M and 350 M, must be of what a token uses; the layers
here have 85 M and 302 M of that, 510 M and 1057 M with all experts. The modalities go through the same weights, each on its
own; there is no router of modalities and no auxiliary loss.

Where paper and code differ, and what is not in either:

- The experts are in the last layers (the code's `distribution='last'`), not in every other one.
- Queries and keys are normalised in the models with experts, in all of their layers; the code's dense ones leave that out
  (`qk_norm`). No layer and no norm has a bias.
- The code routes in groups of at most 2048 tokens, whose number fits its devices. Here a group is what `group_size` says, a
  divisor of a batch's tokens; None: all of them. Across the samples of a group a token's experts depend on the other
  samples, as published.
- Dispatch is in bfloat16 there; here it is in the dtype of the tokens, and the router in float32.
- The embeddings are simpler here. Words have learned positions, and patches of 4 frames x 16 x 16 pixels the sum of learned
  ones for each axis, of which a shorter or smaller video takes the first (the paper alternates lengths and resolutions).
  The code normalises that sum, spreads the patches of a smaller video over all positions, and multiplies the sum of both by
  one more matrix of the modality. An image is a video whose frames are equal. Audio is not here.
- What the objectives need behind the encoder (poolings, projections, decoders) is not here.

The published weights are not public, so there is nothing to load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models.base import Model, check_floats, check_ids
from mmkernels.nn import LayerNorm, Mlp, MoE, SelfAttention
from mmkernels.ops.checks import check_int
from mmkernels.reference.routing import Routing

_FRAMES, _PIXELS = 4, 16  # of a patch


class ImpOutput(NamedTuple):
    """What the model gives, None of what it was not given."""

    text: Tensor | None
    """[B, L, C]"""
    video: Tensor | None
    """[B, times * rows * columns, C] in this order"""
    routings: tuple[Routing, ...]
    """of the layers with experts, of the text first"""


class ImpBlock(Model):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), the latter of experts or dense; nothing has a bias.

    Args:
        dim: C. num_heads: H. hidden: channels of the dense layer, or of each expert.
        num_experts: E; 0 makes the block dense.
        qk_norm, capacity_factor, group_size, eps, kernels, seed: as in :class:`Imp`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        num_experts: int = 0,
        qk_norm: bool = True,
        capacity_factor: float = 1.0,
        group_size: int | None = None,
        eps: float = 1e-6,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, bias=False)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False, proj_bias=False)
        if qk_norm:  # with the eps of the others, and no bias
            self.attn.q_norm = LayerNorm(self.attn.head_dim, eps, bias=False)
            self.attn.k_norm = LayerNorm(self.attn.head_dim, eps, bias=False)
        self.norm2 = LayerNorm(dim, eps, bias=False)
        self.mlp: MoE | Mlp
        if num_experts == 0:
            self.mlp = Mlp(dim, hidden, activation="gelu_tanh", bias=False)
        else:
            self.mlp = MoE(
                dim,
                hidden,
                num_experts,
                None,
                kind="expert_choice",
                activation="gelu_tanh",
                capacity_factor=capacity_factor,
                group_size=group_size,
            )
        self.finish(kernels=kernels, seed=seed)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """x [B, N, C] -> (the same shape, the routing or None of a dense block).

        To tokens that no expert takes the layer adds nothing.

        Raises:
            TypeError, ValueError: with kernels, as the ops.
        """
        x = self.attn(self.norm1(x), x)
        if not isinstance(self.mlp, MoE):
            return self.mlp(self.norm2(x), x), None
        return self.mlp(self.norm2(x), residual=x, return_routing=True)


class Imp(Model):
    """IMP's encoder -> :class:`ImpOutput`.

    Args:
        dim: C. num_heads: H. hidden: of dense layers and of each expert. depth: layers.
        moe_depth: the last ones, which have experts. num_experts: E.
        qk_norm: a norm of each head of q and of k, in all layers.
        capacity_factor: an expert takes round(factor T / E) tokens of a group of T.
        group_size: T, a divisor of a batch's tokens; None: all of them.
        vocab_size, max_text_len: of text. max_frames, image_size: the longest video and the largest edge, multiples of 4 and
            of 16.
        eps: of the norms.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: see the head of this file.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        depth: int,
        moe_depth: int = 6,
        num_experts: int = 16,
        qk_norm: bool = True,
        capacity_factor: float = 1.0,
        group_size: int | None = None,
        vocab_size: int = 32000,
        max_text_len: int = 256,
        max_frames: int = 32,
        image_size: int = 256,
        eps: float = 1e-6,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_int(depth, "depth", 0)
        check_int(moe_depth, "moe_depth", 0)
        if moe_depth > depth:
            raise ValueError(f"moe_depth: expected 0 to {depth}, got {moe_depth}")
        for name, value, of in (("max_frames", max_frames, _FRAMES), ("image_size", image_size, _PIXELS)):
            check_int(value, name, 0)
            if value < of or value % of != 0:
                raise ValueError(f"{name}: expected a multiple of {of}, got {value}")
        self.vocab_size, self.max_text_len = vocab_size, max_text_len
        self.max_frames, self.image_size = max_frames, image_size
        self.text_embed = nn.Embedding(vocab_size, dim)
        self.text_pos_embed = nn.Parameter(torch.empty(max_text_len, dim))
        patch = (_FRAMES, _PIXELS, _PIXELS)
        self.patch_embed = nn.Conv3d(3, dim, patch, patch, bias=False)
        edge = image_size // _PIXELS
        self.time_pos_embed = nn.Parameter(torch.empty(max_frames // _FRAMES, 1, 1, dim))
        self.row_pos_embed = nn.Parameter(torch.empty(edge, 1, dim))
        self.column_pos_embed = nn.Parameter(torch.empty(edge, dim))
        experts = partial(ImpBlock, num_experts=num_experts, capacity_factor=capacity_factor, group_size=group_size)
        self.blocks = nn.ModuleList(
            (experts if number >= depth - moe_depth else ImpBlock)(dim, num_heads, hidden, qk_norm=qk_norm, eps=eps)
            for number in range(depth)
        )
        self.norm = LayerNorm(dim, eps, bias=False)
        self.finish(kernels=kernels, seed=seed)

    def forward(self, text: Tensor | None = None, video: Tensor | None = None) -> ImpOutput:
        """The tokens of each modality that is given, after the last norm.

        Args:
            text: ids [B, L] int64, L at most max_text_len; without padding (the published batches have none).
            video: [B, 3, frames, height, width] in the dtype of the weights, in multiples of 4 and 16.

        Raises:
            TypeError, ValueError: neither is given, or a shape does not fit.
        """
        if text is None and video is None:
            raise ValueError("text: expected it or video, got neither")
        routings: list[Routing] = []
        of_text = of_video = None
        if text is not None:
            check_ids(text, "text", self.vocab_size)
            if text.size(1) > self.max_text_len:
                raise ValueError(f"text: expected at most {self.max_text_len} words, got {text.size(1)}")
            of_text = self._encoded(self.text_embed(text) + self.text_pos_embed[: text.size(1)], routings)
        if video is not None:
            of_video = self._encoded(self._patches(video), routings)
        return ImpOutput(of_text, of_video, tuple(routings))

    def _patches(self, video: Tensor) -> Tensor:
        check_floats(video, "video", "[B, 3, frames, height, width]")
        longest = (self.max_frames, self.image_size, self.image_size)
        if (
            video.dim() != 5
            or video.size(1) != 3
            or any(
                not 1 <= size <= most or size % of != 0
                for size, most, of in zip(video.shape[2:], longest, (_FRAMES, _PIXELS, _PIXELS), strict=True)
            )
        ):
            raise ValueError(
                f"video: expected [B, 3, frames, height, width] of at most {longest} in multiples of {_FRAMES} and "
                f"{_PIXELS}, got {tuple(video.shape)}"
            )
        patches = self.patch_embed(video).permute(0, 2, 3, 4, 1)
        times, rows, columns = patches.shape[1:4]
        positions = self.time_pos_embed[:times] + self.row_pos_embed[:rows] + self.column_pos_embed[:columns]
        return (patches + positions).flatten(1, 3)

    def _encoded(self, x: Tensor, routings: list[Routing]) -> Tensor:
        for block in self.blocks:
            x, routing = block(x)
            if routing is not None:
                routings.append(routing)
        return self.norm(x)


_BASE = partial(Imp, 768, 12, 3072, depth=12)
_LARGE = partial(Imp, 1024, 16, 4096, depth=24)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "imp_base": partial(_BASE, moe_depth=0, qk_norm=False),
    "imp_large": partial(_LARGE, moe_depth=0, qk_norm=False),
    "imp_moe_base": _BASE,
    "imp_moe_large": _LARGE,
    "imp_moe_block": partial(ImpBlock, 768, 12, 3072, num_experts=16),
}
