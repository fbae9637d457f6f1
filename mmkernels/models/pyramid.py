"""What the pyramids PVTv2 and Twins-SVT share: attention of every kind over a grid of tokens, and loading weights into any.

C channels, H heads, D = C / H, N = rows * columns tokens of a grid in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn import EcoFormerAttention, LayerNorm, Linear
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.ops.attention import attention
from mmkernels.ops.linear_attention import linear_attention
from mmkernels.ops.window_attention import window_attention
from mmkernels.reference import linear_attention as linear_reference
from mmkernels.reference.window_attention import pipeline

ATTENTIONS = ("hash", "linear", "softmax")

_INIT_STD = 0.02

Grid: TypeAlias = tuple[int, int]


def check_arguments(attention: str, dims: Sequence[int], **of_stages: Sequence[Any]) -> None:
    """What both models take: a kind of attention, and of each stage one number of each kind."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
    for name, values in of_stages.items():
        if len(values) != len(dims):
            raise ValueError(f"{name}: expected one for each of the {len(dims)} stages, got {len(values)}")


def as_image(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, N, C] -> a view [B, C, rows, columns]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def as_tokens(image: Tensor) -> Tensor:
    """[B, C, rows, columns] -> [B, N, C]."""
    return image.flatten(2).transpose(1, 2)


# --- attention of a block: (x [B, N, C], grid) -> [B, N, C] -------------------------------------------------------------
class HashAttention(EcoFormerAttention):
    """EcoFormer's, over all tokens; the grid is not looked at."""

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        return super().forward(x)


