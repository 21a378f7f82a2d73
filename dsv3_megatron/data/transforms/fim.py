"""Fill-in-the-middle on whole documents, before packing, and its inverse.

A share of the documents is cut in three and put in another order, so that a model learns to write the middle from what
stands on both sides. With DeepSeek-V3's three sentinels (begin, hole, end):

    PSM   <begin> prefix <hole> suffix <end> middle        DeepSeek-V3 report, section 4.1
    SPM   <begin> <hole> suffix <end> prefix middle        Bavarian et al. 2022, arXiv:2207.14255, SPM variant 2

with <begin>, <hole> and <end> in the places of that paper's <PRE>, <SUF> and <MID>. In SPM nothing marks where the
prefix ends and the middle begins, so it cannot be told from PSM with an empty prefix, and need not be: both restore the
same document. The end-of-document token comes after either, from whoever writes the tokens.

The rules of a cut:
- Both positions are uniform on 0 .. n of a text of n characters (code points), independently; the smaller is the first.
  A part may therefore be empty, as in Bavarian et al.
- A position is between code points, never inside one. One that falls between a carriage return and its line feed moves
  behind the line feed: no editor's cursor stands there. Other sequences of code points (an emoji with its modifiers, a
  letter with combining marks) may be cut.
- A text of fewer than MIN_CHARACTERS characters stays as it is: it has no three parts.
- A text in which a sentinel is spelled out stays as it is: encoded, the spelling becomes the sentinel's own id in most
  tokenizers, and the cut could no longer be undone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from dsv3_megatron.config.json_files import read_json_object
from dsv3_megatron.data.folder_checksums import require_whole
from dsv3_megatron.data.tokenizer import FIM_BEGIN_TOKEN, FIM_END_TOKEN, FIM_HOLE_TOKEN
from dsv3_megatron.data.transforms.keyed_random import NUMBER_RANGE, DocumentRandom, check_probability, threshold_of

MIN_CHARACTERS = 3
DEFAULT_SENTINEL_NAMES = (FIM_BEGIN_TOKEN, FIM_HOLE_TOKEN, FIM_END_TOKEN)


@dataclass(frozen=True)
class FimOptions:
    """How many documents are cut and how.

    Args:
        rate: Share of the documents that are cut; the report's is 0.1.
        spm_rate: Share of those in the SPM form, the others being PSM; the report has none.
        seed: Chooses documents, positions and forms.

    Raises:
        ValueError: a rate outside 0..1, or a seed out of range.
    """

    rate: float
    spm_rate: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        check_probability("fim_rate", self.rate)
        check_probability("fim_spm_rate", self.spm_rate)
        DocumentRandom(self.seed, "fim")


@dataclass(frozen=True)
class FimSentinels:
    """The three sentinels' ids, and their spellings in `names` (begin, hole, end)."""

    begin_id: int
    hole_id: int
    end_id: int
    names: tuple[str, str, str]


class FimForm(Enum):
    """What became of a document. Those chosen and yet left as they are have a name of their own, to be counted."""

    PLAIN = "not chosen"
    PSM = "prefix, suffix, middle"
    SPM = "suffix, prefix, middle"
    TOO_SHORT = "left as it is: too short to cut"
    SPELLS_SENTINEL = "left as it is: spells a sentinel"


class FimDocument(NamedTuple):
    """A document's parts in order, each an id (a sentinel) or a text to be encoded on its own. No text is empty, except
    that an empty document is one empty text."""

    form: FimForm
    parts: tuple[int | str, ...]


def _keep_line_break(text: str, position: int) -> int:
    is_inside_line_break = 0 < position < len(text) and text[position] == "\n" and text[position - 1] == "\r"
    return position + is_inside_line_break


