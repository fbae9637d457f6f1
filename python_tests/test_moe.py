"""Experts beyond what the generic suite asks: properties, packed and int8 weights, LoRA, memory, errors, threads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime
from mmkernels.reference import moe as reference


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def experts_of(experts: int, channels: int, hidden: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = generator(5)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtype)

    return {
        "w_in": normal(experts, hidden, channels),
        "w_out": normal(experts, channels, hidden),
        "w_gate": normal(experts, hidden, channels),
    }


def routing_of(tokens: int, experts: int, slots: int, seed: int = 0) -> mk.Routing:
    return mk.route(torch.randn(tokens, experts, generator=generator(seed)), slots)


# --- dispatch ---------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(0, 90), slots=st.integers(0, 4), experts=st.integers(1, 20), seed=st.integers(0, 9))
def test_the_inverse_of_the_order_is_exact(tokens: int, slots: int, experts: int, seed: int) -> None:
    ids = torch.randint(-1, experts, (tokens, slots), generator=generator(seed))
    order, offsets, positions = mk.dispatch(ids, experts)
    for ours, theirs in zip((order, offsets, positions), reference.dispatch(ids, experts), strict=True):
        assert torch.equal(ours, theirs)
    used = int(offsets[-1])
    assert used == int((ids >= 0).sum())
    slot = torch.arange(tokens * slots)
    flat = positions.flatten()
    assert torch.equal(order[flat[flat >= 0]], slot[flat >= 0])
    for expert in range(experts):
        mine = order[offsets[expert] : offsets[expert + 1]]
        assert (ids.flatten()[mine] == expert).all() and (mine.diff() > 0).all(), "stable"


def test_many_slots_are_sorted_in_chunks(threads: None) -> None:
    ids = torch.randint(-1, 37, (30000, 2), generator=generator())
    expected = reference.dispatch(ids, 37)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for ours, theirs in zip(mk.dispatch(ids, 37), expected, strict=True):
            assert torch.equal(ours, theirs)


# --- properties -------------------------------------------------------------------------------------------------------
def test_tokens_may_be_permuted(isa: str) -> None:
    """And a token's bits do not depend on which others are there."""
    x, weights = torch.randn(61, 24, generator=generator()), experts_of(6, 24, 40)
    routing = routing_of(61, 6, 3)
    out = mk.moe_mlp(x, routing, activation="silu", **weights)
    order = torch.randperm(61, generator=generator(1))[:40]
    some = mk.fixed_routing(routing.expert_ids[order], 6, routing.weights[order])
    assert_same_bits(mk.moe_mlp(x[order], some, activation="silu", **weights), out[order], "permuted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_experts_are_the_dense_layer(dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(33, 24, generator=generator()).to(dtype)
    weights = {name: w[:1].expand(5, -1, -1) for name, w in experts_of(5, 24, 40, dtype).items()}
    routing = routing_of(33, 5, 1)
    dense = mk.mlp(x, *(weights[n][0] for n in ("w_in", "w_out")), w_gate=weights["w_gate"][0], activation="silu")
    assert_same_bits(mk.moe_mlp(x, routing, activation="silu", **weights), dense, "one slot of weight 1")
    two = mk.moe_mlp(x, routing_of(33, 5, 2), activation="silu", **weights)
    torch.testing.assert_close(two, dense, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_unused_slots_count_for_nothing(isa: str) -> None:
    x, weights = torch.randn(9, 8, generator=generator()), experts_of(3, 8, 12)
    ids = torch.tensor([[0, -1], [-1, -1], [2, 1]] * 3)
    poisoned = torch.where(ids < 0, torch.nan, 0.5)  # whatever stands there
    out = mk.moe_mlp(x, mk.fixed_routing(ids, 3, poisoned), **weights)
    expected = mk.moe_mlp(x, mk.fixed_routing(ids, 3, torch.full((9, 2), 0.5)), **weights)
    assert_same_bits(out, expected, "unused slots")
    assert (out[1::3] == 0).all()


@pytest.mark.parametrize("spread", [1, 2, 200])
def test_one_thread_an_expert_or_all_in_each(spread: int, isa: str, threads: None) -> None:
    """Few rows an expert: an expert is one thread's; many: all share in each. The bits are the same."""
    x, weights = torch.randn(spread * 8, 40, generator=generator()), experts_of(16, 40, 72)
    routing = routing_of(spread * 8, 16, 2)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        inputs = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights.values())]
        out = mk.moe_mlp(inputs[0], routing, inputs[1], inputs[2], w_gate=inputs[3], activation="silu")
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(a, b, f"result {i}")


