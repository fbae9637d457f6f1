"""Twins-SVT and its EcoFormer: a pyramid whose blocks look at windows and at everything in turn.

Sources: "Twins: Revisiting the Design of Spatial Attention in Vision Transformers" (2021), "EcoFormer: Energy-Saving
Attention with Linear Complexity" (2022). Module and parameter names are timm's, which are those of the published code too;
:meth:`TwinsSvt.load_pretrained` takes checkpoints of either.

EcoFormer hashes the attention of every block in all stages but the last, over all their tokens, also of those blocks that
looked at windows of 7 x 7. The last stage has plain softmax attention over all tokens, which at 224 x 224 pixels is one
window. There is no dropout and no stochastic depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from mmkernels.models.pyramid import (
    GlobalAttention,
    Grid,
    HashAttention,
    LocalAttention,
    Pyramid,
    as_image,
    as_tokens,
    check_arguments,
)
from mmkernels.nn import LayerNorm, Linear, Mlp

_EPS = 1e-6  # of the norms of blocks and of the last; those of patches and of spatial reduction have torch's 1e-5


class PatchEmbed(nn.Module):
    """Patches of an image: [B, C', height, width] -> (tokens [B, N, C], grid)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Grid]:
        patches = self.proj(image)
        return self.norm(as_tokens(patches).contiguous()), (patches.shape[2], patches.shape[3])


class PosConv(nn.Module):
    """Positions by a convolution over the grid, 3 x 3 in each channel: x + conv(x); x [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return as_tokens(self.proj(as_image(x, grid))).contiguous() + x


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); x [B, N, C]."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=_EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.attn(self.norm1(x), grid)
        return self.mlp(self.norm2(x), x)


class TwinsSvt(Pyramid):
    """Twins-SVT with hashed, linear or softmax attention: images [B, in_channels, height, width] -> logits [B, num_classes].

    With hashed attention the hash functions must be fitted (:func:`mmkernels.nn.fit_hash`) or loaded before the first
    forward.

    Args:
        dims: channels of each stage. num_heads, depths, mlp_ratios: of each stage.
        sr_ratios: of each stage, how much coarser the grid of keys and values is in the blocks that look at everything, with
            softmax attention.
        window: extent of the windows of the other blocks (the first, the third, ...), with softmax attention.
        attention: "hash", "linear" (features elu(x) + 1), both over all tokens in all stages but the last; or "softmax", as
            Twins has it. The last stage is plain softmax attention beside the former two.
        bits, supports, self_term, offset: of hashed attention, as in :class:`mmkernels.nn.EcoFormerAttention`.
        in_channels: of the images. num_classes: of the head. patch_size: of the first patches; later stages have 2.
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
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        *,
        window: int = 7,
        attention: str = "hash",
        bits: int = 16,
        supports: int = 25,
        self_term: str = "own",
        offset: float | str | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        patch_size: int = 4,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(attention, dims, num_heads=num_heads, depths=depths, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        self.in_channels, self.reduction = in_channels, patch_size * 2 ** (len(dims) - 1)

        def attend(stage: int, block: int) -> nn.Module:
            dim, heads = dims[stage], num_heads[stage]
            if attention == "softmax":
                if block % 2 == 0:
                    return LocalAttention(dim, heads, window)
                return GlobalAttention(dim, heads, sr_ratios[stage])
            if stage == len(dims) - 1:
                return GlobalAttention(dim, heads)
            if attention == "linear":
                return GlobalAttention(dim, heads, linear=True)
            return HashAttention(dim, heads, bits=bits, supports=supports, self_term=self_term, offset=offset)

        sizes = [(in_channels, patch_size), *((dim, 2) for dim in dims[:-1])]
        self.patch_embeds = nn.ModuleList(
            PatchEmbed(channels, dim, size) for (channels, size), dim in zip(sizes, dims, strict=True)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(dims[i], attend(i, j), mlp_ratios[i]) for j in range(depth))
            for i, depth in enumerate(depths)
        )
        self.pos_block = nn.ModuleList(PosConv(dim) for dim in dims)
        self.norm = LayerNorm(dims[-1], eps=_EPS)
        self.head = Linear(dims[-1], num_classes)
        self.finish(kernels=kernels, seed=seed)

    def features(self, images: Tensor) -> Tensor:
        """[B, C of the last stage], the mean over its tokens."""
        self.check_images(images, multiple=True)
        image = images
        for embed, blocks, positions in zip(self.patch_embeds, self.blocks, self.pos_block, strict=True):
            x, grid = embed(image)
            for i, block in enumerate(blocks):
                x = block(x, grid)
                if i == 0:
                    x = positions(x, grid)
            image = as_image(x, grid)
        return self.norm(x).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes].

        Raises:
            ValueError: images have another shape, or edges that are no multiple of one token of the last stage.
                RuntimeError: hash functions are not fitted.
        """
        return self.head(self.features(images))


MODELS: dict[str, Callable[..., TwinsSvt]] = {
    "twins_svt_small_ecoformer": partial(TwinsSvt, dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16), depths=(2, 2, 10, 4)),
}
