"""What would run and what there is: `explain` and `info`."""

from __future__ import annotations

import inspect
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from mmkernels import runtime
from mmkernels.triton import pinned
from mmkernels.version import __version__


def explain(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Says which kernel a call would run, and why each other backend would not.

    Args:
        op: a public op (``mk.token_roll``) or its name.
        *args, **kwargs: the arguments of the call. It is checked by running it on fake tensors, so bad input raises as
            the call itself would.

    Returns:
        An Explanation: `.kernel` ("cpu/avx2"), `.reasons` by backend; printed, a line a backend.

    Raises:
        ValueError: `op` is no public op. TypeError: the arguments do not fit its signature.
    """
    from mmkernels.cards import card_of
    from mmkernels.ops.backends import choose

    card = card_of(op)
    bound = inspect.signature(card.function).bind(*args, **kwargs)
    bound.apply_defaults()
    _check_on_fakes(card.function, args, kwargs)
    return choose(card.name, card.backends, bound.arguments)


def _check_on_fakes(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        return mode.from_tensor(value.detach()) if isinstance(value, torch.Tensor) else value

    fake_args, fake_kwargs = tree_map(fake, (args, kwargs))
    with mode, torch.no_grad():
        function(*fake_args, **fake_kwargs)


@dataclass(frozen=True)
class Info:
    """What this installation is and can do. Printed, it is a report; its fields are for programs."""

    version: str
    python: str
    torch: str
    platform: str
    isa: str
    isas: tuple[str, ...]
    cuda_library: str
    triton: str
    tiles: str
    build: dict[str, Any]
    ops: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        build = self.build
        lines = [
            f"mmkernels {self.version}, Python {self.python}, torch {self.torch}, {self.platform}",
            f"CPU tier in force: {self.isa} (this processor offers {', '.join(self.isas)})",
            f"CUDA library: {self.cuda_library}",
            f"Triton: {self.triton}; {self.tiles}",
            f"built by {build['compiler']}, torch {build['torch_headers']} headers, stable ABI of torch "
            f"{build['torch_target']}; needs {build['needs']}; wheel tag {build['platform_tag']}",
            "ops:",
        ]
        lines += [f"  mk.{op['name']}: {op['summary']} [{', '.join(op['backends'])}]" for op in self.ops]
        return "\n".join(lines)


def _tiles_in_force() -> str:
    """Where the Triton kernels have the sizes of their tiles from."""
    here = pinned.architecture()
    if here is None:
        return "no GPU for its kernels"
    sources = [f"{table.path}{'' if table.made.get('measured') else ', not measured'}" for table in pinned.tables(here)]
    return f"tiles of {here}: {''.join(f'{source}, before ' for source in sources)}the defaults"


def info() -> Info:
    """Versions, tiers, libraries, and every op with the backends that can run on this machine."""
    from mmkernels.cards import all_cards

    no_gpu = None if torch.cuda.is_available() else "there is no GPU"
    missing = {"cuda": runtime.cuda_library_missing or no_gpu, "triton": runtime.triton_missing() or no_gpu}
    triton, tiles = runtime.triton_missing(), "no kernels of it"
    if triton is None:
        import triton as triton_package

        triton, tiles = triton_package.__version__, _tiles_in_force()
    return Info(
        version=__version__,
        python=sys.version.split()[0],
        torch=torch.__version__,
        platform=platform.platform(),
        isa=runtime.isa(),
        isas=runtime.available_isas(),
        cuda_library="in use" if runtime.cuda_library_missing is None else f"not in use: {runtime.cuda_library_missing}",
        triton=triton,
        tiles=tiles,
        build=runtime.build_record(),
        ops=tuple(
            {
                "name": card.name,
                "family": card.family,
                "summary": card.summary,
                "backends": tuple(b.name for b in card.backends if missing.get(b.name) is None),
            }
            for card in all_cards()
        ),
    )


def machine_line(device: torch.device) -> str:
    """One line on the machine and the software that runs on `device`."""
    found = info()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"CPU, tier {found.isa}, {torch.get_num_threads()} threads"
    return f"mmkernels {found.version}, torch {found.torch}, Python {found.python}, {found.platform}; {where}"


def ops_table() -> str:
    """The README's table of ops, in Markdown, made from the cards."""
    from mmkernels.cards import all_cards

    titles = {"cpu": "CPU (C++)", "cuda": "CUDA C++", "triton": "Triton", "torch": "torch (CUDA)", "reference": "reference"}
    rows = ["| op | what it does | backends | dtypes | systems |", "| --- | --- | --- | --- | --- |"]
    for card in all_cards():
        backends = ", ".join(titles[backend.name] for backend in card.backends)
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in card.dtypes)
        rows.append(f"| `mk.{card.name}` | {card.summary} | {backends} | {dtypes} | {', '.join(card.systems)} |")
    return "\n".join(rows)