# --- weights kept packed ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, 150])
def test_packed_weights_give_the_same_bits(dtype: torch.dtype, tokens: int, isa: str) -> None:
    x = torch.randn(tokens, 40, generator=generator()).to(dtype)
    weights, routing = experts_of(4, 40, 72, dtype), routing_of(tokens, 4, 2)
    packed = {name: mk.pack_linear(w) for name, w in weights.items()}
    assert packed["w_in"].out_features == 72 and packed["w_in"].in_features == 40
    assert_same_bits(
        mk.moe_mlp(x, routing, activation="silu", **packed), mk.moe_mlp(x, routing, activation="silu", **weights), "packed"
    )
    ids, bias = routing.expert_ids[:, 0], torch.randn(4, 72, generator=generator()).to(dtype)
    assert_same_bits(
        mk.grouped_linear(x, ids, mk.pack_linear(weights["w_in"], bias)),
        mk.grouped_linear(x, ids, weights["w_in"], bias),
        "grouped",
    )


def test_packed_weights_follow_their_weights() -> None:
    x, weights, routing = torch.randn(7, 16, generator=generator()), experts_of(3, 16, 24), routing_of(7, 3, 2)
    packed = {name: mk.pack_linear(w) for name, w in weights.items()}
    before = mk.moe_mlp(x, routing, activation="silu", **packed)
    weights["w_in"][1] *= 2
    after = mk.moe_mlp(x, routing, activation="silu", **packed)
    assert not torch.equal(before, after)
    assert_same_bits(after, mk.moe_mlp(x, routing, activation="silu", **weights), "written to")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_experts(dtype: torch.dtype, isa: str) -> None:
    x, routing = torch.randn(50, 64, generator=generator()).to(dtype), routing_of(50, 4, 2)
    weights = experts_of(4, 64, 96, dtype)
    packed = {name: mk.pack_linear(w, dtype=torch.int8) for name, w in weights.items()}
    out = mk.moe_mlp(x, routing, activation="silu", **packed)
    truth = mk.moe_mlp(
        x.double(),
        mk.fixed_routing(routing.expert_ids, 4, routing.weights.double()),
        activation="silu",
        **{name: w.double() for name, w in weights.items()},
    )
    error = (out.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert 1e-4 < error < 0.03, "quantised, and no worse than 8 bits make it"
    one = mk.fixed_routing(torch.zeros(50, 1, dtype=torch.int64), 4)
    alone = [mk.pack_linear(weights[name][0].contiguous(), dtype=torch.int8) for name in ("w_in", "w_out", "w_gate")]
    assert_same_bits(
        mk.moe_mlp(x, one, activation="silu", **packed),
        mk.mlp(x, alone[0], alone[1], w_gate=alone[2], activation="silu"),
        "an expert is the dense layer",
    )


def test_packs_are_refused_where_they_do_not_fit() -> None:
    weights = experts_of(3, 8, 12)
    with pytest.raises(ValueError, match=r"^weight: "):
        mk.linear(torch.zeros(2, 8), mk.pack_linear(weights["w_in"]))
    with pytest.raises(ValueError, match=r"^weight: "):
        mk.grouped_linear(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), mk.pack_linear(weights["w_in"][0]))
    with pytest.raises(ValueError, match=r"^bias: "):
        mk.pack_linear(weights["w_in"], torch.zeros(12))


