"""CrossViT: two vision transformers, of small and of large patches, that meet by their class tokens.

Source: "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification" (ICCV 2021). Module and parameter
names are timm's, so that its checkpoints load; :meth:`CrossVit.load_pretrained` also takes those of the published code.

Headline: CrossViT-15 (27.5 M parameters) has 81.5 % on ImageNet, CrossViT-18 (43.3 M) 82.5 %; branch s has patches of 12
pixels of an image of 240 x 240 (400 tokens), branch l patches of 16 of the image resized to 224 x 224 (196 tokens).

A multi-scale block runs each branch's own transformer blocks. Then the class token of each branch is projected to the width
of the other one, attends to that one's patches (one query: linear in their number) and is projected back:

    z = [project(class_i); patches_j]        c = z_0 + attention of LN(z)_0 to LN(z)        class_i' = project back(c)

Four things in the published code that the paper's text does not say or says otherwise:

- The projected class token itself is among the keys and values.
- Nothing is added after the way back: the old class token lives on in c alone.
- Each projection is a LayerNorm, a GELU and a linear layer, in this order.
- Both branches see each other as they were before the fusion. There is no MLP behind it.

The normalisation before the heads is of the class tokens alone; timm's normalises the patches too and does not use them.
There is no dropout and no stochastic depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.weights import draw_weights, load_weights
from mmkernels.nn import LayerNorm, Linear, Mlp, SelfAttention
from mmkernels.nn.attention import attend
from mmkernels.nn.linear import added
from mmkernels.nn.mlp import KernelSwitch

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches of images: [B, in_channels, S, S] -> [B, (S / patch_size)^2, C] in raster order.

    `three_convs` are the overlapping convolutions of the models with a dagger, for patches of 12 or 16 pixels.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, three_convs: bool) -> None:
        super().__init__()
        self.proj: nn.Module
        if not three_convs:
            self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
            return
        strides = {12: (3, 1), 16: (2, 2)}
        if patch_size not in strides:
            raise ValueError(f"patch_sizes: expected 12 or 16 with three_convs, got {patch_size}")
        second, third = strides[patch_size]
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, dim // 4, 7, stride=4, padding=3),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 4, dim // 2, 3, stride=second, padding=0 if second == 3 else 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, dim, 3, stride=third, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); x [B, N, C]."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(self.norm2(x), x)


class ClassAttention(KernelSwitch):
    """The first token attends to all: x [B, N, C] -> residual + [B, 1, C]. :class:`mmkernels.nn.CrossAttention` by the
    published names."""

    def __init__(self, dim: int, num_heads: int, *, kernels: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wq, self.wk, self.wv = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.proj = Linear(dim, dim)
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        projected = (self.wq(x[:, :1]), self.wk(x), self.wv(x))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in projected)
        return added(self.proj, attend(q, k, v, self.kernels), residual)


class CrossAttentionBlock(KernelSwitch):
    """x_0 + attn(norm1(x)): x [B, N, C] -> [B, 1, C]."""

    def __init__(self, dim: int, num_heads: int, *, kernels: bool = True) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=_EPS)
        self.attn = ClassAttention(dim, num_heads)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x), x[:, :1])


def projection(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(LayerNorm(dim, eps=_EPS), nn.GELU(), Linear(dim, out_dim))


class MultiScaleBlock(KernelSwitch):
    """Both branches' blocks and the fusion: two [B, N_i, C_i] -> two of the same shapes.

    Args:
        dims, num_heads, mlp_ratios: of each branch.
        depth: transformer blocks of each branch, and fusions: 0 is one, as all published models have it. Of n > 1 those
            after the first see the class token alone.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        depth: Sequence[int],
        *,
        kernels: bool = True,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(dims[i], num_heads[i], mlp_ratios[i]) for _ in range(depth[i]))) for i in (0, 1)
        )
        self.projs = nn.ModuleList(projection(dims[i], dims[1 - i]) for i in (0, 1))

        def fusion(other: int) -> nn.Module:
            if depth[2] == 0:
                return CrossAttentionBlock(dims[other], num_heads[other])
            return nn.Sequential(*(CrossAttentionBlock(dims[other], num_heads[other]) for _ in range(depth[2])))

        self.fusion = nn.ModuleList((fusion(1), fusion(0)))
        self.revert_projs = nn.ModuleList(projection(dims[1 - i], dims[i]) for i in (0, 1))
        self.kernels = kernels

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = [blocks(x) for blocks, x in zip(self.blocks, xs, strict=True)]
        patches = [x[:, 1:] for x in xs]
        fused = []
        for i in (0, 1):
            z = torch.cat((self.projs[i](xs[i][:, :1]), patches[1 - i]), dim=1)
            class_token = self.revert_projs[i](self.fusion[i](z))
            fused.append(torch.cat((class_token, patches[i]), dim=1))
        return fused


