"""Small models of multimodal systems and inputs for them, shared by their tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.base import Model
from mmkernels.models.imp import Imp
from mmkernels.models.m3vit import M3ViT
from mmkernels.models.matformer import MatFormer
from mmkernels.models.mot import MoT
from mmkernels.models.one_peace import OnePeace, OnePeaceEncoder
from mmkernels.models.skillnet import SkillNet
from mmkernels.models.uni_moe import UniMoE

Made = dict[str, Tensor]


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def named(count: int, *shape: int, seed: int = 6) -> Tensor:
    """Ids from 0 to count - 1."""
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


class Small:
    """A small model of each kind, inputs of a batch for it, the ops that it must run, and what of its output is compared."""

    def __init__(
        self,
        make: Callable[..., Model],
        inputs: Callable[[int], tuple[Any, ...]],
        ran: set[str],
        out: Callable[[Any], Tensor] = lambda made: made,
    ) -> None:
        self.make, self.inputs, self.ran, self.out = make, inputs, ran, out


def m3vit(**options: Any) -> M3ViT:
    sizes: dict[str, Any] = {"depth": 4, "image_size": (24, 40), "patch_size": 8, "num_experts": 6, "top_k": 2}
    return M3ViT(24, 3, **{"num_tasks": 3, "task_dim": 10, **sizes, **options})


def images(batch: int) -> Tensor:
    return tokens(batch, 3, 24, 40)


def mot(**options: Any) -> MoT:
    return MoT(24, 2, **{"depth": 2, "num_modalities": 3, "hidden": 40, "vocab_size": 50, **options})


def matformer(**options: Any) -> MatFormer:
    return MatFormer(24, 4, **{"depth": 3, "hidden": 80, "vocab_size": 50, "num_kv_heads": 2, **options})


def uni_moe(**options: Any) -> UniMoE:
    return UniMoE(24, 4, 40, **{"depth": 3, "vocab_size": 50, "num_kv_heads": 2, **options})


def one_peace(**options: Any) -> OnePeace:
    sizes = {"depth": 2, "vocab_size": 50, "max_length": 20, "text_buckets": 8, "image_size": 48, "layer_scale": 0.5}
    model = OnePeace(24, 3, 40, **{**sizes, **options})
    with torch.no_grad():  # the tables begin as 0
        for name, parameter in model.named_parameters():
            if "rel_pos_table" in name:
                parameter.copy_(tokens(*parameter.shape, seed=options.get("seed", 0)))
    return model


def words(batch: int) -> Tensor:
    """The last two of the first row are padding."""
    ids = named(50, batch, 7).clamp(min=2)
    ids[0, 5:] = 1
    return ids


def imp(**options: Any) -> Imp:
    sizes = {"depth": 3, "moe_depth": 2, "num_experts": 4, "vocab_size": 50, "max_text_len": 20}
    return Imp(24, 3, 40, **{**sizes, "max_frames": 8, "image_size": 48, **options})


def skillnet(**options: Any) -> SkillNet:
    return SkillNet(24, 3, 40, **{"depth": 2, "vocab_size": 50, "max_length": 20, **options})


def encoded(**given: Any) -> Any:
    encoder = OnePeaceEncoder(24, 3, 40, ["text", "image"], depth=1)
    return encoder({"text": tokens(2, 5, 24), **given.pop("tokens", {})}, **given)
