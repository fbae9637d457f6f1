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
    "depth": ((1, 2, 0),),
    "num_heads": (2, 4),
}
MAXVIT: dict[str, Any] = {"img_size": 128, "embed_dim": (32,), "depths": (1,), "stem_width": 8}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Models this small are no work for several."""
    torch.set_num_threads(1)


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
    "maxvit": (of("maxvit_rmlp_nano_rw_256", **MAXVIT, block_type=("M",)), (2, 3, 128, 128), 1.0),
}

# Whose gradient is nought but for rounding: what is added to all scores of a query changes no softmax.
NO_GRADIENT = ("rel_pos.mlp.fc2.bias", "meta_mlp.fc2.bias", "attn.k.bias", "attn.wk.bias")

# Whose gradients in bfloat16 are off by a tenth, before the swap as after it: one ReLU that rounding turns on or off among
# few tokens; a class token that is nearly nought, and normalised.
UNSTEADY = ("pvt v2, pooled", "cait, whose heads talk")


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
            elif parameter.std() < 0.1:
                nn.init.normal_(parameter, std=0.5 if "token" in name or "pos" in name or "latent" in name else 0.1)
            parameter.requires_grad_(not name.endswith(NO_GRADIENT))
    return model.eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def assert_holds(report: mk.SwapReport, inputs: Any, *, gradients: bool = True) -> None:
    found = report.verify(inputs, gradients=gradients)
    assert not found.problems, str(found)
    # Of some hundred gradients in so small a model a few miss the rule by luck: those of two numbers (a scale a head) above
    # all, and others with another seed. These stay within five times the model's own error.
    outside = [d for d in found.outside if not d.name.startswith("gradient") or d.after > 5 * max(d.before, d.typical)]
    assert not outside and len(found.outside) <= 2, str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_hold_and_the_kernels_do_the_work(name: str, dtype: torch.dtype) -> None:
    model, x = made(name, dtype)
    report = mk.swap(model)
    assert_holds(report, x, gradients=name not in UNSTEADY or dtype == torch.float32)
    covered = report.coverage(x)
    assert covered.share >= MODELS[name][2] and not covered.fallbacks, str(covered)
    if name.startswith("swin"):
        assert any(kernel.startswith("window_attention ") for kernel in covered.kernels)
    run(model, x)
    assert not report.declined, str(report)


@pytest.mark.parametrize("name", ["vit", "eva02", "swin", "tnt", "crossvit"])
def test_compiled_copied_and_put_back(name: str) -> None:
    model, x = made(name)
    plain = run(model, x)
    mk.swap(model)
    swapped = run(model, x)
    assert not torch.equal(swapped, plain)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(run(other, x), swapped, "the copy")
        assert_same_bits(run(mk.unswap(other), x), plain, "the copy put back")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mk.last_kernels(clear=True)
    torch.testing.assert_close(run(compiled, x), swapped)
    assert {kernel.split("/")[0] for _, kernel in mk.last_kernels()} == {"cpu"}
    assert_same_bits(run(mk.unswap(model), x), plain, "put back")


def test_residuals_are_added_by_the_last_layers() -> None:
    model, x = made("vit")
    mk.swap(model)
    with torch.profiler.profile() as profile:
        run(model, x)
    sums = sum(event.count for event in profile.key_averages() if event.key == "aten::add")
    assert sums == 1  # the embedding of positions


# --- who listens, and what stands in another's place ------------------------------------------------------------------
HEARD = {
    "vit": ["blocks.0.attn", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp", "blocks.0.mlp.fc1", "blocks.0.ls1"],
    "vit with layer scale": ["blocks.1.ls2", "blocks.1.norm2"],
    "eva02": ["blocks.0.mlp.fc1_g", "blocks.0.attn.q_proj", "blocks.1.attn"],
    "eva02, packed swiglu": ["blocks.0.mlp.fc1", "blocks.1.mlp.act"],
    "beit": ["blocks.0.attn", "blocks.1.mlp.drop1"],
    "swin": ["layers.0.blocks.1.attn", "layers.1.blocks.0.attn.proj", "layers.0.blocks.0.mlp", "layers.1.blocks.1"],
    "swin, odd grid": ["layers.0.blocks.1.attn.qkv"],
    "swin v2": ["layers.0.blocks.1.attn", "layers.1.blocks.0.attn.cpb_mlp.0"],
    "swin v2-cr": ["stages.0.blocks.1.attn.meta_mlp.fc1"],
    "tnt": ["blocks.0.attn_in", "blocks.0.mlp_in.fc2", "blocks.1.attn_out.attn_drop", "blocks.1.proj"],
    "crossvit": ["blocks.0.fusion.0.attn.wk", "blocks.0.fusion.1.attn.attn_drop", "blocks.0.projs.0.1"],
    "pvt v2": ["stages.0.blocks.0.mlp.fc2", "stages.0.blocks.0.attn.sr", "stages.1.blocks.0.mlp.drop"],
}


@pytest.mark.parametrize("name", HEARD)
def test_hooks_fire_and_change_what_they_change(name: str) -> None:
    model, x = made(name)
    heard: list[tuple[str, tuple[int, ...]]] = []
    for where in HEARD[name]:

        def hook(module: nn.Module, args: Any, out: Tensor, where: str = where) -> Tensor:
            heard.append((where, tuple(out.shape)))
            return out * 1.5

        model.get_submodule(where).register_forward_hook(hook)
    plain = run(model, x)
    order, heard[:] = list(heard), []
    assert {where for where, _ in order} == set(HEARD[name])
    report = mk.swap(model)
    torch.testing.assert_close(run(model, x), plain, rtol=1e-4, atol=1e-4)
    assert heard == order
    assert_holds(report, x, gradients=False)


class Adapter(nn.Module):
    """Low-rank additions to a layer, in its place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


