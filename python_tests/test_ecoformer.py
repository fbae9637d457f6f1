"""EcoFormer: the published block and hash learning by golden vectors, the models, their conversion and their energy."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support import assert_within_rule
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.models import create_model, list_models
from mmkernels.models.energy import Operations, count_operations, hash_operations, linear_operations, softmax_operations
from mmkernels.models.pvt_v2 import PvtV2
from mmkernels.models.pyramid import GlobalAttention, HashAttention, LocalAttention, Pyramid
from mmkernels.models.twins_svt import TwinsSvt
from mmkernels.nn import EcoFormerAttention, HashFit, fit_hash
from mmkernels.nn.hash_learning import Neighbours, centred_kernel, neighbours
from mmkernels.ops.hash_attention import ecoformer_attention
from mmkernels.reference import hash_attention as reference

GOLDEN = Path(__file__).parent / "golden" / "ecoformer"


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(GOLDEN / f"{case}.safetensors"), json.loads((GOLDEN / f"{case}.json").read_text())["hyper_parameters"]


def ran() -> set[str]:
    """The ops whose kernels ran since the last call; none of them may be the reference."""
    traced = mk.last_kernels(clear=True)
    assert all(kernel != "reference" for _, kernel in traced)
    return {op for op, _ in traced}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(dim: int = 24, heads: int = 2, seed: int = 0, **options: Any) -> EcoFormerAttention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EcoFormerAttention(dim, heads, **{"bits": 8, "supports": 6, **options})


def saved(module: nn.Module) -> dict[str, Any]:
    """The state after a way through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the published block ------------------------------------------------------------------------------------------------
