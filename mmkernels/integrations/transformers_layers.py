"""transformers' feed-forward layers and norms: rules for forward passes that many of its classes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmkernels.integrations.branches import Branch, plus
from mmkernels.integrations.parts import NO_DROP, UNKNOWN, activation_name
from mmkernels.integrations.rules import AnyClass, Rule, Swapped, no_attributes, no_refusal
from mmkernels.nn.linear import activated
from mmkernels.nn.mlp import dropped, feed_forward
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.norm import rms_norm

# By the digest of a forward pass.
LAYER_RULES: dict[str, Rule] = {}


def computes(*digests: str, runs: tuple[str, ...]) -> Callable[[AnyClass], AnyClass]:
    """Declares a class of :class:`Swapped` as the replacement of all classes that have one of these forward passes."""

    def register(target: AnyClass) -> AnyClass:
        refuses = getattr(target, "refuses", no_refusal)
        for digest in digests:
            LAYER_RULES[digest] = Rule("", target, runs, (), refuses, no_attributes)
        return target

    return register


# --- feed-forward layers ------------------------------------------------------------------------------------------------
def _refuses_activation(cls: Any, module: Any) -> str | None:
    activation = getattr(module, cls._activation)
    if activation_name(activation) == UNKNOWN:
        return f"its activation is a {type(activation).__name__}; its layers are replaced one by one"
    return None


class _FeedForward(Branch):
    """drop_out(out(drop(activation(in(x))))), or activation(gate(x)) in(x); the layers by their names in the class."""

    _activation: ClassVar[str]
    _in: ClassVar[str]
    _out: ClassVar[str]
    _gate: ClassVar[str | None] = None
    _drop: ClassVar[str | None] = None
    _drop_out: ClassVar[str | None] = None

    refuses = classmethod(_refuses_activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.added_to(None, x)

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        name = activation_name(getattr(self, self._activation))
        if name == UNKNOWN:
            return plus(self.original("another activation", x), residual)
        gate, drop, drop_out = (
            otherwise if attribute is None else getattr(self, attribute)
            for attribute, otherwise in ((self._gate, None), (self._drop, NO_DROP), (self._drop_out, NO_DROP))
        )
        return feed_forward(x, getattr(self, self._in), getattr(self, self._out), name, drop, drop_out, residual, gate)


@computes("b4e9c2637c7f1172", "acdd8499d70f080a", "072ce699963a3666", runs=("mk.mlp",))
class SwappedGatedMlp(_FeedForward):
    """Llama's MLP, and those written like it."""

    _activation, _in, _out, _gate = "act_fn", "up_proj", "down_proj", "gate_proj"


@computes("c0dd4bdd79a8084a", runs=("mk.mlp",))
class SwappedGatedMlpWithDropout(SwappedGatedMlp):
    """T5Gemma's."""

    _drop = "dropout"


@computes("211ee8122b597752", "338c4c52ceafcc08", runs=("mk.mlp",))
class SwappedMlp(_FeedForward):
    """The MLP of CLIP and ViT, and those written like it."""

    _activation, _in, _out = "activation_fn", "fc1", "fc2"


@computes("346b0a8c2101a792", runs=("mk.mlp",))
class SwappedVjepaMlp(_FeedForward):
    """V-JEPA 2's."""

    _activation, _in, _out = "activation", "fc1", "fc2"


@computes("d71906a8419edebf", runs=("mk.mlp",))
class SwappedQwen2VisionMlp(_FeedForward):
    """Qwen2-VL's of images."""

    _activation, _in, _out = "act", "fc1", "fc2"


@computes("9a31903096a2b559", runs=("mk.mlp",))
class SwappedQwen3VisionMlp(_FeedForward):
    """Qwen3-VL's of images."""

    _activation, _in, _out = "act_fn", "linear_fc1", "linear_fc2"


@computes("b800b765d21bbbc1", runs=("mk.mlp",))
class SwappedUpDownMlp(_FeedForward):
    """Nemotron's and DINOv3's."""

    _activation, _in, _out = "act_fn", "up_proj", "down_proj"


@computes("728e872b5a569a3e", runs=("mk.mlp",))
class SwappedNeoxMlp(_FeedForward):
    """GPT-NeoX's."""

    _activation, _in, _out = "act", "dense_h_to_4h", "dense_4h_to_h"


