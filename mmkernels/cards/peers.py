"""What attention is measured against: torch's own, on a GPU by each of its kernels, FlexAttention, what may be installed.

Which of them can run on a GPU hangs on its make, on shapes and on torch's version; a contest names those that cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[..., Any]

# A target that names "sdpa" means them all.
_KERNELS: Final = {
    "sdpa:flash": "FLASH_ATTENTION",
    "sdpa:cudnn": "CUDNN_ATTENTION",
    "sdpa:efficient": "EFFICIENT_ATTENTION",
}


def installed(module: str) -> bool:
    return find_spec(module) is not None


def of_each_kernel(function: Peer) -> dict[str, Peer]:
    """`function`, in which scaled_dot_product_attention takes one of its kernels and no other."""

    def forced(kernel: str) -> Peer:
        def run(*args: Any, **kwargs: Any) -> Any:
            from torch.nn import attention

            with attention.sdpa_kernel(getattr(attention.SDPBackend, kernel)):
                return function(*args, **kwargs)

        return run

    return {name: forced(kernel) for name, kernel in _KERNELS.items()}


def compiled(function: Peer) -> Peer:
    """`function` through torch.compile alone: eagerly it would be no contestant. Compiled when it is first called."""
    made: list[Peer] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*args, **kwargs)

    return run


def plain(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The formula written out."""
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal)


def flex_of_bias(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor) -> Tensor:
    """`bias` [1, H, L, L]."""
    from torch.nn.attention.flex_attention import flex_attention

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    return flex_attention(q, k, v, score_mod=add)


def _flex_in_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=blocks)


@cache
def _causal_blocks(length: int, device: str) -> Any:
    """Made once, as a model would keep it."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


_attend_in_blocks = compiled(_flex_in_blocks)


def flex_causal(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    return _attend_in_blocks(q, k, v, _causal_blocks(q.size(2), str(q.device)))


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """The package of that name, which takes [B, L, H, D]."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal).transpose(1, 2)
