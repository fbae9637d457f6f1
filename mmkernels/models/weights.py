"""Weights of the models of this folder: drawn as published, or taken from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_STD = 0.02


def draw_weights(model: nn.Module, seed: int, *, linear_std: float | None = _STD) -> None:
    """Convolutions as torch draws them; linear layers truncated normal with biases 0, or as torch's too where linear_std is
    None; whatever is a parameter of neither, nor of a norm (class tokens, positions), truncated normal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                continue
            layer = isinstance(module, (nn.Linear, _ConvNd))
            if layer and (linear_std is None or isinstance(module, _ConvNd)):
                bound = 1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(module.weight)[0])
                for parameter in module.parameters(recurse=False):
                    parameter.uniform_(-bound, bound, generator=generator)
            elif layer:
                nn.init.trunc_normal_(module.weight, std=linear_std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            else:
                for parameter in module.parameters(recurse=False):
                    nn.init.trunc_normal_(parameter, std=_STD, generator=generator)


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Takes a state by the model's names; returns the names in it that found no place.

    Raises:
        ValueError: names are missing. RuntimeError: shapes do not fit, as torch's load_state_dict says it.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state_dict]
    if missing:
        raise ValueError(f"state_dict: expected {', '.join(missing)} in it too")
    model.load_state_dict({name: state_dict[name] for name in own})
    return [name for name in state_dict if name not in own]
