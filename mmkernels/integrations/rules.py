"""What replaces what: the rules of :func:`mmkernels.swap`, and what a replaced module can do.

A module is replaced where it stands, by giving the object another class: so its parameters, buffers, hooks, mode and name
stay what they are, and whoever holds the module goes on holding it. A rule names the exact class that it replaces and the
source of the forward pass that it knows (a digest): where a package's version computes something else, or somebody has
patched it, the module is left, and the report says so.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn
from torch.compiler import is_compiling

# Where a swapped module keeps what it was (in __dict__, so that copies and pickles can be put back too).
RECORD = "_mmkernels_swap"

# Where it counts the calls that the original forward pass served, by reason.
DECLINED = "_mmkernels_declined"

# The packages that rules exist for, by the first word of a class's module; imported when such a class is met.
_PACKAGES = {
    "monai": "monai",
    "open_clip": "open_clip",
    "timm": "timm",
    "torch": "torch_nn",
    "transformers": "transformers_rules",
    "transformers_modules": "transformers_rules",  # files of code beside weights, whose layers are written like its own
}

# The names under which the packages are distributed.
_DISTRIBUTIONS = {"open_clip": "open_clip_torch"}

AnyClass = TypeVar("AnyClass", bound=type)


def no_refusal(module: nn.Module) -> str | None:
    return None


def no_attributes(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Rule:
    """How the modules of one class are replaced.

    Attributes:
        replaces: the class's full name.
        target: the class that they get, or a mixin of :class:`Swapped` that goes in front of theirs.
        runs: the ops that the module then runs.
        forward: digests (:func:`digest`) of the forward passes that `target` computes; empty takes any.
        refuses: says why an instance has to stay as it is, or None.
        attributes: what the instance needs beside what it has, given the dtype asked of :func:`mmkernels.swap`.
    """

    replaces: str
    target: type
    runs: tuple[str, ...]
    forward: tuple[str, ...] = ()
    refuses: Callable[[Any], str | None] = no_refusal
    attributes: Callable[[Any, torch.dtype | None], dict[str, Any]] = no_attributes


_rules: dict[str, Rule] = {}

# Asked for the rules of classes that have none by their name.
_finders: dict[str, Callable[[type], Rule | None]] = {}


def add_rule(rule: Rule) -> None:
    if rule.replaces in _rules:
        raise ValueError(f"replaces: {rule.replaces} has a rule already")
    _rules[rule.replaces] = rule


def add_finder(package: str, finder: Callable[[type], Rule | None]) -> None:
    """Has `finder` say which rule, if any, is for a class of the package that no rule names: packages that write one forward
    pass into many classes have rules for the forward pass."""
    _finders[package] = finder


def replaces(*names: str, runs: Iterable[str], forward: Iterable[str] = ()) -> Callable[[AnyClass], AnyClass]:
    """Declares a class of :class:`Swapped` as the replacement of the classes called `names`. Its `refuses` and `attributes`
    are the rule's, where it has them."""

    def register(target: AnyClass) -> AnyClass:
        for name in names:
            refuses = getattr(target, "refuses", no_refusal)
            attributes = getattr(target, "attributes", no_attributes)
            add_rule(Rule(name, target, tuple(runs), tuple(forward), refuses, attributes))
        return target

    return register


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def rule_of(cls: type) -> Rule | None:
    """The rule for modules of exactly this class."""
    package = cls.__module__.split(".")[0]
    if package in _PACKAGES:
        importlib.import_module(f"mmkernels.integrations.{_PACKAGES[package]}")
    rule = _rules.get(full_name(cls))
    finder = _finders.get(package)
    return finder(cls) if rule is None and finder is not None else rule


def digest(cls: type, method: str = "forward") -> str | None:
    """Sixteen digits that stand for the source of a class's forward, or of another of its methods; None where there is no
    source to be read."""
    return digest_of(getattr(cls, method))


