"""Prompts into ids and ids into text, with the tokenizer that belongs to a checkpoint. No torch.

Which tokenizer that is, a checkpoint says: a run's names the one it was trained with, a Hugging Face folder and a
checkpoint converted from one hold theirs. Another one can be given where that is gone or moved; it has to be the same
tokenizer wherever its fingerprint is known, and one whose ids the model has in any case.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.folder import TRACKER, read_manifest
from dsv3_megatron.checkpoint.hf.directory import CONFIG
from dsv3_megatron.checkpoint.hf.source import FILE_PREFIX
from dsv3_megatron.checkpoint.text_files import form_of_checkpoint, stop_ids_of_checkpoint
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import parse_json
from dsv3_megatron.data.blend import parse_blend, read_tokenizer_fingerprint
from dsv3_megatron.data.indexed import dataset_paths
from dsv3_megatron.data.special_tokens import TOKENIZER, read_special_tokens, read_stop_ids
from dsv3_megatron.data.text_form import TextForm
from dsv3_megatron.data.tokenizer import EOS_TOKEN, count_ids, fingerprint, load_tokenizer, tokenizer_file

STDIN = "-"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class KnownTokenizer:
    """What a checkpoint says of its tokenizer.

    Attributes:
        path: Folder or file at which the tokenizer is or was; None if the checkpoint does not say.
        fingerprint: The tokenizer's fingerprint, if anything that is still there has it.
        source: Name of what says so, for messages.
        form: How the texts began and ended that the model was trained on; None if nothing says it.
        stop_ids: Ids at which a text of the model ends, as the checkpoint's files say; None if they do not.
    """

    path: Path | None = None
    fingerprint: str | None = None
    source: str = ""
    form: TextForm | None = None
    stop_ids: tuple[int, ...] | None = None


def known_tokenizer(load: str) -> KnownTokenizer:
    """The tokenizer of a checkpoint folder, of a run or of Hugging Face's kind.

    Raises:
        ValueError: the checkpoint is damaged, or was trained on data of different tokenizers.
    """
    folder = Path(load)
    if not (folder / TRACKER).is_file():
        file, stop_ids = folder / TOKENIZER, read_stop_ids(folder)
        if file.is_file():
            return KnownTokenizer(file, fingerprint(file), str(file), stop_ids=stop_ids)
        return KnownTokenizer(stop_ids=stop_ids)
    manifest = read_manifest(load)
    data: dict[str, Any] = manifest.run.get("data", {})
    prefixes = parse_blend(data["data_path"]).prefixes if data.get("data_path") else ()
    there = [prefix for prefix in prefixes if os.path.isfile(dataset_paths(prefix)[2])]
    form = form_of_checkpoint(manifest.path, prefixes)
    stop_ids = stop_ids_of_checkpoint(manifest.path)

    def known(path: str | Path | None, identity: str | None = None, source: str = "") -> KnownTokenizer:
        return KnownTokenizer(Path(path) if path else None, identity, source, form, stop_ids)

    carried = manifest.path / f"{FILE_PREFIX}{TOKENIZER}"
    if carried.is_file():
        return known(carried, fingerprint(carried), str(carried))
    path = data.get("tokenizer_model")
    made_by = read_tokenizer_fingerprint(there)
    if made_by is not None:
        return known(path, made_by, f"the data it was trained on ({there[0]})")
    if path and os.path.exists(path):
        return known(path, fingerprint(path), f"tokenizer_model={path} of its run")
    return known(path)


class TextCodec:
    """A tokenizer as generation uses it.

    Args:
        path: Folder with a tokenizer.json, or the file.
        form: How the texts of the training began; None: as the tokenizer's post-processor begins them.
        stop_ids: Ids at which a text ends; None: the tokenizer's eos_token.

    Attributes:
        path: Folder or file of the tokenizer.
        begin_ids: Ids that a prompt begins with.
        bos_id: Id of the token named bos_token; None where none is named.
        eos_id: The tokenizer's own end token; None where it has none.
        stop_ids: Ids at which a text ends; none of them where nothing ends one.
        num_ids: Largest id + 1.

    Raises:
        ValueError: the tokenizer is missing or broken, or nothing says where a text ends.
    """

    def __init__(self, path: str | os.PathLike[str], *, form: TextForm | None = None,
                 stop_ids: tuple[int, ...] | None = None) -> None:
        self.path, self.tokenizer = Path(path), load_tokenizer(path)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.num_ids = count_ids(self.tokenizer)
        special = read_special_tokens(self.tokenizer, tokenizer_file(path))
        self.begin_ids = special.begin_ids if form is None else form.begin_ids
        self.bos_id = special.bos_id
        self.eos_id = self.tokenizer.token_to_id(EOS_TOKEN) if special.eos_id is None else special.eos_id
        if stop_ids is None and self.eos_id is None:
            raise ValueError("nothing says which token ends a text: name eos_token in the tokenizer_config.json "
                             f"beside {path}")
        self.stop_ids = (self.eos_id,) if stop_ids is None and self.eos_id is not None else stop_ids or ()

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, behind those that begin every text; an empty prompt has none."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids or tuple(ids[:len(self.begin_ids)]) == self.begin_ids:
            return ids
        return [*self.begin_ids, *ids]

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


def open_codec(load: str, tokenizer_model: str | None, *, vocab_size: int) -> TextCodec:
    """The tokenizer to use with a checkpoint.

    Args:
        load: Folder of the checkpoint.
        tokenizer_model: A tokenizer to use instead of the one that the checkpoint knows of.
        vocab_size: Rows of the model's embedding.

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
    codec = TextCodec(path, form=known.form, stop_ids=known.stop_ids)
    if codec.num_ids > vocab_size:
        raise ConfigError(f"tokenizer_model={path} has ids up to {codec.num_ids - 1}, the model has vocab_size="
                          f"{vocab_size}; give the tokenizer that the model was trained with")
    if known.fingerprint is None and known.stop_ids and codec.eos_id not in known.stop_ids:
        # Nothing else tells whether the tokenizer that was given is the model's.
        raise ConfigError(f"tokenizer_model={path} ends a text with id {codec.eos_id}, {Path(load) / CONFIG} says "
                          f"eos_token_id={', '.join(map(str, known.stop_ids))}; give the tokenizer that the model was "
                          "trained with")
    return codec


