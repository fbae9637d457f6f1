"""Every card under what surrounds a call on a GPU: python gpu_modes.py cuda|triton (see gpu_jobs.py; test_gpu.py runs it).

CUDA graphs, torch.compile(mode="reduce-overhead"), autocast, streams, a second device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_graphs import captured, not_waiting
from gpu_jobs import Job, Options, cards_of, main
from support import (
    as_tuple,
    assert_same_bits,
    assert_within_rule,
    check_autocast,
    cotangents,
    differentiable,
    draw,
    gradients,
    leaves,
    to_double,
)
from torch import Tensor

import mmkernels as mk
from mmkernels.cards.card import Call, Card, Sample

DTYPE = torch.bfloat16  # what GPUs are for; the suite of gpu_suite.py holds the others
SMALL = ("small", "float32 parameters")
_SLEEP_CYCLES = 400_000_000  # a fifth of a second of an H200
_ATTEMPTS = 4


def redrawn(sample: Sample, dtype: torch.dtype, device: torch.device) -> Call:
    """The sample's call with other numbers."""
    return sample.make(device, dtype, torch.Generator().manual_seed(zlib.crc32(sample.name.encode()) + 1))


def overwrite(call: Call, by: Call) -> None:
    """Copies the numbers of another draw into a call's own memory, whatever strides and overlaps its tensors have."""
    for ours, new in zip(call.tensors(), by.tensors(), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (new.shape, new.stride(), new.dtype)
        ours.untyped_storage().copy_(new.untyped_storage())


def outputs_and_gradients(card: Card, call: Call) -> list[Any]:
    return [*as_tuple(call.of(card.function)), *gradients(card.function, call)]


def compare_bits(ours: list[Any], expected: list[Any], what: str) -> None:
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if isinstance(b, Tensor) or b is None:
            assert_same_bits(a, b, f"{what}: result {i}")


# --- CUDA graphs ----------------------------------------------------------------------------------------------------------
def asks_the_gpu(call: Call) -> bool:
    """Packed sequences without max_seqlen: the length of the longest is asked of the GPU, as the docstring says."""
    return call.kwargs.get("cu_seqlens_q") is not None and call.kwargs.get("max_seqlen_q") is None


def with_max_seqlen(call: Call) -> Call:
    """The documented way around it."""
    longest = {f"max_seqlen_{side}": int(call.kwargs[f"cu_seqlens_{side}"].diff().max()) for side in "qk"}
    return Call(call.args, {**call.kwargs, **longest})


def check_graph(card: Card, sample: Sample, backward: bool, options: Options) -> str | None:
    """Captured once, replayed on new numbers in the same memory; the bits of an eager call."""
    call, other = (make(sample, DTYPE, options.device) for make in (draw, redrawn))
    kernel = mk.explain(card.function, *call.args, **call.kwargs).kernel
    if kernel == "reference":
        return "runs the reference, which is not captured"
    remark = None
    if card.name == "attention" and asks_the_gpu(call):
        if options.device.type == "cuda":
            try:
                with not_waiting(options.device):
                    call.of(card.function)
            except RuntimeError:
                remark = "cannot be captured without max_seqlen, which it says; captured with it"
            else:
                raise AssertionError("a call that asks the GPU for the longest sequence was not seen to wait for it")
        call, other = with_max_seqlen(call), with_max_seqlen(other)

    compare_replay(card.function, call, other, backward, options.device)
    return remark


def compare_replay(function: Callable[..., Any], call: Call, other: Call, backward: bool, device: torch.device) -> None:
    static, wanted = leaves(call) if backward else (call, [])
    upstream = cotangents(as_tuple(call.of(function))) if backward else []

    def run(of: Call, on: list[Tensor]) -> list[Any]:
        if not backward:
            return list(as_tuple(of.of(function)))
        outputs = differentiable(as_tuple(of.of(function)))
        return list(torch.autograd.grad(outputs, on, upstream, allow_unused=True))

    with torch.set_grad_enabled(backward):
        replay, results = captured(lambda: run(static, wanted), device)
        overwrite(static, other)
        replay()
        fresh, of_fresh = leaves(other) if backward else (other, [])
        compare_bits(results, run(fresh, of_fresh), "replayed")


def experts(x: Tensor, logits: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All that a sparse layer is made of, from the logits on: routing, the sort, both ways of running experts."""
    routing = mk.route(logits, 2, normalize=True)
    places = mk.dispatch(routing.expert_ids, logits.size(1))
    rows = mk.permute_tokens(x, places)
    return mk.moe_mlp(x, routing, w_in, w_out), mk.unpermute_tokens(rows, places, routing.weights), places.offsets


def check_experts(backward: bool, options: Options) -> None:
    """Nothing asks the GPU how many tokens an expert has: other logits send them elsewhere in the same graph."""

    def draw_call(seed: int) -> Call:
        g = torch.Generator().manual_seed(seed)
        shapes = ((300, 32), (300, 8), (8, 48, 32), (8, 32, 48))
        return Call(tuple(torch.randn(shape, generator=g).to(options.device, DTYPE) for shape in shapes))

    compare_replay(experts, draw_call(0), draw_call(1), backward, options.device)


def graph_jobs(options: Options) -> Iterator[Job]:
    for backward in (False, True):
        yield Job(f"graph of experts{' backward' if backward else ''}", partial(check_experts, backward, options))
    for card in cards_of(options):
        for sample in card.samples:
            if not sample.full:
                for backward in (False, True) if card.differentiable else (False,):
                    name = f"graph {card.name} {sample.name}{' backward' if backward else ''}"
                    yield Job(name, partial(check_graph, card, sample, backward, options))


# --- torch.compile --------------------------------------------------------------------------------------------------------
def check_compiled(card: Card, sample: Sample, options: Options) -> None:
    """Recorded and replayed by torch's own graphs, forward and backward, within the rule."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._inductor.config.compile_threads = 1  # there are as many processes as cores
    mode, backend = ("reduce-overhead", "inductor") if options.device.type == "cuda" else (None, "aot_eager")
    compiled: Callable[..., Any] = torch.compile(card.function, fullgraph=True, mode=mode, backend=backend)
    call = draw(sample, DTYPE, options.device)
    plain, oracle = as_tuple(call.of(card.reference)), as_tuple(to_double(call).of(card.reference))
    upstream = cotangents(plain)
    ours: list[Any] = []
    for _ in range(3):  # a warm-up, the recording, a replay
        torch.compiler.cudagraph_mark_step_begin()
        if card.differentiable:
            static, wanted = leaves(call)
            outputs = as_tuple(static.of(compiled))
            grads = torch.autograd.grad(differentiable(outputs), wanted, upstream, allow_unused=True)
        else:
            outputs, grads = as_tuple(call.of(compiled)), ()
        # The next replay overwrites them.
        ours = [value.detach().clone() if isinstance(value, Tensor) else value for value in (*outputs, *grads)]
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert skipped == 0, f"torch left {skipped} graphs out of CUDA graphs"
    theirs, truth = list(plain), list(oracle)
    if card.differentiable:
        theirs += gradients(card.reference, call, upstream)
        truth += gradients(card.reference, to_double(call), upstream)
    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        if c is not None:
            assert_within_rule(a, b, c, f"compiled, result {i}")


def compile_jobs(options: Options) -> Iterator[Job]:
    """A small sample of each card and, where the libraries are what users have, its last one that is not."""
    for card in cards_of(options):
        large = [s for s in card.samples if not s.gradcheck and not s.full and not has_nothing(s)]
        for sample in (card.samples[0], *(large[-1:] if options.backend != "triton" else ())):
            yield Job(f"compile {card.name} {sample.name}", partial(check_compiled, card, sample, options))


def has_nothing(sample: Sample) -> bool:
    return any(tensor.numel() == 0 for tensor in draw(sample, DTYPE).tensors())


# --- autocast -------------------------------------------------------------------------------------------------------------
def autocast_jobs(options: Options) -> Iterator[Job]:
    for card in cards_of(options):
        for sample in card.samples:
            if sample.name in SMALL:
                for dtype in (torch.bfloat16, torch.float32):
                    name = f"autocast {card.name} {sample.name} {str(dtype)[6:]}"
                    call = partial(draw, sample, dtype, options.device)
                    yield Job(name, lambda card=card, call=call: check_autocast(card, call()))  # type: ignore[misc]


# --- streams --------------------------------------------------------------------------------------------------------------
def check_side_stream(card: Card, sample: Sample, options: Options) -> None:
    """On a stream of its own while the default stream has work before it: done before that work, and right."""
    call = draw(sample, DTYPE, options.device)
    expected = outputs_and_gradients(card, call)
    torch.cuda.synchronize()
    side, default = torch.cuda.Stream(), torch.cuda.default_stream()
    for attempt in range(_ATTEMPTS):
        torch.cuda._sleep(_SLEEP_CYCLES << attempt)
        with torch.cuda.stream(side):
            ours = outputs_and_gradients(card, call)
            side.synchronize()
            overtook = not default.query()
            ours = [o.cpu() if isinstance(o, Tensor) else o for o in ours]
        default.synchronize()
        compare_bits(ours, [e.cpu() if isinstance(e, Tensor) else e for e in expected], "on a stream of its own")
        if overtook:
            return
    raise AssertionError("it ended only after the work on the default stream: something of it ran there")


def stream_jobs(options: Options) -> Iterator[Job]:
    if options.device.type != "cuda":
        return
    for card in cards_of(options):
        yield Job(f"stream {card.name}", partial(check_side_stream, card, card.samples[0], options))


# --- a second device ------------------------------------------------------------------------------------------------------
def check_second_device(card: Card, sample: Sample, device: torch.device) -> None:
    """Tensors there while the first device is the current one: the bits of the first, all of them there."""
    first = torch.device(device.type, 0) if device.type == "cuda" else device
    expected = outputs_and_gradients(card, draw(sample, DTYPE, first))
    ours = outputs_and_gradients(card, draw(sample, DTYPE, device))
    assert all(o.device == device for o in ours if isinstance(o, Tensor))
    compare_bits([o.cpu() if isinstance(o, Tensor) else o for o in ours], [*map(_on_cpu, expected)], "on a second device")
    assert device.type != "cuda" or torch.cuda.current_device() == 0


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def second_device_jobs(options: Options) -> Iterator[Job]:
    if options.device.type == "cuda" and torch.cuda.device_count() < 2:
        yield Job("second device", lambda: "NOT TESTED: this machine has one GPU")
        return
    second = torch.device("cuda", 1) if options.device.type == "cuda" else options.device
    for card in cards_of(options):
        yield Job(f"second device {card.name}", partial(check_second_device, card, card.samples[0], second))


def jobs(options: Options) -> list[Job]:
    """What takes longest first: nothing then runs alone at the end."""
    return [
        *compile_jobs(options),
        *stream_jobs(options),
        *second_device_jobs(options),
        *autocast_jobs(options),
        *graph_jobs(options),
    ]


if __name__ == "__main__":
    main(__doc__ or "", jobs)
