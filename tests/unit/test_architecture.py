"""The repository's own rules: who may import whom, what files are called, how long they are, what is committed.

Imports are read by AST, those inside functions too. Each rule is also shown to fail on a planted violation.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dsv3_megatron"
MAX_LINES = 450

# Left never imports right; those on one level do not import each other. Kernels' references live in ops.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("config",), ("process",), ("platform",), ("kernels",), ("ops",), ("data",), ("parallel",), ("model",),
    ("schedule",), ("optim",), ("checkpoint", "metrics"), ("generation", "reports"), ("planning",), ("guards",),
    ("runs",), ("post_training",), ("rehearsal",), ("certification",), ("papers",), ("commands",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# The only modules beside the packages above; they may import every stage.
ENTRY_MODULES = {"__main__"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
STAND_IN_NAMES = {"STAND_INS", "StandIn", "CpuStream", "CpuEvent", "install_stand_ins", "remove_stand_ins"}


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted names below the package and their files; `kernels/` is installed as one of its packages."""
    found = {}
    for folder, prefix in ((root / PACKAGE, ""), (root / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix("__init__").rstrip(".")] = path
    return found


def imports_of(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a module imports, wherever in it and however it is written."""
    package = f"{PACKAGE}.{name}" if path.name == "__init__.py" else f"{PACKAGE}.{name}".rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.rstrip(".").split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"
        elif (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args
              and isinstance(node.args[0], ast.Constant)):
            yield node.lineno, str(node.args[0].value)


def wrong_imports(root: Path) -> list[str]:
    """Imports against the order, as "module:line imports name"."""
    wrong = []
    for name, path in modules_of(root).items():
        own = name.partition(".")[0]
        if not own or own in ENTRY_MODULES:  # the package's own files
            continue
        for line, imported in imports_of(name, path):
            top, _, rest = imported.partition(".")
            other = rest.partition(".")[0]
            if own == "config" and top in ("torch", "megatron"):
                wrong.append(f"{name}:{line} imports {imported}")
            if top == PACKAGE and other in LEVEL and other != own and LEVEL[other] >= LEVEL[own]:
                wrong.append(f"{name}:{line} imports {imported}")
    return wrong


def test_imports_follow_the_order() -> None:
    assert wrong_imports(ROOT) == []


def test_every_package_has_a_place_in_the_order() -> None:
    tops = {name.partition(".")[0] for name in modules_of(ROOT)} - {""} - ENTRY_MODULES
    assert tops <= set(LEVEL), "give the new package its place in LEVELS"
    alone = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    assert alone <= ENTRY_MODULES


@pytest.mark.parametrize(("name", "line", "reported"), [
    ("config/extra.py", "import torch", "config.extra:1 imports torch"),
    ("config/extra.py", "def f():\n    from megatron.core import parallel_state",
     "config.extra:2 imports megatron.core.parallel_state"),
    ("config/extra.py", "from dsv3_megatron import platform", "config.extra:1 imports dsv3_megatron.platform"),
    ("process/extra.py", "from dsv3_megatron.platform import prepare",
     "process.extra:1 imports dsv3_megatron.platform.prepare"),
    ("platform/extra.py", "from ..ops.rope import apply_rope",
     "platform.extra:1 imports dsv3_megatron.ops.rope.apply_rope"),
    ("platform/__init__.py", "from .. import ops", "platform:1 imports dsv3_megatron.ops"),
    ("data/extra.py", "def f():\n    def g():\n        import dsv3_megatron.model.build",
     "data.extra:3 imports dsv3_megatron.model.build"),
    ("model/extra.py", "import importlib\nimportlib.import_module('dsv3_megatron.optim.lr')",
     "model.extra:2 imports dsv3_megatron.optim.lr"),
    ("metrics/extra.py", "from dsv3_megatron.checkpoint.store import save_checkpoint",
     "metrics.extra:1 imports dsv3_megatron.checkpoint.store.save_checkpoint"),
    ("checkpoint/extra.py", "from dsv3_megatron import metrics", "checkpoint.extra:1 imports dsv3_megatron.metrics"),
    ("optim/extra.py", "from dsv3_megatron.runs.trainer import Trainer",
     "optim.extra:1 imports dsv3_megatron.runs.trainer.Trainer"),
    ("runs/extra.py", "from dsv3_megatron.commands.train import main",
     "runs.extra:1 imports dsv3_megatron.commands.train.main"),
    ("generation/extra.py", "from dsv3_megatron.commands.evaluate import check_request",
     "generation.extra:1 imports dsv3_megatron.commands.evaluate.check_request"),
    ("checkpoint/extra.py", "from dsv3_megatron.generation.text import TextCodec",
     "checkpoint.extra:1 imports dsv3_megatron.generation.text.TextCodec"),
    ("../kernels/extra.py", "from dsv3_megatron.ops import rope", "kernels.extra:1 imports dsv3_megatron.ops.rope"),
])
def test_a_planted_import_is_found(name: str, line: str, reported: str, tmp_path: Path) -> None:
    for package in LEVEL:
        (tmp_path / PACKAGE / package).mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / PACKAGE / "__main__.py").write_text("from dsv3_megatron import config, commands, metrics, checkpoint\n")
    assert wrong_imports(tmp_path) == []
    (tmp_path / PACKAGE / name).write_text(line + "\n")
    assert wrong_imports(tmp_path) == [reported]


# -- no circle between modules --------------------------------------------------------------------------


def circles(root: Path) -> list[list[str]]:
    """Modules that import each other in a circle, inside functions and for type checkers too; each circle sorted."""
    modules = modules_of(root)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = {found.removeprefix(f"{PACKAGE}.") for _, found in imports_of(name, path)
                    if found.startswith(f"{PACKAGE}.")}
        owners = {owner if owner in modules else owner.rpartition(".")[0] for owner in imported}
        graph[name] = (owners & set(modules)) - {name}
    reached = {name: _reached_from(name, graph) for name in graph}
    found = {tuple(sorted({other for other in reached[name] if name in reached[other]})) for name in graph}
    return sorted(list(circle) for circle in found if circle)


def _reached_from(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Everything that a module imports, through others too; itself only where it lies on a circle."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(ROOT) == []


@pytest.mark.parametrize("line", [
    "from dsv3_megatron.config.a import x", "from dsv3_megatron.config import a", "from . import a",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dsv3_megatron.config.a import A",
    "def f():\n    import dsv3_megatron.config.a",
])
def test_a_planted_circle_is_found(line: str, tmp_path: Path) -> None:
    folder = tmp_path / PACKAGE / "config"
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("a", "from dsv3_megatron.config.b import y\n"),
                       ("b", "from dsv3_megatron.config.c import z\n"), ("c", ""),
                       ("beside", "from dsv3_megatron.config import a\n")):
        (folder / f"{name}.py").write_text(text)
    assert circles(tmp_path) == []
    (folder / "c.py").write_text(line + "\n")
    assert circles(tmp_path) == [["config.a", "config.b", "config.c"]]


# -- stand-ins stay in platform/ -----------------------------------------------------------------------


def stand_ins_named(path: Path) -> list[str]:
    """Where a file names a stand-in, or sets an attribute of torch or Megatron-Core as one would."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None)}
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if names & STAND_IN_NAMES or module.startswith(f"{PACKAGE}.platform.cpu"):
            found.append(f"{path.name}:{node.lineno}")
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], "", ast.Store())]
        for target in targets:
            if isinstance(target, ast.Attribute) and re.match(r"(torch|megatron)(\.|$)", ast.unparse(target.value)) \
                    and not ast.unparse(target).startswith("torch.backends."):
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_nothing_outside_platform_names_a_stand_in() -> None:
    # A rehearsal's own table of what it replaces, in its own processes, is the one other place.
    files = [path for name, path in modules_of(ROOT).items()
             if name.partition(".")[0] != "platform" and name != "rehearsal.stand_ins"]
    files += sorted((ROOT / "tools").rglob("*.py"))
    assert [found for path in files for found in stand_ins_named(path)] == []


