"""Small text, one small tokenizer and one small dataset, shared by the data tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_megatron.data.tokenizer import save_tokenizer, train_tokenizer


def make_texts(num_documents: int = 60) -> list[str]:
    """Deterministic texts with words, numbers, punctuation + line breaks, and characters outside ASCII."""
    words = "the model reads tokens and learns which one follows when order depends on hash 中文字 été".split()
    return [
        "\n".join(
            " ".join(words[(7 * line + 3 * document + k * k) % len(words)] for k in range(9)) + f" ({line * 1237});"
            for line in range(3 + document % 5)
        )
        + "\n\n"
        for document in range(num_documents)
    ]


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[..., Path]:
    def write(path: Path, texts: list[str], key: str = "text") -> Path:
        lines = [json.dumps({key: text}, ensure_ascii=False) for text in texts]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts, vocab_size=340), folder)
    return folder


@pytest.fixture
def jsonl_file(tmp_path: Path, texts: list[str], write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(tmp_path / "train.jsonl", texts)
