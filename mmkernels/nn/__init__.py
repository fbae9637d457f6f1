"""Modules made of ops, each with the kernels on or off."""

from mmkernels.nn.token_roll import TokenRoll, TokenRollLayerNorm, visual_ranges

__all__ = ["TokenRoll", "TokenRollLayerNorm", "visual_ranges"]
