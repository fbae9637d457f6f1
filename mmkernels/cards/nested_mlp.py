"""The card of nested feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.cards.card import (
    BadInput,
    BenchCase,
    Call,
    Card,
    Cost,
    Make,
    Sample,
    Target,
    bad_argument,
    bad_keyword,
    with_argument,
)
from mmkernels.ops import nested_mlp as ops
from mmkernels.ops.linear import MLP_BACKENDS
from mmkernels.ops.packed_linear import DTYPES
from mmkernels.reference import nested_mlp as reference
from mmkernels.reference.linear import activate


def _call(
    leading: tuple[int, ...],
    channels: int,
    width: int,
    hidden: int,
    *,
    gated: bool = True,
    activation: str | None = "silu",
    residual: bool = False,
) -> Make:
    """x [*leading, channels], the first `width` of `hidden` units."""

    def make(device: torch.device, dtype: torch.dtype, g: torch.Generator) -> Call:
        def normal(*shape: int) -> Tensor:
            return (max(1, shape[-1]) ** -0.5 * torch.randn(shape, generator=g)).to(device=device, dtype=dtype)

        x = torch.randn((*leading, channels), generator=g).to(device=device, dtype=dtype)
        kwargs: dict[str, Any] = {"activation": activation}
        if gated:
            kwargs["w_gate"] = normal(hidden, channels)
        if residual:
            kwargs["residual"] = torch.randn((*leading, channels), generator=g).to(device=device, dtype=dtype)
        return Call((x, width, normal(hidden, channels), normal(channels, hidden)), kwargs)

    return make


_SMALL = _call((2, 5), 8, 5, 12)
_SAMPLES = (
    Sample("small", _SMALL),
    Sample("odd sizes", _call((3, 7), 19, 21, 43)),
    Sample("whole", _call((2, 5), 8, 12, 12)),
    Sample("one unit", _call((2, 5), 8, 1, 12)),
    Sample("no units", _call((2, 5), 8, 0, 12), gradcheck=False),
    Sample("plain", _call((2, 5), 8, 5, 12, gated=False, activation="gelu")),
    Sample("residual", _call((2, 5), 8, 5, 12, residual=True)),
    Sample("residual of no units", _call((2, 5), 8, 0, 12, residual=True), gradcheck=False),
    Sample("quick_gelu", _call((2, 5), 8, 5, 12, activation="quick_gelu")),
    Sample("no rows", _call((2, 0), 8, 5, 12), gradcheck=False),
    Sample("strided", with_argument(_SMALL, 0, lambda x: torch.stack((x, x), -1)[..., 0])),
    Sample("MatFormer of ViT-B", _call((197,), 768, 1536, 3072), gradcheck=False),
)


def _eager(x: Tensor, width: int, w_in: Tensor, w_out: Tensor, *, w_gate: Tensor, activation: str) -> Tensor:
    hidden = activate(F.linear(x, w_gate[:width]), activation) * F.linear(x, w_in[:width])
    return F.linear(hidden, w_out[:, :width])


def _cost(call: Call) -> Cost:
    x, width = call.args[:2]
    rows, weights = x.numel() // x.size(-1), 3 * width * x.size(-1)
    return Cost(flops=2.0 * rows * weights, bytes=float((weights + 2 * x.numel()) * x.element_size()))


_BENCH = (
    BenchCase(
        "nested_mlp.197x768_1536of3072",
        _call((197,), 768, 1536, 3072),
        ops.nested_mlp,
        {"eager": _eager},
        _cost,
        compiled_peers=("eager",),
        target=Target(("eager", "compile"), 1.0),
    ),
)

CARDS = (
    Card(
        name="nested_mlp",
        family="linear",
        function=ops.nested_mlp,
        reference=reference.nested_mlp,
        ops=("mmkernels::mlp", "mmkernels::mlp_backward"),
        backends=MLP_BACKENDS,
        samples=_SAMPLES,
        bad_inputs=(
            BadInput("x is a list", bad_argument(_SMALL, 0, lambda x: x.tolist()), TypeError, "x"),
            BadInput("width beyond the hidden units", bad_argument(_SMALL, 1, lambda _: 13), ValueError, "width"),
            BadInput("negative width", bad_argument(_SMALL, 1, lambda _: -1), ValueError, "width"),
            BadInput("width is a float", bad_argument(_SMALL, 1, lambda _: 5.0), TypeError, "width"),
            BadInput("w_in is a list", bad_argument(_SMALL, 2, lambda w: w.tolist()), TypeError, "w_in"),
            BadInput("w_in of other channels", bad_argument(_SMALL, 2, lambda w: w[:, 1:]), ValueError, "w_in"),
            BadInput("w_out of other units", bad_argument(_SMALL, 3, lambda w: w[:, 1:]), ValueError, "w_out"),
            BadInput("w_gate of another shape", bad_keyword(_SMALL, w_gate=torch.zeros(11, 8)), ValueError, "w_gate"),
            BadInput("residual of another shape", bad_keyword(_SMALL, residual=torch.zeros(3, 8)), ValueError, "residual"),
            BadInput("an unknown activation", bad_keyword(_SMALL, activation="swish"), ValueError, "activation"),
            BadInput(
                "activation on no product",
                bad_keyword(_SMALL, w_gate=None, activation_on_product=True),
                ValueError,
                "activation_on_product",
            ),
        ),
        dtypes=DTYPES,
        systems=("MatFormer",),
        bench=_BENCH,
        summary="the first hidden units of a feed-forward layer as a smaller layer, without a copy",
    ),
)
