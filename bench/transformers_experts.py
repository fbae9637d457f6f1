"""mk.moe_mlp beside transformers' MixtralExperts (eager and grouped_mm), on the same parameters.

`python bench/transformers_experts.py FILE` writes the medians there. Needs `transformers`; two threads, 8 experts of
768 x 2048, top 2. Under malloc's settings of `mmkernels bench --allocator tuned` it shows the kernels alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mmkernels as mk
from mmkernels.bench.machine import this_machine
from mmkernels.bench.measure import interleave

CHANNELS, HIDDEN, EXPERTS, TOP_K = 768, 2048, 8, 2
TOKENS = (64, 4096)


def experts_of(implementation: str, dtype: torch.dtype) -> MixtralExperts:
    config = transformers.MixtralConfig(
        hidden_size=CHANNELS,
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        experts_implementation=implementation,
    )
    torch.manual_seed(0)
    experts = MixtralExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return experts


def contestants(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, backward: bool) -> dict[str, Callable[[], Any]]:
    def call(implementation: str) -> Callable[[], torch.Tensor]:
        experts = experts_of(implementation, x.dtype)
        if implementation != "mmkernels":
            return lambda: experts(x, ids, weights)
        gate_up, down = experts.gate_up_proj, experts.down_proj
        return lambda: mk.moe_mlp(
            x,
            mk.fixed_routing(ids, EXPERTS, weights),
            gate_up[:, HIDDEN:],
            down,
            w_gate=gate_up[:, :HIDDEN],
            activation="silu",
        )

    forward = {name: call(name) for name in ("eager", "grouped_mm")}
    forward["mmkernels"] = call("mmkernels")
    return {name: (lambda f=f: f().sum().backward()) if backward else f for name, f in forward.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each case")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            for backward in (False, True):
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(tokens, CHANNELS, generator=generator).to(dtype).requires_grad_(backward)
                routing = mk.route(torch.randn(tokens, EXPERTS, generator=generator), TOP_K)
                with torch.set_grad_enabled(backward):
                    functions = contestants(x, routing.expert_ids, routing.weights.to(dtype), backward)
                    timings = interleave(functions, arguments.seconds)
                milliseconds = {name: timing.median_ms for name, timing in timings.items()}
                rows.append({"tokens": tokens, "dtype": str(dtype), "backward": backward, **milliseconds})
                print(rows[-1], flush=True)
    record = {"machine": asdict(this_machine("cpu")), "transformers": transformers.__version__, "milliseconds": rows}
    arguments.file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
