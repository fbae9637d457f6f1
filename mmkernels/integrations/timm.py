"""timm: norms, MLPs and residual blocks; importing this module registers all rules for timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations import timm_swin  # noqa: F401 - its rules
from mmkernels.integrations.branches import Branch, joined, passes
from mmkernels.integrations.parts import UNKNOWN, activation_name, drop_of, unusual_norm
from mmkernels.integrations.rules import Swapped, replaces
from mmkernels.integrations.timm_attention import plane_of
from mmkernels.nn.linear import activated, added, operand, untouched, untouched_linear
from mmkernels.nn.mlp import dropped, feed_forward
from mmkernels.nn.norm import LayerNorm
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.linear import mlp
from mmkernels.ops.norm import layer_norm, rms_norm


# --- norms ------------------------------------------------------------------------------------------------------------
class _Norm(Swapped):
    """What timm's norms share: a flag that chooses another computation (apex, or half precision under autocast)."""

    @staticmethod
    def refuses(module: Any) -> str | None:
        if module._fast_norm:
            return "timm's fast norm is on, which computes in another precision"
        return unusual_norm(module)

    @staticmethod
    def attributes(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
        return {"kernels": True}


@replaces("timm.layers.norm.LayerNorm", runs=("mk.layer_norm",), forward=("7209715f74feefec",))
class SwappedLayerNorm(_Norm, LayerNorm):
    """timm's LayerNorm, whose eps is 1e-6."""


@replaces("timm.layers.norm.LayerNorm2d", runs=("mk.layer_norm",), forward=("b86211796f184756",))
class SwappedLayerNorm2d(_Norm):
    """LayerNorm over the channels of [B, C, H, W], which it leaves channels last in memory."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    kernels: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.kernels or not op_takes(x, self.weight, self.bias):
            return self.original("tensors of another class", x)
        return layer_norm(laid_out(x.permute(0, 2, 3, 1)), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


@replaces("timm.layers.norm.RmsNorm", runs=("mk.rms_norm",), forward=("1224f4e72ec72045",))
class SwappedRmsNorm(_Norm):
    """timm's RmsNorm, in the form that it has without apex."""

    weight: Tensor | None
    eps: float
    kernels: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.kernels or not op_takes(x, self.weight):
            return self.original("tensors of another class", x)
        return rms_norm(laid_out(x), self.weight, self.eps)


# --- MLPs -------------------------------------------------------------------------------------------------------------
class _Mlp(Branch):
    """What timm's MLPs share."""

    act: nn.Module
    drop1: nn.Module
    norm: nn.Module
    fc2: nn.Module
    drop2: nn.Module

    @staticmethod
    def refuses(module: Any) -> str | None:
        return "its layers are 1x1 convolutions" if isinstance(module.fc2, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        return self.added_to(None, x)

    def _fused(self) -> str | None:
        """The activation's name, where nothing stands between it and fc2 but dropout; otherwise UNKNOWN."""
        return activation_name(self.act) if untouched(self.norm, nn.Identity) else UNKNOWN

    def _out(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return dropped(self.fc2, self.norm(self.drop1(hidden)), drop_of(self.drop2), residual)


@replaces("timm.layers.mlp.Mlp", runs=("mk.mlp",), forward=("7b5ff3fc93ec0738",))
class SwappedMlp(_Mlp):
    """fc2(norm(act(fc1(x)))): one op without the norm."""

    fc1: nn.Module

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        name = self._fused()
        if name != UNKNOWN:
            return feed_forward(x, self.fc1, self.fc2, name, drop_of(self.drop1), drop_of(self.drop2), residual)
        name = activation_name(self.act)
        return self._out(self.act(self.fc1(x)) if name == UNKNOWN else activated(self.fc1, x, name), residual)


@replaces("timm.layers.mlp.SwiGLU", runs=("mk.mlp",), forward=("10c450d4463ae706",))
class SwappedSwiGLU(_Mlp):
    """fc2(norm(act(fc1_g(x)) * fc1_x(x))): one op without the norm."""

    fc1_g: nn.Module
    fc1_x: nn.Module

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        name = self._fused()
        if name != UNKNOWN:
            return feed_forward(
                x, self.fc1_x, self.fc2, name, drop_of(self.drop1), drop_of(self.drop2), residual, gate=self.fc1_g
            )
        name = activation_name(self.act)
        gate = self.act(self.fc1_g(x)) if name == UNKNOWN else activated(self.fc1_g, x, name)
        return self._out(gate * self.fc1_x(x), residual)


@replaces("timm.layers.mlp.GluMlp", runs=("mk.linear", "mk.mlp"), forward=("b70790c86b2ee1f5",))
class SwappedGluMlp(_Mlp):
    """SwiGLU and its like with gate and value in one fc1, which is packed as one: the layers one by one in eval mode, one op
    where the weights are used as they are."""

    fc1: nn.Module
    gate_last: bool

    def added_to(self, residual: Tensor | None, x: Tensor) -> Tensor:  # type: ignore[override]
        name = self._fused()
        taken = self._operands() if name != UNKNOWN and op_takes(x, residual) else None
        if taken is None:
            value, gate = self._split(self.fc1(x))
            return self._out(value * self.act(gate), residual)
        (weight, bias), (w_out, b_out) = taken
        w_in, w_gate = self._split(weight, 0)
        b_in, b_gate = (None, None) if bias is None else self._split(bias)
        return mlp(laid_out(x), w_in, w_out, b_in, b_out, w_gate=w_gate, b_gate=b_gate, activation=name, residual=residual)

    def _split(self, both: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        """(value, gate)."""
        first, second = both.chunk(2, dim=dim)
        return (first, second) if self.gate_last else (second, first)

    def _operands(self) -> Any:
        """Weight and bias of fc1 and of fc2 for one op; None where they have to be called."""
        layers: tuple[Any, ...] = (self.fc1, self.fc2)
        if not (passes(self.drop1) and passes(self.drop2) and all(map(untouched_linear, layers))):
            return None
        taken = [operand(layer) for layer in layers]
        if None in taken or not isinstance(taken[0][0], Tensor):  # type: ignore[index]
            return None
        return taken


@replaces("timm.models.pvt_v2.MlpWithDepthwiseConv", runs=("mk.linear",), forward=("5c8e11a7460889e1",))
class SwappedConvMlp(Branch):
    """PVTv2's MLP, with a depthwise convolution before its activation: the residual is added in fc2."""

    fc1: nn.Module
    relu: nn.Module
    dwconv: nn.Module
    act: nn.Module
    fc2: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        return self.added_to(None, x, feat_size)

    def added_to(self, residual: Tensor | None, x: Tensor, feat_size: list[int]) -> Tensor:  # type: ignore[override]
        relu = activation_name(self.relu)
        x = self.fc1(x) if relu == UNKNOWN else activated(self.fc1, x, relu)
        x = plane_of(x, feat_size)
        x = self.dwconv(self.relu(x) if relu == UNKNOWN else x)
        return dropped(self.fc2, self.drop(self.act(x.flatten(2).transpose(1, 2))), drop_of(self.drop), residual)


# --- residual blocks --------------------------------------------------------------------------------------------------
_BLOCK = ("mk.linear", "mk.mlp")


@replaces("timm.models.vision_transformer.Block", runs=_BLOCK, forward=("6dbd41648c4ce383",))
class SwappedBlock(Swapped):
    """The pre-norm block of vision transformers: each residual is added in the last layer of its branch."""

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        after = (self.ls1, self.drop_path1)
        x = joined(x, self.attn, after, self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return joined(x, self.mlp, (self.ls2, self.drop_path2), self.norm2(x))


class _GammaBlock(Swapped):
    """What the blocks of BEiT and EVA share: layer scale by parameters of the block."""

    norm1: nn.Module
    attn: nn.Module
    gamma_1: Tensor | None
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    gamma_2: Tensor | None
    drop_path2: nn.Module

    def _branches(self, x: Tensor, **arguments: Any) -> Tensor:
        if self.gamma_1 is None:
            x = joined(x, self.attn, (self.drop_path1,), self.norm1(x), **arguments)
        else:
            x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x), **arguments))
        if self.gamma_2 is None:
            return joined(x, self.mlp, (self.drop_path2,), self.norm2(x))
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))


