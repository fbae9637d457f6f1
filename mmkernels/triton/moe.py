"""Experts in Triton: how the kernels of moe_kernels.py are launched.

Slots are sorted by expert once a call; hidden activations and what the experts give lie in that order, where the rows of an
expert are neighbours. Nothing waits for the device: grids are as large as any routing of these sizes needs, and programs
without rows end at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.reference.linear import ACTIVATIONS
from mmkernels.reference.moe import MOE_GRADIENTS, moe_needs
from mmkernels.triton import launch, pinned
from mmkernels.triton import moe_kernels as kernels
from mmkernels.triton.expert_order import expert_order, sort
from mmkernels.triton.pinned import Tile

__all__ = ["expert_order", "grouped_linear", "grouped_linear_backward", "moe_mlp", "moe_mlp_backward"]

# The tiles where no table pins others, by kind of product: what spills nowhere and keeps within the shared memory of the
# small GPUs of a make, 99 KiB of CUDA's and 64 KiB of AMD's (python_tests/test_triton_moe.py compiles all of it). Odd
# operands, whose rows begin anywhere, are loaded number by number, and their addresses take the registers of larger tiles.
_KINDS = ("hidden", "gated", "product", "backward", "matrices")
_HALF: dict[str, tuple[Tile, ...]] = {
    "cuda": (
        (128, 128, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (128, 128, 64, 8, 3),
    ),
    "hip": (
        (128, 128, 64, 8, 2),
        (128, 64, 64, 8, 2),
        (128, 128, 64, 8, 2),
        (128, 128, 64, 8, 2),
        (128, 128, 64, 8, 2),
    ),
}
_HALF_ODD: dict[str, tuple[Tile, ...]] = {
    make: ((64, 64, 32, 8, 2), (64, 32, 32, 8, 2), *((64, 64, 32, 8, 2),) * 3) for make in _HALF
}
_SINGLE: dict[str, tuple[Tile, ...]] = {
    make: (
        (64, 64, 16, 8, 2),
        (64, 64, 16, 8, 2),
        (64, 32, 16, 4, 2),
        (64, 64, 16, 8, 2),
        (32, 64, 16, 4, 2),
    )
    for make in _HALF
}
_SINGLE_ODD: dict[str, tuple[Tile, ...]] = {
    make: ((64, 64, 16, 8, 2), (64, 32, 16, 8, 2), *((64, 64, 16, 8, 2),) * 3) for make in _HALF
}
_GROUP = 8  # tiles that pass all columns together
_COMBINED = 1024  # columns that one program combines, at most
_BLOCK_S, _BLOCK_N = 32, 64
_BIAS_ROWS = 32


def _aligned(*operands: Tensor | None) -> bool:
    """Whether all rows of these, whose last dimensions are sizes of this call, begin at units of 16 elements."""
    return all(
        x is None or (x.data_ptr() % 16 == 0 and all(n == 1 or n % 16 == 0 for n in (*x.stride(), *x.shape[1:])))
        for x in operands
    )


def _by_rows(w: Tensor | None) -> Any:
    """[E, N, K] as the operand of a product with W[e]^T, and with W[e]."""
    return None if w is None else (w, w.stride(0), w.stride(1), w.stride(2))


def _by_columns(w: Tensor | None) -> Any:
    return None if w is None else (w, w.stride(0), w.stride(2), w.stride(1))


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


class _Call:
    """The slots of one call in the order of their experts, and the launches over them; `last` rows at most."""

    def __init__(
        self, operands: tuple[Tensor | None, ...], like: Tensor, ids: Tensor, experts: int, last: int | None = None
    ) -> None:
        """Without `last`, a product may be BY_TOKEN."""
        self.like, self.experts = like, experts
        self.odd = not _aligned(*operands)
        self.tokens, self.slots_a_token = ids.shape
        self.slots = ids.numel()
        self.last = self.slots if last is None else last
        self.order, self.offsets, self.positions = sort(ids, experts, last is None)

    def tile(self, kind: str) -> tuple[dict[str, int], dict[str, Any]]:
        """(blocks, launch options)."""
        single = self.like.dtype == torch.float32
        half_or_single = (_SINGLE_ODD if self.odd else _SINGLE) if single else (_HALF_ODD if self.odd else _HALF)
        default = half_or_single[launch.make()][_KINDS.index(kind)]
        words = ("moe", kind, "single" if single else "half", self.odd and "odd")
        m, n, k, warps, stages = pinned.tile(words, default, pinned.PRODUCT)
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        return blocks, launch.options(warps, stages)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.like.dtype, device=self.like.device)

    def blocks(self, kind: str, columns: int) -> int:
        """Of columns, in the tiles of this kind."""
        return triton.cdiv(columns, self.tile(kind)[0]["BLOCK_N"])

    def over_rows(self, kernel: Any, kind: str, depth: int, columns: int, **arguments: Any) -> None:
        """Launches a kernel whose programs own tiles of rows."""
        blocks, options = self.tile(kind)
        tiles = self.last // blocks["BLOCK_M"] + self.experts + 1
        if self.last > 0 and columns > 0:
            kernel[(tiles * self.blocks(kind, columns),)](
                order=self.order,
                offsets=self.offsets,
                tiles=tiles,
                experts=self.experts,
                slots_a_token=max(1, self.slots_a_token),
                last=self.last,
                depth=depth,
                columns=columns,
                **arguments,
                **blocks,
                GROUP=_GROUP,
                **options,
            )

    def product(self, a: Tensor, w: Any, bias: Tensor | None, out: Tensor, *, also: Any = None, by_token: bool) -> None:
        """out = a W[e]^T + bias[e], and with `also` = (b, V) + b V[e]^T, b being strided as `a` is."""
        b, v = (None, None) if also is None else also
        self.over_rows(
            kernels.product_kernel,
            "product",
            a.size(1),
            out.size(1),
            a=a,
            a_row=a.stride(0),
            also=b,
            w=w,
            w_also=v,
            bias=_contiguous(bias),
            out=out,
            BY_TOKEN=by_token,
        )

    def combine(self, rows: Tensor, weights: Tensor | None, residual: Tensor | None) -> Tensor:
        out = self.new(self.tokens, rows.size(1))
        if out.numel() > 0:
            block = min(_COMBINED, triton.next_power_of_2(rows.size(1)))
            kernels.combine_kernel[(self.tokens, triton.cdiv(rows.size(1), block))](
                rows=rows,
                positions=self.positions,
                weights=weights,
                residual=residual,
                residual_row=0 if residual is None else residual.stride(0),
                residual_column=0 if residual is None else residual.stride(1),
                out=out,
                slots_a_token=self.slots_a_token,
                last=self.last,
                columns=rows.size(1),
                BLOCK_N=block,
                **launch.options(4),
            )
        return out

    def grad_matrices(self, left: Tensor, right: Tensor, like: Tensor, *, by_token: tuple[bool, bool]) -> Tensor:
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        blocks, options = self.tile("matrices")
        down, across = triton.cdiv(out.size(1), blocks["BLOCK_M"]), triton.cdiv(out.size(2), blocks["BLOCK_N"])
        if out.numel() > 0:
            kernels.grad_matrices_kernel[(self.experts * down * across,)](
                left=left,
                left_row=left.stride(0),
                right=right,
                right_row=right.stride(0),
                order=self.order,
                offsets=self.offsets,
                out=out,
                slots_a_token=self.slots_a_token,
                last=self.last,
                height=out.size(1),
                width=out.size(2),
                LEFT_BY_TOKEN=by_token[0],
                RIGHT_BY_TOKEN=by_token[1],
                **blocks,
                **options,
            )
        return out

    def grad_biases(self, of: Tensor, weights: Tensor | None, dtype: torch.dtype, *, by_token: bool) -> Tensor:
        out = self.new(self.experts, of.size(1), dtype=dtype)
        if out.numel() > 0:
            kernels.grad_biases_kernel[(self.experts, triton.cdiv(out.size(1), _BLOCK_N))](
                of=of,
                weights=weights,
                order=self.order,
                offsets=self.offsets,
                out=out,
                slots_a_token=self.slots_a_token,
                last=self.last,
                columns=out.size(1),
                BY_TOKEN=by_token,
                BLOCK_M=_BIAS_ROWS,
                BLOCK_N=_BLOCK_N,
                **launch.options(4),
            )
        return out


# --- operators ----------------------------------------------------------------------------------------------------------
def moe_mlp(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    packed_in: Tensor | None,
    packed_out: Tensor | None,
    packed_gate: Tensor | None,
    current: Tensor | None,
    residual: Tensor | None,
    activation: int,
    max_slots: int,
    need_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::moe_mlp. Slots beyond `max_slots`, which there should be none of, are left out."""
    call = _Call((x, w_in, w_gate, w_out), x, expert_ids, w_in.size(0), max_slots)
    hidden, pre = call.new(max_slots, w_in.size(1)), None
    pre_gate = None
    if need_pre:
        pre = torch.empty_like(hidden)
        pre_gate = None if w_gate is None else torch.empty_like(hidden)
    call.over_rows(
        kernels.hidden_kernel,
        "hidden" if w_gate is None else "gated",
        x.size(1),
        w_in.size(1),
        x=x,
        x_row=x.stride(0),
        w_in=_by_rows(w_in),
        w_gate=_by_rows(w_gate),
        b_in=_contiguous(b_in),
        b_gate=_contiguous(b_gate),
        hidden=hidden,
        pre=pre,
        pre_gate=pre_gate,
        ACTIVATION=ACTIVATIONS[activation],
    )
    rows = call.new(max_slots, w_out.size(1))
    call.product(hidden, _by_rows(w_out), b_out, rows, by_token=False)
    out = call.combine(rows, weights.contiguous(), residual)
    return out, x.new_empty(0) if pre is None else pre, x.new_empty(0) if pre_gate is None else pre_gate


