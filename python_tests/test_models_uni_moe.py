"""Uni-MoE: where its experts are, how they are chosen, its weights by published names."""

from __future__ import annotations

import pytest
import torch
from small_models import Made, named, uni_moe
from torch import Tensor

import mmkernels as mk


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # nothing here is large enough for two


def test_uni_moe_experts_in_every_second_layer() -> None:
    model = uni_moe(depth=5)
    assert [type(layer.mlp) for layer in model.layers] == [mk.nn.MoE, mk.nn.GluMlp] * 2 + [mk.nn.MoE]
    logits, routings = model(named(50, 2, 7))
    assert logits.shape == (2, 7, 50) and len(routings) == 3 and routings[0].expert_ids.shape == (14, 2)
    torch.testing.assert_close(routings[0].weights.sum(1), torch.ones(14))
    sum(routing.losses.load_balance_first for routing in routings).backward()
    assert all(layer.mlp.router.grad.any() for layer in model.layers[::2])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(model.embed_tokens(named(50, 2, 7))).logits, logits)


@torch.no_grad()
def test_uni_moe_published_sampling_draws_the_second_expert() -> None:
    model, plain = uni_moe(num_experts=8, published_sampling=True).eval(), uni_moe(num_experts=8).eval()
    ids = named(50, 4, 40)

    def routed(seed: int) -> Tensor:
        return model(ids, generator=torch.Generator().manual_seed(seed)).routings[0].expert_ids

    first, second, wanted = routed(0), routed(1), plain(ids).routings[0].expert_ids
    assert torch.equal(first, routed(0)) and not torch.equal(first, second)
    assert all((drawn == wanted[:, :1]).any(1).all() for drawn in (first, second))  # the best one always
    assert not (first == wanted[:, 1:]).any(1).all()


@pytest.mark.parametrize("deepspeed", [False, True])
@pytest.mark.parametrize("lora", [0, 3])
def test_uni_moe_takes_published_weights(lora: int, deepspeed: bool) -> None:
    model = uni_moe(lora_rank=lora)
    theirs: Made = {"model.embed_tokens.weight": torch.randn(50, 24), "model.norm.weight": torch.randn(24)}
    theirs["lm_head.weight"] = torch.randn(50, 24)
    shapes = {"gate_proj": (40, 24), "up_proj": (40, 24), "down_proj": (24, 40)}
    for number in range(3):
        layer = f"model.layers.{number}"
        for name, rows in {"q_proj": 24, "k_proj": 12, "v_proj": 12, "o_proj": 24}.items():
            theirs[f"{layer}.self_attn.{name}.weight"] = torch.randn(rows, 24)
        for name in ("input_layernorm", "post_attention_layernorm"):
            theirs[f"{layer}.{name}.weight"] = torch.randn(24)
        if number == 1:
            theirs |= {f"{layer}.mlp.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
            continue
        router, experts = (
            ("deepspeed_moe.gate.wg", "deepspeed_moe.experts.deepspeed_experts") if deepspeed else ("gate", "experts")
        )
        theirs[f"{layer}.mlp.{router}.weight"] = torch.randn(4, 24)
        for expert in range(4):
            for name, (rows, columns) in shapes.items():
                place = f"{layer}.mlp.{experts}.{expert}.{name}"
                theirs[f"{place}.weight"] = torch.randn(rows, columns)
                if lora:
                    theirs[f"{place}_lora_A.weight"] = torch.randn(lora, columns)
                    theirs[f"{place}_lora_B.weight"] = torch.randn(rows, lora)
    assert model.load_pretrained(theirs) == []
    layers = model.layers
    assert torch.equal(layers[2].mlp.w_in[3], theirs[f"model.layers.2.mlp.{experts}.3.up_proj.weight"])
    assert torch.equal(layers[1].mlp.fc1_g.weight, theirs["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(layers[0].mlp.router[0], theirs[f"model.layers.0.mlp.{router}.weight"])
    if lora:
        assert torch.equal(layers[0].mlp.lora_up_out[1], theirs[f"model.layers.0.mlp.{experts}.1.down_proj_lora_B.weight"])
    plain = uni_moe()
    left = plain.load_pretrained({**theirs, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)})
    assert len(left) == 1 + (2 * 4 * 6 if lora else 0) and all("lora" in name or "inv_freq" in name for name in left)


@torch.no_grad()
def test_uni_moe_documents_in_one_row() -> None:
    model = uni_moe().eval()
    first, second = named(50, 2, 5), named(50, 2, 6, seed=8)
    segments = torch.tensor([0] * 5 + [1] * 6)[None]
    positions = torch.cat((torch.arange(5), torch.arange(6)))
    for kernels in (True, False):
        model.kernels = kernels
        for ids in (segments, segments.expand(2, -1)):
            out = model(torch.cat((first, second), 1), positions=positions, segment_ids=ids).logits
            torch.testing.assert_close(out[:, :5], model(first).logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out[:, 5:], model(second).logits, rtol=1e-4, atol=1e-5)
