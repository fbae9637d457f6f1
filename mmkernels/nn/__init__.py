"""Modules made of ops, each with the kernels on or off."""

from mmkernels.nn.activator import ActivatorBlock
from mmkernels.nn.attention import CrossAttention, MultiheadAttention
from mmkernels.nn.hash_attention import EcoFormerAttention
from mmkernels.nn.hash_learning import HashFit, fit_hash
from mmkernels.nn.linear import Linear
from mmkernels.nn.linear_attention import LinearAttention
from mmkernels.nn.mlp import GluMlp, Mlp
from mmkernels.nn.modality import ModalityLinear, ModalityMlp, ModalityRMSNorm
from mmkernels.nn.moe import MoE
from mmkernels.nn.nested_mlp import NestedMlp
from mmkernels.nn.norm import LayerNorm, RMSNorm
from mmkernels.nn.packed import repack
from mmkernels.nn.rotary_attention import RotaryAttention, rotary_angles
from mmkernels.nn.self_attention import SelfAttention
from mmkernels.nn.skill_mlp import SkillMlp
from mmkernels.nn.token_roll import TokenRoll, TokenRollLayerNorm, visual_ranges
from mmkernels.nn.window_attention import WindowAttention

__all__ = [
    "ActivatorBlock",
    "CrossAttention",
    "EcoFormerAttention",
    "GluMlp",
    "HashFit",
    "LayerNorm",
    "Linear",
    "LinearAttention",
    "Mlp",
    "MoE",
    "ModalityLinear",
    "ModalityMlp",
    "ModalityRMSNorm",
    "MultiheadAttention",
    "NestedMlp",
    "RMSNorm",
    "RotaryAttention",
    "SelfAttention",
    "SkillMlp",
    "TokenRoll",
    "TokenRollLayerNorm",
    "WindowAttention",
    "fit_hash",
    "repack",
    "rotary_angles",
    "visual_ranges",
]
