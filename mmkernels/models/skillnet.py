"""SkillNet: one transformer for text, images, sound, video and code, of which a task runs only the skills that it needs.

Source: "One Model, Multiple Modalities: A Sparsely Activated Approach for Text, Sound, Image, Video and Code" (2022). No
code was published. Of the paper only the abstract was at hand: parameters are partitioned into skills that are defined in
advance, a task activates those it needs, in pretraining and in fine-tuning, over five modalities.

The rest is read from "SkillNet-NLU" (2022) of the same group, and not verified: each layer has one attention, which all
skills share, and a feed-forward layer for each skill; active ones are averaged; a general skill is active in all tasks.
Sizes and the norms behind each branch are BERT's base. Names and number of skills are ours: one general and one for each
modality.

The active skills are the same for all samples of a batch and for all layers, so they cost one wider layer; the others
compute nothing, and their gradients are 0 (weights are stacked, so an optimizer with weight decay or momentum still moves
them). Whoever calls the model names all active skills, the general one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels.models.base import Model, check_ids, check_tokens, check_visible
from mmkernels.nn import LayerNorm, SelfAttention, SkillMlp

SKILLS = ("general", "text", "image", "sound", "video", "code")


def _different(skills: Any) -> bool:
    """Whether these are names, at least one, each once."""
    return (
        isinstance(skills, (Sequence, Set))
        and not isinstance(skills, str)
        and all(isinstance(skill, str) for skill in skills)
        and 0 < len(set(skills)) == len(skills)
    )


class SkillNetBlock(Model):
    """norm1(x + attn(x)), then norm2(x + the mean of the active skills' feed-forward layers): [B, N, C] -> [B, N, C].

    Args:
        dim: C. num_heads: H. hidden: of each skill's feed-forward layer. num_skills: S.
        reduce, eps, kernels, seed: as in :class:`SkillNet`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        num_skills: int,
        *,
        reduce: Literal["mean", "sum"] = "mean",
        eps: float = 1e-12,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads)
        self.norm1 = LayerNorm(dim, eps)
        self.mlp = SkillMlp(dim, hidden, num_skills, reduce=reduce)
        self.norm2 = LayerNorm(dim, eps)
        self.finish(kernels=kernels, seed=seed)

    def forward(self, x: Tensor, skills: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """x [B, N, C]; skills: numbers of the active ones, as in SkillMlp.forward; mask: as in SelfAttention.forward."""
        x = self.norm1(self.attn(x, x, mask=mask))
        return self.norm2(x + self.mlp(x, skills))


class SkillNet(Model):
    """SkillNet's encoder: tokens and the names of the active skills -> features [B, N, C].

    Args:
        dim: C. num_heads: H. hidden: of each skill's feed-forward layer. depth: layers.
        skills: their names.
        reduce: "mean" or "sum" of what active skills give.
        vocab_size, max_length: of text, and the most tokens of all modalities.
        eps: of the norms.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: see the head of this file.
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        hidden: int = 3072,
        *,
        depth: int = 12,
        skills: Sequence[str] = SKILLS,
        reduce: Literal["mean", "sum"] = "mean",
        vocab_size: int = 21128,
        max_length: int = 512,
        eps: float = 1e-12,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not _different(skills):
            raise ValueError(f"skills: expected different names, got {skills!r}")
        self.dim, self.skills, self.vocab_size, self.max_length = dim, tuple(skills), vocab_size, max_length
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Parameter(torch.empty(max_length, dim))
        self.norm = LayerNorm(dim, eps)
        self.blocks = nn.ModuleList(
            SkillNetBlock(dim, num_heads, hidden, len(skills), reduce=reduce, eps=eps) for _ in range(depth)
        )
        self.finish(kernels=kernels, seed=seed)

    def forward(self, tokens: Tensor, skills: Sequence[str], visible: Tensor | None = None) -> Tensor:
        """Features of the tokens.

        Args:
            tokens: ids [B, N] int64, or embeddings [B, N, C], as of patches, frames and waves; N at most max_length.
            skills: names of the active ones, at least one.
            visible: [B, N] bool, False for padding, which no token sees.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        numbers = self._numbers(skills)
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            check_tokens(tokens, "tokens", self.dim)
            x = tokens
        else:
            check_ids(tokens, "tokens", self.vocab_size)
            x = self.embed_tokens(tokens)
        if x.size(1) > self.max_length:
            raise ValueError(f"tokens: expected at most {self.max_length}, got {x.size(1)}")
        mask = None
        if visible is not None:
            check_visible(visible, "visible", x.shape[:2])
            mask = visible[:, None, None, :]
        x = self.norm(x + self.pos_embed[: x.size(1)])
        for block in self.blocks:
            x = block(x, numbers, mask)
        return x

    def _numbers(self, skills: Any) -> list[int]:
        if not _different(skills) or not set(skills) <= set(self.skills):
            raise ValueError(f"skills: expected different ones of {', '.join(self.skills)}, got {skills!r}")
        return [self.skills.index(skill) for skill in skills]


MODELS: dict[str, Callable[..., nn.Module]] = {
    "skillnet_base": SkillNet,
    "skillnet_block": partial(SkillNetBlock, 768, 12, 3072, len(SKILLS)),
}