class CrossVit(KernelSwitch):
    """CrossViT: images [B, in_channels, height, width] -> logits [B, num_classes], the mean of both branches'.

    Args:
        dims: C of branches s and l. num_heads: of each branch.
        depths: of each multi-scale block: transformer blocks of s, of l, and fusions (0 is one).
        mlp_ratios: inner channels of the MLPs over C, of each branch.
        image_sizes: edges to which each branch resizes the images, (408, 384) in the models of 384 pixels; multiples of
            patch_sizes. patch_sizes: edges of each branch's patches.
        three_convs: True makes the patches by three convolutions (the models with a dagger).
        in_channels: of the images. num_classes: of the heads.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights: truncated normal, standard deviation 0.02; biases 0; convolutions as torch draws them.

    Raises:
        ValueError: an image size is no multiple of its patch size, num_heads does not divide dims, or three_convs has other
            patches than 12 or 16.

    Source: see the head of this file.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_heads: Sequence[int],
        depths: Sequence[Sequence[int]],
        mlp_ratios: Sequence[float] = (3, 3),
        *,
        image_sizes: Sequence[int] = (240, 224),
        patch_sizes: Sequence[int] = (12, 16),
        three_convs: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for image_size, patch_size in zip(image_sizes, patch_sizes, strict=True):
            # The published count of tokens is right for multiples alone.
            if image_size % patch_size != 0:
                raise ValueError(f"image_sizes: expected multiples of {tuple(patch_sizes)}, got {tuple(image_sizes)}")
        self.in_channels, self.image_sizes = in_channels, tuple(image_sizes)
        tokens = [1 + (image_sizes[i] // patch_sizes[i]) ** 2 for i in (0, 1)]
        self.patch_embed = nn.ModuleList(PatchEmbed(in_channels, dims[i], patch_sizes[i], three_convs) for i in (0, 1))
        self.cls_token_0 = nn.Parameter(torch.empty(1, 1, dims[0]))
        self.cls_token_1 = nn.Parameter(torch.empty(1, 1, dims[1]))
        self.pos_embed_0 = nn.Parameter(torch.empty(1, tokens[0], dims[0]))
        self.pos_embed_1 = nn.Parameter(torch.empty(1, tokens[1], dims[1]))
        self.blocks = nn.ModuleList(MultiScaleBlock(dims, num_heads, mlp_ratios, depth) for depth in depths)
        self.norm = nn.ModuleList(LayerNorm(dim, eps=_EPS) for dim in dims)
        self.head = nn.ModuleList(Linear(dim, num_classes) for dim in dims)
        self.kernels = kernels
        draw_weights(self, seed)

    def embed(self, images: Tensor) -> list[Tensor]:
        """The tokens of each branch, [B, 1 + patches, C], the class token first."""
        starts = ((self.cls_token_0, self.pos_embed_0), (self.cls_token_1, self.pos_embed_1))
        xs = []
        for size, patch_embed, (class_token, positions) in zip(self.image_sizes, self.patch_embed, starts, strict=True):
            resized = images
            if images.shape[2:] != (size, size):
                resized = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
            first = (class_token + positions[:, :1]).expand(images.shape[0], -1, -1)
            xs.append(torch.cat((first, patch_embed(resized) + positions[:, 1:]), dim=1))
        return xs

    def features(self, images: Tensor) -> list[Tensor]:
        """The class token of each branch, normalised: [B, C of the branch]."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images: expected [B, {self.in_channels}, height, width], got {list(images.shape)}")
        xs = self.embed(images)
        for block in self.blocks:
            xs = block(xs)
        return [norm(x[:, 0]) for norm, x in zip(self.norm, xs, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes]; images of any height and width.

        Raises:
            ValueError: images are not [B, in_channels, height, width].
        """
        s, l = (head(x) for head, x in zip(self.head, self.features(images), strict=True))  # noqa: E741
        return (s + l) / 2

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Takes the weights of timm's or of the published code's model of the same size.

        Returns:
            The names in `state_dict` that found no place.

        Raises:
            ValueError: names are missing. RuntimeError: shapes do not fit, as torch's load_state_dict says it.
        """
        own = {re.sub(r"^(cls_token|pos_embed)\.", r"\1_", name): value for name, value in state_dict.items()}
        return load_weights(self, own)


# name -> dims, heads, blocks of branch l, inner channels over C
_SIZES: dict[str, tuple[tuple[int, int], int, int, int]] = {
    "tiny": ((96, 192), 3, 4, 4),
    "small": ((192, 384), 6, 4, 4),
    "base": ((384, 768), 12, 4, 4),
    "9": ((128, 256), 4, 3, 3),
    "15": ((192, 384), 6, 5, 3),
    "18": ((224, 448), 7, 6, 3),
}

MODELS: dict[str, Callable[..., CrossVit]] = {
    f"crossvit_{size}": partial(
        CrossVit, dims=dims, num_heads=(heads, heads), depths=((1, depth, 0),) * 3, mlp_ratios=(ratio, ratio)
    )
    for size, (dims, heads, depth, ratio) in _SIZES.items()
}
MODELS |= {f"crossvit_{size}_dagger": partial(MODELS[f"crossvit_{size}"], three_convs=True) for size in ("9", "15", "18")}
