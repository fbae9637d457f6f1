"""Inputs of over 2^31 elements, and the benchmark's sizes several times: python gpu_huge.py cuda|triton (see gpu_jobs.py).

An index of 32 bits that overflows shows at the elements beyond 2^31, so slices at the start, across that element and at the
end are held against float64, as the op's definition makes them from these slices alone. An order of summation that hangs on
which block comes first shows in the bits of large calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_jobs import Job, Options, cards_of, main
from support import as_tuple, assert_same_bits, assert_within_rule, gradients, to_double
from torch import Tensor

import mmkernels as mk
from mmkernels.bench.selection import select
from mmkernels.cards import card_of
from mmkernels.cards.card import BenchCase, Call

BEYOND = 1 << 31
_TRY = 1 << 12  # on the CPU, where these scripts are only tried out
_DTYPE = torch.bfloat16
_ROWS = 4  # of a slice, times `of_a_unit`
_REPEATS = 4
_MANY_MEGABYTES = 8000  # of inputs: larger benchmark cases would not fit beside another process


@dataclass(frozen=True)
class Huge:
    """A call whose tensors of `rows` rows (dimension 0) have over 2^31 elements, `width` of them a row at least.

    `make(rows, draw)` draws the call; `of_a_unit` rows belong together; `backward`: gradients of as many rows are compared.
    """

    op: Callable[..., Any]
    width: int
    make: Callable[[int, Callable[..., Tensor]], Call]
    of_a_unit: int = 1
    backward: bool = False
    name: str = ""


def _routing(rows: int, device: torch.device, slots: int, experts: int) -> Any:
    ids = torch.arange(rows * slots, device=device).view(rows, slots) % experts
    return mk.Routing(ids, torch.rand(rows, slots, device=device), experts, rows * slots)


def _heads(*shape: int, **kwargs: Any) -> Callable[[int, Callable[..., Tensor]], Call]:
    """q, k and v [rows, H, L, D]."""
    return lambda rows, draw: Call(tuple(draw(rows, *shape) for _ in range(3)), kwargs)


def _hash_functions(draw: Callable[..., Tensor], heads: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    supports, projection = draw(heads, 9, channels), draw(heads, 16, 9)
    return supports / supports.norm(dim=-1, keepdim=True), projection, 0.6 + 0.05 * draw(heads, 9)


def _codes(rows: int, draw: Callable[..., Tensor]) -> Call:
    v = draw(rows, 2, 64, 64)
    codes = [torch.randint(0, 1 << 16, v.shape[:3], dtype=torch.int32, device=v.device) for _ in range(2)]
    return Call((*codes, v), {"bits": 16})


def _moe(rows: int, draw: Callable[..., Tensor]) -> Call:
    x = draw(rows, 1024)
    w_in, w_gate, w_out = (draw(4, *shape) * shape[1] ** -0.5 for shape in ((64, 1024), (64, 1024), (1024, 64)))
    return Call((x, _routing(rows, x.device, 1, 4), w_in, w_out), {"w_gate": w_gate, "activation": "silu"})


def _grouped(rows: int, draw: Callable[..., Tensor]) -> Call:
    x = draw(rows, 1024)
    return Call((x, torch.arange(rows, device=x.device) % 3, draw(3, 256, 1024) / 32))


def _mlp(rows: int, draw: Callable[..., Tensor]) -> Call:
    return Call((draw(rows, 1024), draw(64, 1024) / 32, draw(1024, 64) / 8), {"w_gate": draw(64, 1024) / 32})


CASES = (
    Huge(mk.token_roll, 197 * 256, lambda rows, draw: Call((draw(rows, 197, 256), 4)), of_a_unit=4, backward=True),
    Huge(
        mk.token_roll_layer_norm,
        197 * 256,
        lambda rows, draw: Call((draw(rows, 197, 256), 4, draw(256), draw(256), 1e-6)),
        of_a_unit=4,
        backward=True,
    ),
    Huge(mk.layer_norm, 1024, lambda rows, draw: Call((draw(rows, 1024), draw(1024), draw(1024))), backward=True),
    Huge(mk.rms_norm, 64, lambda rows, draw: Call((draw(rows, 64), draw(64))), name="many rows"),
    Huge(
        mk.add_layer_norm,
        1024,
        lambda rows, draw: Call((draw(rows, 1024), draw(rows, 1024), draw(1024), draw(1024))),
        backward=True,
    ),
    Huge(mk.add_rms_norm, 1024, lambda rows, draw: Call((draw(rows, 1024), draw(rows, 1024), draw(1024)))),
    Huge(
        mk.modulate,
        64 * 1024,
        lambda rows, draw: Call((draw(rows, 64, 1024), draw(rows, 1024), draw(rows, 1024))),
        backward=True,
    ),
    Huge(mk.attention, 4 * 16 * 8, _heads(4, 16, 8), name="tiny sequences", backward=True),
    Huge(mk.attention, 2 * 197 * 64, _heads(2, 197, 64), name="ViT", backward=True),
    Huge(
        mk.window_attention,
        14 * 14 * 192,
        lambda rows, draw: Call(
            (draw(rows, 14, 14, 192), draw(169, 2)), {"window": (7, 7), "shift": (3, 3), "num_heads": 2}
        ),
        backward=True,
    ),
    Huge(mk.linear_attention, 2 * 197 * 64, _heads(2, 197, 64), backward=True),
    Huge(mk.linear_attention, 2 * 197 * 64, _heads(2, 197, 64, is_causal=True), name="causal"),
    Huge(
        mk.hash_codes, 2 * 64 * 64, lambda rows, draw: Call((draw(rows, 2, 64, 64), *_hash_functions(draw, 2, 64))), name=""
    ),
    Huge(mk.hash_attention, 2 * 64 * 64, _codes, backward=True),
    Huge(
        mk.ecoformer_attention,
        2 * 64 * 64,
        lambda rows, draw: Call((draw(rows, 2, 64, 64), draw(rows, 2, 64, 64), *_hash_functions(draw, 2, 64))),
    ),
    Huge(
        mk.qk_norm_rope,
        2 * 64 * 64,
        lambda rows, draw: Call(
            (draw(rows, 2, 64, 64), draw(rows, 2, 64, 64), draw(64, 32), draw(64, 32)),
            {"q_weight": draw(64), "k_weight": draw(64)},
        ),
        backward=True,
    ),
    Huge(
        mk.silu_attention,
        64 * 64,
        lambda rows, draw: Call((draw(rows, 64, 64), draw(rows, 16, 64), draw(rows, 16, 64))),
    ),
    Huge(mk.route, 128, lambda rows, draw: Call((draw(rows, 128), 2))),
    Huge(mk.moe_mlp, 1024, _moe),
    Huge(mk.grouped_linear, 1024, _grouped),
    Huge(mk.mlp, 1024, _mlp),
    Huge(mk.linear, 1024, lambda rows, draw: Call((draw(rows, 1024), draw(256, 1024) / 32, draw(256)))),
)


def _drawer(device: torch.device) -> Callable[..., Tensor]:
    """Drawn where they are needed: on the CPU it would take minutes."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=_DTYPE)


