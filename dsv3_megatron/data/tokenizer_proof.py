"""Finds in which texts gigatoken can give other ids than `tokenizers`, for one tokenizer: in none, in known ones, or in
any.

gigatoken is trusted with what it is known to do and what was tried exhaustively, nothing else:

- Settings of tokenizer.json that it ignores or does in a way of its own rule it out altogether (`_check_*`).
- Code points that the two split differently (`character_classes.py`), that a normalizer may change, and added tokens
  with rules of their own (`single_word`, `lstrip`, ...) or other ids are listed in a `Parting`: a text that holds one
  of them is left to `tokenizers`. Whether it does depends on that text alone.
- Every entry of the vocabulary, alone and in random company, must give the same ids in both.

The result is kept in the user's cache folder, under the tokenizer's fingerprint, the releases of both libraries and the
source of this module, so that it takes its seconds once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.config.json_files import parse_json, read_json
from dsv3_megatron.config.new_files import replace_text
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data import character_classes
from dsv3_megatron.data.character_classes import GPT2_PATTERN, NUM_CODE_POINTS, byte_symbols, find_parting_code_points

_FIRST_NOT_INERT = 0x300  # below, no character is changed by NFC or combines with another
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_NUM_MIXED_TEXTS, _WORDS_PER_TEXT = 1500, 20
_MAX_ADDED_TOKENS_IN_SEARCH = 8
_SCAN_CHARACTERS = 1 << 20
_MIDDLE_OF_GAP = 0x4E00  # the first of the Chinese characters, which no release of Unicode changes any more

Encode = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Parting:
    """What may make the two libraries part.

    Attributes:
        code_points: Ranges of code points, both ends included.
        contents: Added tokens.
    """

    code_points: tuple[tuple[int, int], ...]
    contents: tuple[str, ...]

    @property
    def num_code_points(self) -> int:
        """Code points in all ranges."""
        return sum(last - first + 1 for first, last in self.code_points)


class PartingScan:
    """A function: whether a text holds anything of a Parting. A nanosecond or two a character, none in plain ASCII.

    Only characters from the first in question on are looked up, and of those none in the gap around the Chinese ones.
    """

    def __init__(self, parting: Parting) -> None:
        self._table = np.zeros(NUM_CODE_POINTS, bool)
        for first, last in parting.code_points:
            self._table[first : last + 1] = True
        self._lowest = min((first for first, _ in parting.code_points), default=NUM_CODE_POINTS)
        below = [last for _, last in parting.code_points if last < _MIDDLE_OF_GAP]
        above = [first for first, _ in parting.code_points if first >= _MIDDLE_OF_GAP]
        self._gap_start = np.uint32(max(below, default=-1) + 1)
        self._gap_size = np.uint32(min(above, default=NUM_CODE_POINTS)) - self._gap_start
        if self._table[_MIDDLE_OF_GAP]:
            self._gap_size = np.uint32(0)
        self._few: tuple[str, ...] = ()
        self._search: Callable[[str], object] | None = None
        if len(parting.contents) <= _MAX_ADDED_TOKENS_IN_SEARCH:
            self._few = parting.contents
        else:
            self._search = re.compile("|".join(map(re.escape, parting.contents))).search

    def __call__(self, text: str) -> bool:
        # One character is looked for much faster than several where they are not ASCII.
        if any(content[-1] in text and content in text for content in self._few):
            return True
        if self._search is not None and self._search(text):
            return True
        if self._lowest == NUM_CODE_POINTS or text.isascii():
            return False
        for start in range(0, len(text), _SCAN_CHARACTERS):
            part = text if len(text) <= _SCAN_CHARACTERS else text[start : start + _SCAN_CHARACTERS]
            # UTF-16 is a quarter of UTF-32's time; where it has surrogates, UTF-32 has the code points.
            codes = self._asked_for(np.frombuffer(part.encode("utf-16-le"), np.uint16))
            if codes.size and ((codes & 0xF800) == 0xD800).any():
                codes = self._asked_for(np.frombuffer(part.encode("utf-32-le"), np.uint32))
            if codes.size and self._table[codes].any():
                return True
        return False

    def _asked_for(self, codes: np.ndarray) -> np.ndarray:
        """Find the codes that must be looked up. A surrogate is always among them where it can matter."""
        # Unsigned: what lies before the gap wraps around to beyond it.
        if codes.dtype == np.uint32:
            return codes[(codes >= self._lowest) & (codes - self._gap_start >= self._gap_size)]
        # The first in question and the gap's end may lie beyond what UTF-16 has in one unit.
        lowest, start = np.uint16(min(self._lowest, 0xD800)), np.uint16(self._gap_start)
        size = np.uint16(min(int(self._gap_start) + int(self._gap_size), 0xD800) - int(self._gap_start))
        return codes[(codes >= lowest) & (codes - start >= size)]


def find_parting(content: dict[str, Any], identity: str, encode: Encode, encode_fast: Encode) -> Parting:
    """Find in which texts the two libraries can part for a tokenizer, or read from the cache what was found before.

    Args:
        content: Content of tokenizer.json.
        identity: Fingerprint of the tokenizer.
        encode: Ids of a text from `tokenizers`.
        encode_fast: Ids of a text from gigatoken.

    Raises:
        ValueError: the libraries can part in any text: gigatoken must not be used; says why.
    """

    def find() -> dict[str, Any]:
        try:
            parting = _find_parting(content, encode, encode_fast)
        except ValueError as error:
            return {"reason": str(error)}
        return {"code_points": [list(part) for part in parting.code_points], "contents": list(parting.contents)}

    found = _cached(f"tokenizer-{identity}", find)
    if "reason" in found:
        raise ValueError(found["reason"])
    return Parting(tuple((first, last) for first, last in found["code_points"]), tuple(found["contents"]))


def _find_parting(content: dict[str, Any], encode: Encode, encode_fast: Encode) -> Parting:
    _check_model(content)
    patterns = _split_patterns(content.get("pre_tokenizer"))
    is_parting = _changed_by_normalizer(content.get("normalizer"))
    for first, last in _parting_of_patterns(json_text(content["pre_tokenizer"]), tuple(patterns)):
        is_parting[first : last + 1] = True
    contents = _parting_added_tokens(content, encode, encode_fast)
    parting = Parting(_ranges_of(is_parting), tuple(contents))
    _compare_vocabulary(content, PartingScan(parting), encode, encode_fast)
    return parting


# -------------------------------------------------------------------------------------------------------- the settings


def _check_model(content: dict[str, Any]) -> None:
    """Refuse a model of which gigatoken does not know a setting, or which it reads in another way."""
    model = content.get("model", {})
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"gigatoken cannot load it: model {model['type']}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise ValueError(f"gigatoken does not do {setting}={model[setting]!r} as tokenizers does")
    vocab: dict[str, int] = model.get("vocab", {})
    symbols = byte_symbols()
    if any(symbols[byte] not in vocab for byte in range(256) if byte not in _NEVER_IN_UTF8):
        raise ValueError("its vocabulary does not have all bytes")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two entries of its vocabulary have one id")
    of_bytes = set(symbols)
    raw = [token for token in vocab if not of_bytes.issuperset(token)]
    if any("".join(symbols[byte] for byte in token.encode()) in vocab for token in raw):
        raise ValueError("two entries of its vocabulary spell the same bytes")
    if model.get("ignore_merges") and not {token["content"] for token in _added_tokens(content)}.issuperset(raw):
        raise ValueError("its vocabulary has words that are not spelled in bytes, and ignore_merges")
    _check_merges(model, vocab, of_bytes)


def _check_merges(model: dict[str, Any], vocab: dict[str, int], of_bytes: set[str]) -> None:
    """Refuse merges whose order gigatoken would read in another way: it takes ids for ranks where they only grow."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", [])]
    if any(len(pair) != 2 or not of_bytes.issuperset("".join(pair)) for pair in pairs):
        raise ValueError("its merges have words that are not spelled in bytes")
    if len(set(pairs)) < len(pairs):
        raise ValueError("a merge is in its list twice")
    ids = np.array([vocab.get(left + right, -1) for left, right in pairs], dtype=np.int64)
    if (ids < 0).any():
        raise ValueError("a merge of it gives no entry of the vocabulary")
    if (np.diff(ids) == 0).any() and (np.diff(ids) >= 0).all():
        raise ValueError("several of its merges give the same token")


