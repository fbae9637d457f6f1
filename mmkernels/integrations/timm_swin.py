"""timm: the shifted windows of Swin Transformer, V2 and its other implementation (V2-CR)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.branches import biased, joined, passes, plus
from mmkernels.integrations.parts import stands_in
from mmkernels.integrations.rules import Swapped, note, replaces, unknown_source
from mmkernels.nn.linear import untouched, untouched_linear
from mmkernels.nn.mlp import dropped
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.window_attention import window_attention

_RUNS = ("mk.linear", "mk.window_attention")


# --- attention in windows, whose work the blocks do -------------------------------------------------------------------
class WindowAttention(Swapped):
    """What a block takes from its attention; called on windows that were cut before, that is the original."""

    num_heads: int
    window_size: Sequence[int]
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    qkv: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.original("windows that were cut before", x, mask)

    def reason(self) -> str | None:
        """Why its block cannot do its work now."""
        if not (untouched_linear(self.qkv) and untouched_linear(self.proj) and untouched(self.proj_drop, nn.Dropout)):
            return "a layer of the attention that somebody listens to, or that stands in another's place"
        if not passes(self.attn_drop):
            return "dropout of attention weights"
        softmax = getattr(self, "softmax", None)
        if softmax is not None and not (untouched(softmax, nn.Softmax) and softmax.dim in (-1, 3)):
            return "another softmax"
        return None

    def scores(self) -> dict[str, Any]:
        """How the kernel makes scores of queries and keys, and what it adds: the table of relative positions."""
        raise NotImplementedError

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values of the grid, and those of a pad."""
        return self.qkv(x), self.qkv.bias


@replaces("timm.models.swin_transformer.WindowAttention", runs=_RUNS, forward=("54ce101fee620322",))
class SwappedWindowAttention(WindowAttention):
    """Swin's attention."""

    scale: Any
    relative_position_bias_table: Tensor

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        return unknown_source(type(module), ("20556cded9426619",), "_get_rel_pos_bias")

    def reason(self) -> str | None:
        return super().reason() if isinstance(self.scale, float) else "its scale is no number"

    def scores(self) -> dict[str, Any]:
        return {"rel_bias_table": self.relative_position_bias_table, "scale": self.scale}


def cosine_scores(logit_scale: Tensor, table: Tensor) -> dict[str, Any]:
    factor = torch.clamp(logit_scale.flatten(), max=math.log(1.0 / 0.01)).exp()
    return {"rel_bias_table": table, "scale": factor, "qk_norm": "l2"}


@replaces("timm.models.swin_transformer_v2.WindowAttention", runs=_RUNS, forward=("cdcdb939e02296d5",))
class SwappedCosineAttention(WindowAttention):
    """Swin V2's attention: cosines, and a table that an MLP makes of the distances."""

    logit_scale: Tensor
    relative_coords_table: Tensor
    cpb_mlp: nn.Module
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    qkv_bias_separate: bool

    def scores(self) -> dict[str, Any]:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return cosine_scores(self.logit_scale, 16 * torch.sigmoid(table))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return biased(self.qkv, x, bias), bias


@replaces("timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention", runs=_RUNS, forward=("f0cf53c368d5120d",))
class SwappedMetaAttention(WindowAttention):
    """V2-CR's attention: cosines, and a bias that an MLP makes of every pair's distance; here of every distance once."""

    logit_scale: Tensor
    relative_coordinates_log: Tensor
    meta_mlp: Any

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        return unknown_source(type(module), ("230f73e12066f9b5",), "_relative_positional_encodings")

    def reason(self) -> str | None:
        mlp = self.meta_mlp
        whole = stands_in(mlp, Swapped) and untouched_linear(mlp.fc1) and untouched_linear(mlp.fc2)
        if not (whole and passes(mlp.drop1) and passes(mlp.drop2)):
            return "the MLP of the distances drops, or somebody listens to it"
        return super().reason()

    def scores(self) -> dict[str, Any]:
        pairs = pair_of_each_distance(self.window_size, self.relative_coordinates_log.device)
        return cosine_scores(self.logit_scale, self.meta_mlp(self.relative_coordinates_log[pairs]))


def pair_of_each_distance(window: Sequence[int], device: torch.device) -> Tensor:
    """For each row of a table of relative positions one pair of tokens that has it, as query * tokens + key."""
    height, width = window
    down = torch.arange(1 - height, height, device=device)[:, None]
    right = torch.arange(1 - width, width, device=device)
    query, key = (sign.clamp_min(0) * width + other.clamp_min(0) for sign, other in ((down, right), (-down, -right)))
    return (query * (height * width) + key).flatten()


