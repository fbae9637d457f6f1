"""mk.swap on MONAI's models: Swin UNETR and transformers of volumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import oracle
from support import assert_same_bits
from torch import Tensor, nn

import mmkernels as mk

oracle("monai")

from monai.networks.blocks import CrossAttentionBlock, MLPBlock, SABlock, TransformerBlock  # noqa: E402
from monai.networks.nets import UNETR, SwinUNETR, ViT  # noqa: E402
from monai.networks.nets.swin_unetr import SwinTransformer  # noqa: E402


def swin(window: tuple[int, ...] = (3, 3, 3), **options: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "in_chans": 1,
        "embed_dim": 12,
        "window_size": window,
        "patch_size": (2,) * len(window),
        "depths": (2, 2, 1, 1),
        "num_heads": (2, 3, 4, 6),
        "spatial_dims": len(window),
    }
    model = SwinTransformer(**settings | options)
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table"):  # its initial values are too small to be seen
            nn.init.normal_(module.relative_position_bias_table)
    return model


def volume(*shape: int) -> Tensor:
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# name -> model, inputs, the least part of the products and of attention that kernels must do
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, float]] = {
    "swin": (swin, volume(16, 14, 18), 1.0),
    "swin of planes": (lambda: swin((4, 3)), volume(22, 26), 1.0),
    "swin v2": (lambda: swin(use_v2=True), volume(32, 20, 20), 1.0),
    "swin with checkpoints": (lambda: swin(use_checkpoint=True), volume(16, 12, 12), 1.0),
    "swin flash": (lambda: swin(use_flash_attention=True), volume(14, 12, 12), 1.0),
    "swin unetr": (
        lambda: SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), norm_name="batch"),
        volume(32, 32, 32),
        1.0,
    ),
    "unetr": (
        lambda: UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3),
        volume(32, 32, 32),
        0.9,
    ),
    "vit": (
        lambda: ViT(1, (16, 16, 16), (8, 8, 8), hidden_size=24, mlp_dim=40, num_layers=2, num_heads=3, qkv_bias=True),
        volume(16, 16, 16),
        0.9,
    ),
    "self-attention": (lambda: SABlock(24, 3, use_combined_linear=False), tokens(2, 7, 24), 1.0),
    "self-attention causal": (lambda: SABlock(24, 3, causal=True, sequence_length=9), tokens(2, 7, 24), 1.0),
    "self-attention flash": (lambda: SABlock(24, 3, use_flash_attention=True), tokens(2, 7, 24), 1.0),
    "self-attention masked": (
        lambda: SABlock(24, 3, dim_head=5),
        (tokens(2, 7, 24), torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0]])),
        1.0,
    ),
    "mlp": (lambda: MLPBlock(24, 40, dropout_mode="vista3d", act="RELU"), tokens(2, 7, 24), 1.0),
    "geglu": (lambda: MLPBlock(24, 40, act="GEGLU"), tokens(2, 7, 24), 1.0),
    "block": (lambda: TransformerBlock(24, 40, 3, with_cross_attention=True), (tokens(2, 7, 24), tokens(2, 5, 24)), 0.9),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    build, inputs, _ = MODELS[name]

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return build().eval().to(dtype), tuple(map(cast, inputs)) if isinstance(inputs, tuple) else cast(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_hold_and_the_kernels_do_the_work(name: str, dtype: torch.dtype) -> None:
    model, inputs = made(name, dtype)
    report = mk.swap(model)
    # In bfloat16 the gradients of torch's own convolutions are off by half in the decoders, and by 1e28 in those of v2.
    convolutions = "unetr" in name or name == "swin v2"
    found = report.verify(inputs, gradients=dtype == torch.float32 or not convolutions)
    assert found.within_rule, str(found)
    covered = report.coverage(inputs)
    assert covered.share >= MODELS[name][2] and not covered.fallbacks, str(covered)
    if name.startswith("swin"):
        assert any(kernel.startswith("window_attention ") for kernel in covered.kernels)
        assert not any(kernel.startswith("attention ") for kernel in covered.kernels)
    assert not report.declined, str(report)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_compiled(name: str) -> None:
    model, inputs = made(name)
    mk.swap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        wanted = model(inputs)
        mk.last_kernels(clear=True)
        found = compiled(inputs)
    assert all(kernel.startswith("cpu/") for _, kernel in mk.last_kernels())
    torch.testing.assert_close(found, wanted)


def test_put_back() -> None:
    model, inputs = made("swin")
    with torch.no_grad():
        plain = model(inputs)
        mk.swap(model)
        assert not torch.equal(model(inputs)[-1], plain[-1])
        mk.unswap(model)
        for ours, theirs in zip(model(inputs), plain, strict=True):
            assert_same_bits(ours, theirs, "put back")


@pytest.mark.parametrize("where", ["layers1.0.blocks.1", "layers1.0.blocks.0.attn", "layers1.0.blocks.0.attn.qkv"])
def test_whoever_listens_is_heard(where: str) -> None:
    model, inputs = made("swin")
    heard: list[tuple[int, ...]] = []
    model.get_submodule(where).register_forward_hook(lambda module, args, out: heard.append(tuple(out.shape)))
    with torch.no_grad():
        model(inputs)
        wanted, heard[:] = list(heard), []
        report = mk.swap(model)
        model(inputs)
    if where.endswith("qkv"):  # heard with whole grids instead of windows
        assert len(heard) == 1
    else:
        assert heard == wanted and "not swapped, that somebody listens to" in str(report)
    assert report.verify(inputs, gradients=False).within_rule


def test_dropout_of_weights_is_left_to_the_original() -> None:
    torch.manual_seed(0)
    model = swin(attn_drop_rate=0.5).train()
    inputs = volume(16, 12, 12)
    mk.swap(copied := swin(attn_drop_rate=0.5).train())
    copied.load_state_dict(model.state_dict())
    results = []
    for each in (model, copied):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(each(inputs))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_left_says_why() -> None:
    relative = SABlock(24, 3, rel_pos_embedding="decomposed", input_size=(2, 2))
    model = nn.ModuleList([SABlock(24, 3, save_attn=True), relative, MLPBlock(24, 40, act="GEGLU")])
    reasons = {entry.name: entry.reason for entry in mk.swap(model).left}
    assert "save_attn" in reasons["0"] and "relative position" in reasons["1"] and "no name for" in reasons["2"]
    cross = mk.swap(CrossAttentionBlock(24, 3))
    assert {entry.runs for entry in cross.replaced} >= {"mk.linear"}
