"""MoE, ModalityLinear, ModalityMlp, NestedMlp and SkillMlp: published layers by golden vectors, kernels on and off."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_bits, assert_within_rule, golden, judge
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.nn import ModalityLinear, ModalityMlp, ModalityRMSNorm, MoE, NestedMlp, SkillMlp

Made = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def set_to(module: nn.Module, values: Made, dtype: torch.dtype) -> None:
    """Every parameter is given."""
    module.to(dtype).load_state_dict({name: value.to(dtype) for name, value in values.items()})


# --- M3ViT ------------------------------------------------------------------------------------------------------------
M3VIT_EXPERTS = {"w_in": "htoh4.weight", "b_in": "htoh4.bias", "w_out": "h4toh.weight", "b_out": "h4toh.bias"}


@pytest.mark.parametrize("case", ["moe_multigate_small", "moe_multigate_odd", "moe_empty_experts", "moe_taskcond"])
def test_golden_m3vit(case: str) -> None:
    tensors, params = golden(f"m3vit/{case}")
    conditioned, tasks = "task_feature" in tensors, params["tasks"]
    gates = [tensors["w.gate.w_gate"]] if conditioned else [tensors[f"w.gate.{task}.w_gate"] for task in range(tasks)]
    published = {ours: f"w.experts.{theirs}" for ours, theirs in M3VIT_EXPERTS.items()}

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        module = MoE(
            params["d"],
            params["hidden"],
            params["E"],
            params["k"],
            kind="softmax_topk",
            bias=True,
            num_tasks=len(gates),
            task_dim=params["task_dim"] if conditioned else 0,
            kernels=kernels,
        )
        router = torch.stack([gate.T for gate in gates])
        set_to(module, {"router": router} | {ours: tensors[theirs] for ours, theirs in published.items()}, dtype)
        made = {}
        for task in range(tasks):  # conditioned, both are of the one feature in the file
            x = tensors["x"].to(dtype).requires_grad_()
            feature = tensors["task_feature"].to(dtype).requires_grad_() if conditioned else None
            module.zero_grad()
            out, routing = module(x, 0 if conditioned else task, task_feature=feature, return_routing=True)
            assert torch.equal(routing.expert_ids, tensors[f"task{task}.idx"])
            out.backward(tensors[f"task{task}.gout"].to(dtype))
            made[f"task{task}.out"], made[f"task{task}.score"] = out.detach(), routing.weights.detach()
            made[f"task{task}.grad.x"] = x.grad
            if feature is not None:
                made[f"task{task}.grad.task_feature"] = feature.grad
            for ours, theirs in published.items():
                made[f"task{task}.grad.{theirs}"] = module.get_parameter(ours).grad
            gate = "w.gate.w_gate" if conditioned else f"w.gate.{task}.w_gate"
            made[f"task{task}.grad.{gate}"] = module.router.grad[0 if conditioned else task].T
        return made

    judge(tensors, run)


@pytest.mark.parametrize(
    "case", ["vmoe_eval_small", "vmoe_eval_odd", "vmoe_train_std0", "vmoe_train_std1", "noisy_eval", "noisy_train"]
)
def test_golden_m3vit_gate(case: str) -> None:
    tensors, params = golden(f"m3vit/gate_{case}")
    experts, learned = params["E"], "w_noise" in tensors
    std = "learned" if learned else params["noise_std"] / experts
    kind = "noisy_topk" if learned else "softmax_topk"

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        module = MoE(
            params["d"], 3, experts, params["k"], kind=kind, noise_std=std, published_thresholds=True, kernels=kernels
        )
        module.published_thresholds = not learned
        module.train(params["training"]).to(dtype)
        x = tensors["x"].to(dtype).requires_grad_()
        with torch.no_grad():
            module.router.copy_(tensors["w_gate"].T)
            if learned:
                module.router_noise.copy_(tensors["w_noise"].T)
        noise = tensors["noise"].to(dtype) if "noise" in tensors else None
        routing = module.route(x, noise=noise)
        assert torch.equal(routing.expert_ids, tensors["idx"])
        made = {"score": routing.weights.detach()}
        gradients = {"x": x, "w_gate": module.router}
        if learned and params["training"]:
            gradients["w_noise"] = module.router_noise

        def differentiate(of: Tensor, upstream: Tensor | None, prefix: str) -> None:
            for (name, _), gradient in zip(
                gradients.items(),
                torch.autograd.grad(of, list(gradients.values()), upstream, retain_graph=True),
                strict=True,
            ):
                made[f"{prefix}.{name}"] = gradient if name == "x" else gradient[0].T

        differentiate(routing.weights, tensors["gout"].to(dtype), "grad")
        if "loss" in tensors:
            losses = routing.losses
            loss = losses.importance + losses.load
            made["loss"] = loss.detach().view_as(tensors["loss"])
            made["importance"] = routing.sums[experts : 2 * experts].detach()
            loads = routing.counts[0] if routing.loads is None else routing.loads
            made["load"] = loads.detach().to(dtype)
            differentiate(loss, None, "lgrad")
        return made

    judge(tensors, run)


def test_noise_is_for_training_only() -> None:
    x = tokens(20, 6)
    for kind in ("noisy_topk", "softmax_topk"):
        for std in (1.0, "learned"):
            module = MoE(6, 5, 8, 2, kind=kind, noise_std=std)
            first, second = module(x), module(x)
            assert not torch.equal(first, second)
            assert_same_bits(
                module(x, generator=torch.Generator().manual_seed(1)),
                module(x, generator=torch.Generator().manual_seed(1)),
                "one seed",
            )
            module.eval()
            assert_same_bits(module(x), module(x), "eval")
            plain = MoE(6, 5, 8, 2, kind="topk_softmax" if kind == "noisy_topk" else kind)
            plain.load_state_dict(module.state_dict(), strict=False)
            assert_same_bits(module(x), plain(x), "the kind without noise")


# --- Mixture-of-Transformers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["ffn_small", "ffn_odd", "ffn_missing_modality"])
def test_golden_mot(case: str) -> None:
    tensors, params = golden(f"mot/{case}")
    modalities = params["n_modalities"]
    matrices = {"w_in": "w3", "w_gate": "w1", "w_out": "w2"}

    def published(ours: str, modality: int) -> str:
        if ours == "out_norm_weight":
            return f"w.local_experts_ffn_norm.{modality}.weight"
        return f"w.local_experts.{modality}.{matrices[ours]}.weight"

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        module = ModalityMlp(
            params["dim"],
            params["hidden"],
            modalities,
            gated=True,
            activation="silu",
            bias=False,
            out_norm=True,
            kernels=kernels,
        )
        values = {
            name: torch.stack([tensors[published(name, m)] for m in range(modalities)]) for name in module.state_dict()
        }
        set_to(module, values, dtype)
        x = tensors["x"].to(dtype).requires_grad_()
        out = module(x, tensors["modality_ids"])
        out.backward(tensors["gout"].to(dtype))
        made = {"out": out.detach(), "grad.x": x.grad}
        for name, parameter in module.named_parameters():
            for modality in range(modalities):
                gradient = f"grad.{published(name, modality)}"
                if gradient in tensors:
                    made[gradient] = parameter.grad[modality]
                else:  # the published code has none where a modality is missing
                    assert not parameter.grad[modality].any()
        return made

    judge(tensors, run)


# --- Uni-MoE ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["top2gating_nodrop", "top2gating_drop_cf1", "top2gating_sampling"])
def test_golden_top2gating(case: str) -> None:
    tensors, params = golden(f"uni_moe/{case}")
    experts = params["E"]
    dropped = params["drop_tokens"]
    combined = tensors["combine"].sum(2)

    def run(dtype: torch.dtype, kernels: bool) -> Made:
        # The logits are the tokens, and the router the identity.
        module = MoE(
            experts,
            1,
            experts,
            2,
            kind="softmax_topk",
            normalize=True,
            capacity_factor=params["capacity_factor"] if dropped else None,
            kernels=kernels,
        ).to(dtype)
        with torch.no_grad():
            module.router.copy_(torch.eye(experts)[None])
        logits = tensors["logits"].to(dtype).requires_grad_()
        selection = None
        if params["second_expert_sampling"]:  # the first choice is without noise
            selection = tensors["gumbel"].to(dtype)
            selection[torch.arange(len(selection)), logits.argmax(-1)] = float("inf")
        routing = module.route(logits, selection=selection)
        dense = torch.zeros(logits.shape, dtype=dtype).scatter_add(1, routing.expert_ids.clamp(min=0), routing.weights)
        assert torch.equal(routing.counts[0], tensors["exp_counts"]) or dropped or selection is not None
        loss = routing.losses.load_balance_first
        upstream = tensors["gout"].to(dtype)[tensors["dispatch"].bool()]
        places = tensors["dispatch"].bool().nonzero()
        (of_weights,) = torch.autograd.grad(dense[places[:, 0], places[:, 1]], logits, upstream, retain_graph=True)
        (of_loss,) = torch.autograd.grad(loss, logits)
        return {
            "combine": dense.detach(),
            "grad.logits": of_weights,
            "l_aux": loss.detach().view_as(tensors["l_aux"]),
            "laux_grad.logits": of_loss,
        }

    judge(tensors | {"combine": combined}, run)


# --- kernels and plain torch ------------------------------------------------------------------------------------------
C, H = 12, 20
IDS = torch.tensor([[0, 2, 1, 1, -1], [2, 2, 0, 1, 1]])
MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[Any, ...]]] = {
    "moe": (lambda **o: MoE(C, H, 6, 2, **o), ()),
    "moe_gated": (
        lambda **o: MoE(C, H, 6, 3, out_dim=9, gated=True, activation="silu", bias=True, shared_hidden=7, **o),
        (),
    ),
    "moe_tasks": (lambda **o: MoE(C, H, 6, 2, kind="softmax_topk", num_tasks=3, shared_hidden=8, bias=True, **o), (1,)),
    "moe_sigmoid": (
        lambda **o: MoE(C, H, 6, 2, kind="sigmoid_topk", normalize=True, num_groups=3, top_groups=2, **o),
        (),
    ),
    "moe_top_p": (lambda **o: MoE(C, H, 6, None, kind="softmax_topk", top_p=0.4, normalize=True, **o), ()),
    "moe_choice": (lambda **o: MoE(C, H, 3, None, kind="expert_choice", group_size=5, **o), ()),
    "moe_lora": (lambda **o: MoE(C, H, 4, 2, gated=True, lora_rank=3, lora_alpha=6.0, bias=True, **o), ()),
    "moe_capacity": (lambda **o: MoE(C, H, 4, 2, capacity_factor=0.7, **o), ()),
    "modality_linear": (lambda **o: ModalityLinear(C, 7, 3, **o), (IDS,)),
    "modality_mlp": (lambda **o: ModalityMlp(C, H, 3, **o), (IDS,)),
    "modality_one_peace": (
        lambda **o: ModalityMlp(C, H, 3, gated=True, bias=(False, True), hidden_norm=True, **o),
        (IDS,),
    ),
    "modality_both": (lambda **o: ModalityMlp(C, H, 3, hidden_norm=True, out_norm=True, **o), (IDS,)),
    "nested": (lambda **o: NestedMlp(C, H, (5, 10, 20), **o), (10,)),
    "nested_plain": (lambda **o: NestedMlp(C, H, (5, 10, 20), gated=False, activation="gelu", **o), ()),
    "skill_mean": (lambda **o: SkillMlp(C, H, 5, **o), ((0, 3, 4),)),
    "skill_sum": (lambda **o: SkillMlp(C, H, 5, reduce="sum", gated=True, activation="silu", **o), ((2, 1),)),
}


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    module = MODULES[name][0](**options)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "lora_up" in key or "norm" in key:
                parameter.normal_()
    return module


def outputs(module: nn.Module, x: Tensor, arguments: tuple[Any, ...]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = module(x, *arguments)
    upstream = tokens(*out.shape, dtype=out.dtype)
    gradients = torch.autograd.grad(out, [x, *module.parameters()], upstream, allow_unused=True)
    return [out, *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_kernels_and_plain_torch_agree(name: str, dtype: torch.dtype) -> None:
    arguments = MODULES[name][1]
    module = made(name, dtype=dtype)
    off = copy.deepcopy(module)
    off.kernels = False
    # bfloat16 routes in float32, float64 in float64: numbers far enough apart go the same way.
    x = (2 * tokens(2, 5, C)).to(dtype)
    mk.last_kernels(clear=True)
    ours = outputs(module, x, arguments)
    assert mk.last_kernels() and all(kernel.startswith("cpu/") for _, kernel in mk.last_kernels(clear=True))
    plain = outputs(off, x, arguments)
    assert not [op for op, _ in mk.last_kernels() if op != "expert_order"]
    wanted = outputs(copy.deepcopy(off).double(), x.double(), arguments)
    names = ["output", "grad x", *(key for key, _ in module.named_parameters())]
    for what, a, b, c in zip(names, ours, plain, wanted, strict=True):
        assert_within_rule(a, b, c, what)


@pytest.mark.parametrize("name", MODULES)
def test_copies_files_and_state(name: str) -> None:
    module, arguments, x = made(name).eval(), MODULES[name][1], tokens(2, 5, C)
    wanted = module(x, *arguments)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = MODULES[name][0]().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    for what, same in (
        ("deepcopy", copy.deepcopy(module)),
        ("pickle", pickle.loads(pickle.dumps(module))),
        ("state_dict", other),
    ):
        assert_same_bits(same(x, *arguments), wanted, what)
    assert module.bfloat16()(x.bfloat16(), *arguments).dtype == torch.bfloat16
    assert not list(module.buffers()) and "kernels=True" in repr(module)


@pytest.mark.parametrize("name", MODULES)
def test_compiled(name: str) -> None:
    module, arguments, x = made(name), MODULES[name][1], tokens(2, 5, C)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a, b in zip(outputs(compiled, x, arguments), outputs(module, x, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert_same_bits(compiled(x, *arguments), module(x, *arguments), "without gradients")


def test_compiled_with_its_losses() -> None:
    module, x = made("moe_gated"), tokens(2, 5, C)

    def loss(x: Tensor) -> Tensor:
        out, routing = module(x, return_routing=True)
        return out.square().mean() + routing.losses.load_balance + routing.losses.z

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x))
    inductor = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(inductor(x), module(x))


def test_autocast_routes_in_float32() -> None:
    module, x = made("moe_gated"), tokens(2, 5, C)
    _, exact = module(x, return_routing=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = module(x, return_routing=True)
    assert out.dtype == torch.bfloat16
    assert_same_bits(routing.weights, exact.weights, "weights")
    half = copy.deepcopy(module).bfloat16()
    logits = half.router_logits(x.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(x.bfloat16().float().flatten(0, 1), half.router[0].float()))


# --- what the layers mean ---------------------------------------------------------------------------------------------
def test_residual_and_shared_experts() -> None:
    module, x, residual = made("moe_tasks"), tokens(2, 5, C), tokens(2, 5, C, seed=6)
    alone = copy.deepcopy(module)
    alone.shared = None
    torch.testing.assert_close(module(x, 2), alone(x, 2) + module.shared(x))
    torch.testing.assert_close(module(x, residual=residual), module(x) + residual)
    module.kernels = False
    assert not module.shared.fc1.kernels
    torch.testing.assert_close(module(x, residual=residual), module(x) + residual)


def test_task_feature_of_each_sample() -> None:
    module, x, features = MoE(C, H, 5, 2, task_dim=4), tokens(2, 5, C), tokens(2, 1, 4)
    both = module(x, task_feature=features)
    for sample in range(2):
        torch.testing.assert_close(both[sample], module(x[sample], task_feature=features[sample, 0]))
    joined = torch.cat((x, features.expand(2, 5, 4)), -1).flatten(0, 1)
    torch.testing.assert_close(module.router_logits(x, task_feature=features), F.linear(joined, module.router[0]))


def test_selection_chooses_but_does_not_weigh() -> None:
    module, x = MoE(C, H, 4, 1, kind="softmax_topk"), tokens(7, C)
    _, routing = module(x, selection=torch.tensor([0.0, 0.0, 100.0, 0.0]), return_routing=True)
    assert bool((routing.expert_ids == 2).all())
    torch.testing.assert_close(routing.weights[:, 0], module.router_logits(x).softmax(-1)[:, 2])


def test_modality_norm_has_a_gain_for_each() -> None:
    module = ModalityRMSNorm(6, 3, eps=1e-3)
    with torch.no_grad():
        module.weight.copy_(tokens(3, 6))
    x, ids = tokens(2, 5, 4, 6), torch.tensor([[0, 2, 2, -1, 0], [2, 0, 0, 0, 2]])
    for kernels in (True, False):
        module.kernels = kernels
        mk.last_kernels(clear=True)
        heads, alone = module(x, ids), module(x[:, :, 0], ids)
        assert bool(mk.last_kernels()) == kernels
        wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * module.weight[ids.clamp(min=0)][:, :, None]
        torch.testing.assert_close(heads, wanted)
        torch.testing.assert_close(alone, wanted[:, :, 0])
    alone.sum().backward()
    assert not module.weight.grad[1].any() and module.weight.grad[2].any()
    with pytest.raises(ValueError, match=r"^modality_ids: expected the leading shape of x, \(2, 5\), got \(2, 4\)"):
        module(x, ids[:, :4])
    with pytest.raises(TypeError, match=r"^modality_ids: expected torch\.int64, got torch\.int32"):
        module(x, ids.int())
    with pytest.raises(ValueError, match=r"^num_modalities: expected at least 1"):
        ModalityRMSNorm(6, 0)


def test_modalities_are_separate_layers() -> None:
    module, x = made("modality_one_peace"), tokens(2, 5, C)
    out = module(x, IDS)
    assert not out[IDS < 0].any()
    for modality in range(3):
        chosen = x[modality == IDS]
        hidden = F.gelu(F.linear(chosen, module.w_gate[modality])) * F.linear(chosen, module.w_in[modality])
        normed = F.layer_norm(hidden, (H,), module.hidden_norm_weight[modality], module.hidden_norm_bias[modality])
        wanted = F.linear(normed, module.w_out[modality], module.b_out[modality])
        torch.testing.assert_close(out[modality == IDS], wanted)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_skills_are_separate_layers(reduce: str) -> None:
    module, x = SkillMlp(C, H, 4, reduce=reduce), tokens(6, C)

    def skill(index: int) -> Tensor:
        hidden = F.gelu(F.linear(x, module.w_in[index], module.b_in[index]))
        return F.linear(hidden, module.w_out[index], module.b_out[index])

    out = module(x, [3, 1])
    wanted = skill(1) + skill(3)
    torch.testing.assert_close(out, wanted / 2 if reduce == "mean" else wanted)
    out.sum().backward()
    for parameter in module.parameters():
        assert not parameter.grad[[0, 2]].any() and parameter.grad[1].any() and parameter.grad[3].any()


@pytest.mark.parametrize("name", MODULES)
def test_meta(name: str) -> None:
    arguments = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in MODULES[name][1])
    with torch.device("meta"):
        module = MODULES[name][0]()
        out = module(torch.empty(2, 5, C), *arguments)
    assert out.device.type == "meta" and out.shape == made(name)(tokens(2, 5, C), *MODULES[name][1]).shape


def test_no_tokens() -> None:
    for name, (_, arguments) in MODULES.items():
        ids = (IDS[:, :0],) if name.startswith("modality") else arguments
        out = made(name)(torch.zeros(2, 0, C), *ids)
        assert out.shape[:2] == (2, 0), name


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k: expected at most num_experts, 4, got 5"),
        ({"top_k": 0}, "top_k: expected"),
        ({"top_k": None}, "top_k: expected a number of experts with kind 'topk_softmax', got None"),
        ({"kind": "switch"}, "kind: expected one of topk_softmax, .* got 'switch'"),
        ({"activation": "tanh"}, "activation: expected one of"),
        ({"hidden": 0}, "hidden: expected"),
        ({"num_tasks": 2, "task_dim": 3}, "task_dim: expected 0 beside num_tasks 2, got 3"),
        ({"noise_std": 1.0}, "noise_std: expected None with kind 'topk_softmax'"),
        ({"kind": "noisy_topk"}, "noise_std: expected a number or 'learned' with kind 'noisy_topk', got None"),
        ({"kind": "noisy_topk", "noise_std": "own"}, "noise_std: expected None, a number or 'learned', got 'own'"),
        ({"kind": "noisy_topk", "noise_std": -1.0}, "noise_std: expected a number of at least 0, got -1.0"),
        ({"schedule": "lazy"}, "schedule: expected one of resident, streaming, got 'lazy'"),
        ({"schedule": "streaming"}, "experts: expected a file or tensors with schedule 'streaming'"),
        ({"experts": {}}, "experts: expected None with schedule 'resident'"),
        ({"lora_rank": -1}, "lora_rank: expected"),
        ({"capacity_factor": -1.0}, "capacity_factor: expected a number of at least 0, got -1.0"),
        ({"capacity_factor": "1"}, "capacity_factor: expected a float"),
        ({"kind": "expert_choice", "group_size": 0}, "group_size: expected at least 1"),
        ({"group_size": 4}, "group_size: expected None with kind 'topk_softmax'"),
    ],
)
def test_errors_of_moe_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MoE(**{"dim": C, "hidden": H, "num_experts": 4, "top_k": 2, **options})


def test_errors_name_the_argument() -> None:
    module, x = MoE(C, H, 4, 2, num_tasks=2), tokens(5, C)
    conditioned = MoE(C, H, 4, 2, task_dim=3)
    for call, message in (
        (lambda: module(x, 2), "task: expected 0 to 1, got 2"),
        (lambda: module(x, task_feature=tokens(3)), "task_feature: expected None, the module has task_dim 0"),
        (lambda: module(x[:, 1:]), r"x: expected \[\.\.\., 12\], got \(5, 11\)"),
        *(
            (
                lambda kernels=kernels: MoE(C, H, 4, None, kind="expert_choice", group_size=3, kernels=kernels)(x),
                "group_size: expected a divisor of the 5 tokens, got 3",
            )
            for kernels in (True, False)
        ),
        (lambda: module(x, residual=x[1:]), "residual: expected the output's shape"),
        (lambda: conditioned(x), r"task_feature: expected a tensor \[\.\.\., 3\], got NoneType"),
        (
            lambda: conditioned(x, task_feature=tokens(4, 3)),
            r"task_feature: expected what expands to \(5, 3\), got \(4, 3\)",
        ),
        (lambda: ModalityMlp(C, H, 2)(x, torch.zeros(4, dtype=torch.int64)), r"modality_ids: expected the leading shape"),
        (lambda: ModalityLinear(C, H, 2)(x, torch.zeros(5)), "modality_ids: expected torch.int64, got torch.float32"),
        (lambda: ModalityLinear(C, H, 0), "num_modalities: expected"),
        (lambda: NestedMlp(C, H, (5, 10))(x, 7), "width: expected one of 5, 10, got 7"),
        (lambda: NestedMlp(C, H, (5, H + 1)), "widths: expected at most hidden, 20, got 21"),
        (lambda: NestedMlp(C, H, ()), "widths: expected at least one"),
        (lambda: NestedMlp(C, H, (5,), gated=False, activation_on_product=True), "activation_on_product: expected False"),
        (lambda: SkillMlp(C, H, 3)(x, [0, 3]), r"skills: expected different ones of 0 to 2, got \[0, 3\]"),
        (lambda: SkillMlp(C, H, 3)(x, []), r"skills: expected different ones of 0 to 2, got \[\]"),
        (lambda: SkillMlp(C, H, 3, reduce="max"), "reduce: expected one of mean, sum, got 'max'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


@pytest.mark.parametrize("on_product", [False, True])
@pytest.mark.parametrize("kernels", [True, False])
def test_nested_mlp_adds_the_residual(kernels: bool, on_product: bool) -> None:
    layer = NestedMlp(C, H, (5, H), activation_on_product=on_product, kernels=kernels)
    x, residual = torch.randn(3, 7, C), torch.randn(3, 7, C)
    for width in (5, H):
        torch.testing.assert_close(layer(x, width, residual), layer(x, width) + residual)