# --- LoRA -------------------------------------------------------------------------------------------------------------
def test_lora_is_the_sum_of_both_paths() -> None:
    x, weights, routing = torch.randn(20, 10, generator=generator()), experts_of(3, 10, 14), routing_of(20, 3, 2)
    g = generator(2)
    shapes = {"in": (14, 10), "out": (10, 14), "gate": (14, 10)}
    factors = {}
    for name, (rows, cols) in shapes.items():
        factors[f"down_{name}"] = torch.randn(3, 4, cols, generator=g).requires_grad_()
        factors[f"up_{name}"] = torch.randn(3, rows, 4, generator=g).requires_grad_()
    lora = mk.ExpertLora(0.5, **factors)
    ours = mk.moe_mlp(x, routing, activation="silu", lora=lora, **weights)
    expected = torch.zeros(20, 10)
    for token in range(20):
        for expert, weight in zip(routing.expert_ids[token].tolist(), routing.weights[token], strict=True):

            def pass_(value: Tensor, name: str, expert: int = expert) -> Tensor:
                low = factors[f"up_{name}"][expert] @ (factors[f"down_{name}"][expert] @ value)
                return weights[f"w_{name}"][expert] @ value + 0.5 * low

            hidden = torch.nn.functional.silu(pass_(x[token], "gate")) * pass_(x[token], "in")
            expected[token] = expected[token] + weight * pass_(hidden, "out")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    leaves = list(factors.values())
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-2)


# --- errors in the kernels' own pass ----------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [-2, 3, 2**40])
def test_an_expert_out_of_range_is_an_error(bad: int) -> None:
    ids = torch.zeros(40, 2, dtype=torch.int64)
    ids[17, 1] = bad
    weights = experts_of(3, 8, 12)
    with pytest.raises(ValueError, match=rf"^expert_ids: expected -1 to 2, got {bad} for token 17"):
        mk.moe_mlp(torch.zeros(40, 8), mk.fixed_routing(ids, 3), **weights)
    with pytest.raises(ValueError, match=rf"^group_ids: expected -1 to 2, got {bad} for token 17"):
        mk.grouped_linear(torch.zeros(40, 8), ids[:, 1].contiguous(), weights["w_in"])
    with pytest.raises(ValueError, match=rf"^expert_ids: expected -1 to 2, got {bad}"):
        mk.dispatch(ids, 3)


def test_a_compiled_call_with_a_wrong_id_raises() -> None:
    weights = experts_of(3, 8, 12)
    compiled = torch.compile(lambda x, ids: mk.grouped_linear(x, ids, weights["w_in"]), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="group_ids: expected -1 to 2, got 7"):
        compiled(torch.zeros(4, 8), torch.tensor([0, 1, 7, 2]))


def test_more_slots_in_use_than_promised() -> None:
    routing = mk.Routing(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2), 3, max_slots=7)
    with pytest.raises(ValueError, match=r"^max_slots: expected at least the slots in use, 8, got 7"):
        mk.moe_mlp(torch.zeros(4, 8), routing, **experts_of(3, 8, 12))


