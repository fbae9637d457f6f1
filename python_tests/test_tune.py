"""Pinned tiles and the search for them, on kernels that are not there: a tile's time is a formula."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkernels.bench import tune
from mmkernels.bench.tune import Workload, agree, climb, neighbours
from mmkernels.cards.card import BenchCase, Call, Cost
from mmkernels.inspection import info
from mmkernels.triton import pinned
from mmkernels.version import __version__

FIELDS = ("BLOCK_M", "warps", "stages")
WORDS = ("products", "half", False, 64)
NAME = "products half 64"


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Of an architecture without packaged tables, with a folder of the user's own that is empty."""
    monkeypatch.setattr(pinned, "architecture", lambda: "sm_1")
    monkeypatch.setattr(pinned, "_PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MMKERNELS_TILES", raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    pinned.tables.cache_clear()
    pinned._pinned.cache_clear()


def table(path: Path, tile: dict[str, Any], **made: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"architecture": "sm_1", "mmkernels": __version__, **made}
    path.write_text(json.dumps({**made, "tiles": {NAME: tile}}))
    return path


def tile() -> pinned.Tile:
    return pinned.tile(WORDS, (64, 4, 2), FIELDS)


# --- tables -------------------------------------------------------------------------------------------------------------
def test_a_tile_comes_from_a_trial_the_user_the_package_or_the_default(tmp_path: Path) -> None:
    assert tile() == (64, 4, 2)
    table(tmp_path / "packaged" / "sm_1.json", {"stages": 3, "BLOCK_M": 32, "warps": 8}, mmkernels="another")
    forget()
    assert tile() == (32, 8, 3)
    table(pinned.user_path("sm_1"), {"stages": 1, "BLOCK_M": 16, "warps": 1})
    forget()
    assert tile() == (16, 1, 1)
    with pinned.trial(NAME, (256, 2, 2)):
        assert tile() == (256, 2, 2)
        with pinned.trial(NAME, (128, 2, 2)):
            assert tile() == (128, 2, 2)
        assert tile() == (256, 2, 2)
    assert tile() == (16, 1, 1)
    assert pinned.tile((*WORDS, "odd"), (64, 4, 2), FIELDS) == (64, 4, 2)


def test_tables_of_other_architectures_and_versions_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = table(tmp_path / "other.json", {"stages": 3, "BLOCK_M": 32, "warps": 8}, architecture="sm_2")
    monkeypatch.setenv("MMKERNELS_TILES", str(path))
    assert tile() == (64, 4, 2)
    table(path, {"stages": 3, "BLOCK_M": 32, "warps": 8}, mmkernels="0.0.1")
    forget()
    with pytest.warns(UserWarning, match=r"made by mmkernels 0\.0\.1 and is not used"):
        assert tile() == (64, 4, 2)
    table(path, {"stages": 3, "BLOCK_M": 32, "warps": 8})
    forget()
    assert tile() == (32, 8, 3)
    monkeypatch.setenv("MMKERNELS_TILES", str(tmp_path / "nowhere.json"))
    forget()
    with pytest.raises(ValueError, match="MMKERNELS_TILES: there is no file"):
        tile()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no table of tiles"),
        ('{"tiles": {}}', "expected an object with architecture and tiles"),
        ('{"architecture": "sm_1", "tiles": {"a": 3}}', "a: expected an object"),
        ('{"architecture": "sm_1", "tiles": {"a": {"warps": 3}}}', "a: warps: expected a power of two"),
        ('{"architecture": "sm_1", "tiles": {"a": {"stages": 0}}}', "a: stages: expected a number from 1"),
        ('{"architecture": "sm_1", "tiles": {"a": {"resident": -1}}}', "a: resident: expected a number from 0"),
        ('{"architecture": "sm_1", "tiles": {"a": {"warps": true}}}', "a: warps: expected"),
    ],
)
def test_bad_tables_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        pinned.read(path)
    assert str(path) in str(caught.value)


def test_a_pinned_tile_has_the_fields_of_its_kernel() -> None:
    table(pinned.user_path("sm_1"), {"BLOCK_M": 16, "warps": 1})
    with pytest.raises(ValueError, match=f"{NAME}: expected BLOCK_M, warps, stages, got BLOCK_M, warps"):
        tile()


def test_info_names_the_tables_in_force(tmp_path: Path) -> None:
    assert "tiles of sm_1: the defaults" in str(info())
    path = table(pinned.user_path("sm_1"), {"BLOCK_M": 16, "warps": 1, "stages": 1}, measured=False)
    forget()
    assert f"tiles of sm_1: {path}, not measured, before the defaults" in str(info())


# --- the search ---------------------------------------------------------------------------------------------------------
BEST = (128, 8, 3)


def cost(chosen: pinned.Tile) -> float:
    return 1.0 + sum(abs(a - b) / b for a, b in zip(chosen, BEST, strict=True))


