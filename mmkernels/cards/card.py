"""The card of an op: everything that one generic suite, the benchmark, `info`, `explain` and the README need to know.

A family's file in ``mmkernels/cards`` declares ``CARDS``; whoever wants them all asks :func:`mmkernels.cards.all_cards`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmkernels.ops.backends import Backend


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a public function."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def of(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.kwargs)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor replaced by `change(tensor)`, those inside of arguments too."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Call(args, kwargs)

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self.map_tensors(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found


# Draws a call: its tensors on the CPU, from the generator, then moved.
Make = Callable[[torch.device, torch.dtype, torch.Generator], Call]


def drawer(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Callable[..., Tensor]:
    """randn of a shape on the device itself, seeded as `g` is: a call that fills a GPU would take the CPU seconds."""
    own = torch.Generator(device).manual_seed(g.initial_seed())
    return lambda *shape: torch.randn(shape, generator=own, device=device, dtype=dtype)


def with_argument(make: Make, position: int, change: Callable[[Tensor], Any]) -> Make:
    """The same call with another argument there: x strided, a weight transposed, what is no tensor at all."""

    def changed(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        call = make(device, dtype, g)
        return Call((*call.args[:position], change(call.args[position]), *call.args[position + 1 :]), call.kwargs)

    return changed


def bad_argument(make: Make, position: int, change: Callable[[Any], Any]) -> Callable[[torch.device], Call]:
    """The call in float32 with another argument there, for a BadInput."""
    return lambda device: with_argument(make, position, change)(device, torch.float32, torch.Generator())


def bad_keyword(make: Make, **changed: Any) -> Callable[[torch.device], Call]:
    """The call in float32 with these keywords, for a BadInput."""

    def made(device: torch.device) -> Call:
        good = make(device, torch.float32, torch.Generator())
        return Call(good.args, {**good.kwargs, **changed})

    return made


def bias_dtype(kept: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of biases beside x: its own, or float32 where `kept` is "float32"."""
    return torch.float32 if kept == "float32" and dtype != torch.float64 else dtype


# Tokens [B, N, C] with a contiguous last dimension that lie in memory as no new tensor does.
STRIDED_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "token slice": lambda x: torch.cat((x, x), 1)[:, 1 : 1 + x.size(1)],
    "channel slice": lambda x: torch.cat((x, x, x), 2)[..., x.size(2) : 2 * x.size(2)],
    "rows transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one row expanded": lambda x: x[:1].expand_as(x),
    "odd offset": lambda x: torch.cat((x.flatten(), x.flatten()))[1 : 1 + x.numel()].view_as(x),
}


@dataclass(frozen=True)
class Sample:
    """One valid call."""

    name: str
    make: Make
    gradcheck: bool = True  # small enough for finite differences in float64
    full: bool = False  # only in the exhaustive suite (big, slow)


@dataclass(frozen=True)
class BadInput:
    """One call that must raise `error`, in a message that names `argument`."""

    name: str
    make: Callable[[torch.device], Call]
    error: type[Exception]
    argument: str


@dataclass(frozen=True)
class Cost:
    """The least work a call can do: floating-point operations, and bytes that must cross the memory bus."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Target:
    """A promise: at least `ratio` times as fast as the best of `peers`; or, `at_most`, at most `ratio` times as long.

    `of` "TFLOP/s": at least so many, whatever peers do; "floor": at least this part of the floor's speed, which is that of a
    copy where nothing is computed. `optional`: a peer that cannot run is left out, as long as another can; without it,
    nothing is judged then.
    """

    peers: tuple[str, ...]
    ratio: float
    at_most: bool = False
    of: str = "peers"
    optional: bool = False


@dataclass(frozen=True)
class BenchCase:
    """One line of the benchmark. `run` and each peer take the call; backward is included where `backward` is true.

    `devices`: where it is a line; sizes that fill one kind leave the other nothing to do, or far too much.
    """

    name: str
    make: Make
    run: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any]]
    cost: Callable[[Call], Cost]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    backward: bool = False
    compiled_peers: tuple[str, ...] = ()  # peers that also run through torch.compile, as "compile"
    target: Target | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Overhead:
    """A promise about a whole call, checks included, at a size where the kernel is nothing: microseconds."""

    name: str
    make: Callable[[], Call]
    run: Callable[..., Any]
    grad: bool
    limit_us: float


@dataclass(frozen=True)
class Card:
    name: str
    family: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    ops: tuple[str, ...]  # the registered operators behind the function, `mmkernels::...`
    backends: tuple[Backend, ...]  # in the order in which they are tried
    samples: tuple[Sample, ...]
    bad_inputs: tuple[BadInput, ...]
    dtypes: tuple[torch.dtype, ...]
    systems: tuple[str, ...]  # published systems that it serves
    summary: str
    differentiable: bool = True  # where not, no output has a gradient
    twice_differentiable: bool = False  # where not, a second derivative raises
    bench: tuple[BenchCase, ...] = ()
    overheads: tuple[Overhead, ...] = ()
