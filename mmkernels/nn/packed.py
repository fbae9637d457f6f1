"""Who keeps the packed weight of a layer, and when it is made.

A layer is packed in eval mode, on the CPU, as long as its weight and bias are plain parameters:

- by every event that ends in eval mode with possibly other weights: ``eval()`` itself, and in eval mode ``load_state_dict``,
  ``.to()`` and its like, copying and unpickling, and :func:`repack`. So ``torch.compile`` finds the packs right after any;
- by an eager call that finds no pack, or an old one.

A pack serves the very parameters that it was made of, and only while their memory, dtype, layout and version counter are
what they were then; a compiled graph looks at the memory and the version while it runs. Whatever else stands in the place
of the parameters (``functional_call``, a parametrization, a tensor subclass, another device) is used unpacked. ``train()``
drops the pack, and so does a call that wants a gradient of the weight: what follows may be the step of a fused optimizer,
whose writes torch does not count. (Not in int8, where the call would then give other numbers than the next one.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import assume_constant_result, is_compiling, is_exporting

from mmkernels.ops.packed_linear import PackedLinear, pack_linear

AnyModule = TypeVar("AnyModule", bound=nn.Module)
AnyPacking = TypeVar("AnyPacking", bound="Packing")


class WeightPack:
    """The pack of one weight and its bias, or none. Copies and pickles of it are empty.

    Args:
        dtype: None packs in the weight's own dtype; torch.int8 quantises.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.int8):
            raise ValueError(f"packed_dtype: expected None (the dtype of the weight) or torch.int8, got {dtype!r}")
        self.dtype = dtype
        self._packed: PackedLinear | None = None
        self._seen: tuple[int, int] | None = None

    def of(self, weight: Tensor, bias: Tensor | None) -> PackedLinear | None:
        """The pack for a call with these, made now if need be; None where the call should use them as they are."""
        if is_compiling() and _exporting():  # an exported program holds no layout of this processor
            return None
        if self.dtype is None and weight.requires_grad and torch.is_grad_enabled():
            # It is about to change, and torch counts no writes of a fused optimizer. (A graph that asked whose pack this is
            # would have to be compiled again once it has gone.)
            if is_compiling() or (self._packed is not None and self._packed.weight is weight):
                self.drop()
            return None
        packed = self._packed
        known = self._is_of(weight, bias)
        if is_compiling():  # the graph takes the pack as an input, and looks at its version while it runs
            return packed if known else None
        if packed is not None and known and packed.is_current():
            return packed
        if not _packable(weight, bias):
            return None
        # Others than those packed may be here for this call alone (functional_call): they are packed the second time.
        pair = (id(weight), id(bias))
        if packed is not None and not known and self.dtype is None and self._seen != pair:
            self._seen = pair
            return None
        return self._pack(weight, bias)

    def prepare(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Packs these ahead of calls, unless that is done; drops the pack of whatever cannot be packed."""
        packed = self._packed
        if is_compiling() or (packed is not None and self._is_of(weight, bias) and packed.is_current()):
            return
        self.drop()
        if weight is not None and _packable(weight, bias):
            self._pack(weight, bias)

    def _is_of(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        return self._packed is not None and self._packed.weight is weight and self._packed.bias is bias

    def drop(self) -> None:
        self._packed = self._seen = None

    def _pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear | None:
        self.drop()
        with suppress(TypeError, ValueError):  # what is wrong with them, the op says better when it is called
            self._packed = pack_linear(weight, bias, dtype=self.dtype)
        return self._packed

    def __reduce__(self) -> tuple[type[WeightPack], tuple[torch.dtype | None]]:
        return WeightPack, (self.dtype,)


@assume_constant_result  # type: ignore[untyped-decorator]
def _exporting() -> bool:
    """Asked while torch traces: before torch 2.11 its compiler takes is_exporting() for true in whatever it compiles."""
    return is_exporting()


def _packable(weight: Tensor, bias: Tensor | None) -> bool:
    return (
        type(weight) is nn.Parameter
        and (bias is None or type(bias) is nn.Parameter)
        and weight.device.type == "cpu"
        and not weight.is_inference()  # its writes are not counted
        and 1 in weight.stride()[-2:]  # others would be copied, and the copy not followed
        and (weight.data_ptr() != 0 or weight.numel() == 0)  # FSDP frees the memory of weights between calls
    )


class Packing(nn.Module):
    """What a module that packs its weights derives from, before torch's module: the events that a pack lives by.

    The module has `kernels`, and makes `_pack` before any of these events; one with several packs names them all.
    """

    _pack: WeightPack
    _packed_parameters = ("weight", "bias")

    def _packs(self) -> Iterable[tuple[WeightPack, str, str]]:
        """Each pack with the names of the weight and the bias that it is made of."""
        return ((self._pack, *self._packed_parameters),)

    def _drop_packs(self) -> None:
        for pack, _, _ in self._packs():
            pack.drop()

    def repack(self) -> None:
        """Packs the weights anew, as they are now, after writes that torch does not count; in training mode there is no
        pack."""
        self._drop_packs()
        self.prepare_pack()

    def prepare_pack(self) -> None:
        """What an event that may have changed mode or weight ends with: a pack in eval mode, none in training."""
        if self.training or not self.kernels:
            self._drop_packs()
            return
        for pack, *names in self._packs():
            # Not the attributes, which a parametrization would compute.
            weight, bias = (self._parameters.get(name) for name in names)
            pack.prepare(weight, bias)

    def train(self: AnyPacking, mode: bool = True) -> AnyPacking:
        super().train(mode)
        self.prepare_pack()
        return self

    def _apply(self: AnyPacking, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnyPacking:
        self._drop_packs()
        super()._apply(fn, recurse)
        self.prepare_pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_packs()
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare_pack()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare_pack()


def repack(model: AnyModule) -> AnyModule:
    """Packs the weights of every layer of `model` anew, as they are now; layers in training mode have no pack.

    Needed after writes in eval mode that torch does not count: into ``weight.data`` (as where adapters are merged) or a
    NumPy view, or by foreign code (a collective, in int8 a fused optimizer) into the memory itself. Others are noticed.

    Args:
        model: any module with layers of this package in it.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, Packing):
            module.repack()
    return model
