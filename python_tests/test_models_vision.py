"""CrossViT, TNT and Swin UNETR: by golden vectors of the published code, and against timm's and MONAI's models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import oracle
from support import assert_within_rule, golden, judge
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.models import create_model, list_models, tnt
from mmkernels.models import swin_unetr as swin
from mmkernels.models.crossvit import CrossAttentionBlock, CrossVit, MultiScaleBlock
from mmkernels.models.swin_unetr import SwinTransformer, SwinUnetr
from mmkernels.models.tnt import Tnt

Made = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perturbed(model: nn.Module) -> nn.Module:
    """What starts at 0 or 1, or so small that a layer hardly counts, would hide a mistake in its use."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
            elif weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
            elif weight.shape[0] == 1:  # class tokens and positions
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def ran() -> set[str]:
    """The ops whose kernels ran since the last call; none of them may be the reference."""
    traced = mk.last_kernels(clear=True)
    assert all(kernel != "reference" for _, kernel in traced)
    return {op for op, _ in traced}


# --- the published CrossViT ---------------------------------------------------------------------------------------------
def weights_of(tensors: Made) -> Made:
    return {name.removeprefix("w."): value for name, value in tensors.items() if name.startswith("w.")}


def has_gradient(name: str) -> bool:
    """The bias of keys has none: the softmax does not see it. What is left is rounding."""
    return not name.endswith("wk.bias")


def gradients_of(module: nn.Module, prefix: str = "grad.w.") -> Made:
    return {f"{prefix}{name}": p.grad for name, p in module.named_parameters() if has_gradient(name)}


@pytest.mark.parametrize("case", ["cross_small", "cross_odd", "cross_with_mlp"])
def test_golden_cross_attention(case: str) -> None:
    tensors, params = golden(f"crossvit/{case}")
    dim = params["C"]

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        block: nn.Module = CrossAttentionBlock(dim, params["heads"], kernels=kernels)
        if params["has_mlp"]:  # which no published model has
            block.norm2 = mk.nn.LayerNorm(dim, eps=1e-6, kernels=kernels)
            block.mlp = mk.nn.Mlp(dim, tensors["w.mlp.fc1.bias"].numel(), kernels=kernels)
        block.load_state_dict(weights_of(tensors))
        block.to(dtype)
        x = tensors["x"].to(dtype).requires_grad_()
        out = block(x)
        if params["has_mlp"]:
            out = block.mlp(block.norm2(out), out)
        out.backward(tensors["gout"].to(dtype))
        assert float(block.attn.wk.bias.grad.abs().max()) < 1e-5
        return {"out": out.detach(), "grad.x": x.grad} | gradients_of(block)

    judge(tensors, run)
    assert {"linear", "attention", "attention_backward", "norm"} <= ran()


@pytest.mark.parametrize("case", ["multiscale_small", "multiscale_2fusion"])
def test_golden_multi_scale_block(case: str) -> None:
    tensors, params = golden(f"crossvit/{case}")

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        block = MultiScaleBlock(params["dims"], params["heads"], params["mlp_ratio"], params["depth"], kernels=kernels)
        block.load_state_dict(weights_of(tensors))
        block.to(dtype)
        xs = [tensors[f"x{i}"].to(dtype).requires_grad_() for i in (0, 1)]
        outs = block(xs)
        torch.autograd.backward(outs, [tensors[f"gout{i}"].to(dtype) for i in (0, 1)])
        made = {f"out{i}": out.detach() for i, out in enumerate(outs)} | {f"grad.x{i}": x.grad for i, x in enumerate(xs)}
        # A second fusion sees one token: its softmax is 1 whatever the query and the key are.
        return made | {name: grad for name, grad in gradients_of(block).items() if float(tensors[name].abs().max()) > 1e-6}

    judge(tensors, run)


@pytest.mark.parametrize("training", [True, False])
def test_golden_crossvit(training: bool) -> None:
    tensors, params = golden("crossvit/model_tiny")

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        model = CrossVit(
            params["dims"],
            params["heads"],
            params["depth"],
            params["ratio"],
            image_sizes=params["img_size"],
            patch_sizes=params["patch"],
            num_classes=tensors["out"].shape[1],
            kernels=kernels,
        )
        assert model.load_pretrained(weights_of(tensors)) == []
        model.to(dtype).train(training)
        images = tensors["img"].to(dtype).requires_grad_()
        out = model(images)
        out.backward(tensors["gout"].to(dtype))
        own = {re.sub(r"(cls_token|pos_embed)_", r"\1.", name): grad for name, grad in gradients_of(model).items()}
        return {"out": out.detach(), "grad.img": images.grad} | own

    judge(tensors, run)


