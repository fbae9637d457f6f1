"""The card of the norm and the rotary embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.cards.card import BadInput, BenchCase, Call, Card, Cost, Make, Overhead, Sample, Target, drawer
from mmkernels.ops import qk_norm_rope as ops
from mmkernels.reference import qk_norm_rope as reference


# --- calls ------------------------------------------------------------------------------------------------------------
def _angles(draw: Callable[..., Tensor], *shape: int) -> tuple[Tensor, Tensor]:
    angles = 3 * draw(*shape)
    return angles.cos(), angles.sin()


def _call(
    batch: int,
    heads: tuple[int, int],
    length: int | tuple[int, int],
    channels: int,
    *,
    pairs: int | None = None,
    batch_of_angles: int | None = None,
    weights: str = "both",
    layout: str = "contiguous",
    **kwargs: Any,
) -> Make:
    """`pairs`: how many channels / 2 are rotated, None for no rotation. `weights`: both, q, none, or float32. `layout`:
    contiguous; packed (q and k are views of one QKV projection); odd offset; or expanded (one head of k for all)."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=g)

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype)

        lengths = (length, length) if isinstance(length, int) else length
        if layout == "packed":
            packed = place(draw(batch, lengths[0], heads[0] + 2 * heads[1], channels)).transpose(1, 2)
            q, k = packed[:, : heads[0]], packed[:, heads[0] : heads[0] + heads[1]]
        elif layout == "expanded":
            q = place(draw(1, heads[0], lengths[0], channels)).expand(batch, -1, -1, -1)
            k = place(draw(batch, 1, lengths[1], channels)).expand(-1, heads[1], -1, -1)
        else:
            q, k = (place(draw(batch, h, n, channels)) for h, n in zip(heads, lengths, strict=True))
        if layout == "odd offset":
            q, k = (torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x) for x in (q, k))
        kept = torch.float32 if weights == "float32" and dtype != torch.float64 else dtype
        more = dict(kwargs)
        for name in {"none": (), "q": ("q_weight",)}.get(weights, ("q_weight", "k_weight")):
            more[name] = (1 + 0.1 * draw(channels)).to(device=device, dtype=kept)
        if pairs is None:
            return Call((q, k), more)
        shape = (lengths[0], pairs) if batch_of_angles is None else (batch_of_angles, lengths[0], pairs)
        return Call((q, k, *(t.to(device=device, dtype=kept) for t in _angles(draw, *shape))), more)

    return make


def _rotated(name: str, make: Make) -> Sample:
    """cos and sin are constants, which finite differences would see: python_tests/test_qk_norm_rope.py holds them still."""
    return Sample(name, make, gradcheck=False)


_SAMPLES = (
    Sample("small", _call(2, (3, 2), 5, 8)),
    _rotated("rotated", _call(2, (3, 2), 5, 8, pairs=4)),
    _rotated("interleaved", _call(2, (3, 2), 5, 8, pairs=4, interleaved=True)),
    _rotated("odd sizes", _call(3, (1, 3), 7, 13, pairs=5)),
    _rotated("odd sizes, interleaved", _call(3, (1, 3), 7, 13, pairs=5, interleaved=True)),
    _rotated("one token, two channels", _call(1, (1, 1), 1, 2, pairs=1)),
    _rotated("vector tails", _call(2, (2, 1), 3, 83, pairs=21)),
    _rotated("vector tails, interleaved", _call(2, (2, 1), 3, 83, pairs=21, interleaved=True)),
    _rotated("angles of each sample", _call(3, (2, 2), 4, 10, pairs=5, batch_of_angles=3)),
    _rotated("angles of all samples", _call(3, (2, 2), 4, 10, pairs=2, batch_of_angles=1, interleaved=True)),
    _rotated("rotation alone", _call(2, (3, 2), 5, 12, pairs=6, norm=None, weights="none")),
    _rotated("rotation alone, interleaved", _call(2, (3, 2), 5, 12, pairs=4, norm=None, weights="none", interleaved=True)),
    Sample("neither", _call(2, (3, 2), 5, 12, norm=None, weights="none")),
    Sample("no pairs", _call(2, (3, 2), 5, 9, pairs=0)),
    Sample("no weight", _call(2, (3, 2), 5, 9, weights="none")),
    Sample("weight of q alone", _call(2, (3, 2), 5, 9, weights="q")),
    Sample("float32 parameters", _call(2, (3, 2), 5, 20, weights="float32")),
    _rotated("float32 parameters, rotated", _call(2, (3, 2), 5, 20, pairs=10, weights="float32")),
    _rotated("float32 parameters, interleaved", _call(2, (3, 2), 5, 20, pairs=8, weights="float32", interleaved=True)),
    Sample("large eps", _call(2, (3, 2), 5, 9, eps=0.5)),
    Sample("L2", _call(2, (3, 2), 5, 9, norm="l2")),
    _rotated("L2, rotated", _call(2, (3, 2), 5, 40, norm="l2", pairs=20, weights="none")),
    Sample("L2 of lengths below eps", _call(2, (3, 2), 5, 9, norm="l2", eps=100.0)),
    Sample("LayerNorm", _call(2, (3, 2), 5, 9, norm="layer")),
    Sample("LayerNorm, float32 parameters", _call(2, (3, 2), 5, 19, norm="layer", weights="float32")),
    _rotated("LayerNorm, rotated", _call(2, (3, 2), 5, 64, norm="layer", pairs=32)),
    Sample("other tokens for k", _call(2, (3, 2), (5, 11), 9)),
    _rotated("packed", _call(2, (4, 2), 5, 16, pairs=8, layout="packed")),
    _rotated("odd offset", _call(2, (3, 2), 5, 24, pairs=12, layout="odd offset")),
    Sample("expanded", _call(3, (2, 4), 5, 8, layout="expanded")),
    _rotated("no samples", _call(0, (3, 2), 5, 8, pairs=4)),
    _rotated("no tokens", _call(2, (3, 2), 0, 8, pairs=4)),
    _rotated("no keys", _call(2, (3, 0), 5, 8, pairs=4)),
    _rotated("no channels", _call(2, (3, 2), 5, 0, pairs=0)),
    _rotated("wide heads", _call(1, (2, 1), 2, 1500, pairs=500)),
    _rotated("many tokens", _call(2, (3, 1), 70, 16, pairs=8)),
    _rotated("ViT-B/16", _call(8, (12, 12), 197, 64, pairs=32)),
)


