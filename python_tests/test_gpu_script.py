"""bench/gpu.sh without a GPU: the programs that it starts are stand-ins, their command lines those that real ones take."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

import mmkernels.bench.command as bench_command

# Each program writes down its arguments and what of its environment counts; FAKE says what it does then: a list of
# [regular expression, shell command].
STAND_IN = """#!{python}
import json, os, re, subprocess, sys
line = sys.argv[1:]
name = os.path.basename(sys.argv[0])
with open({log!r}, "a") as log:
    log.write(json.dumps([name, line, os.environ.get("MMKERNELS_CUDA_LIBRARY"),
                          os.environ.get("MMKERNELS_HOPPER_ATTENTION"), os.getcwd()]) + "\\n")
if name == "python-stand-in" and "wheel" in line:
    folder = line[line.index("--wheel-dir") + 1]
    os.makedirs(folder)
    open(os.path.join(folder, "mmkernels-0-py3-none-any.whl"), "w").close()
for pattern, command in json.loads(os.environ["FAKE"]):
    if re.search(pattern, " ".join([name, *line])):
        sys.exit(subprocess.call(command, shell=True))
"""
STAGES = [
    *("install", "info", "gpu", "suite-cuda", "modes-cuda", "bench-judged", "hopper-cuda", "bench-hopper", "suite-triton"),
    *(f"sanitize-{tool}-{backend}" for tool in ("memcheck", "racecheck") for backend in ("cuda", "triton")),
    *("huge-cuda", "modes-triton", "huge-triton", "bench-triton", "bench-rest"),
]


@dataclass(frozen=True)
class Run:
    status: int
    shown: str
    outcomes: dict[str, str]
    commands: list[tuple[str, list[str], str | None, str | None, str]]
    out: Path
    seconds: float


def gpu_script(tmp_path: Path, *fake: tuple[str, str], wheel: bool = True, **variables: str) -> Run:
    """Runs it in a copy of the folders that it looks into."""
    root, bin_folder, log = tmp_path / "checkout", tmp_path / "bin", tmp_path / "log"
    for folder in (root / "bench", root / "python_tests", bin_folder):
        folder.mkdir(parents=True)
    (root / "bench" / "gpu.sh").write_bytes((ROOT / "bench" / "gpu.sh").read_bytes())
    if wheel:
        (root / "dist").mkdir()
        (root / "dist" / "mmkernels-0-py3-none-any.whl").touch()
    log.touch()
    for name in ("python-stand-in", "nvidia-smi", "compute-sanitizer"):
        (bin_folder / name).write_text(STAND_IN.format(python=sys.executable, log=str(log)))
        (bin_folder / name).chmod(0o755)
    start = time.time()
    done = subprocess.run(
        ["bash", "bench/gpu.sh"],
        cwd=root,
        env={
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHON": str(bin_folder / "python-stand-in"),
            "OUT": str(tmp_path / "out"),
            "FAKE": json.dumps(fake),
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (tmp_path / "out" / "stages.tsv").read_text().splitlines()
    commands = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    outcomes = {name: outcome for name, outcome, _ in (line.split("\t") for line in lines)}
    return Run(done.returncode, done.stdout + done.stderr, outcomes, commands, tmp_path / "out", time.time() - start)


def test_every_stage_runs_and_is_in_the_table(tmp_path: Path) -> None:
    run = gpu_script(tmp_path, ("nvidia-smi", "echo NVIDIA H200"))
    assert run.status == 0, run.shown
    assert sorted(run.outcomes) == sorted(STAGES)
    assert set(run.outcomes.values()) == {"passed", "extra, passed"}
    assert list(run.outcomes)[:9] == STAGES[:9], "the order is that of importance"
    table = (run.out / "stages.txt").read_text()
    assert all(re.search(rf"^{name} +(extra, )?passed +\d+$", table, re.M) for name in STAGES) and table in run.shown
    assert (run.out / "gpu.log").read_text() == "NVIDIA H200\n"
    for name, line, library, hopper, folder in run.commands:
        text = shlex.join(line)
        assert (hopper == "1") == ("gpu_hopper" in text or "attention.gpu.L" in text), text
        if "gpu_" in text:
            assert library == ("1" if "cuda" in line else "0"), text
        if name == "compute-sanitizer" or "gpu_" in text or "bench" in text:
            assert folder == str(run.out)
    benches = [(line[-1], library) for _, line, library, *_ in run.commands if line[0] == "-c" and "bench" in line[-1]]
    assert [library for _, library in benches] == [None, None, "0", None]


def test_command_lines_are_those_that_the_programs_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_script(tmp_path)
    scripts = {}
    for name, line, *_ in run.commands:
        if name == "python-stand-in" and line[0].endswith(".py"):
            path = ROOT / "python_tests" / Path(line[0]).name
            assert path.exists()
            scripts[path.name, line[1]] = line[1:]
        if name == "compute-sanitizer":
            end = next(i for i, word in enumerate(line) if word.endswith("python-stand-in"))
            tool, *options = line[1:end]
            assert line[0] == "--tool" and tool in ("memcheck", "racecheck")
            assert options == [
                *("--error-exitcode", "1", "--report-api-errors", "no", "--target-processes", "application-only")
            ]
            script, backend, *rest = line[end + 1 :]
            assert (ROOT / "python_tests" / Path(script).name).exists() and backend in ("cuda", "triton")
            assert rest == (["--brief"] if tool == "racecheck" else [])
    assert len(scripts) == 7
    for (script, _), arguments in scripts.items():
        backend, *rest = arguments
        assert rest[0] == "--seconds" and 20 < float(rest[1]) < 200 and backend in ("cuda", "triton")
        assert script in ("gpu_suite.py", "gpu_modes.py", "gpu_hopper.py", "gpu_huge.py")
    asked: list[dict[str, object]] = []
    signature = inspect.signature(bench_command.run)

    def run_bench(**given: object) -> None:
        bound = signature.bind(**given)
        bound.apply_defaults()
        asked.append(dict(bound.arguments))

    monkeypatch.setattr(bench_command, "run", run_bench)
    for _, line, *_ in run.commands:
        if line[0] == "-c" and "bench" in line[1]:
            exec(compile(line[1], "gpu.sh", "exec"), {})
    assert [given["case"] for given in asked] == [".gpu.", "attention.gpu.L", ".gpu.", None]
    assert all(given["device"] == "cuda" and 0 < given["limit_s"] < 530 and given["seconds"] < 1 for given in asked)
    assert len({given["json_path"] for given in asked}) == len({given["plot_folder"] for given in asked}) == 4


def test_what_fails_is_said_and_does_not_end_the_others(tmp_path: Path) -> None:
    run = gpu_script(
        tmp_path,
        ("gpu_modes.py cuda", "echo two jobs failed; exit 1"),
        ("racecheck.*gpu_sanitize.py triton", "exit 1"),
        ("memcheck", "echo '========= Device not supported'; exit 1"),
        ("family='token_roll'", "exit 2"),
    )
    assert run.status == 1
    failed = {name: outcome for name, outcome in run.outcomes.items() if not outcome.endswith("passed")}
    assert failed == {
        "modes-cuda": "FAILED (1)",
        "sanitize-racecheck-triton": "FAILED (1)",
        "sanitize-memcheck-cuda": "unavailable",
        "sanitize-memcheck-triton": "unavailable",
        "bench-triton": "extra, FAILED (2)",
    }
    assert sorted(run.outcomes) == sorted(STAGES) and "two jobs failed" in (run.out / "modes-cuda.log").read_text()
    only_extra = gpu_script(
        tmp_path / "again", ("family='token_roll'", "exit 2"), ("memcheck", "echo Device not supported; exit 1")
    )
    assert only_extra.status == 0


def test_it_ends_in_time_and_names_what_was_left(tmp_path: Path) -> None:
    run = gpu_script(tmp_path, ("gpu_suite.py cuda", "sleep 60"), LIMIT="14")
    assert run.status == 1 and run.seconds < 25
    assert run.outcomes["suite-cuda"] == "OUT OF TIME"
    assert {run.outcomes[name] for name in STAGES if name in ("modes-cuda", "bench-judged", "huge-cuda")} == {"not run"}
    assert run.outcomes["bench-rest"] == "extra, not run"


def test_without_a_wheel_one_is_built_and_without_a_gpu_nothing_is_done(tmp_path: Path) -> None:
    run = gpu_script(tmp_path, wheel=False, LIMIT="30")
    assert list(run.outcomes)[:2] == ["build", "install"] and run.status == 0
    (install,) = (line for _, line, *_ in run.commands if "install" in line)
    assert install[-1].endswith("mmkernels-0-py3-none-any.whl") and "--no-index" in install and "--no-deps" in install
    broken = gpu_script(tmp_path / "again", ("wheel", "exit 1"), wheel=False)
    assert broken.status == 1 and broken.outcomes == {"build": "FAILED (1)"}
    none = gpu_script(tmp_path / "third", ("python-stand-in -$", "exit 1"))
    assert none.status == 1 and none.outcomes == {} and len(none.commands) == 1
