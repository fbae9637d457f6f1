"""timm: attention layers that attend over whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.branches import Branch, biased, plus
from mmkernels.integrations.parts import drop_of
from mmkernels.integrations.rules import replaces, unknown_source
from mmkernels.integrations.sdpa import sdpa
from mmkernels.nn.linear import added, untouched
from mmkernels.nn.mlp import dropped

_RUNS = ("mk.linear", "mk.attention")


def split(x: Tensor, parts: int, heads: int) -> Any:
    """[B, N, parts * H * D] -> `parts` views [B, H, N, D]; a view itself where there is one part."""
    if parts == 1:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def plane_of(x: Tensor, feat_size: list[int]) -> Tensor:
    """[B, H * W, C] -> a view [B, C, H, W], whose strides say that channels are last for a batch of one image too."""
    return x.unflatten(1, tuple(feat_size)).permute(0, 3, 1, 2)


class AttentionBranch(Branch):
    """What attention layers share: timm gives the scores to F.scaled_dot_product_attention, or computes them."""

    num_heads: int
    scale: Any
    training: bool
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def _computed_otherwise(self, mask: Tensor | None = None) -> str | None:
        """Why the forward pass that computes scores itself is not what mk.attention does; None where it is, or where it does
        not compute them."""
        if getattr(self, "fused_attn", False):
            return None
        if not untouched(self.attn_drop, nn.Dropout):
            return "attn_drop is listened to, or another layer stands in its place"
        if not isinstance(self.scale, float):
            return "its scale is no number"
        # Where a query sees no key, its softmax is NaN there.
        return None if mask is None else "a mask beside fused_attn=False"

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, gqa: bool = False
    ) -> Tensor:
        """[B, H, N, D] -> [B, N, H * D]."""
        fused = getattr(self, "fused_attn", False)
        drop: Any = self.attn_drop
        dropping = self.training if fused else drop.training
        out = sdpa(q, k, v, mask, drop.p if dropping else 0.0, is_causal, None if fused else self.scale, gqa)
        return out.transpose(1, 2).flatten(2)

    def _out(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return dropped(self.proj, x, drop_of(self.proj_drop), residual)


class _Gated(AttentionBranch):
    """What timm's attention layers share beside the heads: norms of queries, keys and output, and a gate of the output."""

    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None

    def _normed_out(self, x: Tensor, attended: Tensor, residual: Tensor | None) -> Tensor:
        out = self.norm(attended)
        return self._out(out if self.gate is None else out * self.gate(x).sigmoid(), residual)


