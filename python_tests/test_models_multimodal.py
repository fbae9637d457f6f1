"""Models of multimodal systems: kernels on and off, compiled, state, weights by published names, errors, sizes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import (
    Made,
    Small,
    encoded,
    images,
    imp,
    m3vit,
    matformer,
    mot,
    named,
    one_peace,
    skillnet,
    tokens,
    uni_moe,
    words,
)
from support import assert_same_bits, assert_within_rule
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.models.matformer import MatFormerBlock
from mmkernels.models.mot import MoT, MoTBlock, hidden_channels


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


LLAMA = {"linear", "attention", "norm", "qk_norm_rope"}
VIT = {"linear", "mlp", "attention", "norm"}

SMALL: dict[str, Small] = {
    "m3vit": Small(m3vit, lambda b: (images(b), 2), VIT | {"route", "moe_mlp"}, lambda made: made.tokens),
    "m3vit_conditioned": Small(
        lambda **options: m3vit(gate="conditioned", **options),
        lambda b: (images(b), 1),
        VIT | {"route", "moe_mlp"},
        lambda made: made.tokens,
    ),
    "mot": Small(
        mot,
        lambda b: (named(50, b, 13), named(3, b, 13)),
        LLAMA | {"grouped_linear", "moe_mlp"},
    ),
    "one_peace_vl": Small(
        one_peace,
        lambda b: (words(b), tokens(b, 3, 48, 48)),
        {"linear", "attention", "norm", "grouped_linear"},
        lambda made: torch.cat(list(made.values()), 1),
    ),
    "one_peace_val": Small(
        lambda **options: one_peace(head_scale=True, post_norm=True, sub_norm=False, layer_scale=None, **options),
        lambda b: (words(b), tokens(b, 3, 48, 48), tokens(b, 5, 24)),
        {"linear", "attention", "norm", "grouped_linear"},
        lambda made: torch.cat(list(made.values()), 1),
    ),
    "imp_text": Small(imp, lambda b: (named(50, b, 13),), VIT | {"expert_choice", "moe_mlp"}, lambda made: made.text),
    "imp_video": Small(
        imp, lambda b: (None, tokens(b, 3, 8, 32, 48)), VIT | {"expert_choice", "moe_mlp"}, lambda made: made.video
    ),
    "skillnet": Small(skillnet, lambda b: (named(50, b, 13), ["general", "video"]), VIT),
    "skillnet_sum": Small(
        lambda **options: skillnet(reduce="sum", **options),
        lambda b: (tokens(b, 13, 24), ["code"], torch.arange(13).expand(b, -1) < 11),
        VIT,
    ),
    "uni_moe": Small(uni_moe, lambda b: (named(50, b, 13),), LLAMA | {"mlp", "route", "moe_mlp"}, lambda made: made.logits),
    "uni_moe_lora": Small(
        lambda **options: uni_moe(num_experts=8, lora_rank=3, lora_alpha=6, **options),
        lambda b: (tokens(b, 13, 24),),
        LLAMA | {"mlp", "route", "moe_mlp"},
        lambda made: made.logits,
    ),
    "matformer": Small(matformer, lambda b: (named(50, b, 13), [0, 2, 3]), LLAMA | {"mlp"}),
    "matformer_plain": Small(
        lambda **options: matformer(gated=False, activation="gelu", tied=True, **options),
        lambda b: (named(50, b, 13), 1),
        LLAMA | {"mlp"},
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_kernels_and_plain_torch_agree(name: str) -> None:
    """Outputs and gradients by the rule, the ops that ran, and batch 1."""
    small = SMALL[name]
    inputs = small.inputs(3)
    model = small.make()
    assert model.kernels

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        module = copy.deepcopy(model).to(dtype)
        module.kernels = kernels
        given = [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs]
        out = small.out(module(*given))
        out.backward(tokens(*out.shape, dtype=dtype))
        made = {f"grad.{n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        return made | {"out": out.detach()}

    exact, plain = run(torch.float64, False), run(torch.float32, False)
    mk.last_kernels(clear=True)
    ours = run(torch.float32, True)
    ran = mk.last_kernels()
    assert small.ran <= {op for op, _ in ran} and all(kernel.startswith("cpu/") for _, kernel in ran)
    for key, oracle in exact.items():
        # A model is deep: its plain formula's own error is what a sum in another order may add once more.
        assert_within_rule(ours[key], plain[key], oracle, key, extra=2e-6 * float(oracle.abs().max()))
    model.kernels = False
    mk.last_kernels(clear=True)
    model(*small.inputs(1))
    assert {op for op, _ in mk.last_kernels()} <= {"expert_order"}
    model.kernels = True
    with torch.no_grad():
        one, many = small.out(model.eval()(*small.inputs(1))), small.out(model(*small.inputs(1)))
    assert_same_bits(one, many, "twice")


@pytest.mark.parametrize("name", SMALL)
def test_compiled(name: str) -> None:
    small = SMALL[name]
    model, inputs = small.make().eval(), small.inputs(2)
    with torch.no_grad():
        wanted = small.out(model(*inputs))
        made = small.out(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs))
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_seed_and_state(name: str) -> None:
    small = SMALL[name]
    first, again, other = small.make(seed=1), small.make(seed=1), small.make(seed=2)
    state = first.state_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    assert other.load_pretrained({**state, "head.weight": torch.zeros(1)}) == ["head.weight"]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    del state[next(name for name in reversed(state) if name != "lm_head.weight")]
    with pytest.raises(ValueError, match=r"^state_dict: expected .* in it too"):
        other.load_pretrained(state)


NONE = torch.zeros(0, 7, dtype=torch.int64)
PADDING = torch.ones(2, 7, dtype=torch.int64)
# What is small, empty, missing or hidden: (model, inputs, shape of what is compared).
EDGES: dict[str, tuple[str, tuple[Any, ...], tuple[int, ...]]] = {
    "uni_moe no rows": ("uni_moe", (NONE,), (0, 7, 50)),
    "uni_moe no tokens": ("uni_moe", (tokens(2, 0, 24),), (2, 0, 50)),
    "uni_moe one token": ("uni_moe_lora", (named(50, 1, 1),), (1, 1, 50)),
    "one_peace no rows": ("one_peace_vl", (NONE, tokens(0, 3, 48, 48)), (0, 18, 24)),
    "one_peace all padding": ("one_peace_vl", (PADDING,), (2, 8, 24)),
    "one_peace padding beside": ("one_peace_val", (PADDING, tokens(2, 3, 48, 48), tokens(2, 5, 24)), (2, 23, 24)),
    "one_peace empty audio": ("one_peace_val", (words(2), None, tokens(2, 0, 24)), (2, 8, 24)),
    "one_peace audio alone": ("one_peace_val", (None, None, tokens(1, 3, 24)), (1, 3, 24)),
    "imp no rows": ("imp_text", (NONE,), (0, 7, 24)),
    "imp no videos": ("imp_video", (None, tokens(0, 3, 4, 16, 48)), (0, 3, 24)),
    "imp one word": ("imp_text", (named(50, 1, 1),), (1, 1, 24)),
    "imp one patch": ("imp_video", (None, tokens(1, 3, 4, 16, 16)), (1, 1, 24)),
    "imp ties": ("imp_text", (PADDING,), (2, 7, 24)),
    "skillnet no rows": ("skillnet", (NONE, ["text"]), (0, 7, 24)),
    "skillnet no tokens": ("skillnet_sum", (tokens(2, 0, 24), ["text", "code"]), (2, 0, 24)),
    "skillnet all hidden": ("skillnet", (PADDING, ["text"], PADDING < 1), (2, 7, 24)),
    "skillnet a row hidden": ("skillnet_sum", (PADDING, ["text"], torch.tensor([[True], [False]]).expand(2, 7)), (2, 7, 24)),
}


@pytest.mark.parametrize("edge", EDGES)
@torch.no_grad()
def test_edges(edge: str) -> None:
    name, inputs, shape = EDGES[edge]
    small = SMALL[name]
    model = small.make().eval()
    ours = small.out(model(*inputs))
    model.kernels = False
    plain = small.out(model(*inputs))
    assert ours.shape == plain.shape == shape and not ours.isnan().any()
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# Parameters without gradients: of modalities that are not there, of embeddings where tokens come in embedded, and the first
# factors of low-rank additions, whose second ones begin as 0.
WITHOUT_GRADIENTS = {
    "one_peace_vl": {"encoder.layer_norms.audio.weight", "encoder.layer_norms.audio.bias"},
    "one_peace_val": set(),
    "imp_text": {"patch_embed.weight", "time_pos_embed", "row_pos_embed", "column_pos_embed"},
    "imp_video": {"text_embed.weight", "text_pos_embed"},
    "skillnet": set(),
    "skillnet_sum": {"embed_tokens.weight"},
    "uni_moe": set(),
    "uni_moe_lora": {"embed_tokens.weight"}
    | {f"layers.{layer}.mlp.lora_down_{name}" for layer in (0, 2) for name in ("in", "out", "gate")},
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    small = SMALL[name]
    model = small.make()
    small.out(model(*small.inputs(2))).square().sum().backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert found == WITHOUT_GRADIENTS[name]


@pytest.mark.parametrize("name", SMALL)
def test_copies(name: str) -> None:
    """Copies and pickles have its outputs, and kernels of their own."""
    small = SMALL[name]
    model, inputs = small.make().eval(), small.inputs(2)
    with torch.no_grad():
        wanted = small.out(model(*inputs))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_bits(small.out(copied(*inputs)), wanted, "copy")
            copied.kernels = False
            assert model.kernels
            torch.testing.assert_close(small.out(copied(*inputs)), wanted, rtol=1e-4, atol=1e-5)
            copied.kernels = True
            assert_same_bits(small.out(copied(*inputs)), wanted, "kernels on again")


@pytest.mark.parametrize("name", ["uni_moe", "uni_moe_lora", "one_peace_val", "imp_text", "skillnet"])
def test_compiled_training(name: str) -> None:
    """Outputs and gradients, forward and backward each one graph."""
    small = SMALL[name]
    model, inputs = small.make(), small.inputs(2)

    def run(called: Callable[..., Any]) -> Made:
        model.zero_grad()
        out = small.out(called(*inputs))
        out.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"out": out.detach()}

    wanted = run(model)
    made = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


# --- M3ViT ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_m3vit_streams_two_experts(tmp_path: Path) -> None:
    """From a file of the resident model's weights: its bits, and the memory of two experts whatever the blocks and tasks."""
    resident = m3vit(depth=6, kernels=True).eval()
    path = tmp_path / "m3vit.safetensors"
    save_file(resident.state_dict(), path)
    for source in (path, resident.state_dict()):
        streaming = m3vit(depth=6, schedule="streaming", experts=source).eval()
        assert not any(name.rpartition(".")[2].startswith("w_") for name in streaming.state_dict())
        assert len(streaming.load_pretrained(resident.state_dict())) == 3 * 4
        one_expert = (2 * 24 * 24 + 24 + 24) * 4
        assert streaming.expert_buffer_bytes == 0 and resident.expert_buffer_bytes == 0
        for task in range(3):
            assert_same_bits(streaming(images(2), task).tokens, resident(images(2), task).tokens, f"task {task}")
            assert streaming.expert_buffer_bytes == 2 * one_expert
        copied = copy.deepcopy(streaming)
        assert copied.expert_buffer_bytes == 0
        assert_same_bits(copied(images(1)).tokens, resident(images(1)).tokens, "copy")
        assert copied.expert_buffer_bytes == 2 * one_expert
    with pytest.raises(ValueError, match=r"^other: expected experts of the shapes"):
        streaming.blocks[1].mlp.stream.share_buffers(
            m3vit(expert_ratio=2, schedule="streaming", experts=m3vit(expert_ratio=2).state_dict()).blocks[1].mlp.stream
        )


