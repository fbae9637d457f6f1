"""Hashed binary attention beyond its cards: the published code's vectors, codes bit for bit, every size of code, both ways
through few tokens, memory, threads, NaN."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, draw, gradients, leaves, to_double
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards import card_of
from mmkernels.cards.card import Call
from mmkernels.cards.hash_attention import _ecoformer, _hash
from mmkernels.ops import entry
from mmkernels.reference import hash_attention as reference

GOLDEN = Path(__file__).parent / "golden" / "ecoformer"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_self_terms = pytest.mark.parametrize("self_term", ["own", "all"])
CPU = torch.device("cpu")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_codes(*shape: int, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(GOLDEN / f"{case}.safetensors"), json.loads((GOLDEN / f"{case}.json").read_text())["hyper_parameters"]


def drawn(dtype: torch.dtype = torch.float32, **sizes: Any) -> Call:
    return _ecoformer(2, 3, 41, 12, 10, supports=9, bits=sizes.pop("bits", 8), **sizes)(
        CPU, dtype, torch.Generator().manual_seed(5)
    )


# --- published vectors --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["binattn_small", "binattn_odd"])
def test_golden_attention(case: str, isa: str) -> None:
    tensors, parameters = golden(case)
    codes, bits = reference.pack_codes(tensors["codes"] > 0), parameters["nbits"]
    call = Call((codes, codes, tensors["v"]), {"bits": bits, "offset": float(parameters["bias"])})
    assert parameters["bias"] == reference.default_offset(bits)
    ours = (call.of(mk.hash_attention), *gradients(mk.hash_attention, call, [tensors["gout"]]))
    oracle = (
        to_double(call).of(reference.hash_attention),
        *gradients(reference.hash_attention, to_double(call), [tensors["gout"].double()]),
    )
    for got, published, truth, name in zip(
        ours, (tensors["out"], tensors["grad.v"]), oracle, ("out", "grad v"), strict=True
    ):
        assert_within_rule(got, published, truth, name)


@pytest.mark.parametrize("case", ["hashattn_small", "hashattn_pvt_stage3"])
def test_golden_hashing(case: str, isa: str) -> None:
    """Codes, outputs and gradients. A y within rounding of a step would be left out; in these vectors there is none."""
    tensors, _ = golden(case)
    functions = tuple(tensors[name] for name in ("anchor", "A", "mvec"))
    call = Call((tensors["qk"], tensors["v"], *functions))
    bits = functions[1].shape[1]
    unclear = torch.minimum(tensors["preact"].abs(), (tensors["preact"].abs() - 1).abs()) < 2e-6
    assert not unclear.any()
    codes = mk.hash_codes(tensors["qk"], *functions)
    assert torch.equal(reference.unpack_codes(codes, bits)[~unclear], tensors["codes"][~unclear])

    ours = (call.of(mk.ecoformer_attention), *gradients(mk.ecoformer_attention, call, [tensors["gout"]])[:2])
    wide = to_double(call)
    oracle = (
        wide.of(reference.ecoformer_attention),
        *gradients(reference.ecoformer_attention, wide, [tensors["gout"].double()])[:2],
    )
    published = (tensors["out"], tensors["grad.qk"], tensors["grad.v"])
    for got, theirs, truth, name in zip(ours, published, oracle, ("out", "grad qk", "grad v"), strict=True):
        assert_within_rule(got, theirs, truth, name)


# --- the definition itself ----------------------------------------------------------------------------------------------
def test_packing() -> None:
    signs = torch.rand(3, 5, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    for bits in (1, 8, 31, 32):
        codes = reference.pack_codes(signs[..., :bits])
        assert codes.dtype == torch.int32
        assert torch.equal(reference.unpack_codes(codes, bits) > 0, signs[..., :bits])


def test_offsets() -> None:
    for bits in range(1, 33):
        assert reference.default_offset(bits) == bits + 1
        power = reference.power_of_two_offset(bits)
        assert power >= bits + 1 > power / 2 and power == 2 ** round(torch.tensor(power).log2().item())


@over_self_terms
def test_operators_own_formulas(self_term: str) -> None:
    """The backward formulas that kernels follow, against autograd through the definition, in float64."""
    call = drawn(torch.float64, self_term=self_term)
    qk, v, *functions = call.args
    own, offset = self_term == "own", reference.default_offset(8)
    out, codes, inside, sums = reference.ecoformer_attention_op(qk, v, *functions, offset, own, True)
    torch.testing.assert_close(out, call.of(reference.ecoformer_attention))
    upstream = normal(*v.shape, dtype=torch.float64)
    expected = gradients(reference.ecoformer_attention, call, [upstream])
    for need_qk, need_v in ((True, True), (True, False), (False, True)):
        got = reference.ecoformer_attention_backward_op(
            upstream, qk, v, *functions, codes, inside, sums, offset, own, need_qk, need_v
        )
        for value, truth, needed in zip(got, expected, (need_qk, need_v), strict=False):
            torch.testing.assert_close(value, truth) if needed else None
            assert needed or value.numel() == 0


def test_straight_through_is_the_identity_inside() -> None:
    y = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, torch.nan], requires_grad=True)
    value = reference.binary(y)
    value.sum().backward()
    assert torch.equal(value[:-1], torch.tensor([-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0])) and value[-1].isnan()
    assert torch.equal(y.grad, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))


def test_gradient_before_the_sign() -> None:
    """Everything before the sign is smooth: finite differences see it in the definition."""
    qk, *functions = _hash(1, 2, 5, 4, supports=3, bits=3)(CPU, torch.float64, torch.Generator().manual_seed(0)).args
    assert torch.autograd.gradcheck(lambda x: reference.preactivations(x, *functions), qk.requires_grad_())


def test_gradcheck_of_values() -> None:
    qk, v, *functions = drawn(torch.float64).args
    assert torch.autograd.gradcheck(lambda x: mk.ecoformer_attention(qk, x, *functions), v.requires_grad_(), fast_mode=True)


@over_self_terms
def test_all_is_a_mean_and_own_is_not(self_term: str) -> None:
    codes, v = random_codes(1, 2, 40), torch.ones(1, 2, 40, 3)
    out = mk.hash_attention(codes, codes, v, bits=16, self_term=self_term)
    assert torch.allclose(out, torch.ones_like(out)) == (self_term == "all")


# --- codes --------------------------------------------------------------------------------------------------------------
@over_dtypes
@pytest.mark.parametrize("bits", [1, 8, 9, 16, 31, 32])
def test_codes_of_every_length(bits: int, dtype: torch.dtype, isa: str) -> None:
    """Bit for bit those of the inputs widened to float64; higher bits are 0."""
    for channels in (1 if bits == 1 else 3, 8, 33):
        for tokens in (1, 7, 16, 17, 45):
            make = _hash(1, 2, tokens, channels, supports=5, bits=bits)
            call = make(CPU, dtype, torch.Generator().manual_seed(bits + channels))
            codes = call.of(mk.hash_codes)
            assert torch.equal(codes, to_double(call).of(reference.hash_codes))
            if bits < 32:
                assert ((codes >> bits) == 0).all()


def test_codes_do_not_depend_on_the_length_of_rows() -> None:
    qk, *functions = drawn().args[0], *drawn().args[2:]
    assert torch.equal(mk.hash_codes(qk, *functions), mk.hash_codes(qk * 2.0**20, *functions))


@over_dtypes
def test_ecoformer_is_hashing_and_attention(dtype: torch.dtype, isa: str) -> None:
    for self_term, offset in (("own", None), ("all", None), ("own", "power_of_two"), ("all", 20.0)):
        qk, v, *functions = drawn(dtype).args
        codes = mk.hash_codes(qk, *functions)
        apart = mk.hash_attention(codes, codes, v, bits=8, self_term=self_term, offset=offset)
        together = mk.ecoformer_attention(qk, v, *functions, self_term=self_term, offset=offset)
        assert_same_bits(together, apart, f"{self_term} {offset}")


def test_power_of_two() -> None:
    codes, v = random_codes(1, 2, 30), normal(1, 2, 30, 8)
    for bits, offset in ((16, 32.0), (15, 16.0), (1, 2.0), (32, 64.0)):
        a, b = (mk.hash_attention(codes, codes, v, bits=bits, offset=c) for c in ("power_of_two", offset))
        assert_same_bits(a, b, f"{bits} bits")


# --- sums by code -------------------------------------------------------------------------------------------------------
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 32))
    queries, keys, width = (data.draw(st.integers(1, most)) for most in (70, 70, 70))
    self_term = data.draw(st.sampled_from(("own", "all")))
    if self_term == "own":
        queries = keys
    dtype = data.draw(st.sampled_from(DTYPES))
    call = Call(
        (random_codes(2, 1, queries), random_codes(2, 1, keys, seed=6), normal(2, 1, keys, width, dtype=dtype)),
        {"bits": bits, "self_term": self_term},
    )
    upstream = cotangents(as_tuple(call.of(reference.hash_attention)))
    for a, b, truth in zip(
        (call.of(mk.hash_attention), *gradients(mk.hash_attention, call, upstream)),
        (call.of(reference.hash_attention), *gradients(reference.hash_attention, call, upstream)),
        (to_double(call).of(reference.hash_attention), *gradients(reference.hash_attention, to_double(call), upstream)),
        strict=True,
    ):
        assert_within_rule(a, b, truth, f"{bits} bits, {queries} x {keys} x {width}, {dtype}")


def test_higher_bits_do_not_count(isa: str) -> None:
    for tokens in (8, 60):
        codes, v = random_codes(1, 2, tokens), normal(1, 2, tokens, 5)
        for bits in (1, 7, 16, 31):
            masked = codes & (2**bits - 1)
            a, b = (mk.hash_attention(c, c, v, bits=bits) for c in (codes, masked))
            assert_same_bits(a, b, f"{bits} bits, {tokens} tokens")


@pytest.mark.parametrize("bits", [1, 8, 13, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_tokens_by_pairs_are_those_by_sums(bits: int, dtype: torch.dtype, isa: str) -> None:
    """Values are small integers, so that every sum is exact: few queries go by pairs of bits that differ, the same queries
    among many by sums."""
    for keys, width in ((1, 3), (7, 33), (16, 64)):
        codes_q, codes_k = random_codes(2, 2, 50), random_codes(2, 2, keys, seed=7)
        v = normal(2, 2, keys, width, dtype=dtype).mul(8).round()
        by_sums = mk.hash_attention(codes_q, codes_k, v, bits=bits, self_term="all")
        by_pairs = mk.hash_attention(codes_q[..., :16], codes_k, v, bits=bits, self_term="all")
        torch.testing.assert_close(by_pairs, by_sums[:, :, :16], rtol=2 * torch.finfo(dtype).eps, atol=0)
        own = mk.hash_attention(codes_k, codes_k, v, bits=bits)
        plain = reference.hash_attention(codes_k, codes_k, v, bits=bits)
        torch.testing.assert_close(own, plain, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_strided_codes() -> None:
    codes, v = random_codes(2, 6, 30), normal(2, 3, 30, 8)
    part = codes[:, ::2]
    a, b = (mk.hash_attention(c, c, v, bits=16) for c in (part, part.contiguous()))
    assert_same_bits(a, b, "every second head")
    by_tokens = random_codes(2, 30, 3).transpose(1, 2)
    a, b = (mk.hash_attention(c, c, v, bits=16) for c in (by_tokens, by_tokens.contiguous()))
    assert_same_bits(a, b, "heads last")


# --- NaN and infinity ---------------------------------------------------------------------------------------------------
@over_dtypes
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf], ids=["zero row", "nan", "inf"])
def test_a_row_without_a_direction_makes_nan_of_its_head(value: float, dtype: torch.dtype, isa: str) -> None:
    """As in the published formula: sigma is a mean over the head's tokens."""
    call = drawn(dtype)
    qk, _, *functions = call.args
    qk[1, 2, 17] = value
    codes = mk.hash_codes(qk, *functions)
    assert (codes[1, 2] == 0).all() and (codes[1, :2] != 0).any()
    out, plain = call.of(mk.ecoformer_attention), call.of(reference.ecoformer_attention)
    assert torch.equal(out.isnan(), plain.isnan()) and out[1, 2].isnan().all() and not out[0].isnan().any()
    grad_qk, grad_v, *_ = gradients(mk.ecoformer_attention, call)
    for gradient in (grad_qk, grad_v):
        assert gradient[1, 2].isnan().all() and not gradient[1, :2].isnan().any() and not gradient[0].isnan().any()