@pytest.mark.parametrize("line", [
    "from dsv3_megatron.platform.cpu import install_stand_ins", "from dsv3_megatron.platform.cpu import installed",
    "import torch\ntorch.cuda.synchronize = print", "import torch\nsetattr(torch.Tensor, 'cuda', lambda t: t)",
    "import megatron.core\nmegatron.core.utils.f = None", "stream = platform.cpu.CpuStream()",
])
def test_a_planted_stand_in_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(line + "\n")
    assert stand_ins_named(tmp_path / "planted.py")


# -- files ---------------------------------------------------------------------------------------------


def committed_files() -> list[Path]:
    """What is or would be committed."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           capture_output=True, text=True, check=True, timeout=60).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [str(path) for path in committed_files() if path.stem in VAGUE_NAMES] == []


def test_no_module_is_ignored_by_git() -> None:
    """A rule of .gitignore for outputs, such as "runs/" without a slash in front, would also hide a room."""
    committed = set(committed_files())
    assert [name for name, path in modules_of(ROOT).items() if path not in committed] == []


def test_modules_stay_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules_of(ROOT).items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_says_what_it_is() -> None:
    assert [name for name, path in modules_of(ROOT).items()
            if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


# Folders of one machine or one user; a slash is kept apart so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.$}/])" + "/" + r"(?:work|root|Users/\w+|home/\w+|mnt/\w+|scratch/\w+)" + r"/[\w.]")


def machine_paths(text: str) -> list[str]:
    """Lines with a path that exists on somebody's machine only."""
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_no_committed_file_contains_a_path_of_a_machine() -> None:
    found = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image or another binary
        found += [f"{path.relative_to(ROOT)}: {line}" for line in machine_paths(text)]
    assert found == []


@pytest.mark.parametrize("path", ["work/main/x", "home/someone/run", "Users/me/data", "root/.cache/y"])
def test_a_planted_path_is_found(path: str) -> None:
    assert machine_paths(f'open("/{path}")') and machine_paths(f"cd /{path}")
    assert not machine_paths(f"$HOME/{path} and https://host/{path} and ../{path}")