def _rows(huge: Huge, device: torch.device) -> tuple[int, int]:
    """How many rows reach beyond, and the one with the first element that does."""
    boundary = (BEYOND if device.type == "cuda" else _TRY) // huge.width
    unit = huge.of_a_unit
    return (boundary // unit + 2 * _ROWS) * unit, boundary // unit * unit


def _slices(huge: Huge, device: torch.device) -> Iterator[tuple[str, slice]]:
    rows, boundary = _rows(huge, device)
    extent = _ROWS * huge.of_a_unit
    middle = max(0, boundary - extent // 2 // huge.of_a_unit * huge.of_a_unit)
    for name, start in (("start", 0), ("boundary", middle), ("end", rows - extent)):
        yield name, slice(start, start + extent)


def cut(value: Any, rows: int, part: slice) -> Any:
    """A tensor's part, where it has all the rows; copied, so that strides are a small call's own."""
    return value[part].clone() if isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == rows else value


def check_huge(huge: Huge, options: Options) -> None:
    card = card_of(huge.op)
    rows, _ = _rows(huge, options.device)
    call = huge.make(rows, _drawer(options.device))
    kernel = mk.explain(card.function, *call.args, **call.kwargs).kernel
    assert kernel != "reference" or options.backend == "triton", "no kernel takes it"
    whole = [o for o in as_tuple(call.of(card.function)) if isinstance(o, Tensor) and o.dim() > 0 and o.size(0) == rows]
    grads: list[Tensor | None] = []
    upstream: list[Tensor] = []
    if huge.backward:
        draw = _drawer(options.device)
        upstream = [draw(*o.shape) for o in whole if o.is_floating_point()]
        grads = gradients(card.function, call, upstream)
    for name, part in _slices(huge, options.device):
        small = call.map_tensors(lambda t: cut(t, rows, part))  # noqa: B023 - called at once
        length = part.stop - part.start
        plain, oracle = (_of_rows(as_tuple(c.of(card.reference)), length) for c in (small, to_double(small)))
        for i, (ours, theirs, truth) in enumerate(zip(whole, plain, oracle, strict=True)):
            assert_within_rule(ours[part], theirs, truth, f"{name}: output {i}")
        if not huge.backward:
            continue
        of_part = [u[part] for u in upstream]
        theirs_, truth_ = (gradients(card.reference, c, of_part) for c in (small, to_double(small)))
        for i, (grad, b, c) in enumerate(zip(grads, theirs_, truth_, strict=True)):
            if grad is not None and grad.size(0) == rows:
                assert_within_rule(grad[part], b, c, f"{name}: gradient {i}")


def _of_rows(outputs: tuple[Any, ...], rows: int) -> list[Tensor]:
    return [o for o in outputs if isinstance(o, Tensor) and o.dim() > 0 and o.size(0) == rows]


def check_permuted(options: Options) -> None:
    """permute_tokens and back: integers, which need no oracle, so that each whole row says where it came from."""
    width = 1024
    rows = (BEYOND if options.device.type == "cuda" else _TRY) // width + 8
    x = torch.arange(rows, device=options.device, dtype=torch.int32).view(torch.bfloat16).view(rows, 2)
    x = x.repeat(1, width // 2)  # the two halves of the row's number, over and over
    ids = (torch.arange(rows, device=options.device) * 7 % 5)[:, None]
    places = mk.dispatch(ids, 5)
    permuted = mk.permute_tokens(x, places)
    assert_same_bits(permuted, x.index_select(0, places.order), "permute_tokens")
    del permuted
    numbers = torch.arange(rows, device=options.device).remainder(256).to(_DTYPE)[:, None].expand(-1, width).contiguous()
    back = mk.unpermute_tokens(mk.permute_tokens(numbers, places), places)
    assert_same_bits(back, numbers, "unpermute_tokens")


def huge_jobs(options: Options) -> Iterator[Job]:
    cards = cards_of(options)
    for huge in CASES:
        if card_of(huge.op) not in cards:
            continue
        yield Job(" ".join(("huge", huge.op.__name__, huge.name)).strip(), partial(check_huge, huge, options))
    yield Job("huge permute_tokens", partial(check_permuted, options))


# --- the same bits at the benchmark's sizes -------------------------------------------------------------------------------
def check_repeats(case: BenchCase, options: Options) -> str | None:
    """Forward, and backward where the case has it, several times."""
    call = case.make(options.device, _DTYPE, torch.Generator().manual_seed(0))
    if sum(t.numel() * t.element_size() for t in call.tensors()) > _MANY_MEGABYTES * 1e6:
        return "not repeated: its inputs are too large to be beside another process"

    def results() -> list[Any]:
        if case.backward:
            return list(gradients(case.run, call))
        with torch.no_grad():
            return list(as_tuple(call.of(case.run)))

    first = results()
    for _ in range(_REPEATS - 1):
        for i, (a, b) in enumerate(zip(results(), first, strict=True)):
            if isinstance(b, Tensor):
                assert_same_bits(a, b, f"{case.name}: result {i} of a repeated call")
    return None


def repeat_jobs(options: Options) -> Iterator[Job]:
    for _, case, dtype in select(cards_of(options), device=options.device.type).cases:
        if dtype == _DTYPE and (options.device.type == "cuda" or case.name.startswith("route.")):
            yield Job(f"repeat {case.name}", partial(check_repeats, case, options))


def jobs(options: Options) -> list[Job]:
    return [*huge_jobs(options), *repeat_jobs(options)]


if __name__ == "__main__":
    main(__doc__ or "", jobs, processes=2)  # each may hold 50 GB
