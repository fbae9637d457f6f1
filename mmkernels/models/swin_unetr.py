"""Swin UNETR: segmentation of volumes, a Swin transformer in 3-D as encoder and a decoder of convolutions.

Source: "Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images" (2022). Module and parameter
names are MONAI's, so that its checkpoints (those of the BraTS challenge among them) load;
:meth:`SwinTransformer.load_pretrained` takes encoders that were trained by themselves.

Headline: BraTS 2021, volumes of 4 x 128 x 128 x 128 voxels, 48 channels, windows of 7 x 7 x 7: 61.98 M parameters, 394.84
GFLOPs (this model: 62.19 M, as MONAI's). The encoder has 64^3, 32^3, 16^3 and 8^3 tokens; in its first stage 1000 windows of
343 tokens and 3 heads, whose scores alone would be 1.41 GB a block.

Each of the four stages is two blocks, x + attention within windows of LN(x), then x + MLP(LN(x)); the windows of the second
one are shifted by half. Then 2 x 2 x 2 neighbours become one token of twice the channels. The decoder takes what went into
each stage and what came out of the last, normalised without weights, and what the volume itself was.

Four things in the published code that the paper's text does not say or says otherwise:

- The merging with which the published weights were trained takes two of the eight neighbours twice and leaves two out:
  `merging="published"`. MONAI has mended it since under the old name "merging", the default here too; its "mergingv2" has
  the eight in another order.
- Where a grid is no longer than the window, the window is the grid; its relative positions are read as if its tokens were
  the first ones of a whole window.
- The zeros that fill the last windows are not masked: they join the softmax, with keys and values that are the biases of
  the projection.
- The mask between regions of a shifted window is -100, not minus infinity.

There is no dropout and no stochastic depth.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.weights import draw_weights, load_weights
from mmkernels.nn import LayerNorm, Linear, WindowAttention
from mmkernels.nn.mlp import KernelSwitch, feed_forward

# Where each slot of a merged token lies among its neighbours.
_MERGINGS = {
    "published": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": tuple(product(range(2), repeat=3)),
}
_PATCH = 2


# --- the encoder --------------------------------------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    """Patches of 2 x 2 x 2 voxels: [B, in_channels, *grid] -> [B, *(half the grid, rounded up), C]."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, _PATCH, _PATCH)

    def forward(self, volumes: Tensor) -> Tensor:
        depth, height, width = (-edge % _PATCH for edge in volumes.shape[2:])
        if depth + height + width > 0:
            volumes = F.pad(volumes, (0, width, 0, height, 0, depth))
        return self.proj(volumes).permute(0, 2, 3, 4, 1).contiguous()


class Mlp(KernelSwitch):
    """residual + linear2(gelu(linear1(x))): :class:`mmkernels.nn.Mlp` by MONAI's names."""

    def __init__(self, dim: int, inner: int, *, kernels: bool = True) -> None:
        super().__init__()
        self.linear1 = Linear(dim, inner)
        self.linear2 = Linear(inner, dim)
        self.drop = nn.Dropout(0.0)
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, "gelu", self.drop, self.drop, residual)


class SwinTransformerBlock(KernelSwitch):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); x [B, *grid, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Sequence[int],
        shift: Sequence[int],
        mlp_ratio: float,
        *,
        kernels: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, shift, pad_order="pad_roll")
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(self.norm2(x), x)


class PatchMerging(nn.Module):
    """[B, *grid, C] -> [B, *(half the grid, rounded up), 2 C]; an odd axis is filled up with zeros."""

    def __init__(self, dim: int, merging: str) -> None:
        super().__init__()
        self.slots = _MERGINGS[merging]
        self.norm = LayerNorm(8 * dim)
        self.reduction = Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        depth, height, width = (edge % 2 for edge in x.shape[1:4])
        if depth + height + width > 0:
            x = F.pad(x, (0, 0, 0, width, 0, height, 0, depth))
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.slots], dim=-1)))


