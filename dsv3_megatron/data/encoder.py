"""The seam between text and token ids: gigatoken where it is proven equal to Hugging Face's tokenizers, else those.

gigatoken (PyPI) encodes byte-level BPE two orders of magnitude faster than `tokenizers`. It is trusted for a tokenizer
and an input only after both gave the same ids for a set of hard cases and for a sample of that very input
(`prove_equal`); whatever it cannot load or gets wrong goes through `tokenizers`, and the reason is said.

Nothing heavy is imported here before it is used: preprocessing starts in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv3_megatron.data.tokenizer import count_ids, find_eod_id, fingerprint, load_tokenizer, tokenizer_file

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


class Encoder(Protocol):
    """What preprocessing needs from a tokenizer; `vocab_size` is the largest id + 1, `eod_id` ends a document."""

    name: str
    vocab_size: int
    eod_id: int
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

    No beginning-of-sentence token is added, whatever tokenizer_config.json says (Megatron-LM's HuggingFaceTokenizer
    follows that file).

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
        self.fingerprint = fingerprint(path)

    def encode(self, text: str) -> np.ndarray:
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def encode_pieces(self, text: str | bytearray) -> Iterator[np.ndarray]:
        yield self.encode(text if isinstance(text, str) else text.decode("utf-8"))

    def limit_memory(self) -> None:
        pass


class GigatokenEncoder:
    """gigatoken on the calling thread, with its cache bounded. Ids are those of `reference` or `prove_equal` says so.

    Args:
        path: Folder with a tokenizer.json, or the file.
        reference: The same tokenizer through `tokenizers`.
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
        content = json.loads(Path(tokenizer_file(path)).read_text(encoding="utf-8"))
        self._is_cut_safe = _is_cut_safe(content)
        self._max_cache_bytes = max_cache_bytes
        self._json = json.dumps(content, ensure_ascii=False).encode("utf-8")
        try:
            self._load()
        except ValueError:
            if not _spell_line_breaks_out(content):
                raise
            self._json = json.dumps(content, ensure_ascii=False).encode("utf-8")
            self._load()
        self.vocab_size, self.eod_id, self.fingerprint = reference.vocab_size, reference.eod_id, reference.fingerprint

    def _load(self) -> None:
        try:
            from gigatoken import gigatoken_rs
        except ImportError as error:
            raise ValueError(f"gigatoken is not installed ({error}): pip install gigatoken") from None
        if hasattr(gigatoken_rs, "set_max_cache_bytes"):  # releases after 0.10.0
            gigatoken_rs.set_max_cache_bytes(self._max_cache_bytes)
        self._tokenizer: Any = None  # the old one first: two would double the peak
        try:
            self._tokenizer = gigatoken_rs.load_hf_json(self._json)
        except Exception as error:  # noqa: BLE001 - the library raises what its parts raise
            raise ValueError(f"gigatoken cannot load it: {' '.join(str(error).split())[:200]}") from None
        self._memory_at_start = _resident_bytes()

    def encode(self, text: str) -> np.ndarray:
        ids_T: np.ndarray = self._tokenizer.encode(text)
        return ids_T

    def encode_pieces(self, text: str | bytearray) -> Iterator[np.ndarray]:
        if len(text) <= PIECE_BYTES or not self._is_cut_safe:
            yield self._tokenizer.encode(text if isinstance(text, str) else bytes(text))
            return
        for piece in cut_text(text):
            yield self._tokenizer.encode(piece)
            self.limit_memory()

    def limit_memory(self) -> None:
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


def prove_equal(encoder: Encoder, reference: Encoder, samples: Iterable[tuple[str, str]]) -> str | None:
    """Compare two encoders on the probe texts and on samples of the input.

    Args:
        encoder: The one to be trusted.
        reference: The one that is right.
        samples: (where it is from, text) pairs.

    Returns:
        None if all ids are equal, else the first difference in words.
    """
    probes = (("a probe text", text) for text in PROBE_TEXTS)
    for source in (probes, samples):
        for where, text in source:
            ours_T, theirs_T = encoder.encode(text), reference.encode(text)
            if not np.array_equal(ours_T, theirs_T):
                common = min(ours_T.size, theirs_T.size)
                differs = np.flatnonzero(ours_T[:common] != theirs_T[:common])
                at = int(differs[0]) if differs.size else common
                return f"other ids than tokenizers for {where}, from token {at}"
    return None


def choose_encoder(
    path: str | os.PathLike[str], samples: Iterable[tuple[str, str]], *, backend: str = "auto"
) -> tuple[Encoder, str]:
    """The fastest encoder that gives Hugging Face's ids, and why it was chosen.

    Args:
        path: Folder with a tokenizer.json, or the file.
        samples: (where it is from, text) pairs of the input.
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
        encoder = GigatokenEncoder(path, reference)
        difference = prove_equal(encoder, reference, samples)
        if difference is None:
            return encoder, "the same ids as tokenizers on the probe texts and on a sample of every input"
        why = f"gigatoken gave {difference}"
    except ValueError as error:
        why = str(error)
    if backend == "gigatoken":
        raise ValueError(f"tokenizer_backend=gigatoken cannot be used: {why}; use auto or huggingface")
    return reference, why


def _spell_line_breaks_out(content: dict[str, Any]) -> bool:
    r"""Write \r and \n in split patterns as the characters they stand for; whether there were any.

    gigatoken knows patterns by their text, and DeepSeek-V3's published one has the characters themselves.
    """
    is_changed = False

    def visit(node: Any) -> None:
        nonlocal is_changed
        if isinstance(node, dict):
            pattern = node.get("pattern")
            if node.get("type") == "Split" and isinstance(pattern, dict) and "Regex" in pattern:
                spelled = re.sub(
                    r"\\(.)", lambda m: {"r": "\r", "n": "\n"}.get(m[1], m[0]), pattern["Regex"], flags=re.DOTALL
                )
                is_changed |= spelled != pattern["Regex"]
                pattern["Regex"] = spelled
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(content.get("pre_tokenizer"))
    return is_changed


def _is_cut_safe(content: dict[str, Any]) -> bool:
    """Whether `cut_text` keeps the ids: byte-level BPE, no normalizer, nothing added or matched across white space."""
    if content.get("normalizer") is not None or content.get("model", {}).get("byte_fallback"):
        return False
    if '"add_prefix_space": true' in json.dumps(content.get("pre_tokenizer")):
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
