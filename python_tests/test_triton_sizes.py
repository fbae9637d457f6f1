"""Triton kernels beyond what an int32 counts, and beyond what tensors should hold: triton_sizes.py, interpreted. What every
family's launches have in common: kernels are not compiled anew for other lengths."""

from __future__ import annotations

import pytest
import torch
from interpreted import checks_of
from test_triton_attention import compiling

from mmkernels.ops import permute
from mmkernels.ops.backends import MAX_PROGRAMS, few_channels
from mmkernels.reference import permute as reference


@pytest.mark.parametrize(
    ("part", "checks"),
    [("sizes", 10), ("values", 4), ("strides-brief", 30), pytest.param("strides", 130, marks=pytest.mark.full)],
)
def test_interpreter(part: str, checks: int) -> None:
    assert checks_of("triton_sizes", part) >= checks


def call(family: str, batch: int, length: int) -> None:
    """One forward and backward pass on `batch` samples of `length` tokens."""
    from mmkernels.triton import moe, norm, qk_norm_rope, silu_attention, token_roll

    def new(*shape: int, kind: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    x = new(batch, length, 64)
    if family == "norm":
        vectors = new(batch, 64)
        plan = (vectors, None, None, vectors, vectors)
        out, summed, stats = norm.norm(x, x, *plan, 1e-5, 1.0, False, False)
        norm.norm_backward(out, summed, x, stats, x, *plan, 1.0, False, True, True, True, True)
    elif family == "token_roll":
        token_roll.token_roll(x, batch, 8, ())
        for ranges in ((), (0, 3, 1), (1, 4, 2, 5, 6, 1)):
            plan = (batch, 0 if ranges else 8, ranges, None, None)
            out, rolled, stats = token_roll.token_roll_layer_norm(x, *plan, 1e-5, True, False)
            token_roll.token_roll_layer_norm_backward(out, rolled, x, stats, *plan, False, False)
    elif family == "qk_norm_rope":
        q, angles, weight = new(batch, 4, length, 64), new(length, 32), new(64)
        plan = (angles, angles, weight, weight, 1e-6, 1, False)
        outs = qk_norm_rope.qk_norm_rope(q, q, *plan)
        qk_norm_rope.qk_norm_rope_backward(*outs, q, q, *plan, True, True)
    elif family == "silu_attention":
        keys = new(batch, 320, 64)
        out, thresholds = silu_attention.silu_attention(x, keys, keys, 0.1, False, 1.0)
        silu_attention.silu_attention_backward(out, x, keys, keys, thresholds, 0.1, False, 1.0, *(True,) * 3)
    else:
        moe.expert_order(new(length, batch, kind=torch.int64), 3 * batch)


@pytest.mark.parametrize("family", ["norm", "token_roll", "qk_norm_rope", "silu_attention", "expert_order"])
def test_other_lengths_compile_nothing_anew(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a size that is 1 nor one that is divisible by 16 is a kernel of its own."""
    compiled = compiling("sm_90", monkeypatch)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # nothing runs
    call(family, 2, 48)
    kernels = {id(kernel) for _, kernel in compiled}
    for batch, length in ((2, 7), (3, 1040), (16, 1003)):
        call(family, batch, length)
    anew = {name for name, kernel in compiled if id(kernel) not in kernels}
    assert not anew


def test_empty_results_are_tensors_of_their_own() -> None:
    """Gradients that nobody wants: compiled graphs take it that no two results share memory."""
    from mmkernels.triton import silu_attention

    x = torch.zeros(0, 3, 16)
    results = silu_attention.silu_attention_backward(x, x, x, x, torch.zeros(0, 3), 0.0, False, 1.0, *(False,) * 3)
    assert len({id(result) for result in results}) == 3


def test_more_rows_than_programs_are_left_to_the_reference() -> None:
    reason = few_channels("norm")
    few, many = (torch.empty(rows, 1, device="meta") for rows in (MAX_PROGRAMS, MAX_PROGRAMS + 1))
    assert reason({"x": few}) is None
    assert "2147483648 rows" in (reason({"x": many}) or "")


def test_torch_formulas_leave_out_what_names_nothing() -> None:
    """As the CUDA library does: on CUDA torch's own indexing would end all further use of the device."""
    x, weights = torch.randn(3, 5), torch.rand(3, 2)
    order, positions = torch.tensor([4, 0, 99, -7, 2, -1]), torch.tensor([[1, -1], [77, -2], [4, 0]])
    skipped_order, skipped = torch.tensor([4, 0, -1, -1, 2, -1]), torch.tensor([[1, -1], [-1, -1], [4, 0]])
    unpermute, backward = permute._torch_unpermute, permute._torch_unpermute_backward
    rows = permute._torch_permute(x, order, positions, 6)
    assert torch.equal(rows, reference.permute_tokens_op(x, skipped_order, skipped, 6))
    assert torch.equal(
        unpermute(rows, order, positions, weights), reference.unpermute_tokens_op(rows, order, skipped, weights)
    )
    few = rows[:2]  # less than there are slots in use
    fewer = torch.where(skipped < 2, skipped, -1)
    assert torch.equal(unpermute(few, order, positions, weights), reference.unpermute_tokens_op(few, order, fewer, weights))
    ours = backward(x, rows, order, positions, weights, 6, True)
    plain = reference.unpermute_tokens_backward_op(x, rows, skipped_order, skipped, weights, 6, True)
    assert all(torch.equal(own, theirs) for own, theirs in zip(ours, plain, strict=True))
