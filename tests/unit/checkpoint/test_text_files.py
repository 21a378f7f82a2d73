"""The tokenizer, the ends of a text and its begin in a run's checkpoints, whatever the run was started with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.checkpoint.hf.side_files import special_ids
from dsv3_megatron.checkpoint.text_files import collect_text_files, read_form, stop_ids_of_checkpoint
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.text_form import TextForm
from tests.unit.data.test_special_tokens import write_tokenizer
from tests.unit.generation.test_text import write_run


def collect(**changes: Any) -> dict[str, bytes]:
    return dict(collect_text_files(preset("tiny").override(**changes)).content)


def write_converted(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    """A checkpoint as converted from a Hugging Face folder, without tensors; its folder."""
    write_run(folder)
    inside = folder / "iter_0000003"
    write_tokenizer(inside, "<bos> $A", {"eos_token": "<eos>"}, prefix="hf_file.")
    (inside / "hf_file.README.md").write_text("of the source")
    (inside / "hf_file.chat_template.jinja").write_text("{{ messages }}")
    (inside / "hf_source.json").write_text(json.dumps({"config": json.dumps(config)}))
    if generation is not None:
        (inside / "hf_file.generation_config.json").write_text(json.dumps(generation))
    return inside


def test_of_a_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t", None, {"eos_token": "<eos>"}, {"eos_token": "<turn>"})
    for name in ("chat_template.jinja", "README.md", "config.json", "generation_config.json", "model.bin"):
        (tmp_path / "t" / name).write_text("{}")
    names = {"hf_file.tokenizer.json", "hf_file.tokenizer_config.json", "hf_file.special_tokens_map.json",
             "hf_file.chat_template.jinja"}
    assert collect(tokenizer_model=str(tmp_path / "t")).keys() == names


def test_a_relative_path_is_read_when_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path / "here" / "t", None, {})
    monkeypatch.chdir(tmp_path / "here")
    content = collect(tokenizer_model="t")
    os.chdir(tmp_path)
    assert content["hf_file.tokenizer.json"] == (tmp_path / "here" / "t" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("generation, ids", [({"eos_token_id": [1, 3], "temperature": 0.6}, [1, 3]), (None, [1, 2])])
def test_of_the_checkpoint_that_a_run_begins_with(generation: dict[str, Any] | None, ids: list[int], tmp_path: Path
                                                  ) -> None:
    """Nobody names the tokenizer; where the source had no generation settings, its config.json said the ends."""
    inside = write_converted(tmp_path / "ours", {"eos_token_id": [1, 2], "bos_token_id": 0}, generation)
    content = collect(load=str(tmp_path / "ours"))
    assert content.keys() == {f"hf_file.{name}" for name in (
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")}
    settings = json.loads(content["hf_file.generation_config.json"])
    assert settings["eos_token_id"] == ids and settings.get("temperature") == (generation or {}).get("temperature")
    assert content["hf_file.tokenizer.json"] == (inside / "hf_file.tokenizer.json").read_bytes()
    assert stop_ids_of_checkpoint(inside) == ((1, 3, 2) if generation else (1, 2))


def test_another_tokenizer_takes_the_place_of_all_of_it(tmp_path: Path) -> None:
    write_converted(tmp_path / "ours", {"eos_token_id": 1}, {"eos_token_id": 1})
    same = write_tokenizer(tmp_path / "same", "<bos> $A", {"eos_token": "<eos>"})
    write_tokenizer(tmp_path / "other", None, {"eos_token": "<turn>"})
    assert "hf_file.generation_config.json" in collect(load=str(tmp_path / "ours"), tokenizer_model=str(same.parent))
    other = collect(load=str(tmp_path / "ours"), tokenizer_model=str(tmp_path / "other"))
    assert other.keys() == {"hf_file.tokenizer.json", "hf_file.tokenizer_config.json"}
    assert json.loads(other["hf_file.tokenizer_config.json"])["eos_token"] == "<turn>"


def test_nothing_to_keep(tmp_path: Path) -> None:
    assert collect() == {} and collect(load=str(tmp_path)) == {} and collect(tokenizer_model=str(tmp_path)) == {}


def test_form(tmp_path: Path) -> None:
    assert read_form(tmp_path) is None
    (tmp_path / "text_form.json").write_text('{"begin_ids": [0], "end_ids": []}')
    assert read_form(tmp_path) == TextForm((0,), ())
    (tmp_path / "text_form.json").write_text('{"begin_ids": 0}')
    with pytest.raises(ValueError, match="text_form.json is damaged"):
        read_form(tmp_path)


@pytest.mark.parametrize("settings, tokens_map, ids", [
    ({"eos_token": "<turn>", "bos_token": "<bos>"}, None, (0, 3, None)), ({}, {"eos_token": "<eos>"}, (None, 1, None)),
    ({"eos_token": "<eos>", "pad_token": "<pad>"}, None, (None, 1, 2))])
def test_an_export_names_the_tokenizers_own_tokens(settings: Any, tokens_map: Any, ids: Any, tmp_path: Path) -> None:
    """Not only those that have V3's names."""
    file = write_tokenizer(tmp_path, None, settings, tokens_map, prefix="hf_file.")
    found = special_ids({"tokenizer.json": file})
    assert (found.bos_id, found.eos_id, found.pad_id) == ids
    assert special_ids({}).eos_id is None
