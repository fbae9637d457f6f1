"""PVTv2 and its EcoFormer: a pyramid of stages of overlapping patches, B0 to B4.

Sources: "PVT v2: Improved Baselines with Pyramid Vision Transformer" (2021), "EcoFormer: Energy-Saving Attention with Linear
Complexity" (2022). Module and parameter names are timm's, so that its checkpoints load; :meth:`PvtV2.load_pretrained` also
takes those of the published code, of PVTv2 and of EcoFormer.

EcoFormer hashes the attention of all stages but the last, over all their tokens: PVT's spatial reduction is gone. The last
stage (49 tokens of an image of 224 x 224) has plain softmax attention. There is no dropout and no stochastic depth; the
published training has none either once attention is hashed (it runs the model in eval mode).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.pyramid import (
    GlobalAttention,
    Grid,
    HashAttention,
    Pyramid,
    as_image,
    as_tokens,
    check_arguments,
)
from mmkernels.nn import LayerNorm, Linear

_EPS = 1e-6  # of the norms of blocks and stages; those of patches and of spatial reduction have torch's 1e-5


class OverlapPatchEmbed(nn.Module):
    """Overlapping patches of an image: [B, C', height, width] -> (tokens [B, N, C], grid)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride, patch_size // 2)
        self.norm = LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Grid]:
        patches = self.proj(image)
        return self.norm(as_tokens(patches).contiguous()), (patches.shape[2], patches.shape[3])


class ConvMlp(nn.Module):
    """fc2(gelu(dwconv(fc1(x)))) + residual, the convolution over the grid, 3 x 3 in each channel."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, inner)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.fc2 = Linear(inner, dim)

    def forward(self, x: Tensor, grid: Grid, residual: Tensor) -> Tensor:
        hidden = F.gelu(self.dwconv(as_image(self.fc1(x), grid)))
        return self.fc2(as_tokens(hidden).contiguous(), residual)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); x [B, N, C]."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=_EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=_EPS)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.attn(self.norm1(x), grid)
        return self.mlp(self.norm2(x), grid, x)


class Stage(nn.Module):
    """Blocks and a norm over the tokens of one grid: x [B, N, C] -> [B, N, C]. Its patches (those of the first stage are the
    model's) are made before it is called."""

    def __init__(self, downsample: OverlapPatchEmbed | None, blocks: Sequence[Block], dim: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(dim, eps=_EPS)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)


class PvtV2(Pyramid):
    """PVTv2 with hashed, linear or softmax attention: images [B, in_channels, height, width] -> logits [B, num_classes].

    With hashed attention the hash functions must be fitted (:func:`mmkernels.nn.fit_hash`) or loaded before the first
    forward.

    Args:
        dims: channels of each stage. num_heads, depths, mlp_ratios: of each stage.
        sr_ratios: of each stage, how much coarser the grid of keys and values is in softmax attention; ones make it plain
            attention over all tokens, with which EcoFormer's fine-tuning begins. Hashed and linear attention have none.
        attention: "hash", "linear" (features elu(x) + 1) or "softmax", of all stages but the last, which has "softmax".
        bits, supports, self_term, offset: of hashed attention, as in :class:`mmkernels.nn.EcoFormerAttention`.
        in_channels: of the images. num_classes: of the head.
        patch_size, stride: of the first patches; later stages have 3 and 2.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights and of the projections of hash functions.

    Raises:
        ValueError: attention is none of the three, or the stages of the arguments are not as many.

    Source: see the head of this file.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_heads: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        *,
        attention: str = "hash",
        bits: int = 16,
        supports: int = 25,
        self_term: str = "own",
        offset: float | str | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        patch_size: int = 7,
        stride: int = 4,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(attention, dims, num_heads=num_heads, depths=depths, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        self.in_channels, self.reduction = in_channels, stride * 2 ** (len(dims) - 1)
        self.patch_embed = OverlapPatchEmbed(in_channels, dims[0], patch_size, stride)

        def attend(stage: int) -> nn.Module:
            dim, heads = dims[stage], num_heads[stage]
            if attention == "softmax" or stage == len(dims) - 1:
                return GlobalAttention(dim, heads, sr_ratios[stage])
            if attention == "linear":
                return GlobalAttention(dim, heads, linear=True)
            return HashAttention(dim, heads, bits=bits, supports=supports, self_term=self_term, offset=offset)

        stages = []
        for i, (dim, depth, ratio) in enumerate(zip(dims, depths, mlp_ratios, strict=True)):
            downsample = None if i == 0 else OverlapPatchEmbed(dims[i - 1], dim, 3, 2)
            stages.append(Stage(downsample, [Block(dim, attend(i), ratio) for _ in range(depth)], dim))
        self.stages = nn.ModuleList(stages)
        self.head = Linear(dims[-1], num_classes)
        self.finish(kernels=kernels, seed=seed)

    def features(self, images: Tensor) -> Tensor:
        """[B, C of the last stage], the mean over its tokens."""
        self.check_images(images, multiple=False)
        x, grid = self.patch_embed(images)
        for stage in self.stages:
            if stage.downsample is not None:
                x, grid = stage.downsample(as_image(x, grid))
            x = stage(x, grid)
        return x.mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes].

        Raises:
            ValueError: images have another shape, or edges shorter than one token of the last stage. RuntimeError: hash
                functions are not fitted.
        """
        return self.head(self.features(images))

    @staticmethod
    def own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def own(name: str) -> str:
            name = name.replace("dwconv.dwconv", "dwconv")
            if match := re.match(r"(patch_embed|block|norm)(\d+)\.", name):
                part, stage = match[1], int(match[2]) - 1
                rest = name[match.end() :]
                if part == "patch_embed":
                    return f"patch_embed.{rest}" if stage == 0 else f"stages.{stage}.downsample.{rest}"
                return f"stages.{stage}.{'blocks' if part == 'block' else 'norm'}.{rest}"
            return name

        return {own(name): value for name, value in state_dict.items()}


_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
}

MODELS: dict[str, Callable[..., PvtV2]] = {
    f"pvt_v2_{size}_ecoformer": partial(PvtV2, dims=dims, num_heads=(1, 2, 5, 8), depths=depths)
    for size, (dims, depths) in _SIZES.items()
}
