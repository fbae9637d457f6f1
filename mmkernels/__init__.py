"""mmkernels: compute kernels for multimodal transformers.

    import mmkernels as mk
    rolled = mk.token_roll(x, num_frames=3)

Every op is a torch operator with autograd and torch.compile support, compiled kernels for the CPU and CUDA, Triton
kernels, and a definition in plain PyTorch beside it (``mmkernels.reference``).
"""

import importlib
from typing import Any

from mmkernels.inspection import explain, info
from mmkernels.ops.attention import attention
from mmkernels.ops.hash_attention import ecoformer_attention, hash_attention, hash_codes
from mmkernels.ops.linear import linear, mlp
from mmkernels.ops.linear_attention import linear_attention
from mmkernels.ops.moe import Dispatch, ExpertLora, dispatch, grouped_linear, moe_mlp
from mmkernels.ops.nested_mlp import nested_mlp
from mmkernels.ops.norm import add_layer_norm, add_rms_norm, layer_norm, modulate, rms_norm
from mmkernels.ops.packed_linear import PackedLinear, pack_linear
from mmkernels.ops.permute import permute_tokens, unpermute_tokens
from mmkernels.ops.qk_norm_rope import qk_norm_rope
from mmkernels.ops.routing import Routing, RoutingLosses, fixed_routing, route
from mmkernels.ops.silu_attention import silu_attention
from mmkernels.ops.token_roll import token_roll, token_roll_layer_norm
from mmkernels.ops.window_attention import window_attention
from mmkernels.runtime import FallbackWarning, last_kernels
from mmkernels.version import __version__

__all__ = [
    "Dispatch",
    "ExpertLora",
    "FallbackWarning",
    "PackedLinear",
    "Routing",
    "RoutingLosses",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "dispatch",
    "ecoformer_attention",
    "explain",
    "fixed_routing",
    "grouped_linear",
    "hash_attention",
    "hash_codes",
    "info",
    "last_kernels",
    "layer_norm",
    "linear",
    "linear_attention",
    "mlp",
    "modulate",
    "moe_mlp",
    "nested_mlp",
    "pack_linear",
    "permute_tokens",
    "qk_norm_rope",
    "rms_norm",
    "route",
    "silu_attention",
    "token_roll",
    "token_roll_layer_norm",
    "unpermute_tokens",
    "window_attention",
]


def __getattr__(name: str) -> Any:
    """mk.integrations, mk.models, mk.nn and the swap, imported when they are first asked for."""
    if name in ("integrations", "models", "nn"):
        return importlib.import_module(f"mmkernels.{name}")
    if name in ("SwapReport", "swap", "swapped", "unswap"):
        return getattr(importlib.import_module("mmkernels.integrations"), name)
    raise AttributeError(f"module 'mmkernels' has no attribute {name!r}")
