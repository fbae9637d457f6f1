"""Weights of linear layers, packed once for the processor's matrix kernels and used by many calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from mmkernels.ops.checks import check_biases, check_matrix, check_parameter
from mmkernels.ops.entry import define, translated

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = {**{dtype: number for number, dtype in enumerate(DTYPES)}, torch.int8: len(DTYPES)}
_VERSION_OFFSET = 40  # of PackedHeader, in csrc/cpu/linear.cpp


def _fake_pack(weight: Tensor, number: int, version: int) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()  # depends on the tier that packs
    return torch.empty((size,), dtype=torch.uint8, device=weight.device)


def _version_of(weight: Tensor) -> int:
    """Counts the writes that torch knows of; -1 for inference tensors, which do not count."""
    return -1 if weight.is_inference() else weight._version


def _layout_of(weight: Tensor) -> tuple[Any, ...]:
    return weight.dtype, tuple(weight.shape), tuple(weight.stride())


@contextmanager
def _outside_transforms() -> Iterator[None]:
    """A pack outlives the call that makes it: an ordinary tensor, whatever mode or transform the call is under."""
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), _disable_current_modes():
        yield


def _check_packs(weights: list[Tensor], packs: list[Tensor]) -> Tensor:
    """For each pack whether its weight is unchanged since: asked by compiled graphs, while they run."""
    same = [
        ctypes.c_int64.from_address(pack.data_ptr() + _VERSION_OFFSET).value == _version_of(weight) >= 0
        for weight, pack in zip(weights, packs, strict=True)
    ]
    return torch.tensor(same, dtype=torch.bool)


_pack_op = define("pack_linear(Tensor weight, int number, int version) -> Tensor", _fake_pack)
_check_op = define(
    "check_packs(Tensor[] weights, Tensor[] packs) -> Tensor",
    lambda weights, packs: torch.empty((len(packs),), dtype=torch.bool, device=packs[0].device),
)
torch.library.impl("mmkernels::check_packs", "CPU", _check_packs)


class PackedLinear:
    """A linear layer's weight [N, K] and bias [N], packed for the matrix kernels of this processor; or those of experts,
    [E, N, K] and [E, N].

    Made by :func:`mmkernels.pack_linear`; taken by :func:`mmkernels.linear` and :func:`mmkernels.mlp` (of experts by
    :func:`mmkernels.moe_mlp` and :func:`mmkernels.grouped_linear`) in place of the weight. It refers to the weight that it
    was made of and follows it: every call looks whether the weight was written to since (its version counter), or given
    other memory (an assigned ``.data``), and packs again where it was. Writes that torch does not count (into ``.data`` or a
    NumPy view) need :meth:`repack`. Gradients go to the weight itself.

    Copies (copy.deepcopy, pickle, torch.save) hold the plain weight and pack it anew on the machine where they are used.

    Attributes:
        weight, bias: as they were given.
        dtype: of the packed elements: the weight's own, which is followed too, or int8.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight
        self.bias = bias
        self.dtype = dtype
        self._panels: Tensor | None = None
        self._version = -1
        self._pointer = 0
        self._layout: tuple[Any, ...] | None = None
        self._source: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.size(-2)

    @property
    def in_features(self) -> int:
        return self.weight.size(-1)

    def is_current(self) -> bool:
        """Whether the packed bytes are of the weight as it is now, as far as torch can tell."""
        weight, source = self.weight, self._source
        try:
            same = self._version == weight._version and self._pointer == weight.data_ptr()
        except RuntimeError:  # an inference tensor, whose writes are not counted
            return False
        return same and (source is None or (source.dtype == weight.dtype and source.is_set_to(weight)))

    def repack(self) -> PackedLinear:
        """Packs the weight as it is now."""
        if self.dtype != torch.int8:
            self.dtype = self.weight.dtype
        with _outside_transforms():
            version, source = _version_of(self.weight), self.weight.detach()
            panels = None  # other devices multiply by torch's own kernels, and strides that need a copy are not followed
            if source.device.type == "cpu" and 1 in source.stride()[-2:]:
                try:
                    panels = _pack_op(source, _NUMBERS[self.dtype], version)
                except RuntimeError as error:
                    raise translated(error) from None
        # The version last: a thread that looks in between packs once more. The source keeps the memory that was packed
        # from: its address cannot come back as that of other numbers.
        self._panels, self._source = panels, source
        self._layout, self._pointer = _layout_of(source), source.data_ptr()
        self._version = version
        return self

    def panels(self) -> Tensor | None:
        """The packed bytes, of the weight as it is now; None where this device has no kernel for them."""
        # A graph takes the bytes as an input, and asks whether they are current while it runs.
        if is_compiling():
            return self._panels if self._layout is None or self._layout == _layout_of(self.weight) else None
        if not isinstance(self.weight, FakeTensor) and not self.is_current():
            self.repack()
        return self._panels

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        self.repack()

    def __repr__(self) -> str:
        return (
            f"PackedLinear(in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype})"
        )


