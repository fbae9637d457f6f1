"""MONAI: MLPs, self-attention, and the shifted windows of Swin UNETR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor, nn

from mmkernels.integrations.branches import Branch, joined
from mmkernels.integrations.parts import UNKNOWN, activation_name, drop_of, stands_in
from mmkernels.integrations.rules import Swapped, replaces
from mmkernels.integrations.sdpa import sdpa
from mmkernels.nn.linear import untouched
from mmkernels.nn.mlp import dropped, feed_forward
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.nn.window_attention import clipped
from mmkernels.ops.attention import attention
from mmkernels.ops.window_attention import window_attention

# What a stage gives its blocks in the place of the mask of its regions, which the kernel works out by itself.
_REGIONS: Final = "regions"


@replaces("monai.networks.blocks.mlp.MLPBlock", runs=("mk.mlp",), forward=("0bcb66fd644e408f",))
class SwappedMlpBlock(Branch):
    """MONAI's MLPBlock in one pass."""

    linear1: nn.Module
    linear2: nn.Module
    fn: nn.Module
    drop1: nn.Module
    drop2: nn.Module

    @staticmethod
    def refuses(module: Any) -> str | None:
        return "an activation that mk.mlp has no name for" if activation_name(module.fn) == UNKNOWN else None

    def forward(self, x: Tensor) -> Tensor:
        return self.added_to(None, x)

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        name = activation_name(self.fn)
        drop1, drop2 = drop_of(self.drop1), drop_of(self.drop2)
        if name == UNKNOWN:
            return dropped(self.linear2, drop1(self.fn(self.linear1(x))), drop2, residual)
        return feed_forward(x, self.linear1, self.linear2, name, drop1, drop2, residual)