# --- whole models' calls ----------------------------------------------------------------------------------------------
def test_gradient_reaches_router_and_experts_through_a_compiled_layer() -> None:
    weights = {name: w.requires_grad_() for name, w in experts_of(4, 12, 16).items()}
    gate = torch.randn(4, 12, generator=generator()).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return mk.moe_mlp(x, mk.route(mk.linear(x, gate), 2, kind="softmax_topk"), activation="silu", **weights)

    x = torch.randn(10, 12, generator=generator()).requires_grad_()
    leaves = [x, gate, *weights.values()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    compiled = torch.compile(layer, fullgraph=True)
    for ours, theirs in zip(torch.autograd.grad(compiled(x).square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_call_of_transformers_experts() -> None:
    """gate_up_proj [E, 2 H, C] in one tensor, top_k indices and weights as they come: views, no copies."""
    g = generator()
    gate_up, down = torch.randn(4, 32, 12, generator=g) / 3, torch.randn(4, 12, 16, generator=g) / 4
    x, index = torch.randn(9, 12, generator=g), torch.randint(0, 4, (9, 2), generator=g)
    weights = torch.rand(9, 2, generator=g)
    runtime.last_kernels(clear=True)
    ours = mk.moe_mlp(
        x, mk.fixed_routing(index, 4, weights), gate_up[:, 16:], down, w_gate=gate_up[:, :16], activation="silu"
    )
    assert [op for op, _ in runtime.last_kernels()] == ["moe_mlp"]
    expected = torch.zeros_like(x)
    for token in range(9):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def _peak_growth(script: str, folder: Path) -> int:
    """Bytes by which a process's peak memory grows over what it was before the last part of the script."""
    before, last = script.split("# measured")
    program = (
        textwrap.dedent(before)
        + textwrap.dedent(
            """
        import resource
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        """
        )
        + textwrap.dedent(last)
        + "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout.split()[-1]) * 1024


def test_nothing_is_saved_but_what_backward_needs() -> None:
    """The inputs, and what went into the activation of each slot in use: not the hidden activations, not the outputs."""
    x, weights, routing = torch.randn(50, 24, generator=generator()), experts_of(6, 24, 40), routing_of(50, 6, 3)
    inputs = [x.requires_grad_(), *(w.requires_grad_() for w in weights.values())]
    slot_weights = routing.weights.clone().requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mk.moe_mlp(x, mk.fixed_routing(routing.expert_ids, 6, slot_weights), activation="silu", **weights)
    kept = 2 * 50 * 3 * 40 * 4  # of the gate and beside it
    assert sum(saved.values()) == sum(t.nbytes for t in (*inputs, slot_weights, routing.expert_ids)) + kept


def test_what_experts_give_is_not_kept(tmp_path: Path) -> None:
    """A training step keeps [S, H] and makes a handful of [T, C]: no [T, K, E, ...], nothing of every expert's outputs."""
    script = """
        import torch, mmkernels as mk
        torch.set_num_threads(1)
        T, E, K, C, H = 4096, 16, 4, 128, 512
        x = torch.randn(T, C, requires_grad=True)
        w_in, w_out = (torch.randn(*s, requires_grad=True) for s in ((E, H, C), (E, C, H)))
        routing = mk.route(torch.randn(T, E), K)
        def step(x, routing):
            mk.moe_mlp(x, routing, w_in, w_out).sum().backward()
        step(x[:8], mk.route(torch.randn(8, E), K))
        # measured
        step(x, routing)
        """
    slots, size = 4096 * 4, 4
    kept = slots * 512 * size
    # Slots' outputs and gradients of x, one expert's gradients at a time (at most about twice an even share), weights.
    working = 2 * slots * 128 * size + 4 * (2 * slots // 16) * 512 * size + 8 * 16 * 128 * 512 * size
    assert _peak_growth(script, tmp_path) < kept + working + (32 << 20)


def test_grouped_linear_takes_ids_of_either_shape() -> None:
    x, weight = torch.randn(2, 5, 8, generator=generator()), experts_of(3, 8, 12)["w_in"]
    ids = torch.randint(0, 3, (2, 5), generator=generator())
    assert torch.equal(mk.grouped_linear(x, ids, weight), mk.grouped_linear(x, ids.flatten(), weight))


def test_nested_widths_are_slices() -> None:
    g = generator()
    w_in, w_gate, w_out = torch.randn(20, 8, generator=g), torch.randn(20, 8, generator=g), torch.randn(8, 20, generator=g)
    x = torch.randn(3, 8, generator=g)
    leaves = [w.requires_grad_() for w in (w_in, w_gate, w_out)]
    for product in (False, True):
        out = mk.nested_mlp(x, 7, w_in, w_out, w_gate=w_gate, activation_on_product=product)
        up, gate = x @ w_in[:7].T, x @ w_gate[:7].T
        hidden = torch.nn.functional.silu(gate * up) if product else torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(out, hidden @ w_out[:, :7].T, rtol=1e-4, atol=1e-4)
        of_in, of_gate, of_out = torch.autograd.grad(out.sum(), leaves)
        assert (of_in[7:] == 0).all() and (of_gate[7:] == 0).all() and (of_out[:, 7:] == 0).all()


def test_explain_names_the_kernel() -> None:
    x, weights, routing = torch.zeros(3, 8), experts_of(3, 8, 12), routing_of(3, 3, 1)
    assert mk.explain(mk.moe_mlp, x, routing, weights["w_in"], weights["w_out"]).kernel == f"cpu/{vector_tier()}"


def vector_tier() -> str:
    return "avx512" if runtime.isa() == "amx" else runtime.isa()