class Stage(nn.Module):
    """Blocks, every second one with shifted windows, and the merging: [B, *grid, C] -> [B, *(half the grid), 2 C]."""

    def __init__(self, dim: int, depth: int, num_heads: int, window: Sequence[int], mlp_ratio: float, merging: str) -> None:
        super().__init__()
        shifts = ([0] * 3, [extent // 2 for extent in window])
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, num_heads, window, shifts[i % 2], mlp_ratio) for i in range(depth)
        )
        self.downsample = PatchMerging(dim, merging)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class SwinTransformer(KernelSwitch):
    """The encoder: volumes [B, in_channels, depth, height, width] -> five feature maps [B, 2^i C, *grid / 2^(i + 1)].

    Volumes of any size; odd axes are filled up with zeros.

    Args:
        feature_size: C. depths, num_heads: of the four stages. window: extents of the windows.
        mlp_ratio: inner channels of the MLPs over C.
        merging: "merging", "mergingv2" or "published", see the head of this file.
        normalize: whether the feature maps are normalised over their channels, without weights.
        in_channels: of the volumes.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights, drawn as torch draws them; the tables of relative positions truncated normal.

    Raises:
        ValueError: merging is none of the three, depths or num_heads are not four, or num_heads does not divide the
            channels of its stage.

    Source: see the head of this file.
    """

    def __init__(
        self,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        window: Sequence[int] = (7, 7, 7),
        mlp_ratio: float = 4.0,
        merging: str = "merging",
        normalize: bool = True,
        in_channels: int = 4,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if merging not in _MERGINGS:
            raise ValueError(f"merging: expected one of {', '.join(_MERGINGS)}, got {merging!r}")
        for name, values in (("depths", depths), ("num_heads", num_heads)):
            if len(values) != 4:
                raise ValueError(f"{name}: expected one for each of the 4 stages, got {len(values)}")
        self.in_channels = in_channels
        self.patch_embed = PatchEmbed(in_channels, feature_size)

        def stage(i: int) -> nn.ModuleList:
            return nn.ModuleList([Stage(feature_size * 2**i, depths[i], num_heads[i], window, mlp_ratio, merging)])

        self.layers1, self.layers2, self.layers3, self.layers4 = map(stage, range(4))
        self.out_norms = nn.ModuleList(
            LayerNorm(feature_size * 2**i, elementwise_affine=False) if normalize else nn.Identity() for i in range(5)
        )
        self.kernels = kernels
        draw_weights(self, seed, linear_std=None)

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """
        Raises:
            ValueError: volumes are not [B, in_channels, depth, height, width].
        """
        check_volumes(volumes, self.in_channels)
        maps = [self.patch_embed(volumes)]
        for (stage,) in (self.layers1, self.layers2, self.layers3, self.layers4):
            maps.append(stage(maps[-1]))
        return [norm(x).permute(0, 4, 1, 2, 3) for norm, x in zip(self.out_norms, maps, strict=True)]

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Takes the weights of an encoder of the same size: MONAI's, or a published self-supervised one.

        Those are of "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis" (2022; names begin
        with `module.`) and of "Disruptive Autoencoders" (2023; with `encoder.`).

        Returns:
            The names in `state_dict` that found no place (the published heads), as this class would call them.

        Raises:
            ValueError: names are missing. RuntimeError: shapes do not fit, as torch's load_state_dict says it.
        """
        own = {}
        for name, value in state_dict.items():
            name = re.sub(r"^(module|swinViT|encoder)\.", "", name)
            name = re.sub(r"^(layers\d\.0)\.0\.", r"\1.", name)
            own[name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")] = value
        return _load(self, own)


# --- the decoder, plain torch -------------------------------------------------------------------------------------------
def convolution(in_channels: int, out_channels: int, size: int, *, bias: bool = False) -> nn.Sequential:
    layer = nn.Conv3d(in_channels, out_channels, size, padding=size // 2, bias=bias)
    return nn.Sequential(OrderedDict(conv=layer))


class ResBlock(nn.Module):
    """lrelu(norm(conv(lrelu(norm(conv(x))))) + x), convolutions of 3 x 3 x 3; x through a convolution and norm of its own
    where the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, 3)
        self.conv2 = convolution(out_channels, out_channels, 3)
        self.conv3 = convolution(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01)
        out = F.instance_norm(self.conv2(out))
        residual = x if self.conv3 is None else F.instance_norm(self.conv3(x))
        return F.leaky_relu(out + residual, 0.01)


