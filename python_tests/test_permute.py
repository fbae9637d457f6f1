"""Tokens in the order of their experts and back, beyond what the generic suite asks: experts of one's own, indices that
nobody vouches for, what backward keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime
from mmkernels.reference import permute as reference


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def routing_of(tokens: int, experts: int, slots: int, seed: int = 0) -> mk.Routing:
    return mk.route(torch.randn(tokens, experts, generator=generator(seed)), slots, capacity=tokens // 2)


def own_experts(x: Tensor, routing: mk.Routing, w_in: Tensor, w_out: Tensor) -> Tensor:
    """What a user writes: a loop over contiguous rows."""
    places = mk.dispatch(routing.expert_ids, routing.num_experts)
    rows = mk.permute_tokens(x, places, max_slots=routing.max_slots)
    begins = places.offsets.tolist()
    made = [
        F.linear(F.gelu(F.linear(rows[begin:end], up)), down)
        for begin, end, up, down in zip(begins[:-1], begins[1:], w_in, w_out, strict=True)
    ]
    return mk.unpermute_tokens(torch.cat(made), places, routing.weights)


def test_experts_of_ones_own_are_moe_mlp() -> None:
    """Forward and backward, with dropped slots, and only the rows in use handed back."""
    x = torch.randn(31, 24, generator=generator())
    w_in, w_out = torch.randn(5, 40, 24, generator=generator(1)) / 5, torch.randn(5, 24, 40, generator=generator(2)) / 6
    routing = routing_of(31, 5, 2)
    assert -1 in routing.expert_ids
    results = []
    for function in (own_experts, mk.moe_mlp):
        inputs = [t.clone().requires_grad_() for t in (x, w_in, w_out, routing.weights)]
        weighted = mk.fixed_routing(routing.expert_ids, 5, inputs[3])
        out = function(inputs[0], weighted, inputs[1], inputs[2])
        upstream = torch.randn(out.shape, generator=generator(3))
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(0, 40),
    slots=st.integers(0, 4),
    channels=st.integers(0, 70),
    seed=st.integers(0, 9),
    spare=st.booleans(),
)
def test_every_row_is_its_tokens_and_sums_go_by_slot(tokens: int, slots: int, channels: int, seed: int, spare: bool) -> None:
    g = generator(seed)
    ids = torch.randint(-1, 6, (tokens, slots), generator=g)
    places, x = mk.dispatch(ids, 6), torch.randn(tokens, channels, generator=g)
    used = int(places.offsets[-1])
    most = tokens * slots if spare else used
    with runtime.poisoned_outputs():
        rows = mk.permute_tokens(x, places, max_slots=most)
    assert rows.shape == (most, channels) and not rows[used:].any()
    for i in range(used):
        assert torch.equal(rows[i], x[int(places.order[i]) // slots])
    weights = torch.rand(tokens, slots, generator=g)
    with runtime.poisoned_outputs():
        out = mk.unpermute_tokens(rows, places, weights)
    expected = torch.zeros(tokens, channels)
    for k in range(slots):  # the order of the slots, product by product
        there = ids[:, k, None] >= 0
        expected = torch.where(there, expected + x * weights[:, k, None], expected)
    assert_same_bits(out, expected, "a sum in the order of the slots")


def test_rows_behind_those_in_use_are_not_read(isa: str) -> None:
    places = mk.dispatch(torch.tensor([[0, -1], [-1, -1], [1, 0]]), 2)
    rows = torch.randn(6, 9, generator=generator())
    expected = mk.unpermute_tokens(rows, places)
    rows[3:] = torch.nan
    rows.requires_grad_()
    weights = torch.full((3, 2), torch.nan)
    weights[0, 0] = weights[2, 0] = weights[2, 1] = 1
    weights.requires_grad_()
    out = mk.unpermute_tokens(rows, places, weights)
    assert_same_bits(out.detach(), expected, "rows and weights of unused slots")
    assert not out[1].any()
    of_rows, of_weights = torch.autograd.grad(out.sum(), (rows, weights))
    assert torch.equal(of_rows, torch.tensor([1.0, 1, 1, 0, 0, 0])[:, None].expand(6, 9))
    assert torch.equal(of_weights != 0, places.positions >= 0)


def test_there_and_back_is_a_multiple(isa: str) -> None:
    ids = torch.randint(-1, 4, (23, 3), generator=generator())
    places, x = mk.dispatch(ids, 4), torch.randn(23, 24, generator=generator())
    back = mk.unpermute_tokens(mk.permute_tokens(x, places), places)
    torch.testing.assert_close(back, x * (ids >= 0).sum(1, keepdim=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_indices_out_of_range_are_named(compiled: bool) -> None:
    places, x = mk.dispatch(torch.tensor([[0, 1], [1, -1]]), 2), torch.randn(2, 5)
    rows = mk.permute_tokens(x, places)

    def of(**changed: list[int]) -> mk.Dispatch:
        return places._replace(**{n: torch.tensor(v).view_as(getattr(places, n)) for n, v in changed.items()})

    torch._dynamo.reset()
    permute = torch.compile(mk.permute_tokens, backend="aot_eager") if compiled else mk.permute_tokens
    unpermute = torch.compile(mk.unpermute_tokens, backend="aot_eager") if compiled else mk.unpermute_tokens
    error = RuntimeError if compiled else ValueError
    for order in ([0, 1, 4, -1], [0, 1, -2, -1]):
        with pytest.raises(error, match="dispatch: expected an order of -1 to 3, got"):
            permute(x, of(order=order))
    with pytest.raises(error, match="max_slots: expected at least the slots in use, got 2"):
        permute(x, places, max_slots=2)
    for positions in ([0, 1, 4, -1], [0, -2, 1, -1]):
        with pytest.raises(error, match="rows: expected a row for each slot in use, which dispatch has as -1 to 3, got"):
            unpermute(rows, of(positions=positions))
    with pytest.raises(error, match="rows: expected a row for each slot in use, which dispatch has as -1 to 1, got 2"):
        unpermute(rows[:2], places)
    for order in ([0, 1, 4, -1], [0, 1, -2, -1]):
        out = mk.unpermute_tokens(rows.clone().requires_grad_(), of(order=order))
        with pytest.raises((RuntimeError, ValueError), match="dispatch: expected an order of -1 to 3, got"):
            out.sum().backward()


def test_rows_are_kept_for_the_weights_alone() -> None:
    places = mk.dispatch(torch.zeros(4, 2, dtype=torch.int64), 1)
    for weighted, kept in ((False, False), (True, True)):
        rows = torch.randn(8, 5, requires_grad=True) * 1
        weights = torch.rand(4, 2, requires_grad=weighted)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.data_ptr()) or t, lambda t: t):
            mk.unpermute_tokens(rows, places, weights)
        assert (rows.data_ptr() in saved) == kept


def test_autocast_leaves_the_dtype_alone() -> None:
    places, x = mk.dispatch(torch.zeros(4, 2, dtype=torch.int64), 1), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = mk.permute_tokens(x, places)
        out = mk.unpermute_tokens(rows, places, torch.rand(4, 2).bfloat16())
    assert rows.dtype == out.dtype == torch.float32


def test_many_rows_for_any_number_of_threads(isa: str, threads: None) -> None:
    places = mk.dispatch(torch.randint(-1, 37, (5000, 2), generator=generator()), 37)
    x, weights = torch.randn(5000, 40, generator=generator()), torch.rand(5000, 2, generator=generator())
    rows = reference.permute_tokens(x, places)
    for count in (1, 3, 4):
        torch.set_num_threads(count)
        assert_same_bits(mk.permute_tokens(x, places), rows, "rows")
        torch.testing.assert_close(
            mk.unpermute_tokens(rows, places, weights), reference.unpermute_tokens(rows, places, weights)
        )