ADAPTED = [
    ("vit", "blocks.0.attn.qkv"),
    ("vit", "blocks.1.attn.proj"),
    ("vit", "blocks.1.mlp.fc2"),
    ("beit", "blocks.0.attn.qkv"),  # whose weight is used, but who is not called
    ("swin, odd grid", "layers.0.blocks.1.attn.qkv"),
    ("swin v2, odd grid", "layers.0.blocks.1.attn.qkv"),
    ("tnt", "blocks.0.attn_in.v"),
]


@pytest.mark.parametrize("later", [False, True], ids=["before the swap", "after it"])
@pytest.mark.parametrize(("name", "where"), ADAPTED)
def test_layers_in_the_place_of_others(name: str, where: str, later: bool) -> None:
    model, x = made(name)
    torch.manual_seed(2)
    adapter = Adapter(model.get_submodule(where))
    if later:
        changed = copy.deepcopy(model)
        changed.set_submodule(where, copy.deepcopy(adapter))
        plain = run(changed, x)
        mk.swap(model)
        model.set_submodule(where, adapter)
    else:
        model.set_submodule(where, adapter)
        plain = run(model, x)
        mk.swap(model)
    torch.testing.assert_close(run(model, x), plain, rtol=1e-4, atol=1e-4)


def test_an_mlp_that_is_another_class() -> None:
    block = seen(Block(32, 4))
    block.mlp = nn.Sequential(nn.Linear(32, 48), nn.Sigmoid(), nn.Linear(48, 32)).eval()
    report = mk.swap(block)
    assert {"", "attn"} <= {entry.name for entry in report.replaced}
    assert_holds(report, tokens())


def test_a_forward_that_is_not_known_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) * 2

    monkeypatch.setattr(Mlp, "forward", other)
    monkeypatch.setattr(swin_transformer.SwinTransformerBlock, "_attn", lambda self, x: 3 * x)
    vit, x = made("vit")
    report = mk.swap(vit)
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons["blocks.0.mlp"] == f"timm {timm.__version__}: its forward is not one that mmkernels knows"
    assert_holds(report, x, gradients=False)
    reasons = {entry.name: entry.reason for entry in mk.swap(made("swin")[0]).left}
    assert reasons["layers.0.blocks.0"] == f"timm {timm.__version__}: its _attn is not one that mmkernels knows"


