"""How a public function reaches its operator: schema, autograd, errors, fallbacks. Every family goes this way.

Python owns the schema, the tags, the fake kernel, autograd and autocast; C++ only implements. The route into an operator
was chosen by measuring it, once, with token rolling at a size where the kernel is nothing (`mmkernels bench --family
token_roll` shows today's figures; these were taken on a 2-core AMD EPYC 7003, torch 2.13, microseconds a call):

======================================================  =======  =========
route                                                   no grad  with grad
======================================================  =======  =========
``torch.library.custom_op``                                  30         60
``Library.define`` + ``register_autograd``                   15         36
``define``, and a ``Function`` with ``setup_context``         --         53
``define``, and a ``Function`` with combined forward          --         16
the same, called below ``Function.apply``'s Python part       --         12
``define``, called below the autograd keys                  5.6         --
======================================================  =======  =========

So an eager call goes below the autograd keys where no gradient is wanted, and through a combined-forward ``Function``
where one is. Compiled graphs and direct calls of the operator meet the same formulas through ``register_autograd``,
functorch transforms through a ``Function`` in the form that they need. An integer list costs 0.25 us an entry on its way
through the dispatcher, which is why the ranges that a family uses by default are named by a number instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from mmkernels import runtime
from mmkernels.ops.backends import Backend, choose

LIBRARY = torch.library.Library("mmkernels", "FRAGMENT")

# Operator -> what runs where the compiled libraries have no kernel (see `implement`).
PYTHON_KERNELS: dict[str, Callable[..., Any]] = {}

# Operator -> its own signature in plain torch: the last fallback, and what tests hold the kernels against.
REFERENCES: dict[str, Callable[..., Any]] = {}

_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling

_ARGUMENT_ERROR = "mmkernels: "
_OUT_OF_MEMORY = "mmkernels out of memory: "


def translated(error: RuntimeError) -> Exception:
    """A C++ error (csrc/common/tensor.h) as what it is: about an argument a ValueError, about memory the error that torch
    raises for it, which whoever looks for a batch size catches; any other as it came."""
    text = str(error)
    for prefix, kind in ((_ARGUMENT_ERROR, ValueError), (_OUT_OF_MEMORY, torch.OutOfMemoryError)):
        start = text.find(prefix)
        if start >= 0:
            return kind(text[start + len(prefix) :].splitlines()[0])
    return error


def define(schema: str, fake: Callable[..., Any]) -> Any:
    """Registers an operator and its fake kernel; the schema begins with its name. Returns the overload."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mmkernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.mmkernels, name).default


def implement(
    op: Any,
    backends: tuple[Backend, ...],
    primary: str,
    *,
    check: Callable[..., Any],
    reference: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    torch_formula: Callable[..., Any] | None = None,
) -> None:
    """What runs where the compiled libraries have no kernel: Triton, torch's own formula where `backends` says that it is
    the best there is, and last, with a warning, the reference. `cuda` is for operators of which the CUDA library takes some
    calls, as an operator of its own, and others are Triton's.

    `check`, `triton()`, `cuda`, `torch_formula` and `reference` take the operator's own arguments. `check` raises as
    compiled code does by itself; `triton()` imports the kernels on first use.
    """
    name = op._schema.name.removeprefix("mmkernels::")
    names = [argument.name for argument in op._schema.arguments]
    position = names.index(primary)

    def run(*args: Any) -> Any:
        check(*args)
        explanation = choose(name, backends, dict(zip(names, args, strict=False)))  # arguments with defaults may be missing
        runtime.record_kernel(name, explanation.kernel)
        if explanation.kernel == "torch" and torch_formula is not None:
            return torch_formula(*args)
        if explanation.kernel == "cuda" and cuda is not None:
            return cuda(*args)
        if explanation.kernel == "triton" and triton is not None:
            with torch.cuda.device_of(args[position]):  # Triton launches on the current device, whatever the tensors'
                return triton()(*args)
        runtime.report_fallback(name, "; ".join(f"{b}: {r}" for b, r in explanation.reasons.items() if r is not None))
        return reference(*args)

    PYTHON_KERNELS[op._schema.name] = run
    REFERENCES[op._schema.name] = reference
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    if runtime.cuda_library_missing is not None:
        LIBRARY.impl(name, run, "CUDA")