def moe_mlp_backward(
    grad: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::moe_mlp_backward."""
    need, gated, flat = moe_needs(needs), w_gate is not None, weights.contiguous()
    call = _Call((grad, x, w_in, w_gate, w_out), x, expert_ids, w_in.size(0), pre.size(0))
    columns = w_in.size(1)
    parts = call.blocks("backward", columns)
    before = before_gate = weighted = dots = None
    if need["x"] or need["w_in"] or need["b_in"]:
        before = torch.empty_like(pre)
    if gated and (need["x"] or need["w_gate"] or need["b_gate"]):
        before_gate = torch.empty_like(pre)
    if need["w_out"]:
        weighted = torch.empty_like(pre)
    if need["weights"]:
        dots = call.new(parts, call.last, dtype=torch.float32)
    call.over_rows(
        kernels.hidden_backward_kernel,
        "backward",
        grad.size(1),
        columns,
        grad=grad,
        w_out=_by_columns(w_out),
        pre=pre,
        pre_gate=pre_gate if gated else None,
        weights=flat,
        before=before,
        before_gate=before_gate,
        weighted=weighted,
        dots=dots,
        ACTIVATION=ACTIVATIONS[activation],
    )
    grads = {
        name: x.new_empty(0) if like is None else like.new_empty(0)
        for name, like in zip(
            MOE_GRADIENTS,
            (x, weights, w_in, w_out, w_gate, b_in, b_out, b_gate),
            strict=True,
        )
    }
    if need["x"]:
        rows = call.new(call.last, x.size(1))
        also = (before_gate, _by_columns(w_gate)) if gated else None
        call.product(before, _by_columns(w_in), None, rows, also=also, by_token=False)
        grads["x"] = call.combine(rows, None, None)
    if need["weights"]:
        grads["weights"] = torch.empty_like(flat)
        if call.slots > 0:
            kernels.slot_weights_kernel[(triton.cdiv(call.slots, _BLOCK_S),)](
                dots=dots,
                grad=grad,
                b_out=_contiguous(b_out),
                expert_ids=expert_ids.contiguous(),
                positions=call.positions,
                out=grads["weights"],
                slots=call.slots,
                parts=parts,
                slots_a_token=call.slots_a_token,
                last=call.last,
                columns=grad.size(1),
                BLOCK_S=_BLOCK_S,
                BLOCK_N=_BLOCK_N,
                **launch.options(4),
            )
    if need["w_in"]:
        grads["w_in"] = call.grad_matrices(before, x, w_in, by_token=(False, True))
    if need["w_out"]:
        grads["w_out"] = call.grad_matrices(grad, weighted, w_out, by_token=(True, False))
    if need["w_gate"] and w_gate is not None:
        grads["w_gate"] = call.grad_matrices(before_gate, x, w_gate, by_token=(False, True))
    if need["b_in"] and b_in is not None:
        grads["b_in"] = call.grad_biases(before, None, b_in.dtype, by_token=False)
    if need["b_out"] and b_out is not None:
        grads["b_out"] = call.grad_biases(grad, flat, b_out.dtype, by_token=True)
    if need["b_gate"] and b_gate is not None:
        grads["b_gate"] = call.grad_biases(before_gate, None, b_gate.dtype, by_token=False)
    return tuple(grads.values())  # type: ignore[return-value]


def grouped_linear(
    x: Tensor, group_ids: Tensor, weight: Tensor, packed: Tensor | None, current: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The operator mmkernels::grouped_linear."""
    call = _Call((x, weight), x, group_ids[:, None], weight.size(0))
    out = call.new(x.size(0), weight.size(1))
    call.product(x, _by_rows(weight), bias, out, by_token=True)
    return out


def grouped_linear_backward(
    grad: Tensor,
    x: Tensor,
    group_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mmkernels::grouped_linear_backward."""
    call = _Call((grad, x, weight), x, group_ids[:, None], weight.size(0))
    like = x if bias is None else bias
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), like.new_empty(0)
    if need_x:
        grad_x = call.new(*x.shape)
        call.product(grad, _by_columns(weight), None, grad_x, by_token=True)
    if need_weight:
        grad_weight = call.grad_matrices(grad, x, weight, by_token=(True, True))
    if need_bias:
        grad_bias = call.grad_biases(grad, None, like.dtype, by_token=True)
    return grad_x, grad_weight, grad_bias
