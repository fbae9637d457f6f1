"""open_clip: the norms of its towers; their attention and MLPs are torch.nn's."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.integrations.parts import unusual_norm
from mmkernels.integrations.rules import Swapped, replaces
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.norm import layer_norm


class _LayerNorm(Swapped):
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    refuses = staticmethod(unusual_norm)

    def forward(self, x: Tensor) -> Tensor:
        reason = self._reason(x)
        if reason is not None:
            return self.original(reason, x)
        return layer_norm(laid_out(x), self.weight, self.bias, self.eps)

    def _reason(self, x: Tensor) -> str | None:
        return None if op_takes(x, self.weight, self.bias) else "tensors of another class"


@replaces("open_clip.transformer.LayerNorm", runs=("mk.layer_norm",), forward=("e99d3f9f736a06b5",))
class SwappedLayerNorm(_LayerNorm):
    """open_clip's LayerNorm, which gives the dtype that it got."""


@replaces("open_clip.transformer.LayerNormFp32", runs=("mk.layer_norm",), forward=("5ffa2fb8a9fc3d66",))
class SwappedLayerNormFp32(_LayerNorm):
    """open_clip's LayerNorm in float32 whatever the input is, as the op computes it."""

    def _reason(self, x: Tensor) -> str | None:
        if self.weight is not None and self.weight.dtype != torch.float32:
            return f"a weight of {self.weight.dtype} beside float32"
        return super()._reason(x)