def test_m3vit_tasks_differ_by_their_gates_alone() -> None:
    model = m3vit().eval()
    x = images(2)
    first, second = model(x, 0), model(x, 1)
    assert len(first.routings) == 2 and first.routings[0].expert_ids.shape == (2 * 16, 2)
    assert not torch.equal(first.tokens, second.tokens)
    losses = [routing.losses for routing in first.routings]
    sum(loss.importance + loss.load for loss in losses).backward()
    assert model.blocks[3].mlp.router.grad[0].any() and not model.blocks[3].mlp.router.grad[1].any()
    with torch.no_grad():
        for block in model.blocks[1::2]:
            block.mlp.router[1] = block.mlp.router[0]
    assert_same_bits(model(x, 1).tokens, model(x, 0).tokens, "equal gates")
    assert first.features(3).shape == (2, 24, 3, 5)
    assert_same_bits(first.features(3)[0, :, 1, 2], first.tokens[0, 1 + 5 + 2], "a patch")


@pytest.mark.parametrize("gate", ["multi", "conditioned"])
def test_m3vit_takes_published_weights(gate: str) -> None:
    model = m3vit(gate=gate)
    theirs: Made = {}
    for name, value in model.state_dict().items():
        value = torch.randn_like(value)
        if name.endswith("mlp.router"):
            prefix = name.replace("router", "gate")
            if gate == "multi":
                theirs |= {f"{prefix}.{task}.w_gate": weight.T for task, weight in enumerate(value)}
            else:
                theirs[f"{prefix}.w_gate"] = value[0].T
            continue
        for ours, published_name in (("w_in", "htoh4.weight"), ("b_in", "htoh4.bias"), ("w_out", "h4toh.weight")):
            name = name.replace(f"mlp.{ours}", f"mlp.experts.{published_name}")
        name = name.replace("mlp.b_out", "mlp.experts.h4toh.bias")
        name = name.replace("task_feature.mlp.", "gate_task_represent.").replace("task_feature", "gate_task_represent")
        theirs[name] = value
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    assert shapes["blocks.1.mlp.experts.htoh4.weight"] == (6, 24, 24)
    assert shapes["blocks.3.mlp.gate.2.w_gate" if gate == "multi" else "blocks.3.mlp.gate.w_gate"] == (
        (24, 6) if gate == "multi" else (34, 6)
    )
    assert model.load_pretrained(theirs) == []
    if gate == "multi":
        assert torch.equal(model.blocks[3].mlp.router[2].T, theirs["blocks.3.mlp.gate.2.w_gate"])
        del theirs["blocks.1.mlp.gate.1.w_gate"]
        with pytest.raises(ValueError, match=r"^state_dict: expected number 1 of what becomes blocks\.1\.mlp\.router in"):
            model.load_pretrained(theirs)


