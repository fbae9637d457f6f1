"""Run by test_triton.py in a process of its own, under TRITON_INTERPRET=1: the Triton kernels on CPU tensors.

Every sample of every card whose operators have Triton kernels is run through the operator's own kernels and, with the
same arguments, through the family's Triton functions; both must be within the correctness rule. Prints a line a check.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from support import as_tuple, draw, gradients
from test_cards import RecordOperators
from torch import Tensor

from mmkernels.cards import all_cards
from mmkernels.ops import route


def reference_in(dtype: torch.dtype, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operator's plain-torch form with every floating tensor in `dtype`."""
    cast = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return as_tuple(route.REFERENCES[name](*cast))


def check(name: str, args: tuple[Any, ...], what: str) -> None:
    function = getattr(importlib.import_module(f"mmkernels.triton.{family}"), name.removeprefix("mmkernels::"))
    torch.use_deterministic_algorithms(True)  # fresh memory is then filled with NaN: nothing may stay unwritten
    outputs = as_tuple(function(*args))
    torch.use_deterministic_algorithms(False)
    plain, oracle = as_tuple(route.REFERENCES[name](*args)), reference_in(torch.float64, name, args)
    for i, (ours, theirs, truth) in enumerate(zip(outputs, plain, oracle, strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, f"{what}: output {i}"
        if ours.numel() == 0:
            continue
        keep = ~truth.isnan()
        assert torch.equal(ours.isnan(), ~keep), f"{what}: output {i}: NaN"
        if not keep.any():
            continue
        error, theirs_error = (ours.double() - truth)[keep].abs().max(), (theirs.double() - truth)[keep].abs().max()
        allowance = 2 * torch.finfo(ours.dtype).eps * truth[keep].abs().max()
        assert error <= 2 * theirs_error + allowance, f"{what}: output {i}: error {error:.3e}, plain {theirs_error:.3e}"
    print("checked", what)


for card in all_cards():
    family = card.family
    if not any(backend.name == "triton" for backend in card.backends):
        continue
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for sample in card.samples:
            if sample.full or "ViT" in sample.name:
                continue  # too big to interpret
            with RecordOperators() as recorded:
                gradients(card.function, draw(sample, dtype))
            for func, args, kwargs in recorded.calls:
                assert not kwargs
                check(func._schema.name, args, f"{func._schema.name} {sample.name} {dtype}")
sys.exit(0)
