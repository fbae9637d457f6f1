"""What models of the multimodal systems share: drawing their weights, loading published ones, checking their inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models.weights import load_weights
from mmkernels.nn import ModalityRMSNorm, rotary_angles
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.rotary_attention import Angles

_INIT_STD = 0.02
_NORMS = (nn.LayerNorm, nn.RMSNorm, ModalityRMSNorm)
# Gains, and what begins as 0: low-rank additions and the scale of learned noise.
_AS_MADE = ("hidden_norm", "out_norm", "gamma", "c_attn", "lora_up", "router_noise")


class Rule(NamedTuple):
    """How published weights become ours.

    A name that `pattern` matches as a whole becomes `name`, a template with the pattern's groups, and its value
    `change(value)`. With a group `index` the value is one slice of a stacked tensor: of one modality, expert or task. Every
    rule of a model is tried, in order, on the name that the ones before it gave.
    """

    pattern: str
    name: str
    change: Callable[[Tensor], Tensor] | None = None


class Model(KernelSwitch):
    """A model or a block of one. A subclass builds its layers, then calls `finish`; `published` are its rules."""

    published: ClassVar[Sequence[Rule]] = ()

    def finish(self, *, kernels: bool, seed: int) -> None:
        """Draws the weights (truncated normal, standard deviation 0.02; biases 0) and sets the kernels."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, _NORMS):
                    continue
                for name, parameter in module.named_parameters(recurse=False):
                    if name.startswith(_AS_MADE):
                        continue
                    if name.startswith("b_") or name == "bias":
                        nn.init.zeros_(parameter)
                    else:
                        nn.init.trunc_normal_(parameter, std=_INIT_STD, generator=generator)
        self.kernels = kernels

    def own_names(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published weights by the names of this class; its own names, and those that it has no place for, stay.

        Raises:
            ValueError: a slice of one of this class's stacked tensors is missing.
        """
        named: dict[str, Tensor] = {}
        slices: dict[str, dict[int, tuple[str, Tensor]]] = {}
        for given, value in state_dict.items():
            name, index = given, None
            for rule in self.published:
                match = re.fullmatch(rule.pattern, name)
                if match is None:
                    continue
                name = match.expand(rule.name)
                value = value if rule.change is None else rule.change(value)
                if "index" in match.groupdict():
                    index = int(match["index"])
            if index is None:
                named[name] = value
            else:
                slices.setdefault(name, {})[index] = given, value
        own = self.state_dict().keys()
        for name, of_name in slices.items():
            if name not in own:  # of something else in the file, which may have other modalities
                named |= dict(of_name.values())
                continue
            missing = set(range(len(of_name))) - of_name.keys()
            if missing:
                raise ValueError(f"state_dict: expected number {min(missing)} of what becomes {name} in it too")
            named[name] = torch.stack([of_name[index][1] for index in range(len(of_name))])
        return named

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Takes published weights, or those of this class.

        Returns:
            The names in `state_dict`, as they are here, that found no place.

        Raises:
            ValueError: names are missing. RuntimeError: shapes do not fit, as torch's load_state_dict says it.
        """
        taken = self.own_names(state_dict)
        tied: dict[int, Tensor] = {}
        parameters = dict(self.named_parameters(remove_duplicate=False))
        for name in parameters.keys() & taken.keys():
            tied[id(parameters[name])] = taken[name]
        for name, parameter in parameters.items():  # a file may hold a tied weight once
            if name not in taken and id(parameter) in tied:
                taken[name] = tied[id(parameter)]
        return load_weights(self, taken)


def angles_of(x: Tensor, positions: Tensor | None, channels: int, base: float) -> Angles:
    """What turns queries and keys of x [B, L, C]: positions [L] or [B, L], 0 to L - 1 where None."""
    positions = torch.arange(x.size(1), device=x.device) if positions is None else positions
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions: expected a tensor [L] or [B, L], got {type(positions).__name__}")
    if positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(f"positions: expected {tuple(x.shape[1:2])} or {tuple(x.shape[:2])}, got {tuple(positions.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return rotary_angles(positions, channels, base=base, dtype=wide)


def check_ids(ids: Any, name: str, vocab_size: int) -> None:
    """[B, L] int64 with L >= 1, each from 0 to vocab_size - 1 (looked at on the CPU, outside of compiled graphs)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a tensor [B, L], got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {ids.dtype}")
    if ids.dim() != 2 or ids.size(1) < 1:
        raise ValueError(f"{name}: expected [B, L] with L >= 1, got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() > 0:
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name}: expected 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def check_floats(x: Any, name: str, shape: str) -> None:
    """A floating-point tensor; `shape` is for the message."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected floats {shape}, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")


def check_tokens(x: Any, name: str, dim: int) -> None:
    """[B, N, dim], floating point."""
    check_floats(x, name, f"[B, N, {dim}]")
    if x.dim() != 3 or x.size(2) != dim:
        raise ValueError(f"{name}: expected [B, N, {dim}], got {tuple(x.shape)}")


def check_visible(visible: Any, name: str, shape: tuple[int, ...]) -> None:
    """bool of that shape."""
    if not isinstance(visible, Tensor) or visible.dtype != torch.bool or visible.shape != shape:
        got = f"{visible.dtype} {tuple(visible.shape)}" if isinstance(visible, Tensor) else type(visible).__name__
        raise ValueError(f"{name}: expected bool {tuple(shape)}, got {got}")


def check_segment_ids(segment_ids: Any, shape: tuple[int, ...]) -> None:
    """None, or int64 or int32 of that shape [B, L], or [1, L]."""
    if segment_ids is None:
        return
    if not isinstance(segment_ids, Tensor) or segment_ids.dtype not in (torch.int64, torch.int32):
        got = segment_ids.dtype if isinstance(segment_ids, Tensor) else type(segment_ids).__name__
        raise TypeError(f"segment_ids: expected torch.int64 or torch.int32 {tuple(shape)}, got {got}")
    if tuple(segment_ids.shape) not in (tuple(shape), (1, *shape[1:])):
        raise ValueError(f"segment_ids: expected {tuple(shape)}, got {tuple(segment_ids.shape)}")
