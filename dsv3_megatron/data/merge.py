"""Datasets joined end to end: the shards of a preprocessing job, or any that one tokenizer made."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_megatron.data.indexed import Sidecar, dataset_paths, read_header, read_sidecar
from dsv3_megatron.data.indexed_writer import DatasetWriter, refuse_existing
from dsv3_megatron.data.reading.inputs import match_paths
from dsv3_megatron.data.text_form import common_form


def find_datasets(patterns: Sequence[str]) -> list[str]:
    """The prefixes that paths (with or without .bin or .idx), globs and folders name; those of one pattern are sorted.

    A name that is a dataset's and a folder's is the dataset; with a slash behind it, the folder.

    Raises:
        ValueError: a pattern names no dataset.
    """
    prefixes: dict[str, None] = {}
    for pattern in patterns:
        if os.path.exists(dataset_paths(_without_suffix(pattern))[1]):
            found = [pattern]  # also where a folder of that name, a run's cache, lies beside it
        elif os.path.isdir(pattern):
            found = [os.path.join(pattern, name) for name in os.listdir(pattern) if name.endswith(".idx")]
        else:
            found = [path for path in match_paths(f"{pattern}.idx") + match_paths(pattern) if _has_suffix(path)]
            if not found and not any(sign in pattern for sign in "*?"):
                found = [pattern]  # a plain name: whoever reads it says what is missing
        names = sorted({_without_suffix(path) for path in found})
        if not names:
            raise ValueError(
                f"input {pattern} names no dataset: give prefixes, globs or a folder with .bin and .idx files"
            )
        prefixes |= dict.fromkeys(names)
    return list(prefixes)


def _has_suffix(path: str) -> bool:
    return path.endswith((".bin", ".idx"))


def _without_suffix(path: str) -> str:
    return path[:-4] if _has_suffix(path) else path


def merge_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    is_overwrite_allowed: bool = False,
    report: Callable[[str], None] | None = None,
) -> Sidecar:
    """Write one dataset with the documents of all, in order.

    If they are all the shards of one job, given in any order, the result is what one machine would have made, its
    sidecar included.

    Args:
        prefixes: The datasets.
        output_prefix: Path of the result, without suffix.
        is_overwrite_allowed: Replace a dataset of that name.
        report: Called with each prefix when it has been appended.

    Raises:
        ValueError: a dataset is missing or damaged, or holds ids that its sidecar does not know; they differ in dtype
            or tokenizer or in the ids around texts; shards are missing; or the output exists or is one of the inputs.
    """
    if os.path.realpath(output_prefix) in map(os.path.realpath, prefixes):
        raise ValueError(f"output {output_prefix} is one of the inputs: give another --output-prefix")
    refuse_existing(output_prefix, is_overwrite_allowed=is_overwrite_allowed)
    headers = {prefix: read_header(prefix) for prefix in prefixes}
    sidecars = {prefix: read_sidecar(prefix) for prefix in prefixes}
    first = prefixes[0]
    for prefix in prefixes[1:]:
        if headers[prefix].dtype != headers[first].dtype:
            raise ValueError(
                f"{prefix} holds {headers[prefix].dtype.name}, {first} {headers[first].dtype.name}: datasets of "
                "different vocabularies cannot be joined"
            )
    fingerprints = {sidecar.tokenizer_fingerprint[:12]: name for name, sidecar in sidecars.items() if sidecar}
    if len(fingerprints) > 1:
        parts = ", ".join(f"{name} by {identity}" for identity, name in fingerprints.items())
        raise ValueError(f"the datasets were made by different tokenizers ({parts}): preprocess all with one tokenizer")
    common_form(prefixes)
    known = [sidecar for sidecar in sidecars.values() if sidecar is not None]
    ordered = _order_shards({prefix: sidecar for prefix, sidecar in sidecars.items() if sidecar})
    with DatasetWriter(
        output_prefix,
        vocab_size=max([1, *(sidecar.vocab_size for sidecar in known)]),
        dtype=headers[first].dtype,
        tokenizer_fingerprint=known[0].tokenizer_fingerprint if len(known) == len(prefixes) else "",
        options=_merged_options(list(sidecars.values()), ordered is not None, prefixes),
        is_overwrite_allowed=is_overwrite_allowed,
    ) as writer:
        for prefix in ordered or prefixes:
            writer.add_dataset(prefix)
            if report is not None:
                report(prefix)
        writer.counts = _add_counts([sidecar.counts for sidecar in known])
    merged = read_sidecar(output_prefix)
    assert merged is not None
    return merged


def _order_shards(sidecars: dict[str, Sidecar]) -> list[str] | None:
    """The prefixes in shard order if they are shards of one job, None if they are not shards.

    Raises:
        ValueError: some of the shards are missing, twice there, or of another job.
    """
    shards = {name: str(sidecar.options.get("shard", "1/1")) for name, sidecar in sidecars.items()}
    if all(shard == "1/1" for shard in shards.values()):
        return None
    count = max(int(shard.split("/")[1]) for shard in shards.values())
    jobs = {(sidecar.options.get("job"), sidecar.options.get("json_key")) for sidecar in sidecars.values()}
    if len(jobs) > 1 or any(int(shard.split("/")[1]) != count for shard in shards.values()):
        raise ValueError(
            f"{', '.join(sidecars)} are shards of different jobs: give those of one --output-prefix, key and input"
        )
    by_index: dict[int, str] = {}
    for name, shard in shards.items():
        index = int(shard.split("/")[0])
        if index in by_index:
            raise ValueError(f"{by_index[index]} and {name} are both shard {shard}: give each once")
        by_index[index] = name
    missing = [f"{index}/{count}" for index in range(1, count + 1) if index not in by_index]
    if missing:
        raise ValueError(f"shards {', '.join(missing)} are missing: make them with --shard, or give them too")
    return [by_index[index] for index in sorted(by_index)]


def _merged_options(sidecars: Sequence[Sidecar | None], are_shards: bool, prefixes: Sequence[str]) -> dict[str, Any]:
    """What all have in common; of shards, what the whole job would say."""
    known = [sidecar.options if sidecar else {} for sidecar in sidecars]
    if are_shards:
        return known[0] | {"shard": "1/1"}
    common = {key: value for key, value in known[0].items() if all(options.get(key) == value for options in known)}
    common.pop("job", None)
    return common | {"merged_from": [os.path.basename(prefix) for prefix in prefixes]}


def _add_counts(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in counts:
        for key, value in part.items():
            if isinstance(value, dict):
                total[key] = dict(sorted((Counter(total.get(key, {})) + Counter(value)).items()))
            else:
                total[key] = total.get(key, 0) + value
    return total
