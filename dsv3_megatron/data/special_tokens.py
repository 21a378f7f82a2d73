"""What a tokenizer puts around a text, and which of its tokens begin, end and pad.

Three files beside one another say it, and they are read as Transformers' `AutoTokenizer` (5.x) reads them:

    tokenizer.json            its post-processor puts tokens around every text, such as a begin token; nothing else does
    tokenizer_config.json     names bos_token, eos_token and pad_token
    special_tokens_map.json   names them where tokenizer_config.json has no added_tokens_decoder; it then wins

Where a text of a model ends is another question, which a Hugging Face folder answers: `read_stop_ids`.

No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.data.folder_checksums import require_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, SETTINGS, TOKENS_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
# Files that say something of a tokenizer, which must be there if checksums.json knows them.
BESIDE = (SETTINGS, TOKENS_MAP)


@dataclass(frozen=True)
class SpecialTokens:
    """The special ids of a tokenizer.

    Attributes:
        begin_ids: Ids put before every text; empty for most tokenizers, (bos,) for those like Llama 3's.
        end_ids: Ids put behind every text; empty for nearly all.
        bos_id: Id of the token named bos_token; None where none is named.
        eos_id: Id of the token named eos_token; None where none is named.
        pad_id: Id of the token named pad_token; None where none is named.
    """

    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


def read_special_tokens(tokenizer: Tokenizer, file: str | os.PathLike[str]) -> SpecialTokens:
    """Read the special ids of a loaded tokenizer from the files beside its tokenizer.json.

    Args:
        tokenizer: What `tokenizer.load_tokenizer` made of the file.
        file: The tokenizer.json, whose name may have a prefix (`hf_file.tokenizer.json`); the other files then have it.

    Raises:
        ValueError: a file is not JSON, a named token is not in the vocabulary, or the post-processor does more to a
            text than to put tokens around it.
    """
    begin_ids, end_ids = _ids_around_a_text(tokenizer, file)
    names = special_token_names(file)

    def id_of(name: str) -> int | None:
        token = names.get(name)
        if token is None:
            return None
        found = tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"{name}={token!r}, named beside {os.fspath(file)}, is not in the vocabulary; name a "
                             "token that tokenizer.json has, or add it there")
        return int(found)

    return SpecialTokens(begin_ids, end_ids, id_of("bos_token"), id_of("eos_token"), id_of("pad_token"))


def special_token_names(file: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of bos_token, eos_token and pad_token, as far as the files beside a tokenizer.json name them.

    Raises:
        ValueError: one of the files is not JSON, or names something else than a text.
    """
    settings = read_beside(file, SETTINGS)
    named = dict(settings)
    if "added_tokens_decoder" not in settings:
        named |= read_beside(file, TOKENS_MAP)
    found = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        entry = named.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"{name}={entry!r} beside {os.fspath(file)} must be a text or have one as its content")
        found[name] = text
    return found


def read_beside(file: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Content of the file called `name` that goes with a tokenizer.json; empty where there is none.

    Raises:
        ValueError: the file is not a JSON object in UTF-8.
    """
    file = Path(file)
    beside = file.with_name(file.name.removesuffix(TOKENIZER) + name if file.name.endswith(TOKENIZER) else name)
    return _read_object(beside) if beside.is_file() else {}


def read_stop_ids(folder: str | os.PathLike[str], *, prefix: str = "") -> tuple[int, ...] | None:
    """The ids at which a Hugging Face folder's model stops: those of generation_config.json and of config.json.

    Transformers' `generate` reads config.json only where there is no generation_config.json. Here an id that either of
    them names as an end is one, since no model goes on behind it; so both stop alike where the two files agree, and
    where only one names ids.

    Args:
        folder: Folder with the files.
        prefix: Beginning of the files' names.

    Returns:
        The ids; none where there is a generation_config.json and neither file names one, as for Transformers; None
        where nothing says anything.

    Raises:
        ValueError: a file is not JSON, or eos_token_id is no id and no list of ids.
    """
    generation = Path(folder) / f"{prefix}{GENERATION_CONFIG}"
    config = Path(folder) / f"{prefix}config.json"
    stated = [_stop_ids_of(file) for file in (generation, config) if file.is_file()]
    ids = dict.fromkeys(token for named in stated if named for token in named)
    return tuple(ids) if ids or generation.is_file() else None


def _stop_ids_of(file: Path) -> tuple[int, ...] | None:
    stated = _read_object(file).get("eos_token_id")
    if stated is None:
        return None
    ids = stated if isinstance(stated, list) else [stated]
    if not all(isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0 for entry in ids):
        raise ValueError(f"{file}: eos_token_id={stated!r} must be an id or a list of ids")
    return tuple(ids)


def _read_object(file: Path) -> dict[str, Any]:
    require_whole(file)
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _ids_around_a_text(tokenizer: Tokenizer, file: str | os.PathLike[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and behind a text."""
    text = "a"
    plain: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    whole: list[int] = tokenizer.encode(text).ids
    start = _find(whole, plain)
    if start is None:
        raise ValueError(f"{os.fspath(file)}: its post-processor makes {whole} of the ids {plain}; only one that puts "
                         "tokens before and behind a text can be used")
    return tuple(whole[:start]), tuple(whole[start + len(plain):])


def _find(whole: Sequence[int], part: Sequence[int]) -> int | None:
    """Find where `part` begins in `whole`; None where it does not stand in it."""
    width = len(part)
    return next((at for at in range(len(whole) - width + 1) if list(whole[at:at + width]) == list(part)), None)
