"""Attention by the CUDA kernel for Hopper: MMKERNELS_HOPPER_ATTENTION=1 python gpu_hopper.py cuda (see gpu_jobs.py).

What test_hopper_attention.py runs in software, and sizes that are too large for that: every length, mask and layout against
float64, the gradients that Triton's kernels make from its results, and the bits of a second run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_jobs import Job, Options, main
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, gradients, to_double
from torch import Tensor

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards import card_of
from mmkernels.cards.card import Call

ALIGNMENTS: dict[str, dict[str, Any]] = {
    "full": {},
    "top_left": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
}
LENGTHS = ((64, 1), (64, 33), (128, 128), (197, 197), (256, 300), (300, 256), (129, 1000), (1100, 400), (2048, 2048))
Draw = Callable[..., Tensor]


def _heads(draw: Draw, channels: int, len_q: int, len_k: int) -> list[Tensor]:
    """Two heads of q for one of k."""
    return [draw(2, heads, length, channels) for heads, length in ((4, len_q), (2, len_k), (2, len_k))]


def _packed(draw: Draw, channels: int, len_q: int, len_k: int) -> list[Tensor]:
    """Views of one projection."""
    return list(draw(2, len_q, 3, 3, channels).permute(2, 0, 3, 1, 4).unbind(0))


def _by_token(draw: Draw, channels: int, len_q: int, len_k: int) -> list[Tensor]:
    """[B, L, H, D] in memory."""
    return [draw(2, length, 3, channels).transpose(1, 2) for length in (len_q, len_k, len_k)]


def check(
    make: Callable[..., list[Tensor]], sizes: tuple[int, int, int], dtype: torch.dtype, how: str, options: Options
) -> None:
    generator = torch.Generator(options.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=options.device, dtype=torch.float32).to(dtype)

    card = card_of("attention")
    call = Call(tuple(make(draw, *sizes)), {**ALIGNMENTS[how], "return_lse": True})
    if options.backend != "cpu":
        assert runtime.hopper_attention, "MMKERNELS_HOPPER_ATTENTION=1 is not set"
        explanation = mk.explain(mk.attention, *call.args, **call.kwargs)
        assert explanation.kernel == "cuda", explanation
    runtime.last_kernels(clear=True)
    outputs = as_tuple(call.of(mk.attention))
    assert options.backend == "cpu" or runtime.last_kernels() == [("attention", "cuda")]
    plain, oracle = as_tuple(call.of(card.reference)), as_tuple(to_double(call).of(card.reference))
    seen = oracle[1].isfinite()
    assert torch.equal(outputs[1][~seen], oracle[1][~seen].float()), "logarithms of rows that see nothing"
    for a, b, c in zip(outputs, plain, oracle, strict=True):
        assert_within_rule(a[seen], b[seen], c[seen], f"output {tuple(a.shape)}")
    assert outputs[0][~seen].eq(0).all()
    upstream = cotangents(plain)
    upstream[1].masked_fill_(~seen, 0)
    ours, again = (gradients(mk.attention, call, upstream) for _ in range(2))
    theirs, truth = (gradients(card.reference, given, upstream) for given in (call, to_double(call)))
    for a, b, c, d in zip(ours, theirs, truth, again, strict=True):
        assert_within_rule(a, b, c, f"gradient {tuple(a.shape)}")
        assert_same_bits(a, d, "a second run")


def not_tested(options: Options) -> str:
    major, minor = torch.cuda.get_device_capability(options.device)
    return f"NOT TESTED: this GPU has compute capability {major}.{minor}"


def jobs(options: Options) -> list[Job]:
    if options.backend != "cpu" and torch.cuda.get_device_capability(options.device) != (9, 0):
        return [Job("attention on Hopper", partial(not_tested, options))]
    found = []
    layouts: tuple[tuple[str, Callable[..., list[Tensor]]], ...] = (
        ("heads", _heads),
        ("packed", _packed),
        ("by token", _by_token),
    )
    for dtype, channels, (name, make) in itertools.product((torch.bfloat16, torch.float16), (64, 128), layouts):
        for (len_q, len_k), how in itertools.product(LENGTHS if name == "heads" else ((197, 197),), ALIGNMENTS):
            what = f"{name} {len_q}x{len_k}x{channels} {how} {str(dtype)[6:]}"
            found.append(Job(what, partial(check, make, (channels, len_q, len_k), dtype, how, options)))
    return found


if __name__ == "__main__":
    main(__doc__ or "", jobs)