def test_neighbours_differ_in_one_field_and_keep_the_limits() -> None:
    assert set(neighbours(FIELDS, (64, 4, 2))) == {
        (128, 4, 2), (32, 4, 2), (64, 8, 2), (64, 2, 2), (64, 4, 3), (64, 4, 1),
    }  # fmt: skip
    assert set(neighbours(FIELDS, (16, 16, 6))) == {(32, 16, 6), (16, 8, 6), (16, 16, 5)}
    assert set(neighbours(("BLOCK_H",), (1,))) == {(2,)}
    assert set(neighbours(("resident",), (0,))) == {(1,)}


def test_climbing_ends_at_the_best_tile_and_tries_none_twice() -> None:
    asked: list[pinned.Tile] = []

    def share(candidate: pinned.Tile, best: pinned.Tile) -> float:
        asked.append(candidate)
        return cost(candidate) / cost(best)

    best, tried = climb(FIELDS, (16, 1, 1), share, lambda: False)
    assert best == BEST and tried == len(asked) == len(set(asked))
    assert climb(FIELDS, BEST, share, lambda: False)[0] == BEST
    assert climb(FIELDS, (16, 1, 1), share, lambda: True) == ((16, 1, 1), 0)
    assert climb(FIELDS, (16, 1, 1), lambda candidate, best: 0.99, lambda: False)[0] == (16, 1, 1)  # no gain worth the name
    assert climb(FIELDS, (16, 1, 1), lambda candidate, best: None, lambda: False)[0] == (16, 1, 1)  # none can run


def fake(offset: float = 0.0) -> Workload:
    """A call whose kernel fails with 4 stages, computes something else with 2 and 8 warps, and else is right."""

    def step() -> list[torch.Tensor]:
        block, warps, stages = tile()
        if stages >= 4:
            raise RuntimeError("out of resource: shared memory")
        wrong = 1.0 if (warps, stages) == (8, 2) else 0.0
        return [torch.arange(8.0) + offset + wrong, torch.tensor([block > 0])]

    return Workload(step)


def test_search_finds_the_best_tile_that_runs_and_is_right() -> None:
    told: list[str] = []
    works = {"one": fake, "two": lambda: fake(3.0), "none": lambda: Workload(lambda: [torch.zeros(1)])}
    found = tune.search(works, lambda work: work.step() and cost(tile()), 100.0, told.append)
    assert [(one.name, one.fields, one.before, one.after) for one in found] == [(NAME, FIELDS, (64, 4, 2), BEST)]
    assert found[0].share == pytest.approx(cost(BEST) / cost((64, 4, 2)))
    assert "what two asks for" in told and NAME in told
    assert tile() == (64, 4, 2)  # nothing stays behind but the table


def test_results_that_differ_by_more_than_their_order_of_sums_do_not_agree() -> None:
    x = torch.randn(100)
    assert agree([x * (1 + 2e-7)], [x])
    assert not agree([x * 1.001], [x])
    assert agree([(x * 1.005).bfloat16()], [x.bfloat16()])
    assert not agree([torch.where(x == x[3], float("nan"), x)], [x])
    assert not agree([x, torch.tensor([1])], [x, torch.tensor([2])])
    assert not agree([x[:50]], [x])
    assert agree([torch.tensor([float("inf"), 1.0]), x[:0]], [torch.tensor([float("inf"), 1.0]), x[:0]])


@pytest.mark.parametrize("backward", [False, True])
def test_workload_returns_all_that_comes_out(backward: bool) -> None:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Call:
        return Call(
            (torch.randn(4, 8, generator=generator), torch.randn(8, generator=generator)), {"places": torch.arange(4)}
        )

    def run(x: torch.Tensor, y: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * y, x[places], x.argmax()

    case = BenchCase("products", make, run, {}, lambda call: Cost(1.0, 1.0), backward=backward)
    work = tune.workload(case, "cpu", torch.float32)
    first, again = work.step(), work.step()
    assert [tuple(out.shape) for out in first] == ([(4, 8), (4, 8), (4, 8), (8,)] if backward else [(4, 8), (4, 8), ()])
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, again, strict=True))


def test_command_writes_a_table_that_calls_then_use(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(tune, "workload", lambda case, device, dtype: fake())
    monkeypatch.setattr(tune, "gpu_clock", lambda work: work.step() and cost(tile()))
    path = table(pinned.user_path("sm_1"), {"BLOCK_M": 16, "warps": 1, "stages": 1})
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "tiles": {"kept": {"warps": 2}}}))
    tune.run(family="norm", dtypes=["float32"], seconds=50.0)
    forget()
    assert tile() == BEST
    written = pinned.read(path)
    assert written.tiles["kept"] == {"warps": 2}
    assert written.made["gpu"] == "a GPU" and written.made["measured"] is True and written.made["architecture"] == "sm_1"
    out = capsys.readouterr().out
    assert "1 tiles pinned in" in out and "128 x 8 x 3" in out


def test_mistakes_are_value_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tune needs a GPU"):
        tune.run()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="seconds: expected a number above 0, got -1"):
        tune.run(seconds=-1)
    path = table(tmp_path / "other.json", {"stages": 3, "BLOCK_M": 32, "warps": 8}, architecture="sm_2")
    with pytest.raises(ValueError, match="is a table of sm_2, and this GPU is sm_1"):
        tune.run(out=path)
    with pytest.raises(ValueError, match="family: expected one of"):
        tune.run(family="nobody")
