"""mk.swap on timm's models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import oracle
from support import assert_same_bits
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.integrations import rules

timm = oracle("timm")

from timm.layers import (  # noqa: E402
    Attention,
    AttentionRope,
    DropPath,
    GluMlp,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    RmsNorm,
    SwiGLU,
    set_fast_norm,
    set_fused_attn,
)
from timm.models import swin_transformer  # noqa: E402
from timm.models.beit import Attention as BeitAttention  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402

IMAGE = (2, 3, 32, 32)
LARGER = (2, 3, 64, 64)
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALLER = VIT | {"img_size": 28, "patch_size": 7}
SWIN: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
TNT: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "inner_dim": 24, "depth": 2, "num_heads_inner": 4}
PYRAMID: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 4, 4)}
CROSSVIT: dict[str, Any] = {
    "img_size": 48,
    "img_scale": (1.0, 2 / 3),
    "patch_size": (12, 8),
    "embed_dim": (16, 32),
    "depth": ((1, 2, 0), (1, 1, 0)),
    "num_heads": (2, 4),
}
MAXVIT: dict[str, Any] = {"img_size": 128, "embed_dim": (32, 64), "depths": (1, 1), "stem_width": 16}


def of(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


# name -> model, shape of its input, the least part of the products and of attention that kernels must do
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "vit": (of("vit_base_patch16_224", **VIT), IMAGE, 1.0),
    "vit with layer scale": (of("vit_base_patch16_224", init_values=0.3, **VIT), IMAGE, 1.0),
    "vit with norms of q and k": (of("vit_base_patch16_224", qk_norm=True, **VIT), IMAGE, 1.0),
    "vit with norms inside": (
        of("vit_base_patch16_224", scale_attn_norm=True, scale_mlp_norm=True, **VIT),
        IMAGE,
        1.0,
    ),
    "deit3": (of("deit3_base_patch16_224", **VIT), IMAGE, 1.0),
    "dinov2, swiglu": (of("vit_giant_patch14_dinov2", **SMALLER), (2, 3, 28, 28), 1.0),
    "dinov3": (of("vit_small_patch16_dinov3", **VIT), IMAGE, 1.0),
    "siglip, a latent that pools": (of("vit_base_patch16_siglip_224", **VIT), IMAGE, 1.0),
    "naflexvit": (of("naflexvit_base_patch16_gap", patch_size=8, embed_dim=32, depth=2, num_heads=4), IMAGE, 1.0),
    "eva02": (of("eva02_base_patch14_224", **SMALLER), (2, 3, 28, 28), 1.0),
    "eva02, packed swiglu": (of("eva02_tiny_patch14_224", **SMALLER), (2, 3, 28, 28), 1.0),
    "beit": (of("beit_base_patch16_224", **VIT), IMAGE, 1.0),
    "beit, one bias for all": (
        of("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False, **VIT),
        IMAGE,
        1.0,
    ),
    "swin": (of("swin_tiny_patch4_window7_224", **SWIN), LARGER, 1.0),
    "swin, odd grid": (of("swin_tiny_patch4_window7_224", **SWIN | {"img_size": (52, 44)}), (2, 3, 52, 44), 1.0),
    "swin, window of the grid": (
        of("swin_tiny_patch4_window7_224", **SWIN | {"img_size": 32, "window_size": 9}),
        IMAGE,
        1.0,
    ),
    "swin, window beyond the grid": (
        of("swin_tiny_patch4_window7_224", **SWIN | {"img_size": 32, "window_size": 9, "always_partition": True}),
        IMAGE,
        1.0,
    ),
    "swin, any grid": (
        of("swin_tiny_patch4_window7_224", **SWIN | {"always_partition": True, "strict_img_size": False}),
        (2, 3, 40, 56),
        1.0,
    ),
    "swin v2": (of("swinv2_tiny_window8_256", **SWIN), LARGER, 1.0),
    "swin v2, odd grid": (of("swinv2_tiny_window8_256", **SWIN | {"img_size": (52, 44)}), (2, 3, 52, 44), 1.0),
    "swin v2-cr": (of("swinv2_cr_tiny_224", **SWIN), LARGER, 1.0),
    "swin v2-cr, odd grid": (of("swinv2_cr_tiny_224", **SWIN | {"img_size": (52, 44)}), (2, 3, 52, 44), 1.0),
    "crossvit": (of("crossvit_15_240", **CROSSVIT), (2, 3, 48, 48), 1.0),
    "tnt": (of("tnt_s_patch16_224", **TNT, num_heads_outer=4), IMAGE, 1.0),
    "tnt, legacy": (of("tnt_s_legacy_patch16_224", **TNT, num_heads_outer=4), IMAGE, 1.0),
    "pvt v2": (of("pvt_v2_b0", **PYRAMID), LARGER, 1.0),
    "pvt v2, pooled": (of("pvt_v2_b2_li", **PYRAMID), LARGER, 1.0),
    "convnext": (of("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 32, 32, 32)), LARGER, 1.0),
    "cait, whose heads talk": (of("cait_xxs24_224", **VIT), IMAGE, 0.9),
    "mixer": (lambda: timm.models.MlpMixer(5, 32, patch_size=8, embed_dim=32, num_blocks=2), IMAGE, 1.0),
    "twins": (of("twins_svt_small", img_size=64, **PYRAMID | {"depths": (2, 2, 2, 2)}), LARGER, 1.0),
    "xcit, attention of channels": (of("xcit_nano_12_p16_224", **VIT), IMAGE, 0.9),
    "maxvit": (of("maxvit_rmlp_nano_rw_256", **MAXVIT, block_type=("M", "M")), (2, 3, 128, 128), 1.0),
}

# Whose gradient is nought but for rounding: what is added to all scores of a query changes no softmax.
NO_GRADIENT = ("rel_pos.mlp.fc2.bias", "attn.k.bias", "attn.wk.bias")


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    build, shape, _ = MODELS[name]
    torch.manual_seed(0)
    return seen(build()).to(dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def seen(model: nn.Module) -> nn.Module:
    """The model in eval mode with parameters that are not 0, 1 or too small to be seen in what it computes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "gamma" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.std() < 0.1 and ("token" in name or "pos" in name or "latent" in name):
                nn.init.normal_(parameter, std=0.5)
            parameter.requires_grad_(not name.endswith(NO_GRADIENT))
    return model.eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_hold_and_the_kernels_do_the_work(name: str, dtype: torch.dtype) -> None:
    model, x = made(name, dtype)
    report = mk.swap(model)
    found = report.verify(x)
    assert found.within_rule, str(found)
    covered = report.coverage(x)
    assert covered.share >= MODELS[name][2] and not covered.fallbacks, str(covered)
    if name.startswith("swin"):
        assert any(kernel.startswith("window_attention ") for kernel in covered.kernels)
    run(model, x)
    assert not report.declined, str(report)
