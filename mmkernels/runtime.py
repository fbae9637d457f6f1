"""The compiled libraries: loading them, the instruction-set tier in force, and which kernels ran.

Environment variables, read once at import: ``MMKERNELS_ISA`` (generic, avx2, avx512, amx: force a lower tier),
``MMKERNELS_CUDA_LIBRARY=0`` (do not load the CUDA library; Triton serves CUDA tensors), ``MMKERNELS_HOPPER_ATTENTION=1``
(attention on GPUs of compute capability 9.0 runs the CUDA kernel made for them, forward, where it takes the call; without it
Triton's). Read at each use: ``MMKERNELS_STRICT=1`` (a slower fallback is an error). ``MMKERNELS_TILES`` names a table of the
Triton kernels' tiles.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

ISA_NAMES: Final = ("generic", "avx2", "avx512", "amx")

_LIBRARY_FOLDER: Final = Path(__file__).parent / "lib"
CPU_LIBRARY: Final = _LIBRARY_FOLDER / "libmmkernels_cpu.so"
CUDA_LIBRARY: Final = _LIBRARY_FOLDER / "libmmkernels_cuda.so"


class FallbackWarning(UserWarning):
    """A call runs on the slow reference because no kernel can take it. Given once per op and reason."""


def _load_cpu_library() -> ctypes.CDLL:
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"mmkernels is not built: {CPU_LIBRARY} is missing. Type `pip install .` in the source folder, or run Python "
            "from another folder if mmkernels is installed."
        )
    torch.ops.load_library(str(CPU_LIBRARY))
    library = ctypes.CDLL(str(CPU_LIBRARY))
    library.mmk_trace_record.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    library.mmk_trace_record.restype = None
    library.mmk_trace_clear.restype = None
    library.mmk_trace_read.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    library.mmk_trace_read.restype = ctypes.c_int64
    library.mmk_cache_bytes.restype = ctypes.c_int64
    library.mmk_cache_assume.argtypes = (ctypes.c_int64,)
    library.mmk_cache_assume.restype = None
    library.mmk_peak_multiply_add.argtypes = (ctypes.c_int64,)
    library.mmk_peak_multiply_add.restype = ctypes.c_double
    library.mmk_peak_multiply_add_flops.argtypes = (ctypes.c_int64,)
    library.mmk_peak_multiply_add_flops.restype = ctypes.c_double
    library.mmk_peak_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    library.mmk_peak_copy.restype = None
    library.mmk_attention_beyond_vectors.argtypes = (ctypes.c_int64,) * 4
    library.mmk_attention_beyond_vectors.restype = ctypes.c_char_p
    return library


@cache
def build_record() -> dict[str, Any]:
    """What the build wrote down about itself (mmkernels/lib/build.json)."""
    return json.loads((_LIBRARY_FOLDER / "build.json").read_text())


def _driver_cuda_version() -> int | None:
    """The major version of CUDA that the driver offers, or None where there is no driver. Makes no context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return None if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 else version.value // 1000


def _load_cuda_library() -> str | None:
    """None where the CUDA library is in use, else the reason why it is not."""
    if os.environ.get("MMKERNELS_CUDA_LIBRARY") == "0":
        return "MMKERNELS_CUDA_LIBRARY=0 is set"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not CUDA_LIBRARY.exists():
        return "this wheel was built without nvcc"
    needed, offered = build_record()["cuda_version"], _driver_cuda_version()
    if offered is not None and offered < int(needed.split(".")[0]):
        return f"the driver offers CUDA {offered}, and the library was built with CUDA {needed}"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        warnings.warn(f"mmkernels: the CUDA library does not load ({error}); Triton serves CUDA tensors", stacklevel=2)
        return f"it does not load: {error}"
    return None


library: Final = _load_cpu_library()
cuda_library_missing: Final = _load_cuda_library()
hopper_attention: Final = os.environ.get("MMKERNELS_HOPPER_ATTENTION") == "1"


# --- tiers ------------------------------------------------------------------------------------------------------------
def best_isa() -> str:
    """The highest tier that this processor and operating system offer."""
    return ISA_NAMES[library.mmk_isa_best()]


