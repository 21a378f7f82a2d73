"""A word has one meaning: the name of a public class or of a module is used once in the whole library.

A name that is found twice is an error to be mended: give the newer thing the field's own term, or say of what it is one
(`ParameterShard`, `JobShard`). An exception is for one and the same thing in two rooms.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("dsv3_megatron", "kernels")

# Module names that may be used twice, by the reason: in each place the word means the same thing.
SAME_THING = {
    "an operation, the same in FP8, and the module that calls it": {"attention", "experts", "linear"},
    "a command, and the module that does its work": {"certify", "merge", "plan", "plot", "preprocess", "simulate"},
}


def classes_named_twice(root: Path) -> dict[str, list[str]]:
    """Public classes and named types that more than one module defines, with these modules; inner classes count too."""
    modules: dict[str, set[str]] = defaultdict(set)
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # A class, or a type that has a name: `Steps = Generator[...]`.
            names = [node.name] if isinstance(node, ast.ClassDef) else [
                target.id for target in node.targets if isinstance(target, ast.Name) and not target.id.isupper()
                and target.id[0].isupper()] if isinstance(node, ast.Assign) else []
            for name in names:
                if not name.startswith("_"):
                    modules[name].add(path.relative_to(root).as_posix())
    return {name: sorted(places) for name, places in modules.items() if len(places) > 1}


def renamed_imports(root: Path) -> list[str]:
    """Classes of this library that a module knows under another name, as "file:line Name as Other"."""
    return [f"{path.relative_to(root)}:{node.lineno} {alias.name} as {alias.asname}"
            for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsv3_megatron")
            for alias in node.names if alias.asname and alias.name[0].isupper()]


def modules_named_twice(root: Path) -> dict[str, list[str]]:
    """Names that more than one module or room has, with these; `config/X.py` is of the same name as room X on purpose.

    The settings of a room are a module of `config/`, under the room's name.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if path.name == "__init__.py":
            places[path.parent.name].append(path.parent.relative_to(root).as_posix() + "/")
        elif path.name != "__main__.py":
            places[path.stem].append(name)
    for name, found in places.items():
        if any(place.endswith("/") for place in found):
            places[name] = [place for place in found if place != f"dsv3_megatron/config/{name}.py"]
    return {name: found for name, found in places.items() if len(found) > 1}


def test_a_module_name_is_used_once() -> None:
    assert modules_named_twice(ROOT).keys() - set().union(*SAME_THING.values()) == set()


def test_no_exception_outlives_its_names() -> None:
    assert set().union(*SAME_THING.values()) - modules_named_twice(ROOT).keys() == set()


def test_a_class_name_is_used_once() -> None:
    assert classes_named_twice(ROOT) == {}


def test_a_class_has_one_name_everywhere() -> None:
    assert renamed_imports(ROOT) == []


def test_planted_words_are_found(tmp_path: Path) -> None:
    for file, text in {"dsv3_megatron/ops/one.py": "class Plan:\n    class Inner: ...\nclass _Own: ...\n",
                       "kernels/two.py": "class Inner: ...\nclass _Own: ...\nclass Alone: ...\nPlan = int\nONE = 1\n",
                       "kernels/__init__.py": "", "kernels/ops.py": "", "dsv3_megatron/ops/__init__.py": "",
                       "dsv3_megatron/config/ops.py": "", "dsv3_megatron/data/one.py": "",
                       "dsv3_megatron/data/three.py": "from dsv3_megatron.ops.one import Plan as Order\n"}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert classes_named_twice(tmp_path) == {"Inner": ["dsv3_megatron/ops/one.py", "kernels/two.py"],
                                             "Plan": ["dsv3_megatron/ops/one.py", "kernels/two.py"]}
    assert renamed_imports(tmp_path) == ["dsv3_megatron/data/three.py:1 Plan as Order"]
    assert modules_named_twice(tmp_path) == {
        "one": ["dsv3_megatron/data/one.py", "dsv3_megatron/ops/one.py"],
        "ops": ["dsv3_megatron/ops/", "kernels/ops.py"]}