def read_prompts(file: str | os.PathLike[str]) -> list[str]:
    """The prompts of a JSON-lines file, {"prompt": "..."} in each line; a byte-order mark before them is passed over.

    Args:
        file: Path of the file; "-" reads standard input.

    Raises:
        ConfigError: the file cannot be read or a line is something else; gives file and line.
    """
    prompts = []
    try:
        content = sys.stdin.buffer.read() if os.fspath(file) == STDIN else Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"prompts={file} cannot be read: {error.strerror}") from error
    file = "standard input" if os.fspath(file) == STDIN else file
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{file}:{number}: not a line of JSON in UTF-8: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ConfigError(f'{file}:{number}: each line must be an object with a text, {{"prompt": "..."}}')
        check_text(record["prompt"], f"{file}:{number}")
        prompts.append(record["prompt"])
    if not prompts:
        raise ConfigError(f'{file} has no prompt; each line must be {{"prompt": "..."}}')
    return prompts


def check_text(text: str, where: str) -> None:
    """Refuse a prompt that no encoding has: half of a surrogate pair, or bytes of a command line that are no UTF-8.

    Raises:
        ConfigError: there is one; says which and where.
    """
    lone = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if lone is None:
        return
    code = ord(text[lone])
    what = f"the byte 0x{code - 0xDC00:02x}, which is no UTF-8" if 0xDC80 <= code <= 0xDCFF else \
        f"the lone surrogate U+{code:04X}, which is no character"
    raise ConfigError(f"{where}: character {lone} of the prompt is {what}; write the text in UTF-8, a character beyond "
                      "U+FFFF as a pair of surrogates or as it is")
