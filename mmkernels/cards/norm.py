"""The cards of normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.cards.card import (
    STRIDED_TOKENS,
    BadInput,
    BenchCase,
    Call,
    Card,
    Cost,
    Make,
    Overhead,
    Sample,
    Target,
    drawer,
    with_argument,
)
from mmkernels.ops import norm as ops
from mmkernels.reference import norm as reference

_OPS = ("mmkernels::norm", "mmkernels::norm_backward")
_VITS = ("All-in-one", "MedSAM", "Dream Engine")
_LLMS = ("Dream Engine",)
_DITS = ("CrossFlow", "AV-DiT", "MDT", "Dream Engine")


# --- calls ------------------------------------------------------------------------------------------------------------
def _kept(affine: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters: `affine` "float32" keeps them in float32 beside a half-precision x."""
    return torch.float32 if affine == "float32" and dtype != torch.float64 else dtype


def _norm_call(*shape: int, added: bool, has_bias: bool, affine: str = "both", **kwargs: Any) -> Make:
    """`affine`: both, weight, bias, none, or float32."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=g)

        x, residual = (draw(*shape).to(device=device, dtype=dtype) for _ in range(2))
        kept = _kept(affine, dtype)
        weight, bias = ((a + 0.1 * draw(shape[-1])).to(device=device, dtype=kept) for a in (1, 0))
        parameters = (
            None if affine in ("none", "bias") else weight,
            *((None if affine in ("none", "weight") else bias,) if has_bias else ()),
        )
        return Call((x, *((residual,) if added else ()), *parameters), dict(kwargs))

    return make


def _modulate_call(
    *shape: int,
    form: str = "sample",
    gate: str | None = None,
    added: bool = False,
    affine: str = "none",
    **kwargs: Any,
) -> Make:
    """`form` and `gate`: sample ([B, C]), row ([B, 1, C]) or token (the shape of x); shift and scale are parts of one
    projection, as a model has them. `affine`: none, weight, both, or float32."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=g)

        kept = _kept(affine, dtype)
        forms = {"sample": (shape[0],), "row": (shape[0], *[1] * (len(shape) - 2)), "token": shape[:-1]}
        x = draw(*shape).to(device=device, dtype=dtype)
        shift, scale = (0.5 * draw(*forms[form], 2 * shape[-1])).to(device=device, dtype=kept).chunk(2, -1)
        more = dict(kwargs)
        if added:
            more["residual"] = draw(*shape).to(device=device, dtype=dtype)
        if gate is not None:
            more["gate"] = draw(*forms[gate], shape[-1]).to(device=device, dtype=kept)
        if affine != "none":
            more["weight"] = (1 + 0.1 * draw(shape[-1])).to(device=device, dtype=kept)
        if affine in ("both", "float32"):
            more["bias"] = (0.1 * draw(shape[-1])).to(device=device, dtype=kept)
        return Call((x, shift, scale), more)

    return make


def _samples(call: Callable[..., Make]) -> tuple[Sample, ...]:
    """What every norm meets. "small" and "ViT-B/16" are names that the generic suite looks for."""
    return (
        Sample("small", call(3, 5, 8)),
        Sample("odd sizes", call(3, 5, 7)),
        Sample("one token, three channels", call(1, 1, 3)),
        Sample("two dimensions", call(7, 12)),
        Sample("four dimensions", call(2, 2, 3, 10)),
        Sample("vector tails", call(2, 3, 83)),
        Sample("no samples", call(0, 5, 8), gradcheck=False),
        Sample("no tokens", call(3, 0, 8), gradcheck=False),
        Sample("no channels", call(3, 5, 0), gradcheck=False),
        *(Sample(name, with_argument(call(3, 4, 9), 0, change)) for name, change in STRIDED_TOKENS.items()),
        Sample("large mean", with_argument(call(2, 3, 64), 0, lambda x: x + 100)),
        Sample("float32 parameters", call(3, 5, 9, affine="float32")),
        Sample("wide rows", call(2, 2500), gradcheck=False),
        Sample("ViT-B/16", call(8, 197, 768), gradcheck=False),
        Sample("beyond the cache", call(64, 197, 768), gradcheck=False, full=True),
    )


def _norm_samples(call: Callable[..., Make], *, has_bias: bool) -> tuple[Sample, ...]:
    return (
        *_samples(call),
        Sample("one dimension", call(13)),
        Sample("no weight, no bias", call(3, 5, 9, affine="none")),
        *((Sample("no bias", call(3, 5, 9, affine="weight")), Sample("no weight", call(3, 5, 9, affine="bias"))) * has_bias),
        Sample("large eps", call(3, 5, 9, eps=0.5)),
        *(Sample("many short rows", call(2, 37, 16)),) * has_bias,
    )


