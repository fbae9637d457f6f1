"""All-in-one: the published roll and blocks by golden vectors, and the model with kernels against plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mmkernels as mk
from mmkernels.models import create_model, list_models
from mmkernels.models.all_in_one import AllInOne, AllInOneOutput, Block
from mmkernels.nn import TokenRoll, TokenRollLayerNorm, visual_ranges
from mmkernels.reference.token_roll import default_ranges

GOLDEN = Path(__file__).parent / "golden" / "all_in_one"
DTYPES = [torch.float32, torch.bfloat16]
IN_BLOCKS = {"token_roll_layer_norm", "attention", "linear", "norm", "mlp"}
"""The ops of a block, each of which has its backward pass."""
IN_BLOCKS_BACKWARD = IN_BLOCKS | {f"{op}_backward" for op in IN_BLOCKS}


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(GOLDEN / f"{case}.safetensors"), json.loads((GOLDEN / f"{case}.json").read_text())["hyper_parameters"]


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """(largest, RMS)"""
    difference = got.double() - exact.double()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def allowed(plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """Twice the plain formula's own error in the same dtype, plus 2 eps max|ref|."""
    slack = 2 * torch.finfo(plain.dtype).eps * float(exact.abs().max())
    largest, rms = errors(plain, exact)
    return 2 * largest + slack, 2 * rms + slack


def assert_within(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    for kind, error, limit in zip(("largest", "RMS"), errors(got, exact), allowed(plain, exact), strict=True):
        assert error <= limit, f"{name}: {kind} error {error:.3g}, allowed {limit:.3g}"


def ran() -> set[str]:
    """The ops whose kernels ran since the last call; none of them may be the reference."""
    traced = mk.last_kernels(clear=True)
    assert all(kernel != "reference" for _, kernel in traced)
    return {op for op, _ in traced}


# --- the roll ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "case",
    ["roll_v0_T1", "roll_v0_odd", "roll_v0_small", "roll_v1_50", "roll_v1_odd", "roll_v1_small", "roll_v2_layer0"],
)
def test_golden_roll(case: str) -> None:
    tensors, params = golden(case)
    ranges = {
        0: None,
        1: [(index, index + 1, 1) for index in tensors.get("roll_idx", torch.empty(0)).tolist()],
        2: [(1, 1 + params["fold"], 1)],
    }[params["v"]]
    x = tensors["x"].requires_grad_()
    ran()
    out = mk.token_roll(x, params["T"], divisor=params["n_div"], ranges=ranges)
    out.backward(tensors["gout"])
    assert ran() == {"token_roll"}
    assert torch.equal(out, tensors["out"])
    assert torch.equal(x.grad, tensors["grad.x"])


def test_zeroed_tokens_of_the_published_v2_are_kept() -> None:
    tensors, params = golden("roll_v2_layer3")
    begin = 1 + params["fold"] * params["layer"]
    out = mk.token_roll(tensors["x"], params["T"], ranges=[(begin, begin + params["fold"], 1)])
    assert not tensors["out"][:, 1:begin].any()
    assert torch.equal(out[:, 1:begin], tensors["x"][:, 1:begin])
    assert torch.equal(out[:, begin:], tensors["out"][:, begin:])


@pytest.mark.parametrize("kernels", [True, False])
def test_roll_module(kernels: bool) -> None:
    tensors, params = golden("roll_v0_odd")
    roll = TokenRoll(params["n_div"], kernels=kernels)
    ran()
    assert torch.equal(roll(tensors["x"], params["T"]), tensors["out"])
    assert ran() == ({"token_roll"} if kernels else set())


def test_visual_ranges_are_the_default_ones_behind_text() -> None:
    for num_visual in (1, 7, 8, 17, 197):
        shifted = tuple((start + 40, stop + 40, shift) for start, stop, shift in default_ranges(num_visual, 8))
        assert visual_ranges(40, num_visual) == shifted


