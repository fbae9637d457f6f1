"""transformers' attention functions: what its models call with queries, keys and values, run by mk.attention."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from mmkernels.integrations.rules import Rule, Swapped, digest_of, note
from mmkernels.integrations.sdpa import refused, with_globals
from mmkernels.nn.linear import unchanged
from mmkernels.nn.tensor_classes import laid_out
from mmkernels.ops.attention import attention, cast_heads

# Why the op, which makes no weights, does not serve a call.
WEIGHTS: Final = "attention weights are asked for"

# The functions of that name that compute softmax(softcap(scale q k^T) + position_bias + mask) v of the keys and values
# repeated for their groups, and no more: 0 is a mask that is None, nothing is causal of itself.
_EAGER = (
    "cb34ccea28710ae8",  # Llama
    "69e7d5ef5f83f9cf",  # BERT
    "97a93e96c7b32c94",  # Qwen2.5-VL
    "ae5ae88b560a2bc6",  # Idefics
    "587d5b52cc6f7507",  # Gemma
    "23b87df58f903ef2",  # ViT
    "20b91a87ef7f69f1",  # T5
    "467f24ab17885c4a",  # SAM
    "fc1317ff76cfb3a8",  # ModernBERT
    "ee12a4f4b2571ede",  # Whisper
    "c6322a9cf847306d",  # BLIP-2
    "f4ca93ba43d3207e",  # CLIP
    "a5324ddadec9d5a7",  # Wav2Vec2-BERT
)

# The same with a score more in each row, of the module's `sinks`, that no value belongs to.
_EAGER_WITH_SINKS = ("3cb759e14962bed1",)


def as_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls "sdpa", and with it softcap and sinks (s_aux), which that one refuses or passes over.

    Without a mask, a module that is causal (the argument or, where that is None, its attribute) sees the keys up to its own
    place, unless there is one query; a mask, bool or floating, says all by itself. Sliding windows are in the mask.
    """
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    q, k, v = cast_heads(query, key, value)
    reason = _reason(module, q, k, v, attention_mask, position_bias, dropout)
    if reason is not None:
        note(module, reason)
        return _original_sdpa(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and q.shape[2] > 1 and bool(is_causal)
    if position_bias is not None and attention_mask is not None and attention_mask.dtype == torch.bool:
        # One tensor, as there: a query that sees nothing has then the mean of all values, and not 0.
        attention_mask = torch.where(attention_mask, position_bias, torch.finfo(k.dtype).min)
        position_bias = None
    return _attend(q, k, v, attention_mask, position_bias, causal, scaling, dropout, softcap, sinks), None


def implementation(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What "mmkernels" stands for among transformers' implementations: :func:`as_sdpa`.

    Raises:
        ValueError: the module is of a model that supports no implementation but its eager one. transformers lets it ask for
            others all the same, and nothing in the call then says whether it is causal.
    """
    cls: Any = type(module)
    if not _supports_others(cls):
        raise ValueError(
            f"attn_implementation: {cls.__name__} is of a model that supports 'eager' alone; mmkernels.swap "
            "replaces what can be replaced there"
        )
    return as_sdpa(module, *args, **kwargs)


@cache
def _supports_others(cls: Any) -> bool:
    """Whether a model in the class's file supports an implementation beside eager; True where none is there."""
    found = [
        value
        for value in vars(sys.modules[cls.__module__]).values()
        if isinstance(value, type) and value.__module__ == cls.__module__ and hasattr(value, "_supports_sdpa")
    ]
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    return not found or any(getattr(model, flag, False) for model in found for flag in flags)


def _original_sdpa(*args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


class _Eager:
    """What a model's own eager function computes, where nobody asks for the weights.

    Args:
        function: the model's.
        collector: transformers' context variable that says which outputs are being collected.
        sinks: whether the function adds the module's sinks.
    """

    def __init__(self, function: Any, collector: Any, sinks: bool) -> None:
        self.function, self.collector, self.sinks = function, collector, sinks

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
        position_bias = kwargs.get("position_bias")
        q, k, v = cast_heads(query, key, value)
        reason = "unusual arguments of an eager attention function" if args else None
        if weights_wanted(self.collector, kwargs):
            reason = WEIGHTS
        reason = reason or _reason(module, q, k, v, attention_mask, position_bias, dropout)
        if reason is None and attention_mask is not None and attention_mask.dtype == torch.bool:
            reason = "a mask of bool that is added to the scores"
        if reason is not None:
            note(module, reason)
            return self.function(module, query, key, value, attention_mask, *args, **kwargs)
        sinks = module.sinks if self.sinks else None
        scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        return _attend(q, k, v, attention_mask, position_bias, False, scaling, dropout, softcap, sinks), None


def weights_wanted(collector: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of attention is expected to give its weights."""
    collected = None if collector is None else collector.get()
    return bool(kwargs.get("output_attentions")) or any("attentions" in name for name in collected or ())


def apart(attention: nn.Module, collector: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call of an attention module has to be one of the module as a whole; None where its parent may do its work. The
    hooks with which transformers collects outputs stay on a module, and do nothing while no weights are collected."""
    if weights_wanted(collector, kwargs):
        return WEIGHTS
    collects = all(getattr(hook, "__name__", "") == "output_capturing_hook" for hook in attention._forward_hooks.values())
    return None if collects and unchanged(attention, type(attention)) else "somebody listens to the attention module"


def _reason(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, position_bias: Tensor | None, dropout: float
) -> str | None:
    """Why the op does not take a call; None where it does."""
    if mask is not None and not isinstance(mask, Tensor):
        return f"a mask that is a {type(mask).__name__}"
    reason = refused(q, k, v, mask, dropout, is_causal=False, enable_gqa=True)
    if reason is not None:
        return reason
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and q.shape[1] != k.shape[1] * groups:
        return "heads of other numbers than the module's"
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for scores in (mask, position_bias):
        if scores is not None and any(
            size not in (1, expected) for size, expected in zip(reversed(scores.shape), reversed(full), strict=False)
        ):
            return f"a mask or bias of another shape than the scores, {tuple(scores.shape)}"
    return None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, H, L, D] -> [B, L, H, D]."""
    q, k, v = (laid_out(x) for x in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask if bias is None else bias + mask
    if bias is not None and bias.dtype not in (q.dtype, torch.float32):
        bias = bias.to(q.dtype)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout, "is_causal": causal}
    if sinks is None:
        return attention(q, k, v, bias=bias, mask=mask, **options).transpose(1, 2).contiguous()
    out, lse = attention(q, k, v, bias=bias, mask=mask, return_lse=True, **options)
    # exp(lse) / (exp(lse) + exp(sink)): what the values keep of the row's sum.
    kept = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (out.transpose(1, 2) * kept.transpose(1, 2)[..., None]).to(out.dtype).contiguous()


# --- modules that ask transformers for the function --------------------------------------------------------------------
class _Interface:
    """Stands for transformers' ALL_ATTENTION_FUNCTIONS in the forward pass of one class: "sdpa" and "eager" are run by the
    op, other implementations are those of transformers.

    Args:
        interface: transformers' own.
        default: the model's eager function.
        eager: how to run it, or why not.
    """

    def __init__(self, interface: Any, default: Any, eager: _Eager | str) -> None:
        self.interface, self.default, self.eager = interface, default, eager

    def get_interface(self, implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
        if implementation == "sdpa":
            return as_sdpa
        if implementation == "eager":
            if isinstance(self.eager, str):
                return partial(_declined_eager, self.eager, default)
            if self.eager.function is default:
                return self.eager
            return partial(_declined_eager, _UNKNOWN_EAGER, default)
        found: Callable[..., Any] = self.interface.get_interface(implementation, default)
        return found

    def __getitem__(self, name: str) -> Any:
        return self.interface[name]


_UNKNOWN_EAGER = "an eager attention function that mmkernels does not know"


def _declined_eager(reason: str, function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    note(module, reason)
    return function(module, *args, **kwargs)


def _eager_of(cls: type[nn.Module]) -> _Eager | str:
    """How the op runs the eager function of the class's file, or why it does not."""
    forward = inspect.unwrap(cls.forward)
    function = forward.__globals__.get("eager_attention_forward")
    found = digest_of(function) if isinstance(function, FunctionType) else None
    if found not in _EAGER and found not in _EAGER_WITH_SINKS:
        return _UNKNOWN_EAGER
    collector = collector_of(cls)
    if collector is None or _hands_weights_on(forward.__code__.co_filename):
        return "eager attention of a model that hands on its weights unasked"
    return _Eager(function, collector, found in _EAGER_WITH_SINKS)


@cache
def _hands_weights_on(file: str) -> bool:
    """Whether a model collects attention weights itself, and not by transformers' hooks, which say so while they do."""
    return re.search(r"\ball_(\w+_)?attentions\b", "".join(linecache.getlines(file))) is not None


class AsksInterface(Swapped):
    """A module whose own forward asks transformers' AttentionInterface for a function: that forward, which is given the
    op's. No config is changed, so the model's masks are made as ever, for what the config says."""

    _functions: ClassVar[_Interface]

    @staticmethod
    def members_of(original: type[nn.Module]) -> dict[str, Any]:
        scope = inspect.unwrap(original.forward).__globals__
        interface, default = scope["ALL_ATTENTION_FUNCTIONS"], scope.get("eager_attention_forward")
        ours = _Interface(interface, default, _eager_of(original))
        forward = with_globals(original.forward, lambda value: ours if value is interface else None)
        return {"forward": forward, "_functions": ours}


def collector_of(cls: type[nn.Module]) -> Any:
    """The variable in which transformers keeps which outputs are collected, for models that do it in that way."""
    capture = inspect.unwrap(cls.forward).__globals__.get("capture_outputs")
    return getattr(capture, "__globals__", {}).get("_active_collector")


INTERFACE_RULE = Rule("", AsksInterface, ("mk.attention",))


def asks_interface(cls: type) -> bool:
    """Whether the class asks transformers' AttentionInterface in its forward pass."""
    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    return isinstance(forward, FunctionType) and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(
        forward.__code__.co_names
    )
