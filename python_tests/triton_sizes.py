"""Run by test_triton_sizes.py in a process of its own, under TRITON_INTERPRET=1: Triton kernels where an int32 does not
count all elements, and where what a tensor holds points outside of others. Memory is asked for, but hardly any of it
touched: results are compared with those of the same numbers near each other, and of long launches only the first and the
last program run. Its argument is what to check. Prints a line a check.
"""

from __future__ import annotations

import builtins
import importlib
import mmap
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
import triton_rounding  # noqa: F401
from support import as_tuple, assert_same_bits, draw, gradients
from test_cards import RecordOperators
from torch import Tensor
from triton.runtime import interpreter

import mmkernels.triton
from mmkernels.cards import all_cards
from mmkernels.reference.linear_attention import FEATURE_MAPS
from mmkernels.triton import attention as attention_launches
from mmkernels.triton import (
    attention_kernels,
    attention_tiny,
    linear,
    linear_attention,
    norm,
    qk_norm_rope,
    routing,
    token_roll,
)

MANY = 2**31
NORESERVE = 0x4000  # of mmap on Linux: no promise of memory for what nobody touches
generator = torch.Generator().manual_seed(0)


def first_and_last(*limits: Any) -> Any:
    """What the interpreter counts programs with."""
    programs = builtins.range(*limits)
    return programs if len(programs) < 2**16 else (programs[0], programs[-1])


def typed_range(*limits: Any) -> Iterator[Any]:
    """What kernels count loops with: numbers of the type of its limits, as in compiled kernels, where the interpreter has
    Python's, whose products with an int32 are int32."""
    zero = sum(limit * 0 for limit in limits if isinstance(limit, tl.tensor))
    for number in builtins.range(*limits):
        yield number + zero if isinstance(zero, tl.tensor) else number


interpreter.range = first_and_last  # type: ignore[attr-defined]
for module in pkgutil.iter_modules(mmkernels.triton.__path__):
    importlib.import_module(f"mmkernels.triton.{module.name}").range = typed_range  # type: ignore[attr-defined]
# All is on the CPU already: nothing to copy back, least of all what was never touched.
interpreter.GridExecutor._restore_args_dev = lambda *args: None


