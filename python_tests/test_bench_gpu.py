"""The benchmark's cases for a GPU, at sizes that a CPU has time for: every peer computes what ours does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import CPU, as_tuple
from torch import Tensor

from mmkernels.bench.contest import Contest, contestant_names
from mmkernels.bench.selection import select
from mmkernels.cards import (
    all_cards,
    attention_gpu,
    hash_attention,
    moe,
    norm,
    peers,
    qk_norm_rope,
    token_roll,
    window_attention,
)
from mmkernels.cards.card import BenchCase, Make

CASES = [case for _, case, _ in select(all_cards(), device="cuda").cases if case.devices == ("cuda",)]


def small(case: BenchCase, monkeypatch: pytest.MonkeyPatch) -> BenchCase:
    """The case with a call as its own makes, of few numbers."""
    family, _, rest = case.name.partition(".gpu.")
    if family == "attention":
        kwargs = {"is_causal": True} if "causal" in rest else {}
        biased = rest.startswith(("window", "bias"))
        return replace(case, make=attention_gpu._call(2, 3, 16, 8, bias=biased, **kwargs))
    if family == "window_attention":
        grid = (9, 6) if "64x56x56" in rest else (4, 6, 2)
        return replace(case, make=window_attention._gpu_call(2, grid, 8, 2, (3, 3) if len(grid) == 2 else (2, 2, 2)))
    if family == "moe_mlp":
        return replace(case, make=moe._gpu_call(24, 5, 2, 8, 16))
    if family == "ecoformer_attention":
        return replace(case, make=hash_attention._ecoformer(2, 2, 9, 4, 4, supports=5, bits=16))
    if family == "hash_attention":
        return replace(case, make=hash_attention._codes_and_signs(2, 2, 9, 4, 16))
    for module, name, value in (
        (norm, "_GPU_ROWS", 512),
        (norm, "_GPU_CHANNELS", 8),
        (token_roll, "_GPU_SHAPE", (8, 17, 8)),
        (qk_norm_rope, "_GPU_SIZES", (1, 5, 8)),
    ):
        monkeypatch.setattr(module, name, value)
    return case


def leave_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a contest compiles; FlexAttention goes through the compiler by itself."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: f if how == {"dynamic": False} else compile_(f, **how))


def results_of(case: BenchCase, function: Callable[..., Any]) -> list[Tensor]:
    """The outputs, or the gradients where the case has them."""
    call = case.make(CPU, torch.float32, torch.Generator().manual_seed(1))
    if not case.backward:
        return [o for o in as_tuple(call.of(function)) if isinstance(o, Tensor)]
    call = call.map_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
    leaves = [t for t in call.tensors() if t.requires_grad]
    out = as_tuple(call.of(function))[0]
    return list(torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peers_compute_the_same(case: BenchCase, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_uncompiled(monkeypatch)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: nullcontext())
    case = small(case, monkeypatch)
    ours = results_of(case, case.run)
    for name, peer in case.peers.items():
        if name in ("flash_attn", "clone") or (case.backward and name == "flex"):
            continue  # not on the CPU; a clone only moves as much
        theirs = results_of(case, peer)
        if case.name.endswith(".softmax"):
            assert theirs[0].shape == ours[0].shape
            continue
        assert len(theirs) == len(ours)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), atol=2e-4, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contests_are_prepared(case: BenchCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the kernels of a GPU are named as failed, and nothing else is."""
    leave_uncompiled(monkeypatch)
    case = small(case, monkeypatch)
    contest = Contest(case, "cpu", torch.float32)
    assert set(contest.failed) <= {"sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "flash_attn", "flex", "grouped_mm"}
    assert contest.cost.bytes > 0 and {*contest.steps, *contest.failed} == set(contestant_names(case))


def test_every_judged_shape_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was promised for a GPU, and in which form."""
    targets = {case.name: case.target for case in CASES}
    for length, ratio in ((197, 1.2), (512, 1.2), (1024, 0.9), (4096, 0.9)):
        for channels in (64, 128):
            case = next(c for c in CASES if c.name == f"attention.gpu.L{length}_d{channels}")
            monkeypatch.setattr(attention_gpu, "drawer", lambda *_: lambda *shape: torch.empty(shape, device="meta"))
            q = case.make(CPU, torch.bfloat16, torch.Generator()).args[0]
            assert 16000 < q.size(0) * q.size(2) <= 16384 and q.shape[2:] == (length, channels)
            assert q.size(1) * q.size(3) == 2048
            assert case.target is not None and case.target.ratio == ratio and case.target.peers == ("sdpa",)
    for name, limit in (("T32768_E128_k8", 330), ("T32768_E128_k8.backward", 260), ("T8192_E128_k8", 290)):
        target = targets[f"moe_mlp.gpu.{name}"]
        assert target is not None and (target.ratio, target.of) == (limit, "TFLOP/s")
    for name, target in targets.items():
        if ".learned" in name or (name.startswith("window_attention") and name.endswith("backward")):
            assert target is not None and target.ratio == 2.0
        if ".gpu.tnt" in name or ".gpu.temporal" in name:
            assert target is not None and target.ratio == 3.0
        if "norm" in name.partition(".")[0] or name.startswith(("token_roll", "modulate")):
            assert name.endswith("backward") or (target is not None and (target.ratio, target.of) == (0.85, "floor"))
        assert target is None or target.of != "peers" or target.optional


def test_kernels_of_torch_are_forced_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: forced.append(backend) or nullcontext())
    q = torch.randn(1, 1, 4, 8)
    for peer in peers.of_each_kernel(peers.sdpa).values():
        peer(q, q, q)
    assert [backend.name for backend in forced] == ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]


def test_calls_are_drawn_where_they_are_needed() -> None:
    make: Make = attention_gpu._call(1, 1, 4, 8)
    first, again, other = (make(CPU, torch.float32, torch.Generator().manual_seed(seed)).args[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
