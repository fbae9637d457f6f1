"""Trains small models of published systems on data made up here, with the kernels and without, and compares the curves.

    python -m pip install mmkernels
    python examples/train_small.py m3vit        # two tasks share a ViT's experts, each by its own gates
    python examples/train_small.py mot          # words and picture tokens in one row, weights of each modality's own
    python examples/train_small.py imp          # experts choose their tokens, of text and of video
    python examples/train_small.py matformer    # one training, four sizes of model
    python examples/train_small.py all-in-one   # frames that see each other by rolled tokens alone

In float32 the first 20 losses of both runs have to agree to a thousandth, or the script fails. Each takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmkernels.models.all_in_one import AllInOne
from mmkernels.models.imp import Imp
from mmkernels.models.m3vit import M3ViT
from mmkernels.models.matformer import MatFormer
from mmkernels.models.mot import MoT

_EQUAL_STEPS = 20
_RTOL = 1e-3

Loss = Callable[[torch.Generator, int], Tensor]


class Example(NamedTuple):
    model: nn.Module
    loss: Loss
    """Of a batch drawn by the generator in that step."""
    rate: float


class Result(NamedTuple):
    kernels: list[float]
    """The losses with the kernels on."""
    plain: list[float]
    """And off."""
    seconds: tuple[float, float]


def widened(model: nn.Module, factor: float = 5) -> None:
    """The first weights of a model for hundreds of channels, made larger for dozens."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


