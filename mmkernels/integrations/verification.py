"""Whether a swapped model computes what it computed before, held against a wider dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.calls import call, mapped, tensors, to_dtype


@dataclass(frozen=True)
class Difference:
    """The errors of one output or gradient against the wider dtype.

    Attributes:
        name: "output...", or "gradient of" a parameter or an input.
        largest: the largest number of the oracle.
        after, before: the largest errors after the swap and before it.
        after_rms, before_rms: their root mean squares.
        eps: that of the tensor's dtype.
        typical, typical_rms: the errors before the swap that outputs, or gradients, of this size have in the median.
    """

    name: str
    largest: float
    after: float
    before: float
    after_rms: float
    before_rms: float
    eps: float
    typical: float = 0.0
    typical_rms: float = 0.0

    @property
    def is_noise(self) -> bool:
        """Whether no digit was right before the swap either: true zeros, such as the gradient of a bias of keys."""
        return self.before >= self.largest

    @property
    def within_rule(self) -> bool:
        """Whether both errors are at most twice what they were before, plus 2 eps of the largest number. Where they were
        less than is typical of the model, which of a few numbers is luck, the typical ones count; of noise, where either is
        a draw of its own, ten times is allowed."""
        allowance, factor = 2 * self.eps * self.largest, 10 if self.is_noise else 2
        within = self.after <= factor * max(self.before, self.typical) + allowance
        return within and self.after_rms <= factor * max(self.before_rms, self.typical_rms) + allowance


@dataclass(frozen=True)
class Verification:
    """What `report.verify` found.

    Attributes:
        differences: one of each output and gradient.
        oracle: the dtype that both are held against, float64 unless the model does not run in it.
        problems: outputs or gradients that are there only before or only after the swap, or not finite only after it.
    """

    differences: tuple[Difference, ...]
    oracle: torch.dtype
    problems: tuple[str, ...]

    @property
    def within_rule(self) -> bool:
        """Whether the numbers hold."""
        return not self.problems and all(difference.within_rule for difference in self.differences)

    @property
    def outside(self) -> tuple[Difference, ...]:
        """Those that are not within the rule."""
        return tuple(difference for difference in self.differences if not difference.within_rule)

    def __str__(self) -> str:
        oracle = str(self.oracle).removeprefix("torch.")
        lines = [f"{len(self.differences)} outputs and gradients against {oracle}; errors over the largest number:"]
        for kind in ("output", "gradient"):
            found = [d for d in self.differences if d.name.startswith(kind) and not d.is_noise]
            if found:
                worst = max(found, key=lambda d: d.after / d.largest)
                after, before = worst.after / worst.largest, worst.before / worst.largest
                lines.append(f"  largest of {kind}s: {after:.2e} after the swap, {before:.2e} before ({worst.name})")
        lines += [f"  outside the rule: {d.name}: {d.after:.3e} after, {d.before:.3e} before" for d in self.outside]
        lines += [f"  {problem}" for problem in self.problems]
        lines.append("  within the rule" if self.within_rule else "  NOT within the rule")
        return "\n".join(lines)


def measure_errors(before: nn.Module, after: nn.Module, inputs: Any, *, gradients: bool, seed: int) -> Verification:
    dtype = _floating_dtype(before, inputs)
    failures = []
    for oracle in (torch.float64, torch.float32):
        if torch.finfo(oracle).bits <= torch.finfo(dtype).bits:
            continue
        wide_model = copy.deepcopy(before).to(oracle)
        try:
            wide = _run(wide_model, to_dtype(inputs, oracle), gradients, seed)
            break
        except RuntimeError as error:
            failures.append(f"{oracle}: {error}")
        finally:
            del wide_model
    else:
        raise RuntimeError(f"inputs: the model runs in no wider dtype than {dtype}: {'; '.join(failures)}")
    theirs, ours = (_run(model, inputs, gradients, seed) for model in (before, after))
    differences, problems = [], []
    for name in dict.fromkeys((*wide, *theirs, *ours)):
        if name not in ours or name not in theirs or name not in wide:
            problems.append(f"{name}: not among the results {'after' if name not in ours else 'before'} the swap")
        elif ours[name].shape != theirs[name].shape or ours[name].dtype != theirs[name].dtype:
            problems.append(f"{name}: {tuple(ours[name].shape)} {ours[name].dtype} after the swap")
        elif not bool(ours[name].isfinite()[theirs[name].isfinite()].all()):
            problems.append(f"{name}: not finite where it was before the swap")
        elif ours[name].numel():
            differences.append(_difference(name, ours[name], theirs[name], wide[name]))
    return Verification(tuple(_with_typical(differences)), oracle, tuple(problems))


def _with_typical(differences: list[Difference]) -> Iterator[Difference]:
    """The same, each with the median of the relative errors of its kind."""
    for difference in differences:
        kind = difference.name.startswith("gradient")
        like = [d for d in differences if d.name.startswith("gradient") == kind and not d.is_noise]
        largest, rms = ([getattr(d, name) / d.largest for d in like] or [0.0] for name in ("before", "before_rms"))
        scale = difference.largest
        yield replace(difference, typical=scale * median(largest), typical_rms=scale * median(rms))


def _floating_dtype(model: nn.Module, inputs: Any) -> torch.dtype:
    for tensor in (*model.parameters(), *tensors(inputs, "").values()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _run(model: nn.Module, inputs: Any, gradients: bool, seed: int) -> dict[str, Tensor]:
    """Outputs, and gradients for fixed random upstream ones."""
    given = mapped(inputs, lambda tensor: tensor.detach().clone().requires_grad_(gradients and tensor.is_floating_point()))
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(seed)
        outputs = tensors(call(model, given), "output")
    results = {name: output.detach() for name, output in outputs.items()}
    if not gradients:
        return results
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted |= tensors(given, "input")
    ends = [output for output in outputs.values() if output.requires_grad]
    if not ends or not wanted:
        return results
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(end.shape, generator=generator).to(end.device, end.dtype) for end in ends]
    found = torch.autograd.grad(ends, list(wanted.values()), upstream, allow_unused=True)
    return results | {f"gradient of {name}": g for name, g in zip(wanted, found, strict=True) if g is not None}


def _difference(name: str, ours: Tensor, theirs: Tensor, wide: Tensor) -> Difference:
    finite = ours.isfinite() & theirs.isfinite() & wide.isfinite()
    wide = wide.double()

    def errors(tensor: Tensor) -> tuple[float, float]:
        error = torch.where(finite, tensor.double() - wide, 0.0)
        return error.abs().max().item(), error.square().mean().sqrt().item()

    (after, after_rms), (before, before_rms) = errors(ours), errors(theirs)
    largest = torch.where(finite, wide, 0.0).abs().max().item()
    return Difference(name, largest, after, before, after_rms, before_rms, torch.finfo(ours.dtype).eps)
