"""The backends that every family chooses from, each with its reasons against a call."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmkernels import runtime

# Tiers of kernels that are vectors alone, and the dtypes that Triton kernels take.
VECTOR_TIERS = ("generic", "avx2", "avx512")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

MAX_PROGRAMS = 2**31 - 1  # of one launch

Arguments = Mapping[str, Any]
Reason = Callable[[Arguments], str | None]


@dataclass(frozen=True)
class Backend:
    """One way to run an op. `reason(arguments)` says why a call cannot use it, or None where it can; `note` why it is the
    choice where one would expect another."""

    name: str
    reason: Callable[[Arguments], str | None]
    kernel: Callable[[Arguments], str]
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """Which kernel a call would run, and why each other backend would not."""

    op: str
    kernel: str
    reasons: Mapping[str, str | None]  # backend -> why not; None for the chosen one and for those after it
    note: str = ""

    def __str__(self) -> str:
        lines = [f"mk.{self.op} would run {self.kernel}" + (f": {self.note}" if self.note else "")]
        lines += [f"  not {backend}: {reason}" for backend, reason in self.reasons.items() if reason is not None]
        return "\n".join(lines)


def choose(op: str, backends: tuple[Backend, ...], arguments: Arguments) -> Explanation:
    """The first backend without a reason against it. The reference has none, so there always is one."""
    reasons: dict[str, str | None] = {}
    for backend in backends:
        reasons[backend.name] = backend.reason(arguments)
        if reasons[backend.name] is None:
            return Explanation(op, backend.kernel(arguments), reasons, backend.note)
    raise RuntimeError(f"mk.{op}: no backend takes this call: {reasons}")


def _device(arguments: Arguments, primary: str) -> str:
    return arguments[primary].device.type


def cpu(
    tiers: tuple[str, ...],
    *,
    primary: str = "x",
    generic_only: tuple[torch.dtype, ...] = (torch.float64,),
    tier_of: Callable[[Arguments], str | None] = lambda arguments: None,
) -> Backend:
    """The compiled CPU kernels of `tiers`; `generic_only` dtypes have kernels in the generic tier alone; `tier_of` names the
    tier of calls that have one of their own."""

    def reason(arguments: Arguments) -> str | None:
        return None if _device(arguments, primary) == "cpu" else f"{primary} is on {_device(arguments, primary)}"

    def kernel(arguments: Arguments) -> str:
        if arguments[primary].dtype in generic_only:
            return "cpu/generic"
        own = tier_of(arguments)
        if own is not None:
            return f"cpu/{own}"
        in_force = runtime.ISA_NAMES.index(runtime.isa())
        return "cpu/" + next(name for name in reversed(runtime.ISA_NAMES[: in_force + 1]) if name in tiers)

    return Backend("cpu", reason, kernel)


def cuda(*, primary: str = "x", extra: Reason | None = None) -> Backend:
    """The compiled CUDA kernels; `extra` adds the family's own reasons."""

    def reason(arguments: Arguments) -> str | None:
        if _device(arguments, primary) != "cuda":
            return f"{primary} is on {_device(arguments, primary)}"
        if torch.version.hip is not None:
            return "this torch is for ROCm"
        if runtime.cuda_library_missing is not None:
            return f"the CUDA library is not in use: {runtime.cuda_library_missing}"
        return extra(arguments) if extra is not None else None

    return Backend("cuda", reason, lambda arguments: "cuda")


def triton(dtypes: tuple[torch.dtype, ...], *, primary: str = "x", extra: Reason | None = None) -> Backend:
    """The Triton kernels, for `dtypes`; `extra` adds the family's own reasons."""

    def reason(arguments: Arguments) -> str | None:
        tensor = arguments[primary]
        if tensor.device.type != "cuda":
            return f"{primary} is on {tensor.device.type}"
        if runtime.triton_missing() is not None:
            return runtime.triton_missing()
        if tensor.dtype not in dtypes:
            return f"{primary} is {tensor.dtype}; the Triton kernels take {', '.join(map(str, dtypes))}"
        return extra(arguments) if extra is not None else None

    return Backend("triton", reason, lambda arguments: "triton")


def triton_kernel(family: str, name: str) -> Callable[[], Callable[..., Any]]:
    """Fetches a function of the family's Triton kernels, which are imported when they are first asked for."""
    return lambda: getattr(importlib.import_module(f"mmkernels.triton.{family}"), name)


def few_channels(family: str, *, primary: str = "x") -> Reason:
    """The reason of families whose Triton kernels hold a whole row of channels, a program a row."""

    def reason(arguments: Arguments) -> str | None:
        limit = importlib.import_module(f"mmkernels.triton.{family}").MAX_CHANNELS  # asked only where there is Triton
        channels = arguments[primary].size(-1)
        if channels > limit:
            return f"{primary} has {channels} channels; the Triton kernels take {limit}"
        rows = arguments[primary].numel() // max(1, channels)
        return None if rows <= MAX_PROGRAMS else f"{primary} has {rows} rows; the Triton kernels take {MAX_PROGRAMS}"

    return reason


def torch_cuda(why: str, *, primary: str = "x") -> Backend:
    """torch's own kernels on CUDA, where there is nothing to gain over them: no fallback, but the choice."""

    def reason(arguments: Arguments) -> str | None:
        device = _device(arguments, primary)
        return None if device == "cuda" else f"{primary} is on {device}"

    return Backend("torch", reason, lambda arguments: "torch", why)


REFERENCE = Backend("reference", lambda arguments: None, lambda arguments: "reference")
