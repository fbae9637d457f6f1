"""The cards of hashed binary attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.cards import peers
from mmkernels.cards.card import (
    BadInput,
    BenchCase,
    Call,
    Card,
    Cost,
    Make,
    Overhead,
    Sample,
    Target,
    bad_argument,
    bad_keyword,
    with_argument,
)
from mmkernels.ops import hash_attention as ops
from mmkernels.ops.attention import attention
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference import hash_attention as reference

_SYSTEMS = ("EcoFormer",)


# --- calls ------------------------------------------------------------------------------------------------------------
# How far every y stays from 0, where its sign changes, and from -1 and 1, where its gradient begins: far beyond rounding.
_CLEARANCE = 5e-5


def _near_a_step(tensors: tuple[Tensor, ...]) -> Tensor:
    """The rows of qk [B, H, N] of which some y lies near a step: an output there would hang on how a sum is rounded."""
    y = reference.preactivations(*(tensor.double() for tensor in tensors))
    return (torch.minimum(y.abs(), (y.abs() - 1).abs()) < _CLEARANCE).any(-1)


def _hash(
    batch: int, heads: int, tokens: int, channels: int, *, supports: int, bits: int, clear: bool = True, wide: bool = False
) -> Make:
    """qk [batch, heads, tokens, channels] and hash functions as they are learned: supports of length one, the mean of the
    kernel. `clear`: rows near a step are drawn anew, and no clearance is looked for where the call is only timed. `wide`:
    the hash functions stay float32 beside half precision."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        of_parameters = torch.float32 if wide and dtype != torch.float64 else dtype
        qk = drawn(batch, heads, tokens, channels).to(dtype)
        anchors = F.normalize(drawn(heads, supports, channels), dim=-1).to(of_parameters)
        projection = drawn(heads, bits, supports).to(of_parameters)
        mean = (0.6 + 0.05 * drawn(heads, supports)).to(of_parameters)
        while clear and (near := _near_a_step((qk, anchors, projection, mean))).any():
            qk[near] = drawn(int(near.sum()), channels).to(dtype)
        return Call(tuple(tensor.to(device) for tensor in (qk, anchors, projection, mean)))

    return make


def _ecoformer(
    batch: int, heads: int, tokens: int, channels: int, width: int, *, supports: int, bits: int, **kwargs: Any
) -> Make:
    """The same with values of `width` channels; `self_term` and `offset` go to the op, the rest to the draw."""
    options: dict[str, Any] = {name: kwargs.pop(name) for name in ("self_term", "offset") if name in kwargs}
    of_hash = _hash(batch, heads, tokens, channels, supports=supports, bits=bits, **kwargs)

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        qk, *functions = of_hash(device, dtype, g).args
        v = torch.randn(batch, heads, tokens, width, generator=g).to(device=device, dtype=dtype)
        return Call((qk, v, *functions), options)

    return make


