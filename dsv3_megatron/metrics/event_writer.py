"""Writes TensorBoard's event files so that a full disk does not end the run (`kept_file.py`).

torch's SummaryWriter writes in a thread that ends at the first error, with every later call. The records are the same:
its own functions make them; a record is its length and its bytes, each with a checksum.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import summary

from dsv3_megatron.metrics.kept_file import KeptFile
from dsv3_megatron.metrics.trackers.tracked_values import TagHistogram

_FILE_VERSION = "brain.Event:2"
_numbers = itertools.count()


class EventWriter:
    """An event file of a run.

    Args:
        directory: Folder of the event file.
        purge_step: What earlier event files of the folder have of this step and later ones is taken again.
    """

    def __init__(self, directory: Path, *, purge_step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        begin = [Event(wall_time=time.time(), file_version=_FILE_VERSION),
                 Event(wall_time=time.time(), step=purge_step, file_version=_FILE_VERSION),
                 Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START))]
        self._file = KeptFile(directory / name, header=b"".join(map(_record, begin)))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one number of a tag at a step."""
        self._add(summary.scalar(tag, value), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """A text in Markdown."""
        self._add(summary.text(tag, text), step)

    def add_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        """An image, uint8 [height, width, channels]."""
        self._add(summary.image(tag, image_HWC, dataformats="HWC"), step)

    def add_histogram(self, tag: str, histogram: TagHistogram, step: int) -> None:
        """A histogram of values that were counted elsewhere."""
        self._add(summary.histogram_raw(
            tag, histogram.edges[0], histogram.edges[-1], sum(histogram.counts), histogram.total,
            histogram.sum_squares, list(histogram.edges[1:]), list(histogram.counts)), step)

    def flush(self) -> None:
        """Write what was added since the last time, if it can be written."""
        self._file.flush()

    def close(self) -> None:
        """Write what is there and let the file go; may be called twice."""
        self._file.close()

    def _add(self, values: Any, step: int) -> None:
        self._file.append(_record(Event(wall_time=time.time(), step=int(step), summary=values)))


def _record(event: Event) -> bytes:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))
