"""Docstrings stand alone in help(): each begins with its thing or its deed, and a room's index names its modules.

Read by AST, as `help()` shows them: modules, classes, functions and methods, and the lines of their "Args:",
"Attributes:" and "Raises:". Public ones must have a docstring; private ones are held to the rules if they have one.
What is said of an attribute stands there too: help() shows no string below it. Each rule is also shown to fail on a
planted violation.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("dsv3_megatron", "kernels")

# A reader of help() sees no sentence before these, which lean on one.
LEANING = {"as", "likewise", "see", "those", "these", "that", "it", "its", "they", "their", "them", "whose"}
DANGLING = LEANING | {"of", "where", "when", "with", "without", "if", "while", "until", "from", "for", "in", "at", "by",
                      "on", "over", "to", "between", "behind", "before", "after", "under", "is", "does", "has"}
DANGLING_PHRASES = ("the same", "a run's", "all of it", "so many")
REFERENTLESS = re.compile(r"(what|whether|how|which|why) (it|its|they|their|them|those|these)\b")
MIN_SUMMARY_WORDS = 4
MIN_ITEM_WORDS = 2
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
ITEM = re.compile(r"( {4})(\*{0,2}\w[\w., ]*):(?: (.*))?")


def public_nodes(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The module under the name "", then each public class, function and method under its dotted name."""
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        name, node = pending.pop(0)
        yield name, node
        if isinstance(node, ast.Module | ast.ClassDef):
            pending += [(f"{name}.{child.name}".lstrip("."), child) for child in node.body
                        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                        and not child.name.startswith("_")]


def items(docstring: str) -> Iterator[tuple[str, str, str]]:
    """(section, name, text) of what "Args:", "Attributes:" and "Raises:" list."""
    section = name = text = ""
    for line in [*docstring.split("\n"), ""]:
        found, begins = SECTION.fullmatch(line), ITEM.fullmatch(line)
        if name and (found or begins or not line.startswith(" " * 8)):
            yield section, name, text
            name = ""
        if found or (line and not line.startswith(" ")):
            section = found[1] if found else ""
        elif begins and section in ("Args", "Attributes", "Raises"):
            name, text = begins[2], begins[3] or ""
        elif name:
            text = f"{text} {line.strip()}".strip()


def leans(text: str, words: set[str]) -> bool:
    first = re.match(r"[\w']+", text)
    return (bool(first and first[0].lower() in words) or text.lower().startswith(DANGLING_PHRASES)
            or bool(REFERENTLESS.match(text.lower())))


def faults(docstring: str | None) -> list[str]:
    """What keeps a docstring from standing alone."""
    if not docstring:
        return ["no docstring"]
    summary = docstring.split("\n\n")[0]
    found = []
    if len(summary.split()) < MIN_SUMMARY_WORDS:
        found.append(f"says too little: {summary}")
    if leans(summary, DANGLING):
        found.append(f"begins in the middle: {summary.splitlines()[0]}")
    for section, name, text in items(docstring):
        if len(text.split()) < MIN_ITEM_WORDS:
            found.append(f"{name} says too little: {text}")
        elif leans(text, LEANING | {"of"} if section == "Raises" else DANGLING):
            found.append(f"{name} begins in the middle: {text}")
    return found


def wrong_docstrings(root: Path) -> list[str]:
    """Every fault of a docstring under a public name, as "file:name: fault"."""
    found = []
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = {node: name for name, node in public_nodes(tree)}
        # What is private, or inside a function, need not have one; a reader of the code sees it as help() shows others.
        nodes |= {node: node.name for node in ast.walk(tree)
                  if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                  and node not in nodes and ast.get_docstring(node)}
        found += [f"{path.relative_to(root)}:{name}: {fault}" for node, name in nodes.items()
                  for fault in faults(ast.get_docstring(node))]  # type: ignore[arg-type]
        found += [f"{path.relative_to(root)}:{node.name}: help() does not show: {below.value.value}"
                  for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for below in node.body[1:]
                  if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                  and isinstance(below.value.value, str)]
    return found


def missing_from_indexes(root: Path) -> list[str]:
    """Modules and rooms that the `__init__` beside them does not name, as module.py or room/."""
    missing = []
    for index in sorted(path for room in ROOMS for path in (root / room).rglob("__init__.py")):
        text = ast.get_docstring(ast.parse(index.read_text(encoding="utf-8"))) or ""
        names = [path.name for path in index.parent.glob("*.py") if path != index]
        names += [f"{path.parent.name}/" for path in index.parent.glob("*/__init__.py")]
        missing += [f"{index.parent.relative_to(root)} does not name {name}" for name in sorted(names)
                    if not re.search(rf"(?<!\w){re.escape(name)}", text)]
    return missing


