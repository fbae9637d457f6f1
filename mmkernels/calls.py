"""A model's inputs and outputs, of whatever shape they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on `inputs`: a mapping of keyword arguments, a tuple or list of arguments, or the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def mapped(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same inputs with `function` applied to every tensor."""
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map(lambda value: function(value) if isinstance(value, Tensor) else value, plain)


def tensors(value: Any, name: str) -> dict[str, Tensor]:
    """The floating tensors in `value`, by name."""
    plain = dict(value) if isinstance(value, Mapping) else value
    found = tree_flatten_with_path(plain)[0]
    return {f"{name}{keystr(path)}": leaf for path, leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def to_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs with floating tensors in another dtype."""
    return mapped(inputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