# --- timm's and MONAI's models --------------------------------------------------------------------------------------------
CROSSVIT: dict[str, Any] = {
    "dims": (12, 24),
    "num_heads": (3, 2),
    "depths": ((1, 2, 0), (2, 1, 1)),
    "mlp_ratios": (3, 2),
    "image_sizes": (48, 32),
    "num_classes": 7,
}
TNT: dict[str, Any] = {"dim": 32, "inner_dim": 12, "num_heads": (2, 4), "depth": 2, "image_size": (37, 52), "num_classes": 7}
SWIN: dict[str, Any] = {"feature_size": 12, "depths": (2, 2, 1, 1), "num_heads": (2, 3, 4, 6), "in_channels": 2}


def their_crossvit(**options: Any) -> nn.Module:
    oracle("timm")
    from timm.models.crossvit import CrossVit as Theirs

    settings = {"embed_dim": CROSSVIT["dims"], "depth": CROSSVIT["depths"], "mlp_ratio": (3, 2, 1), "num_heads": (3, 2)}
    return Theirs(img_size=48, img_scale=(1.0, 32 / 48), patch_size=(12, 16), num_classes=7, **settings, **options)


def their_tnt(**options: Any) -> nn.Module:
    oracle("timm")
    from timm.models.tnt import TNT as Theirs

    settings = {"embed_dim": 32, "inner_dim": 12, "num_heads_inner": 2, "num_heads_outer": 4}
    return Theirs(img_size=(37, 52), depth=2, num_classes=7, **settings, **options)


def their_encoder(window: tuple[int, ...] = (3, 3, 3), downsample: str = "merging") -> nn.Module:
    oracle("monai")
    from monai.networks.nets.swin_unetr import SwinTransformer as Theirs

    return Theirs(2, 12, window, (2, 2, 2), SWIN["depths"], SWIN["num_heads"], downsample=downsample)


def their_unetr() -> nn.Module:
    oracle("monai")
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(2, 3, feature_size=12, depths=SWIN["depths"], num_heads=SWIN["num_heads"], window_size=3)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "crossvit": (their_crossvit, lambda: CrossVit(**CROSSVIT), (2, 3, 50, 39)),
    "crossvit, no resizing of s": (their_crossvit, lambda: CrossVit(**CROSSVIT), (1, 3, 48, 48)),
    "crossvit dagger": (
        lambda: their_crossvit(multi_conv=True),
        lambda: CrossVit(**CROSSVIT, three_convs=True),
        (1, 3, 48, 64),
    ),
    "tnt": (their_tnt, lambda: Tnt(**TNT), (2, 3, 37, 52)),
    "tnt with biases": (lambda: their_tnt(qkv_bias=True), lambda: Tnt(**TNT, qkv_bias=True), (1, 3, 37, 52)),
    "tnt legacy": (lambda: their_tnt(legacy=True), lambda: Tnt(**TNT, legacy=True), (2, 3, 37, 52)),
    "swin": (their_encoder, lambda: SwinTransformer(**SWIN, window=(3, 3, 3)), (2, 2, 16, 14, 18)),
    "swin, odd": (
        lambda: their_encoder((4, 3, 5), "mergingv2"),
        lambda: SwinTransformer(**SWIN, window=(4, 3, 5), merging="mergingv2"),
        (1, 2, 17, 13, 11),
    ),
    "swin unetr": (their_unetr, lambda: SwinUnetr(**SWIN, window=(3, 3, 3)), (1, 2, 64, 32, 32)),
}
OF_VIT = {"linear", "mlp", "attention", "norm"}
RUN = {"crossvit": OF_VIT, "tnt": OF_VIT, "swin": {"linear", "mlp", "window_attention", "norm"}}


