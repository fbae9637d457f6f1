"""The cards of all ops, found by looking: a new family is a new file here, not an edit to a table."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from mmkernels.cards.card import Card

_SHARED = ("attention_gpu", "card", "heads", "peers")  # what cards are made of: no families


@cache
def all_cards() -> tuple[Card, ...]:
    """Every op's card, by family and then in the order of its file."""
    families = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
    return tuple(card for family in families for card in importlib.import_module(f"{__name__}.{family}").CARDS)


def card_of(op: object) -> Card:
    """The card of a public function, given as itself or by name. ValueError where there is none."""
    for card in all_cards():
        if op is card.function or op == card.name:
            return card
    raise ValueError(f"op: expected a public op ({', '.join(card.name for card in all_cards())}) or its name, got {op!r}")
