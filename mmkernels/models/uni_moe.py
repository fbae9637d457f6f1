"""Uni-MoE: a LLaMA for text, images, sound and speech whose every second layer is a mixture of experts.

Source: "Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts" (TPAMI 2025; 2024). Headline: Vicuna 7B (C =
4096, 32 layers, 32 heads, 11008 hidden channels), 4 experts in the layers 0, 2, 4, ..., 2 of them a token; with 8 experts
and low-rank additions of rank 8 and alpha 16. An expert is a whole LLaMA layer (SwiGLU), begun as one trained for a
modality. The tokens of encoders and their projections come in as embeddings.

Where paper and code differ:

- The paper has one way to route. The code has two: with 4 experts the softmax over a token's 2 logits, without any loss;
  with 8 GShard's, softmax over all and the two made to sum to 1, which is the same, with a load balance loss of the first
  choices: ``routing.losses.load_balance_first``. Logits are float32 here; the code for 4 experts has them in the dtype of
  the tokens.
- With 8 experts the code that trains, DeepSpeed's, draws the second expert by Gumbel noise, and goes on to in evaluation:
  `published_sampling`. The code that loads what was trained does not, as here without it: the second expert is the second
  best.
- The low-rank additions of attention are PEFT's, of any linear layer, and not here; those of the experts are `lora_rank`.
  DeepSpeed's code has them in the dense layers too: those are to be merged into the weights before they are loaded.
- Not here: the convolution of each modality before the router, which one of the code's layers has (`MOEFmLayer`), and the
  experts of Uni-MoE 2 (a number that each token chooses, null experts, shared ones).

Names of modules are those of transformers' LLaMA; experts and routers are stacked. :meth:`UniMoE.load_pretrained` takes the
published ones, DeepSpeed's too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models.base import Model, Rule, angles_of, check_ids, check_segment_ids, check_tokens
from mmkernels.nn import GluMlp, Linear, MoE, RMSNorm, RotaryAttention
from mmkernels.nn.rotary_attention import Angles
from mmkernels.reference.routing import Routing

_EXPERTS = {"gate": "gate", "up": "in", "down": "out"}
_DENSE = {"gate": "fc1_g", "up": "fc1_x", "down": "fc2"}

_RULES = (
    Rule(r"model\.(.*)", r"\1"),
    Rule(r"(.*mlp)\.deepspeed_moe\.gate\.wg\.(.*)", r"\1.gate.\2"),
    Rule(r"(.*mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(.*)", r"\1.experts.\2"),
    Rule(r"(.*mlp)\.gate\.weight", r"\1.router", lambda weight: weight[None]),
    *(
        rule
        for theirs, ours in _EXPERTS.items()
        for rule in (
            Rule(rf"(.*)\.experts\.(?P<index>\d+)\.{theirs}_proj\.weight", rf"\1.w_{ours}"),
            Rule(rf"(.*)\.experts\.(?P<index>\d+)\.{theirs}_proj_lora_A\.weight", rf"\1.lora_down_{ours}"),
            Rule(rf"(.*)\.experts\.(?P<index>\d+)\.{theirs}_proj_lora_B\.weight", rf"\1.lora_up_{ours}"),
        )
    ),
    *(Rule(rf"(.*mlp)\.{theirs}_proj\.weight", rf"\1.{ours}.weight") for theirs, ours in _DENSE.items()),
)


class UniMoEOutput(NamedTuple):
    """What the model gives."""

    logits: Tensor
    """[B, L, vocab_size]"""
    routings: tuple[Routing, ...]
    """of the layers with experts, whose losses are computed when they are asked for"""


class UniMoEBlock(Model):
    """x + self_attn(input_layernorm(x)), then x + mlp(post_attention_layernorm(x)), the latter of experts or dense.

    Args:
        dim: C. num_heads: H. hidden: channels of the dense layer, or of each expert.
        num_experts: E; 0 makes the block dense.
        top_k, num_kv_heads, lora_rank, lora_alpha, published_sampling, eps, kernels, seed: as in :class:`UniMoE`.
    """

    published: ClassVar[Sequence[Rule]] = _RULES

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        num_kv_heads: int | None = None,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        published_sampling: bool = False,
        eps: float = 1e-6,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        if published_sampling and (top_k != 2 or num_experts == 1):
            raise ValueError(f"published_sampling: expected False with top_k {top_k} of {num_experts} experts")
        super().__init__()
        self.published_sampling = published_sampling
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = RotaryAttention(dim, num_heads, num_kv_heads=num_kv_heads)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp: MoE | GluMlp
        if num_experts == 0:
            self.mlp = GluMlp(dim, hidden, bias=False)
        else:
            self.mlp = MoE(
                dim, hidden, num_experts, top_k, gated=True, activation="silu", lora_rank=lora_rank, lora_alpha=lora_alpha
            )
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self,
        x: Tensor,
        angles: Angles | None = None,
        *,
        segment_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x [B, L, C] -> (the same shape, the routing or None of a dense block).

        Args:
            angles, segment_ids: as in :meth:`mmkernels.nn.RotaryAttention.forward`.
            generator: of the second experts, with published_sampling.
        """
        x = self.self_attn(self.input_layernorm(x), angles, x, segment_ids=segment_ids)
        normed = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return self.mlp(normed, x), None
        selection = self._drawn(normed, generator) if self.published_sampling else None
        return self.mlp(normed, residual=x, selection=selection, return_routing=True)

    def _drawn(self, normed: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the choice adds to the logits: infinity for the best expert, Gumbel noise for the others."""
        logits = self.mlp.router_logits(normed.detach()).detach()
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
        return gumbel.scatter(1, logits.argmax(1, keepdim=True), torch.inf)


class UniMoE(Model):
    """Uni-MoE's decoder -> :class:`UniMoEOutput`.

    Args:
        dim: C. num_heads: H. hidden: channels of dense layers and of each expert. depth: layers; 0, 2, 4, ... have experts.
        num_experts: E. top_k: experts a token. num_kv_heads: heads of keys and values; H where None.
        lora_rank: of low-rank additions to the experts; 0: none. lora_alpha: their scale is lora_alpha / lora_rank.
        published_sampling: the second expert is drawn, as in the code for 8 experts; see the head of this file.
        vocab_size: of the tokenizer. rope_base: of the rotary embedding. eps: of the norms.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: see the head of this file.
    """

    published: ClassVar[Sequence[Rule]] = _RULES

    def __init__(
        self,
        dim: int = 4096,
        num_heads: int = 32,
        hidden: int = 11008,
        *,
        depth: int = 32,
        num_experts: int = 4,
        top_k: int = 2,
        num_kv_heads: int | None = None,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        published_sampling: bool = False,
        vocab_size: int = 32000,
        rope_base: float = 10000.0,
        eps: float = 1e-6,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.vocab_size, self.rope_base = dim, vocab_size, rope_base
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        experts = partial(
            UniMoEBlock,
            num_experts=num_experts,
            top_k=top_k,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            published_sampling=published_sampling,
        )
        dense = partial(UniMoEBlock, num_experts=0)
        self.layers = nn.ModuleList(
            (experts if number % 2 == 0 else dense)(dim, num_heads, hidden, num_kv_heads=num_kv_heads, eps=eps)
            for number in range(depth)
        )
        self.norm = RMSNorm(dim, eps)
        self.lm_head = Linear(dim, vocab_size, bias=False)
        self.head_dim = dim // num_heads
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> UniMoEOutput:
        """Logits of the next tokens, and the routings.

        Args:
            tokens: ids [B, L] int64, or embeddings [B, L, C], where images and sound are among the text.
            positions: [L] or [B, L], of the rotary embedding; None: 0 to L - 1.
            segment_ids: [B, L] integers; tokens see those of their own segment.
            generator: of the second experts, with published_sampling.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            check_tokens(tokens, "tokens", self.dim)
            x = tokens
        else:
            check_ids(tokens, "tokens", self.vocab_size)
            x = self.embed_tokens(tokens)
        check_segment_ids(segment_ids, x.shape[:2])
        angles = angles_of(x, positions, self.head_dim, self.rope_base)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, angles, segment_ids=segment_ids, generator=generator)
            if routing is not None:
                routings.append(routing)
        return UniMoEOutput(self.lm_head(self.norm(x)), tuple(routings))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "uni_moe_7b": UniMoE,
    "uni_moe_7b_8e": partial(UniMoE, num_experts=8, lora_rank=8, lora_alpha=16),
    "uni_moe_block": partial(UniMoEBlock, 4096, 32, 11008),
}