def results(model: nn.Module, inputs: Tensor, gradients: bool) -> Made:
    inputs = inputs.clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        outs = model(inputs)
    outs = list(outs) if isinstance(outs, (list, tuple)) else [outs]
    made = {f"out {i}": out.detach() for i, out in enumerate(outs)}
    if not gradients:
        return made
    model.zero_grad()
    torch.autograd.backward(outs, [random(*out.shape, seed=3).to(out.dtype) for out in outs])
    return made | {"inputs": inputs.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


def together(made: Made, exact: Made) -> Made:
    """The gradients of all weights as one tensor, each by its scale: those of a dozen numbers, behind a whole model's
    roundings, are a matter of luck one by one."""
    kept = {name: value for name, value in made.items() if name.startswith(("out ", "inputs"))}
    names = [name for name in exact if name not in kept and has_gradient(name)]
    weights = [made[name].flatten() / exact[name].abs().max().to(made[name].dtype) for name in names]
    return kept | ({"weights": torch.cat(weights)} if weights else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_model(case: str, dtype: torch.dtype) -> None:
    their_make, make, shape = CASES[case]
    torch.manual_seed(0)
    theirs = perturbed(their_make()).eval().to(dtype)
    ours = make().eval().to(dtype)
    own = ours.state_dict()
    state = {name: value for name, value in theirs.state_dict().items() if not name.endswith("relative_position_index")}
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in own.items()}
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    inputs = random(*shape, seed=2).to(dtype)
    # In bfloat16 torch's own convolutions of volumes give gradients that are off by half.
    gradients = dtype == torch.float32 or case != "swin unetr"
    plain, exact = results(theirs, inputs, gradients), results(copy.deepcopy(theirs).double(), inputs.double(), gradients)
    for kernels in (True, False):
        ours.kernels = kernels
        assert ours.kernels == kernels
        mk.last_kernels(clear=True)
        found = results(ours, inputs, gradients)
        forward = RUN[case.split(",")[0].split()[0]]
        backward = {f"{op}_backward" for op in forward} if gradients else set()
        assert ran() >= forward | backward if kernels else ran() == set()
        assert found.keys() == exact.keys()
        got, at_least, wanted = (together(made, exact) for made in (found, plain, exact))
        for name, value in wanted.items():
            # Norms of instances and leaky rectifiers of a whole U-net amplify rounding: over draws of the inputs torch's own
            # error in these gradients goes from 0.7 to 4000 times what it is here, that of any tier likewise.
            amplified = case == "swin unetr" and not name.startswith("out ")
            luck = 4 * (at_least[name].double() - value).abs().max().item() if amplified else 0.0
            assert_within_rule(got[name], at_least[name], value, f"{case}, kernels {kernels}, {name}", extra=luck)


def test_merging_as_published() -> None:
    x, layer = random(1, 4, 5, 6, 12), swin.PatchMerging(12, "published")
    x_pad = nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    slots = ["000", "100", "010", "001", "101", "010", "001", "111"]
    parts = [x_pad[:, int(i) :: 2, int(j) :: 2, int(k) :: 2] for i, j, k in slots]
    torch.testing.assert_close(layer(x), layer.reduction(layer.norm(torch.cat(parts, dim=-1))))


# --- published checkpoints ----------------------------------------------------------------------------------------------
def noise_like(model: nn.Module) -> Made:
    return {name: random(*value.shape, seed=i) for i, (name, value) in enumerate(model.state_dict().items())}


TNT_NAMES = {
    "pixel_embed.": "patch_embed.",
    "pixel_pos": "inner_pos",
    "patch_pos": "outer_pos",
    "norm1_proj": "proj_norm1",
    "norm2_proj": "proj_norm2",
    ".norm_in.": ".inner_norm1.",
    ".attn_in.": ".inner_attn.",
    ".norm_mlp_in.": ".inner_norm2.",
    ".mlp_in.": ".inner_mlp.",
    ".norm_out.": ".outer_norm1.",
    ".attn_out.": ".outer_attn.",
    ".norm_mlp.": ".outer_norm2.",
    ".mlp.": ".outer_mlp.",
}


@pytest.mark.parametrize("legacy", [False, True])
def test_published_names_of_tnt(legacy: bool) -> None:
    model = Tnt(**TNT, legacy=legacy)
    wanted = noise_like(model)
    published = {}
    for name, value in wanted.items():
        for ours, theirs in TNT_NAMES.items():
            name = name.replace(ours, theirs)
        published[name] = value
    published["inner_pos"] = wanted["pixel_pos"].flatten(2).mT
    published["outer_tokens"] = random(1, 6, 32)
    assert "blocks.1.inner_attn.qk.weight" in published and "blocks.0.proj_norm1.weight" in published
    assert model.load_pretrained(published) == ["outer_tokens"]
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["module", "encoder", "swinViT"])
def test_published_names_of_swin_encoders(kind: str) -> None:
    model = SwinTransformer(**SWIN, window=(3, 3, 3))
    wanted = noise_like(model)
    published = {}
    for name, value in wanted.items():
        if kind == "module":
            name = name.replace("linear1", "fc1").replace("linear2", "fc2")
        elif kind == "encoder":
            name = re.sub(r"^(layers\d)\.0\.", r"\1.0.0.", name)
        published[f"{kind}.{name}"] = value
    table = next(name for name in published if name.endswith("relative_position_bias_table"))
    published[table.replace("bias_table", "index")] = random(27, 27)
    extra = {"module": "module.rotation_head.weight", "encoder": "encoder.mask_token", "swinViT": "out.conv.conv.weight"}
    published[extra[kind]] = random(3, 3)
    assert model.load_pretrained(published) == [extra[kind].removeprefix(f"{kind}.")]
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


