"""Learning the hash functions of EcoFormer's attention from one batch: kernel-based supervised hashing, bit by bit.

T tokens of an item, R = B * H * T rows, m supports, b bits, k neighbours (`top_k`).

The published code holds the N x N targets of every head. Here their two parts stand apart, b S0 - sum_r y_r y_r^T: S0 has
2 k entries a row and the rest is of as many ranks as bits are fitted, so that memory grows with T and not with its square.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.nn.hash_attention import EcoFormerAttention
from mmkernels.ops.checks import check_float, check_int

# Scores of neighbours that stand in memory at once.
_SCORES = 1 << 24


class HashFit(NamedTuple):
    """How the learning of one layer went."""

    losses: Tensor
    """[b, iterations]: the relaxed loss of each bit before each step."""
    accepted: Tensor
    """[b] bool: whether the learned row replaced the one that stood there."""


class Neighbours(NamedTuple):
    """The targets S0 by row: S0[r, columns[r, i]] = signs[r, i], and 0 elsewhere."""

    columns: Tensor
    """[R, 2 k] int64, over all rows; a row's columns are of its own item and head."""
    signs: Tensor
    """[R, 2 k]: +1 the k most similar tokens (itself among them), -1 the k least similar; 0 where the same token is both,
    for the entry that the -1 overwrites."""


def fit_hash(
    module: nn.Module,
    x: Any,
    *,
    top_k: int = 10,
    iterations: int = 100,
    learning_rate: float = 5e-4,
    momentum: float = 0.9,
    seed: int = 0,
) -> dict[str, HashFit]:
    """Fits the hash functions of every :class:`EcoFormerAttention` in `module` to one batch.

    One forward pass, without gradients, in the mode that the module is in (``eval()`` it first where it drops anything).
    Layers are fitted in the order in which they run, each to its own input, and then run with what they have just learned:
    so the next one sees what it will see later. For each layer, from the unit rows of its shared query and key:

    - Supports are random tokens of the batch's first item, the same for all heads. `mean` is that of the kernel over the
      batch and its tokens.
    - Targets of a pair of tokens are +1 for the `top_k` most similar of each token, -1 for the `top_k` least similar.
    - Bits are fitted one after the other, each to what the ones before leave: gradient steps (SGD, Nesterov) on the code
      relaxed by a sigmoid, from the row of the projection that stands there. The new row stays if its hard code has the
      smaller loss, one decision for all heads; often it has not, so that many rows remain random.

    A layer that is fitted already is fitted anew. ``iterations=0`` draws supports and means and leaves the projection
    random. Learning runs on the CPU in float32 (in float64 for float64 layers); memory grows with the batch's tokens, time
    with their number squared (for the neighbours alone). Fit before ``torch.compile``.

    Args:
        module: an :class:`EcoFormerAttention`, or any model that has some.
        x: what `module` is called with: a tensor, or a tuple of positional arguments. For a layer [B, N, dim].
        top_k: k, at most N.
        iterations: steps of each bit. learning_rate, momentum: of SGD.
        seed: of the choice of supports. The same seed, module and batch give the same hash functions.

    Returns:
        How it went, by the layer's name in `module` (the name of `module` itself is ""), in the order of running. Layers
        that did not run are not in it and stay as they were.

    Raises:
        ValueError: there is no such layer; a layer's batch is empty, has fewer tokens than supports or top_k, rows that are
            not finite or all zero, or only equal tokens; an argument is out of range. Layers before it stay fitted.

    Source: "EcoFormer: Energy-Saving Attention with Linear Complexity" (2022), as published in code, where this hides in the
    first forward pass; after "Supervised Hashing with Kernels" (2012).
    """
    check_int(top_k, "top_k", 1)
    check_int(iterations, "iterations", 0)
    check_float(learning_rate, "learning_rate")
    check_float(momentum, "momentum")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected more than 0, got {learning_rate}")
    if not 0 < momentum < 1:
        raise ValueError(f"momentum: expected a number between 0 and 1, got {momentum}")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, EcoFormerAttention)}
    if not layers:
        raise ValueError(f"module: expected EcoFormerAttention layers in it, found none in {type(module).__name__}")
    generator = torch.Generator().manual_seed(seed)
    fits: dict[str, HashFit] = {}

    def fit_once(name: str, layer: EcoFormerAttention, tokens: Any) -> None:
        if name not in fits:
            fits[name] = _fit_layer(
                layer, name, tokens, generator, top_k=top_k, iterations=iterations, rate=learning_rate, momentum=momentum
            )

    def hook_of(name: str) -> Any:
        return lambda layer, args, kwargs: fit_once(name, layer, args[0] if args else kwargs["x"])

    hooks = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            module(*(x if isinstance(x, tuple) else (x,)))
    finally:
        for hook in hooks:
            hook.remove()
    return fits


