"""Run by test_triton_moe.py in a process of its own, under TRITON_INTERPRET=1: routing and experts on CPU tensors, against
their definitions. Arguments: the dtypes to try, as "float32" or, for half of the cases, "float32-brief". Prints a line a
check."""

from __future__ import annotations

import sys
from typing import Any

import torch
from support import assert_same_bits
from torch import Tensor
from triton_compare import compare, run

from mmkernels.reference import moe as moe_reference
from mmkernels.reference import routing as routing_reference
from mmkernels.reference.linear import ACTIVATIONS
from mmkernels.triton import expert_order as sorting
from mmkernels.triton import moe, routing

generator = torch.Generator().manual_seed(0)
ALL_GRADIENTS = (1 << len(moe_reference.MOE_GRADIENTS)) - 1
INF = float("inf")


def draw(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(size, generator=generator)).to(dtype)


def apart(x: Tensor) -> Tensor:
    """The same numbers with NaN between their rows, which nothing may read."""
    room = torch.full((*x.shape[:-1], x.size(-1) + 3), torch.nan, dtype=x.dtype)
    room[..., : x.size(-1)] = x
    return room[..., : x.size(-1)]


def alone(function: Any) -> Any:
    """An operator with one output, as one with a tuple."""
    return lambda *args: (function(*args),)


# --- expert_order -------------------------------------------------------------------------------------------------------
def check_order(ids: Tensor, experts: int, what: str) -> None:
    inside = torch.where((ids >= 0) & (ids < experts), ids, -1)  # others count as unused
    truth = moe_reference.expert_order_op(inside, experts)
    for ours, theirs in zip(run(moe.expert_order, (ids, experts)), truth, strict=True):
        assert torch.equal(ours, theirs), what
    named = sorting.sort(ids, experts, name_unused=True)[0]
    used = int(truth[1][-1])
    assert torch.equal(named[:used], truth[0][:used]), what
    assert torch.equal(-1 - named[used:], torch.nonzero(inside.flatten() < 0)[:, 0]), what
    print("checked order", what)


def check_orders() -> None:
    for tokens, slots, experts in ((0, 2, 3), (5, 0, 2), (5, 1, 1), (7, 3, 4), (700, 3, 5), (300, 2, 200), (1100, 1, 1500)):
        ids = torch.randint(-2, experts + 2, (tokens, slots), generator=generator)
        check_order(ids, experts, f"{tokens} tokens, {slots} slots, {experts} experts")
    check_order(torch.full((9, 2), -1), 3, "all unused")
    check_order(torch.full((9, 2), 2), 5, "one expert has all")
    check_order(torch.randint(0, 4, (3, 9), generator=generator).T, 4, "strided")


# --- routing ------------------------------------------------------------------------------------------------------------
# tokens, experts, top_k, score, normalize, top_p, num_groups, top_groups, group_score, capacity; what selection there is.
ROUTES: dict[str, tuple[tuple[Any, ...], str]] = {
    "softmax, normalised": ((7, 5, 2, 0, True, 1.0, 1, 1, 0, -1), ""),
    "capacity": ((70, 6, 3, 0, False, 1.0, 1, 1, 0, 14), ""),
    "capacity, normalised": ((70, 6, 3, 0, True, 1.0, 1, 1, 0, 9), ""),
    "no capacity at all": ((5, 3, 2, 1, True, 1.0, 1, 1, 0, 0), ""),
    "sigmoid": ((9, 6, 2, 1, False, 1.0, 1, 1, 0, -1), ""),
    "sigmoid, best two of groups, selection of experts": ((9, 8, 3, 1, True, 1.0, 4, 2, 1, -1), "[E]"),
    "best of groups that are too small": ((9, 8, 6, 0, False, 1.0, 4, 2, 0, -1), ""),
    "groups of one": ((9, 5, 2, 1, False, 1.0, 5, 3, 1, -1), "[T, E]"),
    "three groups, top_p, capacity": ((9, 12, 5, 0, True, 0.6, 3, 2, 1, 2), "[E]"),
    "top_p of all": ((9, 12, 12, 0, False, 0.6, 1, 1, 0, -1), ""),
    "top_p of nothing": ((9, 7, 3, 1, True, 0.0, 1, 1, 0, -1), ""),
    "selection": ((9, 7, 3, 0, True, 1.0, 1, 1, 0, -1), "[T, E]"),
    "experts away": ((9, 7, 5, 0, True, 1.0, 1, 1, 0, -1), "away"),
    "all selections below 0": ((5, 5, 5, 1, True, 1.0, 1, 1, 0, -1), "negative"),
    "no tokens": ((0, 4, 2, 0, True, 1.0, 1, 1, 0, 3), ""),
    "one expert": ((3, 1, 1, 1, True, 1.0, 1, 1, 0, -1), ""),
    "many experts": ((3, 300, 8, 0, True, 1.0, 1, 1, 0, -1), ""),
}


