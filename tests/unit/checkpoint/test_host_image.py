"""Memory in which a rank puts its file together: what is in it is the file, whatever the tensors do later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsv3_megatron.checkpoint.host_image import HostImage
from dsv3_megatron.checkpoint.writing import lengths_of, put_entries, write_entries


@pytest.fixture
def image() -> Iterator[HostImage]:
    made = HostImage()
    yield made
    made.close()


def content(image: HostImage, num_bytes: int) -> bytes:
    return os.pread(image.descriptor, num_bytes, 0)


def test_memory_stays_grows_and_is_given_back(image: HostImage) -> None:
    image.reserve(10)
    image.put(0, b"0123456789")
    first = image.descriptor
    image.reserve(5)
    assert content(image, 10) == b"0123456789" and image.descriptor == first
    image.reserve(20_000)
    image.put(19_990, b"9876543210")
    assert image.descriptor == first and content(image, 20_000)[-10:] == b"9876543210"
    image.close()
    image.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)


def test_tensors_are_copied_to_any_place_and_may_change_afterwards(image: HostImage) -> None:
    rows = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = [rows, rows.t(), rows[1:3, ::2], torch.tensor(7, dtype=torch.int64), rows[2], rows[:0], rows.bfloat16()]
    expected = [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    image.reserve(1000)
    image.put(0, bytes([255]) * 1000)
    places, offset = [], 3
    for tensor, part in zip(tensors, expected, strict=True):
        places.append((offset, tensor))
        offset += len(part) + 1  # where no tensor of two bytes or more would have its place
    image.put_tensors(places)
    rows.zero_()
    found = content(image, 1000)
    assert found[3:offset] == b"".join(part + b"\xff" for part in expected) and set(found[offset:]) == {255}


def test_the_bytes_in_memory_are_those_that_are_written(image: HostImage, tmp_path: Path) -> None:
    """Views, parts of larger storages and odd strides: torch.distributed.checkpoint's writer says what is expected."""
    import io

    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
    from torch.distributed.checkpoint.planner import WriteItemType

    base = torch.randn(6, 8)
    tensors = [base, base[2:4], base.t(), torch.randn(1, 5).as_strided((1, 5), (7, 1)), torch.tensor(3.0),
               base[:0], torch.nn.Parameter(base.clone()).detach(), base.bfloat16()]
    items = [SimpleNamespace(type=WriteItemType.TENSOR, index=number) for number in range(len(tensors))]
    objects = [(SimpleNamespace(type=WriteItemType.BYTE_IO, index=number), io.BytesIO(b"object" * number))
               for number in range(3)]
    given = list(zip(items, tensors, strict=True))
    with open(tmp_path / "file", "wb") as stream:
        written = write_entries(stream, "file", objects, given, _StorageWriterTransforms())
    num_bytes = sum(lengths_of(objects, given))
    image.reserve(num_bytes)
    assert put_entries(image, "file", objects, given) == written
    assert content(image, num_bytes) == (tmp_path / "file").read_bytes()