def isa() -> str:
    """The tier in force. A family without kernels of that tier runs those of the next lower one."""
    return ISA_NAMES[library.mmk_isa_active()]


def has_bf16_pairs(*, without_tiles: bool = False) -> bool:
    """Whether products of pairs of bfloat16 (AVX512_BF16) are in force; `without_tiles`: of a family without kernels of
    tiles, which take their place elsewhere."""
    return bool(library.mmk_has_bf16_pairs(int(without_tiles)))


def available_isas() -> tuple[str, ...]:
    """The tiers that can be forced here, lowest first."""
    return ISA_NAMES[: library.mmk_isa_best() + 1]


def set_isa(name: str) -> None:
    """Puts a tier in force for the whole process. ValueError where the processor does not offer it."""
    if name not in ISA_NAMES:
        raise ValueError(f"isa: expected one of {', '.join(ISA_NAMES)}, got {name!r}")
    if library.mmk_isa_force(ISA_NAMES.index(name)) != 0:
        raise ValueError(f"isa: this processor offers {', '.join(available_isas())}, got {name!r}")


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """A lower tier for the calls inside, in every thread of the process: for tests and measurements."""
    before = isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


if "MMKERNELS_ISA" in os.environ:
    try:
        set_isa(os.environ["MMKERNELS_ISA"])
    except ValueError as error:
        raise ValueError(f"MMKERNELS_ISA={os.environ['MMKERNELS_ISA']}: {error}") from None


# --- what is kept between runs ------------------------------------------------------------------------------------------
def user_folder() -> Path:
    """Where measurements of this machine are kept: ``$XDG_CACHE_HOME/mmkernels``, ``~/.cache`` where that is not set."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "mmkernels"


# --- cache ------------------------------------------------------------------------------------------------------------
def cache_bytes() -> int:
    """The last-level cache, in bytes. A call that moves more writes past it."""
    return int(library.mmk_cache_bytes())


@contextmanager
def assumed_cache_bytes(size: int) -> Iterator[None]:
    """Another size for the calls inside: for tests, 0 makes every call write past the cache."""
    before = cache_bytes()
    library.mmk_cache_assume(size)
    try:
        yield
    finally:
        library.mmk_cache_assume(before)


# --- poisoned outputs -------------------------------------------------------------------------------------------------
@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """For tests: compiled kernels get their outputs filled with NaN, so that an element left unwritten shows."""
    library.mmk_poison_outputs(1)
    try:
        yield
    finally:
        library.mmk_poison_outputs(0)


# --- which kernels ran ------------------------------------------------------------------------------------------------
def record_kernel(op: str, kernel: str) -> None:
    """For kernels outside the compiled CPU library: says that `kernel` ran for `op`."""
    library.mmk_trace_record(op.encode(), kernel.encode())


def last_kernels(*, clear: bool = False) -> list[tuple[str, str]]:
    """The kernels that ran last in this process (256 at most), oldest first, as (op, kernel) pairs.

    A kernel is ``cpu/<tier>``, ``cuda``, ``triton`` or ``reference``. `clear` forgets them after reading.
    """
    size = library.mmk_trace_read(None, 0)
    while True:
        buffer = ctypes.create_string_buffer(max(1, size))
        needed = library.mmk_trace_read(buffer, size)
        if needed <= size:
            break
        size = needed
    if clear:
        library.mmk_trace_clear()
    lines = buffer.raw[:needed].decode().splitlines()
    return [(op, kernel) for op, kernel in (line.split(" ", 1) for line in lines)]


# --- fallbacks --------------------------------------------------------------------------------------------------------
def strict() -> bool:
    """Whether MMKERNELS_STRICT=1 turns fallbacks into errors."""
    return os.environ.get("MMKERNELS_STRICT", "0") not in ("", "0")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)


def report_fallback(op: str, reasons: str) -> None:
    """Warns once that `op` runs on the reference; RuntimeError under MMKERNELS_STRICT=1."""
    message = f"mk.{op} runs on the slow reference: {reasons}"
    if strict():
        raise RuntimeError(f"{message} (MMKERNELS_STRICT=1)")
    _warn_once(message)


@cache
def triton_missing() -> str | None:
    """None where Triton can be imported, else the reason why not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None
