"""Commands of tools/ as modules, and the data tests' tokenizer and texts."""

import importlib.util
from pathlib import Path

import pytest

from tests.unit.data.conftest import jsonl_file, texts, tokenizer_dir, write_jsonl

__all__ = ["jsonl_file", "texts", "tokenizer_dir", "write_jsonl"]  # fixtures

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def preprocess_tool():
    return load_tool("preprocess_data")


@pytest.fixture
def preprocess(preprocess_tool, tokenizer_dir, tmp_path, capsys):
    """Run tools/preprocess_data.py with the tests' tokenizer; returns (status, stdout, stderr)."""

    def call(*inputs, prefix="out", model=tokenizer_dir, options=()):
        command = [
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            model,
            "--output-prefix",
            tmp_path / prefix,
            "--workers",
            1,
            *options,
            "--input",
            *inputs,
        ]
        status = preprocess_tool.main([str(part) for part in command])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
