"""Which tokenizer goes with a checkpoint, prompts read from files, and text that comes a token at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.checkpoint.layout import Progress, begin_save, finish_save
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import EOS_TOKEN, fingerprint, save_tokenizer, train_tokenizer
from dsv3_megatron.generation.text import TextCodec, TextStream, open_codec, read_prompts

TEXTS = ["the quick brown fox jumps over the lazy dog", "naïve café 東京タワー 🦊🦊 emoji", "def f(x):\n    return x\n"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers of different vocabularies, `one` and `other`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=300), folder / "one")
    save_tokenizer(train_tokenizer(TEXTS[:1], vocab_size=290), folder / "other")
    return folder


def write_run(folder: Path, **data: Any) -> str:
    """A checkpoint of `tiny` without tensors, of a run with these data settings."""
    begin_save(folder, 3)
    content = preset("tiny").override(**data).as_dict()
    finish_save(folder, Progress(3, 24, 24 * 256), content, versions={}, world_size=1, precision="fp32")
    return str(folder)


def write_data(prefix: Path, tokenizer: Path) -> str:
    with DatasetWriter(str(prefix), vocab_size=300, tokenizer_fingerprint=fingerprint(tokenizer)) as writer:
        writer.add_documents(np.arange(20), np.array([20]))
    return str(prefix)


class TestTokenizerOfACheckpoint:
    def test_of_a_run(self, tokenizers: Path, tmp_path: Path) -> None:
        load = write_run(tmp_path / "run", tokenizer_model=str(tokenizers / "one"))
        codec = open_codec(load, None, vocab_size=2048)
        assert codec.encode(TEXTS[0]) == TextCodec(tokenizers / "one").encode(TEXTS[0])
        assert codec.end_id == codec.tokenizer.token_to_id(EOS_TOKEN)

    def test_moved(self, tokenizers: Path, tmp_path: Path) -> None:
        load = write_run(tmp_path / "run", tokenizer_model=str(tmp_path / "gone"))
        with pytest.raises(ValueError, match="gone, which is not there any more; give where it is now, --tokenizer-"):
            open_codec(load, None, vocab_size=2048)
        assert open_codec(load, str(tokenizers / "one"), vocab_size=2048).num_ids == 300

    def test_not_named(self, tokenizers: Path, tmp_path: Path) -> None:
        load = write_run(tmp_path / "run")
        with pytest.raises(ValueError, match="does not say which tokenizer belongs to it; give it, --tokenizer-model"):
            open_codec(load, None, vocab_size=2048)

    def test_another_than_the_runs(self, tokenizers: Path, tmp_path: Path) -> None:
        load = write_run(tmp_path / "run", tokenizer_model=str(tokenizers / "one"))
        with pytest.raises(ValueError, match="is not this checkpoint's tokenizer: its fingerprint is .* of its run is"):
            open_codec(load, str(tokenizers / "other"), vocab_size=2048)

    def test_another_than_made_the_data(self, tokenizers: Path, tmp_path: Path) -> None:
        """The tokenizer in the run's folder has been replaced since."""
        shutil.copytree(tokenizers / "one", tmp_path / "tokenizer")
        data = write_data(tmp_path / "data", tmp_path / "tokenizer")
        load = write_run(tmp_path / "run", tokenizer_model=str(tmp_path / "tokenizer"), data_path=data)
        assert open_codec(load, None, vocab_size=2048).num_ids == 300
        shutil.rmtree(tmp_path / "tokenizer")
        shutil.copytree(tokenizers / "other", tmp_path / "tokenizer")
        with pytest.raises(ValueError, match=r"that of the data it was trained on \(.*data\) is"):
            open_codec(load, None, vocab_size=2048)

    def test_of_a_hugging_face_folder(self, tokenizers: Path, tmp_path: Path) -> None:
        shutil.copytree(tokenizers / "one", tmp_path / "hf")
        assert open_codec(str(tmp_path / "hf"), None, vocab_size=300, end_id=1).num_ids == 300
        with pytest.raises(ValueError, match="is not this checkpoint's tokenizer"):
            open_codec(str(tmp_path / "hf"), str(tokenizers / "other"), vocab_size=300)
        with pytest.raises(ValueError, match="ends a text with id 1, .*config.json says eos_token_id=2"):
            open_codec(str(tmp_path / "hf"), None, vocab_size=300, end_id=2)
        with pytest.raises(ValueError, match="has ids up to 299, the model has vocab_size=299"):
            open_codec(str(tmp_path / "hf"), None, vocab_size=299)

    def test_carried_by_a_converted_checkpoint(self, tokenizers: Path, tmp_path: Path) -> None:
        load = write_run(tmp_path / "run")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (tokenizers / "one" / name).read_text()
            if name == "tokenizer_config.json":
                content = json.dumps(json.loads(content) | {"add_bos_token": True})
            (tmp_path / "run" / "iter_0000003" / f"hf_file.{name}").write_text(content)
        codec = open_codec(load, None, vocab_size=300)
        assert codec.begin_id == 0 and codec.encode("fox")[0] == 0


class TestText:
    def test_a_text_that_begins_with_a_token(self, tokenizers: Path, tmp_path: Path) -> None:
        shutil.copytree(tokenizers / "one", tmp_path / "begins")
        settings = tmp_path / "begins" / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": True}))
        plain, begins = TextCodec(tokenizers / "one"), TextCodec(tmp_path / "begins")
        assert begins.encode("fox") == [0, *plain.encode("fox")]
        assert begins.encode("") == [], "an empty prompt stays one"

    @pytest.mark.parametrize("text", [*TEXTS, "  spaces  ", "ünïcödé 🦊" * 3])
    def test_pieces_are_the_text(self, tokenizers: Path, text: str) -> None:
        codec = TextCodec(tokenizers / "other")  # has merges of the first text alone: characters take several tokens
        ids = codec.encode(text)
        stream = TextStream(codec, codec.encode("fox "))
        pieces = [stream.add([token], is_last=position == len(ids) - 1) for position, token in enumerate(ids)]
        assert "".join(pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)

    def test_a_character_that_is_never_whole_comes_at_the_end(self, tokenizers: Path) -> None:
        codec = TextCodec(tokenizers / "other")
        stream = TextStream(codec, [])
        assert stream.add(codec.encode("a🦊")[:2]) == ""
        assert stream.add([], is_last=True).startswith("a\N{REPLACEMENT CHARACTER}")


class TestPrompts:
    def test_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "p.jsonl"
        file.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "東京", "id": 7}\n', encoding="utf-8")
        assert read_prompts(file) == ["a\nb", "東京"]

    @pytest.mark.parametrize("content, message", [
        (b'{"prompt": "a"}\n{"prompt"\n', "p.jsonl:2: not a line of JSON in UTF-8"),
        (b'{"prompt": "a"}\n\n{"text": "a"}\n', "p.jsonl:3: each line must be an object with a text"),
        (b'["a"]\n', "p.jsonl:1: each line must be an object"), (b'{"prompt": 1}\n', "p.jsonl:1: each line must be"),
        (b'{"prompt": "\xff"}\n', "p.jsonl:1: not a line of JSON in UTF-8"), (b"\n", "p.jsonl has no prompt"),
        (None, "p.jsonl cannot be read: No such file or directory"),
    ])
    def test_what_is_no_prompt(self, content: bytes | None, message: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "p.jsonl").write_bytes(content)
        with pytest.raises(ValueError) as error:
            read_prompts(tmp_path / "p.jsonl")
        assert message in str(error.value)