class UpBlock(nn.Module):
    """A grid twice as fine, beside the skip connection: [B, C, *grid], [B, C', *(2 grid)] -> [B, C', *(2 grid)]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.transp_conv = nn.Sequential(OrderedDict(conv=nn.ConvTranspose3d(in_channels, out_channels, 2, 2, bias=False)))
        self.conv_block = ResBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv_block(torch.cat((self.transp_conv(x), skip), dim=1))


class SwinUnetr(KernelSwitch):
    """Swin UNETR: volumes [B, in_channels, depth, height, width] -> logits [B, out_channels, depth, height, width].

    Args:
        feature_size: C. in_channels: of the volumes. out_channels: classes.
        depths, num_heads, window, mlp_ratio, merging, normalize: of the encoder, :class:`SwinTransformer`.
        kernels: True runs the package's ops in the encoder, False plain torch. May be set at any time.
        seed: of the weights.

    Raises:
        ValueError: as :class:`SwinTransformer`.

    Source: see the head of this file.
    """

    def __init__(
        self,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        window: Sequence[int] = (7, 7, 7),
        mlp_ratio: float = 4.0,
        merging: str = "merging",
        normalize: bool = True,
        in_channels: int = 4,
        out_channels: int = 3,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        size = feature_size
        self.swinViT = SwinTransformer(
            size,
            depths,
            num_heads,
            window=window,
            mlp_ratio=mlp_ratio,
            merging=merging,
            normalize=normalize,
            in_channels=in_channels,
        )

        def encoder(in_channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(OrderedDict(layer=ResBlock(in_channels, out_channels)))

        self.encoder1 = encoder(in_channels, size)
        self.encoder2 = encoder(size, size)
        self.encoder3 = encoder(2 * size, 2 * size)
        self.encoder4 = encoder(4 * size, 4 * size)
        self.encoder10 = encoder(16 * size, 16 * size)
        self.decoder5 = UpBlock(16 * size, 8 * size)
        self.decoder4 = UpBlock(8 * size, 4 * size)
        self.decoder3 = UpBlock(4 * size, 2 * size)
        self.decoder2 = UpBlock(2 * size, size)
        self.decoder1 = UpBlock(size, size)
        self.out = nn.Sequential(OrderedDict(conv=convolution(size, out_channels, 1, bias=True)))
        self.kernels = kernels
        draw_weights(self, seed, linear_std=None)

    def forward(self, volumes: Tensor) -> Tensor:
        """
        Raises:
            ValueError: volumes are not [B, in_channels, depth, height, width] with edges that are multiples of 32, one of
                them at least 64: the coarsest grid is normalised over its places, so it has to have more than one.
        """
        check_volumes(volumes, self.swinViT.in_channels)
        edges = volumes.shape[2:]
        if any(edge % 32 != 0 for edge in edges) or max(edges) < 64:
            raise ValueError(f"volumes: expected edges that are multiples of 32, one of them at least 64, got {list(edges)}")
        maps = self.swinViT(volumes)
        x = self.decoder5(self.encoder10(maps[4]), maps[3])
        x = self.decoder4(x, self.encoder4(maps[2]))
        x = self.decoder3(x, self.encoder3(maps[1]))
        x = self.decoder2(x, self.encoder2(maps[0]))
        x = self.decoder1(x, self.encoder1(volumes))
        return self.out(x)

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Takes the weights of MONAI's model of the same size; for those of an encoder alone there is
        `swinViT.load_pretrained`.

        Returns:
            The names in `state_dict` that found no place.

        Raises:
            ValueError: names are missing. RuntimeError: shapes do not fit, as torch's load_state_dict says it.
        """
        return _load(self, state_dict)


def check_volumes(volumes: Tensor, in_channels: int) -> None:
    if volumes.dim() != 5 or volumes.shape[1] != in_channels:
        raise ValueError(f"volumes: expected [B, {in_channels}, depth, height, width], got {list(volumes.shape)}")


def _load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Without the buffers of relative positions, which follow from the window."""
    return load_weights(model, {n: x for n, x in state_dict.items() if not n.endswith("relative_position_index")})


MODELS: dict[str, Callable[..., nn.Module]] = {"swin_unetr": SwinUnetr, "swin_unetr_encoder": partial(SwinTransformer)}
