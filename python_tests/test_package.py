"""The package as a user meets it: names, README, changelog, command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import mmkernels as mk
from mmkernels.cards import all_cards
from mmkernels.inspection import ops_table

README = (ROOT / "README.md").read_text()


def test_every_op_is_a_public_name() -> None:
    for card in all_cards():
        assert card.name in mk.__all__ and getattr(mk, card.name) is card.function
    for name in mk.__all__:
        assert hasattr(mk, name)


def test_readme_has_the_table_made_from_the_cards() -> None:
    assert ops_table() in README, "make it anew: python -c 'from mmkernels.inspection import ops_table; print(ops_table())'"


def test_readme_names_every_environment_variable() -> None:
    sources = [*(ROOT / "mmkernels").rglob("*.py"), ROOT / "setup.py"]
    used = {name for path in sources for name in re.findall(r"MMKERNELS_[A-Z_]+", path.read_text())}
    assert {name for name in used if f"`{name}`" not in README and f"`{name}=" not in README} == set()


def test_readme_example_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_changelog_has_this_version() -> None:
    assert f"## {mk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def mmkernels(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmkernels", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def test_command_info(tmp_path: Path) -> None:
    done = mmkernels("info", cwd=tmp_path)
    assert done.returncode == 0 and f"mmkernels {mk.__version__}" in done.stdout and "mk.token_roll:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--family", "nonsense"), "token_roll"),
        (("bench", "--device", "tpu"), "device"),
        (("demo", "--video", "missing.mp4"), "missing.mp4"),
        (("demo", "--model", "nonsense"), "all_in_one_base"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = mmkernels(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_source_folder_without_libraries_says_what_to_type(tmp_path: Path) -> None:
    """`python` in the checkout finds the source folder first: the error says so instead of naming a missing symbol."""
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mmkernels"
    for path in (ROOT / "mmkernels").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0 and "pip install ." in done.stderr
