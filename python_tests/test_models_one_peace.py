"""ONE-PEACE: modalities and padding, its weights by published names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small_models import Made, one_peace, tokens, words

from mmkernels.models.one_peace import OnePeace, OnePeaceEncoder


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # nothing here is large enough for two


@torch.no_grad()
def test_one_peace_modalities_and_padding() -> None:
    model = one_peace().eval()
    ids, image, audio = words(2), tokens(2, 3, 48, 48), tokens(2, 5, 24)
    joint = model(ids, image, audio)
    assert {name: tuple(value.shape) for name, value in joint.items()} == {
        "text": (2, 8, 24),
        "image": (2, 10, 24),
        "audio": (2, 5, 24),
    }
    alone = model(image=image)
    assert list(alone) == ["image"] and not torch.allclose(alone["image"], joint["image"])
    for kernels in (True, False):
        model.kernels = kernels
        # Padding has no part in it: the shorter text has the same features.
        long = model(ids[:1], image[:1])
        short = model(ids[:1, :5], image[:1])
        torch.testing.assert_close(long["image"], short["image"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(long["text"][:, :6], short["text"], rtol=1e-4, atol=1e-5)
    model.kernels = True
    vision = one_peace(modalities=["image"]).eval()
    state = {name: value for name, value in model.state_dict().items() if name in vision.state_dict()}
    for name, value in vision.state_dict().items():
        if ".ffn." in name:
            state[name] = model.state_dict()[name][1:2]
        assert state[name].shape == value.shape
    vision.load_state_dict(state)
    torch.testing.assert_close(vision(image=image)["image"], alone["image"])
    empty = model(audio=audio[:, :0])
    assert empty["audio"].shape == (2, 0, 24)


def layer_names(layer: str, dim: int, hidden: int, modalities: Sequence[str]) -> Made:
    """What the published code calls the weights of a layer."""
    made = {f"{layer}.gamma_{number}": torch.randn(dim) for number in (1, 2)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        made[f"{layer}.self_attn.{name}.weight"] = torch.randn(dim, dim)
        if name != "k_proj":
            made[f"{layer}.self_attn.{name}.bias"] = torch.randn(dim)
    for name in ("self_attn.ln", "self_attn_layer_norm", "final_layer_norm"):
        made |= {f"{layer}.{name}.{kind}": torch.randn(dim) for kind in ("weight", "bias")}
    for modality in modalities:
        place = f"{layer}.{modality}_ffn"
        made |= {f"{place}.0.wi_{number}.weight": torch.randn(hidden, dim) for number in (0, 1)}
        made |= {f"{place}.2.{kind}": torch.randn(hidden) for kind in ("weight", "bias")}
        made |= {f"{place}.3.weight": torch.randn(dim, hidden), f"{place}.3.bias": torch.randn(dim)}
    return made


def published_names(modalities: Sequence[str] = ("text", "image", "audio")) -> Made:
    """A file of the published code: its encoder, and what is not here (buffers, audio's adapter, projections, decoder)."""
    place = "encoder_wrapper.fusion_model"
    made: Made = {f"{place}.version": torch.tensor([3.0])}
    for number in range(2):
        made |= layer_names(f"{place}.layers.{number}", 24, 40, modalities)
    for modality in modalities:
        made |= {f"{place}.{modality}_layer_norm.{kind}": torch.randn(24) for kind in ("weight", "bias")}
    text, image = "encoder_wrapper.text_adapter", "encoder_wrapper.image_adapter"
    made |= {
        f"{text}.cls_embedding": torch.randn(1, 1, 24),
        f"{text}.embed_tokens.weight": torch.randn(50, 24),
        f"{text}.embed_positions.weight": torch.randn(22, 24),
        f"{text}.rel_pos_table_list.0.weight": torch.randn(18, 3),
        f"{text}.rp_bucket": torch.zeros(1024, 1024, dtype=torch.int64),
        f"{image}.cls_embedding": torch.randn(1, 1, 24),
        f"{image}.pos_embed": torch.randn(10, 24),
        f"{image}.position_idx": torch.arange(10),
        f"{image}.rp_bucket": torch.zeros(10, 10, dtype=torch.int64),
        f"{image}.rel_pos_table_list.0.weight": torch.randn(28, 3),
        f"{image}.embed_images.0.weight": torch.randn(6, 3, 4, 4),
        f"{image}.embed_images.0.bias": torch.randn(6),
        f"{image}.embed_images.3.weight": torch.randn(6, 6, 2, 2),
        f"{image}.embed_images.3.bias": torch.randn(6),
        f"{image}.embed_images.6.weight": torch.randn(24, 6, 2, 2),
        f"{image}.embed_images.6.bias": torch.randn(24),
    }
    for number in (1, 4):
        made |= {f"{image}.embed_images.{number}.layer_norm.{kind}": torch.randn(6) for kind in ("weight", "bias")}
    # Stage 2 of pretraining: a decoder of fewer modalities.
    made |= layer_names("decoder_wrapper.fusion_model.layers.0", 12, 20, ["text", "audio"])
    made |= {"encoder_wrapper.audio_adapter.cls_embedding": torch.randn(1, 1, 24), "logit_scale": torch.tensor(2.0)}
    return made | {f"{modality}_proj.weight": torch.randn(24, 24) for modality in modalities}


def test_one_peace_takes_published_weights() -> None:
    model, theirs = one_peace(), published_names()
    left = model.load_pretrained(theirs)
    place = "encoder_wrapper.fusion_model.layers"
    not_here = ("version", "rp_bucket", "position_idx", "cls_embedding", "logit_scale")
    assert not [name for name in left if not name.endswith(not_here) and "proj.weight" not in name and "decoder" not in name]
    assert len([name for name in left if "decoder" in name]) == len(layer_names("", 12, 20, ["text", "audio"]))
    layers = model.encoder.layers
    for number, modality in enumerate(("text", "image", "audio")):
        assert torch.equal(layers[1].ffn.w_in[number], theirs[f"{place}.1.{modality}_ffn.0.wi_1.weight"])
        assert torch.equal(layers[1].ffn.w_gate[number], theirs[f"{place}.1.{modality}_ffn.0.wi_0.weight"])
        assert torch.equal(layers[0].ffn.b_out[number], theirs[f"{place}.0.{modality}_ffn.3.bias"])
    assert torch.equal(layers[0].gamma_1, theirs[f"{place}.0.gamma_1"])
    assert torch.equal(layers[0].self_attn.ln.bias, theirs[f"{place}.0.self_attn.ln.bias"])
    assert torch.equal(
        model.image_adapter.embed_images[4].bias, theirs["encoder_wrapper.image_adapter.embed_images.4.layer_norm.bias"]
    )
    # All of the parameters are theirs now.
    sums = {float(value.double().sum()) for value in model.encoder.layer_norms.state_dict().values()}
    assert len(sums) == 6 and sums <= {float(value.double().sum()) for value in theirs.values()}
    del theirs[f"{place}.1.image_ffn.3.bias"]
    with pytest.raises(
        ValueError, match=r"^state_dict: expected number 1 of what becomes encoder\.layers\.1\.ffn\.b_out in"
    ):
        model.load_pretrained(theirs)


@pytest.mark.parametrize("prefix", ["", "fusion_model.", "encoder_wrapper.fusion_model."])
def test_one_peace_encoder_takes_published_weights(prefix: str) -> None:
    encoder = OnePeaceEncoder(24, 3, 40, ["image", "text"], depth=2)
    place = "encoder_wrapper.fusion_model."
    theirs = {name.replace(place, prefix): value for name, value in published_names().items() if place in name}
    left = encoder.load_pretrained(theirs)
    assert all("audio" in name or name == "version" for name in left) and len(left) == 1 + 2 + 2 * 6
    # By the order of the modalities here.
    assert torch.equal(encoder.layers[1].ffn.w_out[1], theirs[f"{prefix}layers.1.text_ffn.3.weight"])
    assert torch.equal(encoder.layer_norms["image"].bias, theirs[f"{prefix}image_layer_norm.bias"])


def test_one_peace_begins_as_published() -> None:
    model = OnePeace(24, 3, 40, depth=1, image_size=48)
    for adapter in (model.text_adapter, model.image_adapter):
        assert not adapter.rel_pos_table_list[0].weight.any() and adapter.cls_embedding.any()
    assert torch.equal(model.encoder.layers[0].gamma_2, torch.full((24,), 1e-6))
    assert model.text_adapter.embed_tokens.weight.shape == (50264, 24)  # 50260 words of its dictionary and 4 symbols
    assert model.text_adapter.embed_positions.weight.shape == (514, 24)
    assert model.text_adapter.rel_pos_table_list[0].weight.shape == (514, 3)
