"""The seam between text and token ids: gigatoken where it is proven equal to Hugging Face's tokenizers, else those.

gigatoken (PyPI) encodes byte-level BPE two orders of magnitude faster than `tokenizers`, whose ids are the right ones.
`tokenizer_proof.py` finds out, once a tokenizer, in which texts the two can part; a text of that kind goes through
`tokenizers`, every other through gigatoken (`RoutedEncoder`). A tokenizer that gigatoken cannot load or does not do in
full goes through `tokenizers` altogether, and the reason is said.

Nothing heavy is imported here before it is used: preprocessing starts in a fraction of a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.fast_tokenizer import bound_cache, load_fast_tokenizer
from dsv3_megatron.data.folder_checksums import require_whole
from dsv3_megatron.data.special_tokens import read_special_tokens
from dsv3_megatron.data.tokenizer import count_ids, find_eod_id, fingerprint, load_tokenizer, tokenizer_file
from dsv3_megatron.data.tokenizer_proof import Parting, PartingScan, find_parting

BACKENDS = ("auto", "gigatoken", "huggingface")
# gigatoken caches the ids of every word it has seen and never forgets: 75 MB for 10 MB of random letters. When a
# worker's memory has grown by this much its tokenizer is made anew (0.2 s), which gives the memory back.
MAX_CACHE_BYTES = 64_000_000
# A text beyond this is encoded in pieces where that gives the same ids.
PIECE_BYTES = 8_000_000
# Where two lower-case letters are followed by a space or a line break and then a letter, every byte-level BPE split
# pattern in use (GPT-2, cl100k, o200k, DeepSeek-V3, Qwen, Kimi, ...) ends a word, whatever surrounds it: the space
# starts the next word, the single line break is a word of its own. Likewise a line break between two Chinese
# characters, the first of which may be the full stop (UTF-8 bytes of U+3002 and U+5000 to U+8FFF).
_SAFE_CUT = re.compile(
    rb"[a-z]{2}(?: (?=[A-Za-z])|\n(?=[A-Za-z]))"
    rb"|(?:\xe3\x80\x82|[\xe5-\xe8][\x80-\xbf]{2})\n(?=[\xe5-\xe8])"
)
PROBE_TEXTS = (
    "",
    " ",
    "\n\n \t\n",
    "a",
    "Hello, world!\n\nIt's 12345678 o'clock;  isn't it?\r\n\tYes -- (1.5e-3)...\n",
    "def f(x):\n    return {'a': [x, -1], \"b\": x**2}  # comment\n\n\nclass A: pass\n",
    "价格是１２３元。東京で会いましょう。カタカナ・ひらがなー ゛一龥",
    "naïve café Ünïcödé ἄνθρωπος Привет мир שלום مرحبا नमस्ते ภาษาไทย 한국어",
    "e\u0301 a\u0308\u0304 \u200b\u00a0\u2028\u2029\u3000\ufeff \u0000\u0001\u007f\u0085 \ufffd\U0010ffff",
    "👍🏽 👨‍👩‍👧 🇫🇷 ∑∫√≠ ½Ⅷ² ©®™ „quotes“ «guillemets» …—–",
    "!!!\n\n...\r\n\r\n;;;\n{}\n  }\n)\n,\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 0000000000000000000",
    "<|endoftext|> <s></s> <｜begin▁of▁sentence｜>x<｜end▁of▁sentence｜> <｜fim▁hole｜><｜User｜>",
)


class EncodingError(ValueError):
    """A text to which the tokenizer gives no ids; the message says why."""


class Encoder(Protocol):
    """What preprocessing needs from a tokenizer.

    `vocab_size` is the largest id + 1, `eod_id` ends a document; `begin_ids` and `end_ids` are what the tokenizer puts
    before and behind a text, which `encode` leaves out.
    """

    name: str
    vocab_size: int
    eod_id: int
    begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, no token added; special tokens written in the text become their ids."""
        ...

    def encode_pieces(self, text: str | bytearray) -> Iterator[np.ndarray]:
        """Ids of one text (str, or UTF-8), in pieces. Together they are those of `encode`."""
        ...

    def limit_memory(self) -> None:
        """Give back what caches have taken, if it is too much; called between blocks."""
        ...


