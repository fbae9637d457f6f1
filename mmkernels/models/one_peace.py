"""ONE-PEACE: an encoder whose attention all modalities share and whose feed-forward layers are each one's own.

Source: "ONE-PEACE: Exploring One General Representation Model Toward Unlimited Modalities" (2023). Headline: 4B parameters
with the stems of all modalities, C = 1536, 40 layers, 24 heads, 6144 hidden channels, 1.5B of them for images alone. Names
of modules are those of the published code, but for the feed-forward layers, which are stacked, and the last norms;
`load_pretrained` takes the published ones, of its `encoder_wrapper`, and gives back those of what is not here: buffers, the
adapter of audio, the projections and the decoder of pretraining.

Here are the layer, the encoder over embedded tokens, and the model with the adapters of text (embeddings) and images (three
convolutions). Audio comes in embedded: its adapter is a stack of convolutions over a wave, which no op of this package has
a part in. That adapter has a table of distances too (512 buckets) and knows which tokens are padding; what they make goes
to :class:`OnePeaceEncoder` as `biases` and `visible`, and :class:`OnePeace` does without.

Where paper and code differ:

- Queries and values have a bias, keys have none. The norm within attention (`sub_norm`) is before its last product, as in
  the released configurations; the defaults of the code's own dataclass put it behind (`post_norm`) and scale heads
  (`head_scale`).
- Positions are added to scores: a table of distances of words and one of patches, the same for all layers (one for each
  layer when fine-tuned: not here). Between modalities nothing is added. The tables begin as 0.
- The code hides padded words only where it adds such tables; here always.
- The code's wrapper takes text, image and audio together, its encoder does not; here any modalities can be together.
- The released LayerScale begins at 1e-6, the dataclass's at 1e-2. The code drops branches in training (with 0.4 in the last
  layer): not here.
- The code fits images of other sizes by interpolation of their positions: not here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.base import Model, Rule, check_floats, check_ids, check_tokens, check_visible
from mmkernels.nn import LayerNorm, Linear, ModalityMlp
from mmkernels.nn.attention import plain_attention
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.attention import attention
from mmkernels.ops.checks import check_int

MODALITIES = ("text", "image", "audio")

_FEED_FORWARD = {
    r"0\.wi_0\.weight": "w_gate",
    r"0\.wi_1\.weight": "w_in",
    r"2\.weight": "hidden_norm_weight",
    r"2\.bias": "hidden_norm_bias",
    r"3\.weight": "w_out",
    r"3\.bias": "b_out",
}
_RULES = (
    Rule(r"encoder_wrapper\.(.*)", r"\1"),
    Rule(r"fusion_model\.(.*)", r"encoder.\1"),
    *(Rule(rf"(.*\.|)ffn\.(?P<index>\d+)\.{theirs}", rf"\1ffn.{ours}") for theirs, ours in _FEED_FORWARD.items()),
    Rule(r"(.*embed_images\.\d+)\.layer_norm\.(.*)", r"\1.\2"),
    Rule(rf"(.*\.|)({'|'.join(MODALITIES)})_layer_norm\.(.*)", r"\1layer_norms.\2.\3"),
)


def check_modalities(modalities: Sequence[str]) -> None:
    if not modalities or len(set(modalities)) < len(modalities) or not set(modalities) <= set(MODALITIES):
        raise ValueError(f"modalities: expected different ones of {', '.join(MODALITIES)}, got {list(modalities)}")


class OnePeaceAttention(Model):
    """Attention whose keys have no bias, with norms and scales of its heads: [B, N, C] -> [B, N, C].

    Args:
        dim: C. num_heads: H.
        sub_norm: a LayerNorm before the last product. head_scale: a learned factor of each head.
        eps: of the norm. kernels, seed: as in :class:`OnePeace`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sub_norm: bool = True,
        head_scale: bool = False,
        eps: float = 1e-5,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        check_int(num_heads, "num_heads", 1)
        if dim % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self.ln = LayerNorm(dim, eps) if sub_norm else None
        self.c_attn = nn.Parameter(torch.ones(num_heads)) if head_scale else None
        self.finish(kernels=kernels, seed=seed)

    def forward(self, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As :meth:`OnePeaceLayer.forward`."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.kernels and op_takes(q, k, v, bias, mask):
            out = attention(q, k, v, bias=bias, mask=mask)
        else:
            out = plain_attention(q, k, v, mask, bias, 0.0)
        if self.c_attn is not None:
            out = out * self.c_attn[:, None, None]
        out = out.transpose(1, 2).flatten(2)
        return self.out_proj(out if self.ln is None else self.ln(out))


class _Numbered(Model):
    """What has feed-forward layers of modalities: their published names begin with the modality's."""

    published: ClassVar[Sequence[Rule]] = _RULES
    modalities: tuple[str, ...]

    def own_names(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        numbers = {name: number for number, name in enumerate(self.modalities)}

        def numbered(name: str) -> str:
            match = re.fullmatch(r"(.*\.|)(\w+)_ffn\.(.*)", name)
            return name if match is None or match[2] not in numbers else f"{match[1]}ffn.{numbers[match[2]]}.{match[3]}"

        return super().own_names({numbered(name): value for name, value in state_dict.items()})


class OnePeaceLayer(_Numbered):
    """x + gamma_1 * attention(norm(x)), then x + gamma_2 * the feed-forward layer of each token's modality.

    Args:
        dim: C. num_heads: H. hidden: of the feed-forward layers.
        modalities: of the feed-forward layers; modality_ids are their numbers here.
        layer_scale: what gamma_1 and gamma_2 begin as; None: they are not there.
        sub_norm, head_scale: as in :class:`OnePeaceAttention`. post_norm: a LayerNorm of what attention gives.
        eps: of all norms. kernels, seed: as in :class:`OnePeace`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        modalities: Sequence[str] = MODALITIES,
        *,
        layer_scale: float | None = 1e-6,
        sub_norm: bool = True,
        post_norm: bool = False,
        head_scale: bool = False,
        eps: float = 1e-5,
        kernels: bool = True,
        seed: int = 0,
    ) -> None:
        check_modalities(modalities)
        super().__init__()
        self.modalities = tuple(modalities)
        self.self_attn_layer_norm = LayerNorm(dim, eps)
        self.self_attn = OnePeaceAttention(dim, num_heads, sub_norm=sub_norm, head_scale=head_scale, eps=eps)
        self.attn_ln = LayerNorm(dim, eps) if post_norm else None
        self.final_layer_norm = LayerNorm(dim, eps)
        self.ffn = ModalityMlp(
            dim, hidden, len(modalities), gated=True, activation="gelu", bias=(False, True), hidden_norm=True, norm_eps=eps
        )
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.finish(kernels=kernels, seed=seed)

    def forward(self, x: Tensor, modality_ids: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, N, C] -> [B, N, C].

        Args:
            modality_ids: [B, N] int64, numbers of `modalities`.
            bias: broadcastable to [B, H, N, N], added to the scores.
            mask: bool, broadcastable as bias is; True = sees.

        Raises:
            TypeError, ValueError: modality_ids does not fit; with kernels, as the ops.
        """
        attended = self.self_attn(self.self_attn_layer_norm(x), bias, mask)
        if self.attn_ln is not None:
            attended = self.attn_ln(attended)
        x = x + attended if self.gamma_1 is None else torch.addcmul(x, self.gamma_1, attended)
        fed = self.ffn(self.final_layer_norm(x), modality_ids)
        return x + fed if self.gamma_2 is None else torch.addcmul(x, self.gamma_2, fed)


class OnePeaceEncoder(_Numbered):
    """Layers over embedded tokens of any of the modalities, one behind the other.

    Args:
        dim: C. num_heads: H. hidden: of the feed-forward layers. depth: layers.
        modalities, and further options: as in :class:`OnePeaceLayer`.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    published: ClassVar[Sequence[Rule]] = (Rule(r"(?:encoder_wrapper\.)?fusion_model\.(.*)", r"\1"), *_RULES)

    def __init__(
        self,
        dim: int = 1536,
        num_heads: int = 24,
        hidden: int = 6144,
        modalities: Sequence[str] = MODALITIES,
        *,
        depth: int = 40,
        eps: float = 1e-5,
        kernels: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_modalities(modalities)
        super().__init__()
        self.dim, self.num_heads, self.modalities = dim, num_heads, tuple(modalities)
        self.layers = nn.ModuleList(
            OnePeaceLayer(dim, num_heads, hidden, modalities, eps=eps, **options) for _ in range(depth)
        )
        self.layer_norms = nn.ModuleDict({name: LayerNorm(dim, eps) for name in modalities})
        self.finish(kernels=kernels, seed=seed)

    def forward(
        self,
        tokens: Mapping[str, Tensor],
        biases: Mapping[str, Tensor] | None = None,
        visible: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Tokens [B, N_m, C] of each modality -> the same, after the last norm.

        Args:
            tokens: of one modality or more, which are joined in this order.
            biases: [1 or B, H, N_m, N_m] added to the scores within a modality; of those that have any.
            visible: [B, N_m] bool, False for padding, which no token sees; of those that have any.

        Raises:
            TypeError, ValueError: there are no tokens, or a modality or a shape does not fit.
        """
        sizes = self._check(tokens, biases or {}, visible or {})
        x = torch.cat(list(tokens.values()), dim=1)
        batch = x.size(0)
        ids = torch.cat(
            [x.new_full((size,), self.modalities.index(name), dtype=torch.int64) for name, size in sizes.items()]
        )
        ids = ids.expand(batch, -1)
        bias = self._blocks(sizes, biases, x) if biases else None
        mask = None
        if visible:
            seen = [visible.get(name, x.new_ones((batch, size), dtype=torch.bool)) for name, size in sizes.items()]
            whole = torch.cat(seen, dim=1)
            x, mask = x * whole[..., None], whole[:, None, None, :]
        for layer in self.layers:
            x = layer(x, ids, bias, mask)
        parts = x.split(list(sizes.values()), dim=1)
        return {name: self.layer_norms[name](part.contiguous()) for name, part in zip(sizes, parts, strict=True)}

    @staticmethod
    def _blocks(sizes: Mapping[str, int], biases: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """[1 or B, H, N, N], zero between modalities."""
        total, start, rows = sum(sizes.values()), 0, []
        like = next(iter(biases.values()))
        batch = max(bias.size(0) for bias in biases.values())
        for name, size in sizes.items():
            block = biases.get(name)
            if block is None:
                rows.append(like.new_zeros((batch, like.size(1), size, total)))
            else:
                rows.append(F.pad(block.expand(batch, -1, -1, -1), (start, total - start - size)))
            start += size
        return torch.cat(rows, dim=2).to(x.dtype)

    def _check(
        self, tokens: Mapping[str, Tensor], biases: Mapping[str, Tensor], visible: Mapping[str, Tensor]
    ) -> dict[str, int]:
        if not isinstance(tokens, Mapping) or not tokens:
            raise ValueError(f"tokens: expected a mapping of at least one of {', '.join(self.modalities)}, got {tokens!r}")
        for argument, given in (("tokens", tokens), ("biases", biases), ("visible", visible)):
            known = self.modalities if argument == "tokens" else tuple(tokens)
            if not set(given) <= set(known):
                raise ValueError(f"{argument}: expected modalities of {', '.join(known)}, got {', '.join(map(str, given))}")
        for name, value in tokens.items():
            check_tokens(value, f"tokens[{name!r}]", self.dim)
        batch = next(iter(tokens.values())).size(0)
        for name, value in tokens.items():
            if value.size(0) != batch:
                raise ValueError(f"tokens[{name!r}]: expected a batch of {batch}, got {value.size(0)}")
            size = value.size(1)
            if name in biases:
                bias, expected = biases[name], f"[1 or {batch}, {self.num_heads}, {size}, {size}]"
                check_floats(bias, f"biases[{name!r}]", expected)
                if bias.dim() != 4 or bias.size(0) not in (1, batch) or bias.shape[1:] != (self.num_heads, size, size):
                    raise ValueError(f"biases[{name!r}]: expected {expected}, got {tuple(bias.shape)}")
            if name in visible:
                check_visible(visible[name], f"visible[{name!r}]", (batch, size))
        return {name: value.size(1) for name, value in tokens.items()}


# --- adapters -----------------------------------------------------------------------------------------------------------
_POSITIONS = 1024  # of the class token and words, over which distances are spread


def text_buckets(buckets: int, length: int, max_length: int = _POSITIONS) -> Tensor:
    """[length, length] int64: which row of a table each distance of two words is; near ones have a row each, far ones share.

    The first word is the class token: row 2 `buckets` - 1 from it, the next row to it, the one after that from it to itself.
    """
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    middle = buckets // 2
    far = distance.abs().clamp(min=middle)
    shared = middle + torch.ceil(torch.log(far / middle) / math.log((max_length - 1) / middle) * (middle - 1)).long()
    bucket = torch.where(distance.abs() <= middle, distance, shared * distance.sign()) + buckets - 1
    bucket[0, :], bucket[:, 0], bucket[0, 0] = 2 * buckets - 1, 2 * buckets, 2 * buckets + 1
    return bucket


def image_buckets(edge: int) -> Tensor:
    """[edge^2 + 1, edge^2 + 1] int64: which row of a table each offset of two patches is, the class token first; BEiT's."""
    grid = torch.arange(edge)
    place = torch.cartesian_prod(grid, grid)
    offset = place[:, None] - place[None, :] + edge - 1
    bucket = F.pad(offset[..., 0] * (2 * edge - 1) + offset[..., 1], (1, 0, 1, 0))
    rows = (2 * edge - 1) ** 2
    bucket[0, :], bucket[:, 0], bucket[0, 0] = rows, rows + 1, rows + 2
    return bucket


class TextAdapter(nn.Module):
    """ids [B, L] -> (tokens [B, 1 + L, C], bias [1, H, 1 + L, 1 + L]), a class token first."""

    def __init__(self, dim: int, num_heads: int, *, vocab_size: int, max_length: int = 512, buckets: int = 256) -> None:
        check_int(max_length, "max_length", 1)
        if max_length >= _POSITIONS:
            raise ValueError(f"max_length: expected at most {_POSITIONS - 1}, got {max_length}")
        check_int(buckets, "text_buckets", 2)
        super().__init__()
        self.max_length, self.buckets = max_length, buckets
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.cls_embedding = nn.Parameter(torch.empty(1, 1, dim))
        self.embed_positions = nn.Embedding(max_length + 2, dim)
        self.rel_pos_table_list = nn.ModuleList([nn.Embedding(2 * buckets + 2, num_heads)])

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length = ids.size(1) + 1
        x = torch.cat((self.cls_embedding.expand(ids.size(0), -1, -1), self.embed_tokens(ids)), dim=1)
        rows = text_buckets(self.buckets, length).to(ids.device)
        return x + self.embed_positions.weight[:length], self.rel_pos_table_list[0](rows).permute(2, 0, 1)[None]


class ChannelNorm(LayerNorm):
    """A LayerNorm over the channels of [B, C, rows, columns]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ImageAdapter(nn.Module):
    """images [B, 3, S, S] -> (tokens [B, 1 + patches, C], bias [1, H, 1 + patches, 1 + patches]), a class token first.

    The patches of 16 x 16 pixels are made by three convolutions (4, 2, 2) with norms and GELU between."""

    def __init__(self, dim: int, num_heads: int, *, edge: int = 16, eps: float = 1e-5) -> None:
        super().__init__()
        self.edge = edge
        inner = dim // 4
        self.embed_images = nn.Sequential(
            nn.Conv2d(3, inner, 4, 4),
            ChannelNorm(inner, eps),
            nn.GELU(),
            nn.Conv2d(inner, inner, 2, 2),
            ChannelNorm(inner, eps),
            nn.GELU(),
            nn.Conv2d(inner, dim, 2, 2),
        )
        self.cls_embedding = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(edge**2 + 1, dim))
        self.rel_pos_table_list = nn.ModuleList([nn.Embedding((2 * edge - 1) ** 2 + 3, num_heads)])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.embed_images(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_embedding.expand(images.size(0), -1, -1), patches), dim=1) + self.pos_embed
        rows = image_buckets(self.edge).to(images.device)
        return x, self.rel_pos_table_list[0](rows).permute(2, 0, 1)[None]


class OnePeace(_Numbered):
    """ONE-PEACE for text, images and embedded audio: any of them -> their features, a class token first.

    Args:
        dim: C, a multiple of 4. num_heads: H. hidden: of the feed-forward layers. depth: layers.
        modalities: which ones have weights.
        vocab_size, max_length, text_buckets: of text, at most 1023 words; padding is id 1.
        image_size: S in pixels, a multiple of 16.
        eps, and further options: as in :class:`OnePeaceLayer`.
        kernels: True runs the package's ops, False plain torch. May be set at any time.
        seed: of the weights.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.

    Source: see the head of this file.
    """

    def __init__(
        self,
        dim: int = 1536,
        num_heads: int = 24,
        hidden: int = 6144,
        modalities: Sequence[str] = MODALITIES,
        *,
        depth: int = 40,
        vocab_size: int = 50264,
        max_length: int = 512,
        text_buckets: int = 256,
        image_size: int = 256,
        eps: float = 1e-5,
        kernels: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_int(image_size, "image_size", 0)
        if image_size < 16 or image_size % 16 != 0:
            raise ValueError(f"image_size: expected a multiple of 16, got {image_size}")
        self.image_size, self.vocab_size, self.max_length = image_size, vocab_size, max_length
        self.encoder = OnePeaceEncoder(dim, num_heads, hidden, modalities, depth=depth, eps=eps, **options)
        self.modalities = self.encoder.modalities
        if "text" in modalities:
            self.text_adapter = TextAdapter(
                dim, num_heads, vocab_size=vocab_size, max_length=max_length, buckets=text_buckets
            )
        if "image" in modalities:
            self.image_adapter = ImageAdapter(dim, num_heads, edge=image_size // 16, eps=eps)
        self.finish(kernels=kernels, seed=seed)
        for adapter in self.children():
            if isinstance(adapter, (TextAdapter, ImageAdapter)):
                nn.init.zeros_(adapter.rel_pos_table_list[0].weight)

    def forward(
        self, text: Tensor | None = None, image: Tensor | None = None, audio: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Features [B, N_m, C] of what is given, joined in the order text, image, audio.

        Args:
            text: ids [B, L] int64, 1 for padding, L at most max_length.
            image: [B, 3, S, S], floating point in the dtype of the weights.
            audio: embedded tokens [B, N, C].

        Raises:
            TypeError, ValueError: nothing is given, a modality has no weights, or an argument does not fit.
        """
        given = {name: value for name, value in (("text", text), ("image", image), ("audio", audio)) if value is not None}
        for name in given:
            if name not in self.modalities:
                raise ValueError(f"{name}: expected None, the model has {', '.join(self.modalities)}")
        biases, visible = {}, {}
        if text is not None:
            check_ids(text, "text", self.vocab_size)
            if text.size(1) > self.max_length:
                raise ValueError(f"text: expected at most {self.max_length} words, got {text.size(1)}")
            given["text"], biases["text"] = self.text_adapter(text)
            visible["text"] = F.pad(text != _PADDING, (1, 0), value=True)
        if image is not None:
            expected = (3, self.image_size, self.image_size)
            check_floats(image, "image", f"[B, {', '.join(map(str, expected))}]")
            if image.dim() != 4 or tuple(image.shape[1:]) != expected:
                raise ValueError(f"image: expected [B, {', '.join(map(str, expected))}], got {tuple(image.shape)}")
            given["image"], biases["image"] = self.image_adapter(image)
        return self.encoder(given, biases, visible)


_PADDING = 1

MODELS: dict[str, Callable[..., nn.Module]] = {
    "one_peace": OnePeace,
    "one_peace_encoder": OnePeaceEncoder,
    "one_peace_vision": partial(OnePeace, modalities=("image",)),
    "one_peace_layer": partial(OnePeaceLayer, 1536, 24, 6144),
}
