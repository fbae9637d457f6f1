"""Attention that classes of transformers compute by hand: LXMERT, ViLT, CvT, SpeechT5, Mask2Former and others, and Swin's
windows."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.integrations.parts import UNKNOWN, activation_name
from mmkernels.integrations.rules import Swapped, digest_of, replaces
from mmkernels.integrations.sdpa import sdpa
from mmkernels.integrations.transformers_attention import WEIGHTS, apart, collector_of
from mmkernels.nn.linear import activated, untouched
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.window_attention import window_attention

_MODELS: Final = "transformers.models"
DROPOUT: Final = "a dropout layer that is another module, or that somebody listens to"


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, L, H * D] -> [B, H, L, D]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _put_together(x: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, H * D]."""
    return x.transpose(1, 2).flatten(2)


def probability(dropout: nn.Module) -> float | None:
    """With which probability the layer drops a number now; None where it is not to be passed over."""
    if not untouched(dropout, nn.Dropout):
        return None
    return float(dropout.p) if dropout.training else 0.0


# --- queries, keys and values of two sequences --------------------------------------------------------------------------
class _BertLike(Swapped):
    """softmax(q k^T / sqrt(D) + mask) v with layers called query, key, value and dropout."""

    attention_head_size: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Module

    def _attend(self, x: Tensor, context: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
        q, k, v = (
            _heads(layer(tokens), self.attention_head_size)
            for layer, tokens in ((self.query, x), (self.key, context), (self.value, context))
        )
        return _put_together(sdpa(q, k, v, mask, dropout_p))


@replaces(f"{_MODELS}.lxmert.modeling_lxmert.LxmertAttention", runs=("mk.attention",), forward=("ebee13522e74370f",))
class SwappedLxmertAttention(_BertLike):
    """LXMERT's, of one sequence or across."""

    def forward(
        self, hidden_states: Tensor, context: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> Any:
        dropout_p = probability(self.dropout)
        if output_attentions or dropout_p is None:
            reason = WEIGHTS if output_attentions else DROPOUT
            return self.original(reason, hidden_states, context, attention_mask, output_attentions)
        return (self._attend(hidden_states, context, attention_mask, dropout_p),)


@replaces(
    f"{_MODELS}.flava.modeling_flava.FlavaSelfAttention",
    f"{_MODELS}.vilt.modeling_vilt.ViltSelfAttention",
    f"{_MODELS}.visual_bert.modeling_visual_bert.VisualBertSelfAttention",
    runs=("mk.attention",),
    forward=("6a22c8ab4a61ed88", "b360808441e33f86", "8998fb1a0a475356"),
)
class SwappedSelfAttention(_BertLike):
    """FLAVA's, ViLT's and VisualBERT's."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False) -> Any:
        dropout_p = probability(self.dropout)
        if output_attentions or dropout_p is None:
            reason = WEIGHTS if output_attentions else DROPOUT
            return self.original(reason, hidden_states, attention_mask, output_attentions)
        return (self._attend(hidden_states, hidden_states, attention_mask, dropout_p),)


@replaces(
    f"{_MODELS}.timesformer.modeling_timesformer.TimesformerSelfAttention",
    runs=("mk.attention",),
    forward=("782e086b17c3d399",),
)
class SwappedTimesformerSelfAttention(Swapped):
    """TimeSformer's, over frames or over patches."""

    num_heads: int
    scale: float
    qkv: nn.Module
    attn_drop: nn.Module

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        dropout_p = probability(self.attn_drop)
        if output_attentions or dropout_p is None:
            return self.original(WEIGHTS if output_attentions else DROPOUT, hidden_states, output_attentions)
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (_put_together(sdpa(q, k, v, None, dropout_p, scale=self.scale)),)


@replaces(f"{_MODELS}.cvt.modeling_cvt.CvtSelfAttention", runs=("mk.attention",), forward=("d3e5f1dcdbce53b1",))
class SwappedCvtSelfAttention(Swapped):
    """CvT's: projections by depthwise convolutions, and scores scaled by the channels of all heads."""

    scale: float
    with_cls_token: bool
    embed_dim: int
    num_heads: int
    convolution_projection_query: nn.Module
    convolution_projection_key: nn.Module
    convolution_projection_value: nn.Module
    projection_query: nn.Module
    projection_key: nn.Module
    projection_value: nn.Module
    dropout: nn.Module

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Any:
        dropout_p = probability(self.dropout)
        if dropout_p is None:
            return self.original(DROPOUT, hidden_state, height, width)
        cls_token, image = hidden_state[:, : -height * width], hidden_state[:, -height * width :]
        image = image.transpose(1, 2).unflatten(2, (height, width))
        # In the order of the original: in training, batch norms count.
        key = self.convolution_projection_key(image)
        query = self.convolution_projection_query(image)
        value = self.convolution_projection_value(image)
        if self.with_cls_token:
            query, key, value = (torch.cat((cls_token, tokens), 1) for tokens in (query, key, value))
        head_dim = self.embed_dim // self.num_heads
        q, k, v = (
            _heads(layer(tokens), head_dim)
            for layer, tokens in (
                (self.projection_query, query),
                (self.projection_key, key),
                (self.projection_value, value),
            )
        )
        return _put_together(sdpa(q, k, v, None, dropout_p, scale=self.scale))


# --- SpeechT5 -----------------------------------------------------------------------------------------------------------
@replaces(f"{_MODELS}.speecht5.modeling_speecht5.SpeechT5Attention", runs=("mk.attention",), forward=("2901c56ae95a8f48",))
class SwappedSpeechT5Attention(Swapped):
    """SpeechT5's, with a bias of the relative positions that is a product with the queries."""

    training: bool
    num_heads: int
    head_dim: int
    scaling: float
    dropout: float
    layer_idx: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        reason = None
        if output_attentions:
            reason = WEIGHTS
        elif "past_key_values" in kwargs:
            reason = "past_key_values, by which the cache was called"
        elif self._fits(hidden_states, key_value_states, cache, attention_mask) is False:
            reason = "a mask of another shape than the scores"
        if reason is not None:
            return self.original(
                reason,
                hidden_states,
                key_value_states,
                cache=cache,
                attention_mask=attention_mask,
                position_bias=position_bias,
                output_attentions=output_attentions,
                **kwargs,
            )
        query = _heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)
        key, value = self._keys_and_values(hidden_states, key_value_states, cache, kwargs)
        mask = attention_mask
        if position_bias is not None:
            # [Lq, B * H, D] [Lq, D, Lk]: each query with the vectors of its distances
            rows = query.flatten(0, 1).transpose(0, 1)
            bias = torch.matmul(rows, position_bias.transpose(-2, -1)).transpose(0, 1).unflatten(0, query.shape[:2])
            mask = bias if mask is None else bias + mask
        out = sdpa(query, key, value, mask, self.dropout if self.training else 0.0, scale=1.0)
        return self.out_proj(_put_together(out)), None

    def _fits(self, x: Tensor, context: Tensor | None, cache: Any, mask: Tensor | None) -> bool | None:
        """Whether the mask has the shape of one head's scores; None where that shows only after the cache was asked."""
        if mask is None:
            return True
        if mask.shape[:3] != (x.shape[0], 1, x.shape[1]):
            return False
        return None if cache is not None else mask.shape[3] == (x if context is None else context).shape[1]

    def _keys_and_values(
        self, x: Tensor, context: Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        crosses = context is not None
        of_both = hasattr(cache, "is_updated")  # a cache of self-attention and one of cross-attention
        current, updated = cache, False
        if of_both:
            updated = cache.is_updated.get(self.layer_idx)
            current = cache.cross_attention_cache if crosses else cache.self_attention_cache
        if crosses and updated:
            return current.layers[self.layer_idx].keys, current.layers[self.layer_idx].values
        tokens = x if context is None else context
        key, value = _heads(self.k_proj(tokens), self.head_dim), _heads(self.v_proj(tokens), self.head_dim)
        if cache is not None:
            key, value = current.update(key, value, self.layer_idx, kwargs=kwargs)
            if crosses and of_both:
                cache.is_updated[self.layer_idx] = True
        return key, value


# --- Mask2Former --------------------------------------------------------------------------------------------------------
@replaces(
    f"{_MODELS}.mask2former.modeling_mask2former.Mask2FormerAttention",
    f"{_MODELS}.oneformer.modeling_oneformer.OneFormerAttention",
    runs=("mk.attention",),
    forward=("5c1b2683fd7c861f",),
)
class SwappedMask2FormerAttention(Swapped):
    """The queries' attention to each other in Mask2Former and OneFormer: [L, B, C], with positions in queries and keys."""

    training: bool
    num_heads: int
    head_dim: int
    dropout: float
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        others = (attention_mask, key_value_states, key_value_position_embeddings)
        if output_attentions or position_embeddings is None or any(other is not None for other in others):
            return self.original(
                WEIGHTS if output_attentions else "a mask, keys of another sequence, or no positions",
                hidden_states,
                attention_mask,
                position_embeddings,
                key_value_states,
                key_value_position_embeddings,
                output_attentions,
            )
        tokens = hidden_states.transpose(0, 1)
        placed = tokens + position_embeddings.transpose(0, 1)
        q, k, v = (
            _heads(layer(x), self.head_dim)
            for layer, x in ((self.q_proj, placed), (self.k_proj, placed), (self.v_proj, tokens))
        )
        out = sdpa(q, k, v, None, self.dropout if self.training else 0.0, scale=self.scaling)
        return self.out_proj(_put_together(out)).transpose(0, 1), None


@replaces(
    f"{_MODELS}.mask2former.modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer",
    runs=("mk.attention", "mk.linear"),
    forward=("608c40bedd8de3f3",),
)
class SwappedMask2FormerDecoderLayer(Swapped):
    """Mask2Former's decoder layer, which asks its two attentions for weights even where nobody wants them."""

    training: bool
    pre_norm: bool
    dropout: float
    activation_dropout: float
    activation_fn: Any
    cross_attn: nn.Module
    self_attn: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    cross_attn_layer_norm: nn.Module
    self_attn_layer_norm: nn.Module
    final_layer_norm: nn.Module

    @staticmethod
    def refuses(module: Any) -> str | None:
        cls = type(module)
        if (digest_of(cls.forward_post), digest_of(cls.forward_pre)) != ("e10e97bcadcc8171", "61e9913bfab771a8"):
            return "its forward_post or forward_pre is not one that mmkernels knows"
        if activation_name(module.activation_fn) == UNKNOWN:
            return f"its activation is a {type(module.activation_fn).__name__}"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        level_index: int | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        query_position_embeddings: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        name = activation_name(self.activation_fn)
        if output_attentions or name == UNKNOWN:
            return self.original(
                WEIGHTS if output_attentions else "another activation",
                hidden_states,
                level_index,
                attention_mask,
                position_embeddings,
                query_position_embeddings,
                encoder_hidden_states,
                encoder_attention_mask,
                output_attentions,
            )
        memory, positions = encoder_hidden_states[level_index], position_embeddings[level_index]

        def cross(x: Tensor) -> Tensor:
            placed = x if query_position_embeddings is None else x + query_position_embeddings
            keys = memory if positions is None else memory + positions
            out: Tensor = self.cross_attn(
                query=placed,
                key=keys,
                value=memory,
                attn_mask=encoder_attention_mask,
                key_padding_mask=None,
                need_weights=False,
            )[0]
            return out

        def attend(x: Tensor) -> Tensor:
            out: Tensor = self.self_attn(
                hidden_states=x,
                position_embeddings=query_position_embeddings,
                attention_mask=None,
                output_attentions=False,
            )[0]
            return out

        def feed_forward(x: Tensor) -> Tensor:
            hidden = F.dropout(activated(self.fc1, x, name), self.activation_dropout, self.training)
            out: Tensor = self.fc2(hidden)
            return out

        x = hidden_states
        for layer, norm in (
            (cross, self.cross_attn_layer_norm),
            (attend, self.self_attn_layer_norm),
            (feed_forward, self.final_layer_norm),
        ):
            update = F.dropout(layer(norm(x) if self.pre_norm else x), self.dropout, self.training)
            x = x + update if self.pre_norm else norm(x + update)
        return (x,)


# --- one query that gathers a picture ------------------------------------------------------------------------------------
@replaces(
    f"{_MODELS}.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead",
    f"{_MODELS}.idefics2.modeling_idefics2.Idefics2MultiheadAttentionPoolingHead",
    runs=("mk.attention", "mk.linear", "mk.layer_norm"),
    forward=("ad52cdaa6e235d9d",),
)
class SwappedPoolingHead(Swapped):
    """SigLIP's pooling head, which asks its attention for weights that it does not use."""

    probe: Tensor
    attention: nn.Module
    layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_state: Tensor) -> Tensor:
        probe = self.probe.repeat(hidden_state.shape[0], 1, 1)
        pooled = self.attention(probe, hidden_state, hidden_state, need_weights=False)[0]
        out: Tensor = pooled + self.mlp(self.layernorm(pooled))
        return out[:, 0]


# --- Swin ---------------------------------------------------------------------------------------------------------------
@replaces(
    f"{_MODELS}.swin.modeling_swin.SwinLayer",
    runs=("mk.window_attention", "mk.linear", "mk.layer_norm"),
    forward=("09a902333571d7a0",),
)
class SwappedSwinLayer(Swapped):
    """Swin's layer: shift, windows, mask and bias in one op between the projections."""

    window_size: int
    shift_size: int
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    attention: Any
    mlp: nn.Module
    dropout: nn.Module
    drop_path: nn.Module
    set_shift_and_window_size: Any

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> Any:
        reason = self._reason(hidden_states, kwargs)
        if reason is not None:
            return self.original(reason, hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        attention = self.attention
        bias = attention.relative_position_bias
        if (self.window_size, self.window_size) != tuple(bias.window_size):
            return self.original(
                "a grid smaller than the window", hidden_states, input_dimensions, always_partition, **kwargs
            )
        grid = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = torch.cat([layer(grid) for layer in projections], -1)
        # The grid is padded before the projection: a pad's queries, keys and values are the biases.
        pad = None if attention.q_proj.bias is None else torch.cat([layer.bias for layer in projections])
        shift = max(int(self.shift_size), 0)
        out = window_attention(
            qkv,
            bias.relative_position_bias_table,
            window=(self.window_size, self.window_size),
            shift=(shift, shift),
            num_heads=attention.num_attention_heads,
            scale=attention.scaling,
            pad_value=pad,
            pad_order="pad_roll",
        )
        tokens = self.dropout(attention.o_proj(out)).flatten(1, 2)
        x = hidden_states + self.drop_path(tokens)
        return self.dropout(self.mlp(self.layernorm_after(x))) + x, None

    def _reason(self, x: Tensor, kwargs: dict[str, Any]) -> str | None:
        attention = self.attention
        reason = apart(attention, collector_of(type(attention)), kwargs)
        if reason is not None:
            return reason
        if attention.training and attention.attention_dropout > 0:
            return "dropout of attention weights in windows"
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            return "projections that are other modules"
        table = attention.relative_position_bias.relative_position_bias_table
        return None if op_takes(x, table, *(layer.weight for layer in layers)) else "tensors of another class"
