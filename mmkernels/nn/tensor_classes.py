"""Which tensors the ops take; modules run plain torch on other classes, and copy those of another layout."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# Other subclasses (DTensor, quantised weights) bring operators of their own.
_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def op_takes(*tensors: Tensor | None) -> bool:
    """Whether none of these is of a tensor class that the ops do not know."""
    for tensor in tensors:  # noqa: SIM110 - a generator costs a microsecond
        if tensor is not None and type(tensor) not in _TENSORS:
            return False
    return True


def laid_out(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not contiguous: torch's modules, which ours stand for, take any strides."""
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def op_takes_sharded(*tensors: Tensor | None) -> bool:
    """The same of an op that DTensors run through (:mod:`mmkernels.ops.sharding`, which the first of them registers)."""
    if op_takes(*tensors):
        return True
    module = sys.modules.get("torch.distributed.tensor")  # not loaded where nobody has made one
    if module is None or not all(tensor is None or type(tensor) in (*_TENSORS, module.DTensor) for tensor in tensors):
        return False
    from mmkernels.ops.sharding import register_sharding

    register_sharding()
    return True
