"""Rollouts on disk: a Parquet file each, with all that a step is taken from, so that it can be taken again.

A row is an answer. Ids, log-probabilities and advantages come back bit for bit. What belongs to the whole rollout is in
the file's metadata, as JSON under the name `rollout`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import parse_json
from dsv3_megatron.config.new_files import replacing
from dsv3_megatron.config.output import json_text
from dsv3_megatron.post_training.rollout import Answer, Rollout

_VERSION = 1
_METADATA = b"rollout"
_WIDTH = 6


def rollout_file(folder: str | os.PathLike[str], number: int) -> Path:
    """Path of a rollout in a folder."""
    return Path(folder) / f"rollout-{number:0{_WIDTH}d}.parquet"


def kept_rollouts(folder: str | os.PathLike[str]) -> list[Path]:
    """The rollouts of a folder, in order; none where it is not there."""
    return sorted(Path(folder).glob("rollout-*.parquet"))


def write_rollout(folder: str | os.PathLike[str], rollout: Rollout) -> None:
    """Write a rollout; the file has its name only once it is whole, and takes the place of an earlier one.

    Raises:
        OSError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"line": pa.int64(), "group": pa.int64(), "prompt_ids": pa.list_(pa.int32()), "ids": pa.list_(pa.int32()),
             "is_finished": pa.bool_(), "text": pa.string(), "logprobs": pa.list_(pa.float32()),
             "entropy": pa.float64(), "rewards": pa.list_(pa.float64()), "reward": pa.float64(),
             "advantage": pa.float64(), "reference_logprobs": pa.list_(pa.float32())}
    columns: dict[str, list[Any]] = {name: [getattr(answer, name) for answer in rollout.answers]
                                     for name in kinds if not name.endswith("logprobs")}
    columns["logprobs"] = [answer.logprobs_T for answer in rollout.answers]
    columns["reference_logprobs"] = [answer.reference_logprobs_T for answer in rollout.answers]
    about = {"version": _VERSION, "number": rollout.number, "rules": rollout.rules, "tokenizer": rollout.tokenizer}
    schema = pa.schema(list(kinds.items()), metadata={_METADATA: json_text(about).encode()})
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()}, schema=schema)
    path = rollout_file(folder, rollout.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        pq.write_table(table, stream, compression="zstd")


def read_rollout(path: str | os.PathLike[str]) -> Rollout:
    """Read a rollout back.

    Raises:
        ConfigError: there is no such file, or it is no rollout.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise ConfigError(f"{path} is not there: a step can be taken again from a kept rollout only; give the folder "
                          "that has it")
    try:
        table = pq.read_table(path)
        about = parse_json((table.schema.metadata or {})[_METADATA])
        if about["version"] != _VERSION:
            raise ConfigError(f"{path} is a rollout of version {about['version']}, and this release reads {_VERSION}")
        answers = tuple(_answer_of(row) for row in table.to_pylist())
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no rollout that can be read: {error}; remove it, or give another folder"
                          ) from error
    return Rollout(about["number"], answers, tuple(about["rules"]), about["tokenizer"])


def _answer_of(row: dict[str, Any]) -> Answer:
    reference = row["reference_logprobs"]
    answer = Answer(
        row["line"], row["group"], tuple(row["prompt_ids"]), tuple(row["ids"]), row["is_finished"], row["text"],
        np.array(row["logprobs"], dtype=np.float32), row["entropy"], tuple(row["rewards"]), row["reward"],
        row["advantage"], None if reference is None else np.array(reference, dtype=np.float32))
    lengths = {len(answer.ids), len(answer.logprobs_T), len(answer.ids if reference is None else reference)}
    if len(lengths) > 1 or not answer.ids or not answer.prompt_ids:
        raise ValueError(f"an answer of {len(answer.ids)} tokens has {len(answer.logprobs_T)} log-probabilities")
    return answer