@replaces("monai.networks.blocks.selfattention.SABlock", runs=("mk.attention",), forward=("3eb62c240dc2baa4",))
class SwappedSelfAttention(Swapped):
    """MONAI's SABlock: attention without its matrix."""

    num_heads: int
    dim_head: int
    scale: float
    causal: bool
    include_fc: bool
    training: bool
    use_combined_linear: bool
    use_flash_attention: bool
    sequence_length: int | None
    qkv: nn.Module
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module
    drop_weights: nn.Dropout
    drop_output: nn.Module

    @staticmethod
    def refuses(module: Any) -> str | None:
        if module.save_attn:
            return "save_attn keeps the matrix of weights"
        if module.rel_positional_embedding is not None:
            return "a relative position embedding that depends on the queries"
        return None if module.attention_dtype is None else "attention in a dtype of its own"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        reason = self._reason(x, attn_mask)
        if reason is not None:
            return self.original(reason, x, attn_mask)
        heads = (self.num_heads, self.dim_head)
        if self.use_combined_linear:
            q, k, v = self.qkv(x).unflatten(-1, (3, *heads)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (layer(x).unflatten(-1, heads).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        if self.use_flash_attention:  # which drops weights in eval mode too, as published
            out = sdpa(q, k, v, attn_mask, self.drop_weights.p, self.causal, self.scale)
        else:
            mask = None if attn_mask is None else attn_mask[:, None, None] != 0
            dropout_p = self.drop_weights.p if self.training else 0.0
            out = attention(q, k, v, mask=mask, is_causal=self.causal, scale=self.scale, dropout_p=dropout_p)
        out = out.transpose(1, 2).flatten(2)
        return self.drop_output(self.out_proj(out) if self.include_fc else out)

    def _reason(self, x: Tensor, attn_mask: Tensor | None) -> str | None:
        if not op_takes(x, attn_mask):
            return "tensors of another class"
        if not untouched(self.drop_weights, nn.Dropout) or self.drop_weights.p >= 1:
            return "a dropout layer that somebody listens to, or that drops everything"
        if self.use_flash_attention:
            return None
        if self.causal and attn_mask is not None:
            return "attn_mask beside causal attention"
        if self.causal and self.sequence_length is not None and x.size(-2) > self.sequence_length:
            return "more tokens than the causal mask has"
        return None


@replaces("monai.networks.nets.swin_unetr.WindowAttention", runs=("mk.attention",), forward=("b3838eb0a217b433",))
class SwappedWindowAttention(Swapped):
    """MONAI's WindowAttention on windows that were cut before; in blocks that are swapped, they do its work."""

    num_heads: int
    scale: float
    training: bool
    window_size: Sequence[int]
    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    qkv: Any
    proj: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Module

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        reason = self.reason(x, mask)
        if reason is not None:
            return self.original(reason, x, mask)
        windows, n, channels = x.shape
        q, k, v = self.qkv(x).view(windows, n, 3, self.num_heads, channels // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index[:n, :n]].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(windows // mask.size(0), 1, 1, 1)
        out = attention(q, k, v, bias=bias.to(q.dtype), scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def reason(self, x: Tensor, mask: Tensor | None = None) -> str | None:
        """Why the kernels cannot do this call."""
        if self.training and (self.attn_drop.p > 0 or not untouched(self.attn_drop, nn.Dropout)):
            return "dropout of attention weights"
        if not op_takes(x, mask, self.relative_position_bias_table):
            return "tensors of another class"
        return None


@replaces(
    "monai.networks.nets.swin_unetr.SwinTransformerBlock", runs=("mk.window_attention",), forward=("d58322360739c8f0",)
)
class SwappedSwinBlock(Swapped):
    """Swin UNETR's block: pads, shift, windows, bias and mask in the one kernel, residuals where the products end."""

    attn: Any
    mlp: Any
    norm1: nn.Module
    norm2: nn.Module
    drop_path: nn.Module
    shift_size: Sequence[int]
    use_checkpoint: bool

    def forward(self, x: Tensor, mask_matrix: Any) -> Tensor:
        if not isinstance(mask_matrix, str):
            return self.original("called outside of its stage, with a mask of its own", x, mask_matrix)
        if self.use_checkpoint:
            from torch.utils.checkpoint import checkpoint

            x = x + self.drop_path(checkpoint(self._attend, x, None, use_reentrant=False))
            return x + checkpoint(self.forward_part2, x, use_reentrant=False)  # type: ignore[attr-defined]
        plain = untouched(self.drop_path, nn.Identity)
        x = self._attend(x, x) if plain else x + self.drop_path(self._attend(x, None))
        return joined(x, self.mlp, (self.drop_path,), self.norm2(x))

    def can_attend(self, x: Tensor) -> bool:
        """Whether the block does the work of its attention on x, whose stage then makes no mask."""
        attn = self.attn
        return stands_in(attn, SwappedWindowAttention) and attn.reason(x) is None and untouched(self, type(self))

    def _attend(self, x: Tensor, residual: Tensor | None) -> Tensor:
        attn = self.attn
        qkv = attn.qkv(self.norm1(x))
        window, shift = clipped(qkv.shape[1:-1], attn.window_size, self.shift_size)
        out = window_attention(
            qkv,
            attn.relative_position_bias_table,
            window=window,
            shift=shift,
            num_heads=attn.num_heads,
            scale=attn.scale,
            pad_value=attn.qkv.bias,
            pad_order="pad_roll",
            bias_window=tuple(attn.window_size),
        )
        return dropped(attn.proj, out, attn.proj_drop, residual)


@replaces("monai.networks.nets.swin_unetr.BasicLayer", runs=("mk.window_attention",), forward=("9563eba6561dbfda",))
class SwappedStage(Swapped):
    """A stage of Swin UNETR whose blocks need no mask: it makes none."""

    blocks: nn.ModuleList
    downsample: Any

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.movedim(1, -1)
        if not all(isinstance(block, SwappedSwinBlock) and block.can_attend(tokens) for block in self.blocks):
            return self.original("a block that is not swapped, that somebody listens to, or that drops weights", x)
        for block in self.blocks:
            tokens = block(tokens, _REGIONS)
        if self.downsample is not None:
            tokens = self.downsample(tokens)
        return tokens.movedim(-1, 1)
