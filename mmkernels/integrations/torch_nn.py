"""torch.nn: linear layers, norms, attention, transformer layers, and MLPs written as nn.Sequential."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.parts import NO_DROP, UNKNOWN, activation_name, unusual, unusual_norm
from mmkernels.integrations.rules import Rule, Swapped, add_rule, replaces
from mmkernels.nn.attention import MultiheadAttention
from mmkernels.nn.linear import Linear, activated, untouched, untouched_linear
from mmkernels.nn.mlp import dropped, feed_forward
from mmkernels.nn.norm import LayerNorm, RMSNorm
from mmkernels.nn.packed import WeightPack
from mmkernels.nn.tensor_classes import op_takes


# --- linear layers and norms ------------------------------------------------------------------------------------------
def linear_attributes(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    """What nn.Linear lacks of mmkernels.nn.Linear."""
    return {"activation": None, "kernels": True, "_pack": WeightPack(dtype)}


def _norm_attributes(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    return {"kernels": True}


def _linear_refuses(module: Any) -> str | None:
    if type(module) is not nn.Linear and type(module).forward is not nn.Linear.forward:
        return "its forward is not that of nn.Linear"
    return unusual(module.weight)


for _name in ("Linear", "NonDynamicallyQuantizableLinear"):
    add_rule(
        Rule(
            f"torch.nn.modules.linear.{_name}",
            Linear,
            ("mk.linear",),
            refuses=_linear_refuses,
            attributes=linear_attributes,
        )
    )
add_rule(
    Rule(
        "torch.nn.modules.normalization.LayerNorm",
        LayerNorm,
        ("mk.layer_norm",),
        refuses=unusual_norm,
        attributes=_norm_attributes,
    )
)
add_rule(
    Rule(
        "torch.nn.modules.normalization.RMSNorm",
        RMSNorm,
        ("mk.rms_norm",),
        refuses=unusual_norm,
        attributes=_norm_attributes,
    )
)


# --- attention --------------------------------------------------------------------------------------------------------
@replaces("torch.nn.modules.activation.MultiheadAttention", runs=("mk.linear", "mk.attention"))
class SwappedMultiheadAttention(Swapped, MultiheadAttention):
    """nn.MultiheadAttention; with weights asked for, torch's own."""

    @staticmethod
    def refuses(module: Any) -> str | None:
        return unusual(module.out_proj.weight)

    @staticmethod
    def attributes(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
        return {"_kernels": True, "_pack": WeightPack(dtype)}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        reason = None
        if need_weights:
            reason = "need_weights=True"
        elif not self._runs_kernels(query, key, value, key_padding_mask, attn_mask):
            reason = "nested tensors, tensors of another class, or every weight dropped"
        arguments = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return super().forward(*arguments) if reason is None else self.original(reason, *arguments)


class _FeedForward(Swapped):
    """What torch's encoder and decoder layers share."""

    activation: Any
    linear1: nn.Module
    linear2: nn.Module
    dropout: nn.Module

    def _feed_forward(self, x: Tensor, drop: nn.Module, residual: Tensor) -> Tensor:
        """residual + drop(linear2(dropout(activation(linear1(x)))))."""
        name = activation_name(self.activation)
        if name == UNKNOWN:
            return dropped(self.linear2, self.dropout(self.activation(self.linear1(x))), drop, residual)
        return feed_forward(x, self.linear1, self.linear2, name, self.dropout, drop, residual)

    @staticmethod
    def _attend(layer: nn.Module, drop: nn.Module, x: Tensor, other: Tensor, **arguments: Any) -> Tensor:
        return drop(layer(x, other, other, need_weights=False, **arguments)[0])


@replaces(
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    runs=("mk.mlp", "mk.linear", "mk.attention", "mk.layer_norm"),
)
class SwappedEncoderLayer(_FeedForward):
    """nn.TransformerEncoderLayer through its own layers, which torch's fast path in eval mode reads instead of calling."""

    self_attn: nn.Module
    norm_first: bool
    norm1: nn.Module
    norm2: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested or not op_takes(src, src_mask, src_key_padding_mask):
            return self.original("nested tensors", src, src_mask, src_key_padding_mask, is_causal)
        masks: Any = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        if self.norm_first:
            normed = self.norm1(src)
            x = src + self._attend(self.self_attn, self.dropout1, normed, normed, **masks)
            return self._feed_forward(self.norm2(x), self.dropout2, x)
        x = self.norm1(src + self._attend(self.self_attn, self.dropout1, src, src, **masks))
        return self.norm2(self._feed_forward(x, self.dropout2, x))


@replaces(
    "torch.nn.modules.transformer.TransformerDecoderLayer",
    runs=("mk.mlp", "mk.linear", "mk.attention", "mk.layer_norm"),
)
class SwappedDecoderLayer(_FeedForward):
    """nn.TransformerDecoderLayer, its MLP in one pass."""

    self_attn: nn.Module
    multihead_attn: nn.Module
    norm_first: bool
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    dropout3: nn.Module

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        own: Any = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        others: Any = {
            "attn_mask": memory_mask,
            "key_padding_mask": memory_key_padding_mask,
            "is_causal": memory_is_causal,
        }
        if self.norm_first:
            normed = self.norm1(tgt)
            x = tgt + self._attend(self.self_attn, self.dropout1, normed, normed, **own)
            x = x + self._attend(self.multihead_attn, self.dropout2, self.norm2(x), memory, **others)
            return self._feed_forward(self.norm3(x), self.dropout3, x)
        x = self.norm1(tgt + self._attend(self.self_attn, self.dropout1, tgt, tgt, **own))
        x = self.norm2(x + self._attend(self.multihead_attn, self.dropout2, x, memory, **others))
        return self.norm3(self._feed_forward(x, self.dropout3, x))


# --- nn.Sequential ----------------------------------------------------------------------------------------------------
@replaces("torch.nn.modules.container.Sequential", runs=("mk.mlp",))
class SwappedSequential(Swapped):
    """nn.Sequential with linear layers followed by an activation: Linear, activation, (Dropout,) Linear is one op, a linear
    layer with its activation another."""

    _modules: dict[str, nn.Module | None]

    @staticmethod
    def refuses(module: nn.Sequential) -> str | None:
        if not any(_pairs(list(module))):
            return "no linear layer with an activation behind it; its parts are listed below"
        return None

    def forward(self, input: Tensor) -> Any:  # the argument's name is torch's
        x: Any = input
        layers: list[Any] = list(self._modules.values())
        at = 0
        while at < len(layers):
            layer, following = layers[at], layers[at + 1 : at + 4]
            name = activation_name(following[0]) if following else UNKNOWN
            if name in (UNKNOWN, None) or not untouched_linear(layer) or not isinstance(x, Tensor):
                x = layer(x)
                at += 1
                continue
            drop = NO_DROP
            if len(following) == 3 and untouched(following[1], nn.Dropout):
                drop = following.pop(1)
            skipped = at + 1 + (drop is not NO_DROP)
            if len(following) > 1 and untouched_linear(following[1]):
                x = feed_forward(x, layer, following[1], name, drop, NO_DROP, None)
                at = skipped + 2
            else:
                x = activated(layer, x, name)
                at += 2
        return x


def _pairs(layers: list[nn.Module]) -> list[bool]:
    """Whether each layer is a linear one with an activation behind it that the ops know."""
    return [
        isinstance(layer, nn.Linear) and activation_name(following) not in (UNKNOWN, None)
        for layer, following in pairwise(layers)
    ]
