"""Published blocks out of this package's ops and modules, by golden vectors: ONE-PEACE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import golden, judge
from torch import Tensor

import mmkernels as mk
from mmkernels.reference import attention as attention_reference
from mmkernels.reference import norm as norm_reference

Made = dict[str, Tensor]


def attention_of(kernels: bool) -> Any:
    return mk.attention if kernels else attention_reference.attention


def leaves_of(tensors: Made, dtype: torch.dtype, without: tuple[str, ...] = ()) -> Made:
    """The published weights by their names, those of the branches in `without` left out."""
    return {
        name.removeprefix("w."): value.to(dtype).requires_grad_()
        for name, value in tensors.items()
        if name.startswith("w.") and not any(branch in name for branch in without)
    }


# --- ONE-PEACE ----------------------------------------------------------------------------------------------------------
def feed_forward_of(weights: Made, hidden: int, dtype: torch.dtype, kernels: bool) -> mk.nn.ModalityMlp:
    """Text is modality 0, the other one 1."""
    dim = weights["w.gamma_2"].numel()
    layer = mk.nn.ModalityMlp(
        dim, hidden, 2, gated=True, activation="gelu", bias=(False, True), hidden_norm=True, kernels=kernels, dtype=dtype
    )
    other = "audio" if "w.audio_ffn.3.bias" in weights else "image"
    names = {
        "w_gate": "0.wi_0.weight",
        "w_in": "0.wi_1.weight",
        "hidden_norm_weight": "2.weight",
        "hidden_norm_bias": "2.bias",
        "w_out": "3.weight",
        "b_out": "3.bias",
    }
    with torch.no_grad():
        for ours, theirs in names.items():
            for modality, branch in enumerate(("text", other)):
                if f"w.{branch}_ffn.{theirs}" in weights:
                    layer.get_parameter(ours)[modality] = weights[f"w.{branch}_ffn.{theirs}"].to(dtype)
    return layer


def layer(x: Tensor, bias: Tensor | None, w: Made, heads: int, text: int, mlp: mk.nn.ModalityMlp, kernels: bool) -> Tensor:
    """x [T, B, C] -> [T, B, C]: text tokens first."""
    norm = mk.layer_norm if kernels else norm_reference.layer_norm
    attention = attention_of(kernels)

    def normed(value: Tensor, name: str) -> Tensor:
        return norm(value, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def split(value: Tensor) -> Tensor:
        return value.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)

    a = normed(x, "self_attn_layer_norm")
    q = F.linear(a, w["self_attn.q_proj.weight"], w["self_attn.q_proj.bias"])
    k = F.linear(a, w["self_attn.k_proj.weight"])
    v = F.linear(a, w["self_attn.v_proj.weight"], w["self_attn.v_proj.bias"])
    o = attention(split(q), split(k), split(v), bias=bias)
    if "self_attn.c_attn" in w:
        o = o * w["self_attn.c_attn"][:, None, None]
    o = o.permute(2, 0, 1, 3).flatten(2)
    if "self_attn.ln.weight" in w:
        o = normed(o, "self_attn.ln")
    o = F.linear(o, w["self_attn.out_proj.weight"], w["self_attn.out_proj.bias"])
    if "attn_ln.weight" in w:
        o = normed(o, "attn_ln")
    x = x + w["gamma_1"] * o
    modality = (torch.arange(x.size(0)) >= text).long()[:, None].expand(x.shape[:2])
    return x + w["gamma_2"] * mlp(normed(x, "final_layer_norm"), modality)


@pytest.mark.parametrize("case", ["text_small", "image_odd", "vl_small", "vl_nobias", "vl_headscale", "al"])
def test_golden_one_peace_layer(case: str) -> None:
    tensors, params = golden(f"one_peace/layer_{case}")

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        weights = leaves_of(tensors, dtype, ("_ffn.",))
        mlp = feed_forward_of(tensors, params["ffn"], dtype, kernels)
        x = tensors["x"].to(dtype).requires_grad_()
        bias = tensors["bias"].to(dtype).requires_grad_() if "bias" in tensors else None
        out = layer(x, bias, weights, params["heads"], params["text_len"], mlp, kernels)
        out.backward(tensors["gout"].to(dtype))
        made: dict[str, Any] = {"out": out.detach(), "grad.x": x.grad}
        if bias is not None:
            made["grad.bias"] = bias.grad
        return made | {f"grad.w.{name}": value.grad for name, value in weights.items()} | ffn_gradients(tensors, mlp)

    judge(tensors, run)


def ffn_gradients(tensors: Made, mlp: mk.nn.ModalityMlp) -> Made:
    made = {}
    other = "audio" if "w.audio_ffn.3.bias" in tensors else "image"
    for modality, branch in enumerate(("text", other)):
        for theirs, parameter in (
            ("0.wi_0.weight", mlp.w_gate),
            ("0.wi_1.weight", mlp.w_in),
            ("2.weight", mlp.hidden_norm_weight),
            ("2.bias", mlp.hidden_norm_bias),
            ("3.weight", mlp.w_out),
            ("3.bias", mlp.b_out),
        ):
            if f"grad.w.{branch}_ffn.{theirs}" in tensors:
                made[f"grad.w.{branch}_ffn.{theirs}"] = parameter.grad[modality]
    return made
