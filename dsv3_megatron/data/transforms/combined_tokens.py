"""Random splitting of tokens that join punctuation and line breaks, against the token boundary bias.

A text that ends in "." where a tokenizer would rather have ".\\n" looks unusual to a model that has only seen the two
joined: few-shot prompts without a last line break suffer. DeepSeek-V3 splits "a certain proportion of such combined
tokens" during training (report, section 4.1; the proportion is not given).

Which tokens: those of the learned vocabulary whose bytes are UTF-8 text of the form

    at most one space, one or more characters of the Unicode classes P or S, one or more of \\r and \\n

as the pre-tokenizer's rule ` ?[\\p{P}\\p{S}]+[\\r\\n]*` makes them. Such a token becomes the ids that the tokenizer
gives the part before the line breaks alone, and those of the line breaks alone (one id each where the vocabulary has
the part as a token, more where it has not). The text stays the same. Added tokens are never split.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv3_megatron.data.transforms.keyed_random import NUMBER_RANGE, DocumentRandom, check_probability, threshold_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LINE_BREAKS = "\r\n"


def _byte_of_symbol() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: printable Latin-1 stands for itself, the other bytes
    in order for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _decode_token(token: str, symbols: Mapping[str, int]) -> str | None:
    """The text of a byte-level token; None if it is none, or if its bytes are not whole characters."""
    try:
        return bytes(symbols[symbol] for symbol in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None


def split_parts(text: str) -> tuple[str, str] | None:
    """The punctuation part and the line-break part of a combined token's text; None if it is no such text."""
    punctuation = text.rstrip(_LINE_BREAKS)
    symbols = punctuation.removeprefix(" ")
    if len(punctuation) == len(text) or not symbols:
        return None
    if all(unicodedata.category(character)[0] in "PS" for character in symbols):
        return punctuation, text[len(punctuation) :]
    return None


@dataclass(frozen=True)
class CombinedTokens:
    """The combined tokens of a vocabulary and their pieces. V ids, R combined tokens, P pieces of all of them.

    Row r's pieces are `pieces_P[starts_R[r] : starts_R[r] + counts_R[r]]`; `row_V` gives an id's row, or -1.
    """

    row_V: np.ndarray
    starts_R: np.ndarray
    counts_R: np.ndarray
    pieces_P: np.ndarray

    def __len__(self) -> int:
        return self.starts_R.size


def find_combined_tokens(tokenizer: Tokenizer) -> CombinedTokens:
    """Find a byte-level tokenizer's combined tokens, and encode their parts as the tokenizer does.

    Args:
        tokenizer: Hugging Face's. One that is not byte-level, or whose pre-tokenizer parts punctuation from line
            breaks, gives an empty table.

    Raises:
        ValueError: a part encoded alone does not decode to itself, so the tokenizer adds or changes text.
    """
    symbols = _byte_of_symbol()
    pieces: list[int] = []
    rows: list[tuple[int, int, int]] = []
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token, token_id in sorted(vocab.items(), key=lambda item: item[1]):
        text = None if token in added else _decode_token(token, symbols)
        parts = split_parts(text) if text is not None else None
        if parts is None:
            continue
        start = len(pieces)
        for part in parts:
            ids = tokenizer.encode(part, add_special_tokens=False).ids
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            if decoded != part:
                raise ValueError(
                    f"split_combined_rate > 0 needs a tokenizer that keeps text as it is, and this one turns {part!r} "
                    f"into {decoded!r} (token {token_id}): remove its normalizer or prefix space, or set the rate to 0"
                )
            pieces.extend(ids)
        rows.append((token_id, start, len(pieces) - start))
    table_R3 = np.array(rows, dtype=np.int64).reshape(-1, 3)
    row_V = np.full(max(vocab.values(), default=-1) + 1, -1, dtype=np.int32)
    row_V[table_R3[:, 0]] = np.arange(len(rows))
    return CombinedTokens(row_V, table_R3[:, 1], table_R3[:, 2], np.array(pieces, dtype=np.int64))


class CombinedTokenSplitter:
    """Replaces occurrences of combined tokens by their pieces; a pure function of a document. Picklable.

    Args:
        tokens: Combined tokens that `find_combined_tokens` found.
        rate: Probability of each occurrence. With 0 the arrays come back as they are.
        seed: Chooses the occurrences, together with the document's text.

    Raises:
        ValueError: the rate is no probability, the seed is out of range, or the rate is above 0 without any token.
    """

    def __init__(self, tokens: CombinedTokens, *, rate: float, seed: int = 1234) -> None:
        check_probability("split_combined_rate", rate)
        self._random = DocumentRandom(seed, "combined tokens")
        if rate > 0 and not len(tokens):
            raise ValueError(
                f"split_combined_rate={rate} needs tokens that join punctuation and line breaks, and the tokenizer has "
                "none: set the rate to 0, or make one that has them with dsv3 train-tokenizer"
            )
        self.tokens = tokens
        self.rate = rate

    def split_documents(
        self, ids_T: np.ndarray, lengths_D: np.ndarray, texts: Sequence[str | bytes]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Split in several documents at once; what else is in the batch makes no difference to a document.

        Args:
            ids_T: Ids of the documents one after the other, each below the vocabulary's size.
            lengths_D: Ids of each document, with sum T.
            texts: The text of each document, as str or UTF-8 bytes: its hash chooses among the occurrences, in order.

        Returns:
            Ids (of ids_T's dtype) and lengths after splitting; decoded, they give the same texts.
        """
        assert len(texts) == lengths_D.size, "one text a document"
        if not self.rate:
            return ids_T, lengths_D
        row_T = self.tokens.row_V[ids_T]
        places_C = np.flatnonzero(row_T >= 0)
        if not places_C.size:
            return ids_T, lengths_D
        document_C = np.searchsorted(np.cumsum(lengths_D), places_C, side="right")
        places_S = places_C[self._choose(document_C, texts)]
        return self._replace(ids_T, lengths_D, places_S, row_T[places_S])

    def _choose(self, document_C: np.ndarray, texts: Sequence[str | bytes]) -> np.ndarray:
        """Which of the occurrences to split; those of one document are next to each other."""
        threshold = threshold_of(self.rate)
        if threshold >= NUMBER_RANGE:
            return np.ones(document_C.size, dtype=bool)
        documents, counts = np.unique(document_C, return_counts=True)
        drawn = b"".join(
            self._random.draw_bytes(texts[document], count)
            for document, count in zip(documents.tolist(), counts.tolist(), strict=True)
        )
        return np.frombuffer(drawn, dtype="<u8") < np.uint64(threshold)

    def _replace(
        self, ids_T: np.ndarray, lengths_D: np.ndarray, places_S: np.ndarray, row_S: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put row_S's pieces where places_S are."""
        counts_S = self.tokens.counts_R[row_S]
        counts_T = np.ones(ids_T.size, dtype=np.int64)
        counts_T[places_S] = counts_S
        split_T = np.repeat(ids_T, counts_T)
        growth_S1 = np.concatenate(([0], np.cumsum(counts_S - 1)))  # ids gained before each split, and in all
        # Piece k of a token goes k places behind where the token itself now stands.
        within_P = np.arange(counts_S.sum()) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
        targets_P = np.repeat(places_S + growth_S1[:-1], counts_S) + within_P
        split_T[targets_P] = self.tokens.pieces_P[np.repeat(self.tokens.starts_R[row_S], counts_S) + within_P]
        bounds_D1 = np.concatenate(([0], np.cumsum(lengths_D)))
        return split_T, lengths_D + np.diff(growth_S1[np.searchsorted(places_S, bounds_D1)])
