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
where one is. Compiled graphs, functorch transforms and direct calls of the operator meet the same formulas through
``register_autograd``. An integer list costs 0.25 us an entry on its way through the dispatcher, which is why the ranges
that a family uses by default are named by a number instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from mmkernels import runtime
from mmkernels.ops.backends import Backend, choose

LIBRARY = torch.library.Library("mmkernels", "FRAGMENT")

_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling

_ARGUMENT_ERROR = "mmkernels: "


def translated(error: RuntimeError) -> Exception:
    """A C++ error about an argument (core/tensor.h, `check`) as the ValueError that it is; any other as it came."""
    text = str(error)
    start = text.find(_ARGUMENT_ERROR)
    return error if start < 0 else ValueError(text[start + len(_ARGUMENT_ERROR) :].splitlines()[0])


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
    triton: Callable[..., Any],
    reference: Callable[..., Any],
) -> None:
    """What runs where the compiled libraries have no kernel: Triton, and after it, with a warning, the reference.

    `check`, `triton()` and `reference` take the operator's own arguments. `check` raises as compiled code does by itself;
    `triton()` imports the kernels on first use.
    """
    name = op._schema.name.removeprefix("mmkernels::")
    position = [argument.name for argument in op._schema.arguments].index(primary)

    def run(*args: Any) -> Any:
        check(*args)
        explanation = choose(name, backends, {primary: args[position]})
        runtime.record_kernel(name, explanation.kernel)
        if explanation.kernel == "triton":
            return triton()(*args)
        runtime.report_fallback(name, "; ".join(f"{b}: {r}" for b, r in explanation.reasons.items() if r is not None))
        return reference(*args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    if runtime.cuda_library_missing is not None:
        LIBRARY.impl(name, run, "CUDA")


def differentiable(
    op: Any, setup_context: Callable[..., None], backward: Callable[..., Any], *, twice: bool
) -> Callable[..., Any]:
    """The way into `op` for eager, compiled and transformed code alike: call(requires_grad, *arguments of op).

    `setup_context(ctx, inputs, output)` and `backward(ctx, *gradients)` are written once and serve both registrations.
    `twice`: whether backward is itself differentiable; where not, a second derivative raises.
    """
    torch.library.register_autograd(op._schema.name, backward, setup_context=setup_context, lib=LIBRARY)
    direct = op._op  # the overload without the Python method around it: 0.35 us

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            output = direct(*args)
        setup_context(ctx, args, output)
        return output

    Function = type(
        op._schema.name.removeprefix("mmkernels::"),
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(backward if twice else once_differentiable(backward)),
        },
    )
    # What Function.apply does before this is for functorch, which takes the other way.
    apply = super(torch.autograd.Function, Function).apply

    def call(requires_grad: bool, *args: Any) -> Any:
        try:
            if _compiling() or _functorch_active():
                return op(*args)
            if forward_ad._current_level >= 0:
                _reject_forward_mode(op, args)
            if requires_grad and _grad_enabled():
                return apply(*args)
            with _below_autograd():
                return direct(*args)
        except RuntimeError as error:
            raise translated(error) from None

    return call


def not_differentiable(op: Any) -> None:
    """For an operator that is itself a backward pass: a second derivative through it raises instead of being wrong."""
    name = op._schema.name

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"{name} has no derivative: mmkernels does not differentiate this op twice")

    torch.library.register_autograd(name, backward, lib=LIBRARY)


def _reject_forward_mode(op: Any, args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{op._schema.name} has no forward-mode derivative (torch.func.jvp, dual tensors)")
