"""The sampled frames as a picture: which patches roll, and what the model's first block sees after the roll."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels import token_roll
from mmkernels.demo.video import Clip
from mmkernels.ops.token_roll import Range

_COLORS = {1: "#ff7f0e", -1: "#00b4d8"}
_LABELS = {1: "patches that take the previous frame's tokens", -1: "patches that take the next frame's tokens"}


def draw_frames(path: Path, clip: Clip, patch_size: int, ranges: Sequence[Range]) -> None:
    """Writes a PNG: above the frames with the patches that roll, below the frames after the roll.

    Args:
        path: the file to write.
        clip: T frames of size S.
        patch_size: side of a patch; S is a multiple of it.
        ranges: the roll of the visual tokens, the class token first (index 0), shifts 1 and -1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    num_frames, _, size, _ = clip.pixels.shape
    side = size // patch_size
    moved = _patch_shifts(side, ranges)
    figure = Figure(figsize=(4.2 * num_frames, 9.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, num_frames, squeeze=False)
    rolled = _roll_pixels(clip.pixels, patch_size, ranges)
    for t in range(num_frames):
        before, after = axes[0][t], axes[1][t]
        before.set_title(f"frame {clip.indices[t]} of {clip.length}, at {clip.seconds[t]:.2f} s", fontsize=13)
        _show(before, clip.pixels[t], patch_size)
        sources = [
            f"{position} from frame {clip.indices[(t - shift) % num_frames]}"
            for shift, position in ((1, "top"), (-1, "bottom"))
            if bool((moved == shift).any())
        ]
        after.set_title(", ".join(sources) or "nothing rolls", fontsize=13)
        _show(after, rolled[t], patch_size)
        for shift, color in _COLORS.items():
            _tint(before, moved == shift, patch_size, color)
            _outline(before, moved == shift, patch_size, color)
            _outline(after, moved == shift, patch_size, color)
    axes[0][0].set_ylabel("sampled frames", fontsize=14)
    axes[1][0].set_ylabel("after the roll", fontsize=14)
    keys: list[Any] = [Patch(facecolor=color, alpha=0.6, label=_LABELS[shift]) for shift, color in _COLORS.items()]
    keys.append(Line2D([], [], color="#999999", linewidth=0.8, label=f"grid of {side} x {side} patches"))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=12, frameon=False)
    figure.suptitle(
        f"Temporal token rolling on {clip.name}: {int((moved != 0).sum())} of {side * side} patches of every frame move",
        fontsize=16,
    )
    figure.savefig(path)


def _patch_shifts(side: int, ranges: Sequence[Range]) -> Tensor:
    """[side, side]: the shift of each patch, 0 where it stays."""
    shifts = torch.zeros(1 + side * side, dtype=torch.int64)
    for start, stop, shift in ranges:
        shifts[start:stop] = shift
    return shifts[1:].view(side, side)


def _roll_pixels(pixels: Tensor, patch_size: int, ranges: Sequence[Range]) -> Tensor:
    """The op itself on raw patches [T, 1 + side^2, 3 * patch_size^2], with an empty class token; back to [T, 3, S, S]."""
    num_frames, channels, size, _ = pixels.shape
    side = size // patch_size
    grid = pixels.reshape(num_frames, channels, side, patch_size, side, patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = grid.reshape(num_frames, side * side, -1)
    tokens = torch.cat((patches.new_zeros(num_frames, 1, patches.shape[2]), patches), dim=1)
    rolled = token_roll(tokens, num_frames, ranges=ranges)[:, 1:]
    return rolled.reshape(grid.shape).permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape)


def _show(axis: Any, image: Tensor, patch_size: int) -> None:
    size = image.shape[-1]
    axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, size, size, 0), interpolation="nearest")
    for at in range(patch_size, size, patch_size):
        axis.axhline(at, color="white", alpha=0.35, linewidth=0.6)
        axis.axvline(at, color="white", alpha=0.35, linewidth=0.6)
    axis.set_xticks([])
    axis.set_yticks([])


def _tint(axis: Any, mask: Tensor, patch_size: int, color: str) -> None:
    from matplotlib.patches import Rectangle

    for row, column in mask.nonzero().tolist():
        corner = (column * patch_size, row * patch_size)
        axis.add_patch(Rectangle(corner, patch_size, patch_size, facecolor=color, alpha=0.4, linewidth=0))


def _outline(axis: Any, mask: Tensor, patch_size: int, color: str) -> None:
    """The border between patches inside the mask and those outside it."""
    from matplotlib.collections import LineCollection

    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    segments = []
    for row, column in (padded[1:, 1:] != padded[:-1, 1:]).nonzero().tolist():
        segments.append([(column, row), (column + 1, row)])
    for row, column in (padded[1:, 1:] != padded[1:, :-1]).nonzero().tolist():
        segments.append([(column, row), (column, row + 1)])
    scaled = [[(x * patch_size, y * patch_size) for x, y in segment] for segment in segments]
    axis.add_collection(LineCollection(scaled, colors=color, linewidths=2.5, capstyle="round", clip_on=False))
