"""The contestants of one case: the op, its peers and its compiled peers, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmkernels import runtime
from mmkernels.bench.measure import Step
from mmkernels.cards.card import BenchCase, Call, Cost

OURS: Final = "mmkernels"
COMPILE: Final = "compile"


def _compiled_names(case: BenchCase) -> dict[str, str]:
    """The peers that also run compiled, by contestant: "compile", or "compile:<peer>" where there are several."""
    if len(case.compiled_peers) == 1:
        return {COMPILE: case.compiled_peers[0]}
    return {f"{COMPILE}:{peer}": peer for peer in case.compiled_peers}


def contestant_names(case: BenchCase) -> list[str]:
    """The op first, then its peers, then the compiled ones."""
    names = [OURS, *case.peers, *_compiled_names(case)]
    if len(set(names)) < len(names):
        raise ValueError(f"{case.name}: two contestants have one name among {', '.join(names)}")
    return names


def contestant_function(case: BenchCase, name: str) -> Callable[..., Any]:
    if name == OURS:
        return case.run
    compiled = _compiled_names(case)
    return torch.compile(case.peers[compiled[name]], dynamic=False) if name in compiled else case.peers[name]


class Contest:
    """One case with one dtype on one device, ready to be timed.

    Attributes:
        steps: by contestant, one call without arguments; run them inside `grad_mode`.
        failed: the contestants that raised, with the error; they are in no other attribute.
        kernel: the kernels that the op ran, as ``mmkernels.last_kernels`` names them.
        cost: the least work of the case.
    """

    def __init__(self, case: BenchCase, device: str, dtype: torch.dtype, *, seed: int = 0, only: str | None = None) -> None:
        """`only`: prepares this contestant alone, for a timer of one function at a time."""
        generator = torch.Generator().manual_seed(seed)
        call = case.make(torch.device(device), dtype, generator)
        self.backward = case.backward
        self.cost: Cost = case.cost(call)
        # Leaves of their own, but with the strides that the case asks for: a clone would pack an expanded or sliced view.
        self._call: Call = call.map_tensors(as_leaf) if case.backward else call
        self._leaves = [tensor for tensor in self._call.tensors() if tensor.requires_grad] if case.backward else []
        self._generator = generator
        self._gradients: dict[tuple[Any, ...], Tensor] = {}
        self.kernel = ""
        self.steps: dict[str, Step] = {}
        self.failed: dict[str, str] = {}
        # Past its limit of recompilations, torch.compile would run eagerly without a word; every case starts anew.
        if case.compiled_peers or torch.device(device).type == "cuda":  # where peers may compile themselves
            torch.compiler.reset()
        for name in contestant_names(case):
            if only is None or name == only:
                self._prepare(name, contestant_function(case, name))

    @contextmanager
    def grad_mode(self) -> Iterator[None]:
        """Autograd on where the case includes backward, off elsewhere; entered once, not once a call."""
        with torch.set_grad_enabled(self.backward):
            yield

    def _prepare(self, name: str, function: Callable[..., Any]) -> None:
        runtime.last_kernels(clear=True)
        try:
            with self.grad_mode():
                step = self._backward_step(function) if self.backward else partial(self._call.of, function)
                step()
        except Exception as error:
            if name == OURS:
                raise
            self.failed[name] = one_line(error)
            self._forget_gradients()
            return
        if name == OURS:
            self.kernel = " + ".join(dict.fromkeys(kernel for _, kernel in runtime.last_kernels()))
        self.steps[name] = step

    def _backward_step(self, function: Callable[..., Any]) -> Step:
        outputs = differentiable(self._call.of(function))
        if not outputs:
            raise ValueError("no output of a case with backward requires a gradient")
        gradients = [self._gradient(position, output) for position, output in enumerate(outputs)]
        del outputs

        def step() -> None:
            torch.autograd.backward(differentiable(self._call.of(function)), gradients)
            self._forget_gradients()

        return step

    def _gradient(self, position: int, output: Tensor) -> Tensor:
        """The same tensor for every contestant whose output has this shape and dtype."""
        key = (position, output.shape, output.dtype)
        if key not in self._gradients:
            drawn = torch.randn(output.shape, generator=self._generator)
            self._gradients[key] = drawn.to(device=output.device, dtype=output.dtype)
        return self._gradients[key]

    def _forget_gradients(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None


def one_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def differentiable(outputs: Any) -> list[Tensor]:
    return [output for output in tree_leaves(outputs) if isinstance(output, Tensor) and output.requires_grad]