_MODULATE_SAMPLES = (
    *_samples(_modulate_call),
    Sample("[B, 1, C]", _modulate_call(3, 7, 9, form="row")),
    Sample("[B, 1, 1, C]", _modulate_call(2, 2, 3, 10, form="row")),
    Sample("one vector a token", _modulate_call(3, 7, 9, form="token")),
    Sample("one vector a token, weight and bias", _modulate_call(3, 7, 9, form="token", affine="both")),
    Sample("MDT form", _modulate_call(2, 10, 12, affine="weight", eps=1e-5, scale_offset=0.0)),
    Sample("weight and bias", _modulate_call(2, 70, 9, affine="both")),
    Sample("RMS norm", _modulate_call(3, 7, 9, norm="rms")),
    Sample("RMS norm, weight, residual", _modulate_call(3, 7, 9, norm="rms", affine="weight", added=True)),
    Sample("residual", _modulate_call(3, 7, 9, added=True)),
    Sample("residual and gate", _modulate_call(3, 7, 9, added=True, gate="sample")),
    Sample("residual and gate [B, 1, C]", _modulate_call(3, 7, 9, added=True, gate="row", form="row")),
    Sample("gate one vector a token", _modulate_call(3, 7, 9, added=True, gate="token")),
    Sample("all one vector a token", _modulate_call(3, 7, 9, added=True, gate="token", form="token", affine="both")),
    Sample("all float32", _modulate_call(3, 7, 9, added=True, gate="sample", affine="float32")),
    Sample(
        "all float32, one vector a token", _modulate_call(3, 7, 9, added=True, gate="token", form="token", affine="float32")
    ),
    Sample("many samples", _modulate_call(70, 2, 9, added=True, gate="sample", affine="both")),
    Sample(
        "x strided, residual and gate",
        with_argument(_modulate_call(3, 4, 9, added=True, gate="sample"), 0, STRIDED_TOKENS["token slice"]),
    ),
    Sample(
        "no tokens, residual and gate", _modulate_call(3, 0, 9, added=True, gate="sample", affine="both"), gradcheck=False
    ),
    Sample("ViT-B/16, residual and gate", _modulate_call(8, 197, 768, added=True, gate="sample"), gradcheck=False),
)


# --- bad input --------------------------------------------------------------------------------------------------------
def _replaced(make: Make, which: int | str, value: Any) -> Callable[[torch.device], Call]:
    """The call with one argument replaced, or by what `value` makes of it."""

    def bad(device: torch.device) -> Call:
        call = make(device, torch.float32, torch.Generator())
        args, kwargs = list(call.args), dict(call.kwargs)
        holder: Any = args if isinstance(which, int) else kwargs
        before = holder[which] if isinstance(which, int) else holder.get(which)
        holder[which] = value(before) if callable(value) else value
        return Call(tuple(args), kwargs)

    return bad


def _bad_x(make: Make) -> tuple[BadInput, ...]:
    return (
        BadInput("a scalar", _replaced(make, 0, torch.tensor(1.0)), ValueError, "x"),
        BadInput("17 dimensions", _replaced(make, 0, torch.zeros([1] * 17)), ValueError, "x"),
        BadInput("last dimension strided", _replaced(make, 0, lambda x: torch.cat((x, x), 2)[..., ::2]), ValueError, "x"),
        BadInput("integers", _replaced(make, 0, lambda x: x.int()), TypeError, "x"),
        BadInput("complex numbers", _replaced(make, 0, lambda x: x.to(torch.complex64)), TypeError, "x"),
        BadInput("a list", _replaced(make, 0, lambda x: x.tolist()), TypeError, "x"),
        BadInput("sparse", _replaced(make, 0, lambda x: x.to_sparse()), TypeError, "x"),
        BadInput("eps is a string", _replaced(make, "eps", "1e-6"), TypeError, "eps"),
        BadInput("eps is a huge int", _replaced(make, "eps", 10**400), ValueError, "eps"),
    )


def _bad_parameter(make: Make, which: int | str, name: str) -> tuple[BadInput, ...]:
    return (
        BadInput(f"{name} too short", _replaced(make, which, lambda w: w[:7]), ValueError, name),
        BadInput(f"{name} is a matrix", _replaced(make, which, lambda w: w[None]), ValueError, name),
        BadInput(f"{name} is half beside float32", _replaced(make, which, lambda w: w.half()), TypeError, name),
        BadInput(f"{name} is a list", _replaced(make, which, lambda w: w.tolist()), TypeError, name),
        BadInput(f"{name} on another device", _replaced(make, which, lambda w: w.to("meta")), ValueError, name),
    )


