"""F.scaled_dot_product_attention in modules that others wrote, run by mk.attention."""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.integrations.parts import DTYPES
from mmkernels.integrations.rules import Rule, Swapped
from mmkernels.nn.tensor_classes import laid_out, op_takes
from mmkernels.ops.attention import attention


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention by :func:`mmkernels.attention`; by torch itself where the op does not take the
    operands as torch does (:func:`refused`)."""
    if refused(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) is not None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = (laid_out(x) for x in (query, key, value))
    bias = mask = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    if query.dim() == 4:
        return attention(query, key, value, bias=bias, mask=mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    # One head for all that stands before it: without masks, heads are no different from sequences.
    q, k, v = (x[None] if x.dim() == 3 else x.flatten(0, -4) for x in (query, key, value))
    out = attention(q, k, v, bias=bias, mask=mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    return out[0] if query.dim() == 3 else out.unflatten(0, query.shape[:-3])


def refused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why the op does not take these operands as torch's function does; None where it does."""
    if not op_takes(query, key, value, attn_mask):
        return "tensors of another class"
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if query.dim() < 3 or key.dim() != query.dim() or value.dim() != query.dim():
        return "operands of fewer than 3 dimensions, or of different ones"
    if key.shape[:-1] != value.shape[:-1] or key.size(-1) != query.size(-1) or key.shape[:-3] != query.shape[:-3]:
        return "operands to be broadcast"
    heads, kv_heads = query.size(-3), key.size(-3)
    if heads != kv_heads and (not enable_gqa or kv_heads == 0 or heads % kv_heads != 0):
        return "heads to be broadcast"
    if not 0 <= dropout_p < 1:
        return f"dropout_p={dropout_p}"
    if attn_mask is None:
        return None
    if is_causal:
        return "attn_mask beside is_causal"
    if attn_mask.dtype not in (torch.bool, query.dtype) and not (
        attn_mask.dtype == torch.float32 and query.dtype in (torch.bfloat16, torch.float16)
    ):
        return f"attn_mask of {attn_mask.dtype} beside {query.dtype}"
    if attn_mask.dim() > 4 or query.dim() > 4:
        return "a mask of more than 4 dimensions"
    return None


class CallsSdpa(Swapped):
    """A module of any class whose own forward calls F.scaled_dot_product_attention: that forward, which finds :func:`sdpa`
    in its place."""

    @staticmethod
    def members_of(original: type[nn.Module]) -> dict[str, Any]:
        """A copy of the class's forward whose globals hold :func:`sdpa` where torch's function was. (A torch function mode
        would do it too, at a cost for every call of torch, and torch.compile cannot trace all that happens under one.)"""
        return {"forward": with_globals(original.forward, _substitute)}


def with_globals(function: Any, substitute: Callable[[Any], Any]) -> Any:
    """A copy of a function in which each global that it names is `substitute` of it, where that is not None; a decorator
    that holds the function in its closure is copied around it."""
    inner = function.__dict__.get("__wrapped__")
    scope, closure = function.__globals__, function.__closure__
    attributes = dict(function.__dict__)
    if isinstance(inner, FunctionType):
        attributes["__wrapped__"] = with_globals(inner, substitute)
        held = CellType(attributes["__wrapped__"])
        closure = tuple(held if _holds(cell, inner) else cell for cell in closure or ())
    else:
        changed = {name: substitute(scope.get(name)) for name in function.__code__.co_names}
        scope = scope | {name: value for name, value in changed.items() if value is not None}
        del scope["__name__"]  # by which torch.compile would go to the module for them
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__module__, copied.__qualname__, copied.__doc__ = function.__module__, function.__qualname__, function.__doc__
    copied.__dict__.update(attributes)
    return copied


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # nothing yet
        return False


def _substitute(value: Any) -> Any:
    """What stands for a global through which a forward may reach torch's function; None for any other global."""
    if value is F.scaled_dot_product_attention:
        return sdpa
    return _NAMESPACES.get(value) if isinstance(value, ModuleType) else None


def _namespace(module: ModuleType, **changed: Any) -> ModuleType:
    copied = ModuleType(module.__name__)
    copied.__dict__.update(module.__dict__ | changed)
    return copied


_functional = _namespace(F, scaled_dot_product_attention=sdpa)
_nn = _namespace(nn, functional=_functional)
_NAMESPACES = {F: _functional, nn: _nn, torch: _namespace(torch, nn=_nn)}

SDPA_RULE = Rule("", CallsSdpa, ("mk.attention",))


def calls_sdpa(module: nn.Module) -> bool:
    """Whether the module's class calls F.scaled_dot_product_attention in its forward pass."""
    forward = type(module).forward
    return (
        "forward" not in module.__dict__
        and isinstance(forward, FunctionType)
        and "scaled_dot_product_attention" in forward.__code__.co_names
        and not type(module).__module__.startswith("mmkernels.")
    )