# --- layers -----------------------------------------------------------------------------------------------------------
def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 7, 32)), generator=torch.Generator().manual_seed(0))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: Mlp(32, 48, 20, drop=0.1), tokens()),
    "mlp with an unknown activation": (lambda: Mlp(32, 48, act_layer=nn.Hardswish), tokens()),
    "mlp with a norm": (lambda: Mlp(32, 48, norm_layer=LayerNorm, act_layer=nn.ReLU, bias=(True, False)), tokens()),
    "mlp on strides": (lambda: nn.Sequential(nn.Flatten(2), Transposed(), Mlp(49, 20)), tokens(2, 49, 3, 3)),
    "glu": (lambda: GluMlp(32, 48), tokens()),
    "glu, gate first": (lambda: GluMlp(32, 48, act_layer=nn.SiLU, gate_last=False, bias=False), tokens()),
    "glu with a norm": (lambda: GluMlp(32, 48, act_layer=nn.GELU, norm_layer=LayerNorm), tokens()),
    "swiglu": (lambda: SwiGLU(32, 48, 20, bias=(False, True)), tokens()),
    "swiglu with a norm": (lambda: SwiGLU(32, 48, norm_layer=RmsNorm), tokens()),
    "norm": (lambda: LayerNorm(32), tokens()),
    "norm without weights": (lambda: LayerNorm(32, affine=False), tokens()),
    "norm of planes": (lambda: LayerNorm2d(32), tokens(2, 32, 4, 5)),
    "norm of planes, channels last": (
        lambda: LayerNorm2d(32),
        tokens(2, 32, 4, 5).contiguous(memory_format=torch.channels_last),
    ),
    "rms norm": (lambda: RmsNorm(32), tokens()),
    "attention": (lambda: Attention(32, 4, attn_head_dim=5, dim_out=24, qkv_bias=True), tokens()),
    "attention, gated": (
        lambda: Attention(32, 4, gated=True, qk_norm=True, scale_norm=True, norm_layer=LayerNorm, proj_bias=False),
        tokens(),
    ),
    "rope, few heads of keys": (
        lambda: AttentionRope(32, 4, num_kv_heads=2, qkv_fused=False, qk_norm=True, norm_layer=LayerNorm),
        (tokens(), tokens(6, 16)),
    ),
    "rope, halves": (
        lambda: AttentionRope(32, 4, rotate_half=True, num_prefix_tokens=2, gated=True),
        (tokens(), tokens(4, 5, 16)),
    ),
    "rope, none": (lambda: AttentionRope(32, 4), tokens()),
    "beit": (lambda: BeitAttention(32, 4, qkv_bias=True, window_size=(2, 3)), (tokens(), tokens(1, 4, 7, 7))),
    "beit, bias apart": (lambda: BeitAttention(32, 4, qkv_bias=True, qkv_bias_separate=True), tokens()),
}


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype) -> None:
    build, inputs = LAYERS[name]
    torch.manual_seed(0)
    layer = seen(build()).to(dtype)
    inputs = tuple(x.to(dtype) for x in inputs) if isinstance(inputs, tuple) else inputs.to(dtype)
    report = mk.swap(layer)
    assert report.replaced[-1 if name == "mlp on strides" else 0].name in ("", "2.fc2")
    assert_holds(report, inputs)
    assert not report.coverage(inputs).fallbacks and report.coverage(inputs).share == 1.0
    layer.train()
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_holds(report, inputs)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "which": {"attn_mask": tokens(2, 1, 7, 7) > -1},
    "how much": {"attn_mask": tokens(4, 7, 7)},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_blocks(mask: str, fused: bool) -> None:
    set_fused_attn(fused)
    try:
        block = seen(Block(32, 4, qk_norm=True, init_values=0.1))
        rope = seen(AttentionRope(32, 4, num_prefix_tokens=0))
    finally:
        set_fused_attn(True)
    for module, extra in ((block, {}), (rope, {"rope": tokens(7, 16)})):
        report = mk.swap(module)
        assert_holds(report, {"x": tokens(), **extra, **MASKS[mask]})
        module(tokens(), **extra, **MASKS[mask])
        assert bool(report.declined) == (not fused and "attn_mask" in MASKS[mask])


