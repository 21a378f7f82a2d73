"""Special ids as Transformers' AutoTokenizer reads them, and the ends of a text as its `generate` takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dsv3_megatron.data.special_tokens import SpecialTokens, read_special_tokens, read_stop_ids, special_token_names
from dsv3_megatron.data.tokenizer import find_eod_id, load_tokenizer

TOKENS = ["<bos>", "<eos>", "<pad>", "<turn>"]
TEXT = "ab ba"


def write_tokenizer(folder: Path, template: str | None, settings: dict[str, Any] | None,
                    tokens_map: dict[str, Any] | None = None, prefix: str = "") -> Path:
    """A byte-level tokenizer with four special tokens, ids 0 to 3; its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(TOKENS)
    tokenizer.add_tokens(["a", "b", "Ġ"])
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, number) for number, token in enumerate(TOKENS)])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{prefix}tokenizer.json"
    tokenizer.save(str(file))
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", tokens_map)):
        if content is not None:
            (folder / f"{prefix}{name}").write_text(json.dumps(content))
    return file


CASES = {
    "plain": (None, {"eos_token": "<eos>"}, None),
    "begins": ("<bos> $A", {"bos_token": "<bos>", "eos_token": "<eos>"}, None),
    "begins and ends": ("<bos> $A <eos>", {"bos_token": "<bos>", "eos_token": "<eos>"}, None),
    "begins with two": ("<bos> <turn> $A", {"eos_token": "<turn>"}, None),
    # Only Transformers 4's Llama classes follow these two; from 5.0 on the post-processor alone decides.
    "flags": (None, {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True, "add_eos_token": True}, None),
    "flags off": ("<bos> $A", {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": False}, None),
    "in the map": ("<bos> $A", {}, {"eos_token": "<turn>", "pad_token": {"content": "<pad>"}}),
    "the map wins": (None, {"eos_token": "<eos>"}, {"eos_token": "<turn>"}),
    "a decoder wins over the map": (None, {"eos_token": "<eos>", "added_tokens_decoder": {}}, {"eos_token": "<turn>"}),
    "as objects": (None, {"eos_token": {"__type": "AddedToken", "content": "<turn>"}, "pad_token": "<pad>"}, None),
    "nothing named": (None, {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_as_transformers_reads_them(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template, settings, tokens_map = CASES[case]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **(settings or {})}
    file = write_tokenizer(tmp_path, template, settings, tokens_map)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), read_special_tokens(load_tokenizer(file), file)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    plain = theirs(TEXT, add_special_tokens=False).input_ids
    assert [*ours.begin_ids, *plain, *ours.end_ids] == theirs(TEXT).input_ids


def test_files_with_a_prefix_belong_together(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path, "<bos> $A", {"eos_token": "<turn>"}, prefix="hf_file.")
    write_tokenizer(tmp_path, None, {"eos_token": "<eos>"})
    assert read_special_tokens(load_tokenizer(file), file) == SpecialTokens((0,), (), None, 3, None)
    assert find_eod_id(load_tokenizer(file), file) == 3
    assert find_eod_id(load_tokenizer(tmp_path), tmp_path) == 1


@pytest.mark.parametrize("settings, message", [
    ({"eos_token": "</s>"}, "eos_token='</s>', named beside .* is not in the vocabulary"),
    ({"eos_token": 7}, "eos_token=7 beside .* must be a text or have one as its content"),
])
def test_what_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path, None, settings)
    with pytest.raises(ValueError, match=message):
        read_special_tokens(load_tokenizer(file), file)


def test_a_damaged_file(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path, None, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        special_token_names(file)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        special_token_names(file)


@pytest.mark.parametrize("generation, config, ids", [
    ({"eos_token_id": 5}, {"eos_token_id": 5}, (5,)), ({"eos_token_id": [1, 497]}, {"eos_token_id": 1}, (1, 497)),
    (None, {"eos_token_id": [1, 4]}, (1, 4)), (None, {"eos_token_id": 0}, (0,)), (None, {}, None), (None, None, None),
    ({}, {}, ()), ({"eos_token_id": None}, {"eos_token_id": None}, ()), ({}, {"eos_token_id": 3}, (3,)),
    ({"eos_token_id": 1}, {"eos_token_id": [1, 9]}, (1, 9)),
])
def test_stop_ids(generation: dict[str, Any] | None, config: dict[str, Any] | None, ids: tuple[int, ...] | None,
                  tmp_path: Path) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert read_stop_ids(tmp_path) == ids


@pytest.mark.parametrize("stated", ["1", [1, "2"], -1, True, 1.5])
def test_stop_ids_that_are_none(stated: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stated}))
    with pytest.raises(ValueError, match="config.json: eos_token_id=.* must be an id or a list of ids"):
        read_stop_ids(tmp_path)
