"""The norm and rotary embedding of queries and keys beyond its card: shapes, conventions of others, gradients, layouts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, draw, gradients, to_double
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards import card_of
from mmkernels.cards.card import Call, Sample
from mmkernels.reference import qk_norm_rope as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROTATED = [sample for sample in card_of("qk_norm_rope").samples if not sample.gradcheck and "ViT" not in sample.name]


def heads(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 8) -> tuple[Tensor, Tensor]:
    turned = 3 * heads(*shape, seed=seed)
    return turned.cos().to(dtype), turned.sin().to(dtype)


def assert_all_within_rule(call: Call, what: str, luck: float = 0.0) -> None:
    """Outputs and gradients against the reference; `luck`: what a row of few numbers may have with its rounding."""
    upstream = cotangents(as_tuple(call.of(reference.qk_norm_rope)))
    for ours, plain, truth in zip(
        (*call.of(mk.qk_norm_rope), *gradients(mk.qk_norm_rope, call, upstream)),
        (*call.of(reference.qk_norm_rope), *gradients(reference.qk_norm_rope, call, upstream)),
        (*to_double(call).of(reference.qk_norm_rope), *gradients(reference.qk_norm_rope, to_double(call), upstream)),
        strict=True,
    ):
        assert (ours is None) == (truth is None), what
        if ours is not None and truth is not None and truth.numel() > 0:
            assert_within_rule(ours, plain, truth, what, extra=luck * max(1.0, truth.abs().max().item()))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Every tail of every vector width, runs and blocks that are not full, all norms, forward and backward."""

    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    dtype = data.draw(st.sampled_from(DTYPES))
    kept = data.draw(st.sampled_from((dtype, torch.float32)))
    norm = data.draw(st.sampled_from((None, "rms", "l2", "layer")))
    batch, length, channels = number(1, 3), number(1, 70), number(3, 140)
    q = heads(batch, number(1, 3), length, channels, dtype=dtype)
    k = heads(batch, number(1, 3), length, channels, dtype=dtype, seed=4)
    more: dict[str, Any] = {"norm": norm, "interleaved": data.draw(st.booleans())}
    if norm is not None and data.draw(st.booleans()):
        more["q_weight"], more["k_weight"] = heads(channels, dtype=kept, seed=5), heads(channels, dtype=kept, seed=6)
    rotation = angles(length, number(0, channels // 2), dtype=kept) if data.draw(st.booleans()) else ()
    luck = 4e-6 if channels < 16 else 0.0
    assert_all_within_rule(Call((q, k, *rotation), more), f"{dtype} {norm} {q.shape} {k.shape}", luck)


@pytest.mark.parametrize("sample", ROTATED, ids=lambda sample: sample.name.replace(" ", "_"))
def test_gradcheck_with_constant_angles(sample: Sample) -> None:
    """What the generic suite leaves out: finite differences with cos and sin held still."""
    call = draw(sample, torch.float64)
    names = [name for name in call.kwargs if isinstance(call.kwargs[name], Tensor)]

    def function(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        more = {**call.kwargs, **dict(zip(names, weights, strict=True))}
        return mk.qk_norm_rope(q, k, *call.args[2:], **more)

    wanted = [*call.args[:2], *(call.kwargs[name] for name in names)]
    assert torch.autograd.gradcheck(function, [t.contiguous().requires_grad_() for t in wanted], fast_mode=True)


# --- conventions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_complex_product(interleaved: bool, isa: str) -> None:
    q, k, (cos, sin) = heads(2, 3, 5, 12), heads(2, 1, 5, 12, seed=4), angles(5, 4)
    turned = mk.qk_norm_rope(q, k, cos, sin, norm=None, interleaved=interleaved)

    def parts(x: Tensor) -> Tensor:
        pairs = x[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
        return torch.complex(*pairs.unbind(-1 if interleaved else -2))

    for before, after in zip((q, k), turned, strict=True):
        torch.testing.assert_close(parts(after), parts(before) * torch.complex(cos, sin))
        assert_same_bits(after[..., 8:], before[..., 8:], "what is not rotated")


def test_angles_of_transformers(isa: str) -> None:
    """rotate_half beside cos and sin that hold each angle twice (Llama), and rotate_every_two (GPT-J)."""
    q, k, (cos, sin) = heads(2, 4, 7, 16), heads(2, 2, 7, 16, seed=4), angles(2, 7, 8)
    twice, in_place = (torch.cat((t, t), -1) for t in (cos, sin)), (t.repeat_interleave(2, -1) for t in (cos, sin))
    c, s = twice
    halves = [x * c[:, None] + torch.cat((-x[..., 8:], x[..., :8]), -1) * s[:, None] for x in (q, k)]
    ours = mk.qk_norm_rope(q, k, c[..., : c.shape[-1] // 2], s[..., : s.shape[-1] // 2], norm=None)
    torch.testing.assert_close(ours, tuple(halves))
    c, s = in_place
    neighbours = [x * c[:, None] + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s[:, None] for x in (q, k)]
    ours = mk.qk_norm_rope(q, k, c[..., ::2].contiguous(), s[..., ::2].contiguous(), norm=None, interleaved=True)
    torch.testing.assert_close(ours, tuple(neighbours))


@pytest.mark.parametrize("norm", ["rms", "l2", "layer"])
def test_norm_is_what_the_formula_says(norm: str) -> None:
    """Spelled out in float64 for one row."""
    q, k, weight = heads(2, 3, 4, 6).double(), heads(2, 1, 4, 6, seed=4).double(), heads(6).double()
    out, _ = mk.qk_norm_rope(q, k, q_weight=weight, eps=1e-5, norm=norm)  # type: ignore[arg-type]
    row = q[1, 2, 3]
    expected = {
        "rms": row / (row.square().mean() + 1e-5).sqrt(),
        "l2": row / row.norm(),
        "layer": (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt(),
    }[norm]
    torch.testing.assert_close(out[1, 2, 3], expected * weight)


def test_a_call_for_each_modality_is_one_sequence() -> None:
    """Mixture-of-Transformers: each modality's own weight, its tokens at their places in the sequence."""
    q, k, (cos, sin) = heads(1, 4, 9, 8), heads(1, 2, 9, 8, seed=4), angles(9, 4)
    image = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0]).bool()
    weights = heads(2, 8, seed=5)
    merged = torch.empty_like(q), torch.empty_like(k)
    for weight, tokens in zip(weights, (~image, image), strict=True):
        parts = mk.qk_norm_rope(
            q[:, :, tokens], k[:, :, tokens], cos[tokens], sin[tokens], q_weight=weight, k_weight=weight, eps=1e-5
        )
        for whole, part in zip(merged, parts, strict=True):
            whole[:, :, tokens] = part
    for x, whole in zip((q, k), merged, strict=True):
        normed = F.rms_norm(x, (8,), None, 1e-5) * weights[image.long()]
        a, b = normed.chunk(2, -1)
        torch.testing.assert_close(whole, torch.cat((a * cos - b * sin, b * cos + a * sin), -1))


# --- gradients --------------------------------------------------------------------------------------------------------
def test_angles_get_no_gradient() -> None:
    q, k, (cos, sin) = heads(1, 2, 5, 8).requires_grad_(), heads(1, 1, 5, 8), angles(5, 4)
    out = mk.qk_norm_rope(q, k, cos.requires_grad_(), sin.requires_grad_())
    grads = torch.autograd.grad(out[0].sum(), (q, cos, sin), allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None
    assert not any(t.requires_grad for t in mk.qk_norm_rope(q.detach(), k, cos, sin))


@pytest.mark.parametrize("norm", [None, "rms"])
def test_gradient_that_is_expanded_missing_or_transposed(norm: Any) -> None:
    q, k, (cos, sin) = heads(2, 3, 5, 8).requires_grad_(), heads(2, 2, 5, 8, seed=4).requires_grad_(), angles(5, 4)
    upstream = heads(2, 5, 3, 8, seed=5).transpose(1, 2)
    losses = (
        lambda a, b: a.sum(),
        lambda a, b: b.square().sum(),
        lambda a, b: (a * upstream).sum() + b.transpose(1, 2).reshape(-1).square().sum(),
    )
    for loss in losses:
        ours = torch.autograd.grad(loss(*mk.qk_norm_rope(q, k, cos, sin, norm=norm)), (q, k), allow_unused=True)
        theirs = torch.autograd.grad(loss(*reference.qk_norm_rope(q, k, cos, sin, norm=norm)), (q, k), allow_unused=True)
        for a, b, x in zip(ours, theirs, (q, k), strict=True):
            zero = torch.zeros_like(x)
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_unused_output_sends_no_nan() -> None:
    """Queries whose norm is NaN leave the keys' gradient alone, and get none where they went unused."""
    q, k, weight = heads(1, 2, 5, 8), heads(1, 1, 5, 8, seed=4).requires_grad_(), torch.ones(8, requires_grad=True)
    q[0, 1, 2, 3] = torch.inf
    q.requires_grad_()
    _, out = mk.qk_norm_rope(q, k, q_weight=weight, k_weight=weight)
    of_q, of_k, of_weight = torch.autograd.grad(out.sum(), (q, k, weight), allow_unused=True)
    assert of_q is None and of_k.isfinite().all() and of_weight.isfinite().all()


@pytest.mark.parametrize("wanted", ["q", "k", "q_weight", "k_weight"])
def test_only_one_input_requires_grad(wanted: str) -> None:
    cos, sin = angles(5, 4)
    named = {"q": heads(2, 3, 5, 8), "k": heads(2, 2, 5, 8, seed=4), "cos": cos, "sin": sin}
    named |= {"q_weight": heads(8, seed=5), "k_weight": heads(8, seed=6)}
    named[wanted] = named[wanted].clone().requires_grad_()
    loss = [sum(out.square().sum() for out in f(**named, norm="layer")) for f in (mk.qk_norm_rope, reference.qk_norm_rope)]
    torch.testing.assert_close(*(torch.autograd.grad(value, named[wanted]) for value in loss), rtol=1e-4, atol=1e-4)


def test_rotation_alone_keeps_neither_q_nor_k() -> None:
    q, k, (cos, sin) = heads(2, 3, 5, 8).requires_grad_(), heads(2, 2, 5, 8, seed=4), angles(5, 4)
    kept: list[Tensor] = []
    for norm, expected in ((None, 2), ("rms", 4)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            mk.qk_norm_rope(q, k, cos, sin, norm=norm)  # type: ignore[arg-type]
        assert len(kept) == expected


def test_rows_of_zeros(isa: str) -> None:
    """The L2 norm of nothing is nothing, and its gradient F.normalize's."""
    q = torch.zeros(1, 2, 3, 20, requires_grad=True)
    out, _ = mk.qk_norm_rope(q, heads(1, 1, 3, 20), norm="l2", eps=0.25)
    upstream = heads(1, 2, 3, 20)
    assert out.abs().max() == 0
    assert_same_bits(torch.autograd.grad(out, q, upstream)[0], upstream / 0.25, "gradient")
    expected = torch.autograd.grad(F.normalize(q, dim=-1, eps=0.25), q, upstream)[0]
    torch.testing.assert_close(expected, upstream / 0.25)


# --- values and bits --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm", [None, "rms", "l2", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_rows(value: float, norm: Any, dtype: torch.dtype, isa: str) -> None:
    q, k, (cos, sin) = heads(2, 3, 19, 35, dtype=dtype), heads(2, 2, 19, 35, dtype=dtype), angles(19, 15, dtype=dtype)
    q[1, 2, 4, 7] = value
    for interleaved in (False, True):
        ours = mk.qk_norm_rope(q, k, cos, sin, norm=norm, interleaved=interleaved)
        plain = reference.qk_norm_rope(q, k, cos, sin, norm=norm, interleaved=interleaved)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 64, 83])
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, channels: int, isa: str) -> None:
    """A token gives the bits alone that it gives among others, whatever its neighbours in a block, a run or a head."""
    q, k = heads(3, 4, 37, channels, dtype=dtype), heads(3, 2, 37, channels, dtype=dtype, seed=4)
    cos, sin = angles(37, channels // 2, dtype=dtype)
    together = mk.qk_norm_rope(q, k, cos, sin, q_weight=q[0, 0, 0])
    for part in (slice(0, 1), slice(5, 22), slice(36, 37)):
        alone = mk.qk_norm_rope(q[1:2, 1:3, part], k[1:2, :1, part], cos[part], sin[part], q_weight=q[0, 0, 0])
        assert_same_bits(together[0][1:2, 1:3, part], alone[0], "q")
        assert_same_bits(together[1][1:2, :1, part], alone[1], "k")


def test_views_of_a_packed_projection_are_not_copied(isa: str) -> None:
    packed = heads(2, 9, 8, 16)
    q, k = packed[:, :, :4].transpose(1, 2), packed[:, :, 4:6].transpose(1, 2)
    cos, sin = angles(2, 9, 32)
    cos, sin = cos[..., 3:11], sin[..., 16:24]
    ours = mk.qk_norm_rope(q, k, cos, sin)
    for a, b in zip(ours, mk.qk_norm_rope(*(t.contiguous() for t in (q, k, cos, sin))), strict=True):
        assert_same_bits(a, b, "strided")
        assert a.is_contiguous()


# --- the package ------------------------------------------------------------------------------------------------------
def test_explain_and_trace() -> None:
    q = heads(1, 2, 3, 8)
    explanation = mk.explain(mk.qk_norm_rope, q, q)
    assert explanation.kernel == f"cpu/{runtime.isa()}"
    runtime.last_kernels(clear=True)
    mk.qk_norm_rope(q, q)
    assert runtime.last_kernels() == [("qk_norm_rope", explanation.kernel)]
    assert mk.explain("qk_norm_rope", q.double(), q.double()).kernel == "cpu/generic"


def test_new_sizes_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(mk.qk_norm_rope, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((2, 17), (5, 29), (3, 50)):
        q, k, (cos, sin) = heads(batch, 4, length, 8), heads(batch, 6, length, 8, seed=4), angles(length, 4)
        for a, b in zip(compiled(q, k, cos, sin), mk.qk_norm_rope(q, k, cos, sin), strict=True):
            assert_same_bits(a, b, "compiled")
    assert counter.frame_count == 1


@pytest.mark.parametrize("norm", [None, "layer"])
def test_compiled_backward(norm: Any) -> None:
    """Also of the rotation alone, whose backward pass is the forward operator."""
    torch._dynamo.reset()
    compiled = torch.compile(mk.qk_norm_rope, fullgraph=True, backend="aot_eager")
    cos, sin = angles(7, 4)
    call = Call((heads(2, 3, 7, 8), heads(2, 1, 7, 8, seed=4), cos, sin), {"norm": norm})
    for a, b in zip(gradients(mk.qk_norm_rope, call), gradients(compiled, call), strict=True):
        assert_same_bits(a, b, "gradient")


def test_second_derivative_of_the_rotation_alone_is_refused() -> None:
    q, k, (cos, sin) = heads(1, 1, 5, 8).requires_grad_(), heads(1, 1, 5, 8), angles(5, 4)
    out, _ = mk.qk_norm_rope(q, k, cos, sin, norm=None)
    first = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="twice"):
        torch.autograd.grad(first.square().sum(), q)


def test_raw_operator_refuses_what_does_not_fit() -> None:
    """What a compiled graph calls: the kernel's own checks raise RuntimeError and name the argument, never read wild."""
    cos, sin = angles(5, 4)
    good: dict[str, Any] = {"q": heads(3, 2, 5, 8), "k": heads(3, 4, 5, 8), "cos": cos, "sin": sin}
    good |= {"q_weight": heads(8), "k_weight": heads(8), "eps": 1e-6, "norm": 1, "interleaved": False}

    def call(**changed: Any) -> None:
        torch.ops.mmkernels.qk_norm_rope(*{**good, **changed}.values())

    call()
    q, k = good["q"], good["k"]
    for name, value, error in (
        ("q", q[0], "q"),
        ("q", q.int(), "q"),
        ("q", q.transpose(2, 3), "q"),
        ("k", k[:2], "k"),
        ("k", k[..., :6], "k"),
        ("k", k[:, :, :4], "k"),
        ("k", k.double(), "k"),
        ("cos", None, "sin"),
        ("sin", None, "sin"),
        ("cos", cos[:4], "cos"),
        ("cos", cos[0], "cos"),
        ("cos", torch.stack((cos, cos)), "cos"),
        ("cos", torch.cat((cos, cos), 1), "cos"),
        ("cos", torch.cat((cos, cos), 1)[:, ::2], "cos"),
        ("sin", sin[:, :3], "sin"),
        ("sin", sin.half(), "sin"),
        ("q_weight", heads(7), "q_weight"),
        ("k_weight", heads(8).double(), "k_weight"),
        ("norm", 0, "q_weight"),
        ("norm", 4, "norm"),
        ("norm", -1, "norm"),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {error}: "):
            call(**{name: value})


def test_raw_backward_refuses_what_does_not_fit() -> None:
    cos, sin = angles(5, 4)
    q, k = heads(3, 2, 5, 8), heads(3, 4, 5, 8)
    good: dict[str, Any] = {"grad_q": q, "grad_k": k, "q": q, "k": k, "cos": cos, "sin": sin}
    good |= {"q_weight": heads(8), "k_weight": heads(8), "eps": 1e-6, "norm": 1, "interleaved": False}

    def call(**changed: Any) -> None:
        torch.ops.mmkernels.qk_norm_rope_backward(*{**good, **changed}.values(), True, True)

    call()
    call(grad_q=None)
    for name, value in (
        ("grad_q", q[:2]),
        ("grad_q", q.double()),
        ("grad_q", q.transpose(2, 3).contiguous().transpose(2, 3)),
        ("grad_k", q),
        ("k", k[:2]),
        ("q_weight", heads(7)),
        ("cos", cos[:4]),
    ):
        with pytest.raises(RuntimeError, match=rf"mmkernels: {name}: "):
            call(**{name: value})


def test_calls_from_many_threads() -> None:
    q, k, (cos, sin) = heads(2, 3, 50, 64), heads(2, 1, 50, 64, seed=4), angles(50, 32)
    expected = mk.qk_norm_rope(q, k, cos, sin)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: mk.qk_norm_rope(q, k, cos, sin), range(60)):
            for a, b in zip(out, expected, strict=True):
                assert_same_bits(a, b, "from a thread")