# --- the norm ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernels", [True, False])
def test_norm_of_a_single_frame_hands_its_input_back(kernels: bool) -> None:
    norm = TokenRollLayerNorm(6, kernels=kernels)
    x = torch.randn(2, 17, 6)
    normed, rolled = norm(x, 1, visual_ranges(0, 17))
    assert rolled is x
    torch.testing.assert_close(normed, torch.nn.LayerNorm(6)(x))


def test_norm_takes_the_weights_of_a_layer_norm() -> None:
    norm, plain = TokenRollLayerNorm(6), torch.nn.LayerNorm(6)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(norm.state_dict())
    assert not list(TokenRollLayerNorm(6, elementwise_affine=False).parameters())


def test_plain_norm_takes_ranges_in_any_order() -> None:
    norm = TokenRollLayerNorm(5, kernels=False)
    x = torch.randn(6, 11, 5)
    ranges = [(7, 11, -1), (0, 2, 2), (3, 3, 1), (3, 6, 1)]
    assert torch.equal(norm(x, 3, ranges)[1], mk.token_roll(x, 3, ranges=ranges))


# --- the blocks -------------------------------------------------------------------------------------------------------
def run_blocks(tensors: dict[str, Tensor], params: dict[str, Any], dtype: torch.dtype, kernels: bool) -> dict[str, Tensor]:
    """The golden's outputs and gradients, by its names."""
    blocks = [
        Block(params["C"], params["heads"], mlp_ratio=params["mlp_ratio"], eps=params["ln_eps"], kernels=kernels)
        for _ in range(params["depth"])
    ]
    for i, block in enumerate(blocks):
        prefix = f"w.{i}."
        block.load_state_dict({name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)})
        block.to(dtype)
    x = tokens = tensors["x"].to(dtype).requires_grad_()
    for block in blocks:
        tokens = block(tokens, tensors["mask"].bool(), params["T"], visual_ranges(params["Nt"], params["Nv"]))
    out = tokens.unflatten(0, (-1, params["T"])).mean(1)
    out.backward(tensors["gout"].to(dtype))
    weights = {f"grad.w.{i}.{name}": w.grad for i, block in enumerate(blocks) for name, w in block.named_parameters()}
    return {"out_tokens": tokens.detach(), "out": out.detach(), "grad.x": x.grad, **weights}


@pytest.mark.parametrize("case", ["joint_small", "joint_odd"])
def test_golden_blocks(case: str) -> None:
    tensors, params = golden(case)
    exact = run_blocks(tensors, params, torch.float64, False)
    plain = run_blocks(tensors, params, torch.float32, False)
    ran()
    ours = run_blocks(tensors, params, torch.float32, True)
    assert ran() == IN_BLOCKS_BACKWARD
    assert {name for name in tensors if name.startswith(("grad.", "out"))} == exact.keys()
    for name, reference in exact.items():
        assert_within(name, ours[name], plain[name], reference)
        # The golden is float32 too, so the published code itself must lie as close to the oracle as plain torch does.
        assert_within(f"golden {name}", tensors[name], plain[name], reference)


