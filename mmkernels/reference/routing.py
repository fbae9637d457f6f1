"""Routing of tokens to experts: the definition.

T tokens, E experts, K slots a token. Sources: "Outrageously Large Neural Networks" (2017): noisy top-k, importance and load;
"GShard" (2020) and "Switch Transformers" (2021): capacity and load balance; "ST-MoE" (2022): the loss of large logits;
"Mixture-of-Experts with Expert Choice Routing" (2022); "M3ViT" (2022), "Uni-MoE" (2024), "IMP" (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")


class RoutingLosses(NamedTuple):
    """Auxiliary losses of one routing, scalars in float32 with gradients to the logits; not yet times any coefficient.

    With f_e the share of the tokens that chose expert e, P_e the mean probability of e, and cv2(v) = var(v) / mean(v)^2
    (the unbiased variance; 0 for one expert):

    load_balance: E sum_e f_e P_e, f over all K slots (Mixtral; Switch for K = 1).
    load_balance_first: the same with f over the first choices alone (GShard, DeepSpeed, Uni-MoE).
    importance: cv2 of the experts' sums of weights. load: cv2 of their loads, which are counts without noise, and with it
    the expected counts, sum_t P(e is among the K of t) (Shazeer; M3ViT).
    z: the mean of logsumexp(logits)^2. entropy: the mean over tokens of the entropy of their probabilities, in nats.
    """

    load_balance: Tensor
    load_balance_first: Tensor
    importance: Tensor
    load: Tensor
    z: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts every token goes to, and with what weights. A registered pytree.

    Attributes:
        expert_ids: [T, K] int64; -1 is an unused slot.
        weights: [T, K] float32 (float64 of float64 logits); 0 in unused slots.
        num_experts: E.
        max_slots: how many of the slots can be in use, T K at most: what buffers are sized by.
        sums: [2 E + 2] as weights, or None: the experts' sums of probabilities and of weights, and the sums over the
            tokens of logsumexp^2 and of the entropy.
        counts: [2, E] int64, or None: how many slots, and how many first choices, went to each expert, before capacity.
        loads: [E], or None: the expected counts where noise was drawn.
    """

    expert_ids: Tensor
    weights: Tensor
    num_experts: int
    max_slots: int
    sums: Tensor | None = None
    counts: Tensor | None = None
    loads: Tensor | None = field(default=None)

    @property
    def losses(self) -> RoutingLosses:
        """The auxiliary losses, computed when they are asked for. ValueError: a fixed routing has no probabilities."""
        if self.sums is None or self.counts is None:
            raise ValueError("losses: a fixed routing has no probabilities that they could be made of")
        experts, tokens = self.num_experts, max(1, self.expert_ids.size(0))
        probabilities, importance = self.sums[:experts], self.sums[experts : 2 * experts]
        shares = self.counts.to(self.sums.dtype) * (experts / tokens / tokens)
        loads = self.counts[0].to(self.sums.dtype) if self.loads is None else self.loads
        return RoutingLosses(
            (shares[0] * probabilities).sum(),
            (shares[1] * probabilities).sum(),
            squared_variation(importance),
            squared_variation(loads),
            self.sums[-2] / tokens,
            self.sums[-1] / tokens,
        )


_TENSORS = ("expert_ids", "weights", "sums", "counts", "loads")


def _flatten(routing: Routing) -> tuple[list[Any], Any]:
    return [getattr(routing, name) for name in _TENSORS], (routing.num_experts, routing.max_slots)


def _flatten_with_keys(routing: Routing) -> tuple[list[tuple[_pytree.KeyEntry, Any]], Any]:
    values, context = _flatten(routing)
    return [(_pytree.GetAttrKey(name), value) for name, value in zip(_TENSORS, values, strict=True)], context


def _unflatten(values: Any, context: Any) -> Routing:
    ids, weights, sums, counts, loads = values
    num_experts, max_slots = context
    return Routing(ids, weights, num_experts, max_slots, sums, counts, loads)