def test_public_docstrings_stand_alone() -> None:
    assert wrong_docstrings(ROOT) == []


def test_the_index_of_a_room_names_each_of_its_modules() -> None:
    assert missing_from_indexes(ROOT) == []


def test_as_many_items_are_read_as_help_shows() -> None:
    from dsv3_megatron.config.phases import Phase
    from dsv3_megatron.planning.memory.settings import PassSettings

    for documented in (Phase, PassSettings):
        names = [name for section, name, _ in items(inspect.getdoc(documented) or "") if section == "Attributes"]
        assert set(names) <= set(documented.__dataclass_fields__) and len(names) == len(set(names)) > 20


@pytest.mark.parametrize(("docstring", "reported"), [
    ("Of all files of weights.", "begins in the middle"),
    ("As `parse`, for a line of any length.", "begins in the middle"),
    ("Likewise. But of another kind.", "begins in the middle"),
    ("Those of the named fields that it gives a value.", "begins in the middle"),
    ("Where the documents of each sequence begin.", "begins in the middle"),
    ("With the all-to-all waited for.", "begins in the middle"),
    ("It has happened on the device.", "begins in the middle"),
    ("Its steps and batch in a few words.", "begins in the middle"),
    ("The same by even and odd elements.", "begins in the middle"),
    ("A run's own settings.", "begins in the middle"),
    ("Whether it is standard input.", "begins in the middle"),
    ("Undo `as_counts`.", "says too little"),
    ("", "no docstring"),
    ("Sizes of a pass on one rank.\n\nAttributes:\n    rope: With.", "rope says too little"),
    ("Sizes of a pass on one rank.\n\nAttributes:\n    hidden: H.\n    rope: Rotary width.", "hidden says too little"),
    ("Read a header from disk.\n\nArgs:\n    dtype:\n        Of the result, which is rounded.", "dtype begins in"),
    ("Read a header from disk.\n\nArgs:\n    seed: Of the draws.\n\nReturns:\n    It.", "seed begins in the middle"),
    ("Read a header from disk.\n\nArgs:\n    a: The\n        path.\n    b: See there.", "b begins in the middle"),
    ("Read a header from disk.\n\nRaises:\n    ValueError: it cannot be read.", "ValueError begins in the middle"),
])
def test_a_planted_docstring_is_found(docstring: str, reported: str, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    planted = tmp_path / "kernels" / "planted.py"
    for before in ("def f():\n", "class C:\n", ""):
        body = textwrap.indent(f'"""{docstring}"""\n', "    " if before else "")
        planted.write_text(f'"""A module that is only planted."""\n{before}{body}' if before else body)
        (fault,) = wrong_docstrings(tmp_path)
        assert reported in fault
    # Private names need no docstring, and one that is there is held to the same rules.
    inner = textwrap.indent(f'"""{docstring}"""\n', " " * 8)
    body = textwrap.indent(f'"""{docstring}"""\n', " " * 4)
    for private in (f"def _f():\n{body}", f"class _C:\n{body}", f"class _C:\n    def f(self):\n{inner}",
                    f"class _C:\n    def __call__(self):\n{inner}", f"def _f():\n    async def g():\n{inner}"):
        planted.write_text(f'"""A module that is only planted."""\n{private}')
        assert len(wrong_docstrings(tmp_path)) == bool(docstring), private


def test_a_string_below_an_attribute_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "planted.py").write_text(
        '"""A module that is only planted."""\nclass C:\n    """Sizes of a pass on one rank."""\n'
        '    a: int\n    """Of it."""\n')
    assert wrong_docstrings(tmp_path) == ["kernels/planted.py:C: help() does not show: Of it."]


def test_a_docstring_that_stands_alone_is_not_found() -> None:
    assert faults("Read a header from disk.\n\nArgs:\n    rope: Rotary width\n        of a head.\n\n"
                  "Returns:\n    It.\n\nRaises:\n    ValueError: on every rank, if it is damaged.\n\n"
                  "Source: Nobody.") == []


def test_a_module_left_out_of_an_index_is_found(tmp_path: Path) -> None:
    inner = tmp_path / "kernels" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").write_text('"""Two modules: one.py and another_two.py."""\n')
    for path in (inner / "__init__.py", tmp_path / "kernels" / "one.py", tmp_path / "kernels" / "two.py"):
        path.write_text("")
    assert missing_from_indexes(tmp_path) == ["kernels does not name inner/", "kernels does not name two.py"]