# --- Mixture-of-Transformers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernels", [True, False])
@torch.no_grad()
def test_mot_missing_modalities_padding_and_documents(kernels: bool) -> None:
    model = mot(kernels=kernels).eval()
    x, ids = tokens(2, 9, 24), named(3, 2, 9)
    whole = model(x, ids)
    assert whole.shape == (2, 9, 50)
    torch.testing.assert_close(model(x, ids)[:, :5], model(x[:, :5], ids[:, :5]))  # causal
    # A modality that is not there has no part in it.
    zeros = torch.zeros_like(ids)
    alone = mot(num_modalities=1, kernels=kernels).eval()
    state = {
        name: value[:1] if value.dim() > 1 and value.size(0) == 3 else value for name, value in model.state_dict().items()
    }
    alone.load_state_dict(state)
    torch.testing.assert_close(model(x, zeros), alone(x, zeros))
    # Padding behind, and another document in front, in segments of their own, change nothing for the others.
    joined, of_joined = torch.cat((x.flip(1), x, x), 1), torch.cat((ids.flip(1), ids, torch.full_like(ids, -1)), 1)
    segments = torch.tensor([0, 1, 2]).repeat_interleave(9).expand(2, -1)
    positions = torch.arange(9).repeat(3)
    out = model(joined, of_joined, segment_ids=segments, positions=positions)
    torch.testing.assert_close(out[:, 9:18], whole, rtol=1e-4, atol=1e-5)
    assert not out[:, 18:].isnan().any()
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(model(x, ids, mask=seen), whole)
    assert model(x[:, :0], ids[:, :0]).shape == (2, 0, 50)


