"""A rollout comes back from disk bit for bit, and a file that is none is said to be none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.post_training.kept import kept_rollouts, read_rollout, rollout_file, write_rollout
from dsv3_megatron.post_training.rollout import Rollout
from tests.unit.post_training.test_rollout import answer


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    answers = (answer(0, 0.1, advantage=1 / 3), answer(0, 1.0, (5, 6, 1), text="価格", reference_logprobs_T=None))
    rollout = Rollout(7, answers, ("numeric", "mine"), "fingerprint")
    write_rollout(tmp_path / "kept", rollout)
    (file,) = kept_rollouts(tmp_path / "kept")
    assert file == rollout_file(tmp_path / "kept", 7) and kept_rollouts(tmp_path / "none") == []
    back = read_rollout(file)
    assert (back.number, back.rules, back.tokenizer) == (7, ("numeric", "mine"), "fingerprint")
    for read, written in zip(back.answers, answers, strict=True):
        for field in dataclasses.fields(read):
            mine, theirs = getattr(read, field.name), getattr(written, field.name)
            if isinstance(theirs, np.ndarray):
                assert mine.dtype == np.float32 and mine.tobytes() == theirs.tobytes()
            else:
                assert mine == theirs, field.name


def test_files_that_are_no_rollouts(tmp_path: Path) -> None:
    file = rollout_file(tmp_path, 0)
    with pytest.raises(ConfigError, match="is not there: a step can be taken again from a kept rollout only"):
        read_rollout(file)
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ConfigError, match="is no rollout that can be read"):
        read_rollout(file)
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(ConfigError, match="is no rollout that can be read"):
        read_rollout(file)
    write_rollout(tmp_path, Rollout(0, (answer(0, 1.0, logprobs_T=np.zeros(1, np.float32)),), (), "t"))
    with pytest.raises(ConfigError, match="an answer of 2 tokens has 1 log-probabilities"):
        read_rollout(file)
