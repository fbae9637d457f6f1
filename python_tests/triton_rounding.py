"""Imported where kernels are interpreted, for three things that Triton's interpreter (3.6 to 3.9) does otherwise than a GPU.

It cuts float32 down to bfloat16, with twice the error of a GPU, which rounds to nearest; sums of many such numbers drift:
with this it rounds, as torch does. It multiplies matrices of bfloat16 by their bits, and others in an order of summation
that depends on how they lie, so that a product transposed is another: with this it sums in float64. And it patches
triton.language anew in every call of a function within a kernel, which is half of its time: with this once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _rounding(values: np.ndarray, source: Any, target: Any, mode: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.uint16).numpy()
    return _convert(values, source, target, mode)


interpreter._convert_float = _rounding


def _values(x: Any) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.data.astype(np.float64)


def _dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
    product = _values(a) @ _values(b) + acc.data
    return interpreter.TensorHandle(product.astype(acc.data.dtype), acc.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot

_patch_lang = interpreter._patch_lang
_scopes: dict[int, Any] = {}  # of the running kernel, by the module whose functions they serve


def _patch_once(function: Any) -> Any:
    module = id(function.__globals__)
    if module not in _scopes:
        scope = _scopes[module] = _patch_lang(function)
        if len(_scopes) == 1:  # the kernel's own, which the interpreter closes at its end
            restore = scope.restore

            def restore_and_forget() -> None:
                restore()
                _scopes.clear()

            scope.restore = restore_and_forget
    return _scopes[module]


interpreter._patch_lang = _patch_once