def check_route(logits: Tensor, selection: Tensor | None, rest: tuple[Any, ...], what: str) -> None:
    outputs = compare(routing.route, routing_reference.route_op, (logits, selection, *rest), f"route {what}")
    tokens, experts = logits.shape
    check_route_backward(logits, outputs[2], rest[1], rest[2], what)
    assert outputs[2].shape == (tokens, rest[0]) and int(outputs[3].sum()) <= 2 * tokens * experts


def check_route_backward(logits: Tensor, ids: Tensor, score: int, normalize: bool, what: str) -> None:
    upstream = draw(*ids.shape), draw(2 * logits.size(1) + 2)
    args = (*upstream, logits, ids, score, normalize)
    compare(alone(routing.route_backward), alone(routing_reference.route_backward_op), args, f"route_backward {what}")


def check_routes(dtype: torch.dtype) -> None:
    for name, ((tokens, experts, *rest), kind) in ROUTES.items():
        selection = None if not kind else draw(*((tokens, experts) if kind == "[T, E]" else (experts,)))
        if kind == "away":
            selection[::2] = -INF  # type: ignore[index]
        if kind == "negative":
            selection = -2 - selection.abs()  # type: ignore[union-attr]
        check_route(draw(tokens, experts, dtype=dtype, scale=2.0), selection, tuple(rest), f"{name}, {dtype}")
    whole = torch.randint(-1, 2, (20, 8), generator=generator).to(dtype)
    for score in (0, 1):
        check_route(whole, None, (5, score, True, 1.0, 4, 2, 1, -1), f"ties, score {score}, {dtype}")
        check_route(whole, None, (3, score, False, 1.0, 1, 1, 0, 6), f"ties and capacity, score {score}, {dtype}")
    zeros = torch.tensor([[0.0, -0.0, 0.0], [-0.0, 0.0, -0.0]], dtype=dtype)
    check_route(zeros, None, (2, 0, True, 1.0, 1, 1, 0, -1), f"zeros of either sign, {dtype}")
    far = torch.tensor([[30.0, 90.0, 40.0, -INF], [-90.0, 0.0, -INF, 5.0]])
    for score in (0, 1):  # of sigmoids what float32 still tells apart
        logits = (far / (1, 3)[score]).to(dtype)
        check_route(logits, None, (3, score, True, 1.0, 1, 1, 0, -1), f"far out, score {score}, {dtype}")
    strided = draw(6, 9, dtype=dtype)[::2, 2:]
    check_route(strided, draw(14)[::2], (2, 0, True, 1.0, 1, 1, 0, -1), f"strided, {dtype}")
    bad = draw(4, 5, dtype=dtype)
    bad[1, 2] = torch.nan
    rest = (None, 2, 0, True, 1.0, 1, 1, 0, -1)
    hidden = torch.where(bad.isnan(), -INF, bad)
    for ours, theirs in zip(routing.route(bad, *rest), routing.route(hidden, *rest), strict=True):
        assert_same_bits(ours, theirs, "NaN is -inf")
    for tokens, experts, slots, capacity, group in ((8, 4, 4, 3, 8), (8, 4, 2, 3, 4), (0, 4, 4, 0, 0), (6, 5, 5, 6, 6)):
        logits, what = draw(tokens, experts, dtype=dtype), f"{tokens, experts, slots, capacity, group}, {dtype}"
        args = (logits, slots, capacity, group)
        outputs = compare(routing.expert_choice, routing_reference.expert_choice_op, args, f"expert_choice {what}")
        check_route_backward(logits, outputs[2], 0, False, f"of expert_choice {what}")


