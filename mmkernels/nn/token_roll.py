"""Temporal token rolling as modules.

Source: "All in One: Exploring Unified Video-Language Pre-training" (CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.ops.token_roll import Range, token_roll, token_roll_layer_norm
from mmkernels.reference.token_roll import default_ranges


def visual_ranges(num_text: int, num_visual: int, *, divisor: int = 8) -> tuple[Range, ...]:
    """The ranges of the default roll where the visual tokens stand behind text in one joint row.

    Args:
        num_text: text tokens at the head of the row; they stay.
        num_visual: visual tokens after them, the frame's class token first.
        divisor: num_visual // divisor tokens roll in each direction.

    Returns:
        (start, stop, shift) triples for `ranges`; none where nothing rolls.
    """
    alone = default_ranges(num_visual, divisor)
    return tuple((num_text + start, num_text + stop, shift) for start, stop, shift in alone)


def _plain_roll(x: Tensor, num_frames: int, ranges: Sequence[Range]) -> Tensor:
    """The roll in plain torch: the row is split at the ranges, the pieces that move are rolled, all are concatenated."""
    video = x.unflatten(0, (-1, num_frames))
    pieces, end = [], 0
    for start, stop, shift in sorted(ranges):
        pieces += [video[:, :, end:start], video[:, :, start:stop].roll(shift, dims=1)]
        end = stop
    pieces.append(video[:, :, end:])
    return torch.cat(pieces, dim=2).flatten(0, 1)


class TokenRoll(nn.Module):
    """:func:`mmkernels.token_roll` as a module: x [B*T, N, C] -> [B*T, N, C].

    Args:
        divisor: N // divisor tokens come from the frame before and as many from the frame after.
        kernels: True runs the op, False plain torch.
    """

    def __init__(self, divisor: int = 8, *, kernels: bool = True) -> None:
        super().__init__()
        self.divisor = divisor
        self.kernels = kernels

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        if self.kernels:
            return token_roll(x, num_frames, divisor=self.divisor)
        return _plain_roll(x, num_frames, visual_ranges(0, x.shape[1], divisor=self.divisor))

    def extra_repr(self) -> str:
        return f"divisor={self.divisor}, kernels={self.kernels}"


class TokenRollLayerNorm(nn.LayerNorm):
    """A LayerNorm that rolls its input first, and hands back the rolled tokens too, for the block's residual.

    Parameters and state_dict keys are those of nn.LayerNorm over the channels, so either loads the other's weights.

    Args:
        channels: C.
        eps: added to the variance.
        elementwise_affine, bias, device, dtype: as in nn.LayerNorm.
        kernels: True runs :func:`mmkernels.token_roll_layer_norm`, False plain torch (roll, then F.layer_norm).
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernels: bool = True,
    ) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=elementwise_affine, bias=bias, device=device, dtype=dtype)
        self.kernels = kernels

    def forward(self, x: Tensor, num_frames: int, ranges: Sequence[Range]) -> tuple[Tensor, Tensor]:
        """Tokens [B*T, N, C] -> (normed, rolled), each [B*T, N, C].

        Args:
            x: the T frames of a video in consecutive rows.
            num_frames: T. A single frame rolls onto itself, so `rolled` is then x itself.
            ranges: (start, stop, shift) triples: tokens start..stop-1 come from `shift` frames before.

        Raises:
            TypeError, ValueError: with kernels, as the op does.
        """
        moves = num_frames > 1 and len(ranges) > 0
        if self.kernels:
            normed, rolled = token_roll_layer_norm(
                x, num_frames, self.weight, self.bias, self.eps, ranges=ranges, need_rolled=moves
            )
            return normed, x if rolled is None else rolled
        rolled = _plain_roll(x, num_frames, ranges) if moves else x
        return F.layer_norm(rolled, self.normalized_shape, self.weight, self.bias, self.eps), rolled

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernels={self.kernels}"
