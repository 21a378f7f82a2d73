"""The pages for contributors name what is there: files, names in them, rooms in their order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.dict_utils import nested_values

from dsv3_megatron.config.presets import preset
from dsv3_megatron.model.global_names import whole_parameters
from tests.unit.model.test_counts import build_without_memory, megatron_core, one_of
from tests.unit.test_architecture import LEVELS
from tools.draw_rooms import ROWS, draw
from tools.weight_names import renew, tables

__all__ = ["megatron_core"]  # a fixture

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
    """What a page names that is not there. Names with braces or stars stand for something else."""
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


@pytest.mark.parametrize("page", [page for page in PAGES if not page.is_relative_to(ROOT / "docs")],
                         ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_pages_outside_the_site(page: Path) -> None:
    """Those inside it are checked when it is built."""
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


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


# -- the map of rooms ----------------------------------------------------------------------------------


def test_the_map_of_rooms_is_the_order_of_imports() -> None:
    """The page's table and its drawing name every room, in the order that the imports' test holds."""
    rooms = [name for level in LEVELS for name in level]
    page = (ROOT / "docs/understanding/architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## The rooms"):page.index("## A token's walk")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == rooms
    assert tuple(tuple(name for name, _ in row) for row in ROWS) == LEVELS
    assert (ROOT / "docs/understanding/architecture.svg").read_text(encoding="utf-8") == draw()


# -- names of weights ----------------------------------------------------------------------------------


def test_the_page_of_names_has_the_code_s_names() -> None:
    page = (ROOT / "docs/understanding/names.md").read_text(encoding="utf-8")
    assert renew(page) == page, "run python tools/weight_names.py docs/understanding/names.md"


def letters(name: str) -> str:
    """A weight's name with the page's letters for its numbers."""
    name = re.sub(r"\.experts\.\d+\.", ".experts.e.", re.sub(r"^mtp\.layers\.\d+", "mtp.layers.k", name))
    return re.sub(r"\.layers\.\d+", ".layers.n", name)


def test_the_page_of_names_against_built_modules(megatron_core: None) -> None:
    """Global names are those of a built model, keys those that it saves under; none is left out."""
    run = preset("tiny").override(transformer_impl="local")
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)`", tables(run.model), re.MULTILINE)
    with one_of(1, 0, run.parallel) as groups:
        (stage,) = build_without_memory(run, groups)
        names = {letters(whole.name) for whole in whole_parameters(stage, groups)}
        saved = {entry.key for entry in nested_values(stage.sharded_state_dict()) if hasattr(entry, "key")}
    names |= {letters(name) for name, _ in stage.named_buffers() if name.endswith(".expert_bias")}
    inner = ".mtp_model_layer."  # a layer like any other, of which the page shows one weight
    assert {name for name, _ in rows if inner not in name} == {name for name in names if inner not in name}
    assert {name.split(inner)[1] for name in names if inner in name} == {
        name.removeprefix("decoder.layers.n.") for name in names
        if name.startswith("decoder.layers.n.") and not re.search(r"n\.mlp\.linear_fc[12]\.", name)}
    assert {key for _, key in rows} <= {letters(key) for key in saved}
