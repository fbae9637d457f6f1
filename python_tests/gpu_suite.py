"""Every card's samples on CUDA tensors: python gpu_suite.py cuda|triton (see gpu_jobs.py; test_gpu.py runs it).

Forward, backward and the bits of a second run, against float64. Which kernel ran is asserted: this process's backend, or,
where an op has none such or it leaves the call to others, the next that takes it.
"""

from __future__ import annotations

from functools import partial

import torch
from gpu_jobs import Job, Options, cards_of, main
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, draw, gradients, to_double

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards.card import Card, Sample

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def check(card: Card, sample: Sample, dtype: torch.dtype, options: Options) -> None:
    call = draw(sample, dtype, options.device)
    explanation = mk.explain(card.function, *call.args, **call.kwargs)
    kernel, backend = explanation.kernel, options.backend
    assert kernel.split("/")[0] == backend or explanation.reasons.get(backend, "it has no such kernels"), explanation
    runtime.last_kernels(clear=True)
    with runtime.poisoned_outputs():
        outputs = as_tuple(call.of(card.function))
        upstream = cotangents(as_tuple(call.of(card.reference)))
        ours = gradients(card.function, call, upstream)
        again = gradients(card.function, call, upstream)
    # A backward pass may be left to another: to torch's own products, or to the sort that experts share.
    ran, forward = runtime.last_kernels(), {name.removeprefix("mmkernels::") for name in card.ops if "_backward" not in name}
    assert {taken for op, taken in ran if op in forward} == {kernel}, ran
    assert kernel == "reference" or "reference" not in {taken for _, taken in ran}, ran
    plain, oracle = as_tuple(call.of(card.reference)), as_tuple(to_double(call).of(card.reference))
    theirs = gradients(card.reference, call, upstream)
    truth = gradients(card.reference, to_double(call), upstream)
    for kind, (a, b, c) in (
        *(("output", three) for three in zip(outputs, plain, oracle, strict=True)),
        *(("gradient", three) for three in zip(ours, theirs, truth, strict=True)),
    ):
        if c is not None:
            assert_within_rule(a, b, c, f"{card.name} {sample.name} {dtype} {kind}")
    for a, b in zip(ours, again, strict=True):
        assert_same_bits(a, b, f"{card.name} {sample.name} {dtype}: a second run")


def jobs(options: Options) -> list[Job]:
    """By dtype and then by card, so that what counts most is there first."""
    return [
        Job(f"{card.name} {sample.name} {str(dtype)[6:]}", partial(check, card, sample, dtype, options))
        for dtype in DTYPES
        for card in cards_of(options)
        for sample in card.samples
        if dtype in card.dtypes
    ]


if __name__ == "__main__":
    main(__doc__ or "", jobs)
