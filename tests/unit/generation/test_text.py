"""Which tokenizer goes with a checkpoint, prompts read from files, and text that comes a token at a time."""

from __future__ import annotations

import codecs
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.checkpoint.folder import RunProgress, begin_save, finish_save
from dsv3_megatron.checkpoint.text_files import collect_text_files
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.folder_checksums import CHECKSUMS
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import BOS_TOKEN, EOS_TOKEN, fingerprint, save_tokenizer, train_tokenizer
from dsv3_megatron.generation.text import TextCodec, TextStream, check_text, open_codec, read_prompts

TEXTS = ["the quick brown fox jumps over the lazy dog", "naïve café 東京タワー 🦊🦊 emoji", "def f(x):\n    return x\n"]

# A post-processor that puts V3's begin token, id 0, before every text.
BEGINS = {"post_processor": {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": BOS_TOKEN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BOS_TOKEN: {"id": BOS_TOKEN, "ids": [0], "tokens": [BOS_TOKEN]}}}}


def begin_texts(folder: Path) -> None:
    """Change a tokenizer on purpose: its texts begin with a token, and its checksums are gone."""
    content = folder / "tokenizer.json"
    content.write_text(json.dumps(json.loads(content.read_text()) | BEGINS))
    (folder / CHECKSUMS).unlink()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers of different vocabularies, `one` and `other`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=300), folder / "one")
    save_tokenizer(train_tokenizer(TEXTS[:1], vocab_size=290), folder / "other")
    return folder


def write_run(folder: Path, **data: Any) -> str:
    """A checkpoint of `tiny` without tensors, of a run with these data settings."""
    (begin_save(folder, 3) / "__0_0.distcp").write_text("tensors")
    content = preset("tiny").override(**data).as_dict()
    finish_save(folder, RunProgress(3, 24, 24 * 256), content, versions={}, world_size=1, precision="fp32")
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
        assert codec.stop_ids == (codec.tokenizer.token_to_id(EOS_TOKEN),)

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
        assert open_codec(str(tmp_path / "hf"), None, vocab_size=300).num_ids == 300
        with pytest.raises(ValueError, match="is not this checkpoint's tokenizer"):
            open_codec(str(tmp_path / "hf"), str(tokenizers / "other"), vocab_size=300)
        with pytest.raises(ValueError, match="has ids up to 299, the model has vocab_size=299"):
            open_codec(str(tmp_path / "hf"), None, vocab_size=299)

    def test_carried_by_a_converted_checkpoint(self, tokenizers: Path, tmp_path: Path) -> None:
        load = write_run(tmp_path / "run")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (tokenizers / "one" / name).read_text()
            if name == "tokenizer.json":
                content = json.dumps(json.loads(content) | BEGINS)
            (tmp_path / "run" / "iter_0000003" / f"hf_file.{name}").write_text(content)
        codec = open_codec(load, None, vocab_size=300)
        assert codec.begin_ids == (0,) and codec.encode("fox")[0] == 0

    def test_moved_with_its_tokenizer(self, tokenizers: Path, tmp_path: Path) -> None:
        """A run's checkpoint has its tokenizer's files; the folder that the run took them from is gone."""
        shutil.copytree(tokenizers / "one", tmp_path / "tokenizer")
        run = preset("tiny").override(tokenizer_model=str(tmp_path / "tokenizer"))
        files = collect_text_files(run)
        load = write_run(tmp_path / "run", tokenizer_model=str(tmp_path / "tokenizer"))
        files.write(tmp_path / "run" / "iter_0000003")
        shutil.rmtree(tmp_path / "tokenizer")
        moved = str((tmp_path / "run").rename(tmp_path / "moved"))
        assert load != moved and open_codec(moved, None, vocab_size=2048).num_ids == 300

    @pytest.mark.parametrize("config, generation, stops", [
        ({"eos_token_id": [1, 7]}, None, (1, 7)), ({"eos_token_id": 1}, {"eos_token_id": [1, 9]}, (1, 9)),
        ({"eos_token_id": 7}, None, (7,)), ({}, None, (1,)), ({}, {}, ()),
    ])
    def test_a_hugging_face_folder_says_where_a_text_ends(self, config: dict[str, Any], generation: Any, stops: Any,
                                                           tokenizers: Path, tmp_path: Path) -> None:
        shutil.copytree(tokenizers / "one", tmp_path / "hf")
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
        assert open_codec(str(tmp_path / "hf"), None, vocab_size=300).stop_ids == stops

    def test_a_given_tokenizer_that_ends_otherwise(self, tokenizers: Path, tmp_path: Path) -> None:
        """A folder without a tokenizer: only its end token tells whether the one that was given is the model's."""
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "config.json").write_text('{"eos_token_id": 2}')
        with pytest.raises(ValueError, match="ends a text with id 1, .*config.json says eos_token_id=2"):
            open_codec(str(tmp_path / "hf"), str(tokenizers / "one"), vocab_size=300)

    @pytest.mark.parametrize("begin_ids", [(), (0,), (0, 2)])
    def test_a_prompt_begins_as_the_training_texts_did(self, begin_ids: tuple[int, ...], tokenizers: Path,
                                                       tmp_path: Path) -> None:
        """Whatever the tokenizer's own post-processor would put there."""
        shutil.copytree(tokenizers / "one", tmp_path / "begins")
        begin_texts(tmp_path / "begins")
        with DatasetWriter(str(tmp_path / "data"), vocab_size=300, options={"begin_ids": list(begin_ids)},
                           tokenizer_fingerprint=fingerprint(tmp_path / "begins")) as writer:
            writer.add_documents(np.arange(20), np.array([20]))
        data = {"tokenizer_model": str(tmp_path / "begins"), "data_path": str(tmp_path / "data")}
        plain = TextCodec(tokenizers / "one").encode("fox")
        load = write_run(tmp_path / "run", **data)
        assert open_codec(load, None, vocab_size=300).encode("fox") == [*begin_ids, *plain], "the sidecar says it"
        collect_text_files(preset("tiny").override(**data)).write(tmp_path / "run" / "iter_0000003")
        for file in tmp_path.glob("data.*"):
            file.unlink()
        assert open_codec(load, None, vocab_size=300).encode("fox") == [*begin_ids, *plain], "the checkpoint says it"