SMALL: dict[str, Callable[..., Any]] = {
    "crossvit": lambda **options: CrossVit(**CROSSVIT | options),
    "tnt": lambda **options: Tnt(**TNT | options),
    "swin_unetr": lambda **options: SwinUnetr(**SWIN | {"window": (3, 3, 3)} | options),
    "swin_unetr_encoder": lambda **options: SwinTransformer(**SWIN | {"window": (3, 3, 3)} | options),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_is_missing_is_said_and_nothing_loaded(name: str) -> None:
    model = SMALL[name]()
    before, state = copy.deepcopy(model.state_dict()), noise_like(model)
    last = list(state)[-1]
    del state[last]
    with pytest.raises(ValueError, match=rf"^state_dict: expected {re.escape(last)} in it too"):
        model.load_pretrained(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=rf"size mismatch for {re.escape(last)}"):
        model.load_pretrained(state | {last: random(1, 2, 3)})
    del state[next(iter(state))]
    with pytest.raises(ValueError, match=r"^state_dict: expected .*, .* in it too"):
        model.load_pretrained(state)


# --- by themselves ------------------------------------------------------------------------------------------------------
# Those of timm 1.0's and MONAI's models. The papers count 27.4 M (CrossViT-15), 43.3 M (-18), 104.7 M (B), 23.8 M (TNT-S),
# 65.6 M (TNT-B) and 61.98 M (Swin UNETR).
PARAMETERS = {
    "crossvit_tiny": 7_014_800,
    "crossvit_small": 26_856_272,
    "crossvit_base": 105_025_232,
    "crossvit_9": 8_553_296,
    "crossvit_15": 27_528_464,
    "crossvit_18": 43_271_408,
    "crossvit_9_dagger": 8_776_592,
    "crossvit_15_dagger": 28_209_008,
    "crossvit_18_dagger": 44_266_976,
    "tnt_s": 23_768_584,
    "tnt_b": 65_428_680,
    "swin_unetr": 62_191_941,
    "swin_unetr_encoder": 8_063_154,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_named_sizes(name: str) -> None:
    assert name in list_models()
    with torch.device("meta"):
        model = create_model(name, kernels=False)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name] and not model.kernels


def test_names_are_those_of_the_published_models_at_full_size() -> None:
    timm = oracle("timm")
    with torch.device("meta"):
        for ours, theirs, options in (
            ("crossvit_18_dagger", "crossvit_18_dagger_408", {"image_sizes": (408, 384)}),
            ("crossvit_base", "crossvit_base_240", {}),
            ("tnt_b", "tnt_b_patch16_224", {}),
            ("tnt_s", "tnt_s_legacy_patch16_224", {"legacy": True}),
        ):
            wanted = {name: value.shape for name, value in timm.create_model(theirs).state_dict().items()}
            assert {name: value.shape for name, value in create_model(ours, **options).state_dict().items()} == wanted


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides(name: str) -> None:
    first = SMALL[name]()
    torch.manual_seed(77)
    assert same_state(first, SMALL[name]())
    other = SMALL[name](seed=1)
    drawn = [n for n, p in first.named_parameters() if p.dim() > 1]
    assert not any(torch.equal(first.get_parameter(n), other.get_parameter(n)) for n in drawn)
    assert all(bool(p.isfinite().all()) and float(p.detach().abs().max()) <= 1 for p in first.parameters())


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "crossvit": (
        lambda: MultiScaleBlock((12, 24), (3, 2), (3, 2), (1, 1, 0)),
        ([random(2, 17, 12), random(2, 5, 24)],),
    ),
    "tnt": (lambda: tnt.Block(12, 32, 16, (2, 4)), (random(12, 16, 12), random(2, 7, 32))),
    "tnt legacy": (lambda: tnt.Block(12, 32, 16, (2, 4), legacy=True), (random(12, 16, 12), random(2, 7, 32))),
    "swin": (lambda: swin.SwinTransformerBlock(12, 3, (3, 3, 3), (1, 1, 1), 4.0), (random(1, 5, 4, 3, 12),)),
    "swin stage": (lambda: swin.Stage(12, 2, 3, (3, 3, 3), 4.0, "merging"), (random(1, 5, 4, 6, 12),)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_compile(name: str) -> None:
    make, inputs = BLOCKS[name]
    block = make().eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = block(*inputs)
        mk.last_kernels(clear=True)
        found = compiled(*inputs)
    assert {"linear", "mlp", "norm"} <= ran()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["crossvit", "tnt", "swin_unetr_encoder"])
def test_models_compile(name: str) -> None:
    model = SMALL[name]().eval()
    inputs = {"crossvit": random(1, 3, 40, 44), "tnt": random(1, 3, 37, 52)}.get(name, random(1, 2, 17, 9, 14))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(inputs), model(inputs))


