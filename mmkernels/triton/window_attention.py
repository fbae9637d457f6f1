"""Window attention in Triton: how its kernels (window_attention_kernels.py, whose index glossary holds here too) are
launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.triton import launch, pinned
from mmkernels.triton import window_attention_kernels as kernels
from mmkernels.triton.pinned import Tile

MAX_CHANNELS = 256  # of a head
MAX_TOKENS = 4096  # of a window: the gradient of the table passes through sums over windows for every pair of its tokens
MAX_GRID = 2**28  # tokens and pads of a sample: three bits less than an int32 has

_PROGRAMS = 1024  # sums over windows are cut into parts, which make so many programs
_SPAN = 4  # and have at least so many windows each: their sums are to be little beside the windows
_TABLE_TILE: Tile = (32, 64, 4, 1)
_PLACES_BLOCK = 256
_SMALL = 64  # windows of so many tokens, a tile or less, may have other best tiles than those of many

# The tiles where no table pins others, by kind of kernel, for heads of up to 32, 64, 128 and 256 channels: what spills
# nowhere and keeps within the shared memory of the small GPUs of a make (python_tests/test_triton_window_attention.py
# compiles all of it). Where windows and heads are
# so small that "whole" has a tile for them, that kernel does all of backward with a window in one tile.
_CLASSES = (32, 64, 128, 256)
_Tiles = dict[str, tuple[Tile, ...]]
_HALF: dict[str, _Tiles] = {
    "cuda": {
        "forward": ((64, 32, 4, 1), (64, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "whole": ((64, 64, 8, 1),),
        "queries": ((64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "keys": ((32, 32, 8, 1), (64, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "pairs": ((32, 32, 8, 1), (64, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    },
    "hip": {
        "forward": ((64, 64, 4, 1), (64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
        "whole": ((64, 64, 4, 1),),
        "queries": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
        "keys": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
        "pairs": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    },
}
_SINGLE: dict[str, _Tiles] = {
    "cuda": {
        "forward": ((32, 32, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "whole": ((32, 32, 4, 1),),
        "queries": ((32, 16, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "keys": ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)),
        "pairs": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 16, 1)),
    },
    "hip": {
        "forward": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        "whole": ((32, 32, 4, 1),),
        "queries": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "keys": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "pairs": ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}


def _chosen(kind: str, single: bool, width: int, places: int) -> Tile:
    """The tile before it is cut to a small window."""
    default = (_SINGLE if single else _HALF)[launch.make()][kind][width]
    small = places <= _SMALL and kind != "whole" and "small"
    return pinned.tile(("window_attention", kind, "single" if single else "half", _CLASSES[width], small), default)


def _tile(kind: str, single: bool, channels: int, places: int) -> tuple[dict[str, int], dict[str, Any]]:
    """(blocks, options) of a kind of kernel."""
    block_d, most = launch.block(channels), launch.block(places)
    width = next(i for i, limit in enumerate(_CLASSES) if limit >= block_d)
    block_m, block_n, warps, stages = _chosen(kind, single, width, places)
    if most < max(block_m, block_n):
        block_m, block_n = min(block_m, most), min(block_n, most)
        warps = min(warps, max(1, block_m * block_n // 256, most * block_d * (4 if single else 2) // 1024))
    blocks = {"D": channels, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return blocks, launch.options(warps, stages)


def _is_whole(single: bool, channels: int, places: int) -> bool:
    """Whether there is a tile for whole windows."""
    return channels <= _CLASSES[0] and places <= _chosen("whole", single, 0, places)[0]


class _Call:
    """One call: what all of its kernels are given, and how they are launched."""

    def __init__(
        self,
        qkv: Tensor,
        rel_bias_table: Tensor | None,
        pad_value: Tensor | None,
        head_scale: Tensor | None,
        window: Sequence[int],
        shift: Sequence[int],
        num_heads: int,
        scale: float,
        bias_window: Sequence[int],
        pad_first: bool,
        norm_eps: float,
        mask_value: float,
    ) -> None:
        self.like, self.heads = qkv, num_heads
        sizes = tuple(qkv.shape[1:-1])
        counts = tuple(triton.cdiv(size, extent) for size, extent in zip(sizes, window, strict=True))
        by_sample = math.prod(counts)
        self.windows = qkv.size(0) * by_sample
        self.places = math.prod(window)
        self.channels = qkv.size(-1) // (3 * num_heads)
        padded = any(size % extent for size, extent in zip(sizes, window, strict=True))
        self.pads = None
        if padded and pad_value is not None:
            self.pads = pad_value.to(qkv.dtype).contiguous()
        places = torch.empty((by_sample, self.places), dtype=torch.int32, device=qkv.device)
        if self.windows > 0:
            kernels.places_kernel[(triton.cdiv(places.numel(), _PLACES_BLOCK),)](
                places=places,
                sizes=sizes,
                counts=counts,
                shift=tuple(shift),
                by_sample=by_sample,
                WINDOW=tuple(window),
                N=self.places,
                PAD_FIRST=pad_first,
                BLOCK=_PLACES_BLOCK,
                **launch.options(4, 1),
            )
        table = None
        if rel_bias_table is not None:
            table = self.floats(num_heads, rel_bias_table.size(0))
            table.copy_(rel_bias_table.t())
        self.pairs: dict[str, Any] = {
            "heads": num_heads,
            "BIAS_WINDOW": tuple(bias_window),
            "N": self.places,
            "ROWS": math.prod(2 * extent - 1 for extent in bias_window),
        }
        self.arguments: dict[str, Any] = {
            **self.pairs,
            "places": places,
            "by_sample": by_sample,
            "table": table,
            "head_scale": head_scale,
            "scale": scale,
            "norm_eps": norm_eps if norm_eps > 0 else None,
            "mask_value": mask_value,
            "SHIFTED": any(shift),
        }
        for name, operand in zip(("q", "k", "v"), self.parts_of(qkv), strict=True):
            self.arguments[name] = operand
        for i, name in enumerate(("pad_q", "pad_k", "pad_v")):
            pad = None if self.pads is None else self.pads[i * self.channels * num_heads :]
            self.arguments[name] = None if pad is None else (pad, 0, self.channels, 0)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def operand(self, x: Tensor, first: int = 0) -> tuple[Any, ...]:
        """The heads of [B, *grid, C], from channel `first` on."""
        rows = x.flatten(1, -2)
        return (rows[..., first:], rows.stride(0), self.channels, rows.stride(1))

    def parts_of(self, qkv: Tensor) -> tuple[tuple[Any, ...], ...]:
        """The heads of q, k and v."""
        return tuple(self.operand(qkv, part * self.heads * self.channels) for part in range(3))

    def by_place(self, x: Tensor) -> tuple[Any, ...]:
        """[windows, H, N] as an operand of heads."""
        return (x, *x.stride())

    def tile(self, kind: str) -> tuple[dict[str, int], dict[str, Any]]:
        return _tile(kind, self.like.dtype == torch.float32, self.channels, self.places)

    def blocks(self, kind: str) -> int:
        """Of the places of a window, in a kernel whose programs own one each."""
        return triton.cdiv(self.places, self.tile(kind)[0]["BLOCK_N" if kind == "keys" else "BLOCK_M"])

    def launch(self, kernel: Any, kind: str, programs: int, **arguments: Any) -> None:
        blocks, options = self.tile(kind)
        given = {**self.arguments, **arguments, **blocks, **options}
        if kind == "whole":
            del given["BLOCK_N"], given["norm_eps"]
        if programs > 0:
            kernel[(programs * self.heads,)](**given)

    def fold(self, of_pairs: Tensor, grad_table: Tensor) -> None:
        """Adds up [H, N, N] to the rows of the table."""
        block_m, block_n, warps, stages = _TABLE_TILE
        kernels.table_kernel[(triton.cdiv(grad_table.size(0), block_m) * self.heads,)](
            of_pairs=of_pairs,
            grad_table=grad_table,
            **self.pairs,
            BLOCK_M=block_m,
            BLOCK_N=min(block_n, launch.block(self.places)),
            **launch.options(warps, stages),
        )


# --- operators ----------------------------------------------------------------------------------------------------------
def window_attention(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::window_attention."""
    call = _Call(qkv, *rest)
    out = torch.empty((*qkv.shape[:-1], call.heads * call.channels), dtype=qkv.dtype, device=qkv.device)
    lse = call.floats(call.windows, call.heads, call.places)
    call.launch(
        kernels.forward_kernel,
        "forward",
        call.windows * call.blocks("forward"),
        out=call.operand(out),
        lse=call.by_place(lse),
    )
    return out, lse


