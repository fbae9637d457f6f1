"""What the tests share: the correctness rule, drawing calls, gradients, comparing, floats of every size."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmkernels import runtime
from mmkernels.cards.card import Call, Card, Sample

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"


def bfloat16_kernel(*, without_tiles: bool = False) -> str:
    """The kernel of products in bfloat16 that do not stay with vectors; `without_tiles`: of a family without tiles.
    As the processor says, not the library."""
    isa = "avx512" if runtime.isa() == "amx" and without_tiles else runtime.isa()
    if isa != "avx512" or os.environ.get("MMK_TEST_EMULATE_AVX512") == "1":
        return f"cpu/{isa}"
    flags = Path("/proc/cpuinfo").read_text().split()
    return "cpu/avx512_bf16" if "avx512_bf16" in flags else "cpu/avx512"


def draw(sample: Sample, dtype: torch.dtype, device: torch.device = CPU) -> Call:
    """The sample's call; the same numbers in every process."""
    return sample.make(device, dtype, torch.Generator().manual_seed(zlib.crc32(sample.name.encode())))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Outputs side by side, those inside of others too."""
    return tuple(tree_leaves(value))


def to_double(call: Call) -> Call:
    return call.map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t)


def leaves(call: Call) -> tuple[Call, list[Tensor]]:
    """The call with its floating tensors as leaves that require grad, and these leaves. Strides are kept."""
    made: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        made.append(tensor.detach().requires_grad_())
        return made[-1]

    return call.map_tensors(leaf), made


def differentiable(outputs: Sequence[Any]) -> list[Tensor]:
    """Those that can have a gradient."""
    return [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]


def cotangents(outputs: Sequence[Any]) -> list[Tensor]:
    """Fixed random gradients for the floating tensor outputs."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(o.shape, generator=generator).to(device=o.device, dtype=o.dtype) for o in differentiable(outputs)]


def gradients(function: Callable[..., Any], call: Call, upstream: Sequence[Tensor] | None = None) -> list[Tensor | None]:
    """Gradients of the floating tensors of `call` for fixed (or the given) upstream gradients; None where there is none."""
    call, wanted = leaves(call)
    outputs = differentiable(as_tuple(call.of(function)))
    if not any(o.requires_grad for o in outputs):
        return [None] * len(wanted)
    upstream = cotangents(outputs) if upstream is None else [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))


def assert_within_rule(actual: Tensor, plain: Tensor, oracle: Tensor, what: str, *, extra: float = 0.0) -> None:
    """The correctness rule: no further from float64 than twice what torch's plain formula in the same dtype is, plus
    2 eps max|oracle| (and `extra`, a golden vector's own error); the largest error and the root mean square. Integers are
    equal to the oracle's."""
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(oracle.shape)}"
    if actual.numel() == 0:
        return
    if not actual.is_floating_point():
        assert torch.equal(actual, oracle), f"{what}: {int((actual != oracle).sum())} of {actual.numel()} differ"
        return
    # Kernels may flush what is smaller than the smallest normal number.
    limits = torch.finfo(actual.dtype)
    allowance = 2 * limits.eps * oracle.abs().max().item() + limits.tiny + extra
    if actual.dtype == torch.float64:  # the oracle then errs as much as we do, in its own order of summation
        allowance *= 1000
    error, plain_error = (actual.double() - oracle).abs(), (plain.double() - oracle).abs()
    assert not error.isnan().any(), f"{what}: NaN"
    for name, of in (("largest", torch.max), ("rms", lambda e: e.square().mean().sqrt())):
        ours, theirs = of(error).item(), of(plain_error).item()
        assert ours <= 2 * theirs + allowance, f"{what}: {name} error {ours:.3e}, plain torch has {theirs:.3e}"


def assert_same_bits(a: Any, b: Any, what: str) -> None:
    """Equal bit for bit, NaN included."""
    if a is None or b is None:
        assert a is b, what
        return
    assert a.shape == b.shape and a.dtype == b.dtype, what
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers)), f"{what}: bits differ"


def check_autocast(card: Card, call: Call) -> None:
    """Under autocast in bfloat16, the dtypes that torch's formula gives, within the rule."""
    device = call.tensors()[0].device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, theirs = as_tuple(call.of(card.function)), as_tuple(call.of(card.reference))
        our_gradients, their_gradients = gradients(card.function, call), gradients(card.reference, call)
    oracle, oracle_gradients = as_tuple(to_double(call).of(card.reference)), gradients(card.reference, to_double(call))
    for a, b, truth in zip((*ours, *our_gradients), (*theirs, *their_gradients), (*oracle, *oracle_gradients), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert_within_rule(a, b, truth, "under autocast")


def is_dense(tensor: Tensor) -> bool:
    """In memory without overlap and without holes, in whatever order of dimensions."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def sample_ids(cards: Sequence[Card], *, full: bool) -> list[tuple[Card, Sample]]:
    return [(card, sample) for card in cards for sample in card.samples if sample.full == full]


def floats_of_every_exponent(samples: int) -> np.ndarray:
    """`samples` float32 numbers of each sign and exponent, with mantissas that hit the ties of both half types."""
    generator = np.random.default_rng(0)
    top = (np.arange(512, dtype=np.uint32) << 23)[:, None]
    mantissas = generator.integers(0, 1 << 23, (512, samples), dtype=np.uint32)
    kept = generator.integers(0, 1 << 10, (512, samples), dtype=np.uint32)
    half_of_bfloat16, half_of_float16 = (kept << 16) | 0x8000, (kept << 13) | 0x1000
    edges = np.broadcast_to(np.array([0, 1, 0x7FFFFF, 0x7FFFFE, 0x400000], dtype=np.uint32), (512, 5))
    bits = np.concatenate([top | (m & 0x7FFFFF) for m in (mantissas, half_of_bfloat16, half_of_float16, edges)], axis=1)
    return np.ascontiguousarray(bits.reshape(-1)).view(np.float32)


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published system's vectors, and what they were made with."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return tensors, json.loads((GOLDEN / f"{case}.json").read_text())["hyper_parameters"]


def judge(tensors: dict[str, Tensor], run: Callable[[torch.dtype, bool], dict[str, Tensor]]) -> None:
    """What run(dtype, kernels) makes against the golden of the same names."""
    exact, plain = run(torch.float64, False), run(torch.float32, False)
    runtime.last_kernels(clear=True)
    ours = run(torch.float32, True)
    assert all(kernel != "reference" for _, kernel in runtime.last_kernels())
    for name, oracle in exact.items():
        own = 2 * float((tensors[name].double() - oracle).abs().max())
        assert_within_rule(ours[name], plain[name], oracle, name, extra=own)
        # Published code sums in another order than the definition; both are float32's rounding away from float64.
        assert own <= 2e-5 * float(oracle.abs().max()), f"golden {name}: {own / 2:.3e} from the definition"
