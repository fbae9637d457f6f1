"""Routing of tokens to experts: scores, the best of each token (or of each expert), weights, statistics for losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mmkernels.ops import backends
from mmkernels.ops.checks import check_float, check_gradient, check_int, check_last_dimension, check_matrix
from mmkernels.ops.entry import define, differentiable, implement, not_differentiable, stats_dtype, wants_gradient
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference import routing as reference
from mmkernels.reference.routing import Routing, RoutingLosses

__all__ = ["Routing", "RoutingLosses", "fixed_routing", "route"]

KINDS = ("topk_softmax", "softmax_topk", "sigmoid_topk", "noisy_topk", "expert_choice")
MAX_EXPERTS = 4096  # a row of scores lies in a core's own cache


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_logits(logits: Any) -> None:
    check_matrix(logits, "logits", "[T, E]", DTYPES)
    if not 1 <= logits.size(1) <= MAX_EXPERTS:
        raise ValueError(f"logits: expected 1 to {MAX_EXPERTS} experts, got shape {tuple(logits.shape)}")


def _check(
    logits: Any,
    selection: Any,
    top_k: int,
    score: int,
    normalize: bool,
    top_p: float,
    num_groups: int,
    top_groups: int,
    group_score: int,
    capacity: int,
) -> None:
    _check_logits(logits)
    check_last_dimension(logits, "logits")
    experts = logits.size(1)
    check_int(top_k, "top_k", 1)
    if top_k > experts:
        raise ValueError(f"top_k: expected at most as many as there are experts, {experts}, got {top_k}")
    if not 0 <= score < len(reference.SCORES):
        raise ValueError(f"score: expected 0 or 1, got {score}")
    if selection is not None:
        if not isinstance(selection, Tensor):
            raise TypeError(f"selection: expected a tensor [E] or [T, E] or None, got {type(selection).__name__}")
        if selection.dtype != stats_dtype(logits):
            raise TypeError(f"selection: expected {stats_dtype(logits)}, got {selection.dtype}")
        if selection.device != logits.device:
            raise ValueError(f"selection: expected the device of logits, {logits.device}, got {selection.device}")
        if selection.shape not in ((experts,), tuple(logits.shape)):
            raise ValueError(f"selection: expected ({experts},) or {tuple(logits.shape)}, got {tuple(selection.shape)}")
        check_last_dimension(selection, "selection")
    check_float(top_p, "top_p")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected 0 to 1, got {top_p}")
    check_int(num_groups, "num_groups", 1)
    if experts % num_groups != 0:
        raise ValueError(f"num_groups: expected a divisor of the {experts} experts, got {num_groups}")
    check_int(top_groups, "top_groups", 1)
    if top_groups > num_groups:
        raise ValueError(f"top_groups: expected at most num_groups, {num_groups}, got {top_groups}")
    if not 0 <= group_score < len(reference.GROUP_SCORES):
        raise ValueError(f"group_score: expected 0 or 1, got {group_score}")
    check_int(capacity, "capacity", -1)


def _check_backward(grad_weights: Any, grad_sums: Any, logits: Any, expert_ids: Any, score: int, normalize: bool) -> None:
    _check_logits(logits)
    check_last_dimension(logits, "logits")
    dtypes = (stats_dtype(logits),)
    check_gradient(grad_weights, "grad_weights", tuple(expert_ids.shape), dtypes, logits)
    check_gradient(grad_sums, "grad_sums", (2 * logits.size(1) + 2,), dtypes, logits)


def _check_choice(logits: Any, slots: int, capacity: int, group: int) -> None:
    _check_logits(logits)
    check_last_dimension(logits, "logits")
    check_int(slots, "top_k", 1)
    if slots > logits.size(1):
        raise ValueError(f"top_k: expected at most as many as there are experts, {logits.size(1)}, got {slots}")
    check_int(capacity, "capacity", 0)
    check_int(group, "group_size", 0)
    if group == 0 and logits.size(0) > 0:
        raise ValueError("group_size: expected at least 1, got 0")
    if group and (capacity > group or logits.size(0) % group != 0):
        raise ValueError(
            f"group_size: expected a divisor of the {logits.size(0)} tokens, at least the capacity {capacity}; got {group}"
        )


# --- operators --------------------------------------------------------------------------------------------------------
def _outputs(logits: Tensor, slots: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    dtype, device = stats_dtype(logits), logits.device
    return (
        torch.empty((tokens, slots), dtype=dtype, device=device),
        torch.empty((2 * experts + 2,), dtype=dtype, device=device),
        torch.empty((tokens, slots), dtype=torch.int64, device=device),
        torch.empty((2, experts), dtype=torch.int64, device=device),
    )


def _fake(logits: Tensor, selection: Any, top_k: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(logits, selection, top_k, *rest)
    return _outputs(logits, top_k)


def _fake_backward(grad_weights: Tensor, grad_sums: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    _check_backward(grad_weights, grad_sums, logits, *rest)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_choice(logits: Tensor, slots: Any, capacity: Any, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_choice(logits, slots, capacity, group)
    return _outputs(logits, slots)


_RESULTS = "(Tensor weights, Tensor sums, Tensor expert_ids, Tensor counts)"
_op = define(
    "route(Tensor logits, Tensor? selection, SymInt top_k, int score, bool normalize, float top_p, int num_groups, "
    f"int top_groups, int group_score, SymInt capacity) -> {_RESULTS}",
    _fake,
)
_choice_op = define(
    f"expert_choice(Tensor logits, SymInt slots, SymInt capacity, SymInt group) -> {_RESULTS}",
    _fake_choice,
)
_backward_op = define(
    "route_backward(Tensor grad_weights, Tensor grad_sums, Tensor logits, Tensor expert_ids, int score, bool normalize) "
    "-> Tensor",
    _fake_backward,
)

BACKENDS = (
    backends.cpu(backends.VECTOR_TIERS, primary="logits"),
    backends.triton(backends.HALF_AND_SINGLE, primary="logits"),
    backends.REFERENCE,
)

implement(
    _op,
    BACKENDS,
    "logits",
    check=_check,
    reference=reference.route_op,
    triton=backends.triton_kernel("routing", "route"),
)
implement(
    _choice_op,
    BACKENDS,
    "logits",
    check=_check_choice,
    reference=reference.expert_choice_op,
    triton=backends.triton_kernel("routing", "expert_choice"),
)
implement(
    _backward_op,
    BACKENDS,
    "logits",
    check=_check_backward,
    reference=reference.route_backward_op,
    triton=backends.triton_kernel("routing", "route_backward"),
)


# --- autograd ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.how = inputs[3:5]
    _keep(ctx, inputs[0], output)


def _setup_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.how = (0, False)
    _keep(ctx, inputs[0], output)


def _keep(ctx: Any, logits: Tensor, output: tuple[Tensor, ...]) -> None:
    _, _, ids, counts = output
    ctx.save_for_backward(logits, ids)
    ctx.mark_non_differentiable(ids, counts)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_weights: Tensor | None, grad_sums: Tensor | None) -> Tensor | None:
    if grad_weights is None and grad_sums is None:
        return None
    logits, ids = ctx.saved_tensors
    wide = stats_dtype(logits)
    if grad_weights is None:
        grad_weights = logits.new_zeros(ids.shape, dtype=wide)
    if grad_sums is None:
        grad_sums = logits.new_zeros((2 * logits.size(1) + 2,), dtype=wide)
    return _call_backward(
        any(tensor.requires_grad for tensor in (grad_weights, grad_sums, logits)),
        grad_weights.contiguous(),
        grad_sums.contiguous(),
        logits,
        ids,
        *ctx.how,
    )


def _backward(ctx: Any, grad_weights: Tensor | None, grad_sums: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (_gradient(ctx, grad_weights, grad_sums), *[None] * 9)


def _backward_choice(ctx: Any, grad_weights: Tensor | None, grad_sums: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (_gradient(ctx, grad_weights, grad_sums), None, None, None)


_call_backward = not_differentiable(_backward_op)
_call = differentiable(_op, _setup, _backward, twice=False)
_call_choice = differentiable(_choice_op, _setup_choice, _backward_choice, twice=False)


# --- public functions -------------------------------------------------------------------------------------------------
def check_capacity(kind: Any, capacity_factor: Any, group_size: Any) -> None:
    """What `route` and the modules that call it take of these two."""
    if capacity_factor is not None:
        check_float(capacity_factor, "capacity_factor")
        if not 0 <= capacity_factor < float("inf"):
            raise ValueError(f"capacity_factor: expected a number of at least 0, got {capacity_factor}")
    if group_size is not None:
        check_int(group_size, "group_size", 1)
        if kind != "expert_choice":
            raise ValueError(f"group_size: expected None with kind {kind!r}; it is for expert_choice")


def _check_options(
    kind: Any,
    capacity: Any,
    capacity_factor: Any,
    top_p: Any,
    group_score: Any,
    group_size: Any,
    noise_std: Any,
    only_for_top_k: dict[str, Any],
) -> None:
    if not isinstance(kind, str):
        raise TypeError(f"kind: expected a name, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if capacity is not None:
        check_int(capacity, "capacity", 0)
        if capacity_factor is not None:
            raise ValueError("capacity_factor: expected None beside a capacity")
    check_capacity(kind, capacity_factor, group_size)
    if top_p is not None:
        check_float(top_p, "top_p")
    if group_score not in reference.GROUP_SCORES:
        raise ValueError(f"group_score: expected one of {', '.join(reference.GROUP_SCORES)}, got {group_score!r}")
    if kind == "expert_choice":
        for name, given in only_for_top_k.items():
            if given:
                raise ValueError(f"{name}: expert_choice has no use for it")
    if kind == "noisy_topk" and noise_std is None:
        raise ValueError("noise_std: noisy_topk needs it in training; without noise the kind is topk_softmax")


def _noise(logits: Tensor, noise_std: Any, noise: Any, generator: Any) -> Tensor:
    if isinstance(noise_std, Tensor):
        if noise_std.shape != logits.shape or noise_std.device != logits.device:
            raise ValueError(
                f"noise_std: expected a float or a tensor of the shape and device of logits, {tuple(logits.shape)}, got "
                f"{tuple(noise_std.shape)}"
            )
    else:
        check_float(noise_std, "noise_std")
    if noise is None:
        noise = torch.randn(logits.shape, generator=generator, device=logits.device, dtype=stats_dtype(logits))
    elif not isinstance(noise, Tensor):
        raise TypeError(f"noise: expected a tensor or None, got {type(noise).__name__}")
    elif noise.shape != logits.shape or noise.device != logits.device:
        raise ValueError(f"noise: expected the shape and device of logits, {tuple(logits.shape)}, got {tuple(noise.shape)}")
    return noise


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
    """Routes T tokens to E experts: scores, the chosen experts, their weights and what auxiliary losses are made of.

    ================  ====================================================================================================
    kind              each token goes to
    ================  ====================================================================================================
    topk_softmax      its `top_k` largest logits, with the softmax over these (Mixtral, Uni-MoE)
    softmax_topk      the same, with the softmax over all E (M3ViT); `normalize`: as parts of their sum, the same as above
    sigmoid_topk      the largest sigmoids, with these as weights; `normalize`: as parts of their sum (DeepSeek-V3)
    noisy_topk        topk_softmax of logits + noise * noise_std (Shazeer); the load loss is of expected counts
    expert_choice     every expert that takes it: each takes the `capacity` tokens with its highest softmax (IMP)
    ================  ====================================================================================================

    Ties go to the lower index. For other routes (modalities, skills, tasks) see :func:`fixed_routing`; a gate for each task
    is a matter of which logits are given.

    Args:
        logits: [T, E]; float32, bfloat16, float16 or float64; computed in float32 (float64).
        top_k: slots a token, K, at most E. None: E, which with `top_p` or expert_choice drops nothing.
        normalize: see above.
        capacity: slots an expert has (in each group, for expert_choice). Beyond it slots are dropped: all first choices come
            first, in the order of the tokens, then all second ones. Dropped slots have id -1 and weight 0, and with
            `normalize` the others share their weight. None: no slot is dropped.
        capacity_factor: the same as a multiple of an even share: ceil(factor T K / E), for expert_choice
            round(factor T / E), by default 1.
        selection: [E] or [T, E] in float32 (float64 beside float64), added to what experts are chosen by (the logits, or
            of sigmoid_topk the sigmoids), not to weights; no gradient. A bias that balances loads (DeepSeek-V3), Gumbel
            noise of the second choice (GShard), minus infinity for experts that are away.
        top_p: of the chosen keep the fewest, one at least, whose probabilities sum to `top_p` (Uni-MoE's dynamic k).
        num_groups, top_groups: experts are `num_groups` runs; only the best `top_groups` of these are chosen from, by their
            best expert (`group_score` "max") or the sum of their best two ("top2"; DeepSeek).
        group_size: expert_choice among so many tokens at a time (IMP), None: among all.
        noise_std: float or [T, E], the noise's standard deviation, differentiable; for noisy_topk and softmax_topk.
        noise: [T, E] standard normal numbers; None: drawn from `generator`.
        published_thresholds: the load loss of M3ViT as published, which compares logits with thresholds among probabilities.

    Returns:
        A :class:`Routing`: `expert_ids` [T, K], `weights` [T, K] in float32, and `losses`, computed when they are asked for.
        In decreasing order, but of expert_choice in the order of the experts. Gradients of the logits from the weights and
        all losses, not twice; the choice is constant in them. The same bits for any number of threads.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes do not fit, numbers out of range, NaN in logits (on the CPU; on CUDA a NaN counts as minus
            infinity), options that the kind has no use for.
        NotImplementedError: a second derivative.

    Source: see mmkernels.reference.routing.
    """
    only_for_top_k = {
        "normalize": normalize,
        "selection": selection is not None,
        "top_p": top_p is not None,
        "num_groups": num_groups != 1,
        "top_groups": top_groups is not None,
        "noise_std": noise_std is not None,
    }
    _check_options(kind, capacity, capacity_factor, top_p, group_score, group_size, noise_std, only_for_top_k)
    _check_logits(logits)
    tokens, experts = logits.shape
    slots = experts if top_k is None else top_k
    if kind == "expert_choice":
        return _expert_choice(logits, slots, capacity, capacity_factor, group_size)
    check_int(slots, "top_k", 1)
    clean, loads = logits, None
    if noise_std is not None:
        noise = _noise(logits, noise_std, noise, generator)
        clean = logits.to(stats_dtype(logits))
        logits = clean + noise * noise_std
    if capacity is None and capacity_factor is not None:
        capacity = reference.capacity_of(tokens, slots, experts, capacity_factor)
    if isinstance(selection, Tensor) and selection.dim() > 0 and selection.stride(-1) != 1:
        selection = selection.contiguous()
    arguments = (
        logits if logits.stride(1) == 1 else logits.contiguous(),
        selection,
        slots,
        reference.SCORES.index("sigmoid" if kind == "sigmoid_topk" else "softmax"),
        normalize or kind in ("topk_softmax", "noisy_topk"),
        1.0 if top_p is None else top_p,
        num_groups,
        num_groups if top_groups is None else top_groups,
        reference.GROUP_SCORES.index(group_score),
        -1 if capacity is None else capacity,
    )
    if is_compiling():
        _check(*arguments)
    try:
        weights, sums, ids, counts = _call(wants_gradient(logits), *arguments)
    except Exception:
        _check(*arguments)
        raise
    if noise_std is not None:
        thresholds = logits.softmax(-1) if published_thresholds else logits
        loads = reference.expected_loads(clean, logits, noise_std, slots, thresholds_of=thresholds)
    most = tokens * slots if capacity is None else min(tokens * slots, experts * capacity)
    return Routing(ids, weights, experts, most, sums, counts, loads)


def _expert_choice(
    logits: Tensor, slots: int, capacity: int | None, capacity_factor: float | None, group_size: int | None
) -> Routing:
    tokens, experts = logits.shape
    group = tokens if group_size is None else group_size
    if capacity is None:
        factor = 1.0 if capacity_factor is None else capacity_factor
        capacity = reference.capacity_of(group, 1, experts, factor, rounded=True)
    arguments = (logits if logits.stride(1) == 1 else logits.contiguous(), slots, min(capacity, group), group)
    if is_compiling():
        _check_choice(*arguments)
    try:
        weights, sums, ids, counts = _call_choice(wants_gradient(logits), *arguments)
    except Exception:
        _check_choice(*arguments)
        raise
    most = min(tokens * slots, tokens // max(1, group) * experts * arguments[2])
    return Routing(ids, weights, experts, most, sums, counts)


def fixed_routing(expert_ids: Tensor, num_experts: int, weights: Tensor | None = None) -> Routing:
    """A routing that is given, not learned: by modality (MoT, ONE-PEACE, PILL), skills (SkillNet) or tasks.

    Args:
        expert_ids: [T] or [T, K] integers, -1 for unused slots; their range is checked where the routing is used.
        num_experts: E.
        weights: of the shape of expert_ids, floating point; None: 1 for every slot.

    Returns:
        A :class:`Routing` without losses.

    Raises:
        TypeError, ValueError: an argument of another type or shape.
    """
    if not isinstance(expert_ids, Tensor):
        raise TypeError(f"expert_ids: expected a tensor [T] or [T, K], got {type(expert_ids).__name__}")
    if expert_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"expert_ids: expected integers, got {expert_ids.dtype}")
    if expert_ids.dim() not in (1, 2):
        raise ValueError(f"expert_ids: expected [T] or [T, K], got shape {tuple(expert_ids.shape)}")
    check_int(num_experts, "num_experts", 1)
    if weights is None:
        weights = torch.ones_like(expert_ids, dtype=torch.get_default_dtype())  # a DTensor beside one
    elif not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError("weights: expected a tensor of floating-point numbers, or None")
    elif weights.shape != expert_ids.shape:
        raise ValueError(f"weights: expected the shape of expert_ids, {tuple(expert_ids.shape)}, got {tuple(weights.shape)}")
    if expert_ids.dim() == 1:
        expert_ids, weights = expert_ids[:, None], weights[:, None]
    return Routing(expert_ids.to(torch.int64), weights, num_experts, expert_ids.numel())
