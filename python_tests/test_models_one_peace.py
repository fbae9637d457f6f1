"""ONE-PEACE: modalities and padding, its weights by published names."""

from __future__ import annotations

import pytest
import torch
from small_models import Made, one_peace, tokens, words


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


def test_one_peace_takes_published_weights() -> None:
    model = one_peace()
    feed_forward = {
        "w_gate": "0.wi_0.weight",
        "w_in": "0.wi_1.weight",
        "hidden_norm_weight": "2.weight",
        "hidden_norm_bias": "2.bias",
        "w_out": "3.weight",
        "b_out": "3.bias",
    }
    theirs: Made = {"encoder_wrapper.fusion_model.version": torch.zeros(1)}
    for name, value in model.state_dict().items():
        value = torch.randn_like(value)
        name = name.replace("encoder.", "fusion_model.")
        for modality in ("text", "image", "audio"):
            name = name.replace(f"layer_norms.{modality}", f"{modality}_layer_norm")
        if ".embed_images.1." in name or ".embed_images.4." in name:
            name = name.replace("weight", "layer_norm.weight").replace("bias", "layer_norm.bias")
        parent, _, kind = name.rpartition(".")
        if kind in feed_forward:
            for number, modality in enumerate(("text", "image", "audio")):
                theirs[f"encoder_wrapper.{parent.replace('ffn', f'{modality}_ffn')}.{feed_forward[kind]}"] = value[number]
        else:
            theirs[f"encoder_wrapper.{name}"] = value
    assert theirs["encoder_wrapper.fusion_model.layers.1.audio_ffn.0.wi_1.weight"].shape == (40, 24)
    assert theirs["encoder_wrapper.image_adapter.embed_images.4.layer_norm.bias"].shape == (6,)
    assert "encoder_wrapper.fusion_model.image_layer_norm.weight" in theirs
    assert model.load_pretrained(theirs) == ["encoder.version"]
    layers = model.encoder.layers
    assert torch.equal(layers[1].ffn.w_in[2], theirs["encoder_wrapper.fusion_model.layers.1.audio_ffn.0.wi_1.weight"])
    assert torch.equal(layers[0].gamma_1, theirs["encoder_wrapper.fusion_model.layers.0.gamma_1"])
