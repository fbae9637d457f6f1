"""The peaks of this very machine, and the floors that follow from them.

They are measured once and kept in ``$XDG_CACHE_HOME/mmkernels/peaks.json`` (``~/.cache`` where that is not set), under the
processor or GPU, the tier in force, the number of threads and torch's version. Delete the file to measure again, for one
after a run on a busy machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from mmkernels import runtime
from mmkernels.bench.machine import cpu_model
from mmkernels.bench.measure import cuda_clock, wall_clock

_MIB: Final = 1 << 20
# Bytes read and written by one copy; the last is a buffer of 256 MiB, far beyond any last-level cache of a few cores.
_TRAFFIC: Final = tuple(size * _MIB for size in (1, 4, 16, 32, 64, 128, 512))
_SCHEMA: Final = 1
# Short and many, for one of them to fall where no other program disturbs it: a ceiling is the best of them.
_REPEATS: Final = 20


@dataclass(frozen=True)
class Peaks:
    """Ceilings of one device.

    Attributes:
        gflops: by dtype. On the CPU float32 is the multiply-add in registers, over all threads. Half precision is there
            where hardware has it, and is what torch's matmul reaches: the instruction's own peak lies higher, so a kernel
            can undercut a floor made of it.
        copy_gbps: (bytes read and written, GB/s) of a copy, by size: what fits in a cache moves faster than memory does.
    """

    gflops: dict[str, float]
    copy_gbps: tuple[tuple[int, float], ...]

    def gflops_of(self, dtype: str) -> float:
        """float16 falls back to bfloat16, and all else to float32, which is at least as fast as float64."""
        names = (dtype, "bfloat16", "float32") if dtype == "float16" else (dtype, "float32")
        found = next(self.gflops[name] for name in names if name in self.gflops)
        return max(found, self.gflops["float32"])

    def bandwidth_gbps(self, size: float) -> float:
        """The fastest copy that a call which moves `size` bytes can count on.

        The best of the measured sizes from the nearest one below `size` upwards. That takes the faster of both
        neighbours, so the floor stays below what is possible between them; larger copies count because a small one can
        be made the same way. Below the smallest size its own bandwidth holds: such calls are short against their overhead.
        A call that reads more than it writes can be a little faster than any copy; its floor does not know that.
        """
        below = max((measured for measured, _ in self.copy_gbps if measured <= size), default=0)
        return max(gbps for measured, gbps in self.copy_gbps if measured >= below)

    def floor_ms(self, flops: float, size: float, dtype: str) -> float:
        """No call that does this work is faster: the larger of its arithmetic and its traffic, each at the peak."""
        return max(flops / self.gflops_of(dtype), size / self.bandwidth_gbps(size)) / 1e6


# --- measurement ------------------------------------------------------------------------------------------------------
def _together(work: Sequence[Callable[[], object]]) -> float:
    """Seconds from the first start to the last end of functions that run in a thread each."""
    barrier = threading.Barrier(len(work))
    spans: list[tuple[float, float]] = []

    def body(function: Callable[[], object]) -> None:
        barrier.wait()
        start = time.perf_counter()
        function()
        spans.append((start, time.perf_counter()))

    threads = [threading.Thread(target=body, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _multiply_add_gflops(threads: int) -> float:
    """The sum of what each thread does in its own processor time, which other programs' work does not lengthen."""
    rounds = 4_000_000
    flops = float(runtime.library.mmk_peak_multiply_add_flops(rounds))
    rates: list[float] = []

    def body() -> None:
        start = time.thread_time()
        runtime.library.mmk_peak_multiply_add(rounds)
        rates.append(flops / (time.thread_time() - start))

    def total() -> float:
        rates.clear()
        _together([body] * threads)
        return sum(rates)

    return max(total() for _ in range(_REPEATS)) / 1e9


