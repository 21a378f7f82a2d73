"""Documents to sentences with NLTK's Punkt, as Megatron-LM's --split-sentences does it, without its traps.

What is the same: texts are split in runs of 1,000,000 characters, by the Punkt model of the language if NLTK's data is
installed (either layout, `punkt_tab` or the older `punkt`). What is not:

- Nothing is downloaded. Without installed data, Punkt (which is unsupervised: Kiss and Strunk 2006) learns its model
  from a sample of the corpus itself. The splitter says which of the two it has, with a hash of the model's content.
- `keep_newlines` gives every sentence the white space behind it, so that the sentences joined are the document.
  Megatron-LM keeps it by another regular expression, which loses white space behind closing quotes and at the
  document's end, and takes a time that grows with the square of a word's length (4 s for 20,000 letters).
- Recent NLTK bounds the seconds of a regular expression and gives up on long texts, so that a result would depend on
  the machine's load. Punkt's expressions take a time proportional to the text's length, so here they have no bound.
- Looking words up does not make the model grow.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.process.unpickling import load_listed

MAX_RUN_CHARACTERS = 1_000_000  # Megatron-LM's
DEFAULT_SAMPLE_CHARACTERS = 2_000_000  # about 4 s of learning
_LEGACY_GLOBALS = frozenset(
    {
        ("nltk.tokenize.punkt", "PunktSentenceTokenizer"),
        ("nltk.tokenize.punkt", "PunktParameters"),
        ("nltk.tokenize.punkt", "PunktLanguageVars"),
        ("nltk.tokenize.punkt", "PunktToken"),
        ("collections", "defaultdict"),
        ("builtins", "int"),
        ("builtins", "set"),
        ("__builtin__", "int"),
        ("__builtin__", "set"),
        ("copy_reg", "_reconstructor"),
        ("copyreg", "_reconstructor"),
        ("builtins", "object"),
        ("__builtin__", "object"),
    }
)


@dataclass(frozen=True)
class PunktModel:
    """What Punkt knows of a language, in plain types, and a line for the log and the sidecar on where it comes from."""

    abbreviations: frozenset[str]
    collocations: frozenset[tuple[str, str]]
    sentence_starters: frozenset[str]
    orthographic_contexts: dict[str, int]
    origin: str

    @property
    def description(self) -> str:
        """Origin and the first digits of a hash of the model; equal lines mean equal models."""
        content = repr(
            (
                sorted(self.abbreviations),
                sorted(self.collocations),
                sorted(self.sentence_starters),
                sorted((word, flags) for word, flags in self.orthographic_contexts.items() if flags),
            )
        )
        return f"{self.origin}, model {hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def _model_of(parameters: Any, origin: str) -> PunktModel:
    return PunktModel(
        frozenset(parameters.abbrev_types),
        frozenset((first, second) for first, second in parameters.collocations),
        frozenset(parameters.sent_starters),
        dict(parameters.ortho_context),
        origin,
    )


def _find_data(name: str) -> Any:
    """NLTK's pointer to a resource in its local folders; None if it is not there. Never a download."""
    from nltk.data import find

    try:
        return find(name)
    except LookupError:
        return None


