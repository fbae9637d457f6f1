"""Attention on Hopper without a GPU: the kernel's own source with the instructions in software (csrc/testing/hopper_block.h)
against float64, and what the compiler made of it for the hardware."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import subprocess
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_hopper import ALIGNMENTS
from support import assert_same_bits, assert_within_rule
from test_triton import TARGETS, nvidia_tool
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime
from mmkernels.ops import attention as attention_ops
from mmkernels.ops import entry, hopper_attention
from mmkernels.ops.backends import Backend, choose
from mmkernels.reference.attention import attention as reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCKS = 3  # of the grid: fewer than the tiles of most cases, so that blocks go on to a second


def new(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def operands(dtype: torch.dtype, channels: int, len_q: int, len_k: int, heads: int = 2, kv_heads: int = 1) -> list[Tensor]:
    sizes = ((heads, len_q), (kv_heads, len_k), (kv_heads, len_k))
    return [new((1, h, length, channels), dtype, seed) for seed, (h, length) in enumerate(sizes)]


def attention(
    hopper: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    grid: int = BLOCKS,
    cache_bytes: int = 1 << 20,
    seed: int = 1,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernel, both full of NaN before."""
    batch, heads, len_q, channels = q.shape
    out = torch.full((batch, len_q, heads, channels), math.nan, dtype=q.dtype).transpose(1, 2)
    lse = torch.full((batch, heads, len_q), math.nan)
    hopper.attention(
        q.dtype == torch.bfloat16,
        *(hopper.Operand(x.data_ptr(), list(x.shape), list(x.stride())) for x in (q, k, v)),
        out.data_ptr(),
        lse.data_ptr(),
        channels**-0.5 if scale is None else scale,
        is_causal,
        causal_alignment == "bottom_right",
        grid,
        cache_bytes,
        seed,
    )
    return out, lse


def check(
    hopper: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: int = BLOCKS,
    cache_bytes: int = 1 << 20,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """By the rule against float64; logarithms that are no numbers are those of the definition."""
    out, lse = attention(hopper, q, k, v, grid=grid, cache_bytes=cache_bytes, **arguments)
    plain = reference(q, k, v, return_lse=True, **arguments)
    oracle = reference(q.double(), k.double(), v.double(), return_lse=True, **arguments)
    assert_within_rule(out, plain[0], oracle[0], "out")
    finite = oracle[1].isfinite()
    assert torch.equal(lse[~finite], oracle[1][~finite].float())
    assert_within_rule(lse[finite], plain[1][finite], oracle[1][finite], "lse")
    return out, lse


# --- numbers ------------------------------------------------------------------------------------------------------------
LENGTHS = ((1, 1), (17, 33), (128, 128), (197, 197), (256, 300), (300, 256))
LONG = ((1, 700), (700, 1), (129, 127), (193, 385), (640, 641), (1025, 1100), (1100, 400))


@pytest.mark.parametrize(
    ("len_q", "len_k"), [*LENGTHS, *(pytest.param(*lengths, marks=pytest.mark.full) for lengths in LONG)], ids=str
)
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(hopper: ModuleType, dtype: str, channels: int, len_q: int, len_k: int) -> None:
    """Every mask and alignment, one head of k for two of q."""
    for arguments in ALIGNMENTS.values():
        check(hopper, *operands(DTYPES[dtype], channels, len_q, len_k), **arguments)


@pytest.mark.parametrize("channels", [64, 128])
def test_stages_go_round(hopper: ModuleType, channels: int) -> None:
    """More blocks of keys than twice the stages, and a grid of one, whose barriers' phases go on from tile to tile."""
    check(hopper, *operands(torch.bfloat16, channels, 200, 1000), grid=1, is_causal=True, causal_alignment="bottom_right")


@pytest.mark.parametrize("channels", [64, 128])
def test_order_of_what_is_open_makes_no_difference(hopper: ModuleType, channels: int) -> None:
    """Whoever goes first, and in whichever order tiles come: the same bits."""
    call = operands(torch.float16, channels, 260, 520)
    first = attention(hopper, *call)
    for seed in range(2, 6):
        for a, b in zip(first, attention(hopper, *call, seed=seed), strict=True):
            assert_same_bits(a, b, f"seed {seed}")


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0, 1e-3, 1e-42])
def test_scale(hopper: ModuleType, scale: float) -> None:
    check(hopper, *operands(torch.float16, 64, 70, 150), scale=scale)