def test_nan_in_the_hash_function() -> None:
    for position in (2, 3, 4):
        args = list(drawn().args)
        args[position] = args[position].clone()
        args[position][1].view(-1)[0] = torch.nan
        out = mk.ecoformer_attention(*args)
        assert torch.equal(out.isnan(), reference.ecoformer_attention(*args).isnan()) and out[:, 1].isnan().all()


def test_nan_among_the_values(isa: str) -> None:
    for tokens in (8, 60):
        codes, v = random_codes(1, 2, tokens), normal(1, 2, tokens, 40)
        v[0, 1, 5, 33] = torch.nan
        out, plain = (f(codes, codes, v, bits=16) for f in (mk.hash_attention, reference.hash_attention))
        assert torch.equal(out.isnan(), plain.isnan()) and out[0, 1, :, 33].isnan().all() and out.isnan().sum() == tokens


# --- bits, threads, memory ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [1, 2, 9])
def test_same_bits_for_any_number_of_threads_in_chunks(heads: int, isa: str, threads: None) -> None:
    """Few heads are cut by chunks of tokens, many go one to a thread; the bits are the same."""
    make = _ecoformer(1, heads, 1700, 9, 33, supports=5, bits=16, clear=False)
    call = make(CPU, torch.float32, torch.Generator().manual_seed(1))
    codes = mk.hash_codes(call.args[0], *call.args[2:])
    of_codes = Call((codes, codes, call.args[1]), {"bits": 16})

    def results() -> list[Any]:
        return [
            mk.hash_codes(call.args[0], *call.args[2:]),
            call.of(mk.ecoformer_attention),
            *gradients(mk.ecoformer_attention, call),
            of_codes.of(mk.hash_attention),
            *gradients(mk.hash_attention, of_codes),
        ]

    torch.set_num_threads(1)
    expected = results()
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for i, (once, again) in enumerate(zip(expected, results(), strict=True)):
            assert_same_bits(once, again, f"result {i} with {count} threads")


