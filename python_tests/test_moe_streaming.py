"""Experts that are read while others compute: the same numbers as resident ones, two experts in memory, order, errors."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import assert_same_bits, assert_within_rule
from torch import Tensor

import mmkernels as mk
from mmkernels.nn import MoE

C, H, N = 24, 40, 17


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts_of(module: MoE) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters() if name[:2] in ("w_", "b_")}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"num_experts": 6, "top_k": 2},
    "gated": {"num_experts": 5, "top_k": 3, "gated": True, "activation": "silu", "bias": True, "out_dim": N},
    "m3vit": {"num_experts": 16, "top_k": 4, "kind": "softmax_topk", "bias": True, "num_tasks": 2},
    "one_slot": {"num_experts": 4, "top_k": 1, "kind": "sigmoid_topk", "bias": True},
    "shared": {"num_experts": 6, "top_k": 2, "shared_hidden": 16, "bias": True},
    "top_p": {"num_experts": 8, "top_k": None, "kind": "softmax_topk", "top_p": 0.5, "normalize": True},
    "capacity": {"num_experts": 4, "top_k": 2, "capacity_factor": 0.6},
    "expert_choice": {"num_experts": 4, "top_k": None, "kind": "expert_choice", "activation": "gelu_tanh"},
}


def pair(name: str, folder: Path | None, dtype: torch.dtype = torch.float32) -> tuple[MoE, MoE]:
    """A resident module and one that streams the same weights, from a file in the folder or from tensors."""
    torch.manual_seed(3)
    resident = MoE(C, H, **OPTIONS[name], dtype=dtype).eval()
    experts: Any = experts_of(resident)
    if folder is not None:
        save_file({f"layer.3.{key}": value for key, value in experts.items()}, folder / "experts.safetensors")
        experts = folder / "experts.safetensors"
    prefix = "" if folder is None else "layer.3."
    streaming = MoE(C, H, **OPTIONS[name], schedule="streaming", experts=experts, expert_prefix=prefix, dtype=dtype).eval()
    assert not experts_of(streaming)
    own = {key: value for key, value in resident.state_dict().items() if key not in experts_of(resident)}
    streaming.load_state_dict(own)  # strict
    return resident, streaming


# --- the numbers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "tensors"])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_bits_of_the_resident_schedule(name: str, from_file: bool, tmp_path: Path) -> None:
    resident, streaming = pair(name, tmp_path if from_file else None)
    mk.last_kernels(clear=True)
    for count in (1, 3, 50):
        x = tokens(2, count, C)
        wanted, routing = resident(x, return_routing=True)
        out, same = streaming(x, return_routing=True)
        assert torch.equal(same.expert_ids, routing.expert_ids)
        assert_same_bits(out, wanted, f"{name}, {count} tokens")
        residual = tokens(*out.shape, seed=6)
        assert_same_bits(streaming(x, residual=residual), resident(x, residual=residual), "with a residual")
    assert all(kernel.startswith("cpu/") for _, kernel in mk.last_kernels())
    with torch.inference_mode():
        assert_same_bits(streaming(x), wanted, "in inference mode")
    torch.set_num_threads(2)
    assert_same_bits(streaming(x), wanted, "after it, with two threads")
    assert_same_bits(streaming(x[:, :0]), resident(x[:, :0]), "no tokens")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gated", "m3vit", "shared"])
@torch.no_grad()
def test_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    resident, streaming = pair(name, tmp_path, dtype)
    x = tokens(2, 9, C, dtype=dtype)
    plain, exact = copy.deepcopy(resident), copy.deepcopy(resident).double()
    plain.kernels = exact.kernels = False
    oracle = exact(x.double())
    assert_within_rule(streaming(x), plain(x), oracle, "streaming")
    streaming.kernels = False
    assert_within_rule(streaming(x), plain(x), oracle, "plain torch")
    if dtype == torch.float64:
        streaming.kernels = True
        assert_same_bits(streaming(x), resident(x), "float64")


@torch.no_grad()
def test_plain_torch_and_autocast(tmp_path: Path) -> None:
    resident, streaming = pair("gated", tmp_path)
    x = tokens(2, 9, C)
    wanted = resident(x)
    streaming.kernels = False
    mk.last_kernels(clear=True)
    torch.testing.assert_close(streaming(x), wanted)
    assert {op for op, _ in mk.last_kernels()} <= {"expert_order"}
    streaming.kernels = True
    with torch.autocast("cpu", torch.bfloat16):
        out = streaming(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=3e-2, atol=3e-2)


# --- the schedule -----------------------------------------------------------------------------------------------------
class Watched:
    """A source whose reads are written down, each with its thread and its buffer."""

    def __init__(self, source: Any) -> None:
        self.source, self.reads = source, []

    def read(self, expert: int, into: dict[str, Tensor]) -> None:
        self.reads.append((expert, threading.get_ident(), next(iter(into.values())).data_ptr()))
        self.source.read(expert, into)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@torch.no_grad()
def test_experts_in_their_order_without_empty_ones(tmp_path: Path) -> None:
    resident, streaming = pair("m3vit", tmp_path)
    watched = streaming.stream.source = Watched(streaming.stream.source)
    x = tokens(2, C)
    _, routing = streaming(x, return_routing=True)
    used = sorted(set(routing.expert_ids.flatten().tolist()))
    assert 1 < len(used) < 16
    assert [expert for expert, _, _ in watched.reads] == used
    assert {thread for _, thread, _ in watched.reads}.isdisjoint({threading.get_ident()})
    pointers = [pointer for _, _, pointer in watched.reads]
    assert len(set(pointers)) == 2 and pointers == [pointers[i % 2] for i in range(len(used))]
    # Another task costs no more than another pass: the weights of two experts, whatever the gate.
    before = streaming.stream.buffer_bytes
    assert_same_bits(streaming(x, 1), resident(x, 1), "the other task")
    assert streaming.stream.buffer_bytes == before


@torch.no_grad()
def test_the_next_expert_is_read_while_one_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.nn import expert_streaming

    resident, streaming = pair("plain", tmp_path)
    x = tokens(40, C)
    wanted = resident(x)
    started = [threading.Event() for _ in range(7)]

    class Reader(Watched):
        def read(self, expert: int, into: dict[str, Tensor]) -> None:
            started[expert].set()
            super().read(expert, into)

    streaming.stream.source = Reader(streaming.stream.source)
    computed: list[int] = []

    def compute(*args: Any, **options: Any) -> Tensor:
        expert = len(computed)
        computed.append(expert)
        # Were the next one read only after this one, it would never start.
        assert expert == 5 or started[expert + 1].wait(20)
        # And the one after it has no buffer yet.
        assert not started[expert + 2].is_set() if expert < 4 else True
        return mk.moe_mlp(*args, **options)

    monkeypatch.setattr(expert_streaming, "moe_mlp", compute)
    assert_same_bits(streaming(x), wanted, "out")
    assert computed == list(range(6))


@torch.no_grad()
def test_calls_from_several_threads_take_turns(tmp_path: Path) -> None:
    resident, streaming = pair("m3vit", tmp_path)
    inputs = [tokens(9, C, seed=seed) for seed in range(6)]
    results: dict[int, Tensor] = {}

    def call(index: int) -> None:
        with torch.no_grad():
            results[index] = streaming(inputs[index])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, x in enumerate(inputs):
        assert_same_bits(results[index], resident(x), f"thread {index}")


@torch.no_grad()
def test_an_error_while_reading_reaches_the_caller(tmp_path: Path) -> None:
    _, streaming = pair("plain", tmp_path)
    x = tokens(40, C)
    wanted = streaming(x)

    class Broken(Watched):
        def read(self, expert: int, into: dict[str, Tensor]) -> None:
            if expert == 2:
                raise OSError("the disk is gone")
            super().read(expert, into)

    source = streaming.stream.source
    streaming.stream.source = Broken(source)
    with pytest.raises(OSError, match="the disk is gone"):
        streaming(x)
    streaming.stream.source = source
    assert_same_bits(streaming(x), wanted, "afterwards")


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "tensors"])
@torch.no_grad()
def test_copies_and_pickles(from_file: bool, tmp_path: Path) -> None:
    resident, streaming = pair("gated", tmp_path if from_file else None)
    x = tokens(7, C)
    wanted = resident(x)
    for _ in range(2):  # before the first call, and with buffers
        for module in (copy.deepcopy(streaming), pickle.loads(pickle.dumps(streaming))):
            assert module.stream.buffer_bytes == 0
            assert_same_bits(module(x), wanted, "copy")
        assert_same_bits(streaming(x), wanted, "itself")
    assert set(streaming.state_dict()) == {"router"}


# --- memory -----------------------------------------------------------------------------------------------------------
MEASURE = """
import json, sys
import safetensors.torch, torch
from mmkernels.nn import MoE

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