def test_scores_far_apart(hopper: ModuleType) -> None:
    """Logits of thousands, of either sign, the largest in the block that comes last, or first."""
    for last in (0, 290):
        q, k, v = operands(torch.bfloat16, 64, 70, 300)
        k[:, :, last] *= 30
        check(hopper, 20 * q, k, v)


# --- operands -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (5, 1)], ids=str)
def test_heads(hopper: ModuleType, channels: int, heads: tuple[int, int]) -> None:
    """Grouped heads, two samples, and as many heads at once as go into caches of any size."""
    q = new((2, heads[0], 130, channels), torch.bfloat16)
    k, v = (new((2, heads[1], 140, channels), torch.bfloat16, seed) for seed in (1, 2))
    for cache_bytes in (0, 200_000, 1 << 30):
        check(hopper, q, k, v, is_causal=True, cache_bytes=cache_bytes)


@pytest.mark.parametrize("channels", [64, 128])
def test_strides(hopper: ModuleType, channels: int) -> None:
    """Views of a packed projection, [B, L, H, D] in memory, and rows with a gap behind them."""
    batch, length, heads = 2, 140, 3
    packed = new((batch, length, 3, heads, channels), torch.bfloat16)
    check(hopper, *packed.permute(2, 0, 3, 1, 4).unbind(0), is_causal=True)
    q, k, v = (new((batch, length, heads, channels), torch.float16, seed).transpose(1, 2) for seed in range(3))
    check(hopper, q, k, v)
    q, k, v = (
        new((batch, heads, length + 3, channels + 8), torch.float16, seed)[:, :, 2:-1, :channels] for seed in range(3)
    )
    check(hopper, q, k, v)


def test_strides_of_one_element_mean_nothing(hopper: ModuleType) -> None:
    q, k, v = operands(torch.bfloat16, 64, 40, 50, 1)
    check(hopper, *(x.as_strided(x.shape, (3, 5, *x.stride()[2:])) for x in (q, k, v)))