def _flatten(packed: PackedLinear) -> tuple[list[Any], Any]:
    return [packed.weight, packed.bias, packed._panels], (packed.dtype, packed._version, packed._pointer, packed._layout)


def _unflatten(values: Any, context: Any) -> PackedLinear:
    weight, bias, panels = values
    packed = PackedLinear(weight, bias, context[0])
    packed._panels = panels
    _, packed._version, packed._pointer, packed._layout = context
    return packed


_pytree.register_pytree_node(
    PackedLinear,
    _flatten,
    _unflatten,
    serialized_type_name="mmkernels.PackedLinear",
    to_dumpable_context=None,
)


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> PackedLinear:
    """Packs a linear layer's weight once, for :func:`linear` and :func:`mlp` to use many times.

    Args:
        weight: [N, K], as nn.Linear keeps it, or one for each expert, [E, N, K]; float32, bfloat16, float16 or float64.
        bias: [N], or [E, N], or None; in the weight's dtype, or float32 beside half precision.
        dtype: the dtype that x will have: by default the weight's own, in which case the handle follows the weight; another
            one makes a converted copy of the weight, which nothing changes. torch.int8 quantises each output channel to
            integers times a scale (largest magnitude / 127): x may then be float32, bfloat16 or float16, and is quantised
            row by row in each call; a row with an infinity or NaN in it gives NaN.

    Returns:
        A PackedLinear. On other devices than the CPU it holds the weight alone: their matrix products are torch's own.

    Raises:
        TypeError: weight or bias is no dense tensor of these dtypes, dtype none of them.
        ValueError: weight has another rank, bias another length or device.

    Source: prepacking as in every matrix library; int8 with dynamic rows as in "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale" (2022), without its outliers.
    """
    if isinstance(weight, Tensor) and weight.dim() == 3:
        check_matrix(weight, "weight", "[E, N, K]", DTYPES)
        check_biases(bias, "bias", tuple(weight.shape[:2]), weight, "weight")
    else:
        check_matrix(weight, "weight", "[N, K]", DTYPES)
        check_parameter(bias, "bias", weight.size(0), weight, "weight")
    if dtype is None:
        dtype = weight.dtype
    if dtype not in _NUMBERS:
        raise TypeError(f"dtype: expected {', '.join(map(str, _NUMBERS))}, got {dtype!r}")
    if dtype == torch.int8 and weight.dtype == torch.float64:
        raise TypeError("dtype: int8 is for weights of at most 32 bits, and weight is torch.float64")
    if dtype not in (torch.int8, weight.dtype):
        weight = weight.detach().to(dtype)
        bias = bias if bias is None or (bias.dtype == torch.float32 and dtype != torch.float64) else bias.detach().to(dtype)
    if 1 not in weight.stride()[-2:]:
        weight = weight.detach().contiguous()
    if weight.is_inference():  # its writes are not counted, so it keeps a copy that nobody writes to
        with torch.inference_mode(False):
            weight = weight.clone()
    return PackedLinear(weight, bias, dtype).repack()


# --- what calls make of the weights that they are given -------------------------------------------------------------------
def unpack(weight: Any, bias: Any, weight_name: str, bias_name: str) -> tuple[Any, Any, Tensor | None]:
    """(weight, bias, packed bytes or None)."""
    if type(weight) is not PackedLinear:
        return weight, bias, None
    if bias is not None:
        raise ValueError(f"{bias_name}: expected None beside a packed {weight_name}, which has its own")
    return weight.weight, weight.bias, weight.panels()


def check_pack(given: Any, packed: Tensor | None, x: Any, name: str) -> None:
    if packed is not None and isinstance(x, Tensor) and given.dtype not in (x.dtype, torch.int8):
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got a weight that is packed in {given.dtype}")


def current_packs(weights: list[Any], packs: list[Tensor | None]) -> Tensor | None:
    """What a compiled graph asks about its packs while it runs; eager calls have asked already."""
    if not is_compiling() or all(pack is None for pack in packs):
        return None
    # One answer a weight, in the order of the weights: a weight without a pack asks about one that it has not.
    present = next(pack for pack in packs if pack is not None)
    return _check_op(weights, [present if pack is None else pack for pack in packs])


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Under autocast: as torch's own linear casts its operands."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def cast_weight(given: Any, weight: Any, packed: Tensor | None, dtype: torch.dtype) -> tuple[Any, Tensor | None]:
    """A weight that is packed in autocast's dtype, or in int8, serves as it is; another pack is of no use then."""
    if packed is not None and given.dtype in (dtype, torch.int8):
        return weight, packed
    return cast(weight, dtype), None
