"""The same tags go to TensorBoard's files and to every tracker; a tracker that fails takes nothing from either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.metrics.event_writer import EventWriter
from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.sinks import MetricSinks
from dsv3_megatron.metrics.trackers.tracked_values import TagHistogram, TrackedValues
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread
from dsv3_megatron.metrics.writer import MetricsWriter
from tests.unit.metrics.trackers.logged_run import CONFIG, ENVIRONMENT, expected_tags, write_run


class Remembered:
    """A tracker that keeps what it gets, and fails where it is told to."""

    name = "remembered"

    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.values, self.calls = fails, list[TrackedValues](), list[str]()

    def open(self) -> None:
        self.calls.append("open")

    def write(self, values: TrackedValues) -> None:
        if self.fails:
            raise OSError(28, "No space left on device")
        self.values.append(values)

    def close(self) -> None:
        self.calls.append("close")


def written(folder: Path) -> dict[str, set[str]]:
    """Tags of a folder's event files by kind, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    kinds = {"scalars": "scalar", "images": "image", "histograms": "histogram", "tensors": "text"}
    return {kind: set(events.Tags()[key]) for key, kind in kinds.items()}


def test_every_tag_of_the_table_goes_to_each_place_and_no_other(tmp_path: Path) -> None:
    trackers = [Remembered(), Remembered()]
    write_run(tmp_path, [TrackerThread(tracker) for tracker in trackers])
    for kind, tags in written(tmp_path).items():
        assert tags == expected_tags(kind)
    for tracker in trackers:
        assert tracker.calls == ["open", "close"]
        assert {tag for moment in tracker.values for tag in moment.scalars} == expected_tags("scalar")
        assert {tag for moment in tracker.values for tag in moment.histograms} == expected_tags("histogram")
        assert {tag for moment in tracker.values for tag in moment.images_HWC} == expected_tags("image")
        assert tracker.values[0].documents == {"config": CONFIG, "environment": ENVIRONMENT}
        losses = [(moment.step, moment.scalars["lm loss"]) for moment in tracker.values if "lm loss" in moment.scalars]
        assert losses == [(1, 8.0), (2, 4.0), (3, 8.0 / 3)]


def test_a_tracker_that_fails_takes_nothing_from_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = TrackerThread(Remembered(fails=True)), Remembered()
    write_run(tmp_path, [broken, TrackerThread(sound)])
    assert broken.num_written == 0 and broken.num_lost == len(sound.values) == 7
    assert written(tmp_path)["scalar"] == expected_tags("scalar")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "No space left on device; the run goes on" in said[0]
    assert said[1] == "remembered lacks 7 of 7 logged moments; the logs folder has them all"


def test_a_moment_reaches_the_trackers_once_and_as_it_was(tmp_path: Path) -> None:
    tracker = Remembered()
    sinks = MetricSinks(EventWriter(tmp_path, purge_step=1), [TrackerThread(tracker)])
    sinks.flush()
    sinks.add_scalar("lm loss", 2, 5)
    sinks.add_histogram("h", TagHistogram([0.0, 0.5, 1.0], [3, 1]), 5)
    sinks.add_image("now", np.zeros((2, 3, 3), np.uint8), 5)
    sinks.flush()
    sinks.flush()
    sinks.close()
    sinks.close()
    assert [(one.step, one.scalars, one.histograms["h"].counts) for one in tracker.values] == [
        (5, {"lm loss": 2.0}, [3, 1])]


def test_a_process_that_writes_no_logs_gives_trackers_nothing(tmp_path: Path, speed: RunSpeed) -> None:
    tracker = Remembered()
    writer = MetricsWriter(tmp_path, speed, num_layers=4, enabled=False,
                           trackers=[TrackerThread(tracker)])
    writer.write_config({})
    writer.close()
    assert tracker.values == [] and tracker.calls == []