# --- rows that see nothing, and what is no number ---------------------------------------------------------------------
@pytest.mark.parametrize("channels", [64, 128])
def test_rows_that_see_nothing(hopper: ModuleType, channels: int) -> None:
    """In tiles of their own, and beside rows that see."""
    len_q, len_k = 500, 60
    out, lse = check(
        hopper, *operands(torch.bfloat16, channels, len_q, len_k), is_causal=True, causal_alignment="bottom_right"
    )
    blind = len_q - len_k
    assert (
        out[:, :, :blind].abs().max() == 0 and (lse[:, :, :blind] == -math.inf).all() and lse[:, :, blind:].isfinite().all()
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", ["q", "k", "v"])
def test_what_is_no_number_goes_where_the_definition_sends_it(hopper: ModuleType, at: str, value: float) -> None:
    for dtype, alignment in itertools.product(DTYPES.values(), ("full", "top_left")):
        call = dict(zip("qkv", operands(dtype, 64, 150, 290), strict=True))
        call[at][0, 0, 140, 5] = value
        arguments = ALIGNMENTS[alignment]
        out, lse = attention(hopper, **call, **arguments)
        expected, expected_lse = reference(*call.values(), return_lse=True, **arguments)
        if (
            at == "v" and alignment == "top_left"
        ):  # a weight of 0 times NaN is NaN in the formula; blocks that are hidden are not read
            seen = torch.arange(150) >= 140
            assert torch.equal(out[:, :, seen].isnan(), expected[:, :, seen].isnan())
            assert out[..., :5].isfinite().all() and out[..., 6:].isfinite().all()
        else:
            assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
        assert torch.equal(lse.isnan(), expected_lse.isnan()) and torch.equal(lse.isinf(), expected_lse.isinf())


# --- schedule -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache_bytes", [0, 1 << 18, 1 << 19, 1 << 30])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize(("causal", "bottom_right"), [(False, False), (True, False), (True, True)])
def test_every_tile_once(hopper: ModuleType, causal: bool, bottom_right: bool, channels: int, cache_bytes: int) -> None:
    """Each tile of rows of each head, with the blocks that it sees; of a head the last first."""
    batch, heads, kv_heads, len_q, len_k, keys = 2, 6, 2, 700, 900, 128
    tiles = hopper.tiles(
        (batch, heads, len_q, channels), (batch, kv_heads, len_k, channels), causal, bottom_right, cache_bytes
    )
    rows = 192 if channels == 64 else 128
    expected = set()
    for b, h, row in itertools.product(range(batch), range(heads), range(0, len_q, rows)):
        offset = len_k - len_q if bottom_right else 0
        first, last = (min(len_k, i + offset + 1) if causal else len_k for i in (row, min(row + rows, len_q) - 1))
        expected.add((b, h, row, -(-last // keys), first // keys))
    assert len(tiles) == len(expected) and {tuple(tile) for tile in tiles} == expected
    of_head = {
        pair: [row for b, h, row, *_ in tiles if (b, h) == pair] for pair in itertools.product(range(batch), range(heads))
    }
    assert all(starts == sorted(starts, reverse=True) for starts in of_head.values())


# --- the compiled kernel --------------------------------------------------------------------------------------------------
def kernels_for_hopper() -> Iterator[str]:
    """The machine code of each kernel of attention for sm_90a."""
    done = subprocess.run(
        [nvidia_tool("cuobjdump"), "--dump-sass", "--gpu-architecture", "sm_90a", runtime.CUDA_LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    )
    for part in re.split(r"\n\s*Function : ", done.stdout)[1:]:
        if "attention_kernel" in part.split("\n", 1)[0]:
            yield part


def test_compiled_for_tensor_cores_and_tensor_memory_accelerator(hopper: ModuleType) -> None:
    """Products of warp groups and loads of tiles, in all four kernels, no more shared memory than a block may have. (Without
    nvcc there are none; spilt registers: test_triton.py.)"""
    for channels in (64, 128):
        assert hopper.shared_bytes(channels) <= TARGETS["sm_90"]
    if not runtime.build_record()["cuda"]:
        assert not runtime.CUDA_LIBRARY.exists()
        return
    kernels = list(kernels_for_hopper())
    assert len(kernels) == 4
    for code in kernels:
        for instruction in ("HGMMA.64x128x16.F32", "UTMALDG.4D", "SYNCS", "USETMAXREG"):
            assert instruction in code, f"no {instruction}"


# --- the backend ----------------------------------------------------------------------------------------------------------
NOTHING = dict.fromkeys(("bias", "mask", "limits", "segment_ids_q", "segment_ids_k", "cu_seqlens_q", "cu_seqlens_k"))
OPERATOR = {
    **NOTHING,
    "value_gate": None,
    "seed": None,
    "scale": 0.125,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "window_left": -1,
    "window_right": 0,
    "bottom_right": True,
    "max_seqlen_q": 0,
    "max_seqlen_k": 0,
}


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """MMKERNELS_HOPPER_ATTENTION=1 and a Hopper GPU, as far as reasons ask."""
    monkeypatch.setattr(runtime, "hopper_attention", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_reasons(asked_for: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(torch.bfloat16, 64, 100, 120)
    call: dict[str, Any] = {"q": q, "k": k, "v": v, **OPERATOR}
    assert hopper_attention.reason(call) is None
    gap = new((1, 2, 100, 68), torch.bfloat16)[..., :64]
    for expected, changed in (
        ("q is torch.float32; the kernel takes", {"q": q.float()}),
        ("takes no bias, value_gate", {"bias": new((1, 1, 100, 120), torch.bfloat16), "value_gate": v[..., 0]}),
        ("takes no softcap", {"softcap": 2.0}),
        ("takes no dropout_p", {"dropout_p": 0.5}),
        ("the window is (3, 0)", {"window_left": 3}),
        ("the window is (-1, 2)", {"window_right": 2}),
        ("q has 64 and v 32 channels", {"v": v[..., :32]}),
        ("q has 32 and v 32 channels", {name: call[name][..., :32] for name in "qkv"}),
        ("there are 63 queries;", {"q": q[:, :, :63]}),
        ("there are 100 queries and 0 keys", {"k": k[:, :, :0], "v": v[:, :, :0]}),
        ("the scale is inf", {"scale": math.inf}),
        ("q: data or strides", {"q": gap}),
        ("k, v: data or strides", {"k": k.expand(2, 2, -1, -1), "v": v.expand(2, 2, -1, -1)}),
    ):
        reason = hopper_attention.reason({**call, **changed})
        assert reason is not None and expected in reason, (expected, reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "compute capability 10.0" in (hopper_attention.reason(call) or "")
    monkeypatch.setattr(runtime, "hopper_attention", False)
    assert "MMKERNELS_HOPPER_ATTENTION=1 asks for it" in (hopper_attention.reason(call) or "")


def test_reasons_of_the_public_function(asked_for: None) -> None:
    """mk.explain asks with these arguments: the window, the scale and autocast's dtype are worked out from them."""
    bound = inspect.signature(mk.attention).bind(*operands(torch.bfloat16, 128, 100, 120))
    bound.apply_defaults()
    assert hopper_attention.reason(bound.arguments) is None
    for arguments in ({"is_causal": True}, {"window_size": (None, 0)}, {"window_size": (None, None)}, {"scale": 0.1}):
        assert hopper_attention.reason({**bound.arguments, **arguments}) is None
    for arguments in ({"window_size": (3, 0)}, {"window_size": (3, None), "is_causal": True}, {"softcap": 1.0}):
        assert hopper_attention.reason({**bound.arguments, **arguments}) is not None
    single = {name: bound.arguments[name].float() for name in "qkv"}
    assert "torch.float32" in (hopper_attention.reason({**bound.arguments, **single}) or "")
    with torch.autocast("cpu", torch.bfloat16):
        assert hopper_attention.reason({**bound.arguments, **single}) is None


@pytest.mark.parametrize(("right", "bottom_right"), [(-1, False), (0, False), (0, True)])
def test_operator(
    hopper: ModuleType, asked_for: None, monkeypatch: pytest.MonkeyPatch, right: int, bottom_right: bool
) -> None:
    """mmkernels::attention, where its backend takes the call: what is passed on, what is written down, and that the backward
    pass of the others goes on from these results."""

    def in_software(
        q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bottom_right: bool
    ) -> tuple[Tensor, Tensor]:
        alignment = "bottom_right" if bottom_right else "top_left"
        return attention(hopper, q, k, v, scale=scale, is_causal=causal, causal_alignment=alignment)

    here = torch.library.Library("mmkernels", "IMPL")
    here.impl("attention_hopper", in_software, "CPU")
    cuda = next(b for b in attention_ops.BACKENDS if b.name == "cuda")
    on_cpu = Backend("cuda", hopper_attention.reason, cuda.kernel)  # without what it says of the device
    monkeypatch.setattr(entry, "choose", lambda op, backends, arguments: choose(op, (on_cpu,), arguments))
    tensors = operands(torch.bfloat16, 64, 100, 120)
    options = {**OPERATOR, "window_right": right, "bottom_right": bottom_right}
    runtime.last_kernels(clear=True)
    out, lse = entry.PYTHON_KERNELS["mmkernels::attention"](*tensors, *options.values())
    assert runtime.last_kernels() == [("attention", "cuda")]
    here._destroy()
    fakes = hopper_attention._fake(*tensors, 0.125, right == 0, bottom_right)
    for real, fake in zip((out, lse), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)

    upstream = new(tuple(out.shape), torch.bfloat16, 9)
    nothing, numbers = list(options.values())[:9], list(options.values())[9:]
    gradients = torch.ops.mmkernels.attention_backward(upstream, None, *tensors, *nothing, out, lse, *numbers, False, False)
    arguments = {"scale": 0.125, "is_causal": right == 0, "causal_alignment": "bottom_right" if bottom_right else "top_left"}
    plain, oracle = (
        torch.autograd.grad(reference(*leaves, **arguments), leaves, upstream.to(leaves[0].dtype))
        for leaves in ([x.detach().to(d).requires_grad_() for x in tensors] for d in (torch.bfloat16, torch.float64))
    )
    for name, ours, theirs, truth in zip("qkv", gradients, plain, oracle, strict=False):
        assert_within_rule(ours, theirs, truth, f"gradient of {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: str, channels: int) -> None:
    """The compiled kernel itself, on a Hopper GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.fail("a test of Hopper's kernel was asked for where torch finds no such GPU")
    for len_q, len_k in (*LENGTHS, *LONG, (4096, 4100)):
        for alignment in ALIGNMENTS.values():
            q, k, v = (x.cuda() for x in operands(DTYPES[dtype], channels, len_q, len_k, 8, 2))
            causal, bottom_right = "is_causal" in alignment, "causal_alignment" in alignment
            scale = channels**-0.5
            out, lse = torch.ops.mmkernels.attention_hopper(q, k, v, scale, causal, bottom_right)
            again, _ = torch.ops.mmkernels.attention_hopper(q, k, v, scale, causal, bottom_right)
            assert_same_bits(out, again, "a second run")
            plain = reference(q, k, v, return_lse=True, **alignment)
            oracle = reference(q.double(), k.double(), v.double(), return_lse=True, **alignment)
            assert_within_rule(out, plain[0], oracle[0], f"out {len_q} {len_k} {alignment}")
            finite = oracle[1].isfinite()
            assert torch.equal(lse[~finite], oracle[1][~finite].float())
            assert_within_rule(lse[finite], plain[1][finite], oracle[1][finite], f"lse {len_q} {len_k} {alignment}")
