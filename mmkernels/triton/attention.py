"""Attention in Triton: how its kernels are launched, those of attention_kernels.py, whose index glossary holds here too, and
of attention_tiny.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.reference import attention as reference
from mmkernels.triton import attention_kernels as kernels
from mmkernels.triton import attention_tiny as tiny
from mmkernels.triton import launch, pinned
from mmkernels.triton.pinned import Tile

_DECODE_ROWS = 16  # up to so many queries of one head of k, decoding kernels read its keys once for all of them
_PART_KEYS = 256  # of which a part of the keys has at least as many
_PARTS = 64
_PROGRAMS = 512  # more parts than fill a GPU are no use
_DELTA_ROWS = 16
_LEAST_SCALE = 1e-30  # that makes the highest product the highest score; 0 would make a hidden key's -inf no number
_TINY_TOKENS = 32  # sequences of up to so many queries and keys share a tile with others
_TINY_LACKS = ("cu_q", "limits", "segments_q", "gate", "softcap", "threshold")  # what their kernels do not take

# The tiles where no table pins others: what spills nowhere and keeps within the shared memory of the small GPUs of a make,
# 99 KiB of CUDA's and 64 KiB of AMD's (python_tests/test_triton_attention.py compiles all of it). By kind of kernel, for
# heads of up to 64, 128 and 256 channels, each for calls without and for calls with what makes them rich. Sequences that are
# tiny have tiles for up to 64 channels.
_Tiles = dict[str, tuple[tuple[Tile, Tile], ...]]
_CLASSES = (64, 128, 256)
_RICH = ("bias", "mask", "limits", "segments_q", "gate", "softcap", "threshold")


def _same(*tiles: Tile) -> tuple[tuple[Tile, Tile], ...]:
    return tuple((tile, tile) for tile in tiles)


_HALF: dict[str, _Tiles] = {
    "cuda": {
        "forward": (
            ((128, 64, 8, 3), (64, 64, 4, 3)),
            ((128, 64, 8, 2), (32, 32, 4, 2)),
            ((64, 32, 8, 2), (32, 32, 4, 2)),
        ),
        "decode": (
            ((16, 64, 4, 2), (16, 64, 4, 2)),
            ((16, 64, 4, 3), (16, 32, 4, 1)),
            ((16, 32, 4, 1), (16, 32, 4, 1)),
        ),
        "queries": (
            ((128, 64, 8, 2), (128, 64, 8, 2)),
            ((64, 32, 4, 2), (32, 32, 4, 1)),
            ((32, 32, 4, 1), (16, 32, 4, 1)),
        ),
        "keys": (
            ((64, 64, 8, 2), (32, 32, 4, 1)),
            ((32, 64, 8, 1), (32, 32, 8, 1)),
            ((32, 32, 8, 1), (16, 16, 8, 1)),
        ),
        "bias": _same((32, 32, 8, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        "tiny forward": (((64, 64, 8, 1), (64, 64, 4, 1)),),
        "tiny backward": _same((64, 64, 4, 1)),
    },
    "hip": {
        "forward": (
            ((128, 64, 4, 2), (128, 64, 4, 2)),
            ((128, 64, 8, 1), (64, 64, 4, 1)),
            ((64, 32, 4, 1), (64, 32, 4, 1)),
        ),
        "decode": _same((16, 64, 4, 1), (16, 64, 4, 1), (16, 64, 4, 1)),
        "queries": _same((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
        "keys": (
            ((32, 64, 4, 1), (32, 64, 4, 1)),
            ((32, 64, 8, 1), (32, 32, 4, 1)),
            ((32, 32, 4, 1), (16, 32, 8, 1)),
        ),
        "bias": _same((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
        "tiny forward": _same((64, 64, 4, 1)),
        "tiny backward": _same((64, 64, 4, 1)),
    },
}
# Heads of 65 to 128 channels, not a multiple of 16, in half precision on CUDA: rows begin anywhere, so that tiles are loaded
# element by element, with an address in registers for each.
_UNALIGNED: dict[str, tuple[Tile, Tile]] = {
    "forward": ((32, 32, 8, 2), (32, 32, 4, 2)),
    "decode": ((16, 32, 8, 1), (16, 32, 4, 1)),
    "queries": ((32, 32, 8, 2), (16, 32, 8, 1)),
    "keys": ((16, 32, 8, 1), (16, 32, 8, 1)),
}
_SINGLE: dict[str, _Tiles] = {
    "cuda": {
        "forward": _same((64, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
        "decode": _same((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
        "queries": (
            ((32, 32, 8, 1), (32, 32, 8, 1)),
            ((16, 32, 8, 1), (16, 32, 8, 1)),
            ((16, 16, 16, 1), (16, 16, 4, 1)),
        ),
        "keys": (
            ((32, 32, 8, 1), (32, 32, 8, 1)),
            ((16, 32, 8, 1), (16, 32, 8, 1)),
            ((16, 16, 16, 1), (16, 16, 8, 1)),
        ),
        "bias": _same((16, 32, 8, 1), (32, 32, 8, 1), (16, 16, 16, 1)),
        "tiny forward": _same((32, 32, 8, 1)),
        "tiny backward": _same((32, 32, 8, 1)),
    },
    "hip": {
        "forward": _same((64, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
        "decode": _same((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        "queries": _same((32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "keys": _same((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "bias": _same((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
        "tiny forward": _same((32, 32, 4, 1)),
        "tiny backward": _same((32, 32, 4, 1)),
    },
}


# --- operands -----------------------------------------------------------------------------------------------------------
def _heads(x: Tensor | None, packed: bool) -> tuple[Any, ...] | None:
    """[B, H, L, ...] or packed [T, H, ...] as an operand of heads."""
    if x is None:
        return None
    return (x, 0, x.stride(1), x.stride(0)) if packed else (x, *x.stride()[:3])


def _flat(x: Tensor, packed: bool) -> tuple[Any, ...]:
    """The same for kernels that take rows (outer, middle, inner): (b, head, token) or, packed, (token, head, 0)."""
    return (x, x.stride(0), x.stride(1), 0) if packed else (x, *x.stride()[:3])


def _rows(x: Tensor | None, packed: bool) -> tuple[Any, ...] | None:
    """[B or 1, L] or packed [T] as an operand of rows."""
    if x is None:
        return None
    return (x, 0, 0, x.stride(0)) if packed else (x, 0 if x.size(0) == 1 else x.stride(0), 0, x.stride(1))


def _four(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


def _scores(x: Tensor | None, longest: int) -> tuple[Any, ...] | None:
    """What broadcasts to [B, H, Lq, Lk] as an operand of scores."""
    if x is None:
        return None
    x = _four(x)
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (x, *strides, *(max(2**31 - 1, longest) if size == 1 else size for size in x.shape[2:]))


class _Call:
    """One call: what all of its kernels are given, and how they are launched."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        limits: Tensor | None,
        segment_ids_q: Tensor | None,
        segment_ids_k: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        value_gate: Tensor | None,
        seed: Tensor | None,
        scale: float,
        softcap: float,
        dropout_p: float,
        window_left: int,
        window_right: int,
        bottom_right: bool,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> None:
        self.packed = packed = cu_seqlens_q is not None
        self.heads, self.kv_heads = q.size(1), k.size(1)
        self.group = self.heads // self.kv_heads
        self.sequences = q.size(0) if cu_seqlens_q is None else cu_seqlens_q.size(0) - 1
        self.len_q, self.len_k = (x.size(0 if packed else 2) for x in (q, k))
        self.longest_q = (max_seqlen_q or self.len_q) if packed else self.len_q
        self.longest_k = (max_seqlen_k or self.len_k) if packed else self.len_k
        longest = self.len_q + self.len_k
        dropped = dropout_p > 0
        self.like = q
        self.channels = (q.size(-1), v.size(-1))
        self.arguments = {
            "q": _heads(q, packed),
            "k": _heads(k, packed),
            "v": _heads(v, packed),
            "bias": _scores(bias, longest),
            "mask": _scores(None if mask is None else mask.view(torch.uint8), longest),
            "limits": _rows(limits, packed),
            "segments_q": _rows(segment_ids_q, packed),
            "segments_k": _rows(segment_ids_k, packed),
            "gate": _heads(value_gate, packed),
            "cu_q": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
            "cu_k": None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
            "seed": seed if dropped else None,
            "heads": self.heads,
            "group": self.group,
            "len_q": self.len_q,
            "len_k": self.len_k,
            "window_left": window_left if 0 <= window_left < longest else None,
            "window_right": window_right if 0 <= window_right < longest else None,
            "scale": scale,
            "softcap": softcap if softcap > 0 else None,
            "threshold": reference.dropout_threshold(dropout_p) if dropped else None,
            "keep_scale": 1 / (1 - dropout_p) if dropped else None,
            "BASE2": q.dtype != torch.float32 and bias is None and softcap <= 0 and scale > _LEAST_SCALE,
            "BOTTOM_RIGHT": bottom_right,
        }

    def new(self, shape: tuple[int, ...]) -> Tensor:
        """[B, H, L, C], in memory [B, L, H, C]; packed as it is."""
        if self.packed:
            return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)
        batch, heads, length, channels = shape
        return torch.empty((batch, length, heads, channels), dtype=self.like.dtype, device=self.like.device).transpose(1, 2)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def tile(self, kind: str) -> tuple[dict[str, int], dict[str, Any]]:
        """(blocks, options) of a kind of kernel."""
        rich = any(self.arguments[name] is not None for name in _RICH)
        return _tile(kind, self.like.dtype == torch.float32, *self.channels, rich)

    def resident(self) -> int:
        """How many programs of the forward kernel share all tiles on each multiprocessor; 0 where each tile has its own."""
        words = ("attention", "resident", *_words(self.like.dtype == torch.float32, _width(*self.channels)))
        (resident,) = pinned.tile(words, (0,), ("resident",))
        return resident

    def over_tokens(self, kernel: Any, kind: str, owners: int, fold: int = 1, parts: int = 1, **arguments: Any) -> None:
        """Launches a kernel whose programs own blocks of queries, or of keys, of one of `owners` heads."""
        blocks, options = self.tile(kind)
        block, tokens = (blocks["BLOCK_N"], self.len_k) if kind == "keys" else (blocks["BLOCK_M"], self.len_q * fold)
        tiles = tokens // block + self.sequences if self.packed else triton.cdiv(tokens, block) * self.sequences
        programs = owners * tiles
        if kernel is kernels.forward_kernel:
            resident = self.resident() if kind == "forward" else 0
            arguments.update(all_tiles=programs, PERSISTENT=resident > 0)
            programs = min(programs, resident * pinned.multiprocessors()) if resident > 0 else programs
        if self.sequences * owners * tokens > 0:
            kernel[(programs, parts)](
                **self.arguments, **arguments, tiles=tiles, sequences=self.sequences, **blocks, **options
            )

    @property
    def is_tiny(self) -> bool:
        """Whether there are tiles for several sequences each, and kernels for all that the call has."""
        return (
            max(self.len_q, self.len_k) <= _TINY_TOKENS
            and max(self.channels) <= _CLASSES[0]
            and self.group == 1
            and all(self.arguments[name] is None for name in _TINY_LACKS)
        )

    def over_pairs(self, kernel: Any, kind: str, **arguments: Any) -> None:
        """Launches a kernel whose programs own some heads of some sequences, all queries and keys of them."""
        blocks, options = self.tile(kind)
        slot_q, slot_k = launch.block(self.len_q), launch.block(self.len_k)
        at_once = min(blocks.pop("BLOCK_M") // slot_q, blocks.pop("BLOCK_N") // slot_k)
        pairs = self.sequences * self.heads
        if pairs > 0:
            kernel[(triton.cdiv(pairs, at_once),)](
                **{name: self.arguments[name] for name in tiny.SHARED},
                **arguments,
                pairs=pairs,
                PAIRS=at_once,
                SLOT_Q=slot_q,
                SLOT_K=slot_k,
                **blocks,
                **options,
            )

    def over_rows(self, kernel: Any, rows: int, block: int, **arguments: Any) -> None:
        """Launches a kernel whose programs own rows of out, in the order of lse."""
        if rows > 0:
            inner = 1 if self.packed else self.len_q
            values = self.channels[1]
            kernel[(triton.cdiv(rows, block),)](
                **arguments,
                middle=self.heads,
                inner=inner,
                rows=rows,
                DV=values,
                BLOCK_DV=launch.block(values),
                **launch.options(4, 1),
            )

    def parts(self) -> int:
        """Into how many parts the keys of few queries are cut: a matter of sizes alone."""
        programs = max(1, self.sequences * self.kv_heads)
        return max(1, min(triton.cdiv(self.longest_k, _PART_KEYS), _PROGRAMS // programs, _PARTS))


def _width(channels: int, values: int) -> int:
    """The class of channels, by its place in the table."""
    return next(i for i, most in enumerate(_CLASSES) if most >= max(launch.block(channels), launch.block(values)))


def _words(single: bool, width: int) -> tuple[object, ...]:
    """What a tile's name says of dtype and channels."""
    return "single" if single else "half", _CLASSES[width]


def _tile(kind: str, single: bool, channels: int, values: int, rich: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """(blocks, options) of a kind of kernel."""
    width = _width(channels, values)
    pair = (_SINGLE if single else _HALF)[launch.make()][kind][width]
    unaligned = width == 1 and not single and launch.make() == "cuda" and (channels % 16 != 0 or values % 16 != 0)
    if unaligned:
        pair = _UNALIGNED.get(kind, pair)
    words = ("attention", kind, *_words(single, width), unaligned and "unaligned", rich and "rich")
    block_m, block_n, warps, stages = pinned.tile(words, pair[rich])
    blocks = {"D": channels, "DV": values, "BLOCK_D": launch.block(channels), "BLOCK_DV": launch.block(values)}
    return {**blocks, "BLOCK_M": block_m, "BLOCK_N": block_n}, launch.options(warps, stages)


# --- operators ----------------------------------------------------------------------------------------------------------
def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operator mmkernels::attention."""
    call = _Call(q, k, v, *rest)
    out, lse = call.new((*q.shape[:-1], v.size(-1))), call.floats(*q.shape[:-1])
    if call.is_tiny:
        call.over_pairs(tiny.tiny_forward_kernel, "tiny forward", out=_heads(out, call.packed), lse=_heads(lse, call.packed))
        return out, lse
    if call.longest_q * call.group > _DECODE_ROWS:
        call.over_tokens(
            kernels.forward_kernel,
            "forward",
            call.heads,
            out=_heads(out, call.packed),
            lse=_heads(lse, call.packed),
            split_rows=0,
            DECODE=False,
        )
        return out, lse
    parts = call.parts()
    parts_out, parts_lse = (
        (out[None], lse[None]) if parts == 1 else (call.floats(parts, *out.shape), call.floats(parts, *lse.shape))
    )
    call.over_tokens(
        kernels.forward_kernel,
        "decode",
        call.kv_heads,
        call.group,
        parts,
        out=_heads(parts_out[0], call.packed),
        lse=_heads(parts_lse[0], call.packed),
        split_rows=lse.numel(),
        DECODE=True,
    )
    if parts > 1:
        call.over_rows(
            kernels.combine_kernel,
            lse.numel(),
            1,
            parts_out=parts_out,
            parts_lse=parts_lse,
            out=_flat(out, call.packed),
            lse=lse,
            parts=parts,
        )
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    limits: Tensor | None,
    segment_ids_q: Tensor | None,
    segment_ids_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    value_gate: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator mmkernels::attention_backward."""
    *shared, need_bias, need_gate = numbers
    ids = (mask, limits, segment_ids_q, segment_ids_k, cu_seqlens_q, cu_seqlens_k)
    call = _Call(q, k, v, bias, *ids, value_gate, seed, *shared)
    packed = call.packed
    grad_q, grad_k, grad_v = (call.new(x.shape) for x in (q, k, v))

    def small(needed: bool, like: Tensor | None) -> Tensor:
        dtype = q.dtype if like is None else like.dtype
        return torch.empty(like.shape if needed and like is not None else (0,), dtype=dtype, device=q.device)

    grad_bias, grad_gate = small(need_bias, bias), small(need_gate, value_gate)
    delta = torch.empty_like(lse)
    exact = q.dtype == torch.float32
    is_tiny, wants_bias = call.is_tiny, bias is not None and grad_bias.numel() > 0
    norm = torch.empty_like(lse) if (wants_bias if is_tiny else exact or bias is not None) else None
    stats: dict[str, Any] = {
        "grad_out": _heads(grad_out, packed),
        "lse": _heads(lse, packed),
        "norm": _heads(norm, packed),
        "delta": _heads(delta, packed),
    }
    queries: dict[str, Any] = {**stats, "grad_lse": _heads(grad_lse, packed)}
    of_keys: dict[str, Any] = {"grad_k": _heads(grad_k, packed), "grad_v": _heads(grad_v, packed)}
    if is_tiny:
        call.over_pairs(tiny.tiny_backward_kernel, "tiny backward", **queries, grad_q=_heads(grad_q, packed), **of_keys)
    else:
        if not exact:
            call.over_rows(
                kernels.delta_kernel,
                lse.numel(),
                _DELTA_ROWS,
                grad_out=_flat(grad_out, packed),
                out=_flat(out, packed),
                grad_lse=grad_lse,
                delta=delta,
                BLOCK_M=_DELTA_ROWS,
            )
        if norm is not None:
            call.over_tokens(kernels.queries_kernel, "queries", call.heads, **queries, grad_q=None, STATS=True)
        call.over_tokens(
            kernels.queries_kernel, "queries", call.heads, **queries, grad_q=_heads(grad_q, packed), STATS=False
        )
        of_gate = _heads(grad_gate, packed) if grad_gate.dim() > 1 else None
        call.over_tokens(kernels.keys_kernel, "keys", call.kv_heads, **stats, **of_keys, grad_gate=of_gate)
    if bias is not None and wants_bias:
        blocks, options = call.tile("bias")
        batch, heads, size_q, size_k = _four(bias).shape
        tiles_q = 1 if size_q == 1 else triton.cdiv(size_q, blocks["BLOCK_M"])
        tiles_k = 1 if size_k == 1 else triton.cdiv(size_k, blocks["BLOCK_N"])
        natural = {name: value for name, value in call.arguments.items() if name != "BASE2"}  # with a bias scores always are
        kernels.bias_kernel[(batch * heads * tiles_q * tiles_k,)](
            **natural,
            **stats,
            grad_bias=grad_bias,
            own_heads=heads,
            sum_batch=call.sequences if batch == 1 else 1,
            sum_heads=call.heads if heads == 1 else 1,
            size_q=size_q,
            size_k=size_k,
            SUM_Q=size_q == 1,
            SUM_K=size_k == 1,
            **blocks,
            **options,
        )
    return grad_q, grad_k, grad_v, grad_bias, grad_gate