def _bad_residual(make: Make, which: int | str) -> tuple[BadInput, ...]:
    return (
        BadInput("residual is None", _replaced(make, which, None), TypeError, "residual"),
        *_bad_like_x(make, which, "residual"),
    )


def _bad_like_x(make: Make, which: int | str, name: str) -> tuple[BadInput, ...]:
    return (
        BadInput(f"{name} of another shape", _replaced(make, which, lambda r: r[:, :2]), ValueError, name),
        BadInput(f"{name} of another dtype", _replaced(make, which, lambda r: r.double()), TypeError, name),
        BadInput(f"{name} is a number", _replaced(make, which, 1.0), TypeError, name),
        BadInput(f"{name} strided", _replaced(make, which, lambda r: torch.cat((r, r), 2)[..., ::2]), ValueError, name),
        BadInput(f"{name} on another device", _replaced(make, which, lambda r: r.to("meta")), ValueError, name),
    )


def _bad_vectors(make: Make, which: int | str, name: str) -> tuple[BadInput, ...]:
    return (
        BadInput(f"{name} of another batch", _replaced(make, which, lambda v: v[:2]), ValueError, name),
        BadInput(f"{name} too short", _replaced(make, which, lambda v: v[:, :5]), ValueError, name),
        BadInput(f"{name} one vector for all", _replaced(make, which, lambda v: v[0]), ValueError, name),
        BadInput(f"{name} of two tokens", _replaced(make, which, lambda v: torch.stack((v, v), 1)), ValueError, name),
        BadInput(f"{name} of another dtype", _replaced(make, which, lambda v: v.half()), TypeError, name),
        BadInput(f"{name} is a number", _replaced(make, which, 1.0), TypeError, name),
        BadInput(f"{name} strided", _replaced(make, which, lambda v: torch.cat((v, v), 1)[:, ::2]), ValueError, name),
        BadInput(f"{name} on another device", _replaced(make, which, lambda v: v.to("meta")), ValueError, name),
    )


_GATED = _modulate_call(3, 5, 8, added=True, gate="sample", affine="both")

_BAD_MODULATE = (
    *_bad_x(_modulate_call(3, 5, 8)),
    *_bad_vectors(_GATED, 1, "shift"),
    BadInput("shift is None", _replaced(_GATED, 1, None), TypeError, "shift"),
    *_bad_vectors(_GATED, 2, "scale"),
    BadInput("scale is None", _replaced(_GATED, 2, None), TypeError, "scale"),
    *_bad_vectors(_GATED, "gate", "gate"),
    BadInput("gate without residual", _replaced(_GATED, "residual", None), ValueError, "gate"),
    *_bad_like_x(_GATED, "residual", "residual"),
    *_bad_parameter(_GATED, "weight", "weight"),
    *_bad_parameter(_GATED, "bias", "bias"),
    BadInput("scale_offset is a string", _replaced(_GATED, "scale_offset", "1"), TypeError, "scale_offset"),
    BadInput("unknown norm", _replaced(_GATED, "norm", "batch"), ValueError, "norm"),
    BadInput("bias of the RMS norm", _replaced(_GATED, "norm", "rms"), ValueError, "bias"),
)