def check_many_tokens() -> None:
    """More blocks of tokens than programs: each program adds up several."""
    keep, routing._PROGRAMS = routing._PROGRAMS, 2
    check_route(draw(200, 60), None, (2, 0, True, 1.0, 1, 1, 0, -1), "several blocks a program")
    routing._PROGRAMS = keep


# --- experts ------------------------------------------------------------------------------------------------------------
# T, K, E, C, H, N and which ids are drawn: from -1 up to an expert before the last, so that it is empty.
MOES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "three slots, an empty expert": ((9, 3, 4, 5, 7, 6), -1, 3),
    "one slot": ((9, 1, 3, 20, 9, 7), 0, 3),
    "whole units": ((5, 2, 2, 16, 32, 16), 0, 2),
    "several tiles of rows and of columns": ((70, 2, 2, 3, 70, 66), -1, 2),
    "several steps": ((6, 2, 2, 70, 70, 66), -1, 2),
    "ids out of range": ((9, 2, 3, 5, 4, 6), -3, 6),
    "no tokens": ((0, 2, 3, 5, 4, 6), 0, 3),
    "no slots": ((4, 0, 3, 5, 4, 6), 0, 3),
    "no slot in use": ((4, 2, 3, 5, 4, 6), -1, 0),
    "no channels": ((4, 2, 3, 0, 4, 6), 0, 3),
    "no hidden": ((4, 2, 3, 5, 0, 6), 0, 3),
    "no columns": ((4, 2, 3, 5, 4, 0), 0, 3),
}


def of_valid_ids(function: Any) -> Any:
    """A definition, which raises for ids out of range, as the kernels have it: such slots are unused."""

    def called(*args: Any) -> Any:
        position, experts = (1, args[3].size(0)) if function is moe_reference.moe_mlp_op else (2, args[4].size(0))
        ids = args[position]
        ids = torch.where((ids >= 0) & (ids < experts), ids, -1)
        return function(*args[:position], ids, *args[position + 1 :])

    return called


def check_moe(
    name: str, dtype: torch.dtype, activation: int, *, gated: bool, biases: str = "own", residual: bool = False,
    lie: str = "whole", spare: int = 0, each: bool = False,
) -> None:  # fmt: skip
    (tokens, slots, experts, depth, hidden, columns), low, high = MOES[name]
    kept = torch.float32 if biases == "float32" else dtype

    def matrices(rows: int, cols: int) -> Tensor:
        scale = max(1, cols) ** -0.5
        if lie == "transposed":
            return apart(draw(experts, cols, rows, dtype=dtype, scale=scale)).mT
        made = draw(experts, rows, cols, dtype=dtype, scale=scale)
        return apart(made) if lie == "apart" else made

    ids = torch.randint(low, high, (tokens, slots), generator=generator)
    x = draw(tokens, depth, dtype=dtype)
    x = x if lie == "whole" else apart(x)
    weights = torch.rand((tokens, slots), generator=generator)
    w_in, w_gate, w_out = matrices(hidden, depth), matrices(hidden, depth), matrices(columns, hidden)
    b_in, b_gate, b_out = (None if biases == "none" else draw(experts, n, dtype=kept) for n in (hidden, hidden, columns))
    added = draw(tokens, columns, dtype=dtype) if residual else None
    if not gated:
        w_gate = b_gate = None  # type: ignore[assignment]
    what = f"{name}, {ACTIVATIONS[activation]}, {dtype}, gated {gated}, biases {biases}, residual {residual}"
    args = (x, ids, weights, w_in, w_out, w_gate, b_in, b_out, b_gate)
    rest = (None, None, None, None, added, activation, tokens * slots + spare)
    out, pre, pre_gate = compare(
        moe.moe_mlp, of_valid_ids(moe_reference.moe_mlp_op), (*args, *rest, True), f"moe_mlp {what}"
    )
    without, *empty = run(moe.moe_mlp, (*args, *rest, False))
    assert_same_bits(without, out, f"{what}: without a backward pass")
    assert all(value.numel() == 0 for value in empty)

    backward = (draw(tokens, columns, dtype=dtype), *args, pre, pre_gate, activation)
    definition = of_valid_ids(moe_reference.moe_mlp_backward_op)
    of_all = compare(moe.moe_mlp_backward, definition, (*backward, ALL_GRADIENTS), f"moe_mlp_backward {what}")
    for bit, wanted in enumerate(moe_reference.MOE_GRADIENTS if each else ()):
        one = run(moe.moe_mlp_backward, (*backward, 1 << bit))
        for other, first, second in zip(moe_reference.MOE_GRADIENTS, of_all, one, strict=True):
            assert_same_bits(second, first if other == wanted else first.new_empty(0), f"{what}: of {wanted} alone, {other}")