# --- blocks -----------------------------------------------------------------------------------------------------------
class _Block(Swapped):
    """What Swin's blocks share: shift, pads, windows, bias and mask are the one kernel's."""

    attn: Any
    window_size: Sequence[int]
    shift_size: Sequence[int]
    input_resolution: Sequence[int]
    norm1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def _reason(self, x: Tensor) -> str | None:
        """Why the kernel cannot do what the block does now."""
        attn = self.attn
        if not stands_in(attn, WindowAttention):
            return "its attention is not a known one, or somebody listens to it"
        if x.dim() != 4 or not op_takes(x):
            return "tensors of another class"
        if tuple(attn.window_size) != tuple(self.window_size):
            return "windows of another size than its attention's"
        if any(self.shift_size) and not self._masks_fit(x):
            return "a mask that was made for another grid"
        if any(not 0 <= step < extent for step, extent in zip(self.shift_size, self.window_size, strict=True)):
            return "a shift of a window or more"
        return attn.reason()

    def _masks_fit(self, x: Tensor) -> bool:
        if getattr(self, "dynamic_mask", False):
            return True
        sizes = zip(x.shape[1:3], self._resolution(), self.window_size, strict=True)
        return all(-(-size // extent) == -(-made_for // extent) for size, made_for, extent in sizes)

    def _resolution(self) -> Sequence[int]:
        return self.input_resolution

    def _attend(self, x: Tensor, residual: Tensor | None) -> Tensor:
        reason = self._reason(x)
        if reason is not None:
            note(self, reason)
            return plus(self._published(x), residual)
        attn = self.attn
        qkv, pad_value = attn.projected(x)
        out = window_attention(
            qkv,
            window=tuple(self.window_size),
            shift=tuple(self.shift_size),
            num_heads=attn.num_heads,
            pad_value=pad_value,
            **attn.scores(),
        )
        return dropped(attn.proj, out, attn.proj_drop, residual)

    def _published(self, x: Tensor) -> Tensor:
        return super()._attn(x)  # type: ignore[misc]

    def _with_normed(self, x: Tensor) -> Tensor:
        """V2's order, in which each branch is normalised, then added: [B, H, W, C] -> [B, H * W, C]."""
        x = x + self.drop_path1(self.norm1(self._attend(x, None)))
        x = x.flatten(1, 2)
        return x + self.drop_path2(self.norm2(self.mlp(x)))


@replaces("timm.models.swin_transformer.SwinTransformerBlock", runs=_RUNS, forward=("1a117312aedb23f7",))
class SwappedSwinBlock(_Block):
    """Swin's block: each residual is added in the last layer of its branch."""

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        cls = type(module)
        mask = unknown_source(cls, ("6b435d60775f73de",), "get_attn_mask")
        return mask or unknown_source(cls, ("73656db93a218a1e",), "_attn")

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        if passes(self.drop_path1) and normed.dtype == x.dtype:
            x = self._attend(normed, x)
        else:
            x = x + self.drop_path1(self._attend(normed, None))
        x, grid = x.flatten(1, 2), x.shape[1:3]
        return joined(x, self.mlp, (self.drop_path2,), self.norm2(x)).unflatten(1, grid)


@replaces("timm.models.swin_transformer_v2.SwinTransformerV2Block", runs=_RUNS, forward=("3fbb8ce50b00f57f",))
class SwappedSwinV2Block(_Block):
    """Swin V2's block."""

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        cls = type(module)
        mask = unknown_source(cls, ("e648654f33d1b7e3",), "get_attn_mask")
        return mask or unknown_source(cls, ("e4dbdf5f4603d1af",), "_attn")

    def forward(self, x: Tensor) -> Tensor:
        return self._with_normed(x).unflatten(1, x.shape[1:3])


@replaces("timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock", runs=_RUNS, forward=("4957d3d422f67450",))
class SwappedSwinV2CrBlock(_Block):
    """V2-CR's block."""

    feat_size: Sequence[int]
    norm3: nn.Module

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        cls = type(module)
        mask = unknown_source(cls, ("14083591767ae27a",), "get_attn_mask")
        return mask or unknown_source(cls, ("0f0dd60559290c93",), "_shifted_window_attn")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm3(self._with_normed(x)).unflatten(1, x.shape[1:3])

    def _resolution(self) -> Sequence[int]:
        return self.feat_size

    def _published(self, x: Tensor) -> Tensor:
        return self._shifted_window_attn(x)  # type: ignore[attr-defined]
