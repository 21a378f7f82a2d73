"""Prompts into ids and ids into text, with the tokenizer that belongs to a checkpoint. No torch.

Which tokenizer that is, a checkpoint says: a run's names the one it was trained with, a Hugging Face folder and a
checkpoint converted from one hold theirs. Another one can be given where that is gone or moved; it has to be the same
tokenizer wherever its fingerprint is known, and one whose ids the model has in any case.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.hf.directory import CONFIG
from dsv3_megatron.checkpoint.hf.source import FILE_PREFIX
from dsv3_megatron.checkpoint.layout import TRACKER, read_manifest
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.data.blend import parse_blend, read_tokenizer_fingerprint
from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.tokenizer import count_ids, find_eod_id, fingerprint, load_tokenizer, tokenizer_file

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class KnownTokenizer:
    """What a checkpoint says of its tokenizer.

    Attributes:
        path: Where it is or was; None if the checkpoint does not say.
        fingerprint: Its fingerprint, if anything that is still there has it.
        source: What says so, for messages.
    """

    path: Path | None = None
    fingerprint: str | None = None
    source: str = ""


def known_tokenizer(load: str) -> KnownTokenizer:
    """The tokenizer of a checkpoint folder, of a run or of Hugging Face's kind.

    Raises:
        ValueError: the checkpoint is damaged, or was trained on data of different tokenizers.
    """
    folder = Path(load)
    if not (folder / TRACKER).is_file():
        file = folder / TOKENIZER
        return KnownTokenizer(file, fingerprint(file), str(file)) if file.is_file() else KnownTokenizer()
    manifest = read_manifest(load)
    carried = manifest.path / f"{FILE_PREFIX}{TOKENIZER}"
    if carried.is_file():
        return KnownTokenizer(carried, fingerprint(carried), str(carried))
    data: dict[str, Any] = manifest.run.get("data", {})
    path = data.get("tokenizer_model")
    prefixes = parse_blend(data["data_path"]).prefixes if data.get("data_path") else ()
    there = [prefix for prefix in prefixes if os.path.isfile(dataset_paths(prefix)[2])]
    made_by = read_tokenizer_fingerprint(there)
    if made_by is not None:
        return KnownTokenizer(Path(path) if path else None, made_by, f"the data it was trained on ({there[0]})")
    if path and os.path.exists(path):
        return KnownTokenizer(Path(path), fingerprint(path), f"tokenizer_model={path} of its run")
    return KnownTokenizer(Path(path) if path else None)


class TextCodec:
    """A tokenizer as generation uses it.

    Args:
        path: Folder with a tokenizer.json, or the file.

    Attributes:
        end_id: The token that ends a document, which ends generation.
        num_ids: Largest id + 1.

    Raises:
        ValueError: the tokenizer is missing or broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.tokenizer = load_tokenizer(path)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        file = tokenizer_file(path)
        settings = _settings_beside(file)
        self.num_ids = count_ids(self.tokenizer)
        self.end_id = self._end_id(file, settings)
        begin = settings.get("bos_token") if settings.get("add_bos_token") else None
        name = begin["content"] if isinstance(begin, dict) else begin
        self.begin_id = None if name is None else self.tokenizer.token_to_id(name)

    def _end_id(self, file: Path, settings: dict[str, Any]) -> int:
        name = settings.get("eos_token")
        name = name["content"] if isinstance(name, dict) else name
        found = None if name is None else self.tokenizer.token_to_id(name)
        return find_eod_id(self.tokenizer, file) if found is None else found

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, after the token that begins every text where the tokenizer's settings say so."""
        ids: list[int] = self.tokenizer.encode(text).ids
        if not ids or self.begin_id is None or ids[0] == self.begin_id:
            return ids
        return [self.begin_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become replacement characters."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


class TextStream:
    """Text of a growing sequence, given out as far as its characters are whole.

    A character can take several tokens, and what a token reads as can depend on the one before it; so each piece is the
    difference between two decodings that begin at the same earlier token.
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int]) -> None:
        self._codec = codec
        self._context = list(prompt[-4:])
        self._pending: list[int] = []

    def add(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """The text that more tokens have made whole; after the last, all that is left."""
        self._pending += ids
        before = self._codec.decode(self._context)
        text = self._codec.decode(self._context + self._pending)[len(before):]
        if not self._pending or (text.endswith(_REPLACEMENT) and not is_last):
            return ""
        self._context, self._pending = self._pending, []
        return text


def open_codec(load: str, tokenizer_model: str | None, *, vocab_size: int, end_id: int | None = None) -> TextCodec:
    """The tokenizer to use with a checkpoint.

    Args:
        load: Its folder.
        tokenizer_model: A tokenizer to use instead of the one that the checkpoint knows of.
        vocab_size: Rows of the model's embedding.
        end_id: The end token's id as the checkpoint's `config.json` says, if it does.

    Raises:
        ConfigError: none is there, or it is not the one that the model was trained with.
    """
    known = known_tokenizer(load)
    path = known.path if tokenizer_model is None else Path(tokenizer_model)
    if path is None:
        raise ConfigError(f"load={load} does not say which tokenizer belongs to it; give it, --tokenizer-model DIR")
    if tokenizer_model is None and not path.exists():
        raise ConfigError(f"load={load} was trained with tokenizer_model={path}, which is not there any more; give "
                          "where it is now, --tokenizer-model DIR")
    identity = fingerprint(path)
    if known.fingerprint is not None and identity != known.fingerprint:
        raise ConfigError(f"tokenizer_model={path} is not this checkpoint's tokenizer: its fingerprint is "
                          f"{identity[:12]}, that of {known.source} is {known.fingerprint[:12]}; give the tokenizer "
                          "that the model was trained with")
    codec = TextCodec(path)
    if codec.num_ids > vocab_size:
        raise ConfigError(f"tokenizer_model={path} has ids up to {codec.num_ids - 1}, the model has vocab_size="
                          f"{vocab_size}; give the tokenizer that the model was trained with")
    if end_id is not None and codec.end_id != end_id:
        raise ConfigError(f"tokenizer_model={path} ends a text with id {codec.end_id}, {Path(load) / CONFIG} says "
                          f"eos_token_id={end_id}; give the tokenizer that the model was trained with")
    return codec


def read_prompts(file: str | os.PathLike[str]) -> list[str]:
    """The prompts of a JSON-lines file, {"prompt": "..."} in each line.

    Raises:
        ConfigError: it cannot be read or a line is something else; gives file and line.
    """
    prompts = []
    try:
        lines = Path(file).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"prompts={file} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file}:{number}: not a line of JSON in UTF-8: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ConfigError(f'{file}:{number}: each line must be an object with a text, {{"prompt": "..."}}')
        prompts.append(record["prompt"])
    if not prompts:
        raise ConfigError(f'{file} has no prompt; each line must be {{"prompt": "..."}}')
    return prompts


def _settings_beside(file: Path) -> dict[str, Any]:
    """Content of the tokenizer_config.json that goes with a tokenizer.json; empty without one."""
    settings = file.with_name(file.name.removesuffix(TOKENIZER) + SETTINGS)
    if not file.name.endswith(TOKENIZER) or not settings.is_file():
        return {}
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{settings} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
