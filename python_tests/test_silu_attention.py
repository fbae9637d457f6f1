"""Parameter-free cross-attention beyond its card: what is dropped, bit for bit, in forward and in backward."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, draw, gradients, to_double
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards import card_of
from mmkernels.cards.card import Call
from mmkernels.reference import silu_attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scores_of(x: Tensor, keys: Tensor, **kwargs: Any) -> Tensor:
    """The kept scores themselves, [B, L, M]: what comes out where the values are an identity."""
    identity = torch.eye(keys.shape[1], dtype=x.dtype).expand(x.shape[0], -1, -1)
    return mk.silu_attention(x, keys, identity, **kwargs)


def nearly_tied(batch: int, rows: int, keys: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, and keys of which some are equal and others differ in few of their last bits: so do the scores of a row."""
    x, base = normal(batch, rows, channels, dtype=dtype), normal(batch, 1, channels, dtype=dtype, seed=4)
    steps = torch.randint(-2, 3, (batch, keys, channels), generator=torch.Generator().manual_seed(5))
    return x, base * (1 + steps * torch.finfo(dtype).eps).to(dtype)


# --- what is dropped ----------------------------------------------------------------------------------------------------
def expected_of(scores: Tensor, drop_ratio: float) -> Tensor:
    threshold = scores.sort(-1).values[..., int(drop_ratio * scores.shape[-1]), None]
    return torch.where(scores >= threshold, scores, 0)


