"""Linear attention beyond its card: other definitions, chunk boundaries, streaming, packed sequences, memory, threads."""

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
from support import assert_same_bits, assert_within_rule, bfloat16_kernel, cotangents, draw, gradients, to_double
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards import card_of
from mmkernels.cards.card import Call
from mmkernels.reference import linear_attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_lengths = pytest.mark.parametrize("length", [1, 2, 47, 48, 63, 64, 65, 129])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(
    length: int,
    *,
    batch: int = 2,
    num: int = 2,
    kv: int = 2,
    d: int = 8,
    dv: int = 6,
    keys: int | None = None,
    **kwargs: Any,
):
    keys = length if keys is None else keys
    sizes = ((batch, num, length, d), (batch, kv, keys, d), (batch, kv, keys, dv))
    return tuple(normal(*size, seed=i, **kwargs) for i, size in enumerate(sizes))


# --- other definitions --------------------------------------------------------------------------------------------------
def by_running_sums(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """Causal linear attention by cumsum over every token's outer product [L, D, Dv]."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state, sums = (k[..., None] * v[..., None, :]).cumsum(2), k.cumsum(2)
    return (q[..., None, :] @ state)[..., 0, :] / ((q * sums).sum(-1, keepdim=True) + eps)


def by_scores(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """All scores, normalised row by row."""
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    return scores / (scores.sum(-1, keepdim=True) + eps) @ v


@over_lengths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_other_definitions(length: int, dtype: torch.dtype, causal: bool, isa: str) -> None:
    """Chunk boundaries, forward and backward, against formulas that know no state."""
    call = Call(heads(length, dtype=dtype))
    plain = by_running_sums if causal else by_scores

    def ours(*tensors: Tensor) -> Tensor:
        return mk.linear_attention(*tensors, is_causal=causal)

    upstream = cotangents([call.of(plain)])
    results = [
        (function(*c.args), *gradients(function, c, upstream))
        for function, c in ((ours, call), (plain, call), (plain, to_double(call)))
    ]
    for a, b, truth in zip(*results, strict=True):
        # One key alone has out = v whatever its features: what is left of their gradients is eps.
        assert_within_rule(a, b, truth, f"{length} tokens", extra=1e-6 if dtype == torch.float32 else 1e-15)


@over_dtypes
def test_efficient_attention(dtype: torch.dtype, isa: str) -> None:
    """ "softmax" is q's softmax over channels and k's over the keys, whatever else is said; far-out numbers too."""
    q, k, v = heads(13, keys=70, dtype=dtype)
    call = Call((q, k * 8, v))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    for normalize in (True, False):

        def ours(q: Tensor, k: Tensor, v: Tensor, normalize: bool = normalize) -> Tensor:
            return mk.linear_attention(q, k, v, feature_map="softmax", normalize=normalize, eps=0.7)

        upstream = cotangents([call.of(plain)])
        results = [
            (function(*c.args), *gradients(function, c, upstream))
            for function, c in ((ours, call), (plain, call), (plain, to_double(call)))
        ]
        for a, b, truth in zip(*results, strict=True):
            assert_within_rule(a, b, truth, "softmax")
    huge = mk.linear_attention(q * 1000, k * 1000, v, feature_map="softmax")
    assert huge.isfinite().all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    """Every tail of every vector and chunk, in every dtype; of several sequences, because the errors of a number or two are
    a matter of luck."""
    causal = data.draw(st.booleans())
    length, keys = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    group, kv = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(DTYPES))
    d, dv = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 40))
    call = Call(
        heads(length, batch=8, num=group * kv, kv=kv, d=d, dv=dv, keys=None if causal else keys, dtype=dtype),
        {"is_causal": causal, "normalize": data.draw(st.booleans()), "eps": 0.1, "return_state": True},
    )

    def every(function: Any, call: Call) -> tuple[Tensor, ...]:
        out, state = call.of(function)
        upstream = cotangents([out, *state])
        return out, *state, *gradients(function, call, upstream)

    for a, b, truth in zip(
        every(mk.linear_attention, call),
        every(reference.linear_attention, call),
        every(reference.linear_attention, to_double(call)),
        strict=True,
    ):
        assert_within_rule(a, b, truth, f"{length} of {keys}, {group}x{kv} heads, {d}, {dv} channels, {dtype}, {causal}")


# --- streaming and packed sequences -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_of_few_heads(causal: bool, dtype: torch.dtype) -> None:
    """Sequences that are cut into segments, the last of them short."""
    call = Call(heads(2100, num=4, d=18, dv=10, dtype=dtype), {"is_causal": causal})
    results = []
    ours, plain = mk.linear_attention, reference.linear_attention
    for function, of in ((ours, call), (plain, call), (plain, to_double(call))):
        results.append((of.of(function), *gradients(function, of)))
    for i, (a, b, truth) in enumerate(zip(*results, strict=True)):
        assert_within_rule(a, b, truth, f"result {i}")


@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("pieces", [(1, 1, 198), (64, 64, 72), (63, 65, 72), (200,), (0, 200, 0)])
def test_streaming_in_pieces(pieces: tuple[int, ...], kv: int, isa: str) -> None:
    q, k, v = heads(200, num=4, kv=kv, d=16)
    whole, final = mk.linear_attention(q, k, v, is_causal=True, return_state=True)
    state, outs = None, []
    for parts in zip(*(x.split(pieces, 2) for x in (q, k, v)), strict=True):
        out, state = mk.linear_attention(*parts, is_causal=True, state=state, return_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole)
    torch.testing.assert_close(state, final)


def test_gradients_flow_through_the_state(isa: str) -> None:
    """Two calls, one after the other, have the gradients of one."""
    tensors = [t.requires_grad_() for t in heads(150)]
    upstream = normal(2, 2, 150, 6)
    expected = torch.autograd.grad(mk.linear_attention(*tensors, is_causal=True), tensors, upstream)
    first, second = zip(*(x.split((70, 80), 2) for x in tensors), strict=True)
    out, state = mk.linear_attention(*first, is_causal=True, return_state=True)
    rest = mk.linear_attention(*second, is_causal=True, state=state)
    torch.testing.assert_close(torch.autograd.grad(torch.cat((out, rest), 2), tensors, upstream), expected)


@over_dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [2, 4])
def test_packed_sequences_have_the_bits_of_single_ones(dtype: torch.dtype, causal: bool, kv: int, isa: str) -> None:
    lengths = (5, 0, 1100, 64, 2100, 65) if dtype == torch.float32 else (5, 0, 130)
    total, d = sum(lengths), 8
    q, k, v = (normal(total, h, d, dtype=dtype, seed=h).requires_grad_() for h in (4, kv, kv))
    cu = torch.tensor((0, *lengths)).cumsum(0)
    out, state = mk.linear_attention(q, k, v, is_causal=causal, return_state=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    upstream = normal(total, 4, d, dtype=dtype, seed=9)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for b, begin in enumerate(cu[:-1].tolist()):
        part = slice(begin, begin + lengths[b])
        single = [x[part].detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
        alone, own = mk.linear_attention(*single, is_causal=causal, return_state=True)
        assert_same_bits(out[part], alone[0].transpose(0, 1), f"sequence {b}")
        for x, y in zip(state, own, strict=True):
            assert_same_bits(x[b : b + 1], y, f"state of sequence {b}")
        expected = torch.autograd.grad(alone, single, upstream[part].transpose(0, 1)[None])
        for x, y in zip(grads, expected, strict=True):
            assert_same_bits(x[part], y[0].transpose(0, 1), f"gradient of sequence {b}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_does_not_count_changes_nothing(dtype: torch.dtype, causal: bool, isa: str) -> None:
    """Keys under the mask have no gradient, and others' results are as if they were not there."""
    q, k, v = (x.requires_grad_() for x in heads(70, dtype=dtype))
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) < 0.5
    out = mk.linear_attention(q, k, v, mask=mask, is_causal=causal)
    grads = torch.autograd.grad(out.square().sum(), (k, v))
    for grad in grads:
        assert (grad.transpose(1, 2)[~mask] == 0).all() and (grad.transpose(1, 2)[mask] != 0).any()
    with torch.no_grad():
        changed = [torch.where(mask[:, None, :, None], x, 17.0) for x in (k, v)]
        assert_same_bits(mk.linear_attention(q, *changed, mask=mask, is_causal=causal), out.detach(), "hidden keys")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [33, 70])
