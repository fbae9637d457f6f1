"""mk.swap: the modules of a model that somebody else wrote, run by the kernels, and put back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from mmkernels.integrations.report import Entry, SwapReport
from mmkernels.integrations.rules import Change, Rule, full_name, put_back, record_of, rule_of, why_unknown
from mmkernels.integrations.sdpa import SDPA_RULE, calls_sdpa
from mmkernels.nn.packed import Packing

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Selection = str | type[nn.Module] | Iterable[str | type[nn.Module]]


def swap(
    model: nn.Module,
    *,
    only: Selection | None = None,
    skip: Selection | None = None,
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
) -> SwapReport:
    """Has the kernels run what they do better in a model that somebody else wrote; :func:`unswap` puts it back.

    A module is replaced where it stands: the object gets another class, whose forward pass computes the same by this
    package's ops. Parameters, buffers, state_dict keys, hooks, requires_grad, mode and device are what they were; nothing
    outside this model changes. Known are torch.nn, timm, transformers, MONAI and open_clip; of other classes, those
    that call F.scaled_dot_product_attention, and whatever known parts they are made of. What an op cannot do (attention
    weights that are asked for, a head mask), the original forward pass does, and the report counts it.

    Swapped models can be copied, pickled, compiled, exported, wrapped in DDP and in FSDP2. Files hold the plain weights
    (state_dict), or the replaced classes (torch.save of a model: it loads where this package is installed; unswap first for
    a file that loads anywhere).

    Args:
        model: any module.
        only: what to replace: a pattern of module names as in fnmatch ("blocks.*.attn"), a class (and those derived from
            it), or several of either; None is everything. A name stands for the modules below it too.
        skip: what to leave, in the same form.
        dtype: None computes in the dtype of the weights. torch.int8 quantises the weights of linear layers (each output
            channel) and their inputs (row by row) in eval mode on the CPU: faster, and with other numbers, which
            `report.verify` shows. For other dtypes convert the model itself (``model.to(torch.bfloat16)``).
        dry_run: only say what would be done.

    Returns:
        A :class:`SwapReport`: printed, what was replaced by what, and what was left and why; `report.verify(inputs)`,
        `report.coverage(inputs)` and `report.profile(inputs)` measure it.

    Raises:
        TypeError: model is no module, or only or skip is of another form.
        ValueError: only or skip matches no module, or dtype is neither None nor torch.int8. Whatever is raised, the model is
            as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if dtype not in (None, torch.int8):
        raise ValueError(f"dtype: expected None or torch.int8, got {dtype} (model.to(dtype) converts the model itself)")
    selected = _selector(model, only, "only", otherwise=True)
    skipped = _selector(model, skip, "skip", otherwise=False)
    entries: list[Entry] = []
    changes: list[Change] = []
    for name, module in model.named_modules():
        record = record_of(module)
        if record is not None:
            entries.append(Entry(name, full_name(record.cls), "swapped already", record.what))
        elif not selected(name, module) or skipped(name, module):
            entries.append(Entry(name, full_name(type(module)), "left", reason="not selected"))
        else:
            rule, reason = _choose(module)
            if rule is None or reason is not None:
                entries.append(Entry(name, full_name(type(module)), "left", reason=reason or ""))
                continue
            what = ", ".join(rule.runs)
            entries.append(Entry(name, full_name(type(module)), "replaced", what))
            changes.append(Change(module, rule.target, rule.attributes(module, dtype), what))
    report = SwapReport(model, tuple(entries), dry_run)
    if not dry_run:
        _apply(changes)
    return report


def unswap(model: AnyModule) -> AnyModule:
    """Puts every swapped module of the model back: the classes and attributes that it had.

    Args:
        model: any module; without swapped modules in it, nothing happens.

    Returns:
        The model, whose results are the bits that they were.

    Raises:
        ValueError: a swapped module has been given yet another class since (as FSDP2 does); nothing is changed.
    """
    found = [(name, module, record_of(module)) for name, module in model.named_modules()]
    for name, module, record in found:
        if record is not None and record.swapped_cls is not type(module):
            raise ValueError(
                f"model: {name or 'the model itself'} has become a {full_name(type(module))} since it was swapped; undo "
                "that first (models are swapped before they are sharded)"
            )
    for _, module, record in found:
        if record is not None:
            put_back(module, record)
    return model


@contextmanager
def swapped(
    model: nn.Module,
    *,
    only: Selection | None = None,
    skip: Selection | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[SwapReport]:
    """``with mk.swapped(model) as report:`` swaps the model for the calls inside, and puts back what it has swapped.

    Args, Raises: as :func:`swap`.
    """
    before = {id(module) for module in model.modules() if record_of(module) is not None}
    report = swap(model, only=only, skip=skip, dtype=dtype)
    try:
        yield report
    finally:
        for module in model.modules():
            record = record_of(module)
            if record is not None and id(module) not in before:
                put_back(module, record)


def _choose(module: nn.Module) -> tuple[Rule | None, str | None]:
    """The rule that a module is replaced by, or why there is none."""
    rule = rule_of(type(module))
    unknown = None if rule is None else why_unknown(module, rule)
    if rule is not None and unknown is None:
        return rule, rule.refuses(module)
    if calls_sdpa(module):
        return SDPA_RULE, None
    if unknown is not None:
        return None, unknown
    if any(True for _ in module.children()):
        return None, "no rule for this class; its parts are listed below"
    return None, "no rule for this class" + ("" if any(True for _ in module.parameters()) else ", which has no parameters")


def _apply(changes: list[Change]) -> None:
    """All of them or, where one raises, none."""
    done: list[nn.Module] = []
    try:
        for change in changes:
            done.append(change.module)
            change.apply()
        for change in changes:
            if isinstance(change.module, Packing):
                change.module.prepare_pack()
    except BaseException:
        for module in done:
            record = record_of(module)
            if record is not None:
                put_back(module, record)
        raise


def _selector(
    model: nn.Module, selection: Selection | None, argument: str, *, otherwise: bool
) -> Callable[[str, nn.Module], bool]:
    """Whether a module is meant by `selection`; ValueError where a part of it means none."""
    if selection is None:
        return lambda name, module: otherwise
    parts = (selection,) if isinstance(selection, (str, type)) else tuple(selection)
    for part in parts:
        if not isinstance(part, (str, type)):
            raise TypeError(f"{argument}: expected patterns of module names or classes, got {part!r}")
        if not any(_means(part, name, module) for name, module in model.named_modules()):
            raise ValueError(f"{argument}: {part!r} matches no module of the model")

    def selected(name: str, module: nn.Module) -> bool:
        return any(_means(part, name, module) for part in parts)

    return selected


def _means(part: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(part, type):
        return isinstance(module, part)
    above = name
    while True:
        if fnmatchcase(above, part):
            return True
        if "." not in above:
            return False
        above = above.rpartition(".")[0]