# --- bad input --------------------------------------------------------------------------------------------------------
_SMALL = _call(3, (2, 4), 5, 8, pairs=4)


def _bad(name: str, which: int | str, value: Any, error: type[Exception], argument: str, make: Make = _SMALL) -> BadInput:
    """The call with one argument replaced, or by what `value` makes of it."""

    def bad(device: torch.device) -> Call:
        call = make(device, torch.float32, torch.Generator())
        args, kwargs = list(call.args), dict(call.kwargs)
        holder: Any = args if isinstance(which, int) else kwargs
        before = holder[which] if isinstance(which, int) else holder.get(which)
        holder[which] = value(before) if callable(value) else value
        return Call(tuple(args), kwargs)

    return BadInput(name, bad, error, argument)


def _bad_heads(position: int, name: str) -> tuple[BadInput, ...]:
    return (
        _bad(f"{name} of three dimensions", position, lambda x: x[0], ValueError, name),
        _bad(f"{name} strided", position, lambda x: torch.cat((x, x), 3)[..., ::2], ValueError, name),
        _bad(f"{name} of integers", position, lambda x: x.int(), TypeError, name),
        _bad(f"{name} complex", position, lambda x: x.to(torch.complex64), TypeError, name),
        _bad(f"{name} a list", position, lambda x: x.tolist(), TypeError, name),
        _bad(f"{name} is None", position, None, TypeError, name),
        _bad(f"{name} sparse", position, lambda x: x.to_sparse(), TypeError, name),
    )


def _bad_angles(position: int, name: str) -> tuple[BadInput, ...]:
    return (
        _bad(f"{name} too short", position, lambda x: x[:4], ValueError, name),
        _bad(f"{name} of one dimension", position, lambda x: x[0], ValueError, name),
        _bad(f"{name} of two samples", position, lambda x: torch.stack((x, x)), ValueError, name),
        _bad(f"{name} with each angle twice", position, lambda x: torch.cat((x, x), 1), ValueError, name),
        _bad(f"{name} strided", position, lambda x: torch.cat((x, x), 1)[:, ::2], ValueError, name),
        _bad(f"{name} of another dtype", position, lambda x: x.half(), TypeError, name),
        _bad(f"{name} of integers", position, lambda x: x.int(), TypeError, name),
        _bad(f"{name} is a number", position, 1.0, TypeError, name),
        _bad(f"{name} is None", position, None, ValueError, name),
        _bad(f"{name} on another device", position, lambda x: x.to("meta"), ValueError, name),
    )


def _bad_weight(name: str) -> tuple[BadInput, ...]:
    return (
        _bad(f"{name} too short", name, lambda w: w[:7], ValueError, name),
        _bad(f"{name} is a matrix", name, lambda w: w[None], ValueError, name),
        _bad(f"{name} is half beside float32", name, lambda w: w.half(), TypeError, name),
        _bad(f"{name} is a list", name, lambda w: w.tolist(), TypeError, name),
        _bad(f"{name} on another device", name, lambda w: w.to("meta"), ValueError, name),
    )