def _split_patterns(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The regular expressions of a pre-tokenizer of the one shape that gigatoken takes as it is meant.

    Raises:
        ValueError: the pattern has another shape.
    """
    steps = _flatten(pre_tokenizer, "pretokenizers")
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise ValueError("its pre_tokenizer does not end with ByteLevel")
    *splits, last = steps
    if last.get("add_prefix_space", True):
        raise ValueError("gigatoken does not do add_prefix_space as tokenizers does")
    if last.get("use_regex", True) == bool(splits):
        raise ValueError("its ByteLevel and its other pre_tokenizers do not go together")
    patterns = []
    for split in splits:
        regex = (split.get("pattern") or {}).get("Regex")
        how = (split.get("behavior"), bool(split.get("invert")))
        if split.get("type") != "Split" or regex is None or how not in (("Isolated", False), ("Removed", True)):
            raise ValueError(f"gigatoken does not do its pre_tokenizer {split.get('type')} as tokenizers does")
        patterns.append(regex)
    return patterns or [GPT2_PATTERN]


def _flatten(step: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for child in step.get(children, []) for inner in _flatten(child, children)]


def _changed_by_normalizer(normalizer: dict[str, Any] | None) -> np.ndarray:
    """The code points that a normalizer may change or join with others, bool [0x110000].

    Raises:
        ValueError: a normalizer other than NFC.
    """
    is_changed = np.zeros(NUM_CODE_POINTS, bool)
    steps = _flatten(normalizer, "normalizers")
    others = sorted({str(step.get("type")) for step in steps} - {"NFC"})
    if others:
        raise ValueError(f"gigatoken does not do its normalizer {', '.join(others)} as tokenizers does")
    if not steps:
        return is_changed
    inert = np.fromiter((_is_inert(code_point) for code_point in range(NUM_CODE_POINTS)), bool, NUM_CODE_POINTS)
    return ~inert


@functools.cache
def _second_of_compositions() -> frozenset[str]:
    """The characters that NFC may join with one before them."""
    seconds = {chr(code_point) for code_point in (*range(0x1161, 0x1176), *range(0x11A7, 0x11C3))}  # Hangul
    for code_point in range(NUM_CODE_POINTS):
        parts = unicodedata.decomposition(chr(code_point)).split()
        if len(parts) > 1 and not parts[0].startswith("<"):
            seconds |= {chr(int(part, 16)) for part in parts[1:]}
    return frozenset(seconds)


def _is_inert(code_point: int) -> bool:
    """Whether NFC leaves a character as it is, whatever stands beside it, in every release of Unicode.

    One that this Python's release does not know may be anything in another.
    """
    character = chr(code_point)
    if code_point < _FIRST_NOT_INERT:
        return True
    return (
        unicodedata.category(character) not in ("Cn", "Cs")
        and unicodedata.combining(character) == 0
        and unicodedata.is_normalized("NFC", character)
        and character not in _second_of_compositions()
    )


# -------------------------------------------------------------------------------------------------------- added tokens


def _added_tokens(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content.get("added_tokens") or []


def _parting_added_tokens(content: dict[str, Any], encode: Encode, encode_fast: Encode) -> list[str]:
    """The added tokens that gigatoken does not find as `tokenizers` does, or to which it gives another id."""
    tokens = {token["content"]: token for token in _added_tokens(content)}
    if len(tokens) < len(_added_tokens(content)) or "" in tokens:
        raise ValueError("two of its added tokens are the same, or one is empty")
    parting = {
        name
        for name, token in tokens.items()
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip")
    }
    later = {name for name, token in tokens.items() if token.get("normalized")}
    if _flatten(content.get("normalizer"), "normalizers"):
        parting |= later  # they are looked for in the normalized text, after having been normalized themselves
    parting |= _overlapping(set(tokens) - later, later)  # tokenizers looks for one kind after the other
    def differ(*texts: str) -> bool:
        return any(not np.array_equal(encode(text), encode_fast(text)) for text in texts)

    for name in tokens:
        if name not in parting:
            around = (name, f"a{name}b", f" {name} ", f"1{name}2", f".{name}.", f"\n{name}\n", name * 2)
            if differ(*around):
                parting.add(name)
    known = [name for name in tokens if name not in parting]
    for name, after in zip(known, known[1:] + known[:1], strict=True):
        if differ(name + after):
            parting |= {name, after}
    return [name for name in tokens if name in parting]


def _overlapping(first: set[str], second: set[str]) -> set[str]:
    """The texts of two sets that can lie over one of the other in some text."""
    found: set[str] = set()
    for these, those in ((first, second), (second, first)):
        beginnings: dict[str, set[str]] = {}
        for name in those:
            for end in range(1, len(name) + 1):
                beginnings.setdefault(name[:end], set()).add(name)
        for name in these:
            for start in range(len(name)):
                for end in range(start + 1, len(name) + 1):
                    part = name[start:end]
                    hit = beginnings.get(part, set()) if end == len(name) else beginnings.get(part, set()) & {part}
                    if hit:
                        found |= {name, *hit}
                    elif part not in beginnings:
                        break
    return found


# ---------------------------------------------------------------------------------------------------------- vocabulary


def _compare_vocabulary(content: dict[str, Any], scan: PartingScan, encode: Encode, encode_fast: Encode) -> None:
    """Every word of the vocabulary, alone and in random texts.

    Raises:
        ValueError: one gives other ids.
    """
    of_symbol = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    words = []
    for token in content["model"]["vocab"]:
        with contextlib.suppress(KeyError, UnicodeDecodeError):  # half a character is no text
            word = bytes(of_symbol[symbol] for symbol in token).decode("utf-8")
            if not scan(word):
                words.append(word)
    numbers = random.Random(0)
    letters = [word for word in words if word.isalpha()] or words
    mixed = ["".join(numbers.choices(words, k=_WORDS_PER_TEXT)) for _ in range(_NUM_MIXED_TEXTS) if words]
    # Without spaces: long runs of letters, for which gigatoken has other code.
    mixed += ["".join(numbers.choices(letters, k=_WORDS_PER_TEXT)) for _ in range(_NUM_MIXED_TEXTS) if words]
    for text in itertools.chain(words, mixed):
        if not scan(text) and not np.array_equal(encode(text), encode_fast(text)):
            raise ValueError(f"gigatoken gave other ids than tokenizers for {text[:40]!r}")


# --------------------------------------------------------------------------------------------------------------- cache


def _ranges_of(is_member: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Ranges of the true places of an array, both ends included."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_member.astype(np.int8), [0]])))
    return tuple((int(first), int(end) - 1) for first, end in edges.reshape(-1, 2))


@functools.cache
def _parting_of_patterns(pre_tokenizer: str, patterns: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """`find_parting_code_points`, found once for all tokenizers with these patterns."""

    def find() -> dict[str, Any]:
        try:
            found = find_parting_code_points(parse_json(pre_tokenizer), patterns)
        except ValueError as error:
            return {"reason": str(error)}
        return {"code_points": [list(part) for part in _ranges_of(found)]}

    result = _cached(f"patterns-{hashlib.sha256(pre_tokenizer.encode()).hexdigest()}", find)
    if "reason" in result:
        raise ValueError(result["reason"])
    return tuple((first, last) for first, last in result["code_points"])


def cache_folder() -> Path:
    """The folder of this library in the user's cache ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_megatron"


def _cached(name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result from the cache, or found and put there if the folder can be written."""
    file = cache_folder() / f"{name[:40]}-{_versions()}.json"
    try:
        found = read_json(file)
        if isinstance(found, dict) and found.pop("sha256", None) == _digest(found):
            return found
    except (OSError, ValueError):
        pass  # not there, or cut short: found anew
    found = find()
    with contextlib.suppress(OSError):  # a home that cannot be written: found anew the next time
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json_text(found | {"sha256": _digest(found)}), is_shared=True)
    return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json_text(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def _versions() -> str:
    """A hash of everything but the tokenizer that a result depends on."""
    parts: Iterable[bytes] = [
        *(importlib.metadata.version(name).encode() for name in ("gigatoken", "tokenizers")),
        unicodedata.unidata_version.encode(),
        *(Path(file).read_bytes() for file in (__file__, character_classes.__file__)),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
