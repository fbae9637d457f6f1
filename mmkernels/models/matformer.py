"""MatFormer: a decoder whose feed-forward layers hold smaller ones, so that one training gives models of many sizes.

Source: "MatFormer: Nested Transformer for Elastic Inference" (NeurIPS 2024; 2023). Sub-network i uses the first m_i hidden
units of every feed-forward layer, 1/8, 1/4, 1/2 and all of them; with 4 C units those are the paper's ratios 0.5, 1, 2, 4.
Training draws one granularity a batch for all layers. Inference may choose one for each layer (Mix'n'Match; the paper's
advice: wider with depth, without jumps). Attention, norms and embeddings are shared at their full size. Headline: a decoder
of 2.6B parameters holds models from 1.5B on. The sizes here are its smaller series, 78M to 850M: 16 layers, 16 heads, 4 C
hidden units and a tied vocabulary of 256000, which give these counts.

Where paper and code differ:

- The paper's feed-forward layer is the plain one (`gated=False`), which its sizes are counted with. The code is a LLaMA,
  whose layer is gated: the class's default.
- The code applies the activation to the product of gate and value: `activation_on_product`. LLaMA's own, activation(gate) *
  value, is the default.
- The code sets one granularity for all layers and forgets it after each forward pass. Here it is an argument.

Names of modules are those of transformers' LLaMA, but for the feed-forward layers; :meth:`MatFormer.load_pretrained` takes
its checkpoints, and any LLaMA becomes a MatFormer to train on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from mmkernels.models.base import Model, Rule, angles_of, check_ids
from mmkernels.nn import Linear, NestedMlp, RMSNorm, RotaryAttention
from mmkernels.nn.rotary_attention import Angles
from mmkernels.ops.checks import check_int

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)

_RULES = (
    Rule(r"model\.(.*)", r"\1"),
    Rule(r"(.*\.|)gate_proj\.weight", r"\1w_gate"),
    Rule(r"(.*\.|)up_proj\.weight", r"\1w_in"),
    Rule(r"(.*\.|)down_proj\.weight", r"\1w_out"),
)


class MatFormerBlock(Model):
    """x + self_attn(input_layernorm(x)), then x + mlp(post_attention_layernorm(x)): [B, L, C] -> [B, L, C].

    Args:
        dim: C. num_heads: H. hidden: units of the widest feed-forward layer.
        fractions, num_kv_heads, gated, activation, activation_on_product, eps, kernels, seed: as in :class:`MatFormer`.
    """

    published: ClassVar[Sequence[Rule]] = _RULES

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        fractions: Sequence[float] = FRACTIONS,
        num_kv_heads: int | None = None,
        gated: bool = True,
        activation: str | None = "silu",
        activation_on_product: bool = False,
        eps: float = 1e-6,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        widths = [int(hidden * fraction) for fraction in fractions]
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = RotaryAttention(dim, num_heads, num_kv_heads=num_kv_heads)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp = NestedMlp(
            dim, hidden, widths, gated=gated, activation=activation, activation_on_product=activation_on_product
        )
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self, x: Tensor, angles: Angles | None = None, width: int | None = None, *, segment_ids: Tensor | None = None
    ) -> Tensor:
        """x [B, L, C]; angles and segment_ids as in RotaryAttention.forward; width as in NestedMlp.forward."""
        x = self.self_attn(self.input_layernorm(x), angles, x, segment_ids=segment_ids)
        return self.mlp(self.post_attention_layernorm(x), width, x)


class MatFormer(Model):
    """A causal decoder of nested widths: ids [B, L] -> logits [B, L, vocab_size].

    Args:
        dim: C. num_heads: H. depth: layers. hidden: units of the widest feed-forward layer; 4 C where None.
        fractions: of these units that the granularities 0, 1, ... use.
        num_kv_heads: heads of keys and values; H where None.
        vocab_size: of the tokenizer. tied: the last product's weight is that of the embedding.
        gated, activation, activation_on_product: of the feed-forward layers, as in :class:`mmkernels.nn.NestedMlp`.
        rope_base: of the rotary embedding. eps: of the norms.
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
        hidden: int | None = None,
        fractions: Sequence[float] = FRACTIONS,
        num_kv_heads: int | None = None,
        vocab_size: int = 32000,
        tied: bool = False,
        gated: bool = True,
        activation: str | None = "silu",
        activation_on_product: bool = False,
        rope_base: float = 10000.0,
        eps: float = 1e-6,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocab_size, self.rope_base, self.tied = vocab_size, rope_base, tied
        hidden = 4 * dim if hidden is None else hidden
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            MatFormerBlock(
                dim,
                num_heads,
                hidden,
                fractions=fractions,
                num_kv_heads=num_kv_heads,
                gated=gated,
                activation=activation,
                activation_on_product=activation_on_product,
                eps=eps,
            )
            for _ in range(depth)
        )
        self.norm = RMSNorm(dim, eps)
        self.lm_head = Linear(dim, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.head_dim, self.granularities = dim // num_heads, len(fractions)
        self.finish(kernels=kernels, seed=seed)

    def widths(self, granularity: int | Sequence[int] | None = None) -> list[int]:
        """Hidden units of each layer.

        Args:
            granularity: None: the widest; 0 to granularities - 1, of all layers or one for each (Mix'n'Match).

        Raises:
            TypeError, ValueError: granularity does not fit.
        """
        depth = len(self.layers)
        if granularity is None:
            granularity = self.granularities - 1
        of_layers = [granularity] * depth if isinstance(granularity, int) else list(granularity)
        if len(of_layers) != depth:
            raise ValueError(f"granularity: expected one number or one for each of the {depth} layers, got {len(of_layers)}")
        for number in of_layers:
            check_int(number, "granularity", 0)
            if number >= self.granularities:
                raise ValueError(f"granularity: expected 0 to {self.granularities - 1}, got {number}")
        return [layer.mlp.widths[number] for layer, number in zip(self.layers, of_layers, strict=True)]

    def num_parameters(self, granularity: int | Sequence[int] | None = None) -> int:
        """How many the sub-network of that granularity has."""
        whole = sum(parameter.numel() for parameter in self.parameters())
        unused = 0
        for layer, width in zip(self.layers, self.widths(granularity), strict=True):
            matrices = 2 if layer.mlp.w_gate is None else 3
            unused += matrices * layer.mlp.dim * (layer.mlp.hidden - width)
        return whole - unused

    def forward(
        self,
        ids: Tensor,
        granularity: int | Sequence[int] | None = None,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next tokens.

        Args:
            ids: int64.
            granularity: as in :meth:`widths`.
            positions: [L] or [B, L], of the rotary embedding; None: 0 to L - 1.
            segment_ids: [B, L] integers; tokens see those of their own segment.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        check_ids(ids, "ids", self.vocab_size)
        widths = self.widths(granularity)
        x = self.embed_tokens(ids)
        angles = angles_of(x, positions, self.head_dim, self.rope_base)
        for layer, width in zip(self.layers, widths, strict=True):
            x = layer(x, angles, width, segment_ids=segment_ids)
        return self.lm_head(self.norm(x))


_PAPER: dict[str, Any] = {"depth": 16, "vocab_size": 256000, "tied": True, "gated": False, "activation": "gelu"}

MODELS: dict[str, Callable[..., nn.Module]] = {
    f"matformer_{size}": partial(MatFormer, dim, 16, **_PAPER)
    for size, dim in {"78m": 256, "180m": 512, "310m": 768, "463m": 1024, "850m": 1536}.items()
}
MODELS["matformer_block"] = partial(MatFormerBlock, 1536, 16, 6144)
