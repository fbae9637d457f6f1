"""The sizes of the Triton kernels' tiles, and where they come from.

A kernel whose best sizes depend on the GPU asks `tile` for them, by a name and with a default that every GPU of its make
can run. It gets the first of these: what `mmkernels tune` is trying just now; what the user's own table pins for the GPU's
architecture (``mmkernels tune`` writes it; ``MMKERNELS_TILES`` names another file); what the package's table pins; the
default. Nothing is ever measured within a call, so the first call of a shape costs no more than its compilation.

Each table is a JSON file of one architecture: what it was made with, and ``tiles``, by name the value of each field.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from mmkernels import runtime
from mmkernels.version import __version__

Tile = tuple[int, ...]

# What the numbers of a tile are.
TILE: Final = ("BLOCK_M", "BLOCK_N", "warps", "stages")
PRODUCT: Final = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "warps", "stages")
WARPS: Final = ("warps",)

# The fields that are no powers of two, and the least that they may be.
COUNTS: Final = {"stages": 1, "resident": 0}

_PACKAGED: Final = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Table:
    """One file of pinned tiles.

    Attributes:
        made: what the table was made with: architecture, GPU, versions, date; `measured` is false where the tiles were
            chosen for what they compile to, and never timed.
        tiles: by name, the values of a tile's fields.
    """

    path: Path
    made: Mapping[str, Any]
    tiles: Mapping[str, Mapping[str, int]]


def read(path: Path) -> Table:
    """The table in a file. OSError, or ValueError that names the file, where it is none."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("tiles"), dict) or "architecture" not in record:
        raise ValueError(f"{path} is no table of tiles: expected an object with architecture and tiles")
    tiles = record.pop("tiles")
    for name, tile in tiles.items():
        if not isinstance(tile, dict):
            raise ValueError(f"{path}: {name}: expected an object, got {tile!r}")
        for field, size in tile.items():
            least = COUNTS.get(field, 1)
            if type(size) is not int or size < least or (field not in COUNTS and size & (size - 1)):
                expected = f"a number from {least}" if field in COUNTS else "a power of two"
                raise ValueError(f"{path}: {name}: {field}: expected {expected}, got {size!r}")
    return Table(path, record, tiles)


def write(table: Table) -> None:
    table.path.parent.mkdir(parents=True, exist_ok=True)
    table.path.write_text(json.dumps({**table.made, "tiles": table.tiles}, indent=1) + "\n")


# --- the GPU and its tables ---------------------------------------------------------------------------------------------
@cache
def _architecture_of(device: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_there_is_one = cache(torch.cuda.is_available)


def architecture() -> str | None:
    """Of the current GPU, as its compiler calls it: sm_90, gfx942. None without a GPU."""
    return _architecture_of(torch.cuda.current_device()) if _there_is_one() else None


@cache
def _multiprocessors_of(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def multiprocessors() -> int:
    """Of the current GPU; 1 without one."""
    return _multiprocessors_of(torch.cuda.current_device()) if _there_is_one() else 1


def user_path(of: str) -> Path:
    """The user's own table of an architecture."""
    return runtime.user_folder() / "tiles" / f"{of}.json"


@cache
def tables(of: str) -> tuple[Table, ...]:
    """The tables in force on an architecture, the first that pins a name being the one that counts."""
    found = []
    given = os.environ.get("MMKERNELS_TILES")
    path = user_path(of) if given is None else Path(given)
    if path.exists():
        own = read(path)
        if own.made["architecture"] == of:
            if own.made.get("mmkernels") == __version__:
                found.append(own)
            else:  # its names may mean something else by now
                warnings.warn(
                    f"mmkernels: {path} was made by mmkernels {own.made.get('mmkernels')} and is not used: "
                    "run `mmkernels tune` again",
                    stacklevel=2,
                )
    elif given is not None:
        raise ValueError(f"MMKERNELS_TILES: there is no file {given}")
    packaged = _PACKAGED / f"{of}.json"
    return (*found, read(packaged)) if packaged.exists() else tuple(found)


# --- the tile of a call ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Seen:
    """A tile that some call asked for."""

    fields: tuple[str, ...]
    tile: Tile


_trials: dict[str, Tile] = {}
_seen: dict[str, Seen] | None = None


@cache
def _pinned(of: str, name: str, fields: tuple[str, ...]) -> Tile | None:
    for table in tables(of):
        found = table.tiles.get(name)
        if found is not None:
            if set(found) != set(fields):
                raise ValueError(f"{table.path}: {name}: expected {', '.join(fields)}, got {', '.join(found)}")
            return tuple(found[field] for field in fields)
    return None


def tile(words: tuple[object, ...], default: Tile, fields: tuple[str, ...] = TILE) -> Tile:
    """The tile of this name, which is made of those words that are not False, on the current GPU; `default` where no table
    pins another."""
    name = " ".join(str(word) for word in words if word is not False)
    here = architecture()
    chosen = _trials.get(name) or (None if here is None else _pinned(here, name, fields)) or default
    if _seen is not None:
        _seen[name] = Seen(fields, chosen)
    return chosen


@contextmanager
def trial(name: str, chosen: Tile) -> Iterator[None]:
    """Another tile under this name for the calls inside, in every thread of the process."""
    before = _trials.get(name)
    _trials[name] = chosen
    try:
        yield
    finally:
        del _trials[name]
        if before is not None:
            _trials[name] = before


@contextmanager
def watching() -> Iterator[dict[str, Seen]]:
    """What the calls inside ask for, by name."""
    global _seen
    before, _seen = _seen, {}
    try:
        yield _seen
    finally:
        _seen = before
