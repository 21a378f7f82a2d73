"""A tokenizer with a chat template, conversations, and the command that makes masked tokens of them."""

import json
import shutil
from pathlib import Path

import pytest

from dsv3_megatron.commands.preprocess import main
from tests.unit.data.conftest import texts, tokenizer_dir

__all__ = ["texts", "tokenizer_dir"]  # fixtures

TEMPLATE = Path(__file__).resolve().parents[4] / "examples/chat_template.jinja"


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    return folder


def make_conversations(count: int) -> list[dict]:
    """Deterministic conversations of one to three turns, some with a system message, with characters outside ASCII."""
    words = "which token follows the order of 中文字 été — 👍🏽 reads\n\n(7);".split(" ")
    made = []
    for number in range(count):
        messages = [{"role": "system", "content": "Answer briefly."}] * (number % 3 == 0)
        for turn in range(1 + number % 3):
            pick = [words[(7 * number + 3 * turn + k * k) % len(words)] for k in range(2 + (5 * number + turn) % 11)]
            messages.append({"role": "user", "content": " ".join(pick) + "?"})
            messages.append({"role": "assistant", "content": " ".join(reversed(pick)) + " ."})
        made.append({"messages": messages})
    return made


@pytest.fixture
def prepare(tmp_path, chat_tokenizer, capsys):
    """Run `dsv3 preprocess --sft` on records, or on lines as they are; returns (status, stdout, stderr)."""

    def call(records, *options, prefix="out", model=chat_tokenizer):
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        file = tmp_path / "chat.jsonl"
        content = "".join(line + "\n" for line in lines).encode()
        if not file.exists() or file.read_bytes() != content:  # a resumed job's input is as old as it was
            file.write_bytes(content)
        command = ["--sft", "--input", file, "--tokenizer-model", model, "--output-prefix", tmp_path / prefix,
                   "--workers", 1, *options]
        status = main([str(part) for part in command])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