def _attention(batch: int, heads: int, queries: int, keys: int, width: int, bits: int, **kwargs: Any) -> Make:
    """Random codes, all 32 bits of them, and values; the same codes for queries and keys where there are as many."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def codes(tokens: int) -> Tensor:
            return torch.randint(-(2**31), 2**31, (batch, heads, tokens), generator=g).to(device=device, dtype=torch.int32)

        of_keys = codes(keys)
        of_queries = of_keys if queries == keys else codes(queries)
        v = torch.randn(batch, heads, keys, width, generator=g).to(device=device, dtype=dtype)
        return Call((of_queries, of_keys, v), {"bits": bits, **kwargs})

    return make


# [B, H, N, D] with a contiguous last dimension that lie in memory as no new tensor does, and one without.
_STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "heads beside channels": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a part of a projection": lambda x: torch.cat((x, x, x), 3)[..., x.size(3) : 2 * x.size(3)],
    "token slice": lambda x: torch.cat((x[:, :, :1], x), 2)[:, :, 1:],
    "odd offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x),
    "channels strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "one sample expanded": lambda x: x[:1].expand_as(x),
}


def _strided(make: Make, positions: dict[str, int]) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"{argument}, {name}", with_argument(make, position, change), gradcheck=False)
        for argument, position in positions.items()
        for name, change in _STRIDED.items()
    )


_SMALL_HASH = _hash(2, 3, 7, 6, supports=5, bits=4)
_SMALL_ATTENTION = _attention(2, 3, 7, 7, 6, 4)
_SMALL = _ecoformer(2, 3, 7, 6, 5, supports=5, bits=4)


def _with_published_shapes(make: Make, supports: int, mean: int) -> Make:
    """Supports [1, H, m, D] and mean [1, H, 1, m]."""
    return with_argument(with_argument(make, supports, lambda t: t[None]), mean, lambda t: t[None, :, None])


# "small", "odd sizes" and "ViT" are names that the generic suite looks for.
_HASH_SAMPLES = tuple(
    Sample(name, make, gradcheck=False)
    for name, make in (
        ("small", _SMALL_HASH),
        ("odd sizes", _hash(1, 2, 37, 13, supports=11, bits=9)),
        ("one bit, one support", _hash(1, 2, 9, 5, supports=1, bits=1)),
        ("one channel", _hash(1, 2, 9, 1, supports=3, bits=3)),
        ("31 bits", _hash(2, 1, 19, 8, supports=7, bits=31)),
        ("32 bits", _hash(2, 1, 35, 20, supports=27, bits=32)),
        ("many channels", _hash(1, 1, 18, 150, supports=33, bits=17)),
        ("hash functions in float32", _hash(2, 2, 21, 8, supports=6, bits=8, wide=True)),
        ("published shapes", _with_published_shapes(_SMALL_HASH, 1, 3)),
        ("no samples", _hash(0, 3, 7, 6, supports=5, bits=4)),
        ("no tokens", _hash(2, 3, 0, 6, supports=5, bits=4)),
        ("ViT in chunks of tokens", _hash(1, 2, 530, 7, supports=5, bits=6)),
        ("PVT stage 3", _hash(1, 2, 196, 32, supports=25, bits=16)),
    )
) + _strided(_SMALL_HASH, {"qk": 0})

_ATTENTION_SAMPLES = (
    Sample("small", _SMALL_ATTENTION),
    Sample("odd sizes", _attention(1, 2, 37, 37, 13, 11)),
    Sample("all values", _attention(2, 3, 7, 7, 6, 4, self_term="all")),
    Sample("more queries than keys", _attention(2, 2, 29, 5, 6, 16, self_term="all")),
    Sample("more keys than queries", _attention(2, 2, 3, 50, 9, 16, self_term="all")),
    Sample("power of two", _attention(1, 2, 20, 20, 8, 16, offset="power_of_two")),
    Sample("given offset", _attention(1, 2, 20, 20, 8, 16, offset=40.5)),
    Sample("one token", _attention(2, 2, 1, 1, 4, 16)),
    Sample("one channel", _attention(2, 2, 33, 33, 1, 16)),
    *(Sample(f"{bits} bits", _attention(1, 2, 41, 41, 7, bits)) for bits in (1, 8, 9, 16, 31, 32)),
    *(Sample(f"{tokens} tokens", _attention(1, 3, tokens, tokens, 24, 16), gradcheck=False) for tokens in (8, 16, 17, 64)),
    Sample("wide values", _attention(1, 2, 40, 40, 300, 12), gradcheck=False),
    Sample("no samples", _attention(0, 2, 5, 5, 4, 4), gradcheck=False),
    Sample("no tokens", _attention(2, 2, 0, 0, 4, 4), gradcheck=False),
    Sample("no queries", _attention(2, 2, 0, 5, 4, 4, self_term="all"), gradcheck=False),
    Sample("no channels", _attention(2, 2, 5, 5, 0, 4), gradcheck=False),
    Sample("ViT in chunks of tokens", _attention(1, 2, 1100, 1100, 7, 16), gradcheck=False),
    Sample("PVT stage 3", _attention(2, 5, 196, 196, 32, 16), gradcheck=False),
    *_strided(_SMALL_ATTENTION, {"v": 2}),
)

# Straight through a sign there is no derivative for finite differences to find: no gradcheck. In its place the formula's
# gradient by autograd in float64 is the oracle (the generic suite's), and the family's own tests check that formula.
_ECOFORMER_SAMPLES = tuple(
    Sample(name, make, gradcheck=False)
    for name, make in (
        ("small", _SMALL),
        ("odd sizes", _ecoformer(1, 2, 37, 13, 19, supports=11, bits=9)),
        ("all values", _ecoformer(2, 3, 18, 6, 5, supports=5, bits=4, self_term="all")),
        ("power of two", _ecoformer(2, 3, 7, 6, 5, supports=5, bits=4, offset="power_of_two")),
        ("one bit, one support", _ecoformer(1, 2, 9, 5, 3, supports=1, bits=1)),
        ("one channel", _ecoformer(1, 2, 9, 2, 1, supports=3, bits=3)),
        ("8 bits", _ecoformer(1, 2, 33, 12, 8, supports=9, bits=8)),
        ("31 bits", _ecoformer(2, 1, 19, 8, 7, supports=7, bits=31)),
        ("32 bits", _ecoformer(2, 1, 35, 20, 12, supports=27, bits=32)),
        ("many channels", _ecoformer(1, 1, 18, 150, 90, supports=33, bits=17)),
        ("hash functions in float32", _ecoformer(2, 2, 21, 8, 8, supports=6, bits=8, wide=True)),
        ("published shapes", _with_published_shapes(_SMALL, 2, 4)),
        ("no samples", _ecoformer(0, 3, 7, 6, 5, supports=5, bits=4)),
        ("no tokens", _ecoformer(2, 3, 0, 6, 5, supports=5, bits=4)),
        ("no channels of values", _ecoformer(2, 3, 7, 6, 0, supports=5, bits=4)),
        ("ViT in chunks of tokens", _ecoformer(1, 2, 530, 7, 6, supports=5, bits=6)),
        ("PVT stage 3", _ecoformer(1, 2, 196, 32, 32, supports=25, bits=16)),
    )
) + _strided(_SMALL, {"qk": 0, "v": 1})


# --- bad input --------------------------------------------------------------------------------------------------------
def _no_tensor(make: Make, names: dict[str, int]) -> tuple[BadInput, ...]:
    return tuple(
        bad
        for name, position in names.items()
        for bad in (
            BadInput(f"{name} has too few dimensions", bad_argument(make, position, lambda t: t[0]), ValueError, name),
            BadInput(f"{name} is a list", bad_argument(make, position, lambda t: t.tolist()), TypeError, name),
            BadInput(f"{name} is None", bad_argument(make, position, lambda t: None), TypeError, name),
            BadInput(f"{name} is sparse", bad_argument(make, position, lambda t: t.to_sparse()), TypeError, name),
        )
    )


def _bad_hash(make: Make, names: dict[str, int]) -> tuple[BadInput, ...]:
    """What mk.hash_codes and mk.ecoformer_attention refuse alike."""
    qk, supports, projection, mean = (names[name] for name in ("qk", "supports", "projection", "mean"))
    return (
        BadInput("supports of other channels", bad_argument(make, supports, lambda t: t[..., 1:]), ValueError, "supports"),
        BadInput("supports of other heads", bad_argument(make, supports, lambda t: t[1:]), ValueError, "supports"),
        BadInput("no supports", bad_argument(make, supports, lambda t: t[:, :0]), ValueError, "supports"),
        BadInput(
            "supports of several samples",
            bad_argument(make, supports, lambda t: torch.stack((t, t))),
            ValueError,
            "supports",
        ),
        BadInput(
            "projection of other supports", bad_argument(make, projection, lambda t: t[..., 1:]), ValueError, "projection"
        ),
        BadInput("33 bits", bad_argument(make, projection, lambda t: t.repeat(1, 9, 1)[:, :33]), ValueError, "projection"),
        BadInput("no bits", bad_argument(make, projection, lambda t: t[:, :0]), ValueError, "projection"),
        BadInput("mean of other supports", bad_argument(make, mean, lambda t: t[..., 1:]), ValueError, "mean"),
        BadInput("mean of one head", bad_argument(make, mean, lambda t: t[:1]), ValueError, "mean"),
        BadInput("no channels", bad_argument(make, qk, lambda t: t[..., :0]), ValueError, "qk"),
        BadInput("qk of integers", bad_argument(make, qk, lambda t: t.int()), TypeError, "qk"),
        *(
            bad
            for name in ("supports", "projection", "mean")
            for bad in (
                BadInput(f"{name} of another dtype", bad_argument(make, names[name], lambda t: t.double()), TypeError, name),
                BadInput(
                    f"{name} on another device", bad_argument(make, names[name], lambda t: t.to("meta")), ValueError, name
                ),
            )
        ),
        *_no_tensor(make, names),
    )


def _bad_options(make: Make) -> tuple[BadInput, ...]:
    return (
        BadInput("offset as small as the bits", bad_keyword(make, offset=4), ValueError, "offset"),
        BadInput("offset is NaN", bad_keyword(make, offset=float("nan")), ValueError, "offset"),
        BadInput("offset is infinite", bad_keyword(make, offset=float("inf")), ValueError, "offset"),
        BadInput("offset is another word", bad_keyword(make, offset="power"), ValueError, "offset"),
        BadInput("offset is a list", bad_keyword(make, offset=[5.0]), TypeError, "offset"),
        BadInput("self_term is another word", bad_keyword(make, self_term="none"), ValueError, "self_term"),
        BadInput("self_term is None", bad_keyword(make, self_term=None), TypeError, "self_term"),
    )


_HASH_BAD = _bad_hash(_SMALL_HASH, {"qk": 0, "supports": 1, "projection": 2, "mean": 3})

_ATTENTION_BAD = (
    BadInput("other heads of values", bad_argument(_SMALL_ATTENTION, 2, lambda t: t[:, 1:]), ValueError, "codes_k"),
    *(
        bad
        for position, name in enumerate(("codes_q", "codes_k"))
        for bad in (
            BadInput(f"{name} of one sample", bad_argument(_SMALL_ATTENTION, position, lambda t: t[:1]), ValueError, name),
            BadInput(
                f"{name} of fewer tokens", bad_argument(_SMALL_ATTENTION, position, lambda t: t[..., 1:]), ValueError, name
            ),
            BadInput(f"{name} of int64", bad_argument(_SMALL_ATTENTION, position, lambda t: t.long()), TypeError, name),
            BadInput(f"{name} of floats", bad_argument(_SMALL_ATTENTION, position, lambda t: t.float()), TypeError, name),
            BadInput(
                f"{name} on another device",
                bad_argument(_SMALL_ATTENTION, position, lambda t: t.to("meta")),
                ValueError,
                name,
            ),
        )
    ),
    BadInput("v of integers", bad_argument(_SMALL_ATTENTION, 2, lambda t: t.int()), TypeError, "v"),
    BadInput("no bits", bad_keyword(_SMALL_ATTENTION, bits=0), ValueError, "bits"),
    BadInput("33 bits", bad_keyword(_SMALL_ATTENTION, bits=33), ValueError, "bits"),
    BadInput("bits are a float", bad_keyword(_SMALL_ATTENTION, bits=4.0), TypeError, "bits"),
    *_bad_options(_SMALL_ATTENTION),
    *_no_tensor(_SMALL_ATTENTION, {"codes_q": 0, "codes_k": 1, "v": 2}),
)

_ECOFORMER_BAD = (
    BadInput("v of fewer tokens", bad_argument(_SMALL, 1, lambda t: t[:, :, 1:]), ValueError, "v"),
    BadInput("v of another dtype", bad_argument(_SMALL, 1, lambda t: t.double()), TypeError, "v"),
    BadInput("v on another device", bad_argument(_SMALL, 1, lambda t: t.to("meta")), ValueError, "v"),
    *_bad_options(_SMALL),
    *_bad_hash(_SMALL, {"qk": 0, "supports": 2, "projection": 3, "mean": 4}),
    *_no_tensor(_SMALL, {"v": 1}),
)


# --- benchmark --------------------------------------------------------------------------------------------------------
# What one would write in torch, in products of matrices: distances to the supports by their binomial.
def _signs(qk: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    units = F.normalize(qk, dim=-1)
    distances = 1 + supports.square().sum(-1)[:, None] - 2 * units @ supports.mT
    kernel = torch.exp(distances / (-2 * distances.mean((-2, -1), keepdim=True))) - mean[:, None]
    return kernel @ projection.mT


def _plain_codes(qk: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    return torch.where(_signs(qk, supports, projection, mean) > 0, 1.0, -1.0)


def _plain(qk: Tensor, v: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    y = _signs(qk, supports.detach(), projection.detach(), mean.detach())
    h = torch.where(y > 0, 1.0, -1.0)
    if torch.is_grad_enabled():
        through = torch.where(y.abs() < 1, y, 0)
        h = h + (through - through.detach())
    return reference.attend(h, h, v, reference.default_offset(projection.shape[1]), "own")


def _softmax(qk: Tensor, v: Tensor, supports: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    return attention(qk, qk, v)


# Attention from codes: torch's own takes them as it would keep them, as numbers.
def _codes_and_signs(batch: int, heads: int, tokens: int, width: int, bits: int) -> Make:
    of_codes = _attention(batch, heads, tokens, tokens, width, bits)

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        codes, _, v = of_codes(device, dtype, g).args
        return Call((codes, reference.unpack_codes(codes, bits, dtype), v))

    return make


def _of_codes(codes: Tensor, signs: Tensor, v: Tensor) -> Tensor:
    return ops.hash_attention(codes, codes, v, bits=signs.shape[-1])


def _of_signs(codes: Tensor, signs: Tensor, v: Tensor) -> Tensor:
    signs = signs.detach()
    return reference.attend(signs, signs, v, reference.default_offset(signs.shape[-1]), "own")


def _bytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _hash_cost(call: Call) -> Cost:
    qk, supports, projection, _ = call.args
    rows = qk.numel() // qk.shape[-1]
    return Cost(2.0 * rows * supports.shape[1] * (qk.shape[-1] + projection.shape[1]), _bytes(*call.args) + 4 * rows)


def _attention_cost(call: Call) -> Cost:
    """S and its use, in additions."""
    codes, signs, v = call.args
    return Cost(2.0 * v.numel() * signs.shape[-1], _bytes(codes, v, v))


def _ecoformer_cost(call: Call) -> Cost:
    qk, v, *functions = call.args
    bits = functions[1].shape[1]
    return Cost(_hash_cost(Call((qk, *functions))).flops + 2.0 * v.numel() * bits, _bytes(*call.args, v))


def _ecoformer_backward_cost(call: Call) -> Cost:
    """Forward; distances again, and three products of their size or S's each way back."""
    once, (qk, v, *_) = _ecoformer_cost(call), call.args
    return Cost(4 * once.flops, _bytes(qk, v, v, v, qk, v) + once.bytes)


