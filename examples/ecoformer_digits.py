"""Trains a small pyramid transformer on handwritten digits, then its hashed and its linear twin, and compares the three.

    python -m pip install 'mmkernels[examples]'
    python examples/ecoformer_digits.py

The way is EcoFormer's: a model with softmax attention is trained first. The hashed one takes its weights, fits its hash
functions on one batch, and is fine-tuned; the linear one takes the same weights and is fine-tuned as long, and so is the
softmax model itself. The data are scikit-learn's: 1797 images of 8 x 8 pixels, nothing is downloaded.
"""

from __future__ import annotations

import time
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import mmkernels as mk
from mmkernels.models.energy import count_operations
from mmkernels.models.pvt_v2 import PvtV2

KINDS = ("softmax", "linear", "hash")

_EDGE = 8
_BATCH = 64
_TEST = 360  # images, a fifth


class Digits(NamedTuple):
    """Images [N, 1, 8, 8], normalised over the training set, and labels [N]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    kind: str
    before: float
    """Accuracy before fine-tuning, with the weights of the softmax model."""
    after: float
    seconds: float
    """Of fitting and fine-tuning."""
    attention_nj: float
    total_nj: float


def load(seed: int) -> Digits:
    """The digits, shuffled and split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("scikit-learn holds the digits: python -m pip install 'mmkernels[examples]'") from error
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = pixels.float().view(-1, 1, _EDGE, _EDGE)[order], labels.long()[order]
    train, test = images[_TEST:], images[:_TEST]
    mean, std = train.mean(), train.std()
    return Digits((train - mean) / std, labels[_TEST:], (test - mean) / std, labels[:_TEST])


def make(kind: str, kernels: bool, seed: int) -> PvtV2:
    """Three stages of 64, 16 and 4 tokens; attention of `kind` in the first two, over all their tokens."""
    return PvtV2(
        dims=(32, 64, 96),
        num_heads=(1, 2, 3),
        depths=(2, 2, 1),
        mlp_ratios=(4, 4, 4),
        sr_ratios=(1, 1, 1),
        attention=kind,
        supports=16,
        in_channels=1,
        num_classes=10,
        patch_size=3,
        stride=1,
        kernels=kernels,
        seed=seed,
    )


def train(model: PvtV2, digits: Digits, epochs: int, rate: float, seed: int, progress: Progress, name: str) -> None:
    """AdamW with a cosine schedule."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * -(-len(digits.train) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    task = progress.add_task(name, total=epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train[batch]), digits.train_labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
        progress.advance(task)


def accuracy(model: PvtV2, digits: Digits) -> float:
    """In percent."""
    model.eval()
    with torch.inference_mode():
        right = model(digits.test).argmax(1) == digits.test_labels
    return 100 * float(right.float().mean())


def compare(
    digits: Digits, epochs: int, tune_epochs: int, fit_iterations: int, kernels: bool, seed: int, console: Console
) -> list[Result]:
    """Trains the softmax model, then goes on from it with attention of each kind."""
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        first = make("softmax", kernels, seed)
        train(first, digits, epochs, 2e-3, seed, progress, "train softmax")
        for kind in KINDS:
            model = make(kind, kernels, seed)
            model.load_pretrained(first.state_dict())
            start = time.perf_counter()
            if kind == "hash":
                mk.nn.fit_hash(model.eval(), digits.train[:_BATCH], top_k=5, iterations=fit_iterations, seed=seed)
            fitted = time.perf_counter() - start
            before = accuracy(model, digits)
            start = time.perf_counter()
            train(model, digits, tune_epochs, 5e-4, seed, progress, f"fine-tune {kind}")
            seconds = fitted + time.perf_counter() - start
            count = count_operations(model, _EDGE)
            nanojoules = count.attention.energy_pj / 1e3, count.total.energy_pj / 1e3
            results.append(Result(kind, before, accuracy(model, digits), seconds, *nanojoules))
    return results


def main(
    epochs: Annotated[int, typer.Option(help="of training the softmax model")] = 25,
    tune_epochs: Annotated[int, typer.Option(help="of fine-tuning each of the three")] = 10,
    fit_iterations: Annotated[int, typer.Option(help="of fitting each bit of the hash functions")] = 100,
    threads: Annotated[int, typer.Option(help="of torch")] = 2,
    kernels: Annotated[bool, typer.Option(help="mmkernels' ops, or plain torch")] = True,
    seed: Annotated[int, typer.Option(help="of the split, the weights, the batches and the supports")] = 0,
) -> None:
    """Trains, fine-tunes and prints a table."""
    torch.set_num_threads(threads)
    console = Console()
    start = time.perf_counter()
    results = compare(load(seed), epochs, tune_epochs, fit_iterations, kernels, seed, console)
    table = Table(title=f"{_TEST} test images, {'mmkernels' if kernels else 'plain torch'}, {threads} threads")
    headings = ("attention", "before, %", "tuned, %", "tuning, s", "attention, nJ", "model, nJ")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for result in results:
        percents = f"{result.before:.1f}", f"{result.after:.1f}"
        table.add_row(
            result.kind, *percents, f"{result.seconds:.1f}", f"{result.attention_nj:.0f}", f"{result.total_nj:.0f}"
        )
    console.print(table)
    console.print(f"Energy is an estimate of one image's arithmetic. All in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    typer.run(main)
