"""RotaryAttention: against its formula, transformers' LLaMA and Qwen3 where they are installed, and errors."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from oracles import oracle
from support import assert_within_rule
from torch import Tensor

import mmkernels as mk
from mmkernels.nn import RotaryAttention, rotary_angles


def tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"num_kv_heads": 2, "bias": True},
    "normed": {"num_kv_heads": 1, "qk_norm": True, "head_dim": 10},
}


def make(name: str) -> RotaryAttention:
    torch.manual_seed(3)
    layer = RotaryAttention(24, 4, **OPTIONS[name])
    if layer.q_norm is not None:
        with torch.no_grad():
            layer.q_norm.weight.uniform_(0.5, 2)
    return layer


SEEN: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"is_causal": False},
    "documents": {"segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2]])},
    "mask": {"mask": torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) + torch.eye(7) > 0.4},
    "documents_all": {"segment_ids": torch.tensor([[0, 1, 0, 1, 1, 0, 1]]).expand(2, -1), "is_causal": False},
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_and_plain_torch_agree(name: str, seen: str) -> None:
    layer = make(name)
    x, residual = tokens(2, 7, 24), tokens(2, 7, 24, seed=6)

    def run(dtype: torch.dtype, kernels: bool) -> dict[str, Tensor]:
        module = copy.deepcopy(layer).to(dtype)
        module.kernels = kernels
        leaf = x.to(dtype).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out = module(leaf, rotary_angles(torch.arange(7), module.head_dim, dtype=wide), residual.to(dtype), **SEEN[seen])
        out.backward(tokens(*out.shape, seed=7).to(dtype))
        return {"out": out.detach(), "x": leaf.grad} | {n: p.grad for n, p in module.named_parameters()}

    exact, plain = run(torch.float64, False), run(torch.float32, False)
    mk.last_kernels(clear=True)
    ours = run(torch.float32, True)
    assert {"linear", "qk_norm_rope", "attention"} <= {op for op, _ in mk.last_kernels()}
    for key, wanted in exact.items():
        assert_within_rule(ours[key], plain[key], wanted, key, extra=1e-6 * float(wanted.abs().max()))


def test_definition() -> None:
    """Written out: each pair of channels (i, i + D / 2) turned by position * base^(-2 i / D), heads grouped, causal."""
    layer, x = make("grouped").double(), tokens(1, 5, 24).double()
    positions = torch.tensor([3.0, 4, 5, 9, 10], dtype=torch.float64)
    out = layer(x, rotary_angles(positions, 6, base=100.0, dtype=torch.float64))

    def turned(projected: Tensor) -> Tensor:
        pairs = torch.view_as_complex(torch.stack(projected.unflatten(-1, (-1, 2, 3)).unbind(-2), -1).contiguous())
        angle = positions[:, None] * 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((pairs.real, pairs.imag), -1)

    q, k = turned(layer.q_proj(x)), turned(layer.k_proj(x)).repeat_interleave(2, 2)
    v = layer.v_proj(x).unflatten(-1, (-1, 6)).repeat_interleave(2, 2)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 6**0.5
    weights = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    wanted = layer.o_proj(torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(2))
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_transformers_layers_load(kind: str) -> None:
    transformers = oracle("transformers")
    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    name = {"llama": "Llama", "qwen3": "Qwen3"}[kind]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6, attn_implementation="eager"
    )
    torch.manual_seed(0)
    theirs = getattr(module, f"{name}Attention")(config, 0)
    ours = RotaryAttention(24, 4, num_kv_heads=2, qk_norm=kind == "qwen3", eps=config.rms_norm_eps)
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, 9, 24)
    cos, sin = getattr(module, f"{name}RotaryEmbedding")(config)(x, torch.arange(9)[None])
    hidden = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    wanted = theirs(x, (cos, sin), attention_mask=hidden)[0]
    torch.testing.assert_close(ours(x, rotary_angles(torch.arange(9), 6)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_compiled(dtype: torch.dtype) -> None:
    layer, x = make("normed").eval(), tokens(2, 7, 24)
    angles = rotary_angles(torch.arange(7), 10)
    with torch.no_grad():
        wanted = layer(x, angles)
        half = copy.deepcopy(layer).to(dtype)
        out = torch.compile(half, backend="aot_eager", fullgraph=True)(x.to(dtype), angles)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=5e-2, atol=5e-2)
    torch._dynamo.reset()


def test_errors_name_the_argument() -> None:
    for call, message in (
        (lambda: RotaryAttention(24, 5), "num_heads: expected a divisor of dim, 24, got 5"),
        (lambda: RotaryAttention(24, 4, num_kv_heads=3), "num_kv_heads: expected a divisor of num_heads, 4, got 3"),
        (lambda: RotaryAttention(24, 0), "num_heads: expected at least 1 and"),
        (lambda: rotary_angles(torch.arange(3), 5), "channels: expected an even number, got 5"),
        (lambda: make("llama")(tokens(1, 5, 24), rotary_angles(torch.arange(4), 6)), "cos: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