_SIZES = ((8, 1, 3136, 32), (8, 2, 784, 32), (8, 5, 196, 32), (8, 8, 49, 32))  # PVTv2-B0's stages at 224 x 224
_BITS, _SUPPORTS = 16, 25


def _name(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _bench_ecoformer(sizes: tuple[int, int, int, int], *, backward: bool) -> BenchCase:
    return BenchCase(
        f"ecoformer_attention.{_name(sizes)}{'.backward' if backward else ''}",
        _ecoformer(*sizes, sizes[3], supports=_SUPPORTS, bits=_BITS, clear=False),
        ops.ecoformer_attention,
        {"eager": _plain},
        _ecoformer_backward_cost if backward else _ecoformer_cost,
        dtypes=(torch.float32,),
        backward=backward,
        compiled_peers=("eager",),
        target=Target(("eager", "compile"), 3.0 if backward else 2.5),
    )


def _bench_attention(sizes: tuple[int, int, int, int]) -> BenchCase:
    return BenchCase(
        f"hash_attention.{_name(sizes)}",
        _codes_and_signs(*sizes, _BITS),
        _of_codes,
        {"eager": _of_signs},
        _attention_cost,
        dtypes=(torch.float32,),
        compiled_peers=("eager",),
        target=Target(("eager", "compile"), 2.2),
    )


def _bench_hash(sizes: tuple[int, int, int, int]) -> BenchCase:
    return BenchCase(
        f"hash_codes.{_name(sizes)}",
        _hash(*sizes, supports=_SUPPORTS, bits=_BITS, clear=False),
        ops.hash_codes,
        {"eager": _plain_codes},
        _hash_cost,
        dtypes=(torch.float32,),
        compiled_peers=("eager",),
        target=Target(("eager", "compile"), 2.0),
    )


_AGAINST_SOFTMAX = BenchCase(
    f"ecoformer_attention.{_name(_SIZES[0])}.softmax",
    _ecoformer(*_SIZES[0], _SIZES[0][3], supports=_SUPPORTS, bits=_BITS, clear=False),
    ops.ecoformer_attention,
    {"mk.attention": _softmax},
    _ecoformer_cost,
    dtypes=(torch.float32,),
    target=Target(("mk.attention",), 60.0),
)


# The first stage of PVTv2-B0 for as many images as no cache of a GPU holds: against the formula, and against softmax.
_GPU_SIZES = (256, 1, 3136, 32)


def _on_gpu(
    op: Callable[..., Any],
    make: Make,
    run: Callable[..., Any],
    contestants: dict[str, Callable[..., Any]],
    cost: Callable[[Call], Cost],
    ratio: float,
    suffix: str = "",
) -> BenchCase:
    return BenchCase(
        f"{op.__name__}.gpu.{_name(_GPU_SIZES)}{suffix}",
        make,
        run,
        contestants,
        cost,
        dtypes=(torch.bfloat16,),
        target=Target(tuple(dict.fromkeys(name.partition(":")[0] for name in contestants)), ratio, optional=True),
        devices=("cuda",),
    )


_ECOFORMER_GPU = tuple(
    _on_gpu(
        ops.ecoformer_attention,
        _ecoformer(*_GPU_SIZES, _GPU_SIZES[3], supports=_SUPPORTS, bits=_BITS, clear=False),
        ops.ecoformer_attention,
        *against,
    )
    for against in (
        ({"eager": _plain}, _ecoformer_cost, 5.0),
        (peers.of_each_kernel(lambda qk, v, *functions: peers.sdpa(qk, qk, v)), _ecoformer_cost, 1.0, ".softmax"),
    )
)
_ATTENTION_GPU = tuple(
    _on_gpu(ops.hash_attention, _codes_and_signs(*_GPU_SIZES, _BITS), _of_codes, *against)
    for against in (
        ({"eager": _of_signs}, _attention_cost, 5.0),
        (peers.of_each_kernel(lambda codes, signs, v: peers.sdpa(v, v, v)), _attention_cost, 1.0, ".softmax"),
    )
)


def _tiny(make: Make) -> Callable[[], Call]:
    return lambda: make(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))


