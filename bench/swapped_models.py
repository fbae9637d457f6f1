"""Whole models before and after mk.swap, beside torch.compile of the untouched model.

`python bench/swapped_models.py FILE [--model NAME ...]` adds the medians of each case to FILE as soon as it has them; it
runs under malloc's settings of `mmkernels bench --allocator tuned`, unless --stock is given. Needs the packages of the extra
`test-oracles`; two threads, random weights, random inputs, eval mode without gradients (or, with --train, a step of AdamW).
Compiling takes a minute or two a case."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mmkernels as mk
from mmkernels.bench.measure import interleave
from mmkernels.bench.rows import RowFile, restart_tuned, training_step
from mmkernels.calls import call
from mmkernels.integrations.named import random_inputs
from mmkernels.integrations.packages import require


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: require("timm").create_model(name)


def of_transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = require("transformers")
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **options))

    return build


def swin_unetr_encoder() -> nn.Module:
    require("monai")
    from monai.networks.nets.swin_unetr import SwinTransformer

    return SwinTransformer(1, 48, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), spatial_dims=3)


MIXTRAL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "vocab_size": 8000,
}

# name -> model; a batch whose activations or time are beyond a small machine is left out
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit_base_patch16_224": (of_timm("vit_base_patch16_224"), (1, 8)),
    "crossvit_15_240": (of_timm("crossvit_15_240"), (1, 8)),
    "tnt_s_patch16_224": (of_timm("tnt_s_patch16_224"), (1, 8)),
    "swin_tiny_patch4_window7_224": (of_timm("swin_tiny_patch4_window7_224"), (1, 8)),
    "pvt_v2_b0": (of_timm("pvt_v2_b0"), (1, 8)),
    "swin_unetr_encoder": (swin_unetr_encoder, (1,)),
    "clip": (of_transformers("clip"), (1, 8)),
    "lxmert": (of_transformers("lxmert"), (1, 8)),
    "bridgetower": (of_transformers("bridgetower"), (1, 8)),
    "cvt": (of_transformers("cvt"), (1, 8)),
    "vivit": (of_transformers("vivit"), (1,)),
    "mixtral": (of_transformers("mixtral", **MIXTRAL), (1, 8)),
}


def inputs_of(name: str, model: nn.Module, batch: int, dtype: torch.dtype) -> Any:
    if name == "swin_unetr_encoder":
        return torch.randn(batch, 1, 96, 96, 96, dtype=dtype)
    inputs = random_inputs(model, batch, dtype)
    return inputs if hasattr(model, "config") else tuple(inputs.values())


def contestants(model: nn.Module, inputs: Any, train: bool, compiled_too: bool) -> tuple[dict[str, Callable[[], Any]], Any]:
    swapped = copy.deepcopy(model)
    report = mk.swap(swapped)
    covered = report.coverage(inputs)
    found: dict[str, Callable[[], Any]] = {}
    for name, each in (("eager", model), ("compile", model), ("swapped", swapped), ("swapped compile", swapped)):
        if name == "swapped compile" and not compiled_too:
            continue
        each = copy.deepcopy(each)
        runs = torch.compile(each) if name.endswith("compile") else each
        if train:
            found[name] = training_step(each, lambda m=runs: call(m, inputs))
        else:
            found[name] = lambda m=runs: call(m, inputs)
    return found, covered


def runs(contestant: str, function: Callable[[], Any]) -> bool:
    """Whether it runs; a compiler that gives up is no contestant, and is named."""
    try:
        function()
    except Exception as error:
        print(f"{contestant}: {type(error).__name__}: {error}", file=sys.stderr)
        return contestant not in ("compile", "swapped compile")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", action="append", choices=MODELS, help="all of them if not given; may be given again")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="both if not given")
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--compiled-too", action="store_true", help="also torch.compile of the swapped model")
    parser.add_argument("--stock", action="store_true", help="malloc as it comes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case")
    arguments = parser.parse_args()
    if not arguments.stock:
        restart_tuned()
    torch.set_num_threads(2)
    rows = RowFile(arguments.file, "stock" if arguments.stock else "tuned")
    for name in arguments.model or MODELS:
        build, batches = MODELS[name]
        for dtype in arguments.dtype or ("float32", "bfloat16"):
            for batch in arguments.batch or batches:
                torch.manual_seed(0)
                torch._dynamo.reset()
                model = build().eval().to(getattr(torch, dtype))
                inputs = inputs_of(name, model, batch, getattr(torch, dtype))
                with torch.set_grad_enabled(arguments.train):
                    functions, covered = contestants(model, inputs, arguments.train, arguments.compiled_too)
                    timings = interleave({c: f for c, f in functions.items() if runs(c, f)}, arguments.seconds)
                milliseconds = {contestant: timing.median_ms for contestant, timing in timings.items()}
                peer = min(milliseconds[c] for c in ("eager", "compile") if c in milliseconds)
                row = {"model": name, "dtype": dtype, "batch": batch, "train": arguments.train, "share": covered.share}
                row |= {"times_faster": peer / milliseconds["swapped"], "milliseconds": milliseconds}
                rows.add(row)


if __name__ == "__main__":
    main()
