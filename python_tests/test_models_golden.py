"""Published blocks and layers by golden vectors, through the models' blocks and by their published names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import assert_same_bits, golden, judge
from torch import Tensor

from mmkernels.models.base import Model
from mmkernels.models.imp import ImpBlock
from mmkernels.models.m3vit import M3ViTBlock
from mmkernels.models.matformer import MatFormerBlock
from mmkernels.models.mot import MoTAttention, MoTBlock
from mmkernels.models.one_peace import OnePeaceLayer, image_buckets, text_buckets
from mmkernels.models.uni_moe import UniMoEBlock

Made = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # nothing here is large enough for two


def published(tensors: Made, prefix: str) -> Made:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def judge_block(tensors: Made, make: Callable[[], Model], call: Callable[[Model, Tensor], Tensor], **more: Tensor) -> None:
    """Output and gradients of the block, loaded with the published weights, against the published ones by the block's names.

    `more` are other inputs of the call that have gradients; the call takes them by name."""
    weights = published(tensors, "w.")
    # The published code leaves out gradients of weights that no token used.
    gradients = {name: torch.zeros_like(value) for name, value in weights.items()} | published(tensors, "grad.w.")
    expected = {f"grad.w.{name}": value for name, value in make().own_names(gradients).items()}
    expected |= {name: tensors[name] for name in ("out", "grad.x", *(f"grad.{name}" for name in more))}

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        block = make().to(dtype)
        block.kernels = kernels
        assert block.load_pretrained(weights) == []
        x = tensors["x"].to(dtype).requires_grad_()
        others = {name: value.to(dtype).requires_grad_() for name, value in more.items()}
        out = call(block, x, **others)
        out.backward(tensors["gout"].to(dtype))
        made = {"out": out.detach(), "grad.x": x.grad} | {f"grad.{name}": value.grad for name, value in others.items()}
        for name, parameter in block.named_parameters():
            made[f"grad.w.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return made

    judge(expected, run)


@pytest.mark.parametrize("case", ["block_small", "block_odd"])
def test_golden_m3vit_block(case: str) -> None:
    tensors, params = golden(f"m3vit/{case}")
    hidden, task = tensors["w.mlp.experts.htoh4.weight"].size(1), params["task_id"]

    def make() -> Model:
        return M3ViTBlock(
            params["d"], params["heads"], hidden, num_experts=params["E"], top_k=params["k"], num_tasks=params["tasks"]
        )

    judge_block(tensors, make, lambda block, x: block(x, task)[0])


@pytest.mark.parametrize("case", ["attn_small", "attn_qknorm_odd", "attn_full_mask", "attn_missing_modality", "block_small"])
def test_golden_mixture_of_transformers(case: str) -> None:
    tensors, params = golden(f"mot/{case}")
    ids, shape = tensors["modality_ids"], (params["B"], params["S"])
    options = {"head_dim": params["head_dim"], "qk_norm": params["qk_normalization"]}
    sizes = params["dim"], params["heads"]
    causal = params["causal"]
    assert torch.equal(tensors["attn_mask"] == 0, torch.ones_like(tensors["attn_mask"]).tril().bool()) == causal

    def make() -> Model:
        if case.startswith("block"):
            return MoTBlock(*sizes, params["hidden"], params["n_modalities"], **options)
        return MoTAttention(*sizes, params["n_modalities"], **options)

    def call(block: Model, x: Tensor) -> Tensor:
        mask = None if causal else tensors["attn_mask"] == 0
        return block(x.unflatten(0, shape), ids.view(shape), is_causal=causal, mask=mask).flatten(0, 1)

    judge_block(tensors, make, call)


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("case", ["nested_small", "nested_odd"])
def test_golden_matformer_block(case: str, released: bool) -> None:
    """The feed-forward layer of a block: its own weights and the names of the published ones, all granularities."""
    tensors, params = golden(f"matformer/{case}")
    widths = params["widths"]
    dim, hidden = params["d"], params["h"]
    fractions = [width / hidden + 1e-9 for width in widths.values()]
    weights = published(tensors, "w.")

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        block = MatFormerBlock(dim, 1, hidden, fractions=fractions, activation_on_product=released).to(dtype)
        block.kernels = kernels
        others = {name: value for name, value in block.state_dict().items() if not name.startswith("mlp.")}
        assert block.load_pretrained(others | {f"mlp.{name}": value for name, value in weights.items()}) == []
        made: Made = {}
        for name, width in widths.items():
            block.zero_grad()
            x = tensors["x"].to(dtype).requires_grad_()
            block.mlp.width = width
            out = block.mlp(x)
            assert_same_bits(block.mlp(x, width), out, "width of the call")
            if not released:
                made[f"{name}.ref_swiglu_out"] = out.detach()
                continue
            out.backward(tensors["gout"].to(dtype))
            made |= {f"{name}.out": out.detach(), f"{name}.grad.x": x.grad}
            for ours, theirs in LLAMA_MLP.items():
                gradient = block.mlp.get_parameter(ours).grad
                made[f"{name}.grad.w.{theirs}.weight"] = gradient[:, :width] if ours == "w_out" else gradient[:width]
        return made

    judge(tensors, run)


LLAMA_MLP = {"w_gate": "gate_proj", "w_in": "up_proj", "w_out": "down_proj"}


@pytest.mark.parametrize("case", ["moe4_small", "moe4_odd", "moe8_aux_small", "lora_expert_small", "lora_expert_odd"])
def test_golden_uni_moe_block(case: str) -> None:
    """The experts of a block, loaded by their published names; one expert alone is that of a router of zeros."""
    tensors, params = golden(f"uni_moe/{case}")
    lora = case.startswith("lora")
    experts = 1 if lora else params["E"]
    theirs, their_gradients = published(tensors, "w."), published(tensors, "grad.w.")
    router = {"mlp.gate.weight": torch.zeros(1, params["d"])} if lora else {}
    place = "mlp.experts.0." if lora else "mlp."

    def make() -> UniMoEBlock:
        options = {"lora_rank": params["lora_r"], "lora_alpha": params["lora_alpha"]} if lora else {}
        return UniMoEBlock(params["d"], 1, params["hidden"], num_experts=experts, top_k=min(2, experts), **options)

    expected = make().own_names({f"{place}{name}": value for name, value in their_gradients.items()})
    expected = {f"grad.w.{name}": value for name, value in expected.items()}
    expected |= {name: value for name, value in tensors.items() if name in ("out", "grad.x", "weights", "l_aux")}
    for name in ("laux_grad.x", "laux_grad.w.gate.weight"):
        if name in tensors:
            expected[name] = tensors[name]

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        block = make().to(dtype)
        block.kernels = kernels
        others = {name: value for name, value in block.state_dict().items() if not name.startswith("mlp.")}
        assert block.load_pretrained(others | router | {f"{place}{name}": value for name, value in theirs.items()}) == []
        x = tensors["x"].to(dtype).requires_grad_()
        out, routing = block.mlp(x, return_routing=True)
        made = {"out": out.detach()}
        if not lora:
            assert torch.equal(routing.expert_ids, tensors["idx"])
            made["weights"] = routing.weights.detach()
        if "l_aux" in tensors:
            loss = routing.losses.load_balance_first
            made["l_aux"] = loss.detach().view_as(tensors["l_aux"])
            of_x, of_router = torch.autograd.grad(loss, (x, block.mlp.router), retain_graph=True)
            made |= {"laux_grad.x": of_x, "laux_grad.w.gate.weight": of_router[0]}
        out.backward(tensors["gout"].to(dtype))
        made["grad.x"] = x.grad
        made |= {f"grad.w.{name}": p.grad for name, p in block.named_parameters() if f"grad.w.{name}" in expected}
        return made

    judge(expected, run)


@pytest.mark.parametrize("case", ["text_small", "image_odd", "vl_small", "vl_nobias", "vl_headscale", "al"])
def test_golden_one_peace_layer(case: str) -> None:
    tensors, params = golden(f"one_peace/layer_{case}")
    flags = params["flags"]
    modalities = ["text", "audio" if params["encoder_type"] == "al" else "image"]

    def make() -> Model:
        return OnePeaceLayer(
            params["d"],
            params["heads"],
            params["ffn"],
            modalities,
            sub_norm=flags["magneto_scale_attn"],
            post_norm=flags["scale_attn"],
            head_scale=flags["scale_heads"],
        )

    def call(layer: Model, x: Tensor, bias: Tensor | None = None) -> Tensor:
        ids = (torch.arange(x.size(0)) >= params["text_len"]).long()
        return layer(x.transpose(0, 1), ids.expand(x.size(1), -1), bias).transpose(0, 1)

    judge_block(tensors, make, call, **({"bias": tensors["bias"]} if "bias" in tensors else {}))


def test_golden_one_peace_buckets() -> None:
    words, _ = golden("one_peace/text_rel_pos_buckets")
    assert torch.equal(text_buckets(256, 300), words["bucket_released_with_cls"].long())
    assert torch.equal(text_buckets(8, 40, 64)[1:, 1:], words["bucket_small"][1:, 1:].long())
    patches, _ = golden("one_peace/image_rel_pos_buckets")
    for edge in (4, 7, 16):
        assert torch.equal(image_buckets(edge), patches[f"bucket{edge}"].long())


@pytest.mark.parametrize("case", ["ec_small", "ec_odd"])
def test_golden_imp_block(case: str) -> None:
    """The experts of a block; the published matrices are [in, out]."""
    tensors, params = golden(f"imp/{case}")
    theirs = {"router": "w_router", "w_in": "w1", "w_out": "w2"}

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        factor = params["capacity_factor"]
        block = ImpBlock(
            params["d"], 1, params["hidden"], num_experts=params["E"], capacity_factor=factor, group_size=params["T"]
        ).to(dtype)
        block.kernels = kernels
        state = {f"mlp.{ours}": tensors[name].mT.view_as(block.mlp.get_parameter(ours)) for ours, name in theirs.items()}
        block.load_state_dict(block.state_dict() | state)
        x = tensors["x"].to(dtype).requires_grad_()
        out, routing = block.mlp(x, return_routing=True)
        taken = (routing.expert_ids[..., None] == torch.arange(params["E"])).any(1).unflatten(0, x.shape[:2])
        chosen = taken.mT.nonzero()[:, 2].view(params["G"], params["E"], params["C"])
        assert torch.equal(chosen, tensors["token_idx"].sort().values)
        out.backward(tensors["gout"].to(dtype))
        gradients = {f"grad.{name}": block.mlp.get_parameter(ours).grad.mT for ours, name in theirs.items()}
        gradients["grad.w_router"] = gradients["grad.w_router"][0]
        return {"out": out.detach(), "grad.x": x.grad, **gradients}

    judge(tensors, run)