def window_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_bias_table: Tensor | None,
    pad_value: Tensor | None,
    head_scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::window_attention_backward."""
    *shared, need_table, need_pad, need_scale = numbers
    call = _Call(qkv, rel_bias_table, pad_value, head_scale, *shared)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)

    def small(needed: bool, like: Tensor | None) -> Tensor:
        """The gradient of a parameter, of which some call has no use."""
        dtype = qkv.dtype if like is None else like.dtype
        return torch.zeros(like.shape if needed and like is not None else (0,), dtype=dtype, device=qkv.device)

    grad_table, grad_pad, grad_scale = (
        small(*of) for of in ((need_table, rel_bias_table), (need_pad, pad_value), (need_scale, head_scale))
    )
    if call.windows == 0:
        return grad_qkv, grad_table, grad_pad, grad_scale
    plain = call.arguments["norm_eps"] is None and head_scale is None
    whole = plain and _is_whole(qkv.dtype == torch.float32, call.channels, call.places)
    kind = "whole" if whole else "pairs"
    tiles = 1 if whole else call.blocks("queries")
    blocks = call.tile(kind)[0]
    programs = call.heads * math.prod(triton.cdiv(call.places, blocks[name]) for name in ("BLOCK_M", "BLOCK_N"))
    sums = grad_table.numel() + grad_pad.numel() > 0
    span = max(_SPAN, triton.cdiv(call.windows * programs, _PROGRAMS)) if sums else 1
    parts = triton.cdiv(call.windows, span)
    sums_over = {"windows": call.windows, "span": span}
    rows = parts if whole else call.windows * tiles
    of_table = call.floats(parts, call.heads, call.places, call.places) if grad_table.numel() > 0 else None
    of_pads = call.floats(rows, 2, call.heads * call.channels) if grad_pad.numel() > 0 and call.pads is not None else None
    of_scale = call.floats(rows, call.heads) if grad_scale.numel() > 0 else None
    grad_q, grad_k, grad_v = call.parts_of(grad_qkv)
    upstream = call.operand(grad_out)
    if whole:
        call.launch(
            kernels.whole_kernel,
            kind,
            parts,
            **sums_over,
            grad_out=upstream,
            grad_q=grad_q,
            grad_k=grad_k,
            grad_v=grad_v,
            of_table=of_table,
            of_pads=of_pads,
        )
    else:
        norm, delta = torch.empty_like(lse), torch.empty_like(lse)
        stats = {name: call.by_place(x) for name, x in (("lse", lse), ("norm", norm), ("delta", delta))}
        stats["grad_out"] = upstream
        of_queries = {**stats, "grad_q": grad_q, "of_pads": of_pads, "of_scale": of_scale}
        for first, last in ((0, 0), (1, 1)) if qkv.dtype == torch.float32 else ((0, 1),):
            call.launch(kernels.queries_kernel, "queries", rows, **of_queries, FIRST=first, LAST=last)
        call.launch(kernels.keys_kernel, "keys", call.windows * call.blocks("keys"), **stats, grad_k=grad_k, grad_v=grad_v)
        if of_table is not None:
            call.launch(kernels.pairs_kernel, kind, parts * programs // call.heads, **sums_over, **stats, of_table=of_table)
    if of_table is not None:
        call.fold(of_table.sum(0), grad_table)
    if of_pads is not None:
        grad_pad.view(3, -1)[1:] = of_pads.sum(0)
    if of_scale is not None:
        grad_scale.copy_(of_scale.sum(0))
    return grad_qkv, grad_table, grad_pad, grad_scale