def test_what_is_left_says_why() -> None:
    set_fast_norm(True)
    try:
        fast = [LayerNorm(8), LayerNorm2d(8), RmsNorm(8)]
    finally:
        set_fast_norm(False)
    mlps = [Mlp(8, use_conv=True), GluMlp(8, use_conv=True)]
    report = mk.swap(nn.ModuleList([*fast, *mlps, RmsNorm((2, 8))]))
    reasons = {entry.name: entry.reason for entry in report.left}
    assert all("fast norm" in reasons[str(n)] for n in range(3))
    assert all("1x1 convolutions" in reasons[str(n)] for n in (3, 4)) and "2 dimensions" in reasons["5"]
    assert not report.replaced


# --- training -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_224", VIT | {"drop_path_rate": 0.5, "proj_drop_rate": 0.3}),
        ("beit_base_patch16_224", VIT | {"drop_path_rate": 0.5, "proj_drop_rate": 0.3}),
        ("tnt_s_patch16_224", TNT | {"num_heads_outer": 4, "drop_path_rate": 0.5, "proj_drop_rate": 0.3}),
        ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32, "drop_path_rate": 0.5}),
        ("swinv2_tiny_window8_256", SWIN | {"img_size": 32, "drop_path_rate": 0.5}),
        ("pvt_v2_b0", PYRAMID | {"drop_path_rate": 0.5, "proj_drop_rate": 0.3}),
    ],
)
def test_what_is_dropped_in_training_is_what_it_was(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = seen(of(name, **options)()).train()
    x = tokens(*IMAGE)

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    plain = gradients()
    assert any(isinstance(module, DropPath) for module in model.modules())
    report = mk.swap(model)
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-3 * theirs.abs().max().item() + 1e-6)
    assert not report.declined


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "tnt_s_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_are_dropped_in_training_alone(name: str) -> None:
    options = {"vit": VIT, "tnt": TNT | {"num_heads_outer": 4}, "swi": SWIN | {"img_size": 32}}[name[:3]]
    model = seen(of(name, attn_drop_rate=0.5, **options)())
    x = tokens(*IMAGE)
    plain = run(model, x)
    report = mk.swap(model)
    torch.testing.assert_close(run(model, x), plain, rtol=1e-4, atol=1e-4)
    assert not report.declined
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(run(model, x), run(model, x))
    reasons = {declined.reason for declined in report.declined}
    assert reasons == ({"dropout of attention weights", "windows that were cut before"} if "swin" in name else set())


# --- sizes, precisions --------------------------------------------------------------------------------------------------
def test_a_swin_that_is_given_another_size() -> None:
    for name in ("swin", "swin v2", "swin v2-cr"):
        model, _ = made(name)
        report = mk.swap(model)
        with torch.random.fork_rng():
            model.set_input_size(img_size=(40, 56), window_size=(3, 5))
        x = tokens(2, 3, 40, 56)
        assert_holds(report, x, gradients=False)
        run(model, x)
        assert not report.declined


def test_a_mask_of_another_grid_is_the_originals() -> None:
    block = seen(swin_transformer.SwinTransformerBlock(16, (8, 8), 2, window_size=4, shift_size=2))
    x = tokens(3, 8, 16, 16)  # whose windows are a multiple of the mask's
    plain = run(block, x)
    report = mk.swap(block)
    torch.testing.assert_close(run(block, x), plain, rtol=1e-5, atol=1e-5)
    assert {declined.reason for declined in report.declined} >= {"a mask that was made for another grid"}


@pytest.mark.parametrize("name", ["vit", "vit with layer scale", "eva02", "beit", "swin v2", "tnt", "pvt v2"])
def test_under_autocast(name: str) -> None:
    model, x = made(name)
    exact = run(model, x)
    results = []
    for swap in (False, True):
        if swap:
            mk.swap(model)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(model, x))
    theirs, ours = results
    assert ours.dtype == theirs.dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 0.01 * exact.abs().max()


def test_in_eight_bits() -> None:
    model, x = made("vit")
    plain = run(model, x)
    mk.swap(model, dtype=torch.int8)
    found = run(model, x)
    assert 1e-4 < (found - plain).norm() / plain.norm() < 0.1


def test_rules_name_classes_that_exist() -> None:
    names = [name for name in rules._rules if name.startswith("timm.")]
    assert len(names) > 20
    for name in names:
        module, _, cls = name.rpartition(".")
        known = rules._rules[name].forward
        assert rules.digest(getattr(__import__(module, fromlist=[cls]), cls)) in known, name
