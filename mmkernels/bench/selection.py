"""Which of the cards' cases and overheads a run measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from mmkernels.cards.card import BenchCase, Card, Overhead

DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Selection:
    cases: tuple[tuple[Card, BenchCase, torch.dtype], ...]
    overheads: tuple[tuple[Card, Overhead], ...]

    def __len__(self) -> int:
        return len(self.cases) + len(self.overheads)


def select(
    cards: Sequence[Card],
    *,
    family: str | None = None,
    case: str | None = None,
    dtypes: Sequence[str] | None = None,
    device: str = "cpu",
) -> Selection:
    """What matches all the filters, in the order of the cards.

    Args:
        case: text that the name contains. An overhead answers to "overhead " and its name, so "overhead" selects them all.
        dtypes: names of dtypes. Overheads are about the call and not about a dtype: this filter leaves them in.
        device: the cases that are lines there; overheads are promises about CPU calls, other devices have none.

    Raises:
        ValueError: an unknown family or dtype, or filters that leave nothing.
    """
    families = list(dict.fromkeys(card.family for card in cards))
    if family is not None and family not in families:
        raise ValueError(f"family: expected one of {', '.join(families)}, got {family!r}")
    for name in dtypes or ():
        if name not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    wanted = [DTYPES[name] for name in dtypes] if dtypes else list(DTYPES.values())
    chosen = [card for card in cards if family is None or card.family == family]
    selection = Selection(
        cases=tuple(
            (card, entry, dtype)
            for card in chosen
            for entry in card.bench
            if device in entry.devices and (case is None or case in entry.name)
            for dtype in entry.dtypes
            if dtype in wanted
        ),
        overheads=tuple(
            (card, overhead)
            for card in chosen
            for overhead in card.overheads
            if device == "cpu" and (case is None or case in f"overhead {overhead.name}")
        ),
    )
    if len(selection) == 0:
        filters = {"family": family, "case": case, "dtype": ", ".join(dtypes or ()) or None}
        given = ", ".join(f"{name} {value!r}" for name, value in filters.items() if value is not None)
        names = ", ".join(dict.fromkeys(entry.name for card in chosen for entry in card.bench if device in entry.devices))
        raise ValueError(f"no benchmark case matches {given or 'these filters'}; there are: {names or 'none'}")
    return selection