def _overhead(name: str, make: Make, run: Callable[..., Any], limit_us: float) -> Overhead:
    return Overhead(f"{name} call, no gradient", _tiny(make), run, grad=False, limit_us=limit_us)


CARDS = (
    Card(
        name="ecoformer_attention",
        family="hash_attention",
        function=ops.ecoformer_attention,
        reference=reference.ecoformer_attention,
        ops=("mmkernels::ecoformer_attention", "mmkernels::ecoformer_attention_backward"),
        backends=ops.HASH_BACKENDS,
        samples=_ECOFORMER_SAMPLES,
        bad_inputs=_ECOFORMER_BAD,
        dtypes=DTYPES,
        systems=_SYSTEMS,
        summary="kernelised hashing and linear attention of the codes in one op, straight-through gradients",
        bench=(
            *(_bench_ecoformer(sizes, backward=backward) for backward in (False, True) for sizes in _SIZES),
            _AGAINST_SOFTMAX,
            *_ECOFORMER_GPU,
        ),
        overheads=(
            _overhead("ecoformer_attention", _ecoformer(1, 1, 2, 4, 4, supports=2, bits=2), ops.ecoformer_attention, 25.0),
        ),
    ),
    Card(
        name="hash_attention",
        family="hash_attention",
        function=ops.hash_attention,
        reference=reference.hash_attention,
        ops=("mmkernels::hash_attention", "mmkernels::hash_attention_backward"),
        backends=ops.ATTENTION_BACKENDS,
        samples=_ATTENTION_SAMPLES,
        bad_inputs=_ATTENTION_BAD,
        dtypes=DTYPES,
        systems=_SYSTEMS,
        summary="linear attention of binary codes, by additions",
        twice_differentiable=True,
        bench=(*(_bench_attention(sizes) for sizes in _SIZES), *_ATTENTION_GPU),
        overheads=(_overhead("hash_attention", _attention(1, 1, 2, 2, 4, 2), ops.hash_attention, 20.0),),
    ),
    Card(
        name="hash_codes",
        family="hash_attention",
        function=ops.hash_codes,
        reference=reference.hash_codes,
        ops=("mmkernels::hash_codes",),
        backends=ops.HASH_BACKENDS,
        samples=_HASH_SAMPLES,
        bad_inputs=_HASH_BAD,
        dtypes=DTYPES,
        systems=_SYSTEMS,
        summary="binary codes of tokens by kernelised hashing",
        differentiable=False,
        bench=tuple(_bench_hash(sizes) for sizes in _SIZES),
        overheads=(_overhead("hash_codes", _hash(1, 1, 2, 4, supports=2, bits=2), ops.hash_codes, 20.0),),
    ),
)
