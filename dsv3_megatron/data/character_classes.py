r"""The code points at which gigatoken and `tokenizers` may split a text differently, found by trying all of them.

Both libraries cut a text into words before they merge bytes, `tokenizers` with the regular expressions of
tokenizer.json, gigatoken with its own code and its own release of Unicode. A regular expression sees of a character
only which of its one-character parts (\p{L}, [\r\n], a literal, ...) match it: characters that the same parts match
form a class, and one of them stands for all. So three steps are enough:

1. `classify` asks `tokenizers` which parts match which of Unicode's 1,112,064 code points.
2. Representatives of all classes, in every sequence of up to three and in long random ones, must be split alike.
3. Every code point, in contexts that tell the classes apart, must be split by gigatoken like its representative.

Splits show through a tokenizer made for it, with the patterns in question and merges across the places to be seen.
What fails in step 2 or 3 is the result. Some seconds for a pattern, kept in a cache (`tokenizer_proof.py`).
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.fast_tokenizer import load_fast_tokenizer

NUM_CODE_POINTS = 0x110000
# What `ByteLevel` splits by where it is told to (use_regex), as GPT-2's published code has it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SURROGATES = range(0xD800, 0xE000)
_CHUNK_CHARACTERS = 4096  # the time that `tokenizers` takes grows faster than a string's length
_SCAN_CHARACTERS = 50_000
_MAX_ATOMS = 62
_MAX_TRIPLES = 30_000
_RELOAD_CODE_POINTS = 1_500_000  # gigatoken never forgets a word: a new tokenizer gives the memory back
_NUM_LONG_TEXTS, _LONG_TEXT_CHARACTERS = 1000, 80
_GROUP = re.compile(r"\((?:\?(?P<flags>i?:|!|=|<!|<=|>))?")
_QUANTIFIER = re.compile(r"[*+?]|\{\d*,?\d*\}")
_ESCAPE = re.compile(r"\\(?:[pP]\{[^}]*\}|[sSdDwWhHrntvf]|x\{[0-9A-Fa-f]+\}|[^A-Za-z0-9])")


def find_atoms(pattern: str) -> list[str]:
    r"""The one-character parts of a regular expression, each a regular expression.

    Args:
        pattern: Regular expression in Oniguruma's syntax, as a `Split` has it.

    Returns:
        Sets, properties, escapes and literals, each once; `(?i:...)` around those that ignore case.

    Raises:
        ValueError: the pattern has something (an anchor, say, or a reference) that looks at more than one character.
    """
    atoms: dict[str, None] = {}
    ignores_case = [False]
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if group := _GROUP.match(pattern, at):
            if pattern.startswith("(?", at) and group["flags"] is None:
                raise ValueError(f"its split pattern has {pattern[at : at + 4]!r}")
            ignores_case.append(ignores_case[-1] or group["flags"] == "i:")
            at = group.end()
            continue
        if character == ")":
            ignores_case.pop()
            at += 1
            continue
        if character == "|":
            at += 1
            continue
        if quantifier := _QUANTIFIER.match(pattern, at):
            at = quantifier.end()
            continue
        if character == "[":
            end = _end_of_set(pattern, at)
        elif character == "\\":
            escape = _ESCAPE.match(pattern, at)
            if escape is None:
                raise ValueError(f"its split pattern has {pattern[at : at + 2]!r}")
            end = escape.end()
        elif character in "^$":
            raise ValueError(f"its split pattern has {character!r}")
        else:
            end = at + 1
        atom, at = pattern[at:end], end
        atoms[atom] = None
        if ignores_case[-1]:
            atoms[f"(?i:{atom})"] = None
    return list(atoms)


def _end_of_set(pattern: str, start: int) -> int:
    """Index behind a bracketed set, which may hold others."""
    depth, at = 0, start
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    raise ValueError(f"its split pattern has an unclosed set {pattern[start : start + 8]!r}")


def classify(patterns: Sequence[str]) -> np.ndarray:
    """A class number for every code point, int64 [0x110000]; -1 for surrogates, which no text has.

    Code points of one class are the same to `tokenizers`, wherever they stand.

    Raises:
        ValueError: a pattern has something that looks at more than one character.
    """
    from tokenizers import NormalizedString, Regex

    code_points = np.array([number for number in range(NUM_CODE_POINTS) if number not in _SURROGATES])
    text = "".join(map(chr, code_points.tolist()))
    chunks = [
        NormalizedString(text[start : start + _CHUNK_CHARACTERS]) for start in range(0, len(text), _CHUNK_CHARACTERS)
    ]
    atoms = dict.fromkeys(atom for pattern in patterns for atom in find_atoms(pattern))
    if len(atoms) > _MAX_ATOMS:
        raise ValueError(f"its split patterns have {len(atoms)} different parts")
    matched_by = np.zeros(NUM_CODE_POINTS, np.int64)  # a bit an atom
    for number, atom in enumerate(atoms):
        expression = Regex(f"{atom}+")
        is_matched = np.ones(NUM_CODE_POINTS, bool)
        for chunk in chunks:
            for rest in chunk.split(expression, "removed"):
                is_matched[_code_points_of(rest.normalized)] = False
        matched_by |= is_matched.astype(np.int64) << number
    kinds = {value: number for number, value in enumerate(dict.fromkeys(matched_by.tolist()))}
    classes = np.fromiter(map(kinds.__getitem__, matched_by.tolist()), np.int64, NUM_CODE_POINTS)
    classes[_SURROGATES.start : _SURROGATES.stop] = -1
    return classes


def _code_points_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def find_parting_code_points(pre_tokenizer: dict[str, Any], patterns: Sequence[str]) -> np.ndarray:
    """The code points at which the two libraries may split differently, bool [0x110000].

    Args:
        pre_tokenizer: Pre-tokenizer as tokenizer.json describes it.
        patterns: Regular expressions of that pre-tokenizer.

    Raises:
        ValueError: the libraries part on characters that nearly every text has, or a pattern cannot be analysed.
    """
    classes = classify(patterns)
    is_parting = np.zeros(NUM_CODE_POINTS, bool)
    while True:  # without the representative of a class that is split differently, until there is none
        representatives = _choose_representatives(classes, is_parting)
        blamed = _compare_sequences(pre_tokenizer, list(representatives.values()))
        if blamed is None:
            break
        if blamed.isascii():
            raise ValueError(f"gigatoken splits texts with {blamed!r} differently")
        is_parting[ord(blamed)] = True
    contexts = _choose_contexts(pre_tokenizer, representatives)
    _compare_ascii(pre_tokenizer, contexts)
    scan = _Scan(pre_tokenizer, contexts, representatives)
    for number in sorted(set(classes[classes >= 0].tolist())):
        members = np.flatnonzero((classes == number) & ~is_parting)
        members = members[members >= 0x80]
        if members.size and number not in representatives:
            is_parting[members] = True  # all that could have stood for it are split differently
            continue
        for low, high in ((0x80, 0x800), (0x800, 0x10000), (0x10000, NUM_CODE_POINTS)):
            part = members[(members >= low) & (members < high)]
            for start in range(0, part.size, _SCAN_CHARACTERS):
                found = scan(number, part[start : start + _SCAN_CHARACTERS])
                is_parting[found] = True
    return is_parting


def _choose_representatives(classes: np.ndarray, is_parting: np.ndarray) -> dict[int, list[str]]:
    """Choose a few members of each class: two of ASCII and the first of each other length in UTF-8, if it has them.

    A member that was split differently leaves its place to one from the middle of its kind.
    """
    found: dict[int, list[str]] = {}
    for number in sorted(set(classes[classes >= 0].tolist())):
        chosen = []
        for low, high in ((0, 0x80), (0x80, 0x800), (0x800, 0x10000), (0x10000, NUM_CODE_POINTS)):
            members = low + np.flatnonzero(classes[low:high] == number)
            whole = members[~is_parting[members]]
            if whole.size == members.size:
                chosen += whole[: 2 if low == 0 else 1].tolist()
            elif whole.size:
                chosen.append(int(whole[whole.size // 2]))
        if chosen:
            found[number] = [chr(code_point) for code_point in chosen]
    return found


def _compare_sequences(pre_tokenizer: dict[str, Any], classes: list[list[str]]) -> str | None:
    """The character to blame if some sequence of these is split differently: the one in most of such sequences."""
    numbers = random.Random(0)
    characters = list(itertools.chain(*classes))
    texts = ["".join(text) for n in (1, 2) for text in itertools.product(characters, repeat=n)]
    outer = list(dict.fromkeys(itertools.chain(*((texts[0], texts[-1]) for texts in classes))))
    if len(outer) ** 3 <= _MAX_TRIPLES:
        texts += ["".join(text) for text in itertools.product(outer, repeat=3)]
    else:  # a pattern with very many classes: a part of the sequences of three
        texts += ["".join(numbers.choices(characters, k=3)) for _ in range(_MAX_TRIPLES)]
    texts += _long_texts(characters, numbers)
    blame: Counter[str] = Counter()
    for merges in _merges_for(characters, numbers):
        for text in _differing(*_probe_tokenizers(pre_tokenizer, merges), texts):
            blame.update(set(text))
    if not blame:
        return None
    others = {character: count for character, count in blame.items() if not character.isascii()}
    # ASCII stands beside everything; it is to blame only where it parts by itself.
    return max(others or blame, key=lambda character: blame[character])


def _long_texts(characters: list[str], numbers: random.Random) -> list[str]:
    """Random texts with runs of a character in them."""
    texts = []
    for _ in range(_NUM_LONG_TEXTS):
        text: list[str] = []
        while len(text) < _LONG_TEXT_CHARACTERS:
            text += [numbers.choice(characters)] * numbers.choice((1, 1, 1, 2, 3, 9, 40))
        texts.append("".join(text))
    return texts


def _merges_for(characters: list[str], numbers: random.Random) -> Iterator[list[tuple[bytes, bytes]]]:
    """Merges of the last byte of any of the characters with the first of any, in a random order and in its reverse.

    A place between two characters shows where they merge; of two merges that compete for a byte, each order does the
    other one. Four of a byte merge too, so that the length of a run of one character shows.
    """
    encoded = [character.encode() for character in characters]
    pairs = list(dict.fromkeys((left[-1:], right[:1]) for left in encoded for right in encoded))
    numbers.shuffle(pairs)
    single = [part for part in encoded if len(part) == 1]
    runs = [(2 * part, part) for part in single] + [(2 * part, 2 * part) for part in single]
    yield pairs + runs
    yield pairs[::-1] + runs


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2's published code defines it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def _probe_tokenizers(pre_tokenizer: dict[str, Any], merges: list[tuple[bytes, bytes]]) -> tuple[Any, Any]:
    """A tokenizer of 256 bytes and these merges, in both libraries. An id below 256 is a byte."""
    from tokenizers import Tokenizer

    symbols = byte_symbols()

    def spell(data: bytes) -> str:
        return "".join(symbols[byte] for byte in data)

    tokens = [spell(bytes([byte])) for byte in range(256)] + [spell(left + right) for left, right in merges]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: number for number, token in enumerate(dict.fromkeys(tokens))},
        "merges": [[spell(left), spell(right)] for left, right in merges],
    }
    content: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None, "model": model}
    content["pre_tokenizer"] = pre_tokenizer
    return Tokenizer.from_str(json_text(content)), load_fast_tokenizer(content)


def _differing(reference: Any, fast: Any, texts: Sequence[str]) -> list[str]:
    """The texts to which the two give other ids."""
    encodings = reference.encode_batch_fast(list(texts), add_special_tokens=False)
    return [
        text for text, encoding in zip(texts, encodings, strict=True) if encoding.ids != fast.encode(text).tolist()
    ]


_Context = tuple[str, str]


def _choose_contexts(pre_tokenizer: dict[str, Any], representatives: dict[int, list[str]]) -> list[_Context]:
    """ASCII surroundings in which the classes show what they are, as far as any shows it."""
    ascii_ = [text for texts in representatives.values() for text in texts[:1] if text.isascii()]
    chosen: list[_Context] = [(" ", ""), ("a", ""), ("1", ""), (".", ""), ("\n", ""), ("", "a"), ("", "1")]
    candidates = [*chosen, *itertools.product(["", *ascii_], ["", *ascii_])]
    splits = _splitter(pre_tokenizer)
    seen = {
        context: [_split_around(splits, texts[-1], context) for texts in representatives.values()]
        for context in dict.fromkeys(candidates)
    }
    groups = list(zip(*(seen[context] for context in chosen), strict=True))
    while True:
        counts = {context: len(set(zip(groups, found, strict=True))) for context, found in seen.items()}
        best = max(counts, key=lambda context: counts[context])
        if counts[best] == len(set(groups)):
            return chosen
        chosen.append(best)
        groups = [(*group, found) for group, found in zip(groups, seen[best], strict=True)]


def _splitter(pre_tokenizer: dict[str, Any]) -> Callable[[str], set[int]]:
    """A function: text -> the characters at which `tokenizers` begins a word."""
    reference, _ = _probe_tokenizers(pre_tokenizer, [])

    def split(text: str) -> set[int]:
        return {start for _, (start, _) in reference.pre_tokenizer.pre_tokenize_str(text)}

    return split


def _split_around(split: Callable[[str], set[int]], character: str, context: _Context) -> tuple[bool, bool]:
    """Whether a word begins with the character, and behind it, in a text of many such contexts in lines."""
    left, right = context
    period = f"{left}{character}{right}\n"
    at = 4 * len(period) + len(left)
    starts = split(period * 9)
    return at in starts, at + 1 in starts


def _compare_ascii(pre_tokenizer: dict[str, Any], contexts: list[_Context]) -> None:
    characters = [chr(byte) for byte in range(0x80)]
    numbers = random.Random(1)
    texts = [left + character + right for left, right in contexts for character in characters]
    texts += [f"a{text}a" for text in texts]
    for merges in _merges_for(characters, numbers):
        for text in _differing(*_probe_tokenizers(pre_tokenizer, merges), texts):
            raise ValueError(f"gigatoken splits texts such as {text!r} differently")


class _Scan:
    """Step 3 of the module: which code points of a class gigatoken does not split like the class's representative."""

    def __init__(
        self, pre_tokenizer: dict[str, Any], contexts: list[_Context], representatives: dict[int, list[str]]
    ) -> None:
        self._pre_tokenizer, self._contexts, self._representatives = pre_tokenizer, contexts, representatives
        self._split = _splitter(pre_tokenizer)
        self._fast: Any = None
        self._num_seen = 0
        sides = {character for context in contexts for character in context if character} | {"\n"}
        # Of a character beyond ASCII the first byte merges with what is before it, the last with what is behind.
        self._merges = [(side.encode(), bytes([byte])) for side in sorted(sides) for byte in range(0xC2, 0xF5)]
        self._merges += [(bytes([byte]), side.encode()) for side in sorted(sides) for byte in range(0x80, 0xC0)]

    def __call__(self, number: int, code_points: np.ndarray) -> np.ndarray:
        """Choose those of `code_points` (of one class, beyond ASCII and all of one length in UTF-8) that differ."""
        representative = self._representatives[number][-1]
        middle_N = _encode_utf8(code_points)
        width = middle_N.shape[1]
        is_wrong = np.zeros(code_points.size, bool)
        for left, right in self._contexts:
            expected = _split_around(self._split, representative, (left, right))
            around = (f"{left}{representative}{right}\n" * 2).encode()
            sides = [np.frombuffer(side.encode(), np.uint8) for side in (left, f"{right}\n")]
            before_N, behind_N = (np.broadcast_to(side, (code_points.size, side.size)) for side in sides)
            middle = np.concatenate([before_N, middle_N, behind_N], axis=1).tobytes()
            ids_T = self._fast_tokenizer(code_points.size).encode(around + middle + around)
            starts_T = np.concatenate([[0], np.cumsum(np.where(ids_T < 256, 1, 2))])
            begins_word = np.zeros(starts_T[-1] + 1, bool)
            begins_word[starts_T] = True
            at = len(around) + len(left) + (len(middle) // code_points.size) * np.arange(code_points.size)
            is_wrong |= (begins_word[at] != expected[0]) | (begins_word[at + width] != expected[1])
        return code_points[is_wrong]

    def _fast_tokenizer(self, num_code_points: int) -> Any:
        self._num_seen += num_code_points
        if self._fast is None or self._num_seen > _RELOAD_CODE_POINTS:
            self._fast, self._num_seen = None, 0
            self._fast = _probe_tokenizers(self._pre_tokenizer, self._merges)[1]
        return self._fast


def _encode_utf8(code_points: np.ndarray) -> np.ndarray:
    """The UTF-8 bytes of code points beyond ASCII that all have the same number of them, uint8 [N, bytes]."""
    width = len(chr(int(code_points[0])).encode())
    rest = [(code_points >> 6 * (width - 1 - at)) & 0x3F | 0x80 for at in range(1, width)]
    first = (code_points >> 6 * (width - 1)) | (0xF00 >> width) & 0xFF
    return np.stack([first, *rest], axis=1).astype(np.uint8)


__all__ = ["GPT2_PATTERN", "byte_symbols", "classify", "find_atoms", "find_parting_code_points"]