@cache
def digest_of(function: Callable[..., Any]) -> str | None:
    """The same of any function."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    return hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()[:16]


def version_of(cls: type) -> str:
    """The package of a class and its version: "timm 1.0.31"."""
    package = cls.__module__.split(".")[0]
    try:
        return f"{package} {metadata.version(_DISTRIBUTIONS.get(package, package))}"
    except metadata.PackageNotFoundError:
        return package


def unknown_source(cls: type, known: tuple[str, ...], method: str = "forward") -> str | None:
    """Why a class stays of which a method has none of the `known` digests; None where it has one."""
    if (digest(cls, method) or "") in known:
        return None
    return f"{version_of(cls)}: its {method} is not one that mmkernels knows"


def why_unknown(module: nn.Module, rule: Rule) -> str | None:
    """Why the module's forward pass is not the one that `rule` is for; None where it is."""
    if "forward" in module.__dict__:
        return "it has a forward of its own, which somebody set on the instance"
    return unknown_source(type(module), rule.forward) if rule.forward else None


# --- replaced modules -------------------------------------------------------------------------------------------------
class Swapped:
    """In front of another's class: a forward pass through the ops, with the original's behind it for what they cannot do."""

    def original(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """The call as the original serves it, noted under `reason`."""
        note(self, reason)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        made = cls.__dict__.get("_made_of")
        reduced = super().__reduce_ex__(protocol)
        if made is None:
            return reduced
        return (_new, made, *reduced[2:])


def note(module: Any, reason: str) -> None:
    """Counts a call that the original forward pass served. (Not while torch traces: a graph has no side effects.)"""
    if not is_compiling():
        declined = module.__dict__.setdefault(DECLINED, {})
        declined[reason] = declined.get(reason, 0) + 1


def declined(module: nn.Module) -> dict[str, int]:
    """The calls of a swapped module that its original forward pass served, by reason."""
    return dict(module.__dict__.get(DECLINED, {}))


def _new(target: type, original: type) -> Any:
    cls: Any = combined(target, original)
    return cls.__new__(cls)


@cache
def combined(target: type, original: type) -> type:
    """The class of replaced modules: `target` itself where it is whole, else both, under the original's name, by which
    others (device maps, checkpoints, wrapping policies) find it."""
    if issubclass(target, original) or not issubclass(target, Swapped):
        return target
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_made_of": (target, original),
    }
    if hasattr(target, "members_of"):
        namespace.update(target.members_of(original))
    return type(original.__name__, (target, original), namespace)


def target_of(module: nn.Module) -> type | None:
    """What a module is replaced by, or has been; None where it stays."""
    record = record_of(module)
    if record is not None:
        return record.target
    rule = rule_of(type(module))
    if rule is None or why_unknown(module, rule) is not None or rule.refuses(module) is not None:
        return None
    return rule.target


# --- changing a module and putting it back ----------------------------------------------------------------------------
@dataclass
class Record:
    """What a module was before: its class, and the attributes that were another's or none."""

    cls: type
    target: type
    before: dict[str, Any]
    added: tuple[str, ...]
    what: str

    @property
    def swapped_cls(self) -> type:
        """The class that the module was given."""
        return combined(self.target, self.cls)


@dataclass
class Change:
    """One module's new class and attributes."""

    module: nn.Module
    target: type
    attributes: dict[str, Any]
    what: str

    def apply(self) -> None:
        state = self.module.__dict__
        before = {name: state[name] for name in self.attributes if name in state}
        added = tuple(name for name in self.attributes if name not in state)
        record = Record(type(self.module), self.target, before, added, self.what)
        self.module.__class__ = record.swapped_cls  # Python refuses where the layouts of the classes differ
        state.update(self.attributes)
        state[RECORD] = record


def record_of(module: nn.Module) -> Record | None:
    """What a swapped module was; None for others."""
    return module.__dict__.get(RECORD)


def put_back(module: nn.Module, record: Record) -> None:
    state = module.__dict__
    module.__class__ = record.cls
    for name in (*record.added, RECORD, DECLINED):
        state.pop(name, None)
    state.update(record.before)
