"""Attention beyond its card: formulas of torch and of models, packed sequences, bits, dropout, memory, special values."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, gradients, to_double
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards.card import Call
from mmkernels.reference import attention as reference

ROOT = Path(__file__).resolve().parent.parent
SINGLE_AND_HALF = (torch.float32, torch.bfloat16)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def heads(
    batch: int, count: int, len_q: int, len_k: int, channels: int, dtype: torch.dtype = torch.float32, kv: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, `kv` heads of the latter two."""
    kv = count if kv is None else kv
    return (
        drawn(batch, count, len_q, channels, dtype=dtype),
        drawn(batch, kv, len_k, channels, dtype=dtype, seed=1),
        drawn(batch, kv, len_k, channels, dtype=dtype, seed=2),
    )


def assert_equal_functions(
    ours: Callable[..., Any], plain: Callable[..., Any], call: Call, what: str, luck: float = 0
) -> None:
    """Outputs and gradients of `ours` within the rule, where `plain` is torch's formula; `luck` epsilons of the largest of
    them more, where single numbers in which large terms cancel may be right by luck."""
    upstream = cotangents(as_tuple(call.of(plain)))
    truth = [*as_tuple(to_double(call).of(plain)), *gradients(plain, to_double(call), upstream)]
    scale = max((t.abs().max().item() for t in truth if t is not None and t.numel()), default=0.0)
    for i, (a, b, c) in enumerate(
        zip(
            (*as_tuple(call.of(ours)), *gradients(ours, call, upstream)),
            (*as_tuple(call.of(plain)), *gradients(plain, call, upstream)),
            truth,
            strict=True,
        )
    ):
        assert_within_rule(a, b, c, f"result {i} of {what}", extra=luck * torch.finfo(a.dtype).eps * scale)


# --- the formulas that models have --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias", "grouped", "scale"])
def test_equals_torch(case: str, dtype: torch.dtype, isa: str) -> None:
    q, k, v = heads(2, 4, 37, 37, 24, dtype, kv=2 if case == "grouped" else 4)
    theirs: dict[str, Any] = {"enable_gqa": True} if case == "grouped" else {}
    ours: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if case == "causal":
        theirs["is_causal"] = ours["is_causal"] = True
    if case == "scale":
        theirs["scale"] = ours["scale"] = 0.4
    if case == "mask":
        tensors["added"] = drawn(2, 1, 37, 37) > -0.5
    if case == "bias":
        tensors["added"] = drawn(1, 4, 37, 37, dtype=dtype)

    def torchs(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added, **theirs)

    def mine(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None) -> Tensor:
        return mk.attention(q, k, v, **({"mask" if case == "mask" else "bias": added} if added is not None else {}), **ours)

    assert_equal_functions(mine, torchs, Call((q, k, v), tensors), case)


