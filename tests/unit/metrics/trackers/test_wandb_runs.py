"""Weights & Biases' offline files, read back through its own records, where the package is installed.

The library has no reader for Python of its files: they are records of LevelDB's log format, in blocks of 32 KiB behind
a header of 7 bytes, and each record is one of its protobuf messages, which is what is read here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread
from dsv3_megatron.metrics.trackers.wandb_runs import ITERATION, WandbTracker
from tests.unit.metrics.trackers.logged_run import CONFIG, ENVIRONMENT, expected_tags, write_run

_BLOCK, _FILE_HEADER, _CHUNK_HEADER = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Messages of an offline file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), _FILE_HEADER, b""
    assert data.startswith(b":W&B")
    while at + _CHUNK_HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _CHUNK_HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST)
        parts += data[at + _CHUNK_HEADER:at + _CHUNK_HEADER + length]
        at += _CHUNK_HEADER + length
        if kind in (_FULL, _LAST):
            message = Record()
            message.ParseFromString(parts)
            parts = b""
            yield message


def values_of(items: Any) -> dict[str, Any]:
    """Values of a message; what it has in parts is put together."""
    values: dict[str, Any] = {}
    for item in items:
        *outer, name = item.nested_key or [item.key]
        place = values
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
    return values


def rows(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary for each moment."""
    return [values_of(record.history.item) for record in records(path)
            if record.WhichOneof("record_type") == "history"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.usefixtures("offline")
def test_every_tag_is_read_back_and_a_run_goes_on_as_the_same_one(tmp_path: Path) -> None:
    for resumed in (0, 3):
        thread = TrackerThread(WandbTracker("dsv3", "run-7", "tiny run-7", entity=None, save_dir=str(tmp_path / "w")))
        write_run(tmp_path / "logs", [thread], first=resumed + 1, last=resumed + 3, resumed_iteration=resumed)
        assert (thread.num_lost, thread.num_written) == (0, 7)

    files = sorted((tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {path.name for path in files} == {"run-run-7.wandb"}
    for file, first in zip(files, (1, 4), strict=True):
        (begun,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"]
        assert (begun.run_id, begun.project, begun.display_name) == ("run-7", "dsv3", "tiny run-7")
        logged = rows(file)
        kinds: dict[str, set[str]] = {"scalar": set(), "histogram": set(), "image": set()}
        for row in logged:
            for name, value in row.items():
                kind = {"histogram": "histogram", "image-file": "image"}[value["_type"]] if isinstance(value, dict) \
                    else "scalar"
                kinds[kind].add(name)
        assert {name for name in kinds["scalar"] if not name.startswith("_")} == expected_tags("scalar") | {ITERATION}
        assert kinds["histogram"] == expected_tags("histogram") and kinds["image"] == expected_tags("image")
        losses = [(row[ITERATION], row["lm loss"]) for row in logged if "lm loss" in row]
        assert losses == [(step, 8.0 / step) for step in range(first, first + 3)]
        histogram = next(row["router-scores/layer-1"] for row in logged if "router-scores/layer-1" in row)
        assert histogram["values"] == [10, 20, 30, 40]
        config = values_of(item for record in records(file) if record.WhichOneof("record_type") == "config"
                           for item in record.config.update)
        assert config["config"] == CONFIG and config["environment"] == ENVIRONMENT
        assert {tag.partition("/")[0] for tag in expected_tags("text")} == {"config", "environment"}