@computes("99e2cda217114bf3", runs=("mk.mlp",))
class SwappedSpeechFeedForward(_FeedForward):
    """wav2vec 2.0's, and those written like it."""

    _activation, _in, _out = "intermediate_act_fn", "intermediate_dense", "output_dense"
    _drop, _drop_out = "intermediate_dropout", "output_dropout"


class _T5FeedForward(_FeedForward):
    """T5's, whose last layer may be of another dtype than the others."""

    _activation, _out, _drop = "act", "wo", "dropout"
    wo: Any

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.wo.weight.dtype != x.dtype:
            return plus(self.original("a last layer of another dtype", x), residual)
        return super().added_to(residual, x)


@computes("a05abaeef58aba41", runs=("mk.mlp",))
class SwappedT5Mlp(_T5FeedForward):
    """T5's."""

    _in = "wi"


@computes("2e665a92d5d4dc6b", runs=("mk.mlp",))
class SwappedT5GatedMlp(_T5FeedForward):
    """T5 1.1's."""

    _in, _gate = "wi_1", "wi_0"


# --- halves of feed-forward layers --------------------------------------------------------------------------------------
class _Half(Swapped):
    """activation(dense(x))."""

    _activation: ClassVar[str]
    dense: nn.Module
    refuses = classmethod(_refuses_activation)

    def forward(self, hidden_states: Tensor) -> Any:
        name = activation_name(getattr(self, self._activation))
        if name == UNKNOWN:
            return self.original("another activation", hidden_states)
        return activated(self.dense, hidden_states, name)


@computes("ab9c954dfd44e6a0", "e87c8067bbfddaee", runs=("mk.linear",))
class SwappedIntermediate(_Half):
    """BERT's first half, and those written like it."""

    _activation = "intermediate_act_fn"


@computes("7105cad9c067f727", runs=("mk.linear",))
class SwappedCvtIntermediate(_Half):
    """CvT's."""

    _activation = "activation"


@computes("78b3be0670424414", "68cbcb264b5d757d", runs=("mk.linear",))
class SwappedNormedOutput(Swapped):
    """BERT's second half, and those written like it: the norm of a sum."""

    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(dropped(self.dense, hidden_states, self.dropout, input_tensor))
        return out


@computes("d6ed28800b8f511d", "830d104c2dd992aa", "9dcacf93c84a3ea0", runs=("mk.linear",))
class SwappedOutput(Swapped):
    """The second half in blocks that normalise before."""

    dense: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return dropped(self.dense, hidden_states, self.dropout, input_tensor)


# --- norms --------------------------------------------------------------------------------------------------------------
class _RmsNorm(Swapped):
    """The op rounds once where these round before the weight too, and gives the dtype of its input: so it runs where that
    is the dtype of the weight, which the product has there."""

    weight: Tensor
    _eps: ClassVar[str] = "variance_epsilon"

    def forward(self, hidden_states: Tensor) -> Any:
        weight = self.weight
        if hidden_states.dtype != weight.dtype or not op_takes(hidden_states, weight):
            return self.original("a weight of another dtype or tensor class", hidden_states)
        return rms_norm(laid_out(hidden_states), self._scale(weight), getattr(self, self._eps))

    def _scale(self, weight: Tensor) -> Tensor:
        return weight


@computes(
    "d676bfe9af0e524d", "1d33e8f6cf071536", "7a982f57aa241c63", "b943565b81cf1d5b", "34dcae840cd42fcf", runs=("mk.rms_norm",)
)
class SwappedRmsNorm(_RmsNorm):
    """Llama's, OLMo 2's, GPT-OSS's, Helium's and T5's."""


@computes(
    "78445ea3d6353b4d",
    "3aaaf6c3a56c829e",
    "3a8c77aca757e0bd",
    "509615cb1d1cc91a",
    "ef9b57599020a0f6",
    "9abd75d6ab049adb",
    runs=("mk.rms_norm",),
)
class SwappedGemmaRmsNorm(_RmsNorm):
    """Gemma's, whose weight is what is added to 1."""

    _eps = "eps"

    def _scale(self, weight: Tensor) -> Tensor:
        return 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))