def test_mot_positions() -> None:
    """Only differences of positions count, and without a rotary embedding none."""
    x, ids = tokens(1, 7, 24), named(3, 1, 7)
    model = mot(depth=1).double()
    x = x.double()
    torch.testing.assert_close(model(x, ids), model(x, ids, positions=torch.arange(7) + 100))
    assert not torch.allclose(model(x, ids), model(x, ids, positions=torch.arange(7) * 2))
    plain = mot(depth=1, rope_base=None).double()
    assert torch.equal(plain(x, ids), plain(x, ids, positions=torch.arange(7) * 2))


def test_mot_takes_published_weights() -> None:
    model = mot()
    theirs: Made = {}
    names = {"w_gate": ".{}.w1", "w_out": ".{}.w2", "w_in": ".{}.w3", "out_norm_weight": "_ffn_norm.{}"}
    for name, value in model.state_dict().items():
        parent, _, kind = name.rpartition(".")
        if value.dim() == 1 or value.size(0) != 3 or name == "norm.weight":
            theirs[name] = torch.randn_like(value)
            continue
        for modality, weight in enumerate(torch.randn_like(value)):
            if kind in names:
                theirs[f"{parent}.local_experts{names[kind].format(modality)}.weight"] = weight
                continue
            parent_name, _, layer = parent.rpartition(".")
            layer = {"q_norm": "q_normalization", "k_norm": "k_normalization", "norm": "attention_norm"}.get(layer, layer)
            theirs[f"{parent_name}.local_experts_{layer}.{modality}.weight"] = weight
    assert theirs["layers.1.feed_forward.local_experts.2.w2.weight"].shape == (24, 40)
    assert theirs["layers.0.attention.local_experts_k_normalization.1.weight"].shape == (12,)
    assert model.load_pretrained(theirs) == []
    assert torch.equal(model.layers[1].feed_forward.w_gate[2], theirs["layers.1.feed_forward.local_experts.2.w1.weight"])
    assert torch.equal(model.layers[0].attention.wo.weight[1], theirs["layers.0.attention.local_experts_wo.1.weight"])


