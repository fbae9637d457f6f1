"""What runs on a CUDA machine, a process for each backend; and, on any machine, that those scripts would see a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_huge
import gpu_jobs
import gpu_modes
import pytest
import torch
from conftest import ROOT
from gpu_jobs import Options
from support import CPU, draw

import mmkernels as mk
from mmkernels.cards import all_cards, card_of
from mmkernels.cards.card import Call, Card

SCRIPTS = ("gpu_suite", "gpu_modes", "gpu_hopper", "gpu_huge")
ON_CPU = Options("cpu", CPU)
CARDS = all_cards()
over_cards = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)


def run(script: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = script if isinstance(script, Path) else ROOT / "python_tests" / f"{script}.py"
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python_tests"), **variables},
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("script", "backend"),
    [
        (script, backend)
        for script in SCRIPTS
        for backend in ("cuda", "triton")
        if (script, backend) != ("gpu_hopper", "triton")
    ],
)
def test_on_a_gpu(script: str, backend: str) -> None:
    """With the compiled library, and with Triton alone."""
    if not torch.cuda.is_available():
        pytest.fail("a gpu test was asked for where torch finds no GPU")
    own = {"MMKERNELS_HOPPER_ATTENTION": "1"} if script == "gpu_hopper" else {}
    done = run(script, backend, MMKERNELS_CUDA_LIBRARY="1" if backend == "cuda" else "0", **own)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("script", "only"),
    [
        ("gpu_suite", "layer_norm small"),
        ("gpu_modes", "token_roll small"),
        ("gpu_hopper", "packed 197x197x64 full bfloat16"),
        ("gpu_huge", "huge rms_norm"),
    ],
)
def test_scripts_run_on_the_cpu_too(script: str, only: str) -> None:
    done = run(script, "cpu", "--only", only, "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "FAILED" not in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_whole_on_the_cpu(script: str) -> None:
    done = run(script, "cpu")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]


def test_scripts_end_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        return
    done = run("gpu_suite", "cuda", "--seconds", "90")
    assert done.returncode == 1 and "no CUDA GPU" in done.stderr


# --- jobs -----------------------------------------------------------------------------------------------------------------
BAD_JOBS = """
import os
from gpu_jobs import Job, main

def failing():
    assert 1 == 2, "one is not two"

def broken():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

functions = {"seen": lambda: "a remark", "crashing": lambda: os._exit(9), "broken": broken, "failing": failing}
main("", lambda options: [Job(name, run) for name, run in functions.items()] + [Job("right", lambda: None)])
"""


def test_all_jobs_run_and_none_that_did_not_pass_is_lost(tmp_path: Path) -> None:
    """In one process that crashes, and in one that the GPU no longer serves: others take their places."""
    script = tmp_path / "jobs.py"
    script.write_text(BAD_JOBS)
    done = run(script, "cpu", "--processes", "1")
    assert "2 passed, 2 FAILED, 1 CRASHED" in done.stdout and done.returncode == 1, done.stdout + done.stderr
    for text in ("seen: a remark", "one is not two", "illegal memory access", "crashing: CRASHED"):
        assert text in done.stdout


def test_jobs_that_time_did_not_suffice_for_are_said_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    jobs = [gpu_jobs.Job("slow", lambda: time.sleep(0.3)), gpu_jobs.Job("after", lambda: None)]
    gpu_jobs._work(jobs, tmp_path, time.time() + 0.1)
    assert not gpu_jobs._report(jobs, tmp_path, 1.0)
    assert "not run: after" in (shown := capsys.readouterr().out) and "1 passed, 1 NOT RUN" in shown
    gpu_jobs._work(jobs, tmp_path, time.time() + 9)
    assert gpu_jobs._report(jobs, tmp_path, 1.0)


# --- what is looked at ----------------------------------------------------------------------------------------------------
@over_cards
def test_every_card_has_an_empty_input_and_a_huge_one(card: Card) -> None:
    """Of the same op under another name one is enough: nested_mlp is mlp with parts of its weights."""
    assert any(gpu_modes.has_nothing(sample) for sample in card.samples)
    huge = {case.op.__name__ for case in gpu_huge.CASES} | {"permute_tokens", "unpermute_tokens", "nested_mlp"}
    assert card.name in huge


def test_every_card_is_in_every_mode() -> None:
    names = [job.name for job in (*gpu_modes.jobs(ON_CPU), *gpu_modes.stream_jobs(Options("cuda", torch.device("cuda"))))]
    for mode in ("graph", "compile", "autocast", "second device", "stream"):
        for card in CARDS:
            assert any(f"{name} ".startswith(f"{mode} {card.name} ") for name in names), f"{mode} {card.name}"


def test_without_the_library_what_runs_otherwise_runs_again() -> None:
    names = {card.name for card in gpu_jobs.cards_of(Options("triton", torch.device("cuda")))}
    assert {"token_roll", "hash_attention", "permute_tokens", "moe_mlp", "route"} <= names and "layer_norm" not in names
    assert gpu_jobs.cards_of(ON_CPU) == list(CARDS)


@pytest.mark.parametrize("case", gpu_huge.CASES, ids=lambda case: f"{case.op.__name__} {case.name}".strip())
def test_huge_inputs_pass_the_boundary(case: gpu_huge.Huge) -> None:
    """Slices hold the first element beyond, and what comes last."""
    device = torch.device("cuda")
    rows, boundary = gpu_huge._rows(case, device)
    slices = dict(gpu_huge._slices(case, device))
    assert rows * case.width > gpu_huge.BEYOND and boundary * case.width <= gpu_huge.BEYOND
    assert slices["boundary"].start < boundary < slices["boundary"].stop and slices["end"].stop == rows
    call = case.make(case.of_a_unit, gpu_huge._drawer(CPU))
    assert max(t[0].numel() for t in call.tensors() if t.dim() > 0 and t.size(0) == case.of_a_unit) >= case.width


# --- a mistake is seen ----------------------------------------------------------------------------------------------------
def _wrong_at_the_end(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The last rows are the first ones': what an index that overflows gives."""
    out = mk.rms_norm(x, *rest)
    return torch.cat((out[:-3], out[:3]))


