"""How many multiplications and additions a forward pass takes, and what energy they stand for.

The counting is that of EcoFormer's published code, and gives its table:

- A linear layer or convolution is one multiplication and one addition for each product with a weight (a convolution also for
  each bias), a LayerNorm two and two an element. Activations, residuals, other biases and exponentials are not counted.
- Attention between its projections, of N queries, M keys, H heads, D channels of a head, b bits and m supports:

  =========  ==============================  ========================================
  attention  multiplications                 additions
  =========  ==============================  ========================================
  softmax    N M H (2 D + 1)                 2 N M H D
  linear     N H (2 D^2 + 2 D)               N H (2 D^2 + 4 D)
  hashed     N H (2 m + m b + b + 1 + D)     N H (2 m D + m b + 2 b + 2 b D + D)
  =========  ==============================  ========================================

  Of the squares in the distance to a support the published count has the additions alone, and a product with a sign is an
  addition. Linear attention is not in the published code; it is counted in the same way: the state and the sum of keys, both
  products with queries, the division, and the 1 of the features.

Energy is that of 32-bit floating point in 45 nm: 3.7 pJ a multiplication, 0.9 pJ an addition. It is a model of arithmetic
alone: no memory traffic is in it, and it says nothing of the time that a processor takes.

Sources: "EcoFormer: Energy-Saving Attention with Linear Complexity" (2022); the energies: "Computing's Energy Problem (and
What We Can Do About It)" (2014).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models.pyramid import GlobalAttention, Grid, HashAttention, LocalAttention, Pyramid

MULTIPLICATION_PJ = 3.7
ADDITION_PJ = 0.9


class Operations(NamedTuple):
    """Of one forward pass of a whole batch."""

    multiplications: int
    additions: int

    @property
    def energy_pj(self) -> float:
        """In picojoules."""
        return MULTIPLICATION_PJ * self.multiplications + ADDITION_PJ * self.additions

    def plus(self, other: Operations) -> Operations:
        """The sum of both."""
        return Operations(self.multiplications + other.multiplications, self.additions + other.additions)

    def times(self, count: int) -> Operations:
        """`count` of these."""
        return Operations(count * self.multiplications, count * self.additions)


class Count(NamedTuple):
    """What a model takes: `attention` is what lies between the projections of attention, `rest` all else."""

    attention: Operations
    rest: Operations

    @property
    def total(self) -> Operations:
        return self.attention.plus(self.rest)


def softmax_operations(queries: int, keys: int, heads: int, head_dim: int) -> Operations:
    """Of attention over one sample: the two products, and the scale of the scores."""
    products = 2 * queries * keys * heads * head_dim
    return Operations(products + heads * queries * keys, products)


def linear_operations(tokens: int, heads: int, head_dim: int) -> Operations:
    """Of linear attention with features elu(x) + 1 over one sample, as many queries as keys."""
    products = 2 * head_dim * head_dim + head_dim
    return Operations(heads * tokens * (products + head_dim), heads * tokens * (products + 3 * head_dim))


def hash_operations(tokens: int, heads: int, head_dim: int, bits: int, supports: int) -> Operations:
    """Of EcoFormer's attention over one sample, hashing included."""
    return Operations(
        heads * tokens * (2 * supports + supports * bits + bits + 1 + head_dim),
        heads * tokens * (2 * supports * head_dim + supports * bits + 2 * bits + 2 * bits * head_dim + head_dim),
    )


def count_operations(model: Pyramid, image_size: int | tuple[int, int] = 224, *, batch: int = 1) -> Count:
    """Counts a forward pass of `model` over images of this size. Nothing is computed, and hash functions need not be fitted.

    Args:
        model: PVTv2 or Twins-SVT with attention of any kind.
        image_size: edge in pixels, or (height, width). batch: images.

    Raises:
        ValueError: the model does not take images of this size.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shapes = _without_memory(model)
    shapes.kernels = True  # the ops know the shapes of what they give
    attention, rest = Operations(0, 0), Operations(0, 0)

    def of_attention(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        nonlocal attention
        attention = attention.plus(_COUNTS[type(layer)](layer, args[0], args[1]))

    def of_rest(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        nonlocal rest
        rest = rest.plus(_of_rest(layer, args[0], out))

    for layer in shapes.modules():
        if isinstance(layer, HashAttention):
            layer.is_trained = True
        if type(layer) in _COUNTS:
            layer.register_forward_hook(of_attention)
        elif isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            layer.register_forward_hook(of_rest)
    with torch.no_grad():
        shapes(torch.empty(batch, model.in_channels, height, width, device="meta"))
    return Count(attention, rest)


def _without_memory(model: Pyramid) -> Pyramid:
    """A copy on the meta device."""
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


# --- layer by layer -----------------------------------------------------------------------------------------------------
def _of_hash(layer: Any, x: Tensor, grid: Grid) -> Operations:
    batch, tokens, _ = x.shape
    return hash_operations(tokens, layer.num_heads, layer.head_dim, layer.bits, layer.supports.shape[1]).times(batch)


def _of_global(layer: Any, x: Tensor, grid: Grid) -> Operations:
    batch, tokens, channels = x.shape
    head_dim = channels // layer.num_heads
    if layer.linear:
        return linear_operations(tokens, layer.num_heads, head_dim).times(batch)
    reductions = (1, 1) if layer.sr is None else layer.sr.kernel_size
    keys = math.prod(size // reduction for size, reduction in zip(grid, reductions, strict=True))
    return softmax_operations(tokens, keys, layer.num_heads, head_dim).times(batch)


def _of_local(layer: Any, x: Tensor, grid: Grid) -> Operations:
    batch, _, channels = x.shape
    windows = math.prod(-(-size // layer.window) for size in grid)
    extent = layer.window**2
    return softmax_operations(extent, extent, layer.num_heads, channels // layer.num_heads).times(batch * windows)


_COUNTS: dict[type[nn.Module], Callable[[Any, Tensor, Grid], Operations]] = {
    HashAttention: _of_hash,
    GlobalAttention: _of_global,
    LocalAttention: _of_local,
}


def _of_rest(layer: nn.Module, x: Tensor, out: Tensor) -> Operations:
    if isinstance(layer, nn.Linear):
        products = x.numel() * layer.out_features
    elif isinstance(layer, nn.Conv2d):
        products = out.numel() * (math.prod(layer.kernel_size) * layer.in_channels // layer.groups + 1)
    else:
        products = 2 * x.numel()
    return Operations(products, products)
