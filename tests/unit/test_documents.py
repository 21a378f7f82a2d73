"""The pages for contributors name what is there: each file exists, and each `file.py::name` is defined in its file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where a path in a page may begin.
STARTS = ("", "dsv3_megatron/", "docs/")
PAGES = [path for folder in ("understanding", "contributing") for path in sorted((ROOT / "docs" / folder).glob("*.md"))]
PAGES += [path for path in (ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md") if path.exists()]
PATH = re.compile(r"(\.?[\w./-]+(?:\.(?:py|md|sh|toml|yml|csv|svg|ipynb)|/)|Makefile|\.ci/run)(?:::([\w.]+))?")


def defined(path: Path) -> set[str]:
    """Names of a module, and of its classes' members as Class.member."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            for target in getattr(node, "targets", None) or [getattr(node, "target", None)]:
                inside = ast.walk(target) if target else ()
                names.update(prefix + name.id for name in inside if isinstance(name, ast.Name))
    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


def missing(page: str) -> list[str]:
    """What a page names that is not there. Names with capital words, braces or stars stand for something else."""
    found = []
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page):
        match = PATH.fullmatch(code)
        if match is None:
            continue
        paths = [ROOT / start / match[1] for start in STARTS if (ROOT / start / match[1]).exists()]
        if not paths or (match[2] and not any(match[2] in defined(path) for path in paths if path.suffix == ".py")):
            found.append(code)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("page", "reported"), [
    ("`config/run.py::RunConfig` and `tests/routing.py`, `model/`, `Makefile`", []),
    ("`schedule/plan.py::Plan.num_ranks` in `docs/`", []),
    ("`config/gone.py`", ["config/gone.py"]),
    ("`gone/`", ["gone/"]),
    ("`config/run.py::Gone`", ["config/run.py::Gone"]),
    ("`schedule/plan.py::Plan.gone`", ["schedule/plan.py::Plan.gone"]),
])
def test_a_planted_name_is_found(page: str, reported: list[str]) -> None:
    assert missing(page) == reported
