"""TNT: a transformer over the 16 words of every patch inside of a transformer over the patches (sentences).

Source: "Transformer in Transformer" (NeurIPS 2021). Module and parameter names are timm's, so that its checkpoints load;
:meth:`Tnt.load_pretrained` also takes those of the published code.

Headline: TNT-S (23.8 M parameters) has 81.5 % on ImageNet, TNT-B (65.4 M) 82.9 %; images of 224 x 224, patches of 16 x 16,
words of 4 x 4 pixels. The words of a batch of 128 are 25,088 sequences of 16 tokens with 24 channels.

words [B n, 16, c] and sentences [B, 1 + n, d], the class token first, of n patches:

    words     += attention of LN(words) within a patch         words     += MLP(LN(words))
    sentences[1:] += fold(words)
    sentences += attention of LN(sentences)                    sentences += MLP(LN(sentences))

Three things differ between the paper's text and the published code:

- fold is LN(W LN(words of a patch side by side)), without a bias; the paper has a linear layer alone. The code of the first
  checkpoints (`legacy`) has W vec(LN of each word) + b.
- Queries and keys have one projection together and no biases; values have their own.
- Words are made patch by patch, zeros around each; a legacy word sees over the border of its patch.

There is no dropout and no stochastic depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mmkernels.models.weights import draw_weights, load_weights
from mmkernels.nn import LayerNorm, Linear, Mlp
from mmkernels.nn.attention import attend
from mmkernels.nn.linear import added
from mmkernels.nn.mlp import KernelSwitch


class Attention(KernelSwitch):
    """residual + proj(attention): x [B, N, C] -> [B, N, C]; one projection of queries and keys, one of values."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = False, kernels: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of the channels, {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qk = Linear(dim, 2 * dim, qkv_bias)
        self.v = Linear(dim, dim, qkv_bias)
        self.proj = Linear(dim, dim)
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return added(self.proj, attend(q, k, v, self.kernels), residual)


