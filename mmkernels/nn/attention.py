"""Attention with its projections: torch's MultiheadAttention, and attention from one sequence to another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.linear import Linear, run
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.norm import LayerNorm
from mmkernels.nn.packed import Packing, WeightPack
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.attention import attention
from mmkernels.ops.linear import linear


class MultiheadAttention(Packing, KernelSwitch, nn.MultiheadAttention):
    """nn.MultiheadAttention through :func:`mmkernels.linear` and :func:`mmkernels.attention`.

    Constructor, parameters, state_dict keys and the arguments of forward are those of nn.MultiheadAttention, so either loads
    the other's weights, and masks mean what they mean there: True is a key to ignore, floats are added to the scores.

    The kernels run where ``need_weights=False``; as in torch, the default is True, and weights can only be returned by
    torch's own forward, which makes a tensor of them. nn.TransformerEncoderLayer and nn.TransformerDecoderLayer ask for
    none; but the former, in eval mode with batch_first and without gradients, reads the weights of its layers and calls none
    of them. ``torch.backends.mha.set_fastpath_enabled(False)`` makes it call them.

    Self-attention (query, key and value the same tensor) is one product with in_proj_weight, and attention reads its output
    in place; key and value the same tensor are one product too. In eval mode on the CPU in_proj_weight is kept packed beside
    itself, for self-attention, and so is out_proj (:mod:`mmkernels.nn.packed` has the rules); other projections use the
    weights as they are.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            nn.MultiheadAttention; float32, bfloat16, float16 or float64.
        kernels: True runs the ops, False torch's own forward, as nested tensors, tensors of other classes (DTensor) and
            dropout of every weight always do. May be set at any time.

    Source: "Attention Is All You Need" (2017).
    """

    out_proj: Any
    _packed_parameters = ("in_proj_weight", "in_proj_bias")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernels: bool = True,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._pack = WeightPack()
        # In the place of torch's layer, with the parameters that it has drawn.
        drawn = self.out_proj
        self.out_proj = Linear(embed_dim, embed_dim, bias, "meta", dtype)
        self.out_proj.weight, self.out_proj.bias = drawn.weight, drawn.bias
        self.kernels = kernels

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
        """Attention of query to key and value -> (output of query's shape, weights or None).

        Args:
            query: [L, N, embed_dim], with batch_first [N, L, embed_dim], or of one sequence alone [L, embed_dim].
            key: [S, N, kdim], with batch_first [N, S, kdim], or [S, kdim].
            value: [S, N, vdim], with batch_first [N, S, vdim], or [S, vdim].
            key_padding_mask: None, or [N, S] (of one sequence [S]): bool, True = no query sees the key; or floats, added to
                the scores.
            need_weights: True returns the weights, and runs torch's own forward.
            attn_mask: None, or [L, S] or [N * num_heads, L, S] (of one sequence [num_heads, L, S]): bool, True = the query
                does not see the key; or floats, added to the scores and differentiable. Floats are in the dtype of query or
                float32; others are cast.
            average_attn_weights: of the weights, one average over the heads.
            is_causal: says that attn_mask, which must be given, is the causal mask; without key_padding_mask it is then
                not looked at.

        Returns:
            (output, weights): output in query's shape; weights None without need_weights. A query that sees no key has an
            output of out_proj.bias.

        Raises:
            TypeError: with kernels, a mask that is neither bool nor floating, or as :func:`mmkernels.linear`.
            ValueError: with kernels, shapes that do not fit, or is_causal without attn_mask.
        """
        if need_weights or not self._runs_kernels(query, key, value, key_padding_mask, attn_mask):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        q, k, v = (x if batched else x[None] for x in self._projected(query, key, value))
        # [N, L, H, D] or [L, N, H, D] -> views [N, H, L, D]
        q, k, v = (x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3) for x in (q, k, v))
        k, v, extra = self._with_extra_keys(k, v)
        if is_causal and key_padding_mask is None:
            bias, mask = None, None
        else:
            is_causal = False
            if key_padding_mask is not None and not batched:
                key_padding_mask = key_padding_mask[None]
            bias, mask = self._bias_and_mask(key_padding_mask, attn_mask, extra, q.dtype)
        dropout_p = self.dropout if self.training else 0.0
        out = attention(q, k, v, bias=bias, mask=mask, is_causal=is_causal, dropout_p=dropout_p)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
        out = self._out(out)
        return out if batched else out[0], None

    def _runs_kernels(self, *inputs: Tensor | None) -> bool:
        if not self.kernels or (self.training and self.dropout >= 1):
            return False
        if any(tensor is not None and tensor.is_nested for tensor in inputs):
            return False
        parameters = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight, self.in_proj_bias)
        return op_takes(*inputs, *parameters, self.bias_k, self.bias_v, self.out_proj.weight, self.out_proj.bias)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if query.dim() not in (2, 3):
            raise ValueError(f"query: expected 3 dimensions, or the 2 of one sequence; got shape {tuple(query.shape)}")
        batched = query.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        for x, name, channels in ((query, "query", self.embed_dim), (key, "key", self.kdim), (value, "value", self.vdim)):
            if x.dim() != query.dim():
                raise ValueError(f"{name}: expected {query.dim()} dimensions, as query has, got shape {tuple(x.shape)}")
            if x.size(-1) != channels:
                raise ValueError(f"{name}: expected {channels} channels, got shape {tuple(x.shape)}")
        if batched and key.size(batch_dim) != query.size(batch_dim):
            raise ValueError(f"key: expected the batch of query, {query.size(batch_dim)}, got {key.size(batch_dim)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: expected key's shape but for the channels, {tuple(key.shape)}, got {tuple(value.shape)}"
            )
        batch = query.size(batch_dim) if batched else 1
        len_q, len_k = (x.size(1 - batch_dim) if batched else x.size(0) for x in (query, key))
        for mask, name in ((key_padding_mask, "key_padding_mask"), (attn_mask, "attn_mask")):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name}: expected bool or floats, got {mask.dtype}")
        if key_padding_mask is not None:
            shape = (batch, len_k) if batched else (len_k,)
            if tuple(key_padding_mask.shape) != shape:
                raise ValueError(f"key_padding_mask: expected shape {shape}, got {tuple(key_padding_mask.shape)}")
        if attn_mask is not None:
            full = (batch * self.num_heads, len_q, len_k)
            if attn_mask.dim() not in (2, 3) or tuple(attn_mask.shape) != full[3 - attn_mask.dim() :]:
                raise ValueError(f"attn_mask: expected shape {full[1:]} or {full}, got {tuple(attn_mask.shape)}")
        elif is_causal:
            raise ValueError("attn_mask: expected the mask that is_causal says is causal, got None")

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each [..., H, D]; views of one product where they share it."""
        bias, heads = self.in_proj_bias, (self.num_heads, self.head_dim)
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight
            if query is key and key is value:
                packed = None if self.training else self._pack.of(weight, bias)
                x = laid_out(query)
                qkv = linear(x, weight, bias) if packed is None else linear(x, packed)
                return qkv.unflatten(-1, (3, *heads)).unbind(-3)
            if key is value:
                sizes = (self.embed_dim, 2 * self.embed_dim)
                w_q, w_kv = weight.split(sizes)
                b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
                kv = linear(laid_out(key), w_kv, b_kv).unflatten(-1, (2, *heads))
                return linear(laid_out(query), w_q, b_q).unflatten(-1, heads), *kv.unbind(-3)
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        operands = zip((query, key, value), weights, biases, strict=True)
        return tuple(linear(laid_out(x), w, b).unflatten(-1, heads) for x, w, b in operands)

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with bias_k and bias_v, then a key and value of zeros, behind them; and how many that were."""
        shape = (k.size(0), self.num_heads, 1, self.head_dim)
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            for parts, extra in ((keys, self.bias_k), (values, self.bias_v)):
                parts.append(extra.to(k.dtype).view(1, *shape[1:]).expand(shape))
        if self.add_zero_attn:
            zeros = k.new_zeros(shape)
            keys.append(zeros)
            values.append(zeros)
        if len(keys) == 1:
            return k, v, 0
        return torch.cat(keys, 2), torch.cat(values, 2), len(keys) - 1

    def _bias_and_mask(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, extra: int, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """What :func:`attention` takes of torch's masks; every query sees the extra keys."""
        given = []
        if attn_mask is not None:
            given.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            given.append(key_padding_mask[:, None, None])
        if extra > 0:
            given = [F.pad(mask, (0, extra)) for mask in given]
        bias = mask = None
        for each in given:
            if each.dtype == torch.bool:
                mask = each if mask is None else mask | each
            else:
                each = each if each.dtype in (dtype, torch.float32) and dtype != torch.float64 else each.to(dtype)
                bias = each if bias is None else bias + each
        return bias, None if mask is None else ~mask

    def _out(self, x: Tensor) -> Tensor:
        """The product with out_proj's weight; as in torch, the layer itself is not called."""
        layer = self.out_proj
        return run(layer, x, None) if isinstance(layer, Linear) else linear(x, layer.weight, layer.bias)


class CrossAttention(KernelSwitch):
    """proj(attention(q(x), k(context), v(context))): tokens of one sequence attend to those of another one.

    Parameters are those of the four layers q, k, v and proj, each a :class:`Linear`, packed in eval mode; with qk_norm also
    q_norm and k_norm, as timm names them. (CrossViT's published code calls the first three wq, wk and wv.)

    Args:
        dim: channels of x and of the output.
        num_heads: H.
        kv_dim: channels of the context; dim where None.
        head_dim: D, channels of a head; dim / num_heads where None.
        num_kv_heads: heads of k and v, each of which serves H / num_kv_heads neighbouring heads of q; H where None.
        qkv_bias: whether q, k and v have a bias. proj_bias: whether proj has one.
        qk_norm: True normalises each head of q and of k by a :class:`LayerNorm` over its channels.
        dropout: probability, in training, with which a weight of the softmax is dropped.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch, as attention of tensors of other classes (DTensor) always does. May be
            set at any time.

    Raises:
        ValueError: num_heads does not divide dim (without head_dim), num_kv_heads does not divide num_heads, or dropout or
            packed_dtype is out of range.

    Source: "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification" (2021), where x is the one
    class token of the other branch; grouped heads from "GQA: Training Generalized Multi-Query Transformer Models from
    Multi-Head Checkpoints" (2023).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        if num_heads < 1 or (head_dim is None and dim % num_heads != 0):
            raise ValueError(f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads, {num_heads}, got {num_kv_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        super().__init__()
        kv_dim = dim if kv_dim is None else kv_dim
        self.dim, self.kv_dim = dim, kv_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.dropout = dropout
        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q = Linear(dim, inner, qkv_bias, device, dtype, packed_dtype=packed_dtype)
        self.k = Linear(kv_dim, kv_inner, qkv_bias, device, dtype, packed_dtype=packed_dtype)
        self.v = Linear(kv_dim, kv_inner, qkv_bias, device, dtype, packed_dtype=packed_dtype)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm:
            self.q_norm = LayerNorm(self.head_dim, device=device, dtype=dtype)
            self.k_norm = LayerNorm(self.head_dim, device=device, dtype=dtype)
        self.proj = Linear(inner, dim, proj_bias, device, dtype, packed_dtype=packed_dtype)
        self.kernels = kernels

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x [B, Lq, dim], context [B, Lk, kv_dim] -> [B, Lq, dim].

        Args:
            x: the queries' tokens, in the dtype of the weights (beside int8, any of at most 32 bits).
            context: the keys' and values'; None is x itself.
            mask: bool, broadcastable to [B, H, Lq, Lk]; True = sees. A query that sees nothing has an output of proj.bias.
            bias: broadcastable to [B, H, Lq, Lk], added to the scores; in the dtype of the queries or float32.

        Raises:
            TypeError, ValueError: shapes that do not fit; with kernels, as :func:`mmkernels.linear` and
                :func:`mmkernels.attention`.
        """
        context = x if context is None else context
        for tokens, name, channels in ((x, "x", self.dim), (context, "context", self.kv_dim)):
            if tokens.dim() != 3 or tokens.size(-1) != channels:
                raise ValueError(f"{name}: expected [B, L, {channels}], got shape {tuple(tokens.shape)}")
        q = self.q_norm(self.q(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.k_norm(self.k(context).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = self.v(context).unflatten(-1, (self.num_kv_heads, self.head_dim))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropout_p = self.dropout if self.training else 0.0
        return self.proj(attend(q, k, v, self.kernels, mask=mask, bias=bias, dropout_p=dropout_p))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kv_dim={self.kv_dim}, head_dim={self.head_dim}, "
            f"num_kv_heads={self.num_kv_heads}, dropout={self.dropout}, {super().extra_repr()}"
        )


# --- what modules with projections of their own share -----------------------------------------------------------------
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernels: bool,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """:func:`mmkernels.attention`, or torch's; q [B, H, Lq, D] -> [B, Lq, H * D], the heads side by side. `segment_ids` are
    those of queries and of keys."""
    if kernels and op_takes(q, k, v, mask, bias, segment_ids):
        segments: dict[str, Any] = {"segment_ids_q": segment_ids, "segment_ids_k": segment_ids}
        out = attention(q, k, v, mask=mask, bias=bias, is_causal=is_causal, dropout_p=dropout_p, **segments)
    else:
        if segment_ids is not None:
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            mask = same if mask is None else mask & same
        if is_causal:
            seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
            mask = seen if mask is None else mask & seen
        out = plain_attention(q, k, v, mask, bias, dropout_p)
    return out.transpose(1, 2).flatten(2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_p: float) -> Tensor:
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    grouped = k.size(1) != q.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=grouped)