class GlobalAttention(KernelSwitch):
    """Every token attends to all, or to those of a grid that is `reduction` times coarser (PVT's spatial reduction).

    Args:
        dim: C. num_heads: H.
        reduction: a strided convolution and a LayerNorm make the keys' and values' tokens, where it is above 1.
        linear: linear attention with features elu(x) + 1 instead of the softmax.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int = 1, *, linear: bool = False, kernels: bool = True) -> None:
        super().__init__()
        self.num_heads, self.linear = num_heads, linear
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.sr: nn.Module | None = None
        self.norm: nn.Module | None = None
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = LayerNorm(dim)
        self.kernels = kernels

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.sr is not None and self.norm is not None:
            x = self.norm(as_tokens(self.sr(as_image(x, grid))).contiguous())
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if self.linear:
            run = linear_attention if self.kernels else linear_reference.linear_attention
            out = run(q, k, v, feature_map="elu1")
        else:
            out = attention(q, k, v) if self.kernels else F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class LocalAttention(KernelSwitch):
    """Softmax attention within square windows, without shift or biases (Twins' local blocks). Pads are the layer's bias."""

    def __init__(self, dim: int, num_heads: int, window: int, *, kernels: bool = True) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.kernels = kernels

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        run = window_attention if self.kernels else pipeline
        out = run(
            self.qkv(x).unflatten(1, grid),
            None,
            window=(self.window, self.window),
            shift=(0, 0),
            num_heads=self.num_heads,
            pad_value=self.qkv.bias,
        )
        return self.proj(out.flatten(1, 2))


# --- the model ----------------------------------------------------------------------------------------------------------
class Pyramid(nn.Module):
    """A model made of stages, whose attention is of one kind in all stages but the last.

    A subclass builds its layers, then calls `finish`.
    """

    in_channels: int
    reduction: int
    """Pixels of an edge that one token of the last stage stands for."""

    def finish(self, *, kernels: bool, seed: int) -> None:
        """Draws the weights as published (the projections of hash functions too) and sets the kernels."""
        with torch.no_grad():
            self._draw(torch.Generator().manual_seed(seed))
        self.kernels = kernels

    def _draw(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, EcoFormerAttention):
                module.projection.normal_(generator=generator)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                module.weight.normal_(0, math.sqrt(2 / fan_out), generator=generator)
                nn.init.zeros_(module.bias)

    @property
    def kernels(self) -> bool:
        """Whether every layer runs the kernels."""
        return all(module.kernels for module in self._switched())

    @kernels.setter
    def kernels(self, on: bool) -> None:
        for module in self._switched():
            module.kernels = on

    def _switched(self) -> Iterator[Any]:
        return (module for module in self.modules() if isinstance(module, (KernelSwitch, LayerNorm, Linear)))

    def check_images(self, images: Tensor, multiple: bool) -> None:
        """[B, in_channels, height, width], the edges at least `reduction` pixels long, or a multiple of it."""
        edges = images.shape[2:]
        if (
            images.dim() != 4
            or images.shape[1] != self.in_channels
            or min(edges) < self.reduction
            or (multiple and any(edge % self.reduction != 0 for edge in edges))
        ):
            of = "multiples of" if multiple else "at least"
            raise ValueError(
                f"images: expected [B, {self.in_channels}, height, width] with edges {of} {self.reduction}, "
                f"got {list(images.shape)}"
            )

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Takes the weights of a model of the same size, whatever its attention.

        `state_dict` is timm's, that of a published EcoFormer checkpoint, or of this class. Where the kinds of attention
        differ, the published conversion is followed: the shared query and key of hashed attention (to_qk) is the query of
        softmax attention, its value (to_v) that one's value; the key and the layers of spatial reduction are left. The other
        way round query and key are both to_qk. Hash functions are taken where there are any, and must be fitted otherwise
        (:func:`mmkernels.nn.fit_hash`), also if they were before. For another number of classes, load first and replace
        `head` then.

        Returns:
            The names in `state_dict` that found no place.

        Raises:
            ValueError: names are missing. RuntimeError: shapes do not fit, as torch's load_state_dict says it.
        """
        own = self.state_dict()
        taken = self.own_names(state_dict)
        unused: list[str] = []
        for prefix, layer in self._attentions().items():
            part = {name.removeprefix(prefix): taken.pop(name) for name in list(taken) if name.startswith(prefix)}
            for kind in ("weight", "bias"):
                _convert_projections(layer, part, kind)
            for name, value in part.items():
                if prefix + name in own or (isinstance(layer, HashAttention) and name.startswith(_PUBLISHED_HASH)):
                    taken[prefix + name] = value
                else:
                    unused.append(prefix + name)
        unused += [name for name in taken if name not in own and _PUBLISHED_HASH not in name]
        missing = [name for name in own if name not in taken and name.rpartition(".")[2] not in _HASH_STATE]
        if missing:
            raise ValueError(f"state_dict: expected {', '.join(missing)} in it too")
        for prefix, layer in self._attentions().items():
            if (
                isinstance(layer, HashAttention)
                and not {f"{prefix}supports", f"{prefix}{_PUBLISHED_HASH}anchor"} & taken.keys()
            ):
                layer.is_trained = False
        self.load_state_dict(taken, strict=False)
        return unused

    def _attentions(self) -> dict[str, nn.Module]:
        kinds = (HashAttention, GlobalAttention, LocalAttention)
        return {f"{name}.": layer for name, layer in self.named_modules() if isinstance(layer, kinds)}

    @staticmethod
    def own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state by the names of this class, which are timm's."""
        return dict(state_dict)


_PUBLISHED_HASH = "fast_attention.ksh."
_HASH_STATE = ("supports", "projection", "mean", "_extra_state")


def _convert_projections(layer: nn.Module, part: dict[str, Tensor], kind: str) -> None:
    """Puts the projections that `layer` has, of this kind (weight or bias), in the place of those of any attention."""
    given = {name: part.pop(f"{name}.{kind}") for name in ("q", "kv", "qkv", "to_qk", "to_v") if f"{name}.{kind}" in part}
    if given.keys() == {"qkv"}:
        q, k, v = given["qkv"].chunk(3)
    elif given.keys() == {"q", "kv"}:
        q, (k, v) = given["q"], given["kv"].chunk(2)
    elif given.keys() == {"to_qk", "to_v"}:
        q, k, v = given["to_qk"], given["to_qk"], given["to_v"]
    else:
        return
    if isinstance(layer, HashAttention):
        own = {"to_qk": q, "to_v": v}
    elif isinstance(layer, LocalAttention):
        own = {"qkv": torch.cat((q, k, v))}
    else:
        own = {"q": q, "kv": torch.cat((k, v))}
    part.update({f"{name}.{kind}": value for name, value in own.items()})
