"""The tests of each module are where one looks: under its own name, or where tests/README.md says, with a reason.

Imports are followed from a test, through its conftest.py, other tests, tools and the library, and so are commands that
a test names as text ("tools/plan_run.py", or "dsv3_megatron" and "train").
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from tests.unit.test_architecture import modules_of

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "tests/README.md").read_text(encoding="utf-8")
LAUNCHERS = {"pretrain_dsv3.sh": "dsv3_megatron/commands/train.py"}


def modules(root: Path) -> list[str]:
    """The library's modules as the README names them, packages' own files left out."""
    return [path.relative_to(root if path.is_relative_to(root / "kernels") else root / "dsv3_megatron").as_posix()
            for path in modules_of(root).values() if path.name != "__init__.py"]


def has_own_test(root: Path, module: str) -> bool:
    path = Path(module)
    return (root / "tests/unit" / path.parent / f"test_{path.name}").exists()


def listed(readme: str) -> list[tuple[list[str], list[str]]]:
    """Modules and tests of each row of the README's table."""
    rows = re.findall(r"^\| (`.+) \| (`.+) \| .+ \|$", readme[readme.index("| Modules | Tests |"):], re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", names), re.findall(r"`([^`]+)`", tests)) for names, tests in rows]


def misplaced(root: Path, readme: str) -> list[str]:
    """Modules whose tests nobody would find, and lines of the list that are wrong."""
    known = modules(root)
    named = [module for names, _ in listed(readme) for module in names]
    wrong = [f"{module}: no tests/unit/.../test_{Path(module).name}, and no line in tests/README.md"
             for module in known if not has_own_test(root, module) and module not in named]
    wrong += [f"{module}: listed twice" for module in sorted(set(named)) if named.count(module) > 1]
    wrong += [f"{module}: listed, and there is no such module" for module in named if module not in known]
    wrong += [f"{module}: listed, and it has a test of its own name" for module in named if has_own_test(root, module)]
    return wrong


@functools.cache
def files_named(path: Path) -> frozenset[Path]:
    """Files of this repository that a file imports, or names as a command."""
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"\b(?:dsv3_megatron|tests|tools)(?:\.\w+)+", text)
    for package, inside in re.findall(r"^\s*from ((?:dsv3_megatron|tests|tools)[\w.]*) import \(?([\w\s,]+)", text,
                                      re.MULTILINE):
        names += [f"{package}.{name}" for name in re.findall(r"\w+", inside)]
    names += [f"dsv3_megatron.commands.{name.replace('-', '_')}" for name in
              re.findall(r'"dsv3_megatron", "([a-z-]+)"|run_named\("([a-z-]+)"\)', text) for name in name if name]
    found = {ROOT / "dsv3_megatron/__main__.py"} if '"dsv3_megatron", ' in text else set()
    found |= {ROOT / file for launcher, file in LAUNCHERS.items() if launcher in text}
    found |= {ROOT / file for file in re.findall(r"tools/\w+\.py", text)} | {path.parent / "conftest.py"}
    for name in names:
        file = re.sub(r"^dsv3_megatron/kernels", "kernels", name.replace(".", "/"))
        found |= {ROOT / f"{file}.py", ROOT / file / "__init__.py"}
    return frozenset(file for file in found if file.is_file())


@functools.cache
def reached(test: Path) -> frozenset[Path]:
    """Every file that a test reaches."""
    seen, waiting = {test}, [test]
    while waiting:
        new = files_named(waiting.pop()) - seen
        seen |= new
        waiting += new
    return frozenset(seen)


def test_each_module_has_its_tests_where_one_looks() -> None:
    assert misplaced(ROOT, README) == []


def test_the_tests_that_are_named_reach_the_modules() -> None:
    wrong = []
    for names, tests in listed(README):
        assert all((ROOT / test).is_file() for test in tests), tests
        files = frozenset().union(*(reached(ROOT / test) for test in tests))
        wrong += [f"{name} from {tests}" for name in names if not {ROOT / name, ROOT / "dsv3_megatron" / name} & files]
    assert wrong == []


def test_planted_faults_are_found(tmp_path: Path) -> None:
    for file in ("dsv3_megatron/ops/tested.py", "dsv3_megatron/ops/hidden.py", "kernels/fast.py",
                 "tests/unit/ops/test_tested.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    head = "| Modules | Tests | Why there |\n|---|---|---|\n"
    good = head + "| `ops/hidden.py`, `kernels/fast.py` | `tests/unit/ops/test_tested.py` | A reason. |\n"
    assert misplaced(tmp_path, good) == []
    assert misplaced(tmp_path, good.replace("`ops/hidden.py`, ", "")) == [
        "ops/hidden.py: no tests/unit/.../test_hidden.py, and no line in tests/README.md"]
    assert misplaced(tmp_path, good + "| `kernels/fast.py` | `tests/unit/x.py` | Twice. |\n") == [
        "kernels/fast.py: listed twice"]
    assert misplaced(tmp_path, good.replace("`kernels/", "`ops/gone.py`, `kernels/")) == [
        "ops/gone.py: listed, and there is no such module"]
    assert misplaced(tmp_path, good.replace("`kernels/", "`ops/tested.py`, `kernels/")) == [
        "ops/tested.py: listed, and it has a test of its own name"]