@replaces("timm.models.eva.EvaBlock", runs=_BLOCK, forward=("94bc46382021f170",))
class SwappedEvaBlock(_GammaBlock):
    """The pre-norm block of EVA and DINOv3."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self._branches(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)


@replaces("timm.models.beit.Block", runs=_BLOCK, forward=("8591adf58bdcff67",))
class SwappedBeitBlock(_GammaBlock):
    """The block of BEiT."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self._branches(x, shared_rel_pos_bias=shared_rel_pos_bias)


@replaces("timm.models.pvt_v2.Block", runs=("mk.linear",), forward=("7a236f6b02d9c217",))
class SwappedPyramidBlock(Swapped):
    """The block of PVTv2."""

    norm1: nn.Module
    attn: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        x = joined(x, self.attn, (self.drop_path1,), self.norm1(x), feat_size)
        return joined(x, self.mlp, (self.drop_path2,), self.norm2(x), feat_size)


@replaces("timm.models.crossvit.CrossAttentionBlock", runs=("mk.linear",), forward=("b83e2a24860f216d",))
class SwappedCrossAttentionBlock(Swapped):
    """CrossViT's fusion: the class token looks at the other branch's patches."""

    norm1: nn.Module
    attn: nn.Module
    drop_path: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return joined(x[:, 0:1, ...], self.attn, (self.drop_path,), self.norm1(x))


@replaces("timm.models.tnt.Block", runs=_BLOCK, forward=("45beffd49572f5e4",))
class SwappedNestedBlock(Swapped):
    """TNT's block: pixels of each patch, their sum into the patch, patches."""

    norm_in: nn.Module
    attn_in: nn.Module
    norm_mlp_in: nn.Module
    mlp_in: nn.Module
    norm1_proj: nn.Module
    proj: nn.Module
    norm2_proj: nn.Module | None
    norm_out: nn.Module
    attn_out: nn.Module
    drop_path: nn.Module
    norm_mlp: nn.Module
    mlp: nn.Module

    def forward(self, pixel_embed: Tensor, patch_embed: Tensor) -> tuple[Tensor, Tensor]:
        after = (self.drop_path,)
        pixel_embed = joined(pixel_embed, self.attn_in, after, self.norm_in(pixel_embed))
        pixel_embed = joined(pixel_embed, self.mlp_in, after, self.norm_mlp_in(pixel_embed))
        B, N, _ = patch_embed.size()
        patches = patch_embed[:, 1:]
        if self.norm2_proj is None:
            patches = added(self.proj, self.norm1_proj(pixel_embed).reshape(B, N - 1, -1), patches)
        else:
            folded = self.proj(self.norm1_proj(pixel_embed.reshape(B, N - 1, -1)))
            patches = patches + self.norm2_proj(folded)
        patch_embed = torch.cat([patch_embed[:, 0:1], patches], dim=1)
        patch_embed = joined(patch_embed, self.attn_out, after, self.norm_out(patch_embed))
        return pixel_embed, joined(patch_embed, self.mlp, after, self.norm_mlp(patch_embed))