def eager_of_transformers(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """What `eager_attention_forward` is in the models of Hugging Face: [B, L, H, D] comes out."""
    group = q.size(1) // k.size(1)
    k, v = (x[:, :, None].expand(*x.shape[:2], group, *x.shape[2:]).flatten(1, 2) for x in (k, v))
    weights = torch.matmul(q, k.transpose(2, 3)) * q.size(-1) ** -0.5 + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def additive_mask(dtype: torch.dtype, length: int, padding: int) -> Tensor:
    """Causal, and the first `padding` tokens of the second sample hidden: finfo.min where nothing is to be seen."""
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    hidden[1, :, :, :padding] = True
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_equals_the_eager_attention_of_transformers(dtype: torch.dtype, isa: str) -> None:
    """With an additive mask of finfo.min; padding at the left leaves rows that see nothing but finfo.min."""
    mask = additive_mask(dtype, 33, 5)

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mk.attention(q, k, v, bias=mask.to(q.dtype)).transpose(1, 2)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager_of_transformers(q, k, v, mask.to(q.dtype))

    assert_equal_functions(mine, eager, Call(heads(2, 4, 33, 33, 16, dtype, kv=2)), "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_finfo_min_are_averages(dtype: torch.dtype, isa: str) -> None:
    """A row all of whose keys have finfo.min added sees all of them alike, as in torch: the scores vanish beside it."""
    q, k, v = heads(1, 2, 40, 21, 8, dtype)
    out = mk.attention(q, k, v, bias=torch.full((1, 1, 40, 21), torch.finfo(torch.float32).min))
    torch.testing.assert_close(out, v.float().mean(2, keepdim=True).expand(1, 2, 40, 8).to(dtype), rtol=2e-2, atol=1e-3)
    few = mk.attention(q[:, :, :1], k, v, bias=torch.full((21,), torch.finfo(torch.float32).min))
    torch.testing.assert_close(few, out[:, :, :1], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("len_k", [21, 700])
def test_gradients_of_rows_of_finfo_min(len_k: int, isa: str) -> None:
    """The logarithm of such a row's sum is lost in its scores: its weights come of their own sum, over one block of keys or
    over several. Rows beside them are as ever."""
    q, k, v = heads(1, 2, 40, len_k, 8)
    bias = drawn(1, 1, 40, len_k)
    bias[:, :, 10:30] = torch.finfo(torch.float32).min

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mk.attention(q, k, v, bias=bias)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * 8**-0.5 + bias.to(q.dtype), -1) @ v

    assert_equal_functions(ours, plain, Call((q, k, v)), "rows of finfo.min", luck=1)


# --- any sizes ----------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    """Lengths, channels and groups around the sizes of vectors and panels, what is added to the scores of any shape."""
    lengths = st.one_of(st.integers(1, 40), st.sampled_from((49, 64, 65, 130)))
    channels = st.one_of(st.integers(1, 40), st.sampled_from((48, 64, 72)))
    batch, kv, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    len_q, len_k, dim, value_dim = data.draw(lengths), data.draw(lengths), data.draw(channels), data.draw(channels)
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    full = (batch, kv * group, len_q, len_k)
    kwargs: dict[str, Any] = {"is_causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        shape = tuple(size if data.draw(st.booleans()) else 1 for size in full)
        kwargs["bias"] = drawn(*shape, dtype=data.draw(st.sampled_from((dtype, torch.float32))), seed=3)
    if data.draw(st.booleans()):
        kwargs["mask"] = drawn(*(size if data.draw(st.booleans()) else 1 for size in full), seed=4) > -0.8
    if data.draw(st.booleans()):
        kwargs["window_size"] = tuple(data.draw(st.one_of(st.none(), st.integers(0, 30))) for _ in range(2))
    if data.draw(st.booleans()):
        kwargs["causal_alignment"] = "bottom_right"
    if data.draw(st.integers(0, 3)) == 0:
        kwargs |= {"dropout_p": 0.25, "seed": data.draw(st.integers(-(2**63), 2**63 - 1))}
    if data.draw(st.integers(0, 3)) == 0:
        kwargs["softcap"] = 2.0
    call = Call(
        (
            drawn(batch, kv * group, len_q, dim, dtype=dtype),
            drawn(batch, kv, len_k, dim, dtype=dtype, seed=1),
            drawn(batch, kv, len_k, value_dim, dtype=dtype, seed=2),
        ),
        kwargs,
    )
    with runtime.forced_isa(data.draw(st.sampled_from(runtime.available_isas()))):
        assert_equal_functions(
            mk.attention, reference.attention, call, f"{full} x {dim}, {value_dim}, {kwargs.keys()}", luck=2
        )


@pytest.mark.parametrize("shape", [(2, 4, 9, 1), (1, 4, 1, 1), (9, 1), ()])
def test_bias_of_all_keys_has_no_gradient(shape: tuple[int, ...], isa: str) -> None:
    """The softmax does not change where every key gets the same; what is left is rounding of the sum of the terms."""
    q, k, v = heads(2, 4, 9, 70, 8, kv=2)
    bias, upstream = drawn(*shape).requires_grad_(), drawn(2, 4, 9, 8, seed=3)
    gradient = torch.autograd.grad(mk.attention(q, k, v, bias=bias), bias, upstream)[0]
    weights = reference._weights(q, k.repeat_interleave(2, 1), *[None] * 5, 8**-0.5, 0.0, -1, -1, False)[0]
    terms = (weights * (upstream @ v.repeat_interleave(2, 1).transpose(2, 3))).abs().sum()
    assert gradient.abs().max() <= 4 * torch.finfo(torch.float32).eps * terms


# --- packed sequences and batches ---------------------------------------------------------------------------------------
def packed_call(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], dtype: torch.dtype, kv: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of 4 and `kv` heads, and where sequences begin."""
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    q, k, v = (
        drawn(total_q, 4, 16, dtype=dtype),
        drawn(total_k, kv, 16, dtype=dtype),
        drawn(total_k, kv, 16, dtype=dtype, seed=1),
    )
    cu_q, cu_k = (torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    return q, k, v, cu_q, cu_k


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "kv", "gated"),
    [
        ((5, 130, 0, 64, 1, 20), (5, 390, 7, 0, 40, 20), 2, True),
        ((300, 511, 1100, 3), (20, 300, 270, 40), 2, False),
        ((64, 1100), (64, 270), 4, False),  # few pairs: rows of the long one are split
        ((17, 64, 9), (33, 64, 50), 4, False),
    ],
    ids=["short", "long", "short beside long, a head of k for every head", "short, a head of k for every head"],
)
def test_packed_sequences_are_single_calls(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], kv: int, gated: bool, dtype: torch.dtype, causal: bool, isa: str
) -> None:
    """Bit for bit: outputs, logarithms, gradients; sequences of one block of keys and of several, of none, of one; long
    ones, whose rows are split among threads where there are few of them (without a gate, whose gradient has one owner)."""
    q, k, v, cu_q, cu_k = packed_call(lengths_q, lengths_k, dtype, kv)
    gate = drawn(k.size(0), 2, dtype=dtype, seed=4) if gated else None
    bias = drawn(len(lengths_q), 4, max(lengths_q), max(lengths_k), seed=5)
    more: dict[str, Any] = {"is_causal": causal, "causal_alignment": "bottom_right", "return_lse": True}

    def together(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None = None) -> Any:
        return mk.attention(q, k, v, value_gate=gate, bias=bias, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **more)

    def singly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor | None = None) -> Any:
        outs, lses = [], []
        for b in range(len(lengths_q)):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            q_b, k_b, v_b = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys)))
            bias_b = bias[b : b + 1, :, : lengths_q[b], : lengths_k[b]]
            gate_b = None if gate is None else gate[keys].transpose(0, 1)[None]
            out, lse = mk.attention(q_b, k_b, v_b, value_gate=gate_b, bias=bias_b, **more)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
        return torch.cat(outs), torch.cat(lses)

    call = Call((q, k, v, bias) if gate is None else (q, k, v, bias, gate))
    for i, (a, b) in enumerate(
        zip((*call.of(together), *gradients(together, call)), (*call.of(singly), *gradients(singly, call)), strict=True)
    ):
        assert_same_bits(a + 0.0, b + 0.0, f"result {i}")  # torch's sums of slices' gradients make 0 of -0


SHORT = (
    (3, 2, 49, 49, 32, 32),
    (2, 3, 16, 16, 64, 64),
    (1, 2, 64, 33, 17, 31),
    (2, 1, 5, 64, 80, 128),
    (2, 2, 23, 7, 70, 6),
    (2, 70, 49, 49, 8, 16),  # too many heads for what is added to the scores of each to be kept
)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("sizes", SHORT, ids=str)
def test_short_sequences(sizes: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    """Up to 64 queries and keys have a walk of their own: keys of one to four vectors, channels beside whole ones, what is
    added to scores the same for all, for a head or for none, heads side by side in memory or not."""
    batch, count, len_q, len_k, dim, value_dim = sizes
    q, k, _ = heads(batch, count, len_q, len_k, dim, dtype)
    v = drawn(batch, count, len_k, value_dim, dtype=dtype, seed=2)
    ids_q, ids_k = (drawn(batch, n, seed=6).gt(-0.5).int() for n in (len_q, len_k))
    more: dict[str, dict[str, Any]] = {
        "nothing": {},
        "bias of heads": {"bias": drawn(1, count, len_q, len_k, dtype=dtype, seed=3)},
        "bias of all": {"bias": drawn(len_q, len_k, seed=3), "scale": 0.4},
        "bias of each": {"bias": drawn(batch, 1, len_q, len_k, seed=3), "mask": drawn(count, len_q, len_k, seed=4) > -0.5},
        "mask of keys": {"mask": drawn(batch, 1, 1, len_k, seed=4) > -0.5},
        "segments": {"segment_ids_q": ids_q, "segment_ids_k": ids_k},
        "limits": {"limits": torch.arange(batch * len_q, dtype=torch.int32).reshape(batch, len_q) % (len_k + 1)},
        "window": {"window_size": (3, 4), "is_causal": False},
    }
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        for name, kwargs in more.items():
            every_row_sees = name in ("nothing", "bias of heads", "bias of all")
            call = Call(tuple(layout(x) for x in (q, k, v)), {"return_lse": every_row_sees, **kwargs})
            assert_equal_functions(mk.attention, reference.attention, call, f"{sizes} {name}", luck=4)
        sums = mk.attention(*call.args, **more["limits"], return_lse=True)[1]
        assert torch.equal(sums.isneginf(), (more["limits"]["limits"] == 0)[:, None].expand_as(sums))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_values_that_no_row_sees(dtype: torch.dtype, isa: str) -> None:
    """Beyond the last row's diagonal they may be anything."""
    q, k, v = heads(1, 2, 20, 40, 48, dtype)
    v[:, :, 20:] = torch.nan
    assert mk.attention(q, k, v, is_causal=True).isfinite().all()


TINY = ((9, 4, 16, 16, 6, 6), (19, 3, 16, 16, 10, 10), (8, 2, 5, 7, 64, 64), (17, 8, 12, 32, 6, 10), (8, 1, 16, 3, 3, 5))


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("sizes", TINY, ids=str)
def test_many_tiny_sequences(sizes: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    """A batch of eight or more has a kernel of its own, with batch entries as lanes: within the rule, and bit for bit what
    single calls give, which go another way."""
    batch, count, len_q, len_k, dim, value_dim = sizes
    q, k, _ = heads(batch, count, len_q, len_k, dim, dtype)
    v = drawn(batch, count, len_k, value_dim, dtype=dtype, seed=2)
    bias, mask = drawn(1, count, len_q, len_k, dtype=dtype, seed=3), drawn(len_q, len_k, seed=4) > -0.5
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        call = Call(tuple(layout(x) for x in (q, k, v)))
        for more in ({}, {"bias": bias, "mask": mask, "is_causal": True}, {"window_size": (2, 3)}):

            def together(q: Tensor, k: Tensor, v: Tensor, more: dict[str, Any] = more) -> Any:
                return mk.attention(q, k, v, return_lse=not more, **more)

            def plain(q: Tensor, k: Tensor, v: Tensor, more: dict[str, Any] = more) -> Any:
                return reference.attention(
                    q, k, v, return_lse=not more, **{a: b.to(q.dtype) if a == "bias" else b for a, b in more.items()}
                )

            assert_equal_functions(together, plain, call, f"{sizes} {list(more)}", luck=4)

            def singly(q: Tensor, k: Tensor, v: Tensor, one: Callable[..., Any] = together) -> Any:
                parts = [as_tuple(one(q[b : b + 1], k[b : b + 1], v[b : b + 1])) for b in range(batch)]
                return tuple(torch.cat(part) for part in zip(*parts, strict=True))

            upstream = cotangents(as_tuple(call.of(together)))
            pairs = zip(
                (*as_tuple(call.of(together)), *gradients(together, call, upstream)),
                (*as_tuple(call.of(singly)), *gradients(singly, call, upstream)),
                strict=True,
            )
            for i, (a, b) in enumerate(pairs):
                assert_same_bits(a + 0.0, b + 0.0, f"result {i} of {list(more)}")


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("shared", ["bias", "bias of keys", "mask", "nothing"])
def test_a_batch_is_single_calls(dtype: torch.dtype, shared: str, isa: str) -> None:
    """Bit for bit, whether or not what is added to the scores is laid out once for all."""
    q, k, v = heads(5, 4, 50, 60, 16, dtype, kv=2)
    added: dict[str, Tensor] = {
        "bias": {"bias": drawn(1, 4, 50, 60, dtype=dtype)},
        "bias of keys": {"bias": drawn(1, 1, 1, 60)},
        "mask": {"mask": drawn(1, 1, 50, 60) > -1},
        "nothing": {},
    }[shared]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return mk.attention(q, k, v, return_lse=True, **added)

    upstream = cotangents(function(q, k, v))
    together = (*function(q, k, v), *gradients(function, Call((q, k, v)), upstream))
    for b in range(5):
        part = [x[b : b + 1] for x in (q, k, v)]
        alone = (*function(*part), *gradients(function, Call(tuple(part)), [u[b : b + 1] for u in upstream]))
        for i, (one, other) in enumerate(zip(together, alone, strict=True)):
            assert_same_bits(one[b : b + 1], other, f"result {i} of entry {b}")


@pytest.mark.parametrize("cu_seqlens", [(0, 5, 3, 8), (1, 5, 8), (0, 5, 7), (0, 5, 9), (0, -1, 8)])
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_lengths_that_do_not_ascend_to_the_tokens(cu_seqlens: tuple[int, ...], name: str) -> None:
    x = drawn(8, 2, 4)
    good = torch.tensor((0, *[8] * (len(cu_seqlens) - 1)))
    arguments = {"cu_seqlens_q": good, "cu_seqlens_k": good, name: torch.tensor(cu_seqlens)}
    with pytest.raises(ValueError, match=rf"^{name}: expected to (ascend|begin|end)"):
        mk.attention(x, x, x, **arguments)
    with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
        torch.ops.mmkernels.attention(
            x, x, x, *[None] * 5, *arguments.values(), None, None, 1.0, 0.0, 0.0, -1, -1, False, 0, 0
        )


# --- bits and order -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize(
    ("sizes", "bias"),
    [
        ((40, 2, 17, 17, 8), (1, 2, 17, 17)),
        ((6, 4, 20, 30, 8), (1, 1, 20, 30)),
        ((6, 4, 20, 30, 8), (6, 1, 1, 30)),
        ((6, 4, 20, 30, 8), (1, 1, 1, 30)),
        ((1, 1, 1100, 24, 8), (1, 1, 1100, 24)),
        ((1, 1, 1100, 24, 8), None),
        ((1, 3, 2, 900, 8), None),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_threads(
    sizes: tuple[int, ...], bias: tuple[int, ...] | None, dtype: torch.dtype, isa: str, threads: None
) -> None:
    """Forward and backward: gradients of a bias that are summed over the batch, the heads or the queries; few pairs whose
    rows are split."""
    call = Call(heads(*sizes, dtype), {} if bias is None else {"bias": drawn(*bias)})
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([call.of(mk.attention), *gradients(mk.attention, call)])
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(a, b, f"result {i}")


def test_order_of_the_keys_does_not_matter(isa: str) -> None:
    q, k, v = heads(2, 4, 30, 450, 16, kv=2)
    bias, mask = drawn(2, 4, 30, 450), drawn(2, 1, 30, 450) > -1
    order = torch.randperm(450, generator=torch.Generator().manual_seed(0))

    def permuted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Any:
        return mk.attention(q, k[:, :, order], v[:, :, order], bias=bias[..., order], mask=mask[..., order], return_lse=True)

    def ordered(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Any:
        return mk.attention(q, k, v, bias=bias, mask=mask, return_lse=True)

    call = Call((q, k, v, bias, mask))
    for a, b in zip(
        (*call.of(ordered), *gradients(ordered, call)), (*call.of(permuted), *gradients(permuted, call)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_few_rows_are_those_of_many(dtype: torch.dtype, isa: str) -> None:
    """Few queries have a kernel of their own, which rounds no weights as matrix tiles do."""
    q, k, v = heads(2, 4, 60, 410, 24, dtype, kv=2)
    bias = drawn(1, 4, 60, 410)
    many, many_lse = mk.attention(q, k, v, bias=bias, return_lse=True)
    atol = max(1e-5, torch.finfo(dtype).eps * many.abs().max().item())
    for first, count in ((0, 1), (7, 2), (30, 3), (50, 6)):
        rows = slice(first, first + count)
        few, few_lse = mk.attention(q[:, :, rows], k, v, bias=bias[:, :, rows], return_lse=True)
        torch.testing.assert_close(few, many[:, :, rows], rtol=1.3e-6 if dtype == torch.float32 else 1.6e-2, atol=atol)
        torch.testing.assert_close(few_lse, many_lse[:, :, rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("len_k", [1, 17, 384, 385, 1000])
@pytest.mark.parametrize("len_q", [1, 2, 3, 4, 11, 19, 49])
def test_few_rows_over_blocks_of_keys(len_q: int, len_k: int, dtype: torch.dtype, isa: str) -> None:
    """Rows alone or left over from panels, of whole vectors of channels and of nothing but products; later keys have larger
    scores, so that what came of the earlier ones shrinks."""
    q, k, v = heads(2, 2, len_q, len_k, 32, dtype)
    q, k = q.abs(), k * torch.linspace(0.2, 2, len_k)[:, None].to(dtype)
    call = Call((q, k, v), {"return_lse": True})
    ours, plain = call.of(mk.attention), call.of(reference.attention)
    for a, b, truth in zip(ours, plain, to_double(call).of(reference.attention), strict=True):
        assert_within_rule(a, b, truth, f"{len_q} of {len_k}, {dtype}")


# --- rows that see nothing, special values ------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("len_q", [2, 40])
def test_rows_that_see_nothing(dtype: torch.dtype, len_q: int, isa: str) -> None:
    """Out 0, logarithm -inf, no gradient to them or from them, no NaN; whichever argument hides the keys."""
    q, k, v = (x.requires_grad_() for x in heads(2, 4, len_q, 400, 8, dtype, kv=2))
    blind = torch.arange(len_q) % 2 == 1
    zero = torch.zeros(2, len_q, dtype=torch.int64)
    hidden: tuple[dict[str, Tensor], ...] = (
        {"mask": ~blind[:, None].expand(len_q, 400)},
        {"mask": ~blind[:, None]},
        {"bias": torch.zeros(len_q, 400).masked_fill(blind[:, None], -math.inf)},
        {"limits": zero + torch.where(blind, 0, 400)},
        {"limits": zero + torch.where(blind, -3, 500)},
        {"segment_ids_q": zero + blind, "segment_ids_k": torch.zeros(1, 400, dtype=torch.int64)},
    )
    for arguments in hidden:
        out, lse = mk.attention(q, k, v, return_lse=True, **arguments)
        assert out[:, :, blind].abs().max() == 0 and (lse[:, :, blind] == -math.inf).all(), arguments.keys()
        assert out.isfinite().all() and lse[:, :, ~blind].isfinite().all()
        upstream = (drawn(*out.shape, dtype=dtype), drawn(*lse.shape))
        grads = torch.autograd.grad((out, lse), (q, k, v), upstream)
        assert all(gradient.isfinite().all() for gradient in grads)
        assert grads[0][:, :, blind].abs().max() == 0
        upstream[0][:, :, blind] = 0
        upstream[1][:, :, blind] = 0
        for a, b in zip(
            grads, torch.autograd.grad(mk.attention(q, k, v, return_lse=True, **arguments), (q, k, v), upstream), strict=True
        ):
            assert_same_bits(a, b, "gradient")
    assert mk.attention(q, k[:, :, :0], v[:, :, :0], return_lse=True)[1].max() == -math.inf


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("len_q", [2, 40])
def test_nan_and_infinity_go_where_torch_sends_them(dtype: torch.dtype, value: float, len_q: int, isa: str) -> None:
    for name, at in (("q", (1, 2, 1, 3)), ("k", (1, 1, 17, 3)), ("v", (1, 1, 17, 3)), ("bias", (1, 2, 1, 17))):
        q, k, v = heads(2, 4, len_q, 50, 8, dtype)
        tensors = {"q": q, "k": k, "v": v, "bias": drawn(2, 4, len_q, 50, dtype=dtype)}
        tensors[name][at] = value
        with sdpa_kernel(SDPBackend.MATH):
            plain = F.scaled_dot_product_attention(q, k, v, attn_mask=tensors["bias"])
        ours = mk.attention(**tensors)
        assert torch.equal(ours.isnan(), plain.isnan()), name
        assert torch.equal(ours.isfinite(), plain.isfinite()), name


def test_nan_of_a_hidden_key_stays_hidden_in_the_scores(isa: str) -> None:
    q, k, v = heads(1, 2, 40, 40, 8)
    k[0, 0, 30] = torch.nan
    out = mk.attention(q, k, v, is_causal=True)
    assert out[0, 0, :30].isfinite().all() and out[0, 0, 30:].isnan().all() and out[0, 1].isfinite().all()


# --- dropout ------------------------------------------------------------------------------------------------------------
def kept_by(p: float, seed: int, batch: int, count: int, kv: int, len_q: int, len_k: int) -> Tensor:
    """Which weights a call keeps, seen through values that are the identity."""
    q, k, _ = heads(batch, count, len_q, len_k, 8, kv=kv)
    v = torch.eye(len_k).expand(batch, kv, len_k, len_k)
    return mk.attention(q, k, v, dropout_p=p, seed=seed) != 0


@pytest.mark.parametrize("len_q", [2, 50])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 5, -(2**63)])
def test_dropout_is_the_hash_that_the_reference_says(seed: int, len_q: int, isa: str) -> None:
    kept = kept_by(0.3, seed, 2, 4, 2, len_q, 60)
    assert torch.equal(kept, reference.dropout_keep(torch.tensor(seed), 0.3, 0, 2, 4, len_q, 60))
    assert torch.equal(kept, kept_by(0.3, seed, 2, 4, 2, len_q, 60))


def test_dropout_keeps_as_many_as_it_should(isa: str) -> None:
    """Within five standard deviations, over all and for every head, query and key; other seeds drop others."""
    p, sizes = 0.2, (2, 4, 64, 64)
    kept = kept_by(p, 3, 2, 4, 4, 64, 64)
    for dims in ((), (0, 1), (0, 1, 2), (0, 1, 3), (2, 3)):
        counts = kept.sum(dims, dtype=torch.float64) if dims else kept.sum(dtype=torch.float64)
        number = math.prod(sizes) / counts.numel()
        assert (counts - (1 - p) * number).abs().max() <= 5 * math.sqrt(number * p * (1 - p)), dims
    agree = (kept == kept_by(p, 4, 2, 4, 4, 64, 64)).double().mean().item()
    assert abs(agree - (p**2 + (1 - p) ** 2)) < 0.02


def test_dropout_of_packed_sequences_counts_their_heads(isa: str) -> None:
    lengths = (6, 9)
    q, k, _, cu_q, cu_k = packed_call(lengths, lengths, torch.float32, kv=4)
    v = torch.cat([torch.eye(length, 9) for length in lengths])[:, None].expand(-1, 4, -1)
    kept = mk.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, dropout_p=0.4, seed=9) != 0
    for b, length in enumerate(lengths):
        rows = kept[cu_q[b] : cu_q[b + 1], :, :length].transpose(0, 1)
        assert torch.equal(rows[None], reference.dropout_keep(torch.tensor(9), 0.4, 4 * b, 1, 4, length, length))


def test_dropout_scales_what_it_keeps_and_draws_its_seed_from_torch() -> None:
    q, k, v = heads(4, 4, 64, 64, 8)
    v = torch.ones_like(v)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(mk.attention(q, k, v, dropout_p=0.3))
    assert_same_bits(outs[0], outs[1], "the same state of torch's generator")
    assert not torch.equal(outs[0], outs[2])
    assert abs(outs[0].mean().item() - 1) < 0.01
    assert_same_bits(
        mk.attention(q, k, v, dropout_p=0.3, seed=5),
        mk.attention(q, k, v, dropout_p=0.3, seed=torch.tensor(5)),
        "a seed in a tensor",
    )


def test_dropout_in_backward_is_that_of_forward() -> None:
    operands = [x.double().requires_grad_() for x in heads(1, 4, 6, 9, 5, kv=2)]
    bias = drawn(1, 1, 6, 9).double().requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return mk.attention(q, k, v, bias=bias, dropout_p=0.4, seed=2, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(function, (*operands, bias))


# --- gradients ----------------------------------------------------------------------------------------------------------
def test_gradient_of_the_logarithms(isa: str) -> None:
    """Alone, and beside that of the output."""
    q, k, v = (x.requires_grad_() for x in heads(2, 3, 20, 30, 8))
    upstream = drawn(2, 3, 20)
    expected = torch.autograd.grad(torch.logsumexp(q @ k.transpose(2, 3) * 8**-0.5, -1), (q, k), upstream)
    lse = mk.attention(q, k, v, return_lse=True)[1]
    ours = torch.autograd.grad(lse, (q, k, v), upstream)
    for a, b in zip(ours, (*expected, torch.zeros_like(v)), strict=True):
        torch.testing.assert_close(a, b)
    out, lse = mk.attention(q, k, v, return_lse=True)
    both = torch.autograd.grad((out, lse), q, (drawn(2, 3, 20, 8), upstream))[0]
    only_out = torch.autograd.grad(mk.attention(q, k, v), q, drawn(2, 3, 20, 8))[0]
    torch.testing.assert_close(both, only_out + expected[0])


def test_upstream_gradients_of_any_layout(isa: str) -> None:
    """Expanded (of a sum), transposed, with a strided last dimension; and none at all."""
    q, k, v = (x.requires_grad_() for x in heads(2, 3, 20, 30, 8))
    losses: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda out: out.sum(),
        lambda out: out.mean(2).square().sum(),
        lambda out: (out.transpose(1, 2).flatten(2) * drawn(2, 20, 24)).sum(),
        lambda out: (out.transpose(2, 3).contiguous() * drawn(2, 3, 8, 20)).sum(),
        lambda out: out[..., ::2].square().sum(),
    )
    for loss in losses:
        ours = torch.autograd.grad(loss(mk.attention(q, k, v)), (q, k, v))
        theirs = torch.autograd.grad(loss(reference.attention(q, k, v)), (q, k, v))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "value_gate"])
def test_only_one_input_requires_grad(wanted: str, isa: str) -> None:
    q, k, v = heads(2, 4, 9, 11, 8, kv=2)
    named = {"q": q, "k": k, "v": v, "bias": drawn(1, 4, 9, 11), "value_gate": drawn(2, 2, 11)}
    named[wanted] = named[wanted].clone().requires_grad_()
    upstream = drawn(2, 4, 9, 8)
    ours = torch.autograd.grad(mk.attention(**named), named[wanted], upstream)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(reference.attention(**named), named[wanted], upstream)[0])


def test_one_tensor_as_queries_keys_and_values() -> None:
    x = drawn(2, 3, 20, 8).requires_grad_()
    upstream = drawn(2, 3, 20, 8, seed=1)
    ours = torch.autograd.grad(mk.attention(x, x, x), x, upstream)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(reference.attention(x, x, x), x, upstream)[0])


def test_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in heads(1, 2, 5, 7, 8))
    out, lse = mk.attention(q, k, v, return_lse=True)
    first = torch.autograd.grad((out.square().sum(), lse.square().sum()), (q, k, v), create_graph=True)
    for source in (q, k, v):
        with pytest.raises(NotImplementedError, match="twice"):
            torch.autograd.grad(sum(gradient.square().sum() for gradient in first), source, retain_graph=True)


# --- layout and memory --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_heads_are_put_together_without_a_copy(dtype: torch.dtype) -> None:
    joint = drawn(2, 9, 3, 4, 8, dtype=dtype).requires_grad_()
    out = mk.attention(*joint.permute(2, 0, 3, 1, 4))
    together = out.transpose(1, 2).flatten(2)
    assert together.shape == (2, 9, 32) and together.is_contiguous() and together.data_ptr() == out.data_ptr()
    assert torch.autograd.grad(together, joint, drawn(2, 9, 32, dtype=dtype))[0].shape == joint.shape


def test_no_tensor_of_scores_is_made() -> None:
    """Forward and backward of 4 heads and 4096 tokens, whose scores would take 256 MiB."""
    script = """
import resource
import torch
import mmkernels as mk

def call(length):
    q, k, v = (torch.zeros(1, 4, length, 16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(length, requires_grad=True)
    mk.attention(q, k, v, bias=bias, dropout_p=0.1, seed=1, is_causal=True).sum().backward()

call(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "python_tests",  # where no source tree stands before the installed package
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 64, f"{done.stdout} MiB"


# --- around torch -------------------------------------------------------------------------------------------------------
def test_new_lengths_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return mk.attention(q, k, v, bias=bias, is_causal=True, window_size=(20, 0))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch, len_q, len_k in ((2, 17, 20), (5, 29, 31), (3, 50, 70), (7, 33, 12)):
        q, k, v = heads(batch, 4, len_q, len_k, 8)
        bias = drawn(1, 4, len_q, len_k)
        assert_same_bits(compiled(q, k, v, bias), function(q, k, v, bias), "compiled")
    assert counter.frame_count == 1

    torch._dynamo.reset()
    counter = CompileCounter()
    packed = torch.compile(
        lambda q, k, v, cu_q, cu_k: mk.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for lengths in ((5, 7, 3, 6), (9, 2, 4, 8, 5, 1), (11, 20)):
        q, k, v, cu_q, cu_k = packed_call(lengths, lengths, torch.float32)
        assert_same_bits(packed(q, k, v, cu_q, cu_k), mk.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k), "packed")
    assert counter.frame_count == 1


def test_exports() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return mk.attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    operands = heads(2, 4, 9, 9, 8)
    program = torch.export.export(Block(), operands)
    assert_same_bits(program.module()(*operands), Block()(*operands), "exported")


def test_autocast_casts_as_torch_does() -> None:
    q, k, v = (x.requires_grad_() for x in heads(2, 4, 20, 30, 8))
    bias = drawn(1, 4, 20, 30).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = mk.attention(q, k, v, bias=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed = mk.attention(q.bfloat16(), k, v.half().float())
    assert ours.dtype == theirs.dtype == mixed.dtype == torch.bfloat16
    assert_same_bits(ours, mk.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias), "under autocast")
    gradients_of = torch.autograd.grad(ours.float().square().sum(), (q, k, v, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients_of)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"^q: "):
        mk.attention(q.int(), k, v)


def test_inference_mode_and_no_grad() -> None:
    q, k, v = (x.requires_grad_() for x in heads(1, 2, 5, 7, 8))
    with torch.inference_mode():
        assert not mk.attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not mk.attention(q, k, v).requires_grad
    assert all(result.requires_grad for result in mk.attention(q, k, v, return_lse=True))
    bias = drawn(5, 7).requires_grad_()
    assert mk.attention(q.detach(), k.detach(), v.detach(), bias=bias).requires_grad


def test_explain_and_trace() -> None:
    q, k, v = heads(1, 2, 5, 7, 8)
    expected = "avx512" if runtime.isa() == "amx" else runtime.isa()
    explanation = mk.explain(mk.attention, q, k, v)
    assert explanation.op == "attention" and explanation.kernel == f"cpu/{expected}"
    assert mk.explain("attention", q.double(), k.double(), v.double()).kernel == "cpu/generic"
    runtime.last_kernels(clear=True)
    q.requires_grad_()
    mk.attention(q, k, v).sum().backward()
    assert runtime.last_kernels() == [("attention", explanation.kernel), ("attention_backward", explanation.kernel)]


def test_threads_of_python() -> None:
    """Many Python threads at once: each has working memory of its own."""
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = heads(2, 4, 50, 60, 16)
    bias = drawn(1, 4, 50, 60)
    expected = mk.attention(q, k, v, bias=bias)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: mk.attention(q, k, v, bias=bias), range(100)):
            assert_same_bits(out, expected, "from a thread")


def test_raw_operators_refuse_what_does_not_fit() -> None:
    """What compiled graphs call: checked in the kernel's entry, nothing is read or written wild."""
    q, k, v = heads(2, 4, 5, 7, 8, kv=2)
    ids_q, ids_k = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    names = [argument.name for argument in torch.ops.mmkernels.attention.default._schema.arguments[:12]]

    def forward(**changed: Any) -> Any:
        tensors = {**dict.fromkeys(names), "q": q, "k": k, "v": v, **changed}
        return torch.ops.mmkernels.attention(*tensors.values(), 1.0, 0.0, 0.0, -1, -1, False, 0, 0)

    out, lse = forward()

    def backward(**changed: Any) -> None:
        t = {"grad_out": out, "grad_lse": None, **dict.fromkeys(names), "q": q, "k": k, "v": v, "out": out, "lse": lse}
        torch.ops.mmkernels.attention_backward(*{**t, **changed}.values(), 1.0, 0.0, 0.0, -1, -1, False, 0, 0, False, False)

    backward()
    for changed, name in (
        ({"q": q[0]}, "q"),
        ({"k": k[:1]}, "k"),
        ({"k": k[..., :4]}, "k"),
        ({"k": k[:, :, :3]}, "v"),
        ({"v": v.bfloat16()}, "v"),
        ({"q": q[:, :3]}, "k"),
        ({"q": drawn(2, 4, 5, 16)[..., ::2]}, "q"),
        ({"bias": drawn(5, 7)}, "bias"),
        ({"bias": drawn(1, 1, 5, 6)}, "bias"),
        ({"bias": drawn(1, 1, 5, 7).double()}, "bias"),
        ({"mask": drawn(1, 1, 5, 7)}, "mask"),
        ({"mask": drawn(1, 3, 5, 7) > 0}, "mask"),
        ({"limits": ids_q[:, :4]}, "limits"),
        ({"limits": ids_q.float()}, "limits"),
        ({"segment_ids_q": ids_q}, "segment_ids_q"),
        ({"segment_ids_q": ids_q, "segment_ids_k": ids_k[:, :6]}, "segment_ids_k"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, "cu_seqlens_k"),
        ({"value_gate": drawn(2, 4, 7)}, "value_gate"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed"),
    ):
        for operator in (forward, backward):
            with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
                operator(**changed)
    for changed, name in (
        ({"grad_out": out[:, :, :4]}, "grad_out"),
        ({"grad_out": out.bfloat16()}, "grad_out"),
        ({"out": out[:1]}, "out"),
        ({"lse": lse[:, :, :4].contiguous()}, "lse"),
        ({"lse": lse.double()}, "lse"),
        ({"grad_lse": lse.transpose(1, 2)}, "grad_lse"),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            backward(**changed)
