"""How much of a model's matrix products and attention the kernels do, counted in operations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from mmkernels import runtime
from mmkernels.calls import call

_aten = torch.ops.aten


@dataclass(frozen=True)
class Coverage:
    """What `report.coverage` found; operations are multiplications and additions, 2 a multiply-add.

    Attributes:
        before: operations of matrix products and attention in the model as it was (without convolutions).
        left: those that torch still does after the swap.
        remaining: what does them, as "aten.bmm [12, 197, 64] [12, 64, 197]", with its operations.
        kernels: calls of this package's kernels, by "op kernel".
    """

    before: int
    left: int
    remaining: Counter[str]
    kernels: Counter[str]

    @property
    def share(self) -> float:
        """The part that the kernels do, 0 to 1."""
        return 1.0 if self.before == 0 else 1.0 - self.left / self.before

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls of ops that no kernel served."""
        return {name: calls for name, calls in self.kernels.items() if name.split(" ")[1] in ("reference", "torch")}

    def __str__(self) -> str:
        lines = [f"{self.share:.1%} of {self.before / 1e9:.3g} GFLOP of matrix products and attention by the kernels"]
        lines += [f"  {calls:5} calls of {name}" for name, calls in self.kernels.most_common()]
        lines += [f"  left to torch: {flops / 1e9:.3g} GFLOP of {name}" for name, flops in self.remaining.most_common(5)]
        return "\n".join(lines)


def measure_coverage(before: nn.Module, after: nn.Module, inputs: Any) -> Coverage:
    # torch's transformer layers run one opaque operator where nothing wants a gradient.
    before.requires_grad_(True)
    with torch.enable_grad(), _Count() as theirs:
        call(before, inputs)
    with torch.no_grad(), _Count() as ours:
        call(after, inputs)
    return Coverage(theirs.flops.total(), ours.flops.total(), ours.flops, ours.kernels)


def _flash_for_cpu(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return 2 * out_val.numel() * a.size(-1)


# What torch's own table of formulas lacks, and what of it is no matrix product.
_FORMULAS: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _flash_for_cpu,
    _aten._grouped_mm: _grouped_mm,
}
_FORMULAS |= {op: formula for op, formula in flop_registry.items() if "conv" not in str(op)}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = func.namespace == "mmkernels"
        if own:
            runtime.last_kernels(clear=True)
        out = func(*args, **kwargs)
        if own:
            self.kernels.update(f"{op} {kernel}" for op, kernel in runtime.last_kernels())
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            shapes = " ".join(str(list(value.shape)) for value in args if isinstance(value, Tensor))
            self.flops[f"{func._overloadpacket} {shapes}"] += flops
        return out