def check_too_many_slots() -> None:
    """More slots in use than max_slots says: the rest is left out, and nothing is written out of bounds."""
    x, w_in, w_out = draw(6, 5), draw(2, 4, 5), draw(2, 3, 4)
    ids = torch.tensor([[0, 1]] * 6)
    args = (x, ids, torch.ones(6, 2), w_in, w_out, *(None,) * 9, 1)
    out, pre, _ = run(moe.moe_mlp, (*args, 8, True))
    kept, _, _ = run(
        moe.moe_mlp, (x, torch.where(torch.arange(6)[:, None] < torch.tensor([6, 2]), ids, -1), *args[2:], 8, True)
    )
    assert_same_bits(out, kept, "slots beyond max_slots")
    run(moe.moe_mlp_backward, (draw(6, 3), *args[:9], pre, x.new_empty(0), 1, ALL_GRADIENTS))
    print("checked too many slots")


def check_grouped(
    dtype: torch.dtype, shape: tuple[int, ...], low: int, high: int, bias: str, transposed: bool = False
) -> None:
    tokens, groups, depth, columns = shape
    x = draw(tokens, depth, dtype=dtype)
    ids = torch.randint(low, high, (2 * tokens,), generator=generator)[::2]
    weight = draw(groups, columns, depth, dtype=dtype)
    if transposed:
        x, weight = apart(x), apart(draw(groups, depth, columns, dtype=dtype)).mT
    b = None if bias == "none" else draw(groups, columns, dtype=torch.float32 if bias == "float32" else dtype)
    what = f"{shape}, ids {low} to {high}, bias {bias}, {dtype}"
    plain = alone(moe_reference.grouped_linear_op)
    compare(alone(moe.grouped_linear), plain, (x, ids, weight, None, None, b), f"grouped_linear {what}")
    args = (draw(tokens, columns, dtype=dtype), x, ids, weight, b, True, True, True)
    compare(moe.grouped_linear_backward, moe_reference.grouped_linear_backward_op, args, f"grouped_linear_backward {what}")
    none = run(moe.grouped_linear_backward, (*args[:5], False, False, False))
    assert all(value.numel() == 0 for value in none)


check_orders()
check_many_tokens()
check_too_many_slots()
silu, gelu = ACTIVATIONS.index("silu"), ACTIVATIONS.index("gelu")
for argument in sys.argv[1:]:
    dtype, brief = getattr(torch, argument.removesuffix("-brief")), argument.endswith("-brief")
    check_routes(dtype)
    for i, name in enumerate(MOES):
        if not brief or i % 2 == 0:
            check_moe(name, dtype, silu, gated=True)
        if not brief or i % 2 == 1:
            check_moe(name, dtype, gelu, gated=False, biases="none", residual=True, spare=3)
    usual = "three slots, an empty expert"
    for code in range(3 if brief else 0, len(ACTIVATIONS)):
        check_moe(usual, dtype, code, gated=code % 2 == 0, biases="float32", residual=True, each=True)
    for lie in ("transposed", "apart"):
        check_moe(usual, dtype, silu, gated=True, lie=lie)
        check_moe(usual, dtype, silu, gated=False, lie=lie)
    for shape in ((9, 3, 5, 7), (70, 2, 33, 66), (5, 2, 16, 16), (0, 2, 3, 4), (4, 2, 0, 3), (4, 2, 3, 0)):
        check_grouped(dtype, shape, -1, shape[1], "own")
    check_grouped(dtype, (9, 3, 5, 7), -3, 6, "none", transposed=True)
    check_grouped(dtype, (9, 3, 5, 7), -1, 0, "float32")
sys.exit(0)
