"""Softmax attention on Hopper, forward: which calls of `attention` the CUDA kernel takes (csrc/cuda/attention.cu)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels import runtime
from mmkernels.ops.backends import Arguments
from mmkernels.ops.entry import autocast_dtype, define, empty_heads

CHANNELS = (64, 128)
ROWS = 64  # of one warp group: fewer queries leave it idle, and Triton has kernels that share one
MOST_TOKENS = 2**30
_LACKS = (
    *("bias", "mask", "limits", "segment_ids_q", "segment_ids_k", "cu_seqlens_q", "cu_seqlens_k", "value_gate"),
    *("softcap", "dropout_p"),
)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bottom_right: bool) -> tuple[Tensor, Tensor]:
    return empty_heads(q, tuple(q.shape), False), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


_op = define(
    "attention_hopper(Tensor q, Tensor k, Tensor v, float scale, bool causal, bool bottom_right) "
    "-> (Tensor out, Tensor lse)",
    _fake,
)


def _is_given(value: Any) -> bool:
    return value is not None and (isinstance(value, Tensor) or value != 0)


def _aligned(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can load x: multiples of 16 bytes, and no dimension that is expanded."""
    strides = (x.stride(dim) for dim in range(3) if x.size(dim) > 1)
    return x.data_ptr() % 16 == 0 and all(0 < stride < 2**39 and stride % 8 == 0 for stride in strides)


def reason(arguments: Arguments) -> str | None:
    """Why the kernel does not take a call on a GPU that the CUDA library runs on. The arguments are the operator's or, in
    mk.explain, those of the public function, whose window, scale and dtype under autocast are still to be worked out."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    if not runtime.hopper_attention:
        return "it has not been measured on a GPU yet: MMKERNELS_HOPPER_ATTENTION=1 asks for it"
    capability = torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        return f"this GPU has compute capability {'.'.join(map(str, capability))}; the kernel is for 9.0"
    if "window_size" in arguments:
        dtype = autocast_dtype(q) or q.dtype
        left, right = arguments["window_size"] or (None, None)
        window = (-1 if left is None else left, 0 if arguments["is_causal"] else -1 if right is None else right)
    else:
        dtype, window = q.dtype, (arguments["window_left"], arguments["window_right"])
    if dtype not in (torch.bfloat16, torch.float16):
        return f"q is {dtype}; the kernel takes torch.bfloat16, torch.float16"
    lacks = [name for name in _LACKS if _is_given(arguments[name])]
    if lacks:
        return f"the kernel takes no {', '.join(lacks)}"
    if window not in ((-1, -1), (-1, 0)):
        return f"the window is {window}; the kernel takes all keys, or those up to the query"
    if q.size(-1) not in CHANNELS or v.size(-1) != q.size(-1):
        return f"q has {q.size(-1)} and v {v.size(-1)} channels; the kernel takes 64 of both, or 128"
    if q.size(2) < ROWS:
        return f"there are {q.size(2)} queries; the kernel is for {ROWS} or more"
    if not 1 <= k.size(2) <= MOST_TOKENS or q.size(2) > MOST_TOKENS:
        return f"there are {q.size(2)} queries and {k.size(2)} keys; the kernel takes 1 to 2^30"
    if arguments["scale"] is not None and not math.isfinite(arguments["scale"]):
        return f"the scale is {arguments['scale']}; the kernel takes finite ones"
    crooked = [name for name, x in (("q", q), ("k", k), ("v", v)) if not _aligned(x)]
    if crooked:
        return f"{', '.join(crooked)}: data or strides are no multiples of 16 bytes, or a dimension is expanded"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operator `attention` where `reason` has nothing against it."""
    scale, _, _, _, window_right, bottom_right, _, _ = rest[9:]
    return _op(q, k, v, scale, window_right == 0, bottom_right)
