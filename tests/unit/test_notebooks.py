"""The notebooks run from their first cell to their last, and are committed as they are written: without outputs.

Their cells are what a kernel would run: plain Python, cell after cell in one namespace, each notebook in a process of
its own, which nothing has prepared. Only what a cell shows as its last value is not looked at.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
# Compiles each cell under its number, so that an error says where it is.
RUNNER = """
import json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
"""
MOST_LINES = 24


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error::UserWarning:__main__", "-c", RUNNER, str(path)], cwd=folder,
                          capture_output=True, text=True, timeout=240, env={
                              **os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, tmp_path: Path) -> None:
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout and list(tmp_path.iterdir()) == []


def test_a_cell_that_fails_is_found(tmp_path: Path) -> None:
    cells = [{"cell_type": "markdown", "source": ["not run"]}, {"cell_type": "code", "source": ["x = 1\n", "x"]},
             {"cell_type": "code", "source": ["assert x == 2"]}]
    (tmp_path / "planted.ipynb").write_text(json.dumps({"cells": cells}))
    done = run(tmp_path / "planted.ipynb", tmp_path)
    assert done.returncode == 1 and 'File "cell 2", line 1' in done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_explained_and_without_outputs(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    cells = content["cells"]
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert all(len(line.rstrip("\n")) <= 120 for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert 0 < len(cell["source"]) <= MOST_LINES
            ast.parse("".join(cell["source"]))
    for one, two in zip(cells, cells[1:], strict=False):
        if one["cell_type"] == two["cell_type"] == "code":  # a second one draws what the first computed
            assert "matplotlib" in "".join(two["source"])


def test_links_of_the_notebooks_lead_somewhere() -> None:
    targets = [(path, target) for path in NOTEBOOKS for cell in cells_of(path)
               for target in re.findall(r"\]\(([^)#]+)", "".join(cell["source"]))]
    assert targets and [f"{path.name}: {target}" for path, target in targets
                        if not (path.parent / target).is_file()] == []


def test_the_page_lists_every_notebook() -> None:
    page = (ROOT / "docs/notebooks/README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3 and all(f"({path.name})" in page for path in NOTEBOOKS)
