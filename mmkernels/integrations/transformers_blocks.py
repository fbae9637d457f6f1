"""transformers' pre-norm blocks: rules for layers whose residuals the last products of attention and MLP can add."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from mmkernels.integrations.branches import Branch, passes, plus
from mmkernels.integrations.parts import NO_DROP, stands_in
from mmkernels.integrations.rules import Swapped, target_of
from mmkernels.integrations.sdpa import sdpa
from mmkernels.integrations.transformers_attention import AsksInterface, apart, collector_of
from mmkernels.integrations.transformers_by_hand import DROPOUT, probability
from mmkernels.integrations.transformers_layers import computes
from mmkernels.nn.linear import added


# --- attention ----------------------------------------------------------------------------------------------------------
class _Attention(Branch):
    """Attention with a last layer for what its heads give."""

    training: bool
    _last: ClassVar[str]
    _collector: ClassVar[Any]

    @staticmethod
    def members_of(original: type[nn.Module]) -> dict[str, Any]:
        return {"_collector": collector_of(original)}

    def apart(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call with these arguments has to be one of the module; None where its parent may do its work."""
        return apart(self, self._collector, kwargs)  # type: ignore[arg-type]

    def _out(self, heads: Tensor, residual: Tensor | None) -> Tensor:
        """[B, L, H, D] -> [B, L, C]."""
        return added(getattr(self, self._last), heads.flatten(-2), residual)


class _AsksInterface(_Attention, AsksInterface):
    """Attention that asks transformers for a function: called, its own forward, which is given the op's."""

    config: Any
    _scale: ClassVar[str] = "scale"
    _dropout: ClassVar[str] = "dropout"

    @staticmethod
    def members_of(original: type[nn.Module]) -> dict[str, Any]:
        return AsksInterface.members_of(original) | _Attention.members_of(original)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """[B, H, L, D] -> [B, L, H, D]."""
        function = self._functions.get_interface(self.config._attn_implementation, self._functions.default)
        dropout = getattr(self, self._dropout) if self.training else 0.0
        out: Tensor = function(self, q, k, v, mask, scaling=getattr(self, self._scale), dropout=dropout, **kwargs)[0]
        return out


class _Projected(_AsksInterface):
    """With a layer each for queries, keys and values."""

    head_dim: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def added_to(  # type: ignore[override]
        self, residual: Tensor | None, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self._out(self._attend(q, k, v, attention_mask, **self._handed_on(kwargs)), residual)

    def _handed_on(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs


@computes("91f26b7e72d95e0e", "97638e067de1610b", runs=("mk.attention",))
class SwappedClipAttention(_Projected):
    """CLIP's, and those written like it."""

    _last = "out_proj"


@computes("c5b3f90798654b3c", "4c214ccdcc5df5c9", runs=("mk.attention",))
class SwappedSiglipAttention(_Projected):
    """SigLIP's, and those written like it."""

    is_causal: bool
    _last = "out_proj"

    def _handed_on(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"is_causal": self.is_causal}


@computes("d5a1ffd40bf0e96c", runs=("mk.attention",))
class SwappedVitAttention(_Projected):
    """ViT's, and those written like it."""

    _last, _scale, _dropout = "o_proj", "scaling", "attention_dropout"


@computes("b0bc760d6735ba76", runs=("mk.attention",))
class SwappedBlip2Attention(_AsksInterface):
    """BLIP-2's of images, with one layer for queries, keys and values."""

    num_heads: int
    qkv: nn.Module
    _last, _dropout = "projection", "attention_dropout"

    def added_to(self, residual: Tensor | None, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self._out(self._attend(q, k, v, None, **kwargs), residual)


@computes("19caefbad2325a33", runs=("mk.attention",))
class SwappedBlipAttention(_Attention):
    """BLIP's of images, which it computes by hand, and whose weights those get who listen to it."""

    num_heads: int
    scale: float
    qkv: nn.Module
    dropout: nn.Module
    _last = "projection"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        reason = self.apart(kwargs)
        if reason is not None:
            return self.original(reason, hidden_states, **kwargs)
        return self.added_to(None, hidden_states), None

    def added_to(self, residual: Tensor | None, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = sdpa(q, k, v, None, probability(self.dropout) or 0.0, scale=self.scale)
        return self._out(out.transpose(1, 2), residual)

    def apart(self, kwargs: dict[str, Any]) -> str | None:
        return DROPOUT if probability(self.dropout) is None else super().apart(kwargs)


# --- layers -------------------------------------------------------------------------------------------------------------
_LAYER = ("mk.linear", "mk.mlp")


class _PreNormLayer(Swapped):
    """x + drop(attention(norm(x))), and the same with the MLP: each residual is added in the last layer of its branch. Where
    something listens to a branch, or stands between it and the sum, the call is one of the original."""

    _norms: ClassVar[tuple[str, str]]
    _attention: ClassVar[str]
    _mlp: ClassVar[str] = "mlp"
    _drop: ClassVar[str | None] = None

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        for name, kind in ((cls._attention, _Attention), (cls._mlp, Branch)):
            part = getattr(module, name)
            target = target_of(part)
            if target is None or not issubclass(target, kind):
                return f"its {name} is a {type(part).__name__} that adds no residual; its parts are listed below"
        return None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention, mlp = getattr(self, self._attention), getattr(self, self._mlp)
        reason = self._reason(attention, mlp, kwargs)
        if reason is not None:
            return self.original(reason, hidden_states, *args, **kwargs)
        before, after = (getattr(self, name) for name in self._norms)
        x = _sum(hidden_states, attention, before(hidden_states), *args, **kwargs)
        return _sum(x, mlp, after(x))

    def _reason(self, attention: nn.Module, mlp: nn.Module, kwargs: dict[str, Any]) -> str | None:
        if not isinstance(attention, _Attention) or not isinstance(mlp, Branch):
            return "attention or an MLP that is not swapped"
        if not passes(NO_DROP if self._drop is None else getattr(self, self._drop)):
            return "dropout of what is added"
        if not stands_in(mlp, Branch):
            return "somebody listens to the MLP"
        return attention.apart(kwargs)


def _sum(residual: Tensor, branch: Branch, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """residual + branch(x, ...), apart where they are of two dtypes, of which the op takes one."""
    if residual.dtype == x.dtype:
        return branch.added_to(residual, x, *args, **kwargs)
    return plus(branch.added_to(None, x, *args, **kwargs), residual)


@computes("aeb5140ee0f5f4dd", "54797b80970bca45", "9e748a3375483279", "97738fc2d8f662b2", runs=_LAYER)
class SwappedClipLayer(_PreNormLayer):
    """CLIP's, SigLIP's and BLIP's, and those written like them."""

    _norms, _attention = ("layer_norm1", "layer_norm2"), "self_attn"


@computes("036418e5a326a4c2", runs=_LAYER)
class SwappedVitLayer(_PreNormLayer):
    """ViT's, and those written like it."""

    _norms, _attention, _drop = ("layernorm_before", "layernorm_after"), "attention", "dropout"


@computes("693e4e272af795d5", runs=_LAYER)
class SwappedAimLayer(_PreNormLayer):
    """AIMv2's and Ovis 2's."""

    _norms, _attention, _mlp = ("rms_norm1", "rms_norm2"), "attention", "ffn"