def test_heads_do_not_depend_on_those_beside(isa: str) -> None:
    qk, v, *functions = drawn().args
    together = mk.ecoformer_attention(qk, v, *functions)
    alone = mk.ecoformer_attention(qk[1:, 2:], v[1:, 2:], *(f[2:] for f in functions))
    assert_same_bits(together[1:, 2:], alone, "one head")


def test_with_and_without_gradient_alike(isa: str) -> None:
    for tokens in (1, 12, 41):
        call = _ecoformer(1, 2, tokens, 8, 8, supports=4, bits=8)(CPU, torch.float32, torch.Generator().manual_seed(2))
        for function in (mk.ecoformer_attention, torch.compile(mk.ecoformer_attention, backend="eager", dynamic=True)):
            assert_same_bits(leaves(call)[0].of(function).detach(), call.of(mk.ecoformer_attention), f"{tokens} tokens")


def test_no_tensor_of_features_or_kernels() -> None:
    """32 features or 40 supports of 200 000 tokens would be 26 or 32 MB; codes are 0.8, and inputs and outputs 1.6 each."""
    code = """
import resource, torch, mmkernels as mk
n, m, bits = 200_000, 40, 32
qk, v = torch.randn(1, 1, n, 2), torch.randn(1, 1, n, 2)
f = torch.randn(1, m, 2), torch.randn(1, bits, m), torch.randn(1, m)
def run(qk, v):
    codes = mk.hash_codes(qk, *f)
    mk.hash_attention(codes, codes, v, bits=bits)
    mk.ecoformer_attention(qk, v, *f)
run(qk[:, :, :9], v[:, :, :9])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(qk, v)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "python_tests", capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 12_000, f"{done.stdout} KB"


def test_calls_from_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    call = drawn()
    expected = call.of(mk.ecoformer_attention)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: call.of(mk.ecoformer_attention), range(50)):
            assert_same_bits(out, expected, "from a thread")


# --- torch's machinery --------------------------------------------------------------------------------------------------
def test_explain_and_trace() -> None:
    tier = "avx512" if runtime.isa() == "amx" else runtime.isa()
    for name in ("hash_codes", "hash_attention", "ecoformer_attention"):
        card = card_of(name)
        call = draw(card.samples[0], torch.float32)
        assert mk.explain(card.function, *call.args, **call.kwargs).kernel == f"cpu/{tier}"
        runtime.last_kernels(clear=True)
        gradients(card.function, call)
        names = [name, f"{name}_backward"] if card.differentiable else [name]
        assert runtime.last_kernels() == [(op, f"cpu/{tier}") for op in names]
        assert mk.explain(name, *to_double(call).args, **call.kwargs).kernel == "cpu/generic"


def test_hash_functions_get_no_gradient() -> None:
    call, wanted = leaves(drawn())
    call.of(mk.ecoformer_attention).sum().backward()
    assert [t.grad is not None for t in wanted] == [True, True, False, False, False]
    codes = mk.hash_codes(call.args[0], *call.args[2:])
    assert not codes.requires_grad


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_input_requires_grad(wanted: int) -> None:
    args = list(drawn().args)
    args[wanted] = args[wanted].clone().requires_grad_()
    upstream = normal(*args[1].shape)
    ours, theirs = (
        torch.autograd.grad(f(*args), args[wanted], upstream)[0]
        for f in (mk.ecoformer_attention, reference.ecoformer_attention)
    )
    torch.testing.assert_close(ours, theirs)


def test_gradient_that_is_expanded() -> None:
    call, wanted = leaves(drawn())
    ours, theirs = (
        torch.autograd.grad(call.of(f).sum(), wanted[:2]) for f in (mk.ecoformer_attention, reference.ecoformer_attention)
    )
    torch.testing.assert_close(ours, theirs)


def test_new_sizes_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(mk.ecoformer_attention, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens in ((2, 17), (5, 29), (4, 50)):  # no two sizes alike, which torch would take for one
        make = _ecoformer(batch, 3, tokens, 6, 7, supports=9, bits=8)
        call = make(CPU, torch.float32, torch.Generator().manual_seed(batch))
        assert_same_bits(call.of(compiled), call.of(mk.ecoformer_attention), "compiled")
    assert counter.frame_count == 1


def test_backward_says_why_cuda_has_no_kernel() -> None:
    """The forward kernels are CUDA's own; the backward pass is torch's, which no warning names a fallback."""
    from mmkernels.ops import hash_attention as ops

    cuda, by_torch = ops.BACKWARD_BACKENDS[1:3]
    assert "no CUDA kernel" in (cuda.reason({}) or "")
    assert by_torch.name == "torch" and by_torch.note
    assert set(card_of("ecoformer_attention").ops) <= set(entry.PYTHON_KERNELS)


# --- what compiled code refuses by itself -------------------------------------------------------------------------------
def test_raw_operators_refuse_what_does_not_fit() -> None:
    qk, v, *functions = drawn().args
    good: dict[str, Any] = dict(zip(("qk", "v", "supports", "projection", "mean"), (qk, v, *functions), strict=True))

    def ecoformer(**changed: Any) -> None:
        torch.ops.mmkernels.ecoformer_attention(*{**good, "offset": 9.0, **changed}.values(), True, True)

    ecoformer()
    for name, value in (
        ("qk", qk[0]),
        ("qk", qk[..., :0]),
        ("qk", qk.mT.contiguous().mT),
        ("v", v[:, :, 1:]),
        ("v", v.double()),
        ("supports", functions[0][1:]),
        ("supports", functions[0][..., 1:]),
        ("supports", functions[0].double()),
        ("projection", functions[1][..., 1:]),
        ("projection", functions[1].repeat(1, 5, 1)),
        ("mean", functions[2][:, 1:].contiguous()),
        ("offset", 8.0),
        ("offset", float("nan")),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            ecoformer(**{name: value})

    codes = random_codes(2, 3, 41)
    of_codes: dict[str, Any] = {"v": v, "codes_q": codes, "codes_k": codes, "bits": 8, "offset": 9.0}

    def attention(**changed: Any) -> None:
        torch.ops.mmkernels.hash_attention(*{**of_codes, **changed}.values(), True)

    attention()
    for name, value in (
        ("codes_q", codes[..., 1:]),
        ("codes_q", codes.long()),
        ("codes_k", codes[..., 1:]),
        ("codes_k", codes[:1]),
        ("bits", 0),
        ("bits", 33),
        ("offset", float("inf")),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            attention(**{name: value})


def test_raw_backward_refuses_what_does_not_fit() -> None:
    qk, v, *functions = drawn().args
    _, codes, inside, sums = torch.ops.mmkernels.ecoformer_attention(qk, v, *functions, 9.0, True, True)
    names = ("grad", "qk", "v", "supports", "projection", "mean", "codes", "inside", "sums")
    good: dict[str, Any] = dict(zip(names, (normal(*v.shape), qk, v, *functions, codes, inside, sums), strict=True))

    def call(**changed: Any) -> None:
        torch.ops.mmkernels.ecoformer_attention_backward(*{**good, **changed}.values(), 9.0, True, True, True)

    call()
    for name, value in (
        ("grad", normal(2, 3, 41, 9)),
        ("grad", normal(2, 3, 10, 41).mT),
        ("grad", normal(*v.shape).double()),
        ("codes", codes[..., 1:].contiguous()),
        ("inside", inside.long()),
        ("sums", sums[..., 1:].contiguous()),
        ("sums", sums.double()),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            call(**{name: value})
