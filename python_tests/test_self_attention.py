"""SelfAttention: against the formula in float64 and in plain torch, kernels on and off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_within_rule
from torch import Tensor

import mmkernels as mk
from mmkernels.nn import SelfAttention

B, N, C, H = 2, 9, 24, 3

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "qk_norm": ({"qk_norm": True, "qkv_bias": False}, {"residual": True}),
    "narrow heads": ({"head_dim": 5, "proj_bias": False}, {"residual": True}),
    "causal": ({}, {"is_causal": True}),
    "causal and masked": ({}, {"is_causal": True, "mask": True, "residual": True}),
    "biased": ({}, {"bias": True, "mask": True}),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    made: dict[str, Any] = {"is_causal": options.get("is_causal", False)}
    if "residual" in options:
        made["residual"] = random(B, N, C, seed=1).to(dtype)
    if "mask" in options:
        made["mask"] = (random(B, 1, N, N, seed=2) > 0) | torch.eye(N, dtype=torch.bool)
    if "bias" in options:
        made["bias"] = random(1, H, N, N, seed=3).to(dtype)
    return made


def formula(
    module: SelfAttention,
    x: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    q, k, v = F.linear(x, module.qkv.weight, module.qkv.bias).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
    for norm, name in ((module.q_norm, "q"), (module.k_norm, "k")):
        if isinstance(norm, mk.nn.LayerNorm):
            normed = F.layer_norm(q if name == "q" else k, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            q, k = (normed, k) if name == "q" else (q, normed)
    scores = q @ k.transpose(-1, -2) * module.head_dim**-0.5
    if bias is not None:
        scores = scores + bias
    if is_causal:
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out = F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), module.proj.weight, module.proj.bias)
    return out if residual is None else out + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_is_the_formula(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    build, call = CASES[name]
    module = SelfAttention(C, H, **build).eval().to(dtype)
    exact = copy.deepcopy(module).double()
    x, upstream = random(B, N, C, seed=0).to(dtype), random(B, N, C, seed=4)
    results: dict[str, list[Tensor]] = {}
    for kind in ("kernels", "plain torch", "formula", "float64"):
        used = exact if kind == "float64" else module
        number = torch.float64 if kind == "float64" else dtype
        used.kernels = kind == "kernels"
        arguments = given(call, number)
        if "residual" in arguments:
            arguments["residual"] = given(call, dtype)["residual"].to(number)
        if "bias" in arguments:
            arguments["bias"] = given(call, dtype)["bias"].to(number).requires_grad_()
        at = x.to(number).detach().requires_grad_()
        run = used if kind in ("kernels", "plain torch") else lambda x, m=used, **a: formula(m, x, **a)
        mk.last_kernels(clear=True)
        out = run(at, **arguments)
        ran = {op for op, _ in mk.last_kernels()}
        assert ran == ({"linear", "attention"} if kind == "kernels" else set()) | (
            {"norm"} if kind == "kernels" and "qk_norm" in build else set()
        )
        leaves = [at, *used.parameters(), *([arguments["bias"]] if "bias" in arguments else [])]
        results[kind] = [out, *torch.autograd.grad(out, leaves, upstream.to(number))]
    for kind in ("kernels", "plain torch"):
        for i, (ours, theirs, oracle) in enumerate(zip(results[kind], results["formula"], results["float64"], strict=True)):
            # The bias of keys has no gradient but rounding.
            extra = 8 * torch.finfo(dtype).eps * results["float64"][1].abs().max().item() if i > 1 else 0.0
            assert_within_rule(ours, theirs, oracle, f"{name}, {kind}, {i}", extra=extra)


def test_arguments_and_names() -> None:
    assert list(SelfAttention(C, H).state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim, 24, got 5"):
        SelfAttention(C, 5)
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        SelfAttention(C, H, dropout=1.0)
    module = SelfAttention(C, H, dropout=0.5).train()
    x = random(B, N, C, seed=0)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_compiled() -> None:
    module, x = SelfAttention(C, H, qk_norm=True).eval(), random(B, N, C, seed=0)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x, is_causal=True), module(x, x, is_causal=True))