def _copies(threads: int, traffic: int, to: torch.Tensor, source: torch.Tensor) -> float:
    """Best GB/s over streaming stores, which win in memory, and the C library's memmove, which wins in the caches."""
    floats = traffic // 2 // 4 // threads // 16 * 16
    repeats = max(1, 128 * _MIB // traffic)

    def streaming(offset: int) -> None:
        for _ in range(repeats):
            runtime.library.mmk_peak_copy(to.data_ptr() + offset, source.data_ptr() + offset, floats)

    def plain(offset: int) -> None:
        for _ in range(repeats):
            ctypes.memmove(to.data_ptr() + offset, source.data_ptr() + offset, floats * 4)

    def seconds(copy: Callable[[int], None]) -> float:
        work = [lambda offset=i * floats * 4: copy(offset) for i in range(threads)]
        return min(_together(work) for _ in range(_REPEATS))

    return floats * 4 * 2 * threads * repeats / min(seconds(streaming), seconds(plain)) / 1e9


def _matmul_gflops(device: str, dtype: torch.dtype, size: int, clock: Callable[[Callable[[], object], int], float]) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock(lambda: a @ b, 3)
    return 2.0 * size**3 / min(clock(lambda: a @ b, 3) for _ in range(10)) / 1e6


def measure_cpu(traffic: Sequence[int] = _TRAFFIC) -> Peaks:
    """With as many threads as torch uses; some seconds."""
    threads = torch.get_num_threads()
    gflops = {"float32": _multiply_add_gflops(threads)}
    if runtime.best_isa() in ("avx512", "amx"):
        gflops["bfloat16"] = _matmul_gflops("cpu", torch.bfloat16, 1024, wall_clock)
    to, source = (torch.zeros(max(traffic) // 2 // 4) for _ in range(2))
    return Peaks(gflops, tuple((size, _copies(threads, size, to, source)) for size in traffic))


def measure_cuda(traffic: Sequence[int] = (*_TRAFFIC, 2048 * _MIB), matrix: int = 8192) -> Peaks:
    """Device-to-device copies, and torch's matmul of square matrices in float32 and bfloat16, by events; of random numbers,
    because a GPU that works on zeros needs less power and runs at a higher clock. The small copies are of a cache."""

    def gbps(size: int) -> float:
        to, source = (torch.randn(size // 2 // 4, device="cuda") for _ in range(2))
        cuda_clock(lambda: to.copy_(source), 5)
        return size / min(cuda_clock(lambda: to.copy_(source), 20) for _ in range(10)) / 1e6

    gflops = {str(dtype)[6:]: _matmul_gflops("cuda", dtype, matrix, cuda_clock) for dtype in (torch.float32, torch.bfloat16)}
    return Peaks(gflops, tuple((size, gbps(size)) for size in traffic))


# --- cache ------------------------------------------------------------------------------------------------------------
def cache_file() -> Path:
    return runtime.user_folder() / "peaks.json"


def _key(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{cpu_model()}, {runtime.isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peaks_from(record: dict[str, Any]) -> Peaks:
    """The Peaks that `dataclasses.asdict` and JSON made a record of."""
    return Peaks(
        {str(name): float(value) for name, value in record["gflops"].items()},
        tuple((int(size), float(gbps)) for size, gbps in record["copy_gbps"]),
    )


def _read_cache() -> dict[str, Any]:
    """What the file holds; nothing where it is missing, broken, or of another version: then all is measured anew."""
    try:
        stored = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    valid = isinstance(stored, dict) and stored.get("schema") == _SCHEMA and isinstance(stored.get("machines"), dict)
    return dict(stored["machines"]) if valid else {}


def _write_cache(machines: dict[str, Any]) -> None:
    """Whole or not at all. A folder that cannot be written to only means that the next run measures again."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump({"schema": _SCHEMA, "machines": machines}, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


def peaks(device: str) -> Peaks:
    """The peaks of a device, from the cache or measured now."""
    machines = _read_cache()
    key = _key(device)
    try:
        return peaks_from(machines[key])
    except (KeyError, TypeError, ValueError, AttributeError):
        measured = measure_cuda() if torch.device(device).type == "cuda" else measure_cpu()
        _write_cache({**machines, key: asdict(measured)})
        return measured
