"""Which datasets, in which proportion: parsing of --data-path, and the checks that need no tokens read.

No torch here: a run checks its data with this module before it allocates anything or starts a process group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.data.contents import read_contents
from dsv3_megatron.data.indexed import read_sidecar
from dsv3_megatron.data.text_form import common_form

# A validation set's name and the first word of its blend; a path has a slash before any "=" of its own.
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Blend:
    """Dataset prefixes and, if not proportional to size, their weights (positive, any scale)."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_blend(arguments: str | Sequence[str], field: str = "data_path") -> Blend:
    """Read Megatron-LM's --data-path: PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...

    A prefix that ends in .bin or .idx loses the suffix.

    Raises:
        ValueError: nothing given, a weight is not a positive number, or weights on some prefixes only.
    """
    items = [arguments] if isinstance(arguments, str) else [item.strip() for item in arguments]
    if not items or not all(items):
        raise ValueError(f"{field} is empty: give PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")

    def as_number(item: str) -> float | None:
        try:
            return float(item)
        except ValueError:
            return None

    numbers = [as_number(item) for item in items]
    if all(number is None for number in numbers):
        return Blend(tuple(map(without_suffix, items)))
    weights = numbers[0::2]
    if len(items) % 2 or any(weight is None for weight in weights) or any(n is not None for n in numbers[1::2]):
        raise ValueError(
            f"{field}={' '.join(items)} mixes weights and prefixes: give PREFIX ..., or a weight before every prefix "
            "(WEIGHT PREFIX WEIGHT PREFIX ...); a prefix that is a number needs a ./ before it"
        )
    for weight, prefix in zip(weights, items[1::2], strict=True):
        if weight is None or not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{field}: the weight {weight} of {prefix} must be a positive number")
    return Blend(tuple(map(without_suffix, items[1::2])), tuple(weight for weight in weights if weight is not None))


def parse_validation_sets(arguments: str | Sequence[str], field: str = "valid_data_path") -> dict[str, Blend]:
    """Read --valid-data-path: a blend as `parse_blend` reads it, or several, each with a name before its first word.

    NAME=PREFIX ... or NAME=WEIGHT PREFIX WEIGHT PREFIX ...: a name begins with a letter or a digit and has letters,
    digits, ".", "_" and "-"; what follows up to the next one is its blend.

    Returns:
        Blends by name, in the order in which they were given; under "" the one that has no name.

    Raises:
        ValueError: some have names and others none, a name is given twice, or a blend cannot be read.
    """
    items = [arguments] if isinstance(arguments, str) else [item.strip() for item in arguments]
    sets: list[tuple[str, list[str]]] = []
    for item in items:
        found = _NAMED.fullmatch(item)
        if found is not None:
            sets.append((found[1], [found[2]]))
        elif sets:
            sets[-1][1].append(item)
        else:
            sets.append(("", [item]))
    names = [name for name, _ in sets]
    if "" in names and len(names) > 1:
        raise ValueError(f"{field}={' '.join(items)} gives a name to some ({names[1]}=) and none to {items[0]}: give "
                         "each validation set one, as in NAME=PREFIX NAME=PREFIX, or none; a prefix with = in it needs "
                         "a ./ before it")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{field}={' '.join(items)} gives the name {twice} twice; give each validation set its own")
    if not sets:
        return {"": parse_blend(items, field)}
    return {name: parse_blend(words, f"{field} of {name}" if name else field) for name, words in sets}


def blends_of_run(data: DataConfig) -> list[Blend]:
    """The blends that a run's data settings name: for training, and for validation if they name any.

    Raises:
        ValueError: one cannot be read.
    """
    return ([parse_blend(data.data_path)] if data.data_path else []) + (
        list(parse_validation_sets(data.valid_data_path).values()) if data.valid_data_path else [])


def without_suffix(prefix: str) -> str:
    """A dataset's prefix, where one of its two files may have been named."""
    return prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix


def read_vocab_size(prefix: str, *, cache_dir: str | None = None) -> int:
    """Ids a model needs for a dataset: the tokenizer's from the sidecar, and no fewer than the highest id + 1.

    Args:
        prefix: Path of the dataset, without suffix.
        cache_dir: Folder of what `contents.read_contents` finds, which reads a dataset without a sidecar once; None:
            beside the data.

    Raises:
        ValueError: a file is missing or damaged, the sidecar is of other files, or an id is negative.
    """
    contents, sidecar = read_contents(prefix, cache_dir=cache_dir), read_sidecar(prefix)
    if contents.lowest_id < 0:
        raise ValueError(f"{prefix} holds the id {contents.lowest_id}: ids must not be negative; make it again with a "
                         "tokenizer's ids, in a dtype that holds them")
    return max(contents.highest_id + 1, 0 if sidecar is None else sidecar.vocab_size)


def read_tokenizer_fingerprint(prefixes: Sequence[str]) -> str | None:
    """The fingerprint of the tokenizer that made all of these datasets; None where none of them says.

    Raises:
        ValueError: two datasets were made by different tokenizers.
    """
    found: dict[str, str] = {}
    for prefix in prefixes:
        sidecar = read_sidecar(prefix)
        if sidecar is not None and sidecar.tokenizer_fingerprint:
            found.setdefault(sidecar.tokenizer_fingerprint, prefix)
    if len(found) > 1:
        parts = ", ".join(f"{prefix} by {identity[:12]}" for identity, prefix in found.items())
        raise ValueError(f"the datasets were made by different tokenizers ({parts}): preprocess all with one tokenizer")
    return next(iter(found), None)


def check_data(prefixes: Sequence[str], *, vocab_size: int, tokenizer_fingerprint: str | None = None,
               cache_dir: str | None = None) -> None:
    """Refuse data that a model cannot take, before anything is allocated.

    Args:
        prefixes: Datasets of the run.
        vocab_size: Rows of the model's embedding.
        tokenizer_fingerprint: Fingerprint of the run's tokenizer (`tokenizer.fingerprint`); None leaves it unchecked.
        cache_dir: Folder of what `contents.read_contents` finds; None: beside the data.

    Raises:
        ValueError: a file is missing or damaged, a sidecar is of other files, an id is negative, the vocabulary is too
            large, the tokenizers differ, or the texts of one dataset have other ids around them than those of another.
    """
    for prefix in prefixes:
        needed = read_vocab_size(prefix, cache_dir=cache_dir)
        if needed > vocab_size:
            raise ValueError(
                f"vocabulary of the data ({needed}) larger than the model's ({vocab_size}): {prefix} holds ids up to "
                f"{needed - 1}; set vocab_size to at least {needed}, or preprocess with a smaller tokenizer"
            )
    found = read_tokenizer_fingerprint(prefixes)
    if tokenizer_fingerprint is not None and found is not None and found != tokenizer_fingerprint:
        raise ValueError(
            f"the data was made by tokenizer {found[:12]}, the run's tokenizer_model is {tokenizer_fingerprint[:12]}: "
            "give the tokenizer that made the data, or preprocess again"
        )
    common_form(prefixes)
