"""Small models of transformers with random weights, by name: what test_swap_transformers.py swaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

C, HEADS, HIDDEN = 48, 4, 96
TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": C,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE: dict[str, Any] = {
    "hidden_size": C,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": 32,
    "patch_size": 8,
}


HANDS_ON = "eager attention of a model that hands on its weights unasked"


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        build: makes it; weights are drawn, and dropout is on where its config has it on.
        inputs: what it is called with.
        share: the least part of matrix products and attention that the kernels do.
        declined: reasons for which originals may serve calls.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    share: float = 1.0
    declined: tuple[str, ...] = ()


def ids(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(side: str = "right", batch: int = 2, length: int = 9) -> Tensor:
    """1 for tokens, 0 for the two pads of the second sequence."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    if side == "right":
        mask[1, -2:] = 0
    else:
        mask[1, :2] = 0
    return mask


def text(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": ids(), "attention_mask": padded()} | more


def pixels(size: int = 32, width: int | None = None) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": floats(2, 3, size, width or size)}


def causal(config: type, model: type, **more: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**TEXT | more))


def clip_like(config: type, model: type, vocabulary: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(text_config=TEXT | vocabulary | more, vision_config=IMAGE | more))


def text_and_pixels(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": ids(), "attention_mask": padded(), "pixel_values": floats(2, 3, 32, 32)} | more


def lxmert() -> nn.Module:
    sizes = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")}
    config = hf.LxmertConfig(**sizes, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=24, max_position_embeddings=64)
    return hf.LxmertModel(config)


def bridgetower() -> nn.Module:
    text = {name: value for name, value in TEXT.items() if name not in ("pad_token_id",)}
    config = hf.BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        intermediate_size=128,
        text_config=text | {"hidden_size": 64, "intermediate_size": 128, "pad_token_id": 1},
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32},
    )
    return hf.BridgeTowerModel(config)


def cvt() -> nn.Module:
    config = hf.CvtConfig(
        embed_dim=[16, 32, 48],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],
        drop_path_rate=[0.0, 0.0, 0.0],
        mlp_ratio=[2.0, 2.0, 2.0],
    )
    return hf.CvtModel(config)


def swin(**more: Any) -> nn.Module:
    sizes: dict[str, Any] = {"image_size": 64, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
    model = hf.SwinModel(hf.SwinConfig(**sizes, window_size=4, **more))
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:  # zeros in a new model
            nn.init.normal_(parameter)
    return model


def mask2former() -> nn.Module:
    backbone = hf.SwinConfig(
        image_size=64,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = hf.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        dim_feedforward=64,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        num_queries=6,
        num_labels=3,
    )
    return hf.Mask2FormerForUniversalSegmentation(config)


def speecht5() -> nn.Module:
    config = hf.SpeechT5Config(
        vocab_size=61,
        hidden_size=C,
        encoder_layers=2,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_layers=2,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=HIDDEN,
        num_mel_bins=10,
        speech_decoder_prenet_units=16,
        speech_decoder_postnet_units=16,
        speaker_embedding_dim=8,
        speech_decoder_prenet_dropout=0.0,
    )
    encoder, decoder = hf.models.speecht5.modeling_speecht5, hf.models.speecht5.modeling_speecht5
    return hf.SpeechT5Model(
        config, encoder.SpeechT5EncoderWithTextPrenet(config), decoder.SpeechT5DecoderWithTextPrenet(config)
    )


def t5(**more: Any) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 61, "d_model": C, "d_kv": 12, "d_ff": HIDDEN, "num_layers": 2, "num_heads": HEADS}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, **more))


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=61,
        num_mel_bins=8,
        d_model=C,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**IMAGE),
        text_config=hf.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=60,
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config)