def test_an_index_that_overflows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = next(case for case in gpu_huge.CASES if case.op is mk.rms_norm)
    gpu_huge.check_huge(huge, ON_CPU)
    monkeypatch.setattr(gpu_huge, "card_of", lambda op: replace(card_of("rms_norm"), function=_wrong_at_the_end))
    monkeypatch.setattr(mk, "explain", lambda function, *args: type("Explanation", (), {"kernel": "cpu"}))
    with pytest.raises(AssertionError, match="end: output"):
        gpu_huge.check_huge(huge, ON_CPU)


def test_results_that_differ_from_run_to_run_are_seen() -> None:
    calls: list[int] = []

    def drifting(x: torch.Tensor, frames: int) -> torch.Tensor:
        calls.append(1)
        return mk.token_roll(x, frames) + 0.5 * len(calls)

    case = replace(card_of("token_roll").bench[0], make=card_of("token_roll").samples[0].make)
    gpu_huge.check_repeats(case, ON_CPU)
    with pytest.raises(AssertionError, match="repeated"):
        gpu_huge.check_repeats(replace(case, run=drifting), ON_CPU)


def test_what_a_graph_keeps_of_its_first_inputs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an op would that copies something to the host and back while it is recorded."""
    card = card_of("token_roll")
    sample = card.samples[0]
    gpu_modes.check_graph(card, sample, False, ON_CPU)
    kept = draw(sample, gpu_modes.DTYPE).args[0].clone()
    monkeypatch.setattr(gpu_modes, "captured", lambda function, device: (lambda: None, [mk.token_roll(kept, 3)]))
    with pytest.raises(AssertionError, match="replayed"):
        gpu_modes.check_graph(card, sample, False, ON_CPU)


def test_other_numbers_go_into_the_memory_of_a_call() -> None:
    """Views of one tensor, expanded ones and integers too."""
    for card in CARDS:
        for sample in card.samples:
            if sample.full:
                continue
            call, other = draw(sample, torch.float32), gpu_modes.redrawn(sample, torch.float32, CPU)
            pointers = [t.data_ptr() for t in call.tensors()]
            gpu_modes.overwrite(call, other)
            assert pointers == [t.data_ptr() for t in call.tensors()]
            assert all(torch.equal(a, b) for a, b in zip(call.tensors(), other.tensors(), strict=True))


def test_packed_sequences_are_captured_with_their_longest_length() -> None:
    packed = next(sample for sample in card_of("attention").samples if sample.name == "packed")
    call = draw(packed, torch.float32)
    assert gpu_modes.asks_the_gpu(call)
    told = gpu_modes.with_max_seqlen(call)
    assert (told.kwargs["max_seqlen_q"], told.kwargs["max_seqlen_k"]) == (9, 9) and not gpu_modes.asks_the_gpu(told)
    assert not gpu_modes.asks_the_gpu(Call((torch.zeros(1),)))
