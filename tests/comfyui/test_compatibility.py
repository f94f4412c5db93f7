"""What differs between ComfyUI's versions: a table in nodes/bridge/versions.py, one in docs/compatibility.md, a test a row."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from tests.comfyui.server import ROOT

TOLD_BY = "compatibility_worker.py"
OLDEST, NEWEST = "0.3.64", "0.33.0"  # what docs/compatibility.md has columns for


def documented() -> dict[str, tuple[dict[str, bool], list[str]]]:
    """{row: ({version: whether it has that}, [names of its tests])} of the first table of docs/compatibility.md."""
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = {}
    for line in re.findall(r"^\| (?!What |-).*\|$", text.split("\n## ")[1], re.MULTILINE):
        name, oldest, newest, _, tests = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[name] = ({OLDEST: oldest == "yes", NEWEST: newest == "yes"}, re.findall(r"`(test_\w+)`", tests))
    return rows


def keys_of_the_table() -> set[str]:
    tree = ast.parse((ROOT / "nodes" / "bridge" / "versions.py").read_text(encoding="utf-8"))
    (table,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DIFFERENCES"
    )
    assert isinstance(table, ast.Dict)
    return {key.value for key in table.keys if isinstance(key, ast.Constant)}


def test_the_document_has_the_rows_of_the_table_and_tests_that_exist() -> None:
    rows = documented()
    assert set(rows) == keys_of_the_table()
    here = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "comfyui").glob("test_*.py"))
    for name, (_, tests) in rows.items():
        assert tests, name
        assert all(f"def {test}(" in here for test in tests), name


def test_each_version_has_what_the_document_says(told: dict[str, Any]) -> None:
    if told["version"] not in (OLDEST, NEWEST):
        pytest.skip(f"docs/compatibility.md has no column for ComfyUI {told['version']}")
    assert told["differences"] == {name: versions[told["version"]] for name, (versions, _) in documented().items()}


def test_a_latent_of_another_reduction_is_resized_where_the_version_does_that(told: dict[str, Any]) -> None:
    knows = told["differences"]["latents that tell their reduction"]
    assert told["coarse latent"] == ([1, 16, 5, 8, 8] if knows else [1, 16, 5, 4, 4])


def test_a_latent_of_several_streams_is_refused_in_a_sentence(told: dict[str, Any]) -> None:
    if not told["differences"]["nested latents"]:
        pytest.skip(f"ComfyUI {told['version']} has no nested latents")
    assert "several streams" in told["nested latent"] and "connect" in told["nested latent"]


def test_a_second_plain_copy_is_the_same_model(told: dict[str, Any]) -> None:
    if not told["differences"]["loading without dynamic memory"]:
        pytest.skip(f"ComfyUI {told['version']} never loads a model a second time")
    assert told["second copy"] is True