def load_installed_model(language: str = "english") -> PunktModel | None:
    """The Punkt model of a language from NLTK's local data; None if it is not installed.

    Args:
        language: Name of the language as NLTK names its models; Megatron-LM's --lang.

    Raises:
        ValueError: a name that no model can have, or installed data that is damaged or that NLTK refuses to read.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", language):
        raise ValueError(f"lang={language!r} must be the name of a Punkt model: letters, digits, - and _; try english")
    from nltk.tokenize import punkt

    try:
        folder = _find_data(f"tokenizers/punkt_tab/{language}/")
        if folder is not None:
            return _model_of(punkt.load_punkt_params(folder), f"installed Punkt model {language} (punkt_tab)")
        names = (f"tokenizers/punkt/PY3/{language}.pickle", f"tokenizers/punkt/{language}.pickle")
        file = _find_data(names[0]) or _find_data(names[1])
        if file is not None:
            with file.open() as stream:
                loaded = load_listed(stream, lambda *names: names in _LEGACY_GLOBALS, "Punkt model")
            return _model_of(getattr(loaded, "_params", loaded), f"installed Punkt model {language} (punkt)")
    except Exception as error:  # whatever a damaged file makes NLTK or pickle raise
        raise ValueError(
            f"the installed Punkt data for lang={language} cannot be used ({type(error).__name__}: {error}): "
            "repair it, or remove it so that a model is learned from the corpus"
        ) from error
    return None


def train_model(texts: Iterable[str], *, max_characters: int = DEFAULT_SAMPLE_CHARACTERS) -> PunktModel:
    """Learn a Punkt model from a sample of the corpus.

    Args:
        texts: The sample, in an order that does not depend on workers or shards: the model depends on it. Read no
            further than max_characters.
        max_characters: Bound on the text learned from; the last text is cut there.

    Raises:
        ValueError: max_characters below 1, or no text but white space.
    """
    if max_characters < 1:
        raise ValueError(f"max_characters={max_characters} must be at least 1; try {DEFAULT_SAMPLE_CHARACTERS}")
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer(lang_vars=_make_language_variables())
    num_texts = num_characters = 0
    for text in texts:
        sample = text[: max_characters - num_characters]
        if sample.strip():
            trainer.train(sample, finalize=False)
            num_texts += 1
            num_characters += len(sample)
        if num_characters >= max_characters:
            break
    if not num_texts:
        raise ValueError("no text to learn a Punkt model from: the sample is empty; give documents with sentences")
    origin = f"Punkt model learned from the corpus ({num_texts} texts, {num_characters} characters)"
    return _model_of(trainer.get_params(), origin)


def _without_time_limit(pattern: Any) -> Any:
    """Make the pattern without a bound on seconds; NLTK before redos.py has none."""
    if isinstance(pattern, re.Pattern):
        return pattern
    from nltk import redos

    return redos.compile(pattern.pattern, pattern.flags, timeout=None)


def _make_language_variables() -> Any:
    """Punkt's own regular expressions, compiled once, that take the time they need."""
    from nltk.tokenize.punkt import PunktLanguageVars

    class LanguageVariables(PunktLanguageVars):
        def __init__(self) -> None:
            self._period_context = _without_time_limit(super().period_context_re())
            self._words = _without_time_limit(super()._word_tokenizer_re())
            self.re_boundary_realignment = _without_time_limit(PunktLanguageVars.re_boundary_realignment)

        def period_context_re(self) -> Any:
            return self._period_context

        def word_tokenize(self, s: str) -> list[str]:
            return self._words.findall(s)

    return LanguageVariables()


class _Contexts(dict[str, int]):
    """Orthographic contexts by word; a word that is not there has none, and stays out."""

    def __missing__(self, word: str) -> int:
        return 0


class SentenceSplitter:
    """Splits documents into sentences. Picklable: a worker makes its tokenizer when it first splits.

    Args:
        model: Punkt model that `load_installed_model` or `train_model` gave.
        keep_newlines: Give each sentence the white space behind it, so that the sentences joined are the document.
            Otherwise white space between sentences and at the end is dropped, as in Megatron-LM.
    """

    def __init__(self, model: PunktModel, *, keep_newlines: bool = False) -> None:
        self.model = model
        self.keep_newlines = keep_newlines
        self._tokenizer: Any = None

    @property
    def description(self) -> str:
        """Which model splits, for the log and the sidecar."""
        return self.model.description

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenizer": None}

    def _make_tokenizer(self) -> Any:
        from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

        parameters = PunktParameters()
        parameters.abbrev_types = set(self.model.abbreviations)
        parameters.collocations = set(self.model.collocations)
        parameters.sent_starters = set(self.model.sentence_starters)
        parameters.ortho_context = _Contexts(self.model.orthographic_contexts)
        return PunktSentenceTokenizer(parameters, lang_vars=_make_language_variables())

    def split(self, text: str) -> list[str]:
        """The sentences of a text, none empty; an empty text has none."""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        sentences: list[str] = []
        for start in range(0, len(text), MAX_RUN_CHARACTERS):
            run = text[start : start + MAX_RUN_CHARACTERS]
            spans = list(self._tokenizer.span_tokenize(run))
            if self.keep_newlines:
                bounds = [0, *(begin for begin, _ in spans[1:]), len(run)]
                spans = list(zip(bounds, bounds[1:], strict=False))
            sentences.extend(run[begin:end] for begin, end in spans if begin < end)
        return sentences


def make_splitter(
    sample_texts: Iterable[str],
    *,
    language: str = "english",
    keep_newlines: bool = False,
    max_sample_characters: int = DEFAULT_SAMPLE_CHARACTERS,
) -> SentenceSplitter:
    """A splitter with the installed model of a language, or else with one learned from the sample.

    Args:
        sample_texts: Texts to learn a model from; not touched where a model is installed.
        language: Megatron-LM's --lang.
        keep_newlines: Give each sentence the white space behind it, so that the sentences joined are the document.
        max_sample_characters: Characters of the sample that are learned from at most.

    Raises:
        ValueError: the name can be no model's, installed data is damaged or refused by NLTK, or nothing can be learned
            from the texts.
    """
    model = load_installed_model(language)
    if model is None:
        model = train_model(sample_texts, max_characters=max_sample_characters)
    return SentenceSplitter(model, keep_newlines=keep_newlines)
