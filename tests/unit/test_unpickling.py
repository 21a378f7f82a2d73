"""No module but one unpickles, nor has another library do so: found by AST, whatever the import is called.

Tests may: they read what they wrote themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_architecture import ROOT, imports_of

ALLOWED = "dsv3_megatron/process/unpickling.py"
# What unpickles a file: functions and classes of modules that do so by default or on demand.
READERS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "torch.load", "joblib.load",
    "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "shelve.open", "marshal.load", "marshal.loads",
    "pandas.read_pickle", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load",
    "torch.distributed.checkpoint.load", "torch.distributed.checkpoint.load_state_dict",
    "megatron.core.dist_checkpointing.load_common_state_dict", "megatron.core.dist_checkpointing.load_plain_tensors",
}
# Of these the reader is replaced while they run, or they are the base of one that reads otherwise.
READ_OTHERWISE = {
    "dsv3_megatron/checkpoint/proved_files.py": {"torch.distributed.checkpoint.FileSystemReader",
                                            "megatron.core.dist_checkpointing.load"},
}
READERS |= {name for names in READ_OTHERWISE.values() for name in names}


def sources(root: Path) -> Iterator[Path]:
    for folder in ("dsv3_megatron", "kernels", "tools"):
        yield from sorted((root / folder).rglob("*.py"))


def unpickling(root: Path) -> list[str]:
    """Uses of a reader outside the one module, as "file:line name"."""
    found = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        if name == ALLOWED:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    known[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else \
                        alias.name.partition(".")[0]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute | ast.Name):
                continue
            first, _, rest = ast.unparse(node).partition(".")
            full = known.get(first, "") + (f".{rest}" if rest else "")
            if full in READERS and full not in READ_OTHERWISE.get(name, ()):
                found.append(f"{name}:{node.lineno} {full}")
            if full == "numpy.load" and _allows_pickles(tree, node):
                found.append(f"{name}:{node.lineno} {full}")
    return found


def _allows_pickles(tree: ast.Module, function: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.func is function:
            return any(keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
                       for keyword in node.keywords)
    return True


def test_one_module_unpickles() -> None:
    assert unpickling(ROOT) == []


@pytest.mark.parametrize(("text", "reported"), [
    ("import pickle\npickle.loads(b'')", "2 pickle.loads"),
    ("import pickle as p\ndef f():\n    return p.load(1)", "3 pickle.load"),
    ("from pickle import Unpickler as U\nclass A(U): ...", "2 pickle.Unpickler"),
    ("import torch\ntorch.load('x', weights_only=True)", "2 torch.load"),
    ("from torch import load\nload('x')", "2 torch.load"),
    ("from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader('x')",
     "2 torch.distributed.checkpoint.FileSystemReader"),
    ("from megatron.core import dist_checkpointing as d\nd.load({}, 'x')", "2 megatron.core.dist_checkpointing.load"),
    ("import numpy as np\nnp.load('x', allow_pickle=True)", "2 numpy.load"),
])
def test_a_planted_reader_is_found(text: str, reported: str, tmp_path: Path) -> None:
    file = tmp_path / "dsv3_megatron" / "data" / "extra.py"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert unpickling(tmp_path) == [f"dsv3_megatron/data/extra.py:{reported}"]
    assert list(imports_of("data.extra", file))