_BAD_INPUTS = (
    *_bad_heads(0, "q"),
    *_bad_heads(1, "k"),
    _bad("k of another batch", 1, lambda k: k[:2], ValueError, "k"),
    _bad("k of other channels", 1, lambda k: k[..., :6], ValueError, "k"),
    _bad("k of fewer tokens than angles", 1, lambda k: k[:, :, :4], ValueError, "k"),
    _bad("k of another dtype", 1, lambda k: k.double(), TypeError, "k"),
    _bad("k on another device", 1, lambda k: k.to("meta"), ValueError, "k"),
    *_bad_angles(2, "cos"),
    *_bad_angles(3, "sin"),
    _bad("sin of fewer pairs", 3, lambda s: s[:, :3], ValueError, "sin"),
    *_bad_weight("q_weight"),
    *_bad_weight("k_weight"),
    _bad("weight without a norm", "norm", None, ValueError, "q_weight"),
    _bad("unknown norm", "norm", "batch", ValueError, "norm"),
    _bad("norm is a number", "norm", 1, TypeError, "norm"),
    _bad("eps is a string", "eps", "1e-6", TypeError, "eps"),
    _bad("eps is a huge int", "eps", 10**400, ValueError, "eps"),
    _bad("interleaved is a string", "interleaved", "yes", TypeError, "interleaved"),
)


# --- benchmark --------------------------------------------------------------------------------------------------------
# The peers are torch's own norms with the rotation written out, and what language models in transformers have: the RMS norm
# written out too.
def _by_hand(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
        first, second = normed.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    return one(q, q_weight), one(k, k_weight)


def _moved(call: Call, tensors: int) -> Cost:
    return Cost(flops=0.0, bytes=float(sum(tensors * x.numel() * x.element_size() for x in call.args[:2])))


def _bench(
    name: str, make: Make, peers: dict[str, Callable[..., Any]], tensors: int, ratios: tuple[float, float], *, backward: bool
) -> tuple[BenchCase, ...]:
    """One case for float32 and one for bfloat16, each with its own target."""
    return tuple(
        BenchCase(
            name,
            make,
            ops.qk_norm_rope,
            peers,
            lambda call: _moved(call, tensors),
            dtypes=(dtype,),
            backward=backward,
            compiled_peers=tuple(peers),
            target=Target((*peers, "compile"), ratio),
        )
        for dtype, ratio in zip((torch.float32, torch.bfloat16), ratios, strict=True)
    )


_LLAMA = _call(1, (32, 8), 512, 128, pairs=64)
_LLAMA_PEERS = {"eager": reference.qk_norm_rope, "by hand": _by_hand}
_VIT = _call(8, (12, 12), 197, 64, norm="layer", layout="packed")


# Of a language model with 8 heads of keys, in a number that no cache of a GPU holds: batch, length, channels.
_GPU_SIZES = (16, 4096, 128)


def _on_gpu(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
    draw = drawer(device, dtype, g)
    batch, length, channels = _GPU_SIZES
    q, k = (draw(batch, heads, length, channels) for heads in (32, 8))
    weights = {name: 1 + 0.1 * draw(channels) for name in ("q_weight", "k_weight")}
    return Call((q, k, *_angles(draw, length, channels // 2)), weights)


_GPU = BenchCase(
    "qk_norm_rope.gpu.16x32of8x4096x128",
    _on_gpu,
    ops.qk_norm_rope,
    {"by hand": _by_hand},
    lambda call: _moved(call, 2),
    dtypes=(torch.bfloat16,),
    compiled_peers=("by hand",),
    target=Target((), 0.85, of="floor"),
    devices=("cuda",),
)


def _tiny() -> Call:
    return Call((torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(3, 4), torch.randn(3, 4)))


CARDS = (
    Card(
        name="qk_norm_rope",
        family="qk_norm_rope",
        function=ops.qk_norm_rope,
        reference=reference.qk_norm_rope,
        ops=("mmkernels::qk_norm_rope", "mmkernels::qk_norm_rope_backward"),
        backends=ops.BACKENDS,
        samples=_SAMPLES,
        bad_inputs=_BAD_INPUTS,
        dtypes=ops.DTYPES,
        systems=("Mixture-of-Transformers", "IMP", "4M", "PILL"),
        summary="norm and rotary embedding of queries and keys, in one pass before attention",
        bench=(
            *_bench("qk_norm_rope.llama", _LLAMA, _LLAMA_PEERS, 2, (0.8, 1.0), backward=False),
            *_bench("qk_norm_rope.llama.backward", _LLAMA, _LLAMA_PEERS, 5, (1.0, 1.0), backward=True),
            *_bench("qk_norm_rope.vit", _VIT, {"eager": reference.qk_norm_rope}, 2, (1.0, 1.0), backward=False),
            _GPU,
        ),
        overheads=(
            Overhead("qk_norm_rope call, no gradient", _tiny, ops.qk_norm_rope, grad=False, limit_us=12.0),
            Overhead("qk_norm_rope call, with gradient", _tiny, ops.qk_norm_rope, grad=True, limit_us=30.0),
        ),
    ),
)
