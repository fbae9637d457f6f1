"""Which rule is for a class of transformers: by what its forward pass is, since one is written into many classes."""

from __future__ import annotations

from mmkernels.integrations import transformers_blocks as _blocks  # noqa: F401 - its rules are among LAYER_RULES
from mmkernels.integrations import transformers_by_hand as _by_hand  # noqa: F401 - its rules are by name
from mmkernels.integrations.rules import Rule, add_finder, digest
from mmkernels.integrations.transformers_attention import INTERFACE_RULE, asks_interface
from mmkernels.integrations.transformers_experts import EXPERTS_RULE, are_experts
from mmkernels.integrations.transformers_layers import LAYER_RULES


def _find(cls: type) -> Rule | None:
    if are_experts(cls):
        return EXPERTS_RULE
    rule = LAYER_RULES.get(digest(cls) or "")
    return INTERFACE_RULE if rule is None and asks_interface(cls) else rule


for _package in ("transformers", "transformers_modules"):
    add_finder(_package, _find)
