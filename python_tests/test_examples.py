"""The training examples: losses fall, and are the same with the kernels on and off."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mmkernels as mk

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def train_small() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_small", FOLDER / "train_small.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# What the last tenth of the losses is at most, beside the first tenth; the ops of each one's own.
EXAMPLES = {
    "m3vit": (0.1, {"route", "moe_mlp", "moe_mlp_backward", "route_backward"}),
    "mot": (0.2, {"grouped_linear", "grouped_linear_backward", "moe_mlp", "qk_norm_rope"}),
    "imp": (0.1, {"expert_choice", "route_backward", "moe_mlp_backward"}),
    "matformer": (0.1, {"mlp", "mlp_backward", "qk_norm_rope"}),
    "all-in-one": (0.1, {"token_roll_layer_norm", "token_roll_layer_norm_backward"}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_losses_fall_and_agree(name: str, train_small: ModuleType, threads: None) -> None:
    """Their agreement is asserted by the example itself."""
    torch.set_num_threads(1)
    mk.last_kernels(clear=True)
    result = train_small.compare(name)
    share, ops = EXAMPLES[name]
    assert ops <= {op for op, kernel in mk.last_kernels() if kernel.startswith("cpu/")}
    for curve in (result.kernels, result.plain):
        tenth = len(curve) // 10
        assert sum(curve[-tenth:]) < share * sum(curve[:tenth])
    train_small.show(name, result, Console(quiet=True))


def test_examples_are_these(train_small: ModuleType) -> None:
    assert train_small.EXAMPLES.keys() == EXAMPLES.keys()


def test_curves_that_part_are_an_error(train_small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make, steps = train_small.EXAMPLES["matformer"]

    def parted(kernels: bool) -> object:
        example = make(kernels)
        return example if kernels else example._replace(rate=2 * example.rate)

    monkeypatch.setitem(train_small.EXAMPLES, "matformer", (parted, steps))
    with pytest.raises(AssertionError, match="not close"):
        train_small.compare("matformer", 20)


def test_command_line(train_small: ModuleType, threads: None) -> None:
    app = train_small.typer.Typer()
    app.command()(train_small.main)
    done = CliRunner().invoke(app, ["mot", "--steps", "20", "--threads", "1"])
    assert done.exit_code == 0 and "mot: the loss, 20 steps" in done.output
    assert CliRunner().invoke(app, ["nothing"]).exit_code != 0
