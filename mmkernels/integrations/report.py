"""What a swap did: every module, replaced or left and why; and the methods that measure it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mmkernels.integrations.coverage import Coverage, measure_coverage
from mmkernels.integrations.profile import Profile, measure_profile
from mmkernels.integrations.rules import declined, record_of
from mmkernels.integrations.verification import Verification, measure_errors

# Names printed of modules that share a line.
_SHOWN = 2


@dataclass(frozen=True)
class Entry:
    """One module of the model.

    Attributes:
        name: its qualified name; "" is the model itself.
        cls: the full name of the class that it had.
        status: "replaced", "left" or "swapped already".
        runs: the ops that a replaced one runs.
        reason: why another was left.
    """

    name: str
    cls: str
    status: str
    runs: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Declined:
    """Calls of a replaced module that its original forward pass served."""

    name: str
    reason: str
    calls: int


class SwapReport:
    """What :func:`mmkernels.swap` did with a model. Printed, it is a summary; `entries` is the whole of it.

    Attributes:
        model: the model.
        entries: every module, in the order of named_modules.
        dry_run: whether nothing was changed.
    """

    def __init__(self, model: nn.Module, entries: tuple[Entry, ...], dry_run: bool) -> None:
        self.model, self.entries, self.dry_run = model, entries, dry_run

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """The modules that were replaced."""
        return tuple(entry for entry in self.entries if entry.status == "replaced")

    @property
    def left(self) -> tuple[Entry, ...]:
        """The modules that stayed, each with its reason."""
        return tuple(entry for entry in self.entries if entry.status == "left")

    @property
    def declined(self) -> tuple[Declined, ...]:
        """Eager calls that original forward passes served since the swap, because an op cannot do what was asked."""
        return tuple(
            Declined(name, reason, calls)
            for name, module in self.model.named_modules()
            for reason, calls in declined(module).items()
        )

    def verify(self, inputs: Any, *, gradients: bool = True, seed: int = 0) -> Verification:
        """Runs the model before and after the swap, and in float64, on copies: whether the numbers hold.

        Args:
            inputs: what the model is called with: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
            gradients: also compare the gradients of every parameter that wants one, and of floating inputs.
            seed: of torch's generator before each run. Dropout draws other numbers after the swap: verify in eval mode.

        Returns:
            A :class:`Verification`: for every output and gradient the largest error against float64, beside that of the
            model as it was, and whether it is within the rule: at most twice that, plus 2 eps of the largest number.

        Raises:
            RuntimeError: the model runs in no wider dtype than its own. ValueError: the report is of a dry run.
        """
        return measure_errors(self._before(), self._after(), inputs, gradients=gradients, seed=seed)

    def coverage(self, inputs: Any) -> Coverage:
        """Counts the operations of matrix products and attention before and after, on copies: which part the kernels do.

        Args:
            inputs: as for :meth:`verify`.
        """
        return measure_coverage(self._before(), self._after(), inputs)

    def profile(self, inputs: Any, *, seconds: float = 2.0) -> Profile:
        """Times a forward pass without gradients before (on a copy) and after, interleaved, and says where the time went.

        Args:
            inputs: as for :meth:`verify`.
            seconds: to spend on timing.
        """
        return measure_profile(self._before(), self._after(), inputs, seconds)

    def as_data(self, errors: Verification | None, coverage: Coverage, times: Profile | None) -> dict[str, Any]:
        """The report and what its methods found (None: not asked for), as JSON takes them."""
        data: dict[str, Any] = {"modules": [asdict(entry) for entry in self.entries]}
        if errors is not None:
            data["errors"] = [asdict(difference) for difference in errors.differences]
            data["within_rule"] = errors.within_rule
        data |= {"share": coverage.share, "kernels": coverage.kernels, "remaining": coverage.remaining}
        return data if times is None else data | {"times": asdict(times)}

    def __str__(self) -> str:
        total = len(self.entries)
        done, already = len(self.replaced), sum(entry.status == "swapped already" for entry in self.entries)
        would = "would be " if self.dry_run else ""
        lines = [f"{type(self.model).__name__}: {done} of {total} modules {would}replaced"]
        if already:
            lines[0] += f", {already} swapped already"
        if already and not done:
            lines[0] += ": nothing to do"
        groups: dict[tuple[str, str, str], list[str]] = {}
        for entry in self.entries:
            groups.setdefault((entry.status, entry.cls, entry.runs or entry.reason), []).append(entry.name)
        order = ("replaced", "swapped already", "left")
        for (status, cls, text), names in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
            shown = ", ".join(name or "(the model)" for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            lines.append(f"  {status:>15} {len(names):4} {cls.rpartition('.')[2]}: {text} ({shown})")
        calls: Counter[str] = Counter()
        for item in self.declined:
            calls[item.reason] += item.calls
        lines += [f"  {count} calls served by the original: {reason}" for reason, count in calls.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<SwapReport of {type(self.model).__name__}: {len(self.replaced)} replaced>"

    def _before(self) -> nn.Module:
        """A copy of the model as it was."""
        from mmkernels.integrations.swap import unswap

        return unswap(self._after())

    def _after(self) -> nn.Module:
        """A copy of the model as it is."""
        if self.dry_run:
            raise ValueError("dry_run: nothing has been swapped that could be measured")
        if all(record_of(module) is None for module in self.model.modules()):
            raise ValueError("model: it has been put back (unswap), or nothing was replaced; there is nothing to measure")
        return copy.deepcopy(self.model)
