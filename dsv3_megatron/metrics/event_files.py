"""Reads a run's folder back: TensorBoard's event files, and metrics.jsonl and the configuration beside them.

TensorBoard's own reader stops without a word at a damaged record, so the files are checked first: each record has its
length and its bytes with a checksum. A last record that is cut short is no damage: a run that is under way, or was
killed, leaves one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.metrics.run_records import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, RunRecords, read_records

EVENT_FILES = "events.out.tfevents.*"
_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class RunLog:
    """What a run wrote about itself.

    Attributes:
        directory: Folder that was read.
        scalars: Points (step, value) of each tag, in order.
        images: The last image of each tag: its step and the PNG's bytes.
        records: Content of metrics.jsonl; None if it is not there.
        config: Content of config.json; None if it is not there.
        environment: Content of environment.json; None if it is not there.
        cut_short: Event files whose last record is not complete.
    """

    directory: Path
    scalars: Mapping[str, list[tuple[int, float]]]
    images: Mapping[str, tuple[int, bytes]]
    records: RunRecords | None
    config: dict[str, Any] | None
    environment: dict[str, Any] | None
    cut_short: tuple[Path, ...]


def read_run(directory: Path) -> RunLog:
    """Read a run's folder, also while the run is writing it.

    Raises:
        ValueError: no such folder, no event files in it, or a file that is damaged.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a folder; give the one that the run had as --tensorboard-dir")
    files = sorted(directory.glob(EVENT_FILES))
    if not files:
        nested = sorted(directory.glob(f"*/{EVENT_FILES}"))
        hint = f"; there are some in {nested[0].parent}" if nested else ""
        raise ValueError(f"{directory} has no event files ({EVENT_FILES}); give the folder that the run had as "
                         f"--tensorboard-dir{hint}")
    cut_short = tuple(path for path in files if not is_complete(path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps all points of a tag, 1 the last.
    events = EventAccumulator(str(directory), {"scalars": 0, "images": 1, "histograms": 1, "tensors": 1})
    events.Reload()
    tags = events.Tags()
    metrics = directory / METRICS_FILE
    return RunLog(
        directory=directory,
        scalars={tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]},
        images={tag: (event.step, event.encoded_image_string)
                for tag in tags["images"] for event in events.Images(tag)[-1:]},
        records=read_records(metrics) if metrics.exists() else None,
        config=_read_json(directory / CONFIG_FILE),
        environment=_read_json(directory / ENVIRONMENT_FILE),
        cut_short=cut_short,
    )


def is_complete(path: Path) -> bool:
    """Check every record of an event file; False if the last one is cut short.

    Raises:
        ValueError: a record's checksum is wrong; gives the file and the byte where it begins.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    offset = 0
    with path.open("rb") as file:
        while header := file.read(_HEADER.size):
            if len(header) < _HEADER.size:
                return False
            length, checksum = _HEADER.unpack(header)
            is_sound = masked_crc32c(header[:8]) == checksum
            if is_sound:
                data, ending = file.read(length), file.read(_CHECKSUM.size)
                if len(data) < length or len(ending) < _CHECKSUM.size:
                    return False
                is_sound = masked_crc32c(data) == _CHECKSUM.unpack(ending)[0]
            if not is_sound:
                raise ValueError(f"{path} is damaged: the record at byte {offset} does not have its checksum, and what "
                                 "follows cannot be read; move the file away to draw the run without it")
            offset = file.tell()
    return True


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; a run writes it when it starts: restore it, or move it away to "
                         "draw the run without it") from None