class Block(KernelSwitch):
    """(words [B n, m, c], sentences [B, 1 + n, d]) -> the same, as the head of this file has it.

    Args:
        dim: c. dim_out: d. num_words: m. num_heads: of words and of sentences.
        mlp_ratio: inner channels over d; those over c are always 4.
        qkv_bias: whether the projections of queries, keys and values have one.
        legacy: the fold of the first checkpoints.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_words: int,
        num_heads: tuple[int, int],
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        legacy: bool = False,
        kernels: bool = True,
    ) -> None:
        super().__init__()
        self.norm_in = LayerNorm(dim)
        self.attn_in = Attention(dim, num_heads[0], qkv_bias=qkv_bias)
        self.norm_mlp_in = LayerNorm(dim)
        self.mlp_in = Mlp(dim, 4 * dim)
        self.legacy = legacy
        self.norm1_proj = LayerNorm(dim if legacy else num_words * dim)
        self.proj = Linear(num_words * dim, dim_out, bias=legacy)
        self.norm2_proj: nn.Module = nn.Identity() if legacy else LayerNorm(dim_out)
        self.norm_out = LayerNorm(dim_out)
        self.attn_out = Attention(dim_out, num_heads[1], qkv_bias=qkv_bias)
        self.norm_mlp = LayerNorm(dim_out)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio))
        self.kernels = kernels

    def fold(self, words: Tensor, batch: int) -> Tensor:
        """[B n, m, c] -> [B, n, d]."""
        if self.legacy:
            return self.proj(self.norm1_proj(words).reshape(batch, -1, self.proj.in_features))
        return self.norm2_proj(self.proj(self.norm1_proj(words.reshape(batch, -1, self.proj.in_features))))

    def forward(self, words: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        words = self.attn_in(self.norm_in(words), words)
        words = self.mlp_in(self.norm_mlp_in(words), words)
        told = sentences[:, 1:] + self.fold(words, sentences.shape[0])
        sentences = torch.cat((sentences[:, :1], told), dim=1)
        sentences = self.attn_out(self.norm_out(sentences), sentences)
        return words, self.mlp(self.norm_mlp(sentences), sentences)


class PixelEmbed(nn.Module):
    """Words of images: [B, in_channels, height, width] -> [B n, m, c], patches and the words in them in raster order.

    Pixels beyond the last whole patch are left out.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, stride: int, legacy: bool) -> None:
        super().__init__()
        self.patch_size, self.words, self.legacy = patch_size, -(-patch_size // stride), legacy
        self.proj = nn.Conv2d(in_channels, dim, 7, stride=stride, padding=3)

    def forward(self, images: Tensor, positions: Tensor) -> Tensor:
        rows, columns = (edge // self.patch_size for edge in images.shape[2:])
        made = self.proj(images) if self.legacy else images
        edge = self.words if self.legacy else self.patch_size
        patches = made[:, :, : rows * edge, : columns * edge].unflatten(3, (columns, edge)).unflatten(2, (rows, edge))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        words = (patches if self.legacy else self.proj(patches)) + positions
        return words.flatten(2).transpose(1, 2).contiguous()


class Tnt(KernelSwitch):
    """TNT: images [B, in_channels, height, width] of the size in image_size -> logits [B, num_classes].

    Args:
        dim: d, channels of sentences. inner_dim: c, channels of words. depth: blocks.
        num_heads: of the attention of words and of sentences.
        image_size: edge, or height and width. patch_size: edge of the patches. stride: edge of the words.
        mlp_ratio: inner channels of the outer MLPs over d. qkv_bias: of queries, keys and values.
        legacy: the model of the first checkpoints (timm's `tnt_s_legacy_patch16_224`).
        in_channels: of the images. num_classes: of the head.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights: truncated normal, standard deviation 0.02; biases 0; the convolution as torch draws it.

    Raises:
        ValueError: num_heads does not divide inner_dim and dim, image_size is less than a patch, or legacy has a patch_size
            that is no multiple of stride.

    Source: see the head of this file.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        num_heads: tuple[int, int],
        *,
        depth: int = 12,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        legacy: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if min(size) < patch_size:
            raise ValueError(f"image_size: expected at least a patch, {patch_size}, got {image_size}")
        if legacy and patch_size % stride != 0:
            raise ValueError(f"patch_size: expected a multiple of stride, {stride}, with legacy, got {patch_size}")
        self.in_channels, self.image_size = in_channels, size
        self.pixel_embed = PixelEmbed(in_channels, inner_dim, patch_size, stride, legacy)
        patches, words = (size[0] // patch_size) * (size[1] // patch_size), self.pixel_embed.words
        self.norm1_proj = LayerNorm(words**2 * inner_dim)
        self.proj = Linear(words**2 * inner_dim, dim)
        self.norm2_proj = LayerNorm(dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.patch_pos = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.pixel_pos = nn.Parameter(torch.empty(1, inner_dim, words, words))
        self.blocks = nn.ModuleList(
            Block(inner_dim, dim, words**2, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, legacy=legacy)
            for _ in range(depth)
        )
        self.norm = LayerNorm(dim)
        self.head = Linear(dim, num_classes)
        self.kernels = kernels
        draw_weights(self, seed)

    def features(self, images: Tensor) -> Tensor:
        """[B, d], the class token, normalised."""
        if images.dim() != 4 or images.shape[1:] != (self.in_channels, *self.image_size):
            expected = ", ".join(map(str, (self.in_channels, *self.image_size)))
            raise ValueError(f"images: expected [B, {expected}], got {list(images.shape)}")
        words = self.pixel_embed(images, self.pixel_pos)
        first = self.norm2_proj(self.proj(self.norm1_proj(words.view(images.shape[0], -1, self.proj.in_features))))
        class_token = (self.cls_token + self.patch_pos[:, :1]).expand(images.shape[0], -1, -1)
        sentences = torch.cat((class_token, first + self.patch_pos[:, 1:]), dim=1)
        for block in self.blocks:
            words, sentences = block(words, sentences)
        return self.norm(sentences[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes].

        Raises:
            ValueError: images are not [B, in_channels, height, width] of image_size, whose positions are learned.
        """
        return self.head(self.features(images))

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Takes the weights of timm's or of the published code's model of the same size.

        Returns:
            The names in `state_dict` that found no place (as published `outer_tokens`, which nothing uses), as this class
            would call them.

        Raises:
            ValueError: names are missing. RuntimeError: shapes do not fit, as torch's load_state_dict says it.
        """
        own = {".".join(_PUBLISHED.get(part, part) for part in name.split(".")): x for name, x in state_dict.items()}
        if "pixel_pos" in own and own["pixel_pos"].dim() == 3:  # as published [1, m, c]
            own["pixel_pos"] = own["pixel_pos"].mT.reshape(self.pixel_pos.shape)
        return load_weights(self, own)


_PUBLISHED = {
    "patch_embed": "pixel_embed",
    "inner_pos": "pixel_pos",
    "outer_pos": "patch_pos",
    "proj_norm1": "norm1_proj",
    "proj_norm2": "norm2_proj",
    "inner_norm1": "norm_in",
    "inner_attn": "attn_in",
    "inner_norm2": "norm_mlp_in",
    "inner_mlp": "mlp_in",
    "outer_norm1": "norm_out",
    "outer_attn": "attn_out",
    "outer_norm2": "norm_mlp",
    "outer_mlp": "mlp",
}

MODELS: dict[str, Callable[..., Tnt]] = {
    "tnt_s": partial(Tnt, dim=384, inner_dim=24, num_heads=(4, 6)),
    "tnt_b": partial(Tnt, dim=640, inner_dim=40, num_heads=(4, 10)),
}