class TestText:
    def test_a_text_that_begins_with_a_token(self, tokenizers: Path, tmp_path: Path) -> None:
        shutil.copytree(tokenizers / "one", tmp_path / "begins")
        begin_texts(tmp_path / "begins")
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
    def test_a_byte_order_mark_is_passed_over(self, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"prompt": "a"}\n')
        assert read_prompts(tmp_path / "p.jsonl") == ["a"]

    def test_standard_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{"prompt": 1}\n')))
        with pytest.raises(ValueError, match="standard input:2: each line must be an object"):
            read_prompts("-")

    @pytest.mark.parametrize("text, what", [
        ("a\udcff", "character 1 of the prompt is the byte 0xff, which is no UTF-8"),
        ("\udfff", "character 0 of the prompt is the lone surrogate U\\+DFFF, which is no character")])
    def test_a_prompt_that_no_encoding_has(self, text: str, what: str) -> None:
        check_text("🦊 é", "--prompt")
        with pytest.raises(ValueError, match=f"--prompt: {what}"):
            check_text(text, "--prompt")

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
        (b'{"prompt": "a"}\n{"prompt": "a\\ud800b"}\n',
         "p.jsonl:2: character 1 of the prompt is the lone surrogate U+D800"),
    ])
    def test_what_is_no_prompt(self, content: bytes | None, message: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "p.jsonl").write_bytes(content)
        with pytest.raises(ValueError) as error:
            read_prompts(tmp_path / "p.jsonl")
        assert message in str(error.value)
