"""All-in-one: one transformer over a sentence and the frames of a video, which meet by rolling tokens.

Source: "All in One: Exploring Unified Video-Language Pre-training" (CVPR 2023). Module and parameter names are those of
the published checkpoints (the head `itm_score` is `vtm_score` in the co-training ones).

Every frame of the video makes one row of tokens [text; class token and patches of the frame]. Attention never leaves a
row; before each block some visual tokens move to the row of the neighbouring frame, and that is all that frames see of
each other. Three things differ between the paper's text and the published code:

- The code adds a learned embedding of the frame's index to the patches (not to the class token). So does this model. Its
  co-training variant leaves it out for a single image; this model too.
- The code draws the order of the patches of each frame anew in every forward pass, so its roll moves random patches. Here
  they stay in raster order, so that the same input gives the same output.
- The code hides patches whose first pixel is black. Here every patch is visible.

The model is for inference and for measuring: the dropout and stochastic depth of the published training are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.base import Model, Rule
from mmkernels.nn import LayerNorm, Linear, Mlp, SelfAttention, TokenRollLayerNorm, visual_ranges
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.ops.token_roll import Range

_INIT_STD = 0.02


class AllInOneOutput(NamedTuple):
    """What the model gives. The features are means over the T frames, after the last LayerNorm."""

    text_features: Tensor
    """[B, L, C]"""
    video_features: Tensor
    """[B, 1 + patches, C], the frames' class token first"""
    pooled: Tensor
    """[B, C], from the first text token"""
    matching_logits: Tensor
    """[B, 2]: the sentence does not fit the video, it does"""


class TextEmbeddings(nn.Module):
    """BERT's embeddings: ids [B, L] int64 -> [B, L, C]."""

    def __init__(self, vocab_size: int, max_text_len: int, hidden_size: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_text_len, hidden_size)
        self.token_type_embeddings = nn.Embedding(2, hidden_size)
        self.LayerNorm = LayerNorm(hidden_size, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: ids.shape[1]]
        # A single sentence: every token is of BERT's type 0.
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + positions)