def llava_inputs() -> dict[str, Any]:
    tokens = torch.cat([torch.full((2, 16), 60), ids().clamp(max=59)], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": floats(2, 3, 32, 32)}


def vilt() -> nn.Module:
    return hf.ViltModel(hf.ViltConfig(**TEXT | IMAGE))


def flava() -> nn.Module:
    multimodal = {name: value for name, value in TEXT.items() if "token" not in name}
    config = hf.FlavaConfig(
        text_config=TEXT, image_config=IMAGE, multimodal_config=multimodal, hidden_size=C, projection_dim=16
    )
    return hf.FlavaModel(config)


def blip2() -> nn.Module:
    config = hf.Blip2Config(
        vision_config=IMAGE,
        qformer_config={name: TEXT[name] for name in TEXT if "token" not in name} | {"encoder_hidden_size": C},
        text_config={"model_type": "opt", "ffn_dim": HIDDEN, "word_embed_proj_dim": C, **TEXT},
        num_query_tokens=5,
        image_token_index=60,
    )
    return hf.Blip2ForConditionalGeneration(config)


def blip2_inputs() -> dict[str, Any]:
    tokens = torch.cat([torch.full((2, 5), 60), ids().clamp(max=59)], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": floats(2, 3, 32, 32)}


MODELS: dict[str, Model] = {
    "vit": Model(lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), pixels()),
    "vit eager": Model(lambda: hf.ViTModel(hf.ViTConfig(**IMAGE, attn_implementation="eager")), pixels()),
    "vivit": Model(
        lambda: hf.VivitModel(hf.VivitConfig(**IMAGE | {"image_size": 16}, num_frames=4, tubelet_size=[2, 8, 8])),
        lambda: {"pixel_values": floats(2, 4, 3, 16, 16)},
    ),
    "deit": Model(lambda: hf.DeiTModel(hf.DeiTConfig(**IMAGE)), pixels()),
    "blip": Model(lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**IMAGE, initializer_range=0.02)), pixels()),
    "aimv2": Model(lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**IMAGE)), pixels()),
    "clip": Model(clip_like(hf.CLIPConfig, hf.CLIPModel, {}), text_and_pixels(), 0.99),
    "clip mish": Model(clip_like(hf.CLIPConfig, hf.CLIPModel, {}, hidden_act="mish"), text_and_pixels(), 0.99),
    "clip gelu": Model(clip_like(hf.CLIPConfig, hf.CLIPModel, {}, hidden_act="gelu"), text_and_pixels(), 0.99),
    "siglip": Model(clip_like(hf.SiglipConfig, hf.SiglipModel, {}), text_and_pixels(), 0.99),
    "bert": Model(causal(hf.BertConfig, hf.BertModel), text()),
    "bert eager": Model(causal(hf.BertConfig, hf.BertModel, attn_implementation="eager"), text()),
    "lxmert": Model(
        lxmert,
        lambda: {
            "input_ids": ids(),
            "attention_mask": padded(),
            "visual_feats": floats(2, 7, 24),
            "visual_pos": floats(2, 7, 4, seed=1),
            "visual_attention_mask": padded(length=7),
        },
    ),
    "bridgetower": Model(
        bridgetower,
        text_and_pixels(pixel_mask=torch.ones(2, 32, 32, dtype=torch.int64)),
        0.95,
        (HANDS_ON,),
    ),
    "cvt": Model(cvt, pixels(64)),
    "swin": Model(swin, pixels(64)),
    "swin odd": Model(swin, pixels(36, 44)),
    "swin no bias": Model(lambda: swin(qkv_bias=False), pixels(36, 44)),
    "swin dropout": Model(lambda: swin(attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1), pixels(64)),
    "swin eager": Model(lambda: swin(attn_implementation="eager"), pixels(64)),
    "mask2former": Model(mask2former, pixels(64), 0.9),
    "speecht5": Model(
        speecht5, lambda: {"input_values": ids(), "attention_mask": padded(), "decoder_input_values": ids(2, 6)}, 0.9
    ),
    "t5": Model(t5, lambda: text(decoder_input_ids=ids(2, 6))()),
    "t5 eager": Model(lambda: t5(attn_implementation="eager"), lambda: text(decoder_input_ids=ids(2, 6))()),
    "t5 gated": Model(lambda: t5(feed_forward_proj="gated-gelu"), lambda: text(decoder_input_ids=ids(2, 6))()),
    "llama": Model(causal(hf.LlamaConfig, hf.LlamaForCausalLM, num_key_value_heads=2), text(), 0.99),
    "llama no mask": Model(
        causal(hf.LlamaConfig, hf.LlamaForCausalLM, num_key_value_heads=2), lambda: {"input_ids": ids()}, 0.99
    ),
    "llama left": Model(
        causal(hf.LlamaConfig, hf.LlamaForCausalLM, num_key_value_heads=2),
        text(attention_mask=padded("left")),
        0.99,
    ),
    "llama eager": Model(
        causal(hf.LlamaConfig, hf.LlamaForCausalLM, num_key_value_heads=2, attn_implementation="eager"),
        text(attention_mask=padded("left")),
        0.99,
    ),
    "mistral": Model(causal(hf.MistralConfig, hf.MistralForCausalLM, num_key_value_heads=2, sliding_window=4), text(), 0.99),
    "mixtral": Model(
        causal(
            hf.MixtralConfig,
            hf.MixtralForCausalLM,
            num_key_value_heads=2,
            num_local_experts=4,
            experts_implementation="eager",
        ),
        text(),
        0.9,
    ),
    "qwen2 moe": Model(
        causal(
            hf.Qwen2MoeConfig,
            hf.Qwen2MoeForCausalLM,
            num_key_value_heads=2,
            num_experts=4,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            num_experts_per_tok=2,
            experts_implementation="eager",
        ),
        text(),
        0.9,
    ),
    "gemma2": Model(
        causal(
            hf.Gemma2Config,
            hf.Gemma2ForCausalLM,
            num_key_value_heads=2,
            head_dim=12,
            sliding_window=4,
            attn_logit_softcapping=0.5,
        ),
        text(),
        0.99,
    ),
    "gpt oss": Model(
        causal(
            hf.GptOssConfig,
            hf.GptOssForCausalLM,
            num_key_value_heads=2,
            head_dim=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            experts_implementation="eager",
        ),
        text(),
        0.2,
    ),
    "whisper": Model(whisper, lambda: {"input_features": floats(2, 8, 40), "decoder_input_ids": ids(2, 6)}),
    "llava": Model(llava, llava_inputs, 0.99),
    "blip2": Model(blip2, blip2_inputs, 0.99),
    "flava": Model(flava, text_and_pixels()),
    "visualbert": Model(
        lambda: hf.VisualBertModel(hf.VisualBertConfig(**TEXT, visual_embedding_dim=16)),
        text(
            visual_embeds=floats(2, 5, 16),
            visual_attention_mask=torch.ones(2, 5, dtype=torch.int64),
            visual_token_type_ids=torch.ones(2, 5, dtype=torch.int64),
        ),
    ),
    "timesformer": Model(
        lambda: hf.TimesformerModel(hf.TimesformerConfig(**IMAGE, num_frames=2)),
        lambda: {"pixel_values": floats(2, 2, 3, 32, 32)},
    ),
    "vilt": Model(vilt, text_and_pixels()),
    "dinov2": Model(lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE, mlp_ratio=2)), pixels()),
    "dinov2 swiglu": Model(lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE, mlp_ratio=2, use_swiglu_ffn=True)), pixels()),
    "modernbert": Model(
        causal(hf.ModernBertConfig, hf.ModernBertModel, local_attention=4, cls_token_id=1, sep_token_id=2), text(), 0.99
    ),
}
