"""The data tests' tokenizer and texts, and the command that makes tokens of them."""

from pathlib import Path

import pytest

from dsv3_megatron.commands.preprocess import main
from tests.unit.data.conftest import jsonl_file, texts, tokenizer_dir, write_jsonl

__all__ = ["jsonl_file", "texts", "tokenizer_dir", "write_jsonl"]  # fixtures

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture
def preprocess(tokenizer_dir, tmp_path, capsys):
    """Run `dsv3 preprocess` with the tests' tokenizer; returns (status, stdout, stderr)."""

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
        status = main([str(part) for part in command])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