# --- the model --------------------------------------------------------------------------------------------------------
def small_model(**overrides: Any) -> AllInOne:
    options = {"depth": 2, "image_size": 64, "vocab_size": 120, "max_text_len": 9, **overrides}
    model = AllInOne(48, 3, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # What starts at 0 or 1 would hide a mistake in its use.
        for weight in model.parameters():
            if weight.dim() == 1 or weight is model.transformer.temporal_embed:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def inputs(batch: int = 2, num_frames: int = 3, num_text: int = 7, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + num_frames + num_text)
    ids = torch.randint(1, 120, (batch, num_text), generator=generator)
    mask = (torch.arange(num_text) < num_text - 2).long().repeat(batch, 1)
    return ids, mask, torch.randn(batch, num_frames, 3, size, size, generator=generator)


def run_model(model: AllInOne, call: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and all gradients, with the weights and the video in `dtype`."""
    ids, mask, video = call
    video = video.detach().to(dtype, copy=True).requires_grad_()
    model.zero_grad()
    outputs: AllInOneOutput = model.to(dtype)(ids, mask, video)
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(output.shape, generator=generator).bfloat16().to(dtype) for output in outputs]
    torch.autograd.backward(list(outputs), cotangents)
    # The embedding of the frame's index has no gradient where a single frame leaves it unused.
    gradients = {f"grad {name}": weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {
        **{name: value.detach() for name, value in outputs._asdict().items()},
        "grad video": video.grad,
        **gradients,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_frames"), [(2, 3), (1, 1), (1, 2), (1, 5)])
def test_kernels_equal_plain_torch(dtype: torch.dtype, batch: int, num_frames: int) -> None:
    call = inputs(batch, num_frames)
    call = (*call[:2], call[2].to(dtype))
    weights = small_model().to(dtype).state_dict()

    def run(kernels: bool, compute: torch.dtype) -> dict[str, Tensor]:
        model = small_model(kernels=kernels)
        model.load_state_dict(weights)
        return run_model(model, call, compute)

    ran()
    exact, plain = run(False, torch.float64), run(False, dtype)
    assert ran() == set()
    ours = run(True, dtype)
    assert ran() == IN_BLOCKS_BACKWARD
    assert exact.keys() == plain.keys() == ours.keys()
    assert ("grad transformer.temporal_embed" in exact) == (num_frames > 1)
    for name, reference in exact.items():
        assert_within(name, ours[name], plain[name], reference)


def test_kernels_can_be_switched() -> None:
    model = small_model()
    assert model.kernels
    with torch.no_grad():
        ran()
        model(*inputs())
        assert ran() == IN_BLOCKS
        model.kernels = False
        assert not model.kernels
        model(*inputs())
        assert ran() == set()


def test_weights_are_interchangeable_and_fixed() -> None:
    ours, plain = small_model(kernels=True, seed=3), small_model(kernels=False)
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    again = small_model(seed=3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in ours.state_dict().items())


def test_names_are_those_of_the_checkpoints() -> None:
    names = set(AllInOne(6, 3, depth=1, image_size=32, vocab_size=10).state_dict())
    text = {f"text_embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    layers = {
        f"{layer}.{kind}"
        for layer in (
            "text_embeddings.LayerNorm",
            "transformer.patch_embed.proj",
            *(f"transformer.blocks.0.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
            "transformer.norm",
            "pooler.dense",
            "itm_score.fc",
        )
        for kind in ("weight", "bias")
    }
    tokens = {"transformer.cls_token", "transformer.pos_embed", "transformer.temporal_embed", "token_type_embeddings.weight"}
    assert names == text | layers | tokens


def test_checkpoints_of_either_head_load() -> None:
    ours, other = small_model(seed=1), small_model(seed=2)
    published = {name.replace("itm_score", "vtm_score"): value for name, value in ours.state_dict().items()}
    published["text_embeddings.position_ids"] = torch.arange(9)[None]
    assert other.load_pretrained(published) == ["text_embeddings.position_ids"]
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in other.state_dict().items())
    del published["pooler.dense.bias"]
    with pytest.raises(ValueError, match=r"^state_dict: expected pooler.dense.bias in it too"):
        other.load_pretrained(published)


def test_padding_does_not_reach_the_other_tokens() -> None:
    model = small_model().eval()
    ids, mask, video = inputs()
    with torch.no_grad():
        short = model(ids[:, :5], mask[:, :5], video)
        padded = model(ids, mask, video)
    torch.testing.assert_close(padded.video_features, short.video_features)
    torch.testing.assert_close(padded.text_features[:, :5], short.text_features)


def test_frames_meet_by_the_roll_alone() -> None:
    ids, mask, video = inputs(batch=1)
    changed = video.clone()
    changed[:, 2] += 1
    for divisor, meets in ((8, True), (100, False)):
        model = small_model(divisor=divisor).eval()
        # Before the mean over frames: the first frame's class token.
        features: list[Tensor] = []
        model.transformer.norm.register_forward_hook(lambda _, __, out, features=features: features.append(out[0, 7]))
        with torch.no_grad():
            model(ids, mask, video)
            model(ids, mask, changed)
        assert torch.equal(*features) != meets


@pytest.mark.parametrize("kernels", [True, False])
def test_compiles_as_one_graph(kernels: bool) -> None:
    torch.compiler.reset()
    model = small_model(kernels=kernels, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for num_frames in (3, 1, 4):
        call = inputs(num_frames=num_frames)
        ran()
        out = compiled(*call)
        out.matching_logits.sum().backward()
        assert ran() == (IN_BLOCKS_BACKWARD if kernels else set())
        for got, eager in zip(out, model(*call), strict=True):
            torch.testing.assert_close(got, eager)


def check_inductor(kernels: bool) -> None:
    torch.compiler.reset()
    model = small_model(kernels=kernels, depth=1)
    call = inputs()
    with torch.no_grad():
        expected = model(*call)
        ran()
        out = torch.compile(model, fullgraph=True)(*call)
    assert ran() == (IN_BLOCKS if kernels else set())
    for got, eager in zip(out, expected, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-5)


def test_compiles_with_inductor() -> None:
    check_inductor(kernels=True)


@pytest.mark.full
def test_compiles_with_inductor_in_plain_torch() -> None:
    check_inductor(kernels=False)


def test_bad_input() -> None:
    model = small_model()
    ids, mask, video = inputs()
    for bad in (video[..., :63], video[:, :, :2], video[0], video[:, :0]):
        with pytest.raises(ValueError, match=r"^video: expected \[B, T, 3, 64, 64\]"):
            model(ids, mask, bad)
    with pytest.raises(TypeError, match=r"^text_ids: expected int64, got torch.int32"):
        model(ids.int(), mask, video)
    for bad in (ids[:1], ids[:, :0], ids.repeat(1, 2)):
        with pytest.raises(ValueError, match=r"^text_ids: expected \[B, L\] with B=2 and L from 1 to 9"):
            model(bad, torch.ones_like(bad), video)
    with pytest.raises(ValueError, match=r"^text_mask: expected the shape of text_ids \[2, 7\]"):
        model(ids, mask[:, :3], video)
    with pytest.raises(ValueError, match=r"^image_size: expected a multiple of patch_size=16, got 60"):
        small_model(image_size=60)
    with pytest.raises(ValueError, match=r"^hidden_size: expected a multiple of num_heads=5, got 48"):
        AllInOne(48, 5)


# --- the list of models -----------------------------------------------------------------------------------------------
def test_models_are_listed_and_made() -> None:
    assert {"all_in_one_tiny", "all_in_one_small", "all_in_one_base"} <= set(list_models())
    model = create_model("all_in_one_small", depth=1, image_size=32, vocab_size=50, kernels=False)
    assert isinstance(model, AllInOne)
    assert not model.kernels
    assert model.itm_score.fc.weight.shape == (2, 384)
    with pytest.raises(ValueError, match=r"^model: expected one of .*all_in_one_tiny.*, got 'all_in_two'"):
        create_model("all_in_two")
    with pytest.raises(TypeError, match="width"):
        create_model("all_in_one_tiny", width=3)


@pytest.mark.full
def test_whole_tiny_model() -> None:
    model = create_model("all_in_one_tiny")
    # The paper's 12 M, and the embeddings of a text of 40 tokens and 3 frames.
    assert 11e6 < sum(weight.numel() for weight in model.parameters()) < 13e6
    call = inputs(batch=2, num_text=40, size=224)
    model.kernels = False
    plain = run_model(model, call, torch.float32)
    model.kernels = True
    ran()
    ours = run_model(model, call, torch.float32)
    assert ran() == IN_BLOCKS_BACKWARD
    model.kernels = False
    exact = run_model(model, call, torch.float64)
    for name, reference in exact.items():
        assert_within(name, ours[name], plain[name], reference)
