"""Run by test_triton.py in a process of its own, under TRITON_INTERPRET=1: the Triton kernels on CPU tensors.

Arguments: a family, and the dtypes to try. Every sample of its cards whose operators have Triton kernels is run through the
operator's own kernels and, with the same arguments, through the family's Triton functions where they take it on a GPU;
both must be within the correctness rule. Prints a line a check.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import triton_rounding  # noqa: F401
from support import as_tuple, draw, gradients
from test_cards import RecordOperators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_compare import assert_laid_out_as_declared

from mmkernels.cards import all_cards
from mmkernels.ops import entry
from mmkernels.ops.backends import Backend


def taken(backend: Backend, func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the Triton kernels would take this call, were its tensors on a GPU."""

    def there(value: Any) -> Any:
        return value.new_empty(value.shape, device="cuda") if isinstance(value, Tensor) else value

    with FakeTensorMode(allow_non_fake_inputs=True):
        names = (argument.name for argument in func._schema.arguments)
        arguments = {name: there(value) for name, value in zip(names, args, strict=False)}  # defaults may be missing
        # The backward pass of a norm names what was normalised otherwise, and may have no x.
        arguments["x"] = next(value for value in (arguments.get("x"), *arguments.values()) if isinstance(value, Tensor))
        return backend.reason(arguments) is None


def reference_in(dtype: torch.dtype, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operator's plain-torch form with every floating tensor in `dtype`."""
    cast = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return as_tuple(entry.REFERENCES[name](*cast))


def check(name: str, args: tuple[Any, ...], what: str) -> None:
    function = getattr(importlib.import_module(f"mmkernels.triton.{family}"), name.removeprefix("mmkernels::"))
    torch.use_deterministic_algorithms(True)  # fresh memory is then filled with NaN: nothing may stay unwritten
    outputs = as_tuple(function(*args))
    torch.use_deterministic_algorithms(False)
    assert_laid_out_as_declared(name, args, outputs, what)
    plain, oracle = as_tuple(entry.REFERENCES[name](*args)), reference_in(torch.float64, name, args)
    for i, (ours, theirs, truth) in enumerate(zip(outputs, plain, oracle, strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, f"{what}: output {i}"
        if ours.numel() == 0:
            continue
        if not ours.is_floating_point():
            assert torch.equal(ours, truth), f"{what}: output {i}: integers"
            continue
        keep = truth.isfinite()
        beyond = (x[~keep].double().nan_to_num(0.5) for x in (ours, truth))  # NaN and infinities, which must agree
        assert torch.equal(*beyond), f"{what}: output {i}: NaN or infinity"
        if not keep.any():
            continue
        error, theirs_error = (ours.double() - truth)[keep].abs().max(), (theirs.double() - truth)[keep].abs().max()
        allowance = 2 * torch.finfo(ours.dtype).eps * truth[keep].abs().max()
        assert error <= 2 * theirs_error + allowance, f"{what}: output {i}: error {error:.3e}, plain {theirs_error:.3e}"
    print("checked", what)


BRIEF = 6  # "float32-brief": every so manyth sample
family, *dtypes = sys.argv[1:]
for card in all_cards():
    if card.family != family:
        continue
    backend = next((backend for backend in card.backends if backend.name == "triton"), None)
    if backend is None:
        continue
    operators = set()
    for name in dtypes:
        dtype, brief = getattr(torch, name.removesuffix("-brief")), name.endswith("-brief")
        for sample in card.samples[:: BRIEF if brief else 1]:
            if sample.full or any(word in sample.name for word in ("ViT", "ragged")):
                continue  # too big to interpret
            with RecordOperators() as recorded:
                gradients(card.function, draw(sample, dtype))
            for func, args, kwargs in recorded.calls:
                assert not kwargs
                if taken(backend, func, args):
                    check(func._schema.name, args, f"{func._schema.name} {sample.name} {dtype}")
                    operators.add(func._schema.name)
    assert operators == set(card.ops), f"{card.name}: no sample for {set(card.ops) - operators}"
sys.exit(0)
