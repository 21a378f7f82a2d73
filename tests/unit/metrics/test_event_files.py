"""Event files as TensorBoard's own writer makes them: read, cut short, damaged, not there."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from dsv3_megatron.metrics.event_files import EVENT_FILES, is_complete, read_run


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """A file with three points of one scalar."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            writer.add_scalar("lm loss", 5.0 - step, step)
    (file,) = tmp_path.glob(EVENT_FILES)
    return file


def test_points_in_order(events: Path) -> None:
    log = read_run(events.parent)
    assert dict(log.scalars) == {"lm loss": [(0, 5.0), (1, 4.0), (2, 3.0)]}
    assert (log.records, log.config, log.environment, log.cut_short) == (None, None, None, ())


def test_a_record_that_is_still_being_written(events: Path) -> None:
    """Cut anywhere in the last record; at its beginning the file is whole."""
    content = events.read_bytes()
    last = max(size for size in range(1, len(content)) if is_end(content, size))
    for size in range(last, len(content) + 1):
        events.write_bytes(content[:size])
        assert is_complete(events) == (size in (last, len(content))), size
    events.write_bytes(content[:-1])
    log = read_run(events.parent)
    assert log.cut_short == (events,) and log.scalars["lm loss"] == [(0, 5.0), (1, 4.0)]


def is_end(content: bytes, size: int) -> bool:
    """Whether a record ends before so many bytes: lengths are little-endian, with 12 bytes before and 4 after each."""
    place = 0
    while place < size:
        place += 16 + int.from_bytes(content[place:place + 8], "little")
    return place == size


def test_a_damaged_record_is_named(events: Path) -> None:
    content = bytearray(events.read_bytes())
    content[-6] ^= 1
    events.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: the record at byte \d+ does not have its checksum"):
        read_run(events.parent)


def test_folders_without_events(events: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        read_run(tmp_path / "gone")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    events.rename(tmp_path / "outer" / "inner" / events.name)
    with pytest.raises(ValueError, match=f"has no event files.*there are some in {tmp_path}/outer/inner"):
        read_run(tmp_path / "outer")


def test_a_file_beside_them_that_is_no_json(events: Path) -> None:
    (events.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        read_run(events.parent)