@pytest.mark.parametrize("drop_ratio", [0.05, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_keeps_what_a_sort_keeps(drop_ratio: float, dtype: torch.dtype, tied: bool, isa: str) -> None:
    """The scores that drop_ratio 0 gives, sorted by torch, say which of them stay: bit for bit, near ties and ties too."""
    x, keys = nearly_tied(2, 23, 77, 9, dtype)
    if not tied:
        keys = normal(2, 77, 9, dtype=dtype, seed=4)
    scores = scores_of(x, keys)
    assert torch.equal(scores_of(x, keys, drop_ratio=drop_ratio), expected_of(scores, drop_ratio))


@over_dtypes
def test_ties_are_kept(dtype: torch.dtype, isa: str) -> None:
    """Of keys that are there three times, the threshold's own are all kept and those below all dropped."""
    distinct = 8
    keys = normal(1, distinct, 16, dtype=dtype).repeat(1, 3, 1)
    x, values = normal(1, 40, 16, dtype=dtype, seed=4), normal(1, 3 * distinct, 5, dtype=dtype, seed=5)
    for dropped, rank in ((0, 1), (0, 2), (3, 3), (3, 5), (6, 6), (21, 23)):
        ratio = (rank + 0.5) / (3 * distinct)
        kept = scores_of(x, keys, drop_ratio=ratio)
        assert ((kept != 0).sum(-1) == 3 * distinct - dropped).all()
        with torch.no_grad():
            out, plain = (f(x, keys, values, drop_ratio=ratio) for f in (mk.silu_attention, reference.silu_attention))
            oracle = reference.silu_attention(x.double(), keys.double(), values.double(), drop_ratio=ratio)
        assert_within_rule(out, plain, oracle, f"rank {rank}")


def test_every_score_tied() -> None:
    """Nothing is below the threshold, whatever the rank: zero scores of either sign, and equal ones."""
    x = torch.zeros(1, 3, 4)
    assert (scores_of(x, normal(1, 6, 4), drop_ratio=0.9) == 0).all()
    x, keys = normal(1, 3, 4), normal(1, 1, 4).expand(1, 6, 4)
    assert torch.equal(scores_of(x, keys, drop_ratio=0.9), scores_of(x, keys))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("drop_ratio", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("activated", [False, True])
def test_nan_and_infinity_as_in_torch(value: float, drop_ratio: float, activated: bool, isa: str) -> None:
    for position in range(3):
        tensors = [normal(2, 7, 6), normal(2, 9, 6, seed=4), normal(2, 9, 5, seed=5)]
        tensors[position][1, 3, 2] = value
        call = Call(tuple(tensors), {"drop_ratio": drop_ratio, "key_is_activated": activated})
        ours, plain = call.of(mk.silu_attention), call.of(reference.silu_attention)
        assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.isinf(), plain.isinf())
        for a, b in zip(gradients(mk.silu_attention, call), gradients(reference.silu_attention, call), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)  # NaN is the greatest score, whatever its sign


# --- backward makes the same decisions ----------------------------------------------------------------------------------
@over_dtypes
@pytest.mark.parametrize("channels", [24, 9000, 15000])
def test_backward_repeats_what_forward_decided(dtype: torch.dtype, channels: int, isa: str) -> None:
    """Where the upstream gradient is an identity, the gradient of values is the kept scores that backward has made again.
    15000 channels make several blocks of rows, and sums over more than one piece."""
    rows = 120 if channels == 15000 else 37
    x, keys = nearly_tied(1, rows, 33, channels, dtype)
    for ratio in (0.1, 0.5):
        kept = scores_of(x, keys, drop_ratio=ratio)
        values = normal(1, 33, rows, dtype=dtype).requires_grad_()
        out = mk.silu_attention(x, keys, values, drop_ratio=ratio)
        again = torch.autograd.grad(out, values, torch.eye(rows, dtype=dtype)[None])[0]
        assert torch.equal(again.mT, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_those_of_what_forward_kept(dtype: torch.dtype, isa: str) -> None:
    """Near ties: the formula with the mask that forward had, as a constant."""
    x, keys = nearly_tied(2, 19, 33, 8, dtype)
    values, scale = normal(2, 33, 6, dtype=dtype, seed=6), 0.7
    keep = scores_of(x, keys, drop_ratio=0.4, scale=scale) != 0

    def plain(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return (scale * (F.silu(x) @ F.silu(keys).mT) * keep) @ values

    def ours(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return mk.silu_attention(x, keys, values, drop_ratio=0.4, scale=scale)

    call = Call((x, keys, values))
    upstream = cotangents([call.of(plain)])
    for a, b, truth in zip(
        gradients(ours, call, upstream),
        gradients(plain, call, upstream),
        gradients(plain, to_double(call), upstream),
        strict=True,
    ):
        assert_within_rule(a, b, truth, "gradient")


def test_threshold_lies_between_dropped_and_kept() -> None:
    """So that scores which another tier or backend has made are kept or dropped alike, but for near ties."""
    x, keys, values = draw(card_of("silu_attention").samples[0], torch.float32).args
    scores = scores_of(x, keys).sort(-1).values
    _, threshold = torch.ops.mmkernels.silu_attention(x, keys, values, 0.3, False, 1.0)
    assert ((scores[..., 1] < threshold) & (threshold < scores[..., 2])).all()
    torch.testing.assert_close(threshold, (scores[..., 1] + scores[..., 2]) / 2)
    for name in runtime.available_isas():
        out = torch.ops.mmkernels.silu_attention_backward(
            torch.ones(2, 5, 4), x, keys, values, threshold, 0.3, False, 1.0, True, True, True
        )
        with runtime.forced_isa(name):
            other = torch.ops.mmkernels.silu_attention_backward(
                torch.ones(2, 5, 4), x, keys, values, threshold, 0.3, False, 1.0, True, True, True
            )
        for a, b in zip(out, other, strict=True):
            torch.testing.assert_close(a, b)


# --- sizes, dtypes, layouts ---------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    """Every tail of every vector and panel, in every dtype; scores that lie apart by construction: keys are multiples of
    one, and every x has a positive product with it."""
    sizes = ((1, 3), (1, 40), (1, 50), (2, 40), (1, 40))
    batch, rows, keys, channels, width = (data.draw(st.integers(*size)) for size in sizes)
    dtype = data.draw(st.sampled_from(DTYPES))
    ratio = data.draw(st.sampled_from((0.0, 0.1, 0.35, 0.9)))
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(keys)).float()
    direction = 0.5 + normal(batch, 1, channels, seed=4).abs()
    scores_apart = (order[None, :, None] - keys / 3) / 8 * direction
    x = 0.3 + normal(batch, rows, channels).abs()
    call = Call(
        (x.to(dtype), scores_apart.to(dtype), normal(batch, keys, width, dtype=dtype, seed=5)),
        {"drop_ratio": ratio, "key_is_activated": True, "scale": data.draw(st.sampled_from((1.0, 0.3, -1.0)))},
    )
    upstream = cotangents(as_tuple(call.of(reference.silu_attention)))
    for a, b, truth in zip(
        (call.of(mk.silu_attention), *gradients(mk.silu_attention, call, upstream)),
        (call.of(reference.silu_attention), *gradients(reference.silu_attention, call, upstream)),
        (to_double(call).of(reference.silu_attention), *gradients(reference.silu_attention, to_double(call), upstream)),
        strict=True,
    ):
        assert_within_rule(a, b, truth, f"{batch}x{rows}x{keys}x{channels}x{width} {dtype}")


@over_dtypes
def test_keys_that_are_activated_before(dtype: torch.dtype, isa: str) -> None:
    """As torch activates and rounds them, up to how silu itself rounds; their gradient is that of what was given."""
    x, keys, values = normal(2, 13, 16, dtype=dtype), normal(2, 21, 16, dtype=dtype, seed=4), normal(2, 21, 5, dtype=dtype)
    once, before = mk.silu_attention(x, keys, values), mk.silu_attention(x, F.silu(keys), values, key_is_activated=True)
    torch.testing.assert_close(once, before)


@over_dtypes
def test_bits_do_not_depend_on_the_rows_beside(dtype: torch.dtype, isa: str) -> None:
    x, keys, values = normal(3, 41, 24, dtype=dtype), normal(3, 50, 24, dtype=dtype, seed=4), normal(3, 50, 18, dtype=dtype)
    together = mk.silu_attention(x, keys, values, drop_ratio=0.1)
    for sample, rows in ((0, slice(0, 1)), (1, slice(7, 30)), (2, slice(40, 41))):
        part = slice(sample, sample + 1)
        alone = mk.silu_attention(x[part, rows], keys[part], values[part], drop_ratio=0.1)
        assert_same_bits(together[part, rows], alone, f"sample {sample}")


def test_scores_are_not_rounded_to_half_precision() -> None:
    """Scores that bfloat16 cannot tell apart: 256 and 257. The lower is dropped, and the other comes out as it is."""
    x = torch.full((1, 1, 2), 1000.0, dtype=torch.bfloat16)  # silu(1000) = 1000
    keys = torch.tensor([[[0.25, 0.006], [0.25, 0.007]]], dtype=torch.bfloat16)
    values = torch.tensor([[[1.0], [1.0]]], dtype=torch.bfloat16)
    scores = x.double() @ keys.double().mT
    assert scores[0, 0, 0] < scores[0, 0, 1] and scores.bfloat16()[0, 0, 0] == scores.bfloat16()[0, 0, 1]
    out = mk.silu_attention(x, keys, values, drop_ratio=0.5, key_is_activated=True)
    assert torch.equal(out.double(), scores[..., 1:].bfloat16().double())


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("drop_ratio", [0.0, 0.3])
def test_only_one_input_requires_grad(wanted: int, drop_ratio: float) -> None:
    tensors = list(draw(card_of("silu_attention").samples[0], torch.float32).args)
    tensors[wanted] = tensors[wanted].clone().requires_grad_()
    upstream = normal(2, 5, 4)
    ours, theirs = (
        torch.autograd.grad(f(*tensors, drop_ratio=drop_ratio), tensors[wanted], upstream)
        for f in (mk.silu_attention, reference.silu_attention)
    )
    torch.testing.assert_close(ours, theirs)


def test_gradient_that_is_expanded_or_strided() -> None:
    tensors = [t.requires_grad_() for t in draw(card_of("silu_attention").samples[0], torch.float32).args]
    for loss in (lambda out: out.sum(), lambda out: out.transpose(1, 2).reshape(-1).square().sum()):
        ours, theirs = (
            torch.autograd.grad(loss(f(*tensors, drop_ratio=0.3)), tensors)
            for f in (mk.silu_attention, reference.silu_attention)
        )
        torch.testing.assert_close(ours, theirs)


def test_the_same_tensor_as_keys_and_values() -> None:
    x, keys, _ = draw(card_of("silu_attention").samples[0], torch.float32).args
    keys.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(x, keys, keys, drop_ratio=0.3).square().sum(), keys)
        for f in (mk.silu_attention, reference.silu_attention)
    )
    torch.testing.assert_close(ours, theirs)


# --- memory and threads -------------------------------------------------------------------------------------------------
def test_no_tensor_of_all_scores() -> None:
    """Forward and backward of 330 MB of scores take less than a third of that beside their operands."""
    code = """
import resource, torch, mmkernels as mk
x, keys, values = (torch.randn(1, n, 8, requires_grad=True) for n in (20000, 4096, 4096))
mk.silu_attention(x[:, :8], keys, values, drop_ratio=0.1).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mk.silu_attention(x, keys, values, drop_ratio=0.1).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "python_tests", capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 110_000, f"{done.stdout} KB"


def test_calls_from_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, keys, values = normal(2, 50, 64), normal(2, 70, 64, seed=4), normal(2, 70, 30, seed=5)
    expected = mk.silu_attention(x, keys, values, drop_ratio=0.1)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: mk.silu_attention(x, keys, values, drop_ratio=0.1), range(50)):
            assert_same_bits(out, expected, "from a thread")


# --- torch's machinery --------------------------------------------------------------------------------------------------
def test_explain_and_trace() -> None:
    call = draw(card_of("silu_attention").samples[0], torch.float32)
    explanation = mk.explain(mk.silu_attention, *call.args, **call.kwargs)
    tier = "avx512" if runtime.isa() == "amx" else runtime.isa()
    assert explanation.op == "silu_attention" and explanation.kernel == f"cpu/{tier}"
    runtime.last_kernels(clear=True)
    gradients(mk.silu_attention, call)
    assert runtime.last_kernels() == [(name, f"cpu/{tier}") for name in ("silu_attention", "silu_attention_backward")]
    assert mk.explain("silu_attention", *to_double(call).args).kernel == "cpu/generic"


def test_triton_leaves_many_keys_and_doubles_to_others() -> None:
    backend = next(b for b in card_of("silu_attention").backends if b.name == "triton")
    with FakeTensorMode():
        for keys, dtype, expected in (
            (1024, torch.float32, None),
            (1025, torch.float32, "1025 keys"),
            (8, torch.float64, "64"),
        ):
            x, k, v = (torch.empty(1, n, 4, dtype=dtype, device="cuda") for n in (3, keys, keys))
            reason = backend.reason({"x": x, "keys": k, "values": v})
            assert reason is None if expected is None else expected in (reason or "")


def test_new_sizes_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(mk.silu_attention, fullgraph=True, dynamic=True, backend=counter)
    for batch, rows, keys in ((2, 17, 30), (5, 29, 41), (3, 50, 22)):
        x, k, v = normal(batch, rows, 8), normal(batch, keys, 8, seed=4), normal(batch, keys, 6, seed=5)
        expected = mk.silu_attention(x, k, v, drop_ratio=0.1)
        assert_same_bits(compiled(x, k, v, drop_ratio=0.1), expected, "compiled")
    assert counter.frame_count == 1


def test_inference_mode_and_no_grad() -> None:
    tensors = [t.requires_grad_() for t in draw(card_of("silu_attention").samples[0], torch.float32).args]
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert not mk.silu_attention(*tensors).requires_grad
    assert mk.silu_attention(*tensors).requires_grad


def test_autocast_of_mixed_dtypes() -> None:
    """What torch's own products take under autocast: operands of any two dtypes, and float64 as it is."""
    x, keys, values = draw(card_of("silu_attention").samples[0], torch.float32).args
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for tensors in ((x, keys, values), (x.bfloat16(), keys, values), (x, keys.half(), values.bfloat16())):
            out = mk.silu_attention(*tensors, drop_ratio=0.3)
            assert out.dtype == reference.silu_attention(*tensors, drop_ratio=0.3).dtype == torch.bfloat16
        assert mk.silu_attention(x.double(), keys.double(), values.double()).dtype == torch.float64


def test_changing_an_input_before_backward_is_noticed() -> None:
    x, keys, values = (t.requires_grad_() for t in (normal(1, 3, 4), normal(1, 5, 4), normal(1, 5, 2)))
    kept = keys * 1
    out = mk.silu_attention(x, kept, values, drop_ratio=0.3)
    kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- the raw operators --------------------------------------------------------------------------------------------------
def test_raw_operator_refuses_what_does_not_fit() -> None:
    """What a compiled graph calls: the kernel's own checks raise RuntimeError and name the argument, never read wild."""
    good: dict[str, Any] = {"x": normal(2, 5, 6), "keys": normal(2, 7, 6), "values": normal(2, 7, 4), "drop_ratio": 0.3}

    def call(**changed: Any) -> None:
        torch.ops.mmkernels.silu_attention(*{**good, **changed}.values(), False, 1.0)

    call()
    for name, value in (
        ("x", normal(5, 6)),
        ("x", normal(2, 5, 6).int()),
        ("x", normal(2, 6, 5).mT),
        ("keys", normal(2, 7, 6).double()),
        ("keys", normal(1, 7, 6)),
        ("keys", normal(2, 7, 5)),
        ("keys", normal(2, 6, 7).mT),
        ("values", normal(2, 6, 4)),
        ("values", normal(3, 7, 4)),
        ("values", normal(2, 7, 4).half()),
        ("drop_ratio", 1.0),
        ("drop_ratio", -0.5),
        ("drop_ratio", float("nan")),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            call(**{name: value})


def test_raw_backward_refuses_what_does_not_fit() -> None:
    good: dict[str, Any] = {
        "grad": normal(2, 5, 4),
        "x": normal(2, 5, 6),
        "keys": normal(2, 7, 6),
        "values": normal(2, 7, 4),
    }
    good |= {"threshold": normal(2, 5), "drop_ratio": 0.3}

    def call(**changed: Any) -> None:
        torch.ops.mmkernels.silu_attention_backward(*{**good, **changed}.values(), False, 1.0, True, True, True)

    call()
    for name, value in (
        ("grad", normal(2, 5, 5)),
        ("grad", normal(2, 4, 5).mT),
        ("grad", normal(2, 5, 4).double()),
        ("threshold", normal(2, 5).double()),
        ("threshold", normal(10)),
        ("threshold", normal(2, 4)),
        ("keys", normal(2, 7, 5)),
        ("values", normal(2, 6, 4)),
        ("drop_ratio", 1.5),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            call(**{name: value})