class PatchEmbed(nn.Module):
    """Patches of images: [B*T, 3, S, S] -> [B*T, (S / patch_size)^2, C] in raster order."""

    def __init__(self, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(KernelSwitch):
    """The roll and a pre-norm ViT block: [B*T, N, C] -> [B*T, N, C]; visible [B*T, N] bool, False for padding."""

    def __init__(
        self, hidden_size: int, num_heads: int, *, mlp_ratio: float = 4.0, eps: float = 1e-6, kernels: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = TokenRollLayerNorm(hidden_size, eps=eps)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.norm2 = LayerNorm(hidden_size, eps=eps)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.kernels = kernels

    def forward(self, x: Tensor, visible: Tensor, num_frames: int, ranges: Sequence[Range]) -> Tensor:
        normed, rolled = self.norm1(x, num_frames, ranges)
        x = self.attn(normed, rolled, mask=visible[:, None, None, :])
        return self.mlp(self.norm2(x), x)


class VisionTransformer(nn.Module):
    """The ViT whose blocks serve text and frames alike; `embed` makes the visual tokens."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        depth: int,
        image_size: int,
        patch_size: int,
        mlp_ratio: float,
        num_frames: int,
    ) -> None:
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, hidden_size))
        self.temporal_embed = nn.Parameter(torch.zeros(1, num_frames, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(hidden_size, eps=1e-6)

    def embed(self, video: Tensor) -> Tensor:
        """[B, T, 3, S, S] -> [B*T, 1 + patches, C]."""
        batch, num_frames = video.shape[:2]
        patches = self.patch_embed(video.flatten(0, 1)) + self.pos_embed[:, 1:]
        if num_frames > 1:
            # Frames past those that the embedding has get none, as where the published code loads a shorter one.
            known = self.temporal_embed[0, :num_frames]
            temporal = F.pad(known, (0, 0, 0, num_frames - known.shape[0]))
            patches = patches + temporal.repeat(batch, 1)[:, None]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(batch * num_frames, -1, -1)
        return torch.cat((cls_token, patches), dim=1)


class Pooler(nn.Module):
    """[B, N, C] -> [B, C]: a linear layer and tanh on the first token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class MatchingHead(nn.Module):
    """[B, C] -> [B, 2]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc = Linear(hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled)


class AllInOne(Model):
    """All-in-one with its video-text matching head.

    Args:
        hidden_size: C. num_heads: attention heads, a divisor of C. depth: blocks.
        image_size: S, a multiple of patch_size. patch_size: in pixels. mlp_ratio: the MLP's inner size over C.
        num_frames: length of the frame embedding. The model takes any number of frames; more than this get no embedding.
        max_text_len: longest sentence in tokens. vocab_size: ids of the tokenizer (BERT uncased has 30522).
        divisor: a frame's visual tokens // divisor come from the frame before and as many from the frame after.
        kernels: True runs the package's ops, False plain torch, whose roll splits and concatenates. May be set at any time.
        seed: of the weights: truncated normal, standard deviation 0.02; biases and the frame embedding 0.

    Raises:
        ValueError: image_size is no multiple of patch_size, or hidden_size none of num_heads.

    Source: see the head of this file.
    """

    published: ClassVar[Sequence[Rule]] = (Rule(r"vtm_score\.(.*)", r"itm_score.\1"),)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        depth: int = 12,
        image_size: int = 224,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        num_frames: int = 3,
        max_text_len: int = 40,
        vocab_size: int = 30522,
        divisor: int = 8,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if image_size % patch_size != 0:
            raise ValueError(f"image_size: expected a multiple of patch_size={patch_size}, got {image_size}")
        if hidden_size % num_heads != 0:
            raise ValueError(f"hidden_size: expected a multiple of num_heads={num_heads}, got {hidden_size}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_frames = num_frames
        self.max_text_len = max_text_len
        self.vocab_size = vocab_size
        self.divisor = divisor
        self.text_embeddings = TextEmbeddings(vocab_size, max_text_len, hidden_size)
        self.token_type_embeddings = nn.Embedding(2, hidden_size)
        self.transformer = VisionTransformer(
            hidden_size,
            num_heads,
            depth=depth,
            image_size=image_size,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            num_frames=num_frames,
        )
        self.pooler = Pooler(hidden_size)
        self.itm_score = MatchingHead(hidden_size)
        self.kernels = kernels
        with torch.no_grad():
            self._init_weights(seed)

    def _init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(weight: Tensor) -> None:
            nn.init.trunc_normal_(weight, std=_INIT_STD, generator=generator)

        draw(self.transformer.cls_token)
        draw(self.transformer.pos_embed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                draw(module.weight)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        self.text_embeddings.word_embeddings.weight[0].zero_()

    def ranges(self, num_text: int) -> tuple[Range, ...]:
        """What rolls in a joint row with `num_text` text tokens: the `ranges` of :func:`mmkernels.token_roll`."""
        return visual_ranges(num_text, self.transformer.pos_embed.shape[1], divisor=self.divisor)

    def forward(self, text_ids: Tensor, text_mask: Tensor, video: Tensor) -> AllInOneOutput:
        """Features of a batch of sentences and videos.

        Args:
            text_ids: [B, L] int64, L at most max_text_len.
            text_mask: [B, L] bool or int, nonzero where there is a token.
            video: [B, T, 3, S, S], floating point in the dtype of the weights, normalised; any T >= 1.

        Raises:
            ValueError: a shape does not fit. TypeError: text_ids is not int64.
        """
        self._check(text_ids, text_mask, video)
        num_frames, num_text = video.shape[1], text_ids.shape[1]
        text = self.text_embeddings(text_ids) + self.token_type_embeddings.weight[0]
        visual = self.transformer.embed(video) + self.token_type_embeddings.weight[1]
        x = torch.cat((text.repeat_interleave(num_frames, dim=0), visual), dim=1)
        visible = F.pad(text_mask.bool(), (0, visual.shape[1]), value=True).repeat_interleave(num_frames, dim=0)
        ranges = self.ranges(num_text)
        for block in self.transformer.blocks:
            x = block(x, visible, num_frames, ranges)
        features = self.transformer.norm(x).unflatten(0, (-1, num_frames)).mean(dim=1)
        pooled = self.pooler(features)
        return AllInOneOutput(features[:, :num_text], features[:, num_text:], pooled, self.itm_score(pooled))

    def _check(self, text_ids: Tensor, text_mask: Tensor, video: Tensor) -> None:
        size = self.image_size
        if video.dim() != 5 or video.shape[1] < 1 or video.shape[2:] != (3, size, size):
            raise ValueError(f"video: expected [B, T, 3, {size}, {size}] with T >= 1, got {list(video.shape)}")
        if text_ids.dtype != torch.int64:
            raise TypeError(f"text_ids: expected int64, got {text_ids.dtype}")
        if text_ids.dim() != 2 or text_ids.shape[0] != video.shape[0] or not 1 <= text_ids.shape[1] <= self.max_text_len:
            raise ValueError(
                f"text_ids: expected [B, L] with B={video.shape[0]} and L from 1 to {self.max_text_len}, "
                f"got {list(text_ids.shape)}"
            )
        if text_mask.shape != text_ids.shape:
            raise ValueError(
                f"text_mask: expected the shape of text_ids {list(text_ids.shape)}, got {list(text_mask.shape)}"
            )


MODELS: dict[str, Callable[..., AllInOne]] = {
    "all_in_one_tiny": partial(AllInOne, hidden_size=192, num_heads=3),
    "all_in_one_small": partial(AllInOne, hidden_size=384, num_heads=6),
    "all_in_one_base": partial(AllInOne, hidden_size=768, num_heads=12),
}