# --- benchmark --------------------------------------------------------------------------------------------------------
# The peers are what a model would have: torch's own functions, and the RMS norm written out as language models have it.
def _eager_rms_norm_by_hand(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _eager_modulate(x: Tensor, shift: Tensor, scale: Tensor, residual: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    summed = residual + gate[:, None] * x
    return F.layer_norm(summed, summed.shape[-1:], None, None, 1e-6) * (1 + scale[:, None]) + shift[:, None], summed


def _moved(call: Call, tensors: int) -> Cost:
    x = call.args[0]
    return Cost(flops=0.0, bytes=float(tensors * x.numel() * x.element_size()))


_ROWS = (("1576x768", (1576, 768)), ("25088x96", (25088, 96)))  # ViT-B/16 at batch 8; the first stage of Swin-T at batch 8
_SINGLE, _HALF = (torch.float32,), (torch.bfloat16,)


def _bench(
    name: str,
    make: Make,
    run: Callable[..., Any],
    peers: dict[str, Callable[..., Any]],
    tensors: int,
    ratios: tuple[float, float],
    *,
    backward: bool = False,
) -> tuple[BenchCase, ...]:
    """One case for float32 and one for bfloat16, each with its own target."""
    return tuple(
        BenchCase(
            name,
            make,
            run,
            peers,
            lambda call: _moved(call, tensors),
            dtypes=dtypes,
            backward=backward,
            compiled_peers=tuple(peers),
            target=Target((*peers, "compile"), ratio),
        )
        for dtypes, ratio in zip((_SINGLE, _HALF), ratios, strict=True)
    )


# Rows that no cache of a GPU holds; what is promised of them is the bandwidth of a copy.
_GPU_ROWS, _GPU_CHANNELS = 131072, 1024


def _norm_on_gpu(*, added: bool, has_bias: bool) -> Make:
    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        draw = drawer(device, dtype, g)
        rows = [draw(_GPU_ROWS, _GPU_CHANNELS) for _ in range(1 + added)]
        return Call((*rows, *(draw(_GPU_CHANNELS) for _ in range(1 + has_bias))))

    return make


def _modulate_on_gpu(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
    draw = drawer(device, dtype, g)
    shape = (_GPU_ROWS // 256, 256, _GPU_CHANNELS)
    return Call((draw(*shape), *(draw(shape[0], _GPU_CHANNELS) for _ in range(2))))


def _on_gpu(
    op: Callable[..., Any], make: Make, peer: Callable[..., Any], tensors: int, *, backward: bool = False
) -> BenchCase:
    return BenchCase(
        f"{op.__name__}.gpu.{_GPU_ROWS}x{_GPU_CHANNELS}{'.backward' if backward else ''}",
        make,
        op,
        {"eager": peer},
        lambda call: _moved(call, tensors),
        dtypes=_HALF,
        backward=backward,
        target=None if backward else Target((), 0.85, of="floor"),
        devices=("cuda",),
    )


def _tiny() -> Call:
    return Call((torch.randn(2, 8, 4), torch.randn(4), torch.randn(4)))


def _layer_norm_call(*shape: int, **kwargs: Any) -> Make:
    return _norm_call(*shape, added=False, has_bias=True, **kwargs)


def _rms_norm_call(*shape: int, **kwargs: Any) -> Make:
    return _norm_call(*shape, added=False, has_bias=False, **kwargs)


def _add_layer_norm_call(*shape: int, **kwargs: Any) -> Make:
    return _norm_call(*shape, added=True, has_bias=True, **kwargs)


def _add_rms_norm_call(*shape: int, **kwargs: Any) -> Make:
    return _norm_call(*shape, added=True, has_bias=False, **kwargs)


_SMALL_NORM, _SMALL_RMS = _layer_norm_call(3, 5, 8), _rms_norm_call(3, 5, 8)
_SMALL_ADD_NORM, _SMALL_ADD_RMS = _add_layer_norm_call(3, 5, 8), _add_rms_norm_call(3, 5, 8)

CARDS = (
    Card(
        name="layer_norm",
        family="norm",
        function=ops.layer_norm,
        reference=reference.layer_norm,
        ops=_OPS,
        backends=ops.BACKENDS,
        samples=_norm_samples(_layer_norm_call, has_bias=True),
        bad_inputs=(
            *_bad_x(_SMALL_NORM),
            *_bad_parameter(_SMALL_NORM, 1, "weight"),
            *_bad_parameter(_SMALL_NORM, 2, "bias"),
        ),
        dtypes=ops.DTYPES,
        systems=_VITS,
        summary="LayerNorm over the last dimension",
        bench=(
            *_bench(
                "layer_norm.1576x768",
                _layer_norm_call(1576, 768),
                ops.layer_norm,
                {"eager": reference.layer_norm},
                2,
                (1.0, 1.0),
            ),
            _on_gpu(ops.layer_norm, _norm_on_gpu(added=False, has_bias=True), reference.layer_norm, 2),
            # forward 1 + 1; backward reads x and a gradient, and writes one
            _on_gpu(ops.layer_norm, _norm_on_gpu(added=False, has_bias=True), reference.layer_norm, 5, backward=True),
        ),
        overheads=(
            Overhead("layer_norm call, no gradient", _tiny, ops.layer_norm, grad=False, limit_us=10.0),
            Overhead("layer_norm call, with gradient", _tiny, ops.layer_norm, grad=True, limit_us=26.0),
        ),
    ),
    Card(
        name="rms_norm",
        family="norm",
        function=ops.rms_norm,
        reference=reference.rms_norm,
        ops=_OPS,
        backends=ops.BACKENDS,
        samples=_norm_samples(_rms_norm_call, has_bias=False),
        bad_inputs=(*_bad_x(_SMALL_RMS), *_bad_parameter(_SMALL_RMS, 1, "weight")),
        dtypes=ops.DTYPES,
        systems=_LLMS,
        summary="RMS norm over the last dimension",
        bench=(
            *(
                case
                for name, shape in _ROWS
                for case in _bench(
                    f"rms_norm.{name}",
                    _rms_norm_call(*shape),
                    ops.rms_norm,
                    {"eager": reference.rms_norm, "by hand": _eager_rms_norm_by_hand},
                    2,
                    (1.0, 1.0),
                )
            ),
            _on_gpu(ops.rms_norm, _norm_on_gpu(added=False, has_bias=False), reference.rms_norm, 2),
        ),
    ),
    Card(
        name="add_layer_norm",
        family="norm",
        function=ops.add_layer_norm,
        reference=reference.add_layer_norm,
        ops=_OPS,
        backends=ops.BACKENDS,
        samples=_norm_samples(_add_layer_norm_call, has_bias=True),
        bad_inputs=(
            *_bad_x(_SMALL_ADD_NORM),
            *_bad_residual(_SMALL_ADD_NORM, 1),
            *_bad_parameter(_SMALL_ADD_NORM, 2, "weight"),
            *_bad_parameter(_SMALL_ADD_NORM, 3, "bias"),
        ),
        dtypes=ops.DTYPES,
        systems=_VITS,
        summary="residual sum and its LayerNorm, in one pass that writes both",
        bench=(
            *(
                case
                for name, shape, suffix, tensors, backward, ratios in (
                    ("1576x768", (1576, 768), "", 4, False, (1.15, 1.5)),
                    ("25088x96", (25088, 96), "", 4, False, (1.15, 1.5)),
                    # forward 2 + 2; backward reads the sum and two gradients, and writes one
                    ("1576x768", (1576, 768), ".backward", 8, True, (1.15, 1.5)),
                )
                for case in _bench(
                    f"add_layer_norm.{name}{suffix}",
                    _add_layer_norm_call(*shape),
                    ops.add_layer_norm,
                    {"eager": reference.add_layer_norm},
                    tensors,
                    ratios,
                    backward=backward,
                )
            ),
            _on_gpu(ops.add_layer_norm, _norm_on_gpu(added=True, has_bias=True), reference.add_layer_norm, 4),
        ),
    ),
    Card(
        name="add_rms_norm",
        family="norm",
        function=ops.add_rms_norm,
        reference=reference.add_rms_norm,
        ops=_OPS,
        backends=ops.BACKENDS,
        samples=_norm_samples(_add_rms_norm_call, has_bias=False),
        bad_inputs=(
            *_bad_x(_SMALL_ADD_RMS),
            *_bad_residual(_SMALL_ADD_RMS, 1),
            *_bad_parameter(_SMALL_ADD_RMS, 2, "weight"),
        ),
        dtypes=ops.DTYPES,
        systems=_LLMS,
        summary="residual sum and its RMS norm, in one pass that writes both",
        bench=(
            *_bench(
                "add_rms_norm.1576x768",
                _add_rms_norm_call(1576, 768),
                ops.add_rms_norm,
                {"eager": reference.add_rms_norm},
                4,
                (1.0, 1.0),
            ),
            _on_gpu(ops.add_rms_norm, _norm_on_gpu(added=True, has_bias=False), reference.add_rms_norm, 4),
        ),
    ),
    Card(
        name="modulate",
        family="norm",
        function=ops.modulate,
        reference=reference.modulate,
        ops=_OPS,
        backends=ops.BACKENDS,
        samples=_MODULATE_SAMPLES,
        bad_inputs=_BAD_MODULATE,
        dtypes=ops.DTYPES,
        systems=_DITS,
        summary="adaptive norm: gated residual sum, norm, scale and shift in one pass",
        bench=(
            *_bench(
                "modulate.8x256x1152",
                _modulate_call(8, 256, 1152),
                ops.modulate,
                {"eager": lambda x, shift, scale: reference.modulate(x, shift, scale)},
                2,
                (1.0, 1.0),
            ),
            *_bench(
                "modulate.8x256x1152.gated",
                _modulate_call(8, 256, 1152, added=True, gate="sample"),
                ops.modulate,
                {"eager": _eager_modulate},
                4,
                (1.0, 1.0),
            ),
            _on_gpu(ops.modulate, _modulate_on_gpu, lambda x, shift, scale: reference.modulate(x, shift, scale), 2),
        ),
    ),
)
