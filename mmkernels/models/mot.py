"""Mixture-of-Transformers: a decoder whose matrices and norms are each modality's own, and whose attention is of all tokens.

Source: "Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation Models" (TMLR 2025).
Headline: the 7B model of the Chameleon setting (text and image tokens of one vocabulary of 65536; C = 4096, 32 layers, 32
heads, 11008 hidden channels), which reaches the dense model's quality with 55.8 % of its FLOPs. A size is named by the
parameters of the dense model: these have M times as many in the layers, and each token uses as many as the dense one has.

The published code is two modules, attention and feed-forward, whose names `load_pretrained` takes; it does not run as it is
(its merge of modalities has the rows of the first one only). Where it and the text differ:

- Its README says LayerNorm; its code has RMS norms. Here they are RMS norms.
- Each branch is normalised behind its last product, with no norm before it, in the code as in the paper's algorithm.
- The code has no rotary embedding; queries and keys are turned here where angles are given, after their norm.

Tokens of modality -1 (padding) have outputs of their residual alone; give them a segment of their own, so that nobody sees
them. The embedding of tokens and the last product are shared by the modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from mmkernels.models.base import Model, Rule, angles_of, check_ids, check_tokens
from mmkernels.nn import Linear, ModalityLinear, ModalityMlp, ModalityRMSNorm
from mmkernels.nn.modality import check_modality_ids
from mmkernels.nn.rotary_attention import Angles, turned_attention
from mmkernels.ops.checks import check_int


def hidden_channels(dim: int, multiple_of: int = 256) -> int:
    """LLaMA's: two thirds of 4 C, rounded up."""
    hidden = int(2 * (4 * dim) / 3)
    return multiple_of * -(-hidden // multiple_of)


_ATTENTION = (
    Rule(r"(.*\.|)local_experts_w([qkvo])\.(?P<index>\d+)\.weight", r"\1w\2.weight"),
    Rule(r"(.*\.|)local_experts_([qk])_normalization\.(?P<index>\d+)\.weight", r"\1\2_norm.weight"),
    Rule(r"(.*\.|)local_experts_attention_norm\.(?P<index>\d+)\.weight", r"\1norm.weight"),
)
_RULES = (
    *_ATTENTION,
    Rule(r"(.*\.|)local_experts\.(?P<index>\d+)\.w1\.weight", r"\1w_gate"),
    Rule(r"(.*\.|)local_experts\.(?P<index>\d+)\.w2\.weight", r"\1w_out"),
    Rule(r"(.*\.|)local_experts\.(?P<index>\d+)\.w3\.weight", r"\1w_in"),
    Rule(r"(.*\.|)local_experts_ffn_norm\.(?P<index>\d+)\.weight", r"\1out_norm_weight"),
)


class MoTAttention(Model):
    """One attention over tokens of all modalities, projections and norms of each one's own: [B, N, C] -> [B, N, C].

    Args:
        dim: C. num_heads: H. num_modalities: M. head_dim: D; C / H where None.
        qk_norm: RMS norms of queries and keys, whose gain the heads share.
        eps: of all norms, that of the output too.
        kernels, seed: as in :class:`MoT`.
    """

    published: ClassVar[Sequence[Rule]] = _ATTENTION

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_modalities: int,
        *,
        head_dim: int | None = None,
        qk_norm: bool = True,
        eps: float = 1e-5,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        check_int(num_heads, "num_heads", 1)
        if head_dim is None and dim % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        super().__init__()
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        inner = num_heads * self.head_dim
        self.wq = ModalityLinear(dim, inner, num_modalities, bias=False)
        self.wk = ModalityLinear(dim, inner, num_modalities, bias=False)
        self.wv = ModalityLinear(dim, inner, num_modalities, bias=False)
        self.wo = ModalityLinear(inner, dim, num_modalities, bias=False)
        self.q_norm = ModalityRMSNorm(self.head_dim, num_modalities, eps=eps) if qk_norm else None
        self.k_norm = ModalityRMSNorm(self.head_dim, num_modalities, eps=eps) if qk_norm else None
        self.norm = ModalityRMSNorm(dim, num_modalities, eps=eps)
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self,
        x: Tensor,
        modality_ids: Tensor,
        angles: Angles | None = None,
        *,
        is_causal: bool = True,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`MoTBlock.forward`."""

        def heads(project: ModalityLinear, norm: ModalityRMSNorm | None) -> Tensor:
            projected = project(x, modality_ids).unflatten(-1, (-1, self.head_dim))
            return (projected if norm is None else norm(projected, modality_ids)).transpose(1, 2)

        q, k, v = heads(self.wq, self.q_norm), heads(self.wk, self.k_norm), heads(self.wv, None)
        out = turned_attention(
            q, k, v, angles, is_causal=is_causal, mask=mask, segment_ids=segment_ids, kernels=self.kernels
        )
        return self.norm(self.wo(out, modality_ids), modality_ids)


class MoTBlock(Model):
    """x + attention(x), then x + feed_forward(x), both normalised at their end.

    Args:
        dim: C. num_heads: H. hidden: of a modality's feed-forward layer. num_modalities: M. head_dim, qk_norm, eps: as in
            :class:`MoTAttention`.
        kernels, seed: as in :class:`MoT`.
    """

    published: ClassVar[Sequence[Rule]] = _RULES

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        num_modalities: int,
        *,
        head_dim: int | None = None,
        qk_norm: bool = True,
        eps: float = 1e-5,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.attention = MoTAttention(dim, num_heads, num_modalities, head_dim=head_dim, qk_norm=qk_norm, eps=eps)
        self.feed_forward = ModalityMlp(
            dim, hidden, num_modalities, gated=True, activation="silu", bias=False, out_norm=True, norm_eps=eps
        )
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self,
        x: Tensor,
        modality_ids: Tensor,
        angles: Angles | None = None,
        *,
        is_causal: bool = True,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, C] -> [B, N, C].

        Args:
            modality_ids: [B, N] int64, 0 to M - 1, or -1 for tokens of none. A modality may be missing.
            angles: of :func:`mmkernels.nn.rotary_angles`, or None.
            is_causal, mask, segment_ids: as in :meth:`mmkernels.nn.RotaryAttention.forward`.

        Raises:
            TypeError, ValueError: modality_ids does not fit; with kernels, as the ops.
        """
        x = x + self.attention(x, modality_ids, angles, is_causal=is_causal, mask=mask, segment_ids=segment_ids)
        return x + self.feed_forward(x, modality_ids)


class MoT(Model):
    """A causal decoder of interleaved modalities -> logits [B, N, vocab_size].

    Args:
        dim: C. num_heads: H. depth: layers. num_modalities: M. hidden: of each modality's feed-forward layer; LLaMA's where
            None. vocab_size: of all modalities together.
        qk_norm, eps: as in :class:`MoTAttention`.
        rope_base: of the rotary embedding; None: none, as in the published modules.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: see the head of this file.
    """

    published: ClassVar[Sequence[Rule]] = _RULES

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        depth: int,
        num_modalities: int = 2,
        hidden: int | None = None,
        vocab_size: int = 65536,
        qk_norm: bool = True,
        eps: float = 1e-5,
        rope_base: float | None = 10000.0,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.num_modalities, self.vocab_size, self.rope_base = dim, num_modalities, vocab_size, rope_base
        hidden = hidden_channels(dim) if hidden is None else hidden
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            MoTBlock(dim, num_heads, hidden, num_modalities, qk_norm=qk_norm, eps=eps) for _ in range(depth)
        )
        self.norm = ModalityRMSNorm(dim, num_modalities, eps=eps)
        self.lm_head = Linear(dim, vocab_size, bias=False)
        self.head_dim = dim // num_heads
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self,
        tokens: Tensor,
        modality_ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next tokens.

        Args:
            tokens: ids [B, N] int64, or embeddings [B, N, C], as of images that are not made of ids.
            modality_ids: [B, N] int64, 0 to M - 1; -1 for padding.
            positions: [N] or [B, N], of the rotary embedding; None: 0 to N - 1.
            mask: bool, broadcastable to [B, H, N, N], True = sees, of what causality shows.
            segment_ids: [B, N] integers; tokens see those of their own segment.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            check_tokens(tokens, "tokens", self.dim)
            x = tokens
        else:
            check_ids(tokens, "tokens", self.vocab_size)
            x = self.embed_tokens(tokens)
        check_modality_ids(modality_ids, tuple(x.shape[:2]), self.num_modalities)
        angles = None
        if self.rope_base is not None:
            angles = angles_of(x, positions, self.head_dim, self.rope_base)
        for layer in self.layers:
            x = layer(x, modality_ids, angles, mask=mask, segment_ids=segment_ids)
        return self.lm_head(self.norm(x, modality_ids))


# Layers, channels and heads of the dense models that the sizes are named by.
_SIZES: dict[str, tuple[int, int, int]] = {
    "37m": (4, 256, 8),
    "94m": (8, 512, 8),
    "443m": (24, 1024, 16),
    "1_5b": (24, 2048, 16),
    "7b": (32, 4096, 32),
}

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"mot_{size}": partial(MoT, dim, heads, depth=depth) for size, (depth, dim, heads) in _SIZES.items()},
    "mot_block": partial(MoTBlock, 1024, 16, hidden_channels(1024), 2),
}