def test_mot_sizes_are_those_of_the_dense_models() -> None:
    """The paper names a size by the dense model's parameters."""
    for size, millions in {"37m": 37, "94m": 94, "443m": 443, "1_5b": 1502, "7b": 7013}.items():
        with torch.device("meta"):
            dense = mk.models.create_model(f"mot_{size}", num_modalities=1)
        assert round(sum(parameter.numel() for parameter in dense.parameters()) / 1e6) == pytest.approx(millions, abs=1)
    assert hidden_channels(4096) == 11008


# --- MatFormer --------------------------------------------------------------------------------------------------------
def test_matformer_is_the_model_of_its_first_units() -> None:
    """Mix'n'Match: the logits of a model that has only those units; no gradient reaches the others."""
    model = matformer()
    ids = named(50, 2, 9)
    widths = [10, 40, 80]
    assert model.widths([0, 2, 3]) == widths and model.widths(1) == [20] * 3 and model.widths() == [80] * 3
    out = model(ids, [0, 2, 3])
    out.sum().backward()
    for layer, width in zip(model.layers, widths, strict=True):
        small = MatFormerBlock(24, 4, width, fractions=[1.0], num_kv_heads=2)
        mine = layer.state_dict()
        cut = {"mlp.w_in": mine["mlp.w_in"][:width], "mlp.w_gate": mine["mlp.w_gate"][:width]}
        small.load_state_dict(mine | cut | {"mlp.w_out": mine["mlp.w_out"][:, :width]})
        x = tokens(2, 9, 24)
        torch.testing.assert_close(layer(x, None, width), small(x))
        assert not layer.mlp.w_in.grad[width:].any() and not layer.mlp.w_out.grad[:, width:].any()
        assert layer.mlp.w_gate.grad[:width].any()
    assert not torch.equal(model(ids, 0), model(ids, 3))
    assert_same_bits(model(ids), model(ids, 3), "the widest")
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == whole
    assert model.num_parameters([0, 2, 3]) == whole - 3 * 24 * (70 + 40)


