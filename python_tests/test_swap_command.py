"""`mmkernels swap` and `mmkernels demo --model`: models by name, real inputs, and what the commands print."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from oracles import oracle

from mmkernels import cli

oracle("timm")
oracle("transformers")

import timm  # noqa: E402
import transformers  # noqa: E402

from mmkernels.demo.others import sample_picture  # noqa: E402
from mmkernels.demo.video import load_picture  # noqa: E402
from mmkernels.integrations.named import load_model, needs, random_inputs  # noqa: E402

TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT as transformers saves it."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig(vocab_size=1200, **TINY)).save_pretrained(path)
    return path


def command(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["mmkernels", *options])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


def test_swap_prints_what_it_did_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    options = ("--batch", "2", "--dtype", "bfloat16", "--seconds", "0.01", "--json", str(path), "--every")
    assert command(monkeypatch, "swap", "test_vit", *options) == 0
    printed = capsys.readouterr().out
    for part in ("timm test_vit", "x [2, 3, 160, 160]", "replaced", "within the rule", "by the kernels", "times as fast"):
        assert part in printed
    data = json.loads(path.read_text())
    assert data["within_rule"] and data["share"] > 0.9 and data["times"]["after"]["median_ms"] > 0
    assert len(data["modules"]) == sum(1 for _ in timm.create_model("test_vit").modules())
    assert "replaced blocks.0.attn.qkv torch.nn.modules.linear.Linear: mk.linear" in printed


def test_swap_of_a_folder_takes_its_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = load_model(str(folder))
    saved = transformers.BertModel.from_pretrained(folder).state_dict()
    assert source == "transformers" and all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert command(monkeypatch, "swap", str(folder), "--seconds", "0", "--only", "encoder") == 0
    printed = capsys.readouterr().out
    assert "input_ids [1, 32]" in printed and "not selected" in printed and "times as fast" not in printed


def test_weights_from_a_file(tmp_path: Path) -> None:
    plain = timm.create_model("test_vit")
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    _, model = load_model("timm:test_vit", weights=tmp_path / "weights.pt")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    with pytest.raises(ValueError, match="does not fit test_vit2"):
        load_model("test_vit2", weights=tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model("test_vit", weights=tmp_path / "none.pt")


def test_numbers_that_do_not_hold_are_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "swap", "test_vit", "--int8", "--seconds", "0") == 1
    assert command(monkeypatch, "swap", "test_vit", "--int8", "--seconds", "0", "--no-verify") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nobody_knows_it",), "model: 'nobody_knows_it' is no model of timm"),
        (("timm:bert",), "model: timm"),
        (("hub:bert",), "model: expected timm:NAME or transformers:NAME"),
        (("test_vit", "--dtype", "int4"), "dtype: expected one of float32, bfloat16, float16"),
        (("test_vit", "--batch", "0"), "batch: expected 1 or more"),
        (("test_vit", "--only", "nothing"), "only: 'nothing' matches no module"),
    ],
)
def test_errors_name_the_argument(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "swap", *options) == 2
    assert capsys.readouterr().err.startswith(f"mmkernels: error: {message}")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bert", {"input_ids"}),
        ("clip", {"input_ids", "pixel_values"}),
        ("vivit", {"pixel_values"}),
        ("whisper", {"input_features", "decoder_input_ids"}),
        ("lxmert", {"input_ids", "visual_feats", "visual_pos"}),
        ("t5", {"input_ids", "decoder_input_ids"}),
        ("wav2vec2", {"input_values"}),
    ],
)
def test_what_models_of_transformers_take(kind: str, names: set[str]) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind))
    assert set(needs(model)) == names
    inputs = random_inputs(model, 3, torch.bfloat16)
    assert all(value.size(0) == 3 for value in inputs.values())
    assert all(value.dtype == (torch.int64 if name.endswith("ids") else torch.bfloat16) for name, value in inputs.items())
    if kind == "vivit":
        assert inputs["pixel_values"].shape == (3, 32, 3, 224, 224)


def test_demo_of_a_picture_and_of_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--repeats", "1", "--out", str(tmp_path))
    for model, seen in (("test_vit", "china.jpg"), (str(folder), '"a temple", hashed')):
        assert command(monkeypatch, "demo", "--model", model, "--text", "a temple", *options) == 0
        assert "within the rule" in capsys.readouterr().out
        data = json.loads((tmp_path / "report.json").read_text())
        assert data["within_rule"] and data["share"] > 0.9 and seen in data["inputs"][0]
        assert f"# {model} before and after the swap" in (tmp_path / "report.md").read_text()
    assert command(monkeypatch, "demo", "--model", "nobody_knows_it", *options) == 2
    assert "which is none of all_in_one_tiny" in capsys.readouterr().err
    assert command(monkeypatch, "demo", "--model", "test_vit", "--image", str(tmp_path / "none.png"), *options) == 2
    assert "image: there is no file" in capsys.readouterr().err


def test_the_picture_is_the_one_that_scikit_learn_ships() -> None:
    from sklearn.datasets import load_sample_image

    path = sample_picture()
    picture = load_picture(path, 320).pixels[0]
    height, width = load_sample_image("china.jpg").shape[:2]
    assert (height, width) == (427, 640) and picture.shape == (3, 320, 320)
    assert 0.2 < picture.mean() < 0.8 and picture.std() > 0.1
