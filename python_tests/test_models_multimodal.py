"""Models of multimodal systems: published blocks by golden vectors, whole models with kernels on and off, state, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import assert_same_bits, assert_within_rule, golden, judge
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.models.base import Model
from mmkernels.models.m3vit import M3ViT, M3ViTBlock

Made = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def named(count: int, *shape: int, seed: int = 6) -> Tensor:
    """Ids from 0 to count - 1."""
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


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


# --- golden vectors ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["block_small", "block_odd"])
def test_golden_m3vit_block(case: str) -> None:
    tensors, params = golden(f"m3vit/{case}")
    hidden, task = tensors["w.mlp.experts.htoh4.weight"].size(1), params["task_id"]

    def make() -> Model:
        return M3ViTBlock(
            params["d"], params["heads"], hidden, num_experts=params["E"], top_k=params["k"], num_tasks=params["tasks"]
        )

    judge_block(tensors, make, lambda block, x: block(x, task)[0])


# --- small models -----------------------------------------------------------------------------------------------------
class Small:
    """A small model of each kind, inputs of a batch for it, the ops that it must run, and what of its output is compared."""

    def __init__(
        self,
        make: Callable[..., Model],
        inputs: Callable[[int], tuple[Any, ...]],
        ran: set[str],
        out: Callable[[Any], Tensor] = lambda made: made,
    ) -> None:
        self.make, self.inputs, self.ran, self.out = make, inputs, ran, out


def m3vit(**options: Any) -> M3ViT:
    sizes: dict[str, Any] = {"depth": 4, "image_size": (24, 40), "patch_size": 8, "num_experts": 6, "top_k": 2}
    return M3ViT(24, 3, **{"num_tasks": 3, "task_dim": 10, **sizes, **options})


def images(batch: int) -> Tensor:
    return tokens(batch, 3, 24, 40)


VIT = {"linear", "mlp", "attention", "norm"}

SMALL: dict[str, Small] = {
    "m3vit": Small(m3vit, lambda b: (images(b), 2), VIT | {"route", "moe_mlp"}, lambda made: made.tokens),
    "m3vit_conditioned": Small(
        lambda **options: m3vit(gate="conditioned", **options),
        lambda b: (images(b), 1),
        VIT | {"route", "moe_mlp"},
        lambda made: made.tokens,
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
    del state[next(reversed(state))]
    with pytest.raises(ValueError, match=r"^state_dict: expected .* in it too"):
        other.load_pretrained(state)


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


# --- errors -----------------------------------------------------------------------------------------------------------
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: m3vit()(tokens(1, 3, 24, 24)), ValueError, r"images: expected \[B, 3, 24, 40\], got \(1, 3, 24, 24\)"),
    (lambda: m3vit()(images(1), 3), ValueError, "task: expected 0 to 2, got 3"),
    (lambda: m3vit(gate="conditioned")(images(1), 3), ValueError, "task: expected 0 to 2, got 3"),
    (lambda: m3vit()(images(1), 1.0), TypeError, "task: expected an int"),
    (lambda: m3vit(gate="both"), ValueError, "gate: expected one of multi, conditioned, got 'both'"),
    (lambda: m3vit(image_size=20), ValueError, "image_size: expected multiples of patch_size=8, got 20"),
    (lambda: m3vit(schedule="streaming"), ValueError, "experts: expected a file or tensors with schedule 'streaming'"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


# --- the published sizes ----------------------------------------------------------------------------------------------
# Parameters in millions.
SIZES = {"m3vit_small": 43.5, "m3vit_small_nyud": 43.5, "m3vit_block": 5.4}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    """On the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = mk.models.create_model(name)
    assert isinstance(model, nn.Module) and model.kernels
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(SIZES[name], rel=0.01)