@replaces("timm.layers.attention.Attention", runs=_RUNS, forward=("02afd7a3ba1db669",))
class SwappedAttention(_Gated):
    """Self-attention of vision transformers."""

    qkv: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.added_to(None, x, attn_mask, is_causal)

    def added_to(  # type: ignore[override]
        self, residual: Tensor | None, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        reason = self._computed_otherwise(attn_mask)
        if reason is not None:
            return plus(self.original(reason, x, attn_mask, is_causal), residual)
        q, k, v = split(self.qkv(x), 3, self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        return self._normed_out(x, self._attended(q, k, v, attn_mask, is_causal), residual)


# --- rotary embeddings ------------------------------------------------------------------------------------------------
def rotated(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """x cos + turned(x) sin, with rope = [sin | cos]; pairs are neighbours, or with `half` channels of the two halves."""
    sin, cos = rope.chunk(2, -1)
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class _Rotary(_Gated):
    """Self-attention with rotary embeddings of all but the first tokens."""

    qkv: nn.Module | None
    q_proj: Any
    k_proj: Any
    v_proj: Any
    num_prefix_tokens: int

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.added_to(None, x, rope, attn_mask, is_causal)

    def added_to(  # type: ignore[override]
        self,
        residual: Tensor | None,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        reason = self._computed_otherwise(attn_mask)
        if reason is not None:
            return plus(self.original(reason, x, rope, attn_mask, is_causal), residual)
        kv_heads: int = getattr(self, "num_kv_heads", self.num_heads)
        if self.qkv is not None:
            q, k, v = split(self._packed_projection(self.qkv, x), 3, self.num_heads)
        else:
            q = split(self.q_proj(x), 1, self.num_heads)
            k, v = split(self.k_proj(x), 1, kv_heads), split(self.v_proj(x), 1, kv_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turned(q, rope).type_as(v), self._turned(k, rope).type_as(v)
        attended = self._attended(q, k, v, attn_mask, is_causal, kv_heads != self.num_heads)
        return self._normed_out(x, attended, residual)

    def _packed_projection(self, qkv: nn.Module, x: Tensor) -> Tensor:
        return qkv(x)

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        turned = rotated(x[:, :, prefix:, :], rope, getattr(self, "rotate_half", False))
        return torch.cat([x[:, :, :prefix, :], turned], dim=2)


@replaces("timm.layers.attention.AttentionRope", runs=_RUNS, forward=("c348fe892351afa7",))
class SwappedAttentionRope(_Rotary):
    """timm's AttentionRope; fewer heads of keys and values are not repeated."""


class SeparateBias(AttentionBranch):
    """What layers share whose projection has no bias: q and v have one, and a buffer of zeros is that of k."""

    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    qkv_bias_separate: bool

    def qkv_bias(self) -> Tensor | None:
        return None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def projected(self, qkv: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and self.qkv_bias_separate:
            return added(qkv, x, bias)
        return biased(qkv, x, bias)


@replaces("timm.models.eva.EvaAttention", runs=_RUNS, forward=("1feee8d38ec339ff",))
class SwappedEvaAttention(_Rotary, SeparateBias):
    """EVA's attention, whose keys have no bias."""

    def _packed_projection(self, qkv: nn.Module, x: Tensor) -> Tensor:
        return self.projected(qkv, x, self.qkv_bias())


# --- a bias of relative positions -------------------------------------------------------------------------------------
@replaces("timm.models.beit.Attention", runs=_RUNS, forward=("ca3416d1fcfdeb57",))
class SwappedBeitAttention(SeparateBias):
    """BEiT's attention, with a bias for each distance of two patches."""

    qkv: nn.Module
    relative_position_bias_table: Tensor | None
    _get_rel_pos_bias: Any

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        return unknown_source(type(module), ("23db5af825d74436",), "_get_rel_pos_bias")

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.added_to(None, x, shared_rel_pos_bias)

    def added_to(  # type: ignore[override]
        self, residual: Tensor | None, x: Tensor, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        reason = self._computed_otherwise(shared_rel_pos_bias)
        if reason is not None:
            return plus(self.original(reason, x, shared_rel_pos_bias), residual)
        q, k, v = split(self.projected(self.qkv, x, self.qkv_bias()), 3, self.num_heads)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias()
            bias = bias if shared_rel_pos_bias is None else bias + shared_rel_pos_bias
        return self._out(self._attended(q, k, v, bias), residual)


# --- scores computed in the forward pass --------------------------------------------------------------------------------
@replaces("timm.models.crossvit.CrossAttention", runs=_RUNS, forward=("f557fe8ac7dac7e6",))
class SwappedCrossAttention(AttentionBranch):
    """CrossViT's attention of the first token to all."""

    wq: nn.Module
    wk: nn.Module
    wv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.added_to(None, x)

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        reason = self._computed_otherwise()
        if reason is not None:
            return plus(self.original(reason, x), residual)
        q, k, v = (
            split(layer(tokens), 1, self.num_heads)
            for layer, tokens in ((self.wq, x[:, 0:1, ...]), (self.wk, x), (self.wv, x))
        )
        return self._out(self._attended(q, k, v), residual)


@replaces("timm.models.tnt.Attention", runs=_RUNS, forward=("ff8d17a0dbf7839e",))
class SwappedNestedAttention(AttentionBranch):
    """TNT's attention, of patches and of the pixels in each: q and k in one projection."""

    qk: nn.Module
    v: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.added_to(None, x)

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        reason = self._computed_otherwise()
        if reason is not None:
            return plus(self.original(reason, x), residual)
        q, k = split(self.qk(x), 2, self.num_heads)
        return self._out(self._attended(q, k, split(self.v(x), 1, self.num_heads)), residual)


@replaces("timm.models.pvt_v2.Attention", runs=_RUNS, forward=("e3a3b14ea4a56dba",))
class SwappedPyramidAttention(AttentionBranch):
    """PVTv2's attention, to tokens that a strided convolution or a pooling has made fewer."""

    q: nn.Module
    kv: nn.Module
    pool: nn.Module | None
    sr: nn.Module | None
    norm: nn.Module | None
    act: nn.Module | None

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        return self.added_to(None, x, feat_size)

    def added_to(self, residual: Tensor | None, x: Tensor, feat_size: list[int]) -> Tensor:  # type: ignore[override]
        reason = self._computed_otherwise()
        if reason is not None:
            return plus(self.original(reason, x, feat_size), residual)
        q = split(self.q(x), 1, self.num_heads)
        k, v = split(self.kv(self._fewer(x, feat_size)), 2, self.num_heads)
        return self._out(self._attended(q, k, v), residual)

    def _fewer(self, x: Tensor, feat_size: list[int]) -> Tensor:
        if self.sr is None or self.norm is None:
            return x
        plane = plane_of(x, feat_size)
        plane = self.sr(plane if self.pool is None else self.pool(plane))
        x = self.norm(plane.flatten(2).transpose(1, 2))
        return x if self.act is None or self.pool is None else self.act(x)