def published_block(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The golden's state by the names of the published code."""
    state = {name[2:]: value for name, value in tensors.items() if name.startswith("w.")}
    names = {"A": "A", "anchor": "anchor", "mvec": "mvec"}
    return state | {f"fast_attention.ksh.{theirs}": tensors[name] for name, theirs in names.items()}


@pytest.mark.parametrize("packed", [True, False])
def test_golden_block(packed: bool) -> None:
    tensors, params = golden("block_small")
    state = published_block(tensors) | {"fast_attention.projection_matrix": torch.zeros(3, 12)}

    def run(dtype: torch.dtype, kernels: bool) -> dict[str, Tensor]:
        block = attention(params["C"], params["H"], bits=params["nbits"], supports=params["m"], kernels=kernels)
        block.load_state_dict(state)
        assert block.is_trained
        block.to(dtype).train(not packed)
        x = tensors["x"].to(dtype).requires_grad_()
        out = block(x)
        out.backward(tensors["gout"].to(dtype))
        return {"out": out.detach(), "grad.x": x.grad} | {f"grad.w.{n}": p.grad for n, p in block.named_parameters()}

    exact, plain = run(torch.float64, False), run(torch.float32, False)
    mk.last_kernels(clear=True)
    ours = run(torch.float32, True)
    assert {"linear", "ecoformer_attention", "ecoformer_attention_backward"} <= ran()
    assert {name for name in tensors if name.startswith(("grad.", "out"))} == exact.keys()
    for name, oracle in exact.items():
        own = 2 * float((tensors[name].double() - oracle).abs().max())
        assert_within_rule(ours[name], plain[name], oracle, name, extra=own)
        # The golden is float32 too, so the published code itself must lie as close to the oracle as plain torch does.
        assert_within_rule(tensors[name], plain[name], oracle, f"golden {name}")


@pytest.mark.parametrize("offset", [None, "power_of_two", 20.5])
@pytest.mark.parametrize("self_term", ["own", "all"])
def test_options_reach_the_op(self_term: str, offset: Any) -> None:
    x = random(2, 17, 24)
    block = attention(self_term=self_term, offset=offset).eval()
    fit_hash(block, x, top_k=4, iterations=0)
    with torch.no_grad():
        qk, v = block.heads_of(block.to_qk(x)), block.heads_of(block.to_v(x))
        expected = reference.ecoformer_attention(
            qk, v, block.supports, block.projection, block.mean, self_term=self_term, offset=offset
        )
        torch.testing.assert_close(block(x), block.proj(expected.transpose(1, 2).flatten(2)))
        # With "all" the weights of a row sum to 1: equal values come back.
        block.to_v.weight.zero_()
        same = block(x) - block.proj(block.to_v.bias)
    assert (float(same.abs().max()) < 1e-5) == (self_term == "all")


@pytest.mark.parametrize("biases", [(True, True, False), (False, True, True), (True, False, True)])
def test_biases(biases: tuple[bool, bool, bool]) -> None:
    qk, v, proj = biases
    block = attention(qk_bias=qk, v_bias=v, proj_bias=proj)
    assert [layer.bias is not None for layer in (block.to_qk, block.to_v, block.proj)] == list(biases)


# --- hash learning ------------------------------------------------------------------------------------------------------
def dense(targets: Neighbours, batch: int, heads: int, tokens: int) -> Tensor:
    rows = targets.columns.shape[0]
    every = torch.zeros(rows, rows)
    every.index_put_(
        (torch.arange(rows)[:, None].expand_as(targets.columns), targets.columns), targets.signs, accumulate=True
    )
    blocks = every.view(batch * heads, tokens, batch * heads, tokens)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(batch, heads, tokens, tokens)


@pytest.mark.parametrize("case", ["ksh_train_small", "ksh_train_odd"])
def test_golden_hash_learning(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, params = golden(case)
    qk, heads, width = tensors["qk"], params["H"], params["D"]
    layer = attention(heads * width, heads, bits=params["nbits"], supports=params["m"], qk_bias=False)
    with torch.no_grad():
        layer.to_qk.weight.copy_(torch.eye(heads * width))
        layer.projection.copy_(tensors["A0"])
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: tensors["perm"])
    fits = fit_hash(
        layer,
        qk.transpose(1, 2).flatten(2),
        top_k=params["topk"],
        iterations=params["iterations"],
        learning_rate=params["lr"],
        momentum=params["momentum"],
    )
    assert list(fits) == [""] and layer.is_trained
    assert torch.equal(fits[""].accepted, tensors["accepted"].bool())
    torch.testing.assert_close(fits[""].losses, tensors["loss_trace"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.supports, tensors["anchor"][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.mean, tensors["mvec"][0, :, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.projection, tensors["A"], rtol=1e-5, atol=1e-6)
    # What the published code kept of the targets, from what is kept here.
    unit = qk / qk.norm(dim=-1, keepdim=True)
    targets = dense(neighbours(unit, params["topk"]), params["B"], heads, params["N"])
    assert torch.equal(targets, tensors["S0"])
    features = centred_kernel(unit, tensors["perm"][: params["m"]])[2]
    codes = torch.where(torch.einsum("bhnm,hkm->bhnk", features, layer.projection) > 0, 1.0, -1.0)
    assert torch.equal(params["nbits"] * targets - codes @ codes.mT, tensors["residual_S"])
    # The codes are those of the published forward, and so is what comes out.
    settled = tensors["preact"].abs() > 1e-4
    y = reference.preactivations(qk, layer.supports, layer.projection, layer.mean)
    assert torch.equal((y > 0)[settled], (tensors["preact"] > 0)[settled])
    out = ecoformer_attention(qk, tensors["v"], layer.supports, layer.projection, layer.mean)
    torch.testing.assert_close(out, tensors["out"], rtol=1e-5, atol=1e-5)


def test_neighbours_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = torch.nn.functional.normalize(random(2, 3, 37, 5), dim=-1)
    whole = neighbours(unit, 4)
    monkeypatch.setattr("mmkernels.nn.hash_learning._SCORES", 2 * 3 * 37 * 5)
    assert all(torch.equal(*pair) for pair in zip(whole, neighbours(unit, 4), strict=True))


def test_a_token_both_near_and_far_counts_as_far() -> None:
    unit = torch.nn.functional.normalize(random(1, 1, 5, 4), dim=-1)
    signs = dense(neighbours(unit, 4), 1, 1, 5)[0, 0]
    near = (unit @ unit.mT)[0, 0].argmax(-1)
    assert torch.equal(signs, torch.where(torch.arange(5) == near[:, None], 1.0, -1.0))


def test_learning_accepts_only_what_agrees_better() -> None:
    layer = attention(dim=16, heads=1, bits=12)
    before = layer.projection.clone()
    # Steps far larger than the published ones, so that rows move.
    fit = fit_hash(layer, random(2, 40, 16), top_k=5, learning_rate=0.2)[""]
    changed = (layer.projection != before).any(-1).all(0)
    assert torch.equal(changed, fit.accepted) and fit.accepted.any()
    assert fit.losses.shape == (12, 100) and (fit.losses[fit.accepted][:, -1] < fit.losses[fit.accepted][:, 0]).all()


def fitted(seed: int, **options: Any) -> dict[str, Tensor]:
    layer = attention()
    fit_hash(layer, random(2, 30, 24, seed=5), top_k=4, iterations=5, seed=seed, **options)
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.usefixtures("threads")
def test_the_seed_decides() -> None:
    first = fitted(0)
    torch.manual_seed(77)
    torch.set_num_threads(1)
    again, other = fitted(0), fitted(1)
    assert first.keys() == {"supports", "projection", "mean"}
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["supports"], other["supports"])


def test_no_iterations_keep_the_random_projection() -> None:
    layer = attention()
    before = layer.projection.clone()
    x = random(2, 30, 24)
    fit = fit_hash(layer, x, iterations=0)[""]
    assert layer.is_trained and torch.equal(layer.projection, before)
    assert not fit.accepted.any() and fit.losses.shape == (8, 0)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(layer.heads_of(layer.to_qk(x))[0], dim=-1)
    chosen = (layer.supports[:, :, None] - unit[:, None]).abs().amax(-1).argmin(-1)
    assert torch.equal(chosen[0], chosen[1]) and len(set(chosen[0].tolist())) == 6
    torch.testing.assert_close(layer.supports, unit[:, chosen[0]])


def test_half_precision_and_float64_layers_learn_too() -> None:
    x = random(2, 30, 24)
    for dtype in (torch.bfloat16, torch.float64):
        layer = attention().to(dtype)
        fit_hash(layer, x.to(dtype), top_k=4, iterations=2)
        assert layer.projection.dtype == dtype and layer(x.to(dtype)).dtype == dtype


class Chain(nn.Module):
    """Two layers that run in the other order than they are named, one of them twice, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.idle = attention(seed=1), attention(seed=2), attention(seed=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(torch.tanh(self.first(x))))


def test_a_model_is_fitted_layer_by_layer() -> None:
    chain, x = Chain().eval(), random(2, 30, 24)
    by_hand = copy.deepcopy(chain)
    fits = fit_hash(chain, x, top_k=4, iterations=3)
    assert list(fits) == ["first", "second"] and not chain.idle.is_trained
    assert all(isinstance(fit, HashFit) for fit in fits.values())
    assert not chain.first._forward_pre_hooks
    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(30, generator=generator) for _ in range(2)]
    with torch.no_grad():
        for layer, tokens, positions in (
            (by_hand.first, lambda: x, order[0]),
            (by_hand.second, lambda: torch.tanh(by_hand.first(x)), order[1]),
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randperm", lambda n, generator=None, positions=positions: positions)
                fit_hash(layer, tokens(), top_k=4, iterations=3)
    for name, value in chain.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[name]), name


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x=x)


def test_bad_batches() -> None:
    def zero_row(x: Tensor) -> None:
        x[1, 3] = 0

    def nan(x: Tensor) -> None:
        x[0, 2, 1] = torch.nan

    def infinite(x: Tensor) -> None:
        x[0, 2, 1] = torch.inf

    layer = attention(qk_bias=False)
    for spoil in (zero_row, nan, infinite):
        x = random(2, 30, 24)
        spoil(x)
        with pytest.raises(ValueError, match=r"^x: 2 of 120 rows of queries are all zero or not finite"):
            fit_hash(layer, x)
    with pytest.raises(ValueError, match=r"^x: 2 of 120 rows of queries of layer 'inner'"):
        fit_hash(Outer(layer), x)
    with pytest.raises(ValueError, match=r"^x: the tokens are all equal"):
        fit_hash(layer, torch.ones(2, 30, 24))
    with pytest.raises(
        ValueError, match=r"^x: the input needs a batch, and at least as many tokens as its 6 supports and as top_k=10"
    ):
        fit_hash(layer, random(2, 9, 24))
    with pytest.raises(ValueError, match=r"^x: the input needs a batch"):
        fit_hash(layer, random(0, 30, 24))
    with pytest.raises(ValueError, match=r"^x: expected \[B, N, 24\], got shape \(2, 30, 23\)"):
        fit_hash(layer, random(2, 30, 23))
    assert not layer.is_trained and not layer.supports.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k: expected at least 1"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int"),
        ({"iterations": -1}, ValueError, "iterations: expected at least 0"),
        ({"learning_rate": 0}, ValueError, "learning_rate: expected more than 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate: expected a float"),
        ({"momentum": 1.0}, ValueError, "momentum: expected a number between 0 and 1"),
    ],
)
def test_bad_options_of_learning(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        fit_hash(attention(), random(2, 30, 24), **options)


def test_bad_modules() -> None:
    with pytest.raises(ValueError, match=r"^module: expected EcoFormerAttention layers in it, found none in Linear"):
        fit_hash(nn.Linear(3, 3), random(2, 3))
    for options, message in (
        ({"heads": 5}, "num_heads: expected a divisor of dim, 24, got 5"),
        ({"bits": 33}, "bits: expected 1 to 32, got 33"),
        ({"supports": 0}, "supports: expected at least 1, got 0"),
        ({"self_term": "none"}, "self_term: expected 'own' or 'all', got 'none'"),
        ({"offset": 8}, "offset: expected None, 'power_of_two' or a number above bits=8, got 8"),
        ({"offset": "big"}, "offset: expected None, 'power_of_two' or a number above bits=8, got 'big'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            attention(**options)


# --- whether it is fitted -----------------------------------------------------------------------------------------------
def test_nothing_runs_before_it_is_fitted() -> None:
    layer = attention()
    with pytest.raises(RuntimeError, match=r"the hash functions are not fitted; call mmkernels\.nn\.fit_hash"):
        layer(random(2, 30, 24))
    with pytest.raises(ValueError, match=r"^x: expected \[B, N, 24\]"):
        layer(random(30, 24))


def test_the_state_says_whether_it_is_fitted() -> None:
    layer, x = attention().eval(), random(2, 30, 24)
    blank = saved(layer)
    fit_hash(layer, x, iterations=2)
    expected = layer(x)
    state = saved(layer)
    assert {name.split(".")[0] for name in state} == {
        "to_qk",
        "to_v",
        "proj",
        "supports",
        "projection",
        "mean",
        "_extra_state",
    }
    fresh = attention(seed=9).eval()
    fresh.load_state_dict(state)
    assert fresh.is_trained and torch.equal(fresh(x), expected)
    fresh.load_state_dict(blank)
    assert not fresh.is_trained
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="_extra_state"):
        fresh.load_state_dict(state)
    assert copy.deepcopy(layer).is_trained and "is_trained=True" in repr(layer)


def test_published_hash_functions_count_where_there_are_any() -> None:
    tensors, params = golden("block_small")
    block = attention(params["C"], params["H"], bits=params["nbits"], supports=params["m"])
    state = published_block(tensors)
    state["fast_attention.ksh.anchor"] = torch.zeros_like(state["fast_attention.ksh.anchor"])
    block.load_state_dict(state)
    assert not block.is_trained
    state["fast_attention.ksh.A"] = torch.zeros(2, 16, 9)
    with pytest.raises(RuntimeError, match="size mismatch for projection"):
        block.load_state_dict(state)


@pytest.mark.parametrize("kernels", [True, False])
def test_attention_compiles_as_one_graph(kernels: bool) -> None:
    torch.compiler.reset()
    layer, x = attention(kernels=kernels), random(2, 30, 24)
    fit_hash(layer, x, iterations=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


# --- the models ---------------------------------------------------------------------------------------------------------
SMALL: dict[str, Any] = {
    "dims": (16, 24, 32),
    "num_heads": (1, 2, 4),
    "depths": (1, 2, 2),
    "mlp_ratios": (2, 2, 2),
    "sr_ratios": (4, 2, 1),
    "in_channels": 2,
    "num_classes": 7,
    "bits": 8,
    "supports": 6,
}


def pvt(**options: Any) -> PvtV2:
    return PvtV2(**{**SMALL, "patch_size": 3, "stride": 2, **options})


def twins(**options: Any) -> TwinsSvt:
    return TwinsSvt(**{**SMALL, "patch_size": 2, "window": 3, **options})


MAKERS: list[Callable[..., Pyramid]] = [pvt, twins]


def perturbed(model: Pyramid) -> Pyramid:
    """What starts at 0 or 1, or so small that a layer hardly counts, would hide a mistake in its use."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
            elif weight.dim() == 2:
                weight *= 5
    return model


def margin(model: Pyramid, images: Tensor) -> float:
    """How far from 0 the closest pre-activation of any hash function is."""
    closest: list[float] = []

    def look(layer: HashAttention, args: tuple[Any, ...]) -> None:
        qk = layer.heads_of(layer.to_qk(args[0]))
        y = reference.preactivations(qk, layer.supports, layer.projection, layer.mean)
        closest.append(float(y.abs().min()))

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, HashAttention)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return min(closest, default=1.0)


def run_model(model: Pyramid, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits and all gradients."""
    model = copy.deepcopy(model).to(dtype)
    images = images.to(dtype, copy=True).requires_grad_()
    logits = model(images)
    logits.backward(random(*logits.shape, seed=3).to(dtype))
    return {"logits": logits.detach(), "images": images.grad} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["hash", "linear", "softmax"])
@pytest.mark.parametrize("make", MAKERS)
def test_kernels_equal_plain_torch(make: Callable[..., Pyramid], kind: str) -> None:
    images = random(2, 2, 16, 24, seed=2 if make is pvt else 4)
    model = perturbed(make(attention=kind))
    if kind == "hash":
        fit_hash(model, images, top_k=4, iterations=3)
        # Where a pre-activation is within rounding of 0, its sign is anybody's.
        assert margin(model, images) > 5e-5
    assert model.kernels
    mk.last_kernels(clear=True)
    ours = run_model(model, images, torch.float32)
    attended = {"hash": "ecoformer_attention", "linear": "linear_attention", "softmax": "attention"}[kind]
    assert {"linear", attended, f"{attended}_backward"} <= ran()
    model.kernels = False
    assert not model.kernels
    plain, exact = run_model(model, images, torch.float32), run_model(model, images, torch.float64)
    assert ran() == set()
    for name, oracle in exact.items():
        assert_within_rule(ours[name], plain[name], oracle, name)


@pytest.mark.parametrize("make", MAKERS)
def test_attention_of_each_stage(make: Callable[..., Pyramid]) -> None:
    def kinds(model: Pyramid) -> list[str]:
        layers = [m for m in model.modules() if isinstance(m, (HashAttention, GlobalAttention, LocalAttention))]
        return ["linear" if getattr(m, "linear", False) else type(m).__name__ for m in layers]

    last = ["GlobalAttention"] * 2
    assert kinds(make()) == ["HashAttention"] * 3 + last
    assert kinds(make(attention="linear")) == ["linear"] * 3 + last
    softmax = ["GlobalAttention"] * 5
    if make is twins:
        softmax[0] = softmax[1] = softmax[3] = "LocalAttention"
    assert kinds(make(attention="softmax")) == softmax


@pytest.mark.parametrize("kernels", [True, False])
def test_windows_are_padded_before_the_projection(kernels: bool) -> None:
    layer = LocalAttention(8, 2, 3, kernels=kernels)
    x = random(2, 4 * 5, 8)
    padded = torch.nn.functional.pad(x.view(2, 4, 5, 8), (0, 0, 0, 1, 0, 2))
    windows = padded.view(2, 2, 3, 2, 3, 8).transpose(2, 3).reshape(8, 9, 8)
    q, k, v = layer.qkv(windows).view(8, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 2, 2, 3, 3, 8)
    expected = layer.proj(attended.transpose(2, 3).reshape(2, 6, 6, 8)[:, :4, :5].reshape(2, 20, 8))
    torch.testing.assert_close(layer(x, (4, 5)), expected)


@pytest.mark.parametrize("make", MAKERS)
def test_states_of_models_round_trip(make: Callable[..., Pyramid]) -> None:
    images = random(2, 2, 16, 16)
    model = make().eval()
    with pytest.raises(RuntimeError, match="not fitted"):
        model(images)
    fits = fit_hash(model, images, top_k=4, iterations=2)
    assert len(fits) == 3
    other = make(seed=4).eval()
    assert not torch.equal(other.head.weight, model.head.weight)
    other.load_state_dict(saved(model))
    with torch.no_grad():
        assert torch.equal(other(images), model(images))
    assert all(torch.equal(v, make(seed=4).state_dict()[n]) for n, v in make(seed=4).state_dict().items())


def shapes_of(name: str, **options: Any) -> Pyramid:
    """A model whose weights take no memory and no time."""
    with torch.device("meta"):
        return create_model(name, **options)


def test_models_are_listed_and_made() -> None:
    names = [*(f"pvt_v2_b{i}_ecoformer" for i in range(5)), "twins_svt_small_ecoformer"]
    assert set(names) <= set(list_models())
    # timm's own counts of parameters, softmax attention included.
    for name, parameters in (("pvt_v2_b0_ecoformer", 3_666_760), ("twins_svt_small_ecoformer", 24_060_776)):
        model = shapes_of(name, attention="softmax", kernels=False)
        assert sum(p.numel() for p in model.parameters()) == parameters and not model.kernels
    hashed = shapes_of("pvt_v2_b0_ecoformer", num_classes=5, bits=12, supports=9, self_term="all", offset="power_of_two")
    layer = hashed.stages[1].blocks[1].attn
    assert (layer.bits, layer.supports.shape, layer.self_term, layer.offset) == (12, (2, 9, 32), "all", "power_of_two")
    assert hashed.head.out_features == 5


def test_bad_models_and_images() -> None:
    for make in MAKERS:
        with pytest.raises(ValueError, match=r"^attention: expected one of hash, linear, softmax, got 'sparse'"):
            make(attention="sparse")
        with pytest.raises(ValueError, match=r"^depths: expected one for each of the 3 stages, got 2"):
            make(depths=(1, 1))
        for bad in (random(2, 3, 16, 16), random(2, 2, 7, 16), random(2, 16, 16)):
            with pytest.raises(ValueError, match=r"^images: expected \[B, 2, height, width\] with edges"):
                make(attention="linear")(bad)
    with pytest.raises(ValueError, match="multiples of 8"):
        twins(attention="linear")(random(2, 2, 20, 16))
    assert pvt(attention="linear")(random(2, 2, 19, 21)).shape == (2, 7)


# --- weights of others --------------------------------------------------------------------------------------------------
def like_timm(make: Callable[..., Pyramid]) -> dict[str, Tensor]:
    """Random weights by timm's names, which are written out here."""
    dims, depths, reductions, inner = (16, 24, 32), (1, 2, 2), (4, 2, 1), (32, 48, 64)
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, dim: int) -> None:
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def layer(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        before = 2 if i == 0 else dims[i - 1]
        if make is pvt:
            patches, size = ("patch_embed" if i == 0 else f"stages.{i}.downsample"), 3
            norm(f"stages.{i}.norm", dim)
        else:
            patches, size = f"patch_embeds.{i}", 2
            layer(f"pos_block.{i}.proj.0", dim, 1, 3, 3)
        layer(f"{patches}.proj", dim, before, size, size)
        norm(f"{patches}.norm", dim)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}" if make is pvt else f"blocks.{i}.{j}"
            norm(f"{block}.norm1", dim)
            norm(f"{block}.norm2", dim)
            layer(f"{block}.attn.proj", dim, dim)
            if make is twins and j == 0:
                layer(f"{block}.attn.qkv", 3 * dim, dim)
            else:
                layer(f"{block}.attn.q", dim, dim)
                layer(f"{block}.attn.kv", 2 * dim, dim)
                if reductions[i] > 1:
                    layer(f"{block}.attn.sr", dim, dim, reductions[i], reductions[i])
                    norm(f"{block}.attn.norm", dim)
            layer(f"{block}.mlp.fc1", inner[i], dim)
            layer(f"{block}.mlp.fc2", dim, inner[i])
            if make is pvt:
                layer(f"{block}.mlp.dwconv", inner[i], 1, 3, 3)
    if make is twins:
        norm("norm", dims[-1])
    layer("head", 7, dims[-1])
    return {name: random(*shape, seed=i) / 10 for i, (name, shape) in enumerate(shapes.items())}


def like_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """PVT's state by the names of the published code."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("mlp.dwconv", "mlp.dwconv.dwconv").replace("patch_embed.", "patch_embed1.")
        for i in range(3):
            name = name.replace(f"stages.{i}.downsample", f"patch_embed{i + 1}").replace(
                f"stages.{i}.blocks", f"block{i + 1}"
            )
            name = name.replace(f"stages.{i}.norm", f"norm{i + 1}")
        renamed[name] = value
    return renamed


def attentions(model: Pyramid) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (HashAttention, GlobalAttention, LocalAttention))}


@pytest.mark.parametrize("make", MAKERS)
def test_softmax_weights_load_as_they_are(make: Callable[..., Pyramid]) -> None:
    state = like_timm(make)
    model = make(attention="softmax")
    assert model.load_pretrained(state) == []
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.load_state_dict(state)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["hash", "linear"])
def test_softmax_weights_become_those_of_other_attention(make: Callable[..., Pyramid], kind: str) -> None:
    state, images = like_timm(make), random(2, 2, 16, 16)
    model = make(attention=kind)
    if kind == "hash":
        fit_hash(model, images, top_k=4, iterations=0)
    unused = model.load_pretrained(state)
    reduced = [name for name in state if ".attn.sr." in name or ".attn.norm." in name]
    assert unused == reduced and len(reduced) > 0
    for name, layer in attentions(model).items():
        for part in ("weight", "bias"):
            if f"{name}.qkv.{part}" in state:
                q, k, v = state[f"{name}.qkv.{part}"].chunk(3)
            else:
                q, (k, v) = state[f"{name}.q.{part}"], state[f"{name}.kv.{part}"].chunk(2)
            if isinstance(layer, HashAttention):
                assert torch.equal(getattr(layer.to_qk, part), q) and torch.equal(getattr(layer.to_v, part), v)
                assert not layer.is_trained  # it was, of other weights
            else:
                assert torch.equal(getattr(layer.q, part), q) and torch.equal(getattr(layer.kv, part), torch.cat((k, v)))
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in state.items() if name in own)
    if kind == "hash":
        fit_hash(model, images, top_k=4, iterations=2)
        assert model(images).isfinite().all()


def test_published_names_load() -> None:
    state, images = like_timm(pvt), random(2, 2, 16, 16)
    softmax = pvt(attention="softmax").eval()
    softmax.load_pretrained(state)
    other = pvt(attention="softmax", seed=5).eval()
    assert other.load_pretrained(like_published(state)) == []
    with torch.no_grad():
        assert torch.equal(other(images), softmax(images))
    # The published EcoFormer: qkv in the last stage, hash functions by their own names.
    hashed = pvt().eval()
    hashed.load_pretrained(state)
    fit_hash(hashed, images, top_k=4, iterations=2)
    published = {}
    for name, value in hashed.state_dict().items():
        prefix, _, part = name.rpartition(".")
        names = {"supports": "anchor", "projection": "A", "mean": "mvec"}
        if part in names:
            shaped = value if part == "projection" else value[None] if part == "supports" else value[None, :, None]
            published[f"{prefix}.fast_attention.ksh.{names[part]}"] = shaped
        elif ".attn.q." in name:
            published[name.replace(".q.", ".qkv.")] = torch.cat((value, hashed.state_dict()[name.replace(".q.", ".kv.")]))
        elif part != "_extra_state" and ".attn.kv." not in name:
            published[name] = value
    published = like_published(published)
    published["block1.0.attn.fast_attention.projection_matrix"] = torch.zeros(3, 16)
    again = pvt(seed=6).eval()
    assert again.load_pretrained(published) == ["stages.0.blocks.0.attn.fast_attention.projection_matrix"]
    with torch.no_grad():
        assert torch.equal(again(images), hashed(images))


def test_hashed_weights_become_softmax_attention_with_one_query_and_key() -> None:
    hashed = pvt()
    softmax = pvt(attention="softmax", sr_ratios=(1, 1, 1), seed=8)
    unused = softmax.load_pretrained(hashed.state_dict())
    assert {name.rpartition(".")[2] for name in unused} == {"supports", "projection", "mean", "_extra_state"}
    for name, layer in attentions(softmax).items():
        source = hashed.get_submodule(name)
        if isinstance(source, HashAttention):
            assert torch.equal(layer.q.weight, source.to_qk.weight)
            assert torch.equal(layer.kv.weight, torch.cat((source.to_qk.weight, source.to_v.weight)))


def test_what_is_missing_is_said_and_nothing_loaded() -> None:
    state = like_timm(pvt)
    model = pvt(attention="softmax")
    before = copy.deepcopy(model.state_dict())
    del state["stages.1.blocks.0.attn.sr.weight"], state["head.bias"]
    with pytest.raises(
        ValueError, match=r"^state_dict: expected stages\.1\.blocks\.0\.attn\.sr\.weight, head\.bias in it too"
    ):
        model.load_pretrained(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = like_timm(pvt)
    state["head.weight"], state["head.bias"] = random(9, 32), random(9)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        model.load_pretrained(state)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "twins_svt_small"])
def test_softmax_models_give_what_timm_gives(name: str) -> None:
    try:
        import timm
    except Exception as error:  # also where timm is there and its torchvision does not fit this torch
        pytest.skip(f"timm: {error}")
    theirs = perturbed(timm.create_model(name).eval())
    ours = create_model(f"{name}_ecoformer", attention="softmax").eval()
    assert ours.load_pretrained(theirs.state_dict()) == []
    images = random(1, 3, 224, 224)
    with torch.no_grad():
        got, plain = ours(images), theirs(images)
        assert_within_rule(got, plain, theirs.double()(images.double()), name, extra=1e-6 * float(plain.abs().max()))


# --- energy -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "multiplications", "additions", "energy"),
    [
        ("pvt_v2_b0", 0.54, 0.56, 2.5),
        ("pvt_v2_b1", 2.03, 2.09, 9.4),
        ("pvt_v2_b2", 3.85, 3.97, 17.8),
        # The table has 6.75 additions; its own energy, of the same counts, has 6.72.
        ("pvt_v2_b3", 6.54, 6.72, 30.25),
        ("pvt_v2_b4", 9.57, 9.82, 44.25),
        ("twins_svt_small", 2.72, 2.81, 12.6),
    ],
)
def test_energy_of_the_published_table(name: str, multiplications: float, additions: float, energy: float) -> None:
    total = count_operations(shapes_of(f"{name}_ecoformer")).total
    assert round(total.multiplications / 1e9, 2) == multiplications
    assert round(total.additions / 1e9, 2) == additions
    digits = len(str(energy).partition(".")[2])
    assert round(total.energy_pj / 1e9, digits) == energy


def test_energy_that_hashing_saves() -> None:
    """The abstract: 73 % less than standard attention, which has no spatial reduction."""
    hashed = count_operations(shapes_of("pvt_v2_b0_ecoformer"))
    standard = count_operations(shapes_of("pvt_v2_b0_ecoformer", attention="softmax", sr_ratios=(1, 1, 1, 1)))
    assert round(1 - hashed.total.energy_pj / standard.total.energy_pj, 2) == 0.73
    assert hashed.attention.energy_pj < 0.02 * standard.attention.energy_pj


def test_operations_by_hand() -> None:
    assert softmax_operations(5, 3, 2, 7) == Operations(2 * 5 * 3 * 14 + 2 * 15, 2 * 5 * 3 * 14)
    assert linear_operations(5, 2, 7) == Operations(2 * 5 * (2 * 49 + 14), 2 * 5 * (2 * 49 + 28))
    assert hash_operations(5, 2, 7, 4, 3) == Operations(2 * 5 * (6 + 12 + 4 + 1 + 7), 2 * 5 * (42 + 12 + 8 + 56 + 7))
    assert Operations(10, 100).energy_pj == pytest.approx(37 + 90)


@pytest.mark.parametrize("kind", ["hash", "linear", "softmax"])
@pytest.mark.parametrize("make", MAKERS)
def test_counts_follow_the_shapes(make: Callable[..., Pyramid], kind: str) -> None:
    model = make(attention=kind)
    one, three = count_operations(model, (16, 24)), count_operations(model, (16, 24), batch=3)
    assert three.total == one.total.times(3) and three.attention == one.attention.times(3)
    grids = ((8, 12), (4, 6), (2, 3))
    expected = Operations(0, 0)
    for i, (grid, depth) in enumerate(zip(grids, (1, 2, 2), strict=True)):
        tokens, heads, dim = grid[0] * grid[1], SMALL["num_heads"][i], SMALL["dims"][i]
        for j in range(depth):
            if kind == "softmax" and make is twins and j % 2 == 0:
                windows = -(-grid[0] // 3) * -(-grid[1] // 3)
                count = softmax_operations(9, 9, heads, dim // heads).times(windows)
            elif kind == "softmax" or i == 2:
                reduction = SMALL["sr_ratios"][i] if kind == "softmax" else 1
                count = softmax_operations(tokens, (grid[0] // reduction) * (grid[1] // reduction), heads, dim // heads)
            elif kind == "linear":
                count = linear_operations(tokens, heads, dim // heads)
            else:
                count = hash_operations(tokens, heads, dim // heads, 8, 6)
            expected = expected.plus(count)
    assert one.attention == expected
    assert model.kernels and next(model.parameters()).device.type == "cpu"
    if kind == "hash":
        assert not any(layer.is_trained for layer in model.modules() if isinstance(layer, HashAttention))


# --- the example --------------------------------------------------------------------------------------------------------
def test_the_example_runs() -> None:
    path = Path(__file__).parent.parent / "examples" / "ecoformer_digits.py"
    spec = importlib.util.spec_from_file_location("ecoformer_digits", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    labels = torch.arange(64) % 10
    images = random(64, 1, 8, 8)
    digits = example.Digits(images, labels, images[:20], labels[:20])
    results = example.compare(digits, 1, 1, 2, True, 0, Console(quiet=True))
    assert [result.kind for result in results] == ["softmax", "linear", "hash"]
    softmax, linear, hashed = results
    assert hashed.attention_nj < linear.attention_nj < softmax.attention_nj < softmax.total_nj
    assert all(0 <= accuracy <= 100 for result in results for accuracy in (result.before, result.after))