@pytest.mark.parametrize("tied", [True, False])
def test_matformer_takes_llamas_weights(tied: bool) -> None:
    model = matformer(tied=tied)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    names = {"mlp.w_in": "mlp.up_proj.weight", "mlp.w_gate": "mlp.gate_proj.weight", "mlp.w_out": "mlp.down_proj.weight"}
    theirs: Made = {}
    for name, value in state.items():
        for ours, published_name in names.items():
            name = name.replace(ours, published_name)
        theirs[name if name == "lm_head.weight" else f"model.{name}"] = value
    assert theirs["model.layers.2.self_attn.k_proj.weight"].shape == (12, 24)
    assert theirs["model.layers.0.mlp.down_proj.weight"].shape == (24, 80)
    if tied:
        del theirs["lm_head.weight"]
    theirs["model.rotary_emb.inv_freq"] = torch.zeros(3)
    assert model.load_pretrained(theirs) == ["rotary_emb.inv_freq"]
    assert torch.equal(model.layers[1].mlp.w_gate, theirs["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(model.lm_head.weight, model.embed_tokens.weight) == tied
    if not tied:
        del theirs["lm_head.weight"]
        with pytest.raises(ValueError, match=r"^state_dict: expected lm_head\.weight in it too"):
            model.load_pretrained(theirs)


@torch.no_grad()
def test_matformer_documents_in_one_row() -> None:
    model = matformer().eval()
    first, second = named(50, 2, 5), named(50, 2, 6, seed=8)
    joined = torch.cat((first, second), 1)
    segments = torch.tensor([0] * 5 + [1] * 6).expand(2, -1)
    positions = torch.cat((torch.arange(5), torch.arange(6)))
    for kernels in (True, False):
        model.kernels = kernels
        out = model(joined, positions=positions, segment_ids=segments)
        torch.testing.assert_close(out[:, :5], model(first), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[:, 5:], model(second), rtol=1e-4, atol=1e-5)


def test_matformer_sizes_of_the_paper() -> None:
    for size, millions in {"78m": 78, "180m": 181, "310m": 310, "463m": 464, "850m": 846}.items():
        with torch.device("meta"):
            model = mk.models.create_model(f"matformer_{size}")
        assert round(model.num_parameters() / 1e6) == millions


# --- errors -----------------------------------------------------------------------------------------------------------
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: m3vit()(tokens(1, 3, 24, 24)), ValueError, r"images: expected \[B, 3, 24, 40\], got \(1, 3, 24, 24\)"),
    (lambda: m3vit()(images(1), 3), ValueError, "task: expected 0 to 2, got 3"),
    (lambda: m3vit(gate="conditioned")(images(1), 3), ValueError, "task: expected 0 to 2, got 3"),
    (lambda: m3vit()(images(1), 1.0), TypeError, "task: expected an int"),
    (lambda: m3vit(gate="both"), ValueError, "gate: expected one of multi, conditioned, got 'both'"),
    (lambda: m3vit(image_size=20), ValueError, "image_size: expected multiples of patch_size=8, got 20"),
    (lambda: mot()(named(51, 1, 300), named(3, 1, 300)), ValueError, "tokens: expected 0 to 49, got 50"),
    (lambda: mot()(named(50, 1, 9).int(), named(3, 1, 9)), TypeError, r"tokens: expected torch.int64, got torch.int32"),
    (lambda: mot()(named(50, 9), named(3, 9)), ValueError, r"tokens: expected \[B, L\] with L >= 1, got \(9,\)"),
    (lambda: mot()(tokens(1, 9, 23), named(3, 1, 9)), ValueError, r"tokens: expected \[B, N, 24\], got \(1, 9, 23\)"),
    (lambda: mot()("text", named(3, 1, 9)), TypeError, r"tokens: expected a tensor \[B, L\], got str"),
    (lambda: mot()(named(50, 1, 99), named(4, 1, 99)), ValueError, "modality_ids: expected -1 to 2, got 3"),
    (lambda: mot(kernels=False)(named(50, 1, 9), named(3, 1, 9) - 2), ValueError, "modality_ids: expected -1 to 2, got -2"),
    (lambda: mot()(named(50, 1, 9), named(3, 1, 8)), ValueError, r"modality_ids: expected the leading shape of x, \(1, 9\)"),
    (
        lambda: mot()(named(50, 1, 9), named(3, 1, 9).int()),
        TypeError,
        r"modality_ids: expected torch.int64, got torch.int32",
    ),
    (lambda: mot()(named(50, 1, 9), None), TypeError, r"modality_ids: expected a tensor of the leading shape of x"),
    (lambda: MoTBlock(10, 3, 4, 2), ValueError, "num_heads: expected a divisor of dim, 10, got 3"),
    (
        lambda: MoT(9, 3, depth=1, vocab_size=3)(named(3, 1, 2), named(2, 1, 2)),
        ValueError,
        "channels: expected an even number",
    ),
    (lambda: mot()(tokens(2, 9, 24), named(3, 2, 9), positions=torch.arange(8)), ValueError, r"positions: expected \(9,\)"),
    (lambda: matformer()(named(51, 1, 300)), ValueError, "ids: expected 0 to 49, got 50"),
    (lambda: matformer()(named(50, 1, 0)), ValueError, r"ids: expected \[B, L\] with L >= 1, got \(1, 0\)"),
    (lambda: matformer()(tokens(1, 9)), TypeError, "ids: expected torch.int64, got torch.float32"),
    (lambda: matformer()(named(50, 1, 9), 4), ValueError, "granularity: expected 0 to 3, got 4"),
    (lambda: matformer()(named(50, 1, 9), [0, 1]), ValueError, "granularity: expected one number or one for each of the 3"),
    (lambda: matformer()(named(50, 1, 9), [0, 1, 2.0]), TypeError, "granularity: expected an int"),
    (lambda: matformer(fractions=[0.5, 2]), ValueError, "widths: expected at most hidden, 80, got 160"),
    (lambda: uni_moe()(named(51, 1, 300)), ValueError, "tokens: expected 0 to 49, got 50"),
    (lambda: uni_moe()(tokens(2, 9, 25)), ValueError, r"tokens: expected \[B, N, 24\], got \(2, 9, 25\)"),
    (lambda: uni_moe(top_k=3, published_sampling=True), ValueError, "published_sampling: expected False with top_k 3"),
    (lambda: uni_moe(top_k=5), ValueError, "top_k: expected at most num_experts, 4, got 5"),
    (lambda: one_peace()(), ValueError, "tokens: expected a mapping of at least one of text, image, audio, got {}"),
    (lambda: one_peace(modalities=["image"])(words(2)), ValueError, "text: expected None, the model has image"),
    (lambda: one_peace()(words(2) + 43), ValueError, "text: expected 0 to 49, got"),
    (lambda: one_peace()(named(50, 1, 21)), ValueError, "text: expected at most 20 words, got 21"),
    (lambda: one_peace()(image=tokens(1, 3, 48, 32)), ValueError, r"image: expected \[B, 3, 48, 48\], got \(1, 3, 48, 32\)"),
    (lambda: one_peace()(words(2), tokens(1, 3, 48, 48)), ValueError, r"tokens\['image'\]: expected a batch of 2, got 1"),
    (lambda: one_peace()(audio=tokens(1, 3, 23)), ValueError, r"tokens\['audio'\]: expected \[B, N, 24\], got \(1, 3, 23\)"),
    (lambda: one_peace(modalities=["video"]), ValueError, "modalities: expected different ones of text, image, audio, got"),
    (lambda: one_peace(image_size=40), ValueError, "image_size: expected a multiple of 16, got 40"),
    (
        lambda: encoded(tokens={"audio": tokens(2, 5, 24)}),
        ValueError,
        "tokens: expected modalities of text, image, got text",
    ),
    (
        lambda: encoded(biases={"text": tokens(1, 3, 5, 4)}),
        ValueError,
        r"biases\['text'\]: expected \[1 or 2, 3, 5, 5\]",
    ),
    (lambda: encoded(visible={"text": tokens(2, 5)}), ValueError, r"visible\['text'\]: expected bool \(2, 5\), got"),
    (lambda: encoded(biases={"image": tokens(1, 3, 5, 5)}), ValueError, "biases: expected modalities of text, got image"),
    (lambda: imp()(), ValueError, "text: expected it or video, got neither"),
    (lambda: imp()(named(50, 1, 21)), ValueError, "text: expected at most 20 words, got 21"),
    (lambda: imp()(named(51, 1, 300)), ValueError, "text: expected 0 to 49, got 50"),
    (
        lambda: imp()(None, tokens(1, 3, 6, 32, 48)),
        ValueError,
        r"video: expected \[B, 3, frames, height, width\] of",
    ),
    (
        lambda: imp()(None, tokens(1, 3, 4, 32, 64)),
        ValueError,
        r"video: expected \[B, 3, frames, height, width\] of",
    ),
    (lambda: imp(group_size=5)(named(50, 1, 13)), ValueError, "group_size: expected a divisor of the 13 tokens"),
    (lambda: imp(moe_depth=4), ValueError, "moe_depth: expected 0 to 3, got 4"),
    (lambda: imp(max_frames=6), ValueError, "max_frames: expected a multiple of 4, got 6"),
    (lambda: skillnet()(named(50, 1, 9), []), ValueError, r"skills: expected different ones of general, .*, got \[\]"),
    (lambda: skillnet()(named(50, 1, 9), "text"), ValueError, "skills: expected different ones of general, .*, got 'text'"),
    (lambda: skillnet()(named(50, 1, 9), ["smell"]), ValueError, r"skills: expected different ones of .*, got \['smell'\]"),
    (lambda: skillnet()(named(50, 1, 21), ["text"]), ValueError, "tokens: expected at most 20, got 21"),
    (lambda: skillnet()(named(50, 1, 9), ["text"], named(2, 1, 9)), ValueError, r"visible: expected bool \(1, 9\), got"),
    (lambda: skillnet(skills=["a", "a"]), ValueError, r"skills: expected different names, got \['a', 'a'\]"),
    (lambda: skillnet(skills="ab"), ValueError, "skills: expected different names, got 'ab'"),
    (lambda: skillnet()(named(50, 1, 9), 5), ValueError, "skills: expected different ones of general, .*, got 5"),
    (lambda: skillnet()(named(50, 1, 9), [["text"]]), ValueError, "skills: expected different ones of general, .*, got"),
    (lambda: skillnet()(named(50, 1, 9), ["text"], [True] * 9), ValueError, r"visible: expected bool \(1, 9\), got list"),
    (
        lambda: uni_moe()(named(50, 1, 9), positions=[0] * 9),
        TypeError,
        r"positions: expected a tensor \[L\] or \[B, L\], got",
    ),
    (
        lambda: uni_moe(kernels=False)(named(50, 2, 9), segment_ids=named(2, 2, 8)),
        ValueError,
        r"segment_ids: expected \(2, 9\), got \(2, 8\)",
    ),
    (
        lambda: uni_moe(kernels=False)(named(50, 1, 9), segment_ids=tokens(1, 9)),
        TypeError,
        "segment_ids: expected torch.int64 or torch.int32",
    ),
    (lambda: one_peace()(image=[0]), TypeError, r"image: expected floats \[B, 3, 48, 48\], got list"),
    (
        lambda: one_peace()(image=named(9, 1, 3, 48, 48)),
        TypeError,
        r"image: expected floats \[B, 3, 48, 48\], got torch.int64",
    ),
    (lambda: one_peace(image_size="48"), TypeError, "image_size: expected an int, got str"),
    (lambda: one_peace(max_length=1024), ValueError, "max_length: expected at most 1023, got 1024"),
    (lambda: one_peace(text_buckets=1), ValueError, "text_buckets: expected at least 2"),
    (lambda: encoded(tokens={"text": None}), TypeError, r"tokens\['text'\]: expected floats \[B, N, 24\], got NoneType"),
    (lambda: encoded(biases={"text": 1}), TypeError, r"biases\['text'\]: expected floats \[1 or 2, 3, 5, 5\], got int"),
    (lambda: encoded(biases={"text": named(9, 1, 3, 5, 5)}), TypeError, r"biases\['text'\]: expected floats"),
    (lambda: encoded(visible={"text": None}), ValueError, r"visible\['text'\]: expected bool \(2, 5\), got NoneType"),
    (lambda: imp()(video=[0]), TypeError, r"video: expected floats \[B, 3, frames, height, width\], got list"),
    (lambda: imp()(video=named(9, 1, 3, 4, 16, 16)), TypeError, r"video: expected floats .* got torch.int64"),
    (lambda: imp(max_frames="8"), TypeError, "max_frames: expected an int, got str"),
    (lambda: imp(group_size=0), ValueError, "group_size: expected at least 1"),
    (lambda: imp(group_size=5, kernels=False)(named(50, 1, 13)), ValueError, "group_size: expected a divisor of the 13"),
    (lambda: imp(capacity_factor=-1.0), ValueError, "capacity_factor: expected a number of at least 0, got -1.0"),
    (lambda: m3vit(schedule="streaming"), ValueError, "experts: expected a file or tensors with schedule 'streaming'"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


# --- the published sizes ----------------------------------------------------------------------------------------------
# Parameters in millions.
SIZES = {
    "m3vit_small": 43.5,
    "m3vit_small_nyud": 43.4,
    "m3vit_block": 5.4,
    "mot_37m": 40.4,
    "mot_94m": 121.7,
    "mot_443m": 750.9,
    "mot_1_5b": 2734.9,
    "mot_7b": 13489.4,
    "mot_block": 25.7,
    "uni_moe_7b": 13231.5,
    "uni_moe_7b_8e": 21935.2,
    "uni_moe_block": 608.2,
    "one_peace": 3858.6,
    "one_peace_encoder": 3777.2,
    "one_peace_vision": 1514.6,
    "one_peace_layer": 94.4,
    "imp_base": 112.1,
    "imp_large": 338.3,
    "imp_moe_base": 536.9,
    "imp_moe_large": 1093.3,
    "imp_moe_block": 77.9,
    "skillnet_base": 385.0,
    "skillnet_block": 30.7,
    "matformer_78m": 78.1,
    "matformer_180m": 181.4,
    "matformer_310m": 309.9,
    "matformer_463m": 463.5,
    "matformer_850m": 846.2,
    "matformer_block": 37.8,
}


def test_every_model_of_these_systems_has_a_size() -> None:
    systems = ("m3vit", "mot", "uni_moe", "one_peace", "imp", "skillnet", "matformer")
    assert {name for name in mk.models.list_models() if name.startswith(systems)} == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    """On the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = mk.models.create_model(name)
    assert isinstance(model, nn.Module) and model.kernels
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.06)
