"""The glossary's table of shape letters is the law: each module's legend gives its letters meanings from it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GLOSSARY = (ROOT / "docs/understanding/glossary.md").read_text(encoding="utf-8")
EVERYWHERE = "everywhere"
# Letter, module or EVERYWHERE -> the words of legends.
Table = dict[tuple[str, str], list[str]]


def read_table(page: str) -> Table:
    """The page's two tables of letters; a letter has one meaning everywhere, and others in modules by name."""
    table: Table = {}
    rows = re.findall(r"^\| ([A-Za-z]) \|(.+)\|$", page[page.index("## Shape letters"):], re.MULTILINE)
    assert rows, "the page has no table of letters"
    for letter, rest in rows:
        _, wordings, *modules = (cell.strip() for cell in rest.split(" |"))
        if not modules:
            assert (letter, EVERYWHERE) not in table, f"{letter} has two meanings everywhere"
        for module in re.findall(r"`([^`]+)`", modules[0]) if modules else [EVERYWHERE]:
            table.setdefault((letter, module), []).extend(re.split(r"; ", wordings))
    return table


def legend(docstring: str) -> Iterator[tuple[str, str]]:
    """Letters and their meanings in a module's docstring; letters in brackets, "(s its local part)", are found too."""
    for paragraph in re.findall(r"\b(?:Shapes|Shape suffixes|Legend): (.*?)(?:\.(?=\s|$)|\n\s*\n|\Z)", docstring, re.S):
        text = " ".join(paragraph.split())
        inner = re.compile(r" \(([a-z]) ([^)]*)\)")
        yield from inner.findall(text)
        letter, meaning = "", ""
        for clause in re.split(r"[,;] (?![^(]*\))", inner.sub("", text)):
            begins = re.fullmatch(r"([A-Za-z]) ((?:=|[a-zM]).*)", clause)
            if not begins:
                assert letter, f"a legend begins with {clause!r}, which is no letter and its meaning"
                meaning += f", {clause}"
                continue
            if letter:
                yield letter, meaning
            letter, meaning = begins[1], begins[2]
        yield letter, meaning


def unknown(module: str, docstring: str, table: Table) -> list[str]:
    """What a module's legend says that the table does not."""
    return [f"{module}: {letter} {meaning}" for letter, meaning in legend(docstring)
            if not any(meaning in table.get((letter, place), ()) for place in (EVERYWHERE, module))]


def docstrings() -> Iterator[tuple[str, str]]:
    for top in ("dsv3_megatron", "kernels", "tools", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            module = path.relative_to(ROOT).as_posix()
            if module != "tests/unit/test_glossary.py":
                yield module, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def test_legends_say_what_the_table_says() -> None:
    table = read_table(GLOSSARY)
    assert [line for module, text in docstrings() for line in unknown(module, text, table)] == []


def test_only_products_have_letters_of_their_own() -> None:
    """Elsewhere a letter has one meaning: M, N, K, O and I of a product are the field's."""
    places = {(letter, module) for letter, module in read_table(GLOSSARY) if module != EVERYWHERE}
    assert {letter for letter, _ in places} == set("MNKOI")
    assert [module for _, module in places if not module.startswith(("kernels/", "dsv3_megatron/ops/fp8/"))] == []


def test_the_table_lists_what_legends_say() -> None:
    """No row outlives its legend, neither its words nor the module that it names."""
    said: set[tuple[str, str, str]] = set()
    for module, text in docstrings():
        said |= {(letter, module, meaning) for letter, meaning in legend(text)}
    used = {(letter, meaning) for letter, _, meaning in said}
    for (letter, module), wordings in read_table(GLOSSARY).items():
        if module == EVERYWHERE:
            assert [words for words in wordings if (letter, words) not in used] == [], letter
        else:
            assert any((letter, module, words) in said for words in wordings), f"{module}: {letter} is nothing else"


@pytest.mark.parametrize(("docstring", "reported"), [
    ("Shapes: S sequence, H hidden.", []),
    ("A module.\n\nShapes: S sequence (s its local part under sequence parallelism), B micro-batch.", []),
    ("Legend: S heads.", ["planted.py: S heads"]),
    ("Shapes: B sequences, V vocabulary, Z anything;\nR routed rows.", ["planted.py: Z anything"]),
    ("Shapes: S sequence (s heads), B micro-batch.", ["planted.py: s heads"]),
    ("Shapes: K contraction.", ["planted.py: K contraction"]),  # a meaning of other modules
    ("Shapes: T tokens, or rows, K top-k.", ["planted.py: T tokens, or rows"]),
])
def test_a_planted_meaning_is_found(docstring: str, reported: list[str]) -> None:
    assert unknown("planted.py", docstring, read_table(GLOSSARY)) == reported


def test_a_planted_second_meaning_everywhere_is_found() -> None:
    with pytest.raises(AssertionError, match="S has two meanings everywhere"):
        read_table(GLOSSARY.replace("| H | width", "| S | width"))
