"""The models of mmkernels.models with their kernels on and off, interleaved in one run.

`python bench/models_on_off.py FILE [--model NAME ...]` adds the medians of each case to FILE as soon as it has them; it runs
under malloc's settings of `mmkernels bench --allocator tuned`, unless --stock is given. Two threads, random weights, random
inputs; forward passes in eval mode without gradients, and (unless --forward-only) training steps of AdamW. Systems whose
published size is beyond a small machine are narrower or shallower here, as the row's `overrides` say.

`m3vit_small.streaming` compares schedules instead, both with the kernels on: experts in memory ("off"), and read from a file
in the page cache while the expert before computes ("on")."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mmkernels as mk
from mmkernels.bench.measure import interleave
from mmkernels.bench.rows import RowFile, restart_tuned, training_step

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A model, and what it is called with."""

    inputs: Callable[[int, torch.dtype], Inputs]
    """Of a batch and the dtype of the weights."""
    overrides: dict[str, Any] = field(default_factory=dict)
    batch: int = 8


def floats(*shape: int) -> Callable[[int, torch.dtype], Inputs]:
    """One floating input of this shape behind the batch."""
    return lambda batch, dtype: (torch.randn(batch, *shape).to(dtype),)


def ids(batch: int, length: int, count: int) -> Tensor:
    return torch.randint(2, count, (batch, length))


def all_in_one(batch: int, dtype: torch.dtype) -> Inputs:
    return ids(batch, 40, 30522), torch.ones(batch, 40, dtype=torch.bool), torch.randn(batch, 3, 3, 224, 224).to(dtype)


def mot(batch: int, dtype: torch.dtype) -> Inputs:
    """Words, then a picture, then words."""
    return ids(batch, 256, 65536), torch.tensor([0, 1, 0]).repeat_interleave(torch.tensor([64, 128, 64])).expand(batch, -1)


def imp(batch: int, dtype: torch.dtype) -> Inputs:
    return ids(batch, 64, 32000), torch.randn(batch, 3, 8, 128, 128).to(dtype)


MODELS: dict[str, Case] = {
    "all_in_one_small": Case(all_in_one),
    "pvt_v2_b0_ecoformer": Case(floats(3, 224, 224)),
    "twins_svt_small_ecoformer": Case(floats(3, 224, 224)),
    "crossvit_15": Case(floats(3, 240, 240)),
    "crossvit_18": Case(floats(3, 240, 240)),
    "tnt_s": Case(floats(3, 224, 224)),
    # Of a batch of 8, plain torch keeps over 10 GB of scores for a training step.
    "swin_unetr": Case(floats(4, 64, 64, 64), batch=2),
    "swin_unetr_encoder": Case(floats(4, 64, 64, 64), batch=2),
    "m3vit_small": Case(floats(3, 224, 224), {"image_size": 224}),
    "m3vit_small.streaming": Case(floats(3, 512, 512)),
    "mot_94m": Case(mot),
    "matformer_78m": Case(lambda batch, dtype: (ids(batch, 256, 32000),), {"vocab_size": 32000}),
    "uni_moe_7b": Case(
        lambda batch, dtype: (ids(batch, 256, 8000),),
        {"dim": 1024, "num_heads": 16, "hidden": 2816, "depth": 4, "vocab_size": 8000},
    ),
    "one_peace": Case(
        lambda batch, dtype: (ids(batch, 40, 50264), torch.randn(batch, 3, 256, 256).to(dtype)),
        {"dim": 768, "num_heads": 12, "hidden": 3072, "depth": 6, "modalities": ("text", "image")},
    ),
    "imp_moe_base": Case(imp, {"depth": 6, "moe_depth": 3}),
    "skillnet_base": Case(
        lambda batch, dtype: (torch.randn(batch, 128, 768).to(dtype), ("general", "text", "image")), {"depth": 4}
    ),
}
_STREAMING = ".streaming"


def contestants(name: str, case: Case, dtype: torch.dtype, folder: str) -> dict[str, nn.Module]:
    """A model for each: a switch between two calls would be timed too."""
    if not name.endswith(_STREAMING):
        models = {kind: mk.models.create_model(name, **case.overrides, kernels=kind == "on") for kind in ("on", "off")}
        if any(isinstance(module, mk.nn.EcoFormerAttention) for module in models["on"].modules()):
            mk.nn.fit_hash(models["on"], *case.inputs(1, torch.float32))
            models["off"].load_state_dict(models["on"].state_dict())
        return {kind: model.to(dtype) for kind, model in models.items()}
    create = partial(mk.models.create_model, name.removesuffix(_STREAMING), **case.overrides)
    resident = create().to(dtype)
    file = Path(folder) / f"{name}.safetensors"
    save_file(resident.state_dict(), file)
    streaming = create(schedule="streaming", experts=file).to(dtype)
    streaming.load_pretrained(resident.state_dict())
    return {"on": streaming, "off": resident}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", action="append", choices=MODELS, help="all of them if not given; may be given again")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="both if not given")
    parser.add_argument("--batch", type=int, help="instead of the model's own")
    parser.add_argument("--forward-only", action="store_true", help="no training steps")
    parser.add_argument("--stock", action="store_true", help="malloc as it comes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case")
    arguments = parser.parse_args()
    if not arguments.stock:
        restart_tuned()
    torch.set_num_threads(2)
    rows = RowFile(arguments.file, "stock" if arguments.stock else "tuned")
    for name in arguments.model or MODELS:
        case = MODELS[name]
        batch = arguments.batch or case.batch
        for dtype_name in arguments.dtype or ("float32", "bfloat16"):
            dtype = getattr(torch, dtype_name)
            torch.manual_seed(0)
            inputs = case.inputs(batch, dtype)
            with tempfile.TemporaryDirectory() as folder:
                models = contestants(name, case, dtype, folder)
                for train in (False,) if arguments.forward_only or name.endswith(_STREAMING) else (False, True):
                    steps = {kind: partial(model.eval(), *inputs) for kind, model in models.items()}
                    if train:
                        steps = {kind: training_step(models[kind], forward) for kind, forward in steps.items()}
                    with torch.set_grad_enabled(train):
                        timings = interleave(steps, arguments.seconds)
                    row = {"model": name, "overrides": case.overrides, "dtype": dtype_name, "batch": batch, "train": train}
                    row |= {"times_faster": timings["off"].median_ms / timings["on"].median_ms}
                    rows.add(row | {kind: asdict(timing) for kind, timing in timings.items()})
            del models, steps
            gc.collect()


if __name__ == "__main__":
    main()