# --- what is learned ----------------------------------------------------------------------------------------------------
class MultiTask(nn.Module):
    """M3ViT and a linear head for each task: how bright each patch is, and in which quarter the square lies."""

    def __init__(self, kernels: bool) -> None:
        super().__init__()
        self.encoder = M3ViT(
            48, 4, depth=4, image_size=32, patch_size=8, in_channels=1, num_tasks=2, num_experts=8, top_k=2, kernels=kernels
        )
        self.heads = nn.ModuleList([nn.Linear(48, 1), nn.Linear(48, 4)])

    def forward(self, images: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """(the head's output, of every patch or of the image; the loss of the gates)."""
        made = self.encoder(images, task)
        balance = torch.stack([routing.losses.importance + routing.losses.load for routing in made.routings]).sum()
        tokens = made.tokens[:, 1:] if task == 0 else made.tokens[:, 1:].mean(1)
        return self.heads[task](tokens), balance


def m3vit(kernels: bool) -> Example:
    model = MultiTask(kernels)
    widened(model.encoder)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        images = 0.1 * torch.randn(16, 1, 32, 32, generator=generator)
        quarter = torch.randint(4, (16,), generator=generator)
        for image, place in zip(images, quarter.tolist(), strict=True):
            row, column = 16 * (place // 2) + 4, 16 * (place % 2) + 4
            image[:, row : row + 8, column : column + 8] += 3
        task = step % 2  # the tasks take turns
        made, balance = model(images, task)
        if task == 0:
            wanted = F.avg_pool2d(images, 8).flatten(1)
            own = F.mse_loss(made[..., 0], wanted) / wanted.var()
        else:
            own = F.cross_entropy(made, quarter)
        return own + 0.01 * balance

    return Example(model, loss, 1e-3)


def mot(kernels: bool) -> Example:
    """A word, then the four tokens of its picture, six times a row; which picture belongs to a word is fixed."""
    words, patches, model = 12, 16, MoT(32, 4, depth=2, hidden=64, vocab_size=28, kernels=kernels)
    pictures = words + torch.randint(patches, (words, 4), generator=torch.Generator().manual_seed(1))
    modality_ids = torch.tensor([0, 1, 1, 1, 1]).repeat(6)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        word = torch.randint(words, (8, 6), generator=generator)
        row = torch.cat((word[..., None], pictures[word]), dim=-1).flatten(1)
        logits = model(row, modality_ids.expand(8, -1))
        of_picture = modality_ids[1:] == 1  # the next word is anybody's guess
        return F.cross_entropy(logits[:, :-1][:, of_picture].flatten(0, 1), row[:, 1:][:, of_picture].flatten())

    return Example(model, loss, 3e-3)


def imp(kernels: bool) -> Example:
    """Text and video by turns through one encoder, which has to bring those of the same class together."""
    classes = 8
    model = Imp(48, 4, 96, depth=3, moe_depth=2, num_experts=4, vocab_size=32, max_frames=8, image_size=32, kernels=kernels)
    words = torch.randint(32, (classes, 6), generator=torch.Generator().manual_seed(1))
    looks = torch.randn(classes, 3, 1, 4, 4, generator=torch.Generator().manual_seed(2)).repeat_interleave(8, 3)
    looks = looks.repeat_interleave(8, 4)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        order = torch.randperm(classes, generator=generator)
        video = looks[order].expand(-1, -1, 8, -1, -1)
        video = video + 0.3 * torch.randn(video.shape, generator=generator)
        made = model(words[order], video)
        text, seen = (F.normalize(tokens.mean(1), dim=-1) for tokens in (made.text, made.video))
        logits, own = 10 * text @ seen.T, torch.arange(classes)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return Example(model, loss, 1e-3)


def matformer(kernels: bool) -> Example:
    """Rows that count in steps of their own; every batch trains one granularity."""
    model = MatFormer(32, 4, depth=2, vocab_size=24, kernels=kernels)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        start, by = torch.randint(24, (2, 16, 1), generator=generator)
        row = (start + (1 + by % 5) * torch.arange(14)) % 24
        granularity = int(torch.randint(model.granularities, (), generator=generator))
        logits = model(row, granularity)
        return F.cross_entropy(logits[:, 1:-1].flatten(0, 1), row[:, 2:].flatten())

    return Example(model, loss, 3e-3)


class MaskedWord(nn.Module):
    """All-in-one and the word that it reads in the place of a masked one."""

    def __init__(self, kernels: bool) -> None:
        super().__init__()
        self.encoder = AllInOne(
            64,
            4,
            depth=3,
            image_size=32,
            patch_size=8,
            num_frames=3,
            max_text_len=3,
            vocab_size=8,
            divisor=4,
            kernels=kernels,
        )
        self.head = nn.Linear(64, 2)

    def forward(self, ids: Tensor, video: Tensor) -> Tensor:
        return self.head(self.encoder(ids, torch.ones_like(ids), video).text_features[:, 1])


def all_in_one(kernels: bool) -> Example:
    """A bar moves left or right through three frames: what is the masked word of the sentence?"""
    model = MaskedWord(kernels)
    widened(model.encoder)
    with torch.no_grad():  # the frames are bright, and where they are is what matters
        model.encoder.transformer.pos_embed.mul_(5)
    ids = torch.tensor([1, 2, 3]).expand(32, -1)
    columns = torch.arange(32) // 8

    def loss(generator: torch.Generator, step: int) -> Tensor:
        right = torch.randint(2, (32, 1), generator=generator)
        at = torch.where(right == 1, torch.arange(3), 3 - torch.arange(3))
        bars = 0.3 * (columns == at[..., None]).float()[:, :, None, None, :]
        video = bars + 0.1 * torch.randn(32, 3, 3, 32, 32, generator=generator)
        return F.cross_entropy(model(ids, video), right[:, 0])

    return Example(model, loss, 1e-3)


EXAMPLES: dict[str, tuple[Callable[[bool], Example], int]] = {
    "m3vit": (m3vit, 120),
    "mot": (mot, 60),
    "imp": (imp, 60),
    "matformer": (matformer, 120),
    "all-in-one": (all_in_one, 60),
}


# --- training -----------------------------------------------------------------------------------------------------------
def train(example: Example, steps: int, seed: int) -> list[float]:
    """The losses of AdamW's steps."""
    example.model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(example.model.parameters(), lr=example.rate)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = example.loss(generator, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(name: str, steps: int | None = None, seed: int = 0) -> Result:
    """Trains the example with the kernels and without, from the same weights and on the same data.

    Raises:
        AssertionError: one of the first 20 losses differs by more than a thousandth.
    """
    make, default = EXAMPLES[name]
    curves, seconds = [], []
    for kernels in (True, False):
        torch.manual_seed(seed)  # of the heads
        example = make(kernels)
        start = time.perf_counter()
        curves.append(train(example, default if steps is None else steps, seed))
        seconds.append(time.perf_counter() - start)
    ours, plain = (torch.tensor(curve[:_EQUAL_STEPS]) for curve in curves)
    torch.testing.assert_close(ours, plain, rtol=_RTOL, atol=0)
    return Result(*curves, (seconds[0], seconds[1]))


def show(name: str, result: Result, console: Console) -> None:
    """A table of means over a tenth of the steps each."""
    table = Table(title=f"{name}: the loss, {len(result.kernels)} steps")
    for heading in ("steps", "mmkernels", "plain torch"):
        table.add_column(heading, justify="right")
    size = max(1, len(result.kernels) // 10)
    for start in range(0, len(result.kernels), size):
        part = slice(start, start + size)
        means = [sum(curve[part]) / len(curve[part]) for curve in (result.kernels, result.plain)]
        table.add_row(f"{start + 1} to {start + len(result.kernels[part])}", *(f"{mean:.4f}" for mean in means))
    console.print(table)
    console.print(f"{result.seconds[0]:.1f} s with mmkernels, {result.seconds[1]:.1f} s without")


def main(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(EXAMPLES)}, or all")] = "all",
    steps: Annotated[int | None, typer.Option(help="of training; each example has its own number")] = None,
    threads: Annotated[int, typer.Option(help="of torch")] = 2,
    seed: Annotated[int, typer.Option(help="of the data and the heads")] = 0,
) -> None:
    """Trains one example or all and prints the losses."""
    if name not in (*EXAMPLES, "all"):
        raise typer.BadParameter(f"expected one of {', '.join(EXAMPLES)} or all, got {name}", param_hint="name")
    torch.set_num_threads(threads)
    for each in EXAMPLES if name == "all" else (name,):
        show(each, compare(each, steps, seed), Console())


if __name__ == "__main__":
    typer.run(main)