def zeros(elements: int, dtype: torch.dtype = torch.float16) -> Tensor:
    size = elements * torch.empty((), dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


def normal(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(size, generator=generator).to(dtype)


# --- strides ------------------------------------------------------------------------------------------------------------
# Operator -> arguments that may have strides of their own. Of window attention's qkv all tokens lie evenly; of weights any
# dimension may be the contiguous one.
STRIDED: dict[str, tuple[str, ...]] = {
    "norm": ("x", "residual", "gate", "shift", "scale"),
    "norm_backward": ("normalised", "x", "gate", "scale"),
    "token_roll": ("x",),
    "token_roll_layer_norm": ("x",),
    "token_roll_layer_norm_backward": ("x",),
    "qk_norm_rope": ("q", "k", "cos", "sin"),
    "qk_norm_rope_backward": ("q", "k", "cos", "sin"),
    "silu_attention": ("x", "keys"),
    "attention": ("q", "k", "v", "bias", "mask", "limits", "segment_ids_q", "segment_ids_k", "value_gate"),
    "attention_backward": ("grad_out", "q", "k", "v", "bias", "mask", "value_gate"),
    "linear_attention": ("q", "k", "v", "mask"),
    "linear_attention_backward": ("grad_out", "q", "k", "v"),
    "window_attention": ("qkv",),
    "window_attention_backward": ("qkv",),
    "moe_mlp": ("x", "w_in", "w_out", "w_gate", "residual"),
    "moe_mlp_backward": ("x", "w_in", "w_out", "w_gate"),
    "grouped_linear": ("x", "weight"),
    "route": ("logits", "selection"),
    "route_backward": ("logits",),
}
ANY_DIMENSION = (
    "w_in",
    "w_out",
    "w_gate",
    "weight",
    "bias",
    "mask",
    "limits",
    "segment_ids_q",
    "segment_ids_k",
    "value_gate",
)


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same numbers, with a stride that takes the last of this dimension beyond what an int32 counts."""
    order = [d for d in range(x.dim()) if d != dim]
    stride, strides = 1, [0] * x.dim()
    for d in reversed(order):
        strides[d] = stride
        stride *= x.size(d)
    strides[dim] = max(stride, MANY // (x.size(dim) - 1) + 16)
    strides[dim] += -strides[dim] % 16
    apart = zeros(1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)), x.dtype).as_strided(x.shape, strides)
    return apart.copy_(x)


def recorded() -> dict[tuple[str, str, int], tuple[str, Any, int]]:
    """(operator, argument, dimension) -> (family, the least of the cards' calls that has it, position)."""
    least: dict[tuple[str, str, int], tuple[int, str, Any, int]] = {}
    for card in all_cards():
        if not any(backend.name == "triton" for backend in card.backends):
            continue
        for sample in card.samples:
            if sample.full or any(word in sample.name for word in ("ViT", "ragged", "float64")):
                continue
            with RecordOperators() as record:
                gradients(card.function, draw(sample, torch.float16))
            for func, args, _ in record.calls:
                name = func._schema.name.removeprefix("mmkernels::")
                size = sum(a.numel() for a in args if isinstance(a, Tensor))
                for position, (argument, value) in enumerate(zip(func._schema.arguments, args, strict=False)):
                    if argument.name not in STRIDED.get(name, ()) or value is None:
                        continue
                    dims = value.dim() - (argument.name not in ANY_DIMENSION)
                    for dim in range(1 if argument.name == "qkv" else dims):
                        key = name, argument.name, dim
                        if value.size(dim) > 1 and (key not in least or size < least[key][0]):
                            least[key] = size, card.family, args, position
    return {key: value[1:] for key, value in least.items()}


def check_strides(brief: bool = False) -> None:
    """Of every argument each dimension, or with `brief` the first in forward passes."""
    seen = set()
    for (name, argument, dim), (family, args, position) in recorded().items():
        if brief and ((name, argument) in seen or "backward" in name):
            continue
        seen.add((name, argument))
        function = getattr(importlib.import_module(f"mmkernels.triton.{family}"), name)
        moved = list(args)
        moved[position] = far_apart(args[position], dim)
        what = f"{name}: {argument}, dimension {dim}"
        for ours, plain in zip(as_tuple(function(*moved)), as_tuple(function(*args)), strict=True):
            assert_same_bits(ours, plain, what)
        print("checked", what)


# --- large outputs ------------------------------------------------------------------------------------------------------
def check_ends(large: Any, small: Any, what: str) -> None:
    """Outputs of a launch whose programs all have the same operands: its first and last rows."""
    for ours, plain in zip(as_tuple(large), as_tuple(small), strict=True):
        assert ours.numel() > MANY or ours.numel() < plain.numel() * ours.size(0), what
        for row in (ours[0], ours[-1]):
            assert_same_bits(row, plain[0], what)
    print("checked", what)


def check_large() -> None:
    row = normal(1, 1, 2048)
    many = row.expand(MANY // 2048 + 3, 1, 2048)
    plain = (None, None, None, None, None, None, 1e-5, 1.0, False, False)
    check_ends(norm.norm(many, *plain)[0], norm.norm(row, *plain)[0], "norm")
    frame = (1, 8, (), None, None, 1e-5, True, False)
    check_ends(token_roll.token_roll(many, 1, 8, ()), token_roll.token_roll(row, 1, 8, ()), "token_roll")
    ours, plain_roll = (token_roll.token_roll_layer_norm(x, *frame)[:2] for x in (many, row))
    check_ends(ours, plain_roll, "token_roll_layer_norm")
    q = normal(1, 16, 1, 128)
    rotary = (None, None, None, None, 1e-6, 1, False)
    ours, plain_rope = (qk_norm_rope.qk_norm_rope(q, k, *rotary)[1] for k in (q.expand(2**20 + 3, -1, -1, -1), q))
    assert_same_bits(ours[-1, 8:], plain_rope[0, 8:], "qk_norm_rope")  # the last program has 8 heads
    print("checked qk_norm_rope")
    logits = normal(1, 1024)
    upstream = normal(1, 2, dtype=torch.float32), normal(2 * 1024 + 2, dtype=torch.float32)
    ids = torch.tensor([[3, 700]])
    rows = 2**21 + 3
    ours = routing.route_backward(
        upstream[0].repeat(rows, 1), upstream[1], logits.expand(rows, -1), ids.repeat(rows, 1), 0, True
    )
    check_ends(ours, routing.route_backward(*upstream, logits, ids, 0, True), "route_backward")
    gate, up, hidden = (zeros(MANY + 4096) for _ in range(3))
    gate[-1], up[-1] = 2.0, 3.0
    linear._launch(linear.glu_kernel, gate, up, hidden, activation=1)
    assert hidden[-1] == 6 and hidden[-4096] == 0
    print("checked glu")
    for length, what in ((40, "attention"), (4, "attention of tiny sequences")):
        q = normal(1, 8, length, 64)
        batch = MANY // q.numel() + 3
        numbers = (*(None,) * 9, 0.1, 0.0, 0.0, -1, -1, False, 0, 0)
        ours, plain = (
            attention_launches.attention(*(x.expand(b, -1, -1, -1),) * 3, *numbers)[0] for x, b in ((q, batch), (q, 1))
        )
        tail = 1 if length == 40 else 4  # heads of the last program
        assert_same_bits(ours[-1, -tail:], plain[0, -tail:], what)
        print("checked", what)


# --- counts -------------------------------------------------------------------------------------------------------------
def check_many_pairs() -> None:
    """Of tiny sequences, more than an int32 counts: each of one number, of one channel."""
    pairs = MANY + 8
    q, k, v, out = (zeros(pairs) for _ in range(4))
    lse = zeros(pairs, torch.float32)
    v[-1] = 5.0
    operands = {name: (x, 1, 0, 0) for name, x in (("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse))}
    attention_tiny.tiny_forward_kernel[(pairs // 4,)](
        **operands, bias=None, mask=None, pairs=pairs, heads=1, len_q=1, len_k=1, window_left=None, window_right=None,
        scale=1.0, BASE2=False, BOTTOM_RIGHT=False, D=1, DV=1, BLOCK_D=16, BLOCK_DV=16, PAIRS=4, SLOT_Q=16, SLOT_K=16,
    )  # fmt: skip
    assert out[-1] == 5 and out[0] == 0
    print("checked pairs")


def check_many_parts() -> None:
    """Where parts times rows are more than an int32 counts, as a max_seqlen_q that is too small may have it."""
    parts, rows = 5, 2**29
    parts_out, parts_lse = zeros(parts * rows, torch.float32), zeros(parts * rows, torch.float32)
    out, lse = zeros(rows), zeros(rows, torch.float32)
    parts_out[-1] = 10.0
    attention_kernels.combine_kernel[(rows,)](
        parts_out=parts_out, parts_lse=parts_lse, out=(out, 1, 0, 0), lse=lse, middle=1, inner=1, rows=rows, parts=parts,
        DV=1, BLOCK_DV=16,
    )  # fmt: skip
    assert out[-1] == 2 and out[0] == 0
    print("checked parts")


# --- what tensors hold --------------------------------------------------------------------------------------------------
def check_lengths_below_zero() -> None:
    """cu_seqlens below 0 take nobody outside of the sums of the tiles."""
    heads, channels, part = 1, 16, 16
    elements = channels * channels
    around = torch.full((40, heads, elements), 7.0)
    own, final = around[20:24], torch.zeros(2, heads, elements)
    cu = torch.tensor([-5 * part, 20, 40])
    linear_attention.join_kernel[(2 * heads, 1)](
        partial=own, first=None, final=final, cu=cu, sequences=2, heads=heads, tokens=40, elements=elements, REVERSED=False,
        PART=part, BLOCK=elements,
    )  # fmt: skip
    assert (around[:20] == 7).all() and (around[24:] == 7).all()
    q = normal(40, 1, 16, dtype=torch.float32)
    elu1 = FEATURE_MAPS.index("elu1")
    for causal in (False, True):
        for bad in ([-1000, 20, 40], [0, 10**6, 40], [0, 30, -(2**40)]):
            linear_attention.linear_attention(
                q, q, q, None, None, None, torch.tensor(bad), torch.tensor(bad), elu1, causal, True, 1e-6
            )
    print("checked lengths")


def check_ranges() -> None:
    """Of token rolling: more than one launch has room for."""
    x = normal(6, 300, 4, dtype=torch.float32)
    for count in (0, 1, 4, 5, 32, 33, 100):
        flat = tuple(n for i in range(count) for n in (3 * i, 3 * i + 2, i - 7))
        for inverse in (False, True):
            expected = x.clone()
            for start, stop, shift in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
                frames = x[:, start:stop].unflatten(0, (2, 3))
                expected[:, start:stop] = frames.roll(-shift if inverse else shift, 1).flatten(0, 1)
            assert torch.equal(token_roll.token_roll(x, 3, 0, flat, inverse), expected), count
    print("checked ranges")


def unseen() -> Iterator[tuple[str, int, int, Tensor | None]]:
    yield "no bias", 40, 64, None
    yield "a bias for all queries", 40, 64, torch.zeros(1, 2, 1, 64)
    yield "tiny sequences", 5, 16, None


def check_keys_that_nobody_sees() -> None:
    """Infinities in a key behind the last query give it no gradient that is NaN, though the tile has queries that do not
    exist, which would see it."""
    for what, queries, keys, bias in unseen():
        q, k, v = (normal(1, 2, n, 32, dtype=torch.float32) for n in (queries, keys, keys))
        k[:, :, queries + 5] = torch.inf
        args = (q, k, v, bias, *(None,) * 8)
        numbers = (0.1, 0.0, 0.0, -1, 0, False, 0, 0)
        out, lse = attention_launches.attention(*args, *numbers)
        grads = attention_launches.attention_backward(out, None, *args, out, lse, *numbers, bias is not None, False)
        assert out.isfinite().all()
        for gradient in grads[1:]:
            assert gradient.isfinite().all(), what
        assert not any(gradient[:, :, queries:].any() for gradient in grads[1:3]), what
        print("checked keys that nobody sees,", what)


CHECKS: dict[str, tuple[Any, ...]] = {
    "strides": (check_strides,),
    "strides-brief": (lambda: check_strides(brief=True),),
    "sizes": (check_large, check_many_pairs, check_many_parts),
    "values": (check_lengths_below_zero, check_ranges, check_keys_that_nobody_sees),
}
for check in CHECKS[sys.argv[1]]:
    check()
sys.exit(0)