@dataclass(frozen=True)
class FimTransform:
    """Cuts documents; a pure function of the text. Made once, sent to every worker.

    Args:
        options: Rates and seed.
        sentinels: Ids of the three marks, as `find_fim_sentinels` found them.
    """

    options: FimOptions
    sentinels: FimSentinels
    _random: DocumentRandom = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_random", DocumentRandom(self.options.seed, "fim"))

    def __call__(self, text: str) -> FimDocument:
        """The parts to encode, in order. With a rate of 0 nothing is hashed."""
        if not self.options.rate:
            return FimDocument(FimForm.PLAIN, (text,))
        choice, form, *cuts = self._random.draw(text, 4)
        if choice >= threshold_of(self.options.rate):
            return FimDocument(FimForm.PLAIN, (text,))
        if len(text) < MIN_CHARACTERS:
            return FimDocument(FimForm.TOO_SHORT, (text,))
        if any(name in text for name in self.sentinels.names):
            return FimDocument(FimForm.SPELLS_SENTINEL, (text,))
        # u * (n + 1) / 2**64, rounded down: of n + 1 positions none is favoured by more than n / 2**64.
        first, second = sorted(_keep_line_break(text, cut * (len(text) + 1) // NUMBER_RANGE) for cut in cuts)
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        marks = self.sentinels
        parts: tuple[int | str, ...]
        if form < threshold_of(self.options.spm_rate):
            parts = (marks.begin_id, marks.hole_id, suffix, marks.end_id, prefix, middle)
            return FimDocument(FimForm.SPM, tuple(part for part in parts if part != ""))
        parts = (marks.begin_id, prefix, marks.hole_id, suffix, marks.end_id, middle)
        return FimDocument(FimForm.PSM, tuple(part for part in parts if part != ""))


def invert_fim(ids: Sequence[int], sentinels: FimSentinels) -> tuple[list[int], list[int], list[int]]:
    """Undo the transform on a document's ids, those of the end-of-document token left off.

    Args:
        ids: One document. It need not have been cut.
        sentinels: Ids of the marks that the document was cut with.

    Returns:
        The ids of prefix, suffix and middle. The document's text is prefix + middle + suffix, each decoded on its own
        or their ids joined in that order. An SPM document has its prefix at the head of the middle, and an uncut
        document is all prefix.

    Raises:
        ValueError: sentinels that are not one of each in order, the first at the start.
    """
    ids = [int(token) for token in ids]
    marks = (sentinels.begin_id, sentinels.hole_id, sentinels.end_id)
    places = [(place, token) for place, token in enumerate(ids) if token in marks]
    if not places:
        return ids, [], []
    (begin, *_) = places[0]
    if tuple(token for _, token in places) != marks or begin != 0:
        found = ", ".join(f"{sentinels.names[marks.index(token)]} at {place}" for place, token in places)
        raise ValueError(
            f"FIM sentinels must be {', '.join(sentinels.names)} in that order, once each, the first at position 0 "
            f"of a document; found {found}: give one document that FimTransform cut"
        )
    hole, end = places[1][0], places[2][0]
    return ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]


def _read_vocab(path: Path) -> dict[str, int]:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        require_whole(file)
        content = read_json_object(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): give a folder with a tokenizer.json") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    vocab = content.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
        vocab = {entry[0]: token_id for token_id, entry in enumerate(vocab)}
    return vocab | {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}


def find_fim_sentinels(
    tokenizer: str | os.PathLike[str] | Mapping[str, int], names: Sequence[str] | None = None
) -> FimSentinels:
    """Look the sentinels up in a tokenizer.

    Args:
        tokenizer: Folder with a tokenizer.json, the file, or a vocabulary (token -> id, added tokens included).
        names: Spellings of begin, hole and end; None takes DeepSeek-V3's.

    Raises:
        ValueError: the file cannot be read, names are not three different ones, or the vocabulary lacks one.
    """
    names = tuple(DEFAULT_SENTINEL_NAMES if names is None else names)
    if len(set(names)) != 3 or len(names) != 3 or not all(names):
        raise ValueError(f"fim_sentinels={list(names)} must be three different tokens: begin, hole and end")
    vocab = tokenizer if isinstance(tokenizer, Mapping) else _read_vocab(Path(tokenizer))
    missing = [name for name in names if name not in vocab]
    if missing:
        alike = sorted(token for token in vocab if "fim" in token.lower() and token.startswith("<"))
        hint = f"it has {', '.join(alike)}: name begin, hole and end among them" if alike else "it has none like it"
        where = "the vocabulary" if isinstance(tokenizer, Mapping) else os.fspath(tokenizer)
        raise ValueError(
            f"fim_rate > 0 needs the sentinels {', '.join(missing)}, which {where} lacks ({hint}); "
            "make a tokenizer that has them with dsv3 train-tokenizer, or set fim_rate to 0"
        )
    begin, hole, end = names
    return FimSentinels(vocab[begin], vocab[hole], vocab[end], (begin, hole, end))