def differentiable(
    op: Any, setup_context: Callable[..., None], backward: Callable[..., Any], *, twice: bool
) -> Callable[..., Any]:
    """The way into `op` for eager, compiled and transformed code alike: call(requires_grad, *arguments of op).

    `setup_context(ctx, inputs, output)` and `backward(ctx, *gradients)` are written once and serve all registrations.
    `twice`: whether backward is itself differentiable; where not, a second derivative raises.
    """
    name = op._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    direct = op._op  # the overload without the Python method around it: 0.35 us

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            output = direct(*args)
        setup_context(ctx, args, output)
        return output

    Function = type(
        name.removeprefix("mmkernels::"),
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward if twice else _once(backward, name))},
    )

    class UnderFunctorch(torch.autograd.Function):
        """The same for torch.func.grad, vmap and their like, which need forward and setup_context apart."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            with _below_autograd():
                return op(*args)

    UnderFunctorch.setup_context = staticmethod(setup_context)  # type: ignore[method-assign, assignment]
    # Dynamo compiles what torch.func calls back, and stumbles over its wrapped tensors.
    UnderFunctorch.backward = staticmethod(torch.compiler.disable(backward))  # type: ignore[method-assign]

    # What Function.apply does before this is for functorch, which takes the other way.
    apply = super(torch.autograd.Function, Function).apply  # type: ignore[misc]

    def call(requires_grad: bool, *args: Any) -> Any:
        try:
            if _functorch_active():
                if _compiling():  # torch.compile traces no Function of this kind, and through the operator no derivative
                    raise NotImplementedError(f"{name}: torch.compile around torch.func transforms; compile what is inside")
                return UnderFunctorch.apply(*args)
            if _compiling():
                return op(*args)
            if forward_ad._current_level >= 0:
                _reject_forward_mode(name, args)
            if requires_grad and _grad_enabled():
                return apply(*args)
            with _below_autograd():
                return direct(*args)
        except RuntimeError as error:
            raise translated(error) from None

    return call


def not_differentiable(op: Any) -> Callable[..., Any]:
    """The way into an operator that is itself a backward pass: call(False, *arguments of op). Its derivative raises."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: backward only raises."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise _no_second_derivative(op._schema.name)

    return differentiable(op, setup_context, backward, twice=True)


def _no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name}: mmkernels does not differentiate this op twice")


class _Refuse(torch.autograd.Function):
    """The identity, tied to everything that a gradient was computed from, whose own backward raises."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise _no_second_derivative(ctx.name)


class _ReadOnce:
    """A backward pass's context whose saved tensors may be read again: activation checkpointing hands them out once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _once(backward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`backward` whose results, under create_graph, raise when they are differentiated with respect to anything.

    torch's once_differentiable ties them to the upstream gradients alone: with respect to the op's inputs, the second
    derivative would be missing instead of refused.
    """

    def wrapped(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        ctx = _ReadOnce(ctx)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        sources = [t for t in (*ctx.saved_tensors, *gradients) if isinstance(t, torch.Tensor) and t.requires_grad]
        return tuple(_Refuse.apply(name, r, *sources) if isinstance(r, torch.Tensor) else r for r in results)

    return wrapped


def contiguous(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient as kernels take it, or none."""
    return None if gradient is None else gradient.contiguous()


def empty_heads(like: torch.Tensor, shape: tuple[Any, ...], packed: bool) -> torch.Tensor:
    """[B, H, L, D] that lies in memory as [B, L, H, D], so that putting the heads together again needs no copy."""
    if packed:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    batch, heads, length, channels = shape
    return torch.empty((batch, length, heads, channels), dtype=like.dtype, device=like.device).transpose(1, 2)


def stats_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of means, variances and sums over x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_widens_norms(device: torch.device) -> bool:
    """Whether torch's autocast now runs normalisations in float32 there: on the CPU it leaves their dtype alone."""
    return device.type != "cpu" and torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _autocast_available(device: str) -> bool:
    """Asked while torch traces: the compiler of torch 2.10 cannot look into it."""
    return torch.amp.is_autocast_available(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which torch's autocast now runs matrix products of x; None where it leaves them alone."""
    if x.is_cpu:  # the way that is walked most often, without a question that costs half a microsecond
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    device = x.device.type
    if not _autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these will be differentiated, so that its forward pass must keep what backward needs."""
    if _functorch_active():
        return True
    if not _grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator costs a microsecond
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _reject_forward_mode(name: str, args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative (torch.func.jvp, dual tensors)")