def _fit_layer(
    layer: EcoFormerAttention,
    name: str,
    x: Tensor,
    generator: torch.Generator,
    *,
    top_k: int,
    iterations: int,
    rate: float,
    momentum: float,
) -> HashFit:
    of_layer = f" of layer {name!r}" if name else ""
    num_supports = layer.supports.shape[1]
    layer.check_input(x)
    if x.shape[0] < 1 or x.shape[1] < max(num_supports, top_k):
        raise ValueError(
            f"x: the input{of_layer} needs a batch, and at least as many tokens as its {num_supports} supports and as "
            f"top_k={top_k}; got shape {tuple(x.shape)}"
        )
    qk = layer.heads_of(layer.to_qk(x))
    qk = qk.to(device="cpu", dtype=torch.promote_types(qk.dtype, torch.float32))
    norms = qk.norm(dim=-1)
    bad = int((~norms.isfinite() | (norms == 0)).sum())
    if bad > 0:
        raise ValueError(f"x: {bad} of {norms.numel()} rows of queries{of_layer} are all zero or not finite")
    positions = torch.randperm(x.shape[1], generator=generator)[:num_supports]
    unit = qk / norms[..., None]
    supports, mean, features = centred_kernel(unit, positions)
    if not features.isfinite().all():
        raise ValueError(f"x: the tokens{of_layer} are all equal, which leaves nothing to learn")
    projection, fit = learn_bits(
        features,
        neighbours(unit, top_k),
        layer.projection.to(features),
        iterations=iterations,
        learning_rate=rate,
        momentum=momentum,
    )
    layer.supports.copy_(supports)
    layer.mean.copy_(mean)
    layer.projection.copy_(projection)
    layer.is_trained = True
    return fit


def centred_kernel(unit: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(supports [H, m, D], mean [H, m], centred features [B, H, T, m]) of the unit rows [B, H, T, D], with the first item's
    tokens at `positions` [m] as supports."""
    supports = unit[0][:, positions]
    # Support by support: all differences at once would be a tensor of [B, H, T, m, D].
    distances = torch.stack([(unit - point[:, None]).square().sum(-1) for point in supports.unbind(1)], dim=-1)
    features = torch.exp(-distances / (2 * distances.mean((-1, -2), keepdim=True)))
    mean = features.mean(2).mean(0)
    return supports, mean, features - mean[:, None]


def neighbours(unit: Tensor, top_k: int) -> Neighbours:
    """The targets of the unit rows [B, H, T, D]."""
    batch, heads, tokens, _ = unit.shape
    step = max(1, _SCORES // (batch * heads * tokens))
    pairs = []
    for start in range(0, tokens, step):
        scores = unit[:, :, start : start + step] @ unit.transpose(2, 3)
        near = scores.topk(top_k, dim=-1).indices
        far = scores.topk(top_k, dim=-1, largest=False).indices
        pairs.append((near, far))
    near, far = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
    overwritten = (near[..., :, None] == far[..., None, :]).any(-1)
    signs = torch.cat((1 - overwritten.to(unit.dtype), -torch.ones_like(far, dtype=unit.dtype)), dim=-1)
    first = torch.arange(0, batch * heads * tokens, tokens).view(batch, heads, 1, 1)
    columns = torch.cat((near, far), dim=-1) + first
    return Neighbours(columns.flatten(0, 2), signs.flatten(0, 2))


def learn_bits(
    features: Tensor,
    targets: Neighbours,
    projection: Tensor,
    *,
    iterations: int,
    learning_rate: float,
    momentum: float,
) -> tuple[Tensor, HashFit]:
    """The projection [H, b, m] after fitting each of its rows, of features [B, H, T, m], and how it went."""
    batch, heads, tokens, _ = features.shape
    bits = projection.shape[1]
    scale = 1 / (batch * heads * tokens * bits)
    learned = projection.clone()
    codes = features.new_empty(batch, heads, tokens, bits)
    losses = features.new_zeros(bits, iterations)
    accepted = torch.zeros(bits, dtype=torch.bool)

    # Products are written as sums: matrix products this small wait for threads more than they compute.
    def along(row: Tensor) -> Tensor:
        return (features * row[:, None]).sum(-1)

    def codes_by(row: Tensor) -> Tensor:
        return torch.where(along(row) > 0, 1.0, -1.0).to(features)

    for bit in range(bits):
        left = Left(targets, codes[..., :bit], bits)
        row = projection[:, bit].clone()
        optimizer = torch.optim.SGD([row], lr=learning_rate, momentum=momentum, nesterov=True)
        for step in range(iterations):
            relaxed = 2 * torch.sigmoid(along(row)) - 1
            product = left.both_ways(relaxed)
            losses[bit, step] = -scale / 2 * (relaxed * product).sum()
            slope = -scale / 2 * product * (1 - relaxed.square())
            row.grad = (features * slope[..., None]).sum((0, 2))
            optimizer.step()
        old, new = codes_by(projection[:, bit]), codes_by(row)
        accepted[bit] = left.agreement(new) > left.agreement(old)
        if accepted[bit]:
            learned[:, bit] = row
        codes[..., bit] = new if accepted[bit] else old
    return learned, HashFit(losses, accepted)


class Left(NamedTuple):
    """The targets S = b S0 - C C^T that the bits before have left; y is [B, H, T]."""

    targets: Neighbours
    codes: Tensor
    """C [B, H, T, r], the hard codes of the bits before."""
    bits: int
    """b"""

    def both_ways(self, y: Tensor) -> Tensor:
        """(S + S^T) y"""
        flat, columns, signs = y.flatten(), self.targets.columns, self.targets.signs.to(y)
        near = (flat[columns] * signs).sum(1)
        near.index_add_(0, columns.flatten(), (flat[:, None] * signs).flatten())
        codes = self.codes.to(y)
        by_codes = (codes * (codes * y[..., None]).sum(2, keepdim=True)).sum(-1)
        return self.bits * near.view_as(y) - 2 * by_codes

    def agreement(self, code: Tensor) -> float:
        """y^T S y summed over batch and heads, in whole numbers: comparing two of them is free of rounding."""
        exact = code.double()
        return float((exact * self.both_ways(exact)).sum()) / 2
