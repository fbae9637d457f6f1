"""Imported where kernels are interpreted: Triton's interpreter (3.6 to 3.9) cuts float32 down to bfloat16, with twice the
error of a GPU, which rounds to nearest; sums of many such numbers drift. With this it rounds, as torch does."""

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
