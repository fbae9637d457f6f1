"""Run by test_triton.py on a CUDA machine, a process for each backend: every card's samples on CUDA tensors.

Forward, backward and the bits of a second run, against float64. Which kernel ran is asserted: this process's backend, or,
where an op has none such or it leaves the call to others, the next that takes it.
"""

from __future__ import annotations

import sys

import torch
from support import as_tuple, assert_same_bits, assert_within_rule, cotangents, draw, gradients, to_double

import mmkernels as mk
from mmkernels import runtime
from mmkernels.cards import all_cards

backend = sys.argv[1]
device = torch.device("cuda")
assert (runtime.cuda_library_missing is None) == (backend == "cuda") and runtime.triton_missing() is None
for card in all_cards():
    for sample in card.samples:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            call = draw(sample, dtype, device)
            explanation = mk.explain(card.function, *call.args, **call.kwargs)
            kernel = explanation.kernel
            assert kernel == backend or explanation.reasons.get(backend, "it has no such kernels") is not None, explanation
            runtime.last_kernels(clear=True)
            with runtime.poisoned_outputs():
                outputs = as_tuple(call.of(card.function))
                upstream = cotangents(as_tuple(call.of(card.reference)))
                ours = gradients(card.function, call, upstream)
                again = gradients(card.function, call, upstream)
            assert {ran for _, ran in runtime.last_kernels()} == {kernel}, runtime.last_kernels()
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
    print("checked", card.name)
