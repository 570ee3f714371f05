"""The page of claims says what the scripts in benchmarks/claims say and what they measured; nothing is trained here."""

from __future__ import annotations

import ast
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "claims"
sys.path.append(str(FOLDER))

from record import MEASURED, PAGE, RESULTS, SCRIPTS, Claim, page  # noqa: E402

RECORD = json.loads(MEASURED.read_text())


def scripts() -> list[ModuleType]:
    return [import_module(name) for name in SCRIPTS]


def without_effect(measured: Any) -> Any:
    """Return the same measurement as if all that was compared were alike."""
    if isinstance(measured, dict):
        return {name: without_effect(value) for name, value in measured.items()}
    if isinstance(measured, list):
        return [without_effect(value) for value in measured]
    return type(measured)(1) if isinstance(measured, int | float) else measured


def test_the_page_is_what_the_scripts_say_and_measured() -> None:
    assert PAGE.read_text() == page(scripts(), RECORD), "run python benchmarks/claims/run.py"


def test_every_script_of_the_folder_is_on_the_page() -> None:
    def has_claim(path: Path) -> bool:
        assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        return any(isinstance(target, ast.Name) and target.id == "CLAIM" for one in assigned for target in one.targets)

    assert sorted(path.stem for path in FOLDER.glob("*.py") if has_claim(path)) == sorted(SCRIPTS)
    assert list(RECORD["scripts"]) == list(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_is_claimed_by_whom_and_what_would_reproduce_it(name: str) -> None:
    claim = import_module(name).CLAIM
    assert isinstance(claim, Claim)
    assert all(vars(claim).values())
    assert "arXiv:" in claim.source


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_verdict_is_no_where_nothing_differs(name: str) -> None:
    script, measured = import_module(name), RECORD["scripts"][name]["measured"]
    assert script.reproduced(measured) in (True, False)
    assert not script.reproduced(without_effect(measured))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_plot_lies_beside_the_page_and_is_small(name: str) -> None:
    assert (RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (RESULTS / f"{name}.png").stat().st_size < 60_000