def test_shapes_of_features() -> None:
    with torch.no_grad():
        images = random(1, 3, 37, 52)
        assert [tuple(x.shape) for x in SMALL["crossvit"]().features(images)] == [(1, 12), (1, 24)]
        assert SMALL["tnt"]().features(images).shape == (1, 32)
        maps = SMALL["swin_unetr_encoder"](normalize=False)(random(1, 2, 17, 4, 1))
        shapes = [(12, 9, 2, 1), (24, 5, 1, 1), (48, 3, 1, 1), (96, 2, 1, 1), (192, 1, 1, 1)]
        assert [tuple(x.shape) for x in maps] == [(1, *shape) for shape in shapes]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ("crossvit", {"image_sizes": (50, 32)}, r"image_sizes: expected multiples of \(12, 16\), got \(50, 32\)"),
        ("crossvit", {"image_sizes": (56, 32), "patch_sizes": (14, 16), "three_convs": True}, "patch_sizes: expected 12 or"),
        ("crossvit", {"num_heads": (5, 2)}, "num_heads: expected a divisor of dim, 12, got 5"),
        ("tnt", {"num_heads": (5, 4)}, "num_heads: expected a divisor of the channels, 12, got 5"),
        ("tnt", {"image_size": (15, 52)}, r"image_size: expected at least a patch, 16, got \(15, 52\)"),
        ("tnt", {"legacy": True, "patch_size": 14}, "patch_size: expected a multiple of stride, 4, with legacy, got 14"),
        ("swin_unetr", {"merging": "max"}, "merging: expected one of published, merging, mergingv2, got 'max'"),
        ("swin_unetr", {"depths": (1, 1)}, "depths: expected one for each of the 4 stages, got 2"),
        ("swin_unetr_encoder", {"num_heads": (2, 3, 5, 4)}, "num_heads: expected heads that divide dim, 48, got 5"),
    ],
)
def test_bad_models(make: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SMALL[make](**options)


def test_bad_inputs() -> None:
    crossvit = SMALL["crossvit"]()
    for bad in (random(3, 48, 48), random(1, 4, 48, 48)):
        with pytest.raises(ValueError, match=r"^images: expected \[B, 3, height, width\], got"):
            crossvit(bad)
    small = SMALL["tnt"]()
    for bad in (random(3, 37, 52), random(1, 3, 52, 37), random(1, 2, 37, 52)):
        with pytest.raises(ValueError, match=r"^images: expected \[B, 3, 37, 52\], got"):
            small(bad)
    unetr = SMALL["swin_unetr"]()
    for bad in (random(2, 64, 32, 32), random(1, 3, 64, 32, 32)):
        for model in (unetr, unetr.swinViT):
            with pytest.raises(ValueError, match=r"^volumes: expected \[B, 2, depth, height, width\], got"):
                model(bad)
    for edges in ((64, 32, 48), (32, 32, 32)):
        with pytest.raises(
            ValueError, match=rf"^volumes: expected edges .* at least 64, got \[{edges[0]}, 32, {edges[2]}\]"
        ):
            unetr(random(1, 2, *edges))