class HuggingFaceEncoder:
    """Hugging Face `tokenizers`, one thread: the reference.

    Args:
        path: Folder with a tokenizer.json, or the file.

    Raises:
        ValueError: the tokenizer is missing or broken.
    """

    name = "huggingface"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the work; forked threads would hang
        self._tokenizer = load_tokenizer(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = count_ids(self._tokenizer)
        self.eod_id = find_eod_id(self._tokenizer, path)
        special = read_special_tokens(self._tokenizer, tokenizer_file(path))
        self.begin_ids, self.end_ids = special.begin_ids, special.end_ids
        self.fingerprint = fingerprint(path)

    def encode(self, text: str) -> np.ndarray:
        """Give the ids of a text, uint32 [T]; raises EncodingError where the library cannot."""
        return np.array(self._call(self._tokenizer.encode_batch_fast, text).ids, dtype=np.uint32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, and where each lies in it.

        Args:
            text: Text to encode; no token is added to it.

        Returns:
            uint32 [T]; and int64 [T, 2], the [first, stop) characters of each.

        Raises:
            EncodingError: the library cannot encode it.
        """
        encoding = self._call(self._tokenizer.encode_batch, text)
        return np.array(encoding.ids, dtype=np.uint32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def _call(self, encode: Callable[..., Any], text: str) -> Any:
        try:
            (encoding,) = encode([text], add_special_tokens=False)
        except BaseException as error:
            # Not an Exception: what its Rust code does at a run of over ten million spaces, say.
            if type(error).__name__ != "PanicException":
                raise
            raise EncodingError(f"tokenizers gives it no ids ({error})") from None
        return encoding

    def encode_pieces(self, text: str | bytearray) -> Iterator[np.ndarray]:
        """Yield the ids of a text, uint32 [T], in one piece."""
        yield self.encode(text if isinstance(text, str) else text.decode("utf-8"))

    def limit_memory(self) -> None:
        """Do nothing: the library keeps no cache that grows."""


class GigatokenEncoder:
    """gigatoken on the calling thread, with its cache bounded. Ids are those of `reference` for most texts only.

    Args:
        path: Folder with a tokenizer.json, or the file.
        reference: Encoder of the same tokenizer through `tokenizers`.
        max_cache_bytes: Growth of this process's memory after which the cache is dropped.

    Raises:
        ValueError: gigatoken is not installed or cannot load this tokenizer; says why.
    """

    name = "gigatoken"

    def __init__(
        self,
        path: str | os.PathLike[str],
        reference: Encoder,
        *,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        file = tokenizer_file(path)
        require_whole(file)
        self.content = read_json_object(file)
        self.is_cut_safe = _is_cut_safe(self.content)
        self._max_cache_bytes = max_cache_bytes
        self._load()
        self.vocab_size, self.eod_id, self.fingerprint = reference.vocab_size, reference.eod_id, reference.fingerprint
        self.begin_ids, self.end_ids = reference.begin_ids, reference.end_ids

    def _load(self) -> None:
        self._tokenizer: Any = None  # the old one first: two would double the peak
        self._tokenizer = load_fast_tokenizer(self.content)
        bound_cache(self._max_cache_bytes)
        self._memory_at_start = _resident_bytes()

    def encode(self, text: str) -> np.ndarray:
        """Give the ids of a text [T]."""
        ids_T: np.ndarray = self._tokenizer.encode(text)
        return ids_T

    def encode_pieces(self, text: str | bytearray) -> Iterator[np.ndarray]:
        """Yield the ids of a text in pieces [T]; a long one is cut where that leaves the ids as they are."""
        if len(text) <= PIECE_BYTES or not self.is_cut_safe:
            yield self._tokenizer.encode(text if isinstance(text, str) else bytes(text))
            return
        for piece in cut_text(text):
            yield self._tokenizer.encode(piece)
            self.limit_memory()

    def limit_memory(self) -> None:
        """Drop the cache if the process has grown by more than `max_cache_bytes` since it was loaded."""
        if _resident_bytes() - self._memory_at_start > self._max_cache_bytes:
            self._load()


def cut_text(text: str | bytearray, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """UTF-8 pieces of about `piece_bytes`, cut where every byte-level BPE tokenizer starts a new word anyway.

    Where a text has no such place (see _SAFE_CUT) the piece goes on to the next one. Joined, the pieces are the text.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    start = 0
    while len(data) - start > piece_bytes:
        match = _SAFE_CUT.search(data, start + piece_bytes)
        if match is None:
            break
        cut = match.end() - (data[match.end() - 1] == 0x20)  # before the space, or after the line break
        yield bytes(data[start:cut])
        start = cut
    yield bytes(data[start:])


class RoutedEncoder:
    """gigatoken for the texts in which it cannot part from `tokenizers`, `tokenizers` for the others.

    Which of the two encodes a text depends on that text alone.

    Args:
        fast: Encoder that uses gigatoken.
        reference: Encoder of the same tokenizer through `tokenizers`.
        parting: Texts for which the two can give different ids.
    """

    name = "gigatoken"

    def __init__(self, fast: GigatokenEncoder, reference: Encoder, parting: Parting) -> None:
        self._fast, self._reference = fast, reference
        self._is_for_reference = PartingScan(parting)
        self.vocab_size, self.eod_id, self.fingerprint = reference.vocab_size, reference.eod_id, reference.fingerprint
        self.begin_ids, self.end_ids = reference.begin_ids, reference.end_ids

    def encode(self, text: str) -> np.ndarray:
        """Give the ids of a text [T], by the encoder that the text is for."""
        return self._reference.encode(text) if self._is_for_reference(text) else self._fast.encode(text)

    def encode_pieces(self, text: str | bytearray) -> Iterator[np.ndarray]:
        """Yield the ids of a text in pieces [T]; a long one is cut where that leaves the ids as they are, and each
        piece goes to the encoder that it is for.
        """
        if len(text) <= PIECE_BYTES or not self._fast.is_cut_safe:
            yield self.encode(text if isinstance(text, str) else text.decode("utf-8"))
            return
        for piece in cut_text(text):  # where a cut keeps the ids, each piece is a text of its own
            yield self.encode(piece.decode("utf-8"))
            self.limit_memory()

    def limit_memory(self) -> None:
        """Drop gigatoken's cache if it has grown too large."""
        self._fast.limit_memory()


def find_difference(encoder: Encoder, reference: Encoder) -> str | None:
    """The first difference of two encoders on the probe texts, in words; None if there is none."""
    for text in PROBE_TEXTS:
        ours_T, theirs_T = encoder.encode(text), reference.encode(text)
        if not np.array_equal(ours_T, theirs_T):
            common = min(ours_T.size, theirs_T.size)
            differs = np.flatnonzero(ours_T[:common] != theirs_T[:common])
            at = int(differs[0]) if differs.size else common
            return f"other ids than tokenizers for a probe text, from token {at}"
    return None


def choose_encoder(path: str | os.PathLike[str], *, backend: str = "auto") -> tuple[Encoder, str]:
    """The fastest encoder that gives Hugging Face's ids for every text, and why it was chosen.

    Args:
        path: Folder with a tokenizer.json, or the file.
        backend: "auto", or one that must be used.

    Raises:
        ValueError: the tokenizer is missing or broken, or the backend that was named cannot be used.
    """
    if backend not in BACKENDS:
        raise ValueError(f"tokenizer_backend={backend!r} must be one of {', '.join(BACKENDS)}")
    reference = HuggingFaceEncoder(path)
    if backend == "huggingface":
        return reference, "asked for"
    try:
        fast = GigatokenEncoder(path, reference)
        parting = find_parting(fast.content, reference.fingerprint, reference.encode, fast.encode)
        encoder = RoutedEncoder(fast, reference, parting)
        difference = find_difference(encoder, reference)
        if difference is None:
            return encoder, _describe(parting)
        why = f"gigatoken gave {difference}"
    except ValueError as error:
        why = str(error)
    if backend == "gigatoken":
        raise ValueError(f"tokenizer_backend=gigatoken cannot be used: {why}; use auto or huggingface")
    return reference, why


def _describe(parting: Parting) -> str:
    kinds = [(parting.num_code_points, "code point"), (len(parting.contents), "added token")]
    named = [f"any of {count} {kind}s" if count > 1 else f"one {kind}" for count, kind in kinds if count]
    left = f"; texts with {' or '.join(named)} go through tokenizers" if named else ""
    return f"the ids of tokenizers for every text{left}"


def _is_cut_safe(content: dict[str, Any]) -> bool:
    """Whether `cut_text` keeps the ids: byte-level BPE, no normalizer, nothing added or matched across white space."""
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("normalizers") != []:
        return False
    if content.get("model", {}).get("byte_fallback"):
        return False
    if '"add_prefix_space": true' in json_text(content.get("pre_tokenizer")):
        return False
    tokens = content.get("added_tokens") or []
    return not any(t.get("lstrip") or t.get("rstrip") or re.search(r"\s", str(t.get("content"))) for t in tokens)


def _resident_bytes() -> int:
    """Memory of this process that lies in RAM; 0 where the system does not say (the cache then stays)."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