_pytree.register_pytree_node(
    Routing,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="mmkernels.Routing",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)


def squared_variation(values: Tensor) -> Tensor:
    """var / mean^2 with the unbiased variance; 0 of one value."""
    if values.numel() <= 1:
        return values.sum() * 0
    return values.var() / (values.mean().square() + 1e-10)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _probabilities(logits: Tensor, score: str) -> Tensor:
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def _allowed(values: Tensor, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    """Whether each expert is in one of its token's best groups: ties between groups go to the first."""
    grouped = values.unflatten(-1, (num_groups, -1))
    several = group_score == "top2" and grouped.size(-1) > 1
    best = grouped.topk(2, -1).values.sum(-1) if several else grouped.amax(-1)
    chosen = torch.sort(best, dim=-1, descending=True, stable=True).indices[..., :top_groups]
    return torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True).repeat_interleave(grouped.size(-1), -1)


def _drop(ids: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Each expert keeps its first `capacity` slots: all first choices in the order of their tokens, then the second ones."""
    order = ids.T.flatten()
    hot = torch.nn.functional.one_hot(order.clamp(min=0), num_experts) * (order >= 0)[:, None]
    place = (hot.cumsum(0) * hot).sum(-1)
    return torch.where(place <= capacity, order, -1).view(ids.size(1), ids.size(0)).T.contiguous()


def _sums(logits: Tensor, probabilities: Tensor, ids: Tensor, weights: Tensor, score: str) -> Tensor:
    """Of sigmoids the probabilities are each token's scores as parts of their sum."""
    experts = logits.size(-1)
    if score == "sigmoid":
        probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + torch.finfo(torch.float32).tiny)
        logs = torch.where(probabilities > 0, probabilities, 1).log()
    else:
        logs = torch.where(probabilities > 0, logits.log_softmax(-1), 0)
    importance = weights.new_zeros(experts).index_add(0, ids.clamp(min=0).flatten(), weights.flatten())
    entropy = -(probabilities * logs).sum()
    z = logits.logsumexp(-1).square().sum()
    return torch.cat((probabilities.sum(0), importance, z[None], entropy[None]))


def _counts(ids: Tensor, num_experts: int) -> Tensor:
    def of(chosen: Tensor) -> Tensor:
        return torch.bincount(chosen[chosen >= 0], minlength=num_experts)

    return torch.stack((of(ids), of(ids[:, 0]) if ids.size(1) else of(ids.flatten())))