@over_dtypes
def test_what_lies_beside_the_channels(dtype: torch.dtype, length: int, causal: bool, isa: str) -> None:
    """Rows of an odd number of channels, among others that are NaN, have the bits of rows by themselves."""
    alone = [x.requires_grad_() for x in (*heads(length, d=17, dv=19, dtype=dtype), normal(2, 2, length, 19, dtype=dtype))]

    def among(x: Tensor) -> Tensor:
        return F.pad(x.detach(), (1, 3), value=torch.nan)[..., 1:-3].requires_grad_()

    def everything(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        out = mk.linear_attention(q, k, v, is_causal=causal)
        return out, *torch.autograd.grad(out, (q, k, v), upstream)

    for i, (a, b) in enumerate(zip(everything(*map(among, alone)), everything(*alone), strict=True)):
        assert_same_bits(a, b, f"result {i}")


def test_denominator_of_zero(isa: str) -> None:
    """No key counts, or no feature is shared: 0 with eps, NaN without, as torch's formula has it."""
    q, k, v = heads(5)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    for causal in (False, True):
        assert (mk.linear_attention(q, k, v, mask=nothing, is_causal=causal) == 0).all()
        assert mk.linear_attention(q, k, v, mask=nothing, is_causal=causal, eps=0.0).isnan().all()
        assert (mk.linear_attention(-q.abs(), k, v, feature_map="relu", is_causal=causal) == 0).all()
    assert (mk.linear_attention(q, k, v, mask=nothing, feature_map="softmax") == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("feature_map", ["elu1", "relu", "identity"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_as_in_torch(dtype: torch.dtype, value: float, feature_map: str, causal: bool, isa: str) -> None:
    for position in range(3):
        tensors = list(heads(7, dtype=dtype))
        tensors[position][1, 1, 3, 2] = value
        call = Call(tuple(tensors), {"feature_map": feature_map, "is_causal": causal})
        ours, plain = call.of(mk.linear_attention), call.of(reference.linear_attention)
        # Causal: torch's product with the hidden scores, 0 times what is not finite, is NaN before the key too.
        assert (ours.isfinite() >= plain.isfinite()).all()
        if not causal:
            assert torch.equal(ours.isfinite(), plain.isfinite())


# --- memory and threads -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_features_or_scores(causal: bool) -> None:
    """Beside operands, outputs and gradients, 10 MB: all scores would be 400 MB, phi(q) and phi(k) 40, every state 1300."""
    code = f"""
import resource, torch, mmkernels as mk
q, k, v = (torch.randn(4, 1, 10000, 32, requires_grad=True) for _ in range(3))
grad = torch.randn(4, 1, 10000, 32)
mk.linear_attention(q[:, :, :200], k[:, :, :200], v[:, :, :200], is_causal={causal}).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mk.linear_attention(q, k, v, is_causal={causal}).backward(grad)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "python_tests", capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4 * 5_120 + 10_000, f"{done.stdout} KB"


@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_do_not_depend_on_threads(kv: int, causal: bool, isa: str, threads: None) -> None:
    call = Call(heads(2200, batch=1, num=4, kv=kv, d=12, dv=10), {"is_causal": causal, "return_state": True})

    def everything() -> list[Any]:
        out, state = call.of(mk.linear_attention)
        return [out, *state, *gradients(mk.linear_attention, call)]

    torch.set_num_threads(1)
    expected = everything()
    for count in (2, 3):
        torch.set_num_threads(count)
        for i, (a, b) in enumerate(zip(everything(), expected, strict=True)):
            assert_same_bits(a, b, f"result {i} with {count} threads")


# --- torch's machinery --------------------------------------------------------------------------------------------------
def test_explain_and_trace() -> None:
    vectors = "avx512" if runtime.isa() == "amx" else runtime.isa()
    for dtype, kernel in ((torch.float32, f"cpu/{vectors}"), (torch.bfloat16, bfloat16_kernel(without_tiles=True))):
        call = draw(card_of("linear_attention").samples[0], dtype)
        assert mk.explain(mk.linear_attention, *call.args, **call.kwargs).kernel == kernel
        runtime.last_kernels(clear=True)
        gradients(mk.linear_attention, call)
        names = ("linear_attention", "linear_attention_backward")
        assert runtime.last_kernels() == [(name, kernel) for name in names]
    assert mk.explain("linear_attention", *to_double(call).args).kernel == "cpu/generic"


def test_triton_leaves_wide_heads_to_others() -> None:
    backend = next(b for b in card_of("linear_attention").backends if b.name == "triton")
    with FakeTensorMode():
        for channels, dtype, expected in (
            (64, torch.float32, None),
            (128, torch.bfloat16, None),
            (65, torch.float32, "65 channels"),
            (129, torch.float16, "129 channels"),
            (8, torch.float64, "64"),
        ):
            q, k, v = (torch.empty(1, 1, 4, channels, dtype=dtype, device="cuda") for _ in range(3))
            reason = backend.reason({"q": q, "k": k, "v": v})
            assert reason is None if expected is None else expected in (reason or "")


def test_lengths_are_read_and_refused() -> None:
    q, k, v = (normal(8, 2, 4) for _ in range(3))
    good = torch.tensor([0, 5, 8])
    for name, value, causal in (
        ("cu_seqlens_q", [1, 5, 8], False),
        ("cu_seqlens_q", [0, 5, 7], False),
        ("cu_seqlens_k", [0, 9, 8], False),
        ("cu_seqlens_k", [0, -1, 8], False),
        ("cu_seqlens_k", [0, 4, 8], True),
    ):
        lengths = {"cu_seqlens_q": good, "cu_seqlens_k": good, name: torch.tensor(value)}
        with pytest.raises(ValueError, match=rf"^{name}: "):
            mk.linear_attention(q, k, v, is_causal=causal, **lengths)


def test_new_sizes_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(mk.linear_attention, fullgraph=True, dynamic=True, backend=counter)
    for length, keys in ((17, 30), (29, 41), (50, 22)):
        tensors = heads(length, keys=keys)
        assert_same_bits(compiled(*tensors), mk.linear_attention(*tensors), "compiled")
    assert counter.frame_count == 1


@pytest.mark.parametrize("wanted", ["q", "k", "v", "s", "z", "returned s", "returned z"])
@pytest.mark.parametrize("causal", [False, True])
def test_only_one_gradient(wanted: str, causal: bool) -> None:
    """Of one input, or through one of the returned sums alone."""
    q, k, v = heads(9)
    named = {"q": q, "k": k, "v": v, "s": normal(2, 2, 8, 6), "z": 1 + normal(2, 2, 8).abs()}
    leaf = named["k" if wanted.startswith("returned") else wanted].requires_grad_()

    def loss(function: Any) -> Tensor:
        q, k, v, s, z = named.values()
        out, state = function(q, k, v, state=(s, z), is_causal=causal, return_state=True)
        return {"returned s": state[0], "returned z": state[1]}.get(wanted, out).square().sum()

    ours, theirs = (torch.autograd.grad(loss(f), leaf) for f in (mk.linear_attention, reference.linear_attention))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --- the module ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [None, 2])
def test_module(causal: bool, kv: int | None) -> None:
    torch.manual_seed(0)
    module = mk.nn.LinearAttention(24, 4, num_kv_heads=kv, is_causal=causal).eval()
    x, mask = normal(2, 11, 24), torch.rand(2, 11) < 0.7
    ours, state = module(x, mask=mask, return_state=True)
    module.kernels = False
    plain, theirs = module(x, mask=mask, return_state=True)
    torch.testing.assert_close((ours, *state), (plain, *theirs))
    module.kernels = True
    module.train()(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert "num_kv_heads" in repr(module)


def test_module_streams() -> None:
    module = mk.nn.LinearAttention(16, 2, is_causal=True).eval()
    x, state, outs = normal(1, 30, 16), None, []
    with torch.no_grad():
        for part in x.split(7, 1):
            out, state = module(part, state=state, return_state=True)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), module(x))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"embed_dim": 10, "num_heads": 3}, "num_heads"),
        ({"embed_dim": 12, "num_heads": 3, "num_kv_heads": 2}, "num_kv_heads"),
        ({"embed_dim": 12, "num_heads": 3, "feature_map": "elu"}, "feature_map"),
        ({"embed_dim": 12, "num_heads": 3, "feature_map": "softmax", "is_causal": True}, "feature_map"),
    ],
)
def test_module_refuses(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        mk.nn.LinearAttention(**arguments)
    with pytest.raises(ValueError, match=r"^x: "):
        mk.nn.LinearAttention(12, 3)(normal(2, 5, 11))
