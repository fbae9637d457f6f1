"""Routing beyond what the generic suite asks: losses, noise, capacity, properties, errors found in the kernels' own pass."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

import mmkernels as mk
from mmkernels.reference import routing as reference


def logits_of(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


# --- what a routing is ------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 70),
    experts=st.integers(1, 40),
    data=st.data(),
)
def test_counts_and_slots(tokens: int, experts: int, data: Any) -> None:
    top_k = data.draw(st.integers(1, experts))
    routing = mk.route(logits_of(tokens, experts), top_k, kind="softmax_topk")
    assert routing.counts is not None and int(routing.counts[0].sum()) == tokens * top_k
    assert int(routing.counts[1].sum()) == tokens
    for row in routing.expert_ids.tolist():
        assert len(set(row)) == top_k, "an expert is chosen once"
    assert (routing.weights[:, :-1] >= routing.weights[:, 1:]).all(), "in decreasing order"


def test_weights_of_kept_tokens_conserve() -> None:
    """Normalised weights sum to 1 whatever was dropped, unless everything was."""
    routing = mk.route(logits_of(64, 8), 3, capacity=20)
    sums, kept = routing.weights.sum(-1), (routing.expert_ids >= 0).any(-1)
    assert 0 < int((routing.expert_ids < 0).sum()) < routing.expert_ids.numel()
    torch.testing.assert_close(sums[kept], torch.ones_like(sums[kept]))
    assert (sums[~kept] == 0).all()
    assert (routing.weights[routing.expert_ids < 0] == 0).all()


@pytest.mark.parametrize("kind", ["topk_softmax", "softmax_topk", "sigmoid_topk"])
def test_tokens_may_be_permuted(kind: str, isa: str) -> None:
    logits = logits_of(53, 12)
    order = torch.randperm(53, generator=torch.Generator().manual_seed(1))
    routing, permuted = mk.route(logits, 3, kind=kind), mk.route(logits[order], 3, kind=kind)
    assert torch.equal(routing.expert_ids[order], permuted.expert_ids)
    assert torch.equal(routing.weights[order], permuted.weights), "the bits of a token depend on no other"


def test_capacity_keeps_first_choices_first() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0], [2.0, 3.0, 0.0], [3.0, 2.0, 0.0], [0.0, 3.0, 2.0]])
    routing = mk.route(logits, 2, capacity=2)
    # Expert 0 keeps the first choices of tokens 0 and 2, expert 1 those of 1 and 3.
    assert routing.expert_ids.tolist() == [[0, -1], [1, -1], [0, -1], [1, 2]]
    assert routing.max_slots == 6
    assert routing.counts is not None and routing.counts[0].tolist() == [3, 4, 1], "counted before they are dropped"


def test_capacity_factor_is_a_multiple_of_an_even_share() -> None:
    logits = logits_of(32, 4)
    assert torch.equal(mk.route(logits, 2, capacity_factor=0.5).expert_ids, mk.route(logits, 2, capacity=8).expert_ids)
    choice = mk.route(logits, kind="expert_choice", capacity_factor=2.0)
    assert torch.bincount(choice.expert_ids[choice.expert_ids >= 0], minlength=4).tolist() == [16] * 4
    assert choice.max_slots == 64


def test_top_p_takes_the_fewest() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.05, 0.03, 0.02]])
    routing = mk.route(probabilities.log(), top_p=0.75, kind="softmax_topk")
    assert routing.expert_ids.tolist() == [[0, 1, -1, -1], [0, -1, -1, -1]]
    at_most_one = mk.route(probabilities.log(), 1, top_p=0.75, kind="softmax_topk")
    assert at_most_one.expert_ids.tolist() == [[0], [0]]


def test_groups_confine_the_choice() -> None:
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.9, 1.0, 1.0]])
    best = mk.route(logits, 2, num_groups=3, top_groups=1)
    assert best.expert_ids.tolist() == [[0, 1]]
    by_two = mk.route(logits, 2, num_groups=3, top_groups=1, group_score="top2")
    assert by_two.expert_ids.tolist() == [[2, 3]]
    only_one = mk.route(logits, 3, num_groups=3, top_groups=1)
    assert only_one.expert_ids.tolist() == [[0, 1, -1]], "no more than a group has"


def test_selection_changes_the_choice_alone() -> None:
    logits = logits_of(9, 6)
    away = torch.zeros(6)
    away[2] = -torch.inf
    routing = mk.route(logits, 3, kind="softmax_topk", selection=away)
    assert not (routing.expert_ids == 2).any()
    assert torch.allclose(routing.weights, logits.softmax(-1).gather(-1, routing.expert_ids))


# --- losses -----------------------------------------------------------------------------------------------------------
def plain_losses(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """As the papers write them, in float64."""
    logits = logits.double()
    tokens, experts = logits.shape
    probabilities = logits.softmax(-1)
    values, ids = probabilities.topk(top_k, -1)
    hot = torch.nn.functional.one_hot(ids, experts).double()
    importance = torch.zeros(tokens, experts, dtype=torch.float64).scatter(-1, ids, values).sum(0)
    loads = hot.sum((0, 1))

    def variation(v: Tensor) -> Tensor:
        return v.var() / v.mean() ** 2

    return {
        "load_balance": experts * (hot.mean(0).sum(0) * probabilities.mean(0)).sum(),
        "load_balance_first": experts * (hot[:, 0].mean(0) * probabilities.mean(0)).sum(),
        "importance": variation(importance),
        "load": variation(loads),
        "z": logits.logsumexp(-1).square().mean(),
        "entropy": torch.special.entr(probabilities).sum(-1).mean(),
    }


def test_losses_are_those_of_the_papers(isa: str) -> None:
    logits = logits_of(203, 11).requires_grad_()
    losses = mk.route(logits, 3, kind="softmax_topk").losses
    for name, expected in plain_losses(logits.detach(), 3).items():
        torch.testing.assert_close(getattr(losses, name).double(), expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["load_balance", "load_balance_first", "importance", "z", "entropy"])
def test_losses_have_gradients(name: str, isa: str) -> None:
    logits = logits_of(37, 7)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(mk.route(ours, 2, kind="softmax_topk").losses, name), ours)
    (expected,) = torch.autograd.grad(plain_losses(theirs, 2)[name], theirs)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)


def test_load_of_counts_has_no_gradient() -> None:
    assert not mk.route(logits_of(9, 4).requires_grad_(), 2).losses.load.requires_grad


def test_losses_of_one_expert_and_of_no_tokens() -> None:
    for logits in (logits_of(5, 1), logits_of(0, 4)):
        for value in mk.route(logits, 1).losses:
            assert torch.isfinite(value)


def test_fixed_routes_have_no_losses() -> None:
    with pytest.raises(ValueError, match="losses: a fixed routing"):
        _ = mk.fixed_routing(torch.tensor([0, 1]), 2).losses


# --- noise ------------------------------------------------------------------------------------------------------------
def test_noise_comes_from_the_generator() -> None:
    logits = logits_of(40, 8)

    def draw(seed: int) -> mk.Routing:
        return mk.route(logits, 2, kind="noisy_topk", noise_std=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3).expert_ids, draw(3).expert_ids)
    assert not torch.equal(draw(3).expert_ids, draw(4).expert_ids)


def test_noise_has_a_gradient_to_its_deviation() -> None:
    logits, raw = logits_of(20, 6).requires_grad_(), logits_of(20, 6, seed=1).requires_grad_()
    std = torch.nn.functional.softplus(raw) + 0.01
    routing = mk.route(logits, 2, kind="noisy_topk", noise_std=std, generator=torch.Generator().manual_seed(0))
    assert routing.loads is not None
    torch.testing.assert_close(routing.loads.sum(), torch.tensor(40.0), rtol=0.2, atol=0)
    losses = routing.losses
    for value in (losses.load, losses.importance, routing.weights.square().sum()):
        gradients = torch.autograd.grad(value, (logits, raw), retain_graph=True)
        assert all(g.abs().sum() > 0 for g in gradients)


# --- errors in the kernels' own pass ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["topk_softmax", "sigmoid_topk", "expert_choice"])
@pytest.mark.parametrize("slots", [2, 9])
def test_nan_is_an_error_that_names_the_token(kind: str, slots: int, isa: str) -> None:
    logits = logits_of(70, 12)
    logits[33, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^logits: .* NaN for token 33"):
        mk.route(logits, slots, kind=kind)


def test_infinities_are_no_nan() -> None:
    logits = logits_of(9, 4)
    logits[:, 1] = -torch.inf
    for kind in ("topk_softmax", "softmax_topk", "sigmoid_topk"):
        routing = mk.route(logits, 3, kind=kind)
        assert not (routing.expert_ids == 1).any() and torch.isfinite(routing.weights).all()


def test_a_backward_pass_with_wrong_ids_raises() -> None:
    logits = logits_of(3, 4)
    ids = torch.tensor([[0], [4], [1]])
    with pytest.raises(RuntimeError, match="expert_ids: expected -1 to 3, got 4"):
        torch.ops.mmkernels.route_backward(torch.zeros(3, 1), torch.zeros(10), logits, ids, 0, False)


# --- ways through it --------------------------------------------------------------------------------------------------
def test_lanes_and_rows_agree() -> None:
    """The plain kinds run with tokens as lanes, any option row by row."""
    logits = logits_of(77, 21)
    for kind in ("topk_softmax", "softmax_topk", "sigmoid_topk"):
        lanes, rows = mk.route(logits, 4, kind=kind), mk.route(logits, 4, kind=kind, selection=torch.zeros(21))
        assert torch.equal(lanes.expert_ids, rows.expert_ids) and torch.equal(lanes.counts, rows.counts)
        torch.testing.assert_close(lanes.weights, rows.weights, rtol=2e-6, atol=1e-8)
        torch.testing.assert_close(lanes.sums, rows.sums, rtol=2e-5, atol=1e-5)


def test_a_routing_is_a_pytree_and_copies() -> None:
    routing = mk.route(logits_of(6, 4), 2)
    names = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(routing)[0]]
    assert names == [".expert_ids", ".weights", ".sums", ".counts", ".loads"]
    doubled = _pytree.tree_map(lambda t: t * 2 if isinstance(t, Tensor) else t, routing)
    assert isinstance(doubled, mk.Routing) and torch.equal(doubled.weights, routing.weights * 2)
    assert (doubled.num_experts, doubled.max_slots) == (4, 12)
    buffer = io.BytesIO()
    torch.save(routing, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(routing), torch.load(buffer, weights_only=False)):
        assert torch.equal(again.weights, routing.weights) and again.num_experts == 4


def test_compiles_without_a_break() -> None:
    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = mk.route(logits, 2, kind="softmax_topk", capacity_factor=1.0)
        return routing.weights, routing.losses.load_balance + routing.losses.z

    logits = logits_of(12, 4).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(logits), function(logits), strict=True):
        torch.testing.assert_close(ours, expected)
    (ours,) = torch.autograd.grad(compiled(logits)[1], logits)
    (expected,) = torch.autograd.grad(function(logits)[1], logits)
    torch.testing.assert_close(ours, expected)


def test_fixed_routing() -> None:
    routing = mk.fixed_routing(torch.tensor([0, 2, -1], dtype=torch.int32), 3)
    assert routing.expert_ids.tolist() == [[0], [2], [-1]] and routing.weights.tolist() == [[1.0]] * 3
    for arguments, error, name in (
        (([0, 1], 2), TypeError, "expert_ids"),
        ((torch.zeros(2), 2), TypeError, "expert_ids"),
        ((torch.zeros(2, 2, 2, dtype=torch.int64), 2), ValueError, "expert_ids"),
        ((torch.zeros(2, dtype=torch.int64), 0), ValueError, "num_experts"),
        ((torch.zeros(2, dtype=torch.int64), 2, torch.zeros(3)), ValueError, "weights"),
        ((torch.zeros(2, dtype=torch.int64), 2, [1.0, 1.0]), TypeError, "weights"),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            mk.fixed_routing(*arguments)


def test_reference_names_its_scores() -> None:
    assert reference.SCORES.index("softmax") == 0 and reference.GROUP_SCORES.index("top2") == 1
