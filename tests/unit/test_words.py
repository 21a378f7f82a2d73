"""A word has one meaning: the name of a public class is used once in the whole library."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("dsv3_megatron", "kernels")


def classes_named_twice(root: Path) -> dict[str, list[str]]:
    """Names of public classes that more than one module defines, with these modules; classes in classes count too."""
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].append(path.relative_to(root).as_posix())
    return {name: places for name, places in modules.items() if len(places) > 1}


def renamed_imports(root: Path) -> list[str]:
    """Classes of this library that a module knows under another name, as "file:line Name as Other"."""
    return [f"{path.relative_to(root)}:{node.lineno} {alias.name} as {alias.asname}"
            for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsv3_megatron")
            for alias in node.names if alias.asname and alias.name[0].isupper()]


def test_a_class_name_is_used_once() -> None:
    assert classes_named_twice(ROOT) == {}


def test_a_class_has_one_name_everywhere() -> None:
    assert renamed_imports(ROOT) == []


def test_planted_words_are_found(tmp_path: Path) -> None:
    for file, text in {"dsv3_megatron/ops/one.py": "class Plan:\n    class Inner: ...\nclass _Own: ...\n",
                       "kernels/two.py": "class Inner: ...\nclass _Own: ...\nclass Alone: ...\n",
                       "dsv3_megatron/data/three.py": "from dsv3_megatron.ops.one import Plan as Order\n"}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert classes_named_twice(tmp_path) == {"Inner": ["dsv3_megatron/ops/one.py", "kernels/two.py"]}
    assert renamed_imports(tmp_path) == ["dsv3_megatron/data/three.py:1 Plan as Order"]