def route_op(
    logits: Tensor,
    selection: Tensor | None,
    top_k: int,
    score: int,
    normalize: bool,
    top_p: float,
    num_groups: int,
    top_groups: int,
    group_score: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::route: (weights, sums, expert_ids, counts). top_p of 1 and capacity -1 are none."""
    kind = SCORES[score]
    logits = _wide(logits)
    if logits.isnan().any():
        raise ValueError("logits: NaN")
    experts = logits.size(-1)
    probabilities = _probabilities(logits, kind)
    with torch.no_grad():
        values = logits if kind == "softmax" else probabilities
        if selection is not None:
            values = values + selection
        if top_groups < num_groups:
            allowed = _allowed(values, num_groups, top_groups, GROUP_SCORES[group_score])
            values = values.masked_fill(~allowed, -math.inf)
        # Stable, so that of equal values the lower index comes first.
        ids = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :top_k]
        if top_groups < num_groups:
            ids = torch.where(allowed.gather(-1, ids), ids, -1)
        if top_p < 1:
            before = probabilities.gather(-1, ids.clamp(min=0)).cumsum(-1)[:, :-1]
            unused = torch.nn.functional.pad(before >= top_p, (1, 0), value=False)
            ids = ids.masked_fill(unused[:, : ids.size(1)], -1)
        counts = _counts(ids, experts)
        if capacity >= 0:
            ids = _drop(ids, experts, capacity)
    weights = weights_of(logits, ids, kind, normalize)
    return weights, _sums(logits, probabilities, ids, weights, kind), ids, counts


def weights_of(logits: Tensor, ids: Tensor, score: str, normalize: bool) -> Tensor:
    """The weights of the chosen experts: their scores, or with `normalize` these as parts of their sum."""
    used, chosen = ids >= 0, ids.clamp(min=0)
    if not normalize:
        return _probabilities(logits, score).gather(-1, chosen) * used
    if score == "softmax":  # from the logits themselves, so that the chosen may all be improbable
        picked = logits.gather(-1, chosen).masked_fill(~used, -math.inf)
        top = picked.amax(-1, keepdim=True) if ids.size(1) else picked
        powers = (picked - torch.where(top.isinf(), 0, top)).exp()
        return powers / powers.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scores = logits.sigmoid().gather(-1, chosen) * used
    return scores / (scores.sum(-1, keepdim=True) + torch.finfo(torch.float32).tiny)


def route_backward_op(
    grad_weights: Tensor,
    grad_sums: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    score: int,
    normalize: bool,
) -> Tensor:
    """The operator mmkernels::route_backward: the gradient of the logits; the choice of experts is constant in it."""
    wide, used, chosen = _wide(logits), expert_ids >= 0, expert_ids.clamp(min=0)
    experts = logits.size(-1)
    of_probability, of_importance, of_z, of_entropy = grad_sums.split((experts, experts, 1, 1))
    softmax = wide.softmax(-1)
    of_weight = torch.where(used, grad_weights + of_importance[chosen], 0)
    if SCORES[score] == "softmax":
        logs = torch.where(softmax > 0, wide.log_softmax(-1), 0)
        of_softmax = of_probability - of_entropy * (logs + 1)
    else:
        scores = wide.sigmoid()
        total = scores.sum(-1, keepdim=True) + torch.finfo(torch.float32).tiny
        shares = scores / total
        of_share = of_probability - of_entropy * (torch.where(shares > 0, shares, 1).log() + 1)
        of_score = (of_share - (of_share * shares).sum(-1, keepdim=True)) / total
    weights = weights_of(wide, expert_ids, SCORES[score], normalize)
    if normalize:
        of_weight = weights * (of_weight - (weights * of_weight).sum(-1, keepdim=True))
        if SCORES[score] == "sigmoid":  # each weight is its score as a part of a sum: by the logarithm of the score
            of_weight = of_weight * (1 - scores.gather(-1, chosen))
        grad = torch.zeros_like(wide).scatter_add(-1, chosen, torch.where(used, of_weight, 0))
    elif SCORES[score] == "softmax":
        of_softmax = of_softmax.expand_as(softmax).scatter_add(-1, chosen, of_weight)
        grad = torch.zeros_like(wide)
    else:
        of_score = of_score.scatter_add(-1, chosen, of_weight)
        grad = torch.zeros_like(wide)
    if SCORES[score] == "softmax":
        grad = grad + softmax * (of_softmax - (softmax * of_softmax).sum(-1, keepdim=True))
    else:
        grad = grad + of_score * scores * (1 - scores)
    return (grad + 2 * of_z * wide.logsumexp(-1, keepdim=True) * softmax).to(logits.dtype)


def expert_choice_op(logits: Tensor, slots: int, capacity: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::expert_choice: every expert takes the `capacity` tokens of each group of `group` tokens that
    have its highest probabilities; a token's slots are the experts that took it, in their order, `slots` at most."""
    logits = _wide(logits)
    if logits.isnan().any():
        raise ValueError("logits: NaN")
    tokens, experts = logits.shape
    probabilities = logits.softmax(-1)
    with torch.no_grad():
        by_group = probabilities.detach().unflatten(0, (-1, max(1, group)))
        best = torch.sort(by_group, dim=1, descending=True, stable=True).indices[:, :capacity]
        taken = torch.zeros_like(by_group, dtype=torch.bool).scatter(1, best, True).flatten(0, 1)
        place = taken.cumsum(-1) - 1
        taken &= place < slots
        ids = torch.full((tokens, slots + 1), -1, device=logits.device)
        named = torch.arange(experts, device=logits.device).expand(tokens, experts)
        ids = ids.scatter(1, torch.where(taken, place, slots), named)[:, :slots].contiguous()
        counts = _counts(ids, experts)
    weights = weights_of(logits, ids, "softmax", False)
    return weights, _sums(logits, probabilities, ids, weights, "softmax"), ids, counts


def capacity_of(tokens: int, slots: int, num_experts: int, factor: float, *, rounded: bool = False) -> int:
    """`factor` times an even share of the slots, rounded up; or to the nearest (IMP's expert choice)."""
    share = factor * tokens * slots / num_experts
    return round(share) if rounded else math.ceil(share)


def expected_loads(clean: Tensor, noisy: Tensor, std: Tensor | float, top_k: int, *, thresholds_of: Tensor) -> Tensor:
    """[E]: the sum over tokens of the chance, over the noise of one expert, that it is among the token's top_k; from the
    logits without and with noise. Thresholds are the values of `thresholds_of` of rank top_k and top_k + 1."""
    top = thresholds_of.topk(min(top_k + 1, thresholds_of.size(-1)), -1).values
    if top.size(-1) <= top_k:
        return torch.full_like(noisy[0], noisy.size(0))
    inside, outside = top[:, top_k, None], top[:, top_k - 1, None]
    threshold = torch.where(noisy > inside, inside, outside)
    return torch.special.ndtr((clean - threshold) / std).sum(0)


def route(
    logits: Tensor,
    top_k: int | None = None,
    *,
    kind: str = "topk_softmax",
    normalize: bool = False,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    selection: Tensor | None = None,
    top_p: float | None = None,
    num_groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "max",
    group_size: int | None = None,
    noise_std: Tensor | float | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    published_thresholds: bool = False,
) -> Routing:
    """Which experts each token goes to, as mmkernels.route says."""
    tokens, experts = logits.shape
    if kind == "expert_choice":
        group = tokens if group_size is None else group_size
        if capacity is None:
            factor = 1.0 if capacity_factor is None else capacity_factor
            capacity = capacity_of(group, 1, experts, factor, rounded=True)
        slots = experts if top_k is None else top_k
        weights, sums, ids, counts = expert_choice_op(logits, slots, min(capacity, group), group)
        most = min(tokens * slots, tokens // max(1, group) * experts * min(capacity, group))
        return Routing(ids, weights, experts, most, sums, counts)
    slots = experts if top_k is None else top_k
    clean, loads = logits, None
    if noise_std is not None:
        if noise is None:
            noise = torch.randn(logits.shape, generator=generator, device=logits.device)
        clean = _wide(logits)
        logits = clean + noise * noise_std
    normalize = normalize or kind in ("topk_softmax", "noisy_topk")
    if capacity is None and capacity_factor is not None:
        capacity = capacity_of(tokens, slots, experts, capacity_factor)
    weights, sums, ids, counts = route_op(
        logits,
        selection,
        slots,
        SCORES.index("sigmoid" if kind == "sigmoid_topk" else "softmax"),
        normalize,
        1.0 if top_p is None else top_p,
        num_groups,
        num_groups if top_groups is None else top_groups,
        GROUP_SCORES.index(group_score),
        -1 if capacity is None else capacity,
    )
    if noise_std is not None:
        thresholds = logits.softmax(-1) if published_thresholds else logits
        loads = expected_loads(clean, logits, noise_std, slots, thresholds_of=thresholds)
    most = tokens * slots if capacity is None else min(tokens * slots, experts * capacity)
    return Routing(ids, weights, experts, most, sums, counts, loads)