experts, schedule, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
streams = schedule == "streaming"
x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    # What first calls take besides weights: libraries, scratch, a thread.
    warm = MoE(512, 1024, 2, 2).eval()
    warm(x)
    weights = {"w_in": warm.w_in, "w_out": warm.w_out}
    MoE(512, 1024, 2, 2, schedule="streaming", experts=weights).eval()(x)
    del warm, weights
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    module = MoE(512, 1024, experts, 2, schedule=schedule, experts=path if streams else None).eval()
    for _ in range(2):
        _, routing = module(x, return_routing=True)
print(json.dumps({
    "growth": status("VmHWM") - before,
    "buffers": module.stream.buffer_bytes if streams else 0,
    "used": len(routing.expert_ids.unique()),
}))
"""
ONE_EXPERT = 2 * 512 * 1024 * 4


def measured(experts: int, schedule: str, path: Path) -> dict[str, int]:
    command = [sys.executable, "-c", MEASURE, str(experts), schedule, str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_two_experts_are_resident_whatever_their_number(tmp_path: Path) -> None:
    found = {}
    for experts in (4, 32):
        path = tmp_path / f"{experts}.safetensors"
        weights = torch.randn(experts, 1024, 512) / 32
        save_file({"w_in": weights, "w_out": weights.view(experts, 512, 1024).clone()}, path)
        found[experts] = measured(experts, "streaming", path)
        assert found[experts]["used"] == experts
        assert found[experts]["buffers"] == 2 * ONE_EXPERT
    resident = measured(32, "resident", path)
    print({name: f"{of['growth'] / 2**20:.1f} MiB" for name, of in {**found, "resident": resident}.items()})
    # Two buffers, the pages of the expert that is being read, and what computing takes, all of which E has no part in.
    assert found[32]["growth"] < 8 * ONE_EXPERT
    assert abs(found[32]["growth"] - found[4]["growth"]) < 2 * ONE_EXPERT
    assert resident["growth"] > 30 * ONE_EXPERT


# --- errors -----------------------------------------------------------------------------------------------------------
def test_errors(tmp_path: Path) -> None:
    resident, streaming = pair("gated", tmp_path)
    x = tokens(5, C)
    with pytest.raises(RuntimeError, match=r"schedule: 'streaming' is for inference; expected a call under torch.no_grad"):
        streaming(x)
    experts = experts_of(resident)
    options: dict[str, Any] = {**OPTIONS["gated"], "schedule": "streaming"}
    missing = {name: value for name, value in experts.items() if name != "b_gate"}
    for source, message in (
        (missing, r"experts: expected b_gate of shape \(5, 40\), which is not there"),
        ({**experts, "w_in": experts["w_out"]}, r"experts: expected w_in of shape \(5, 40, 24\), got \(5, 17, 40\)"),
        (tmp_path / "none.safetensors", "experts: expected a safetensors file, got '.*none.safetensors'"),
        (tmp_path / "experts.safetensors", r"experts: expected w_in of shape \(5, 40, 24\), which is not there"),
        (3, "experts: expected a path or a mapping of tensors, got int"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            MoE(C, H, **options, experts=source)
    with pytest.raises(ValueError, match="lora_rank: expected 0 with schedule 'streaming', got 2"):
        MoE(C, H, **options, experts=experts, lora_rank=2)
    with torch.no_grad(), pytest.raises(TypeError, match=r"expected the dtype of x, torch.bfloat16, got torch.float32"):
        streaming(x.bfloat16())
