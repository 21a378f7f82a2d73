"""What torch.save writes around a tensor: the same for every value, and nothing is read to know it."""

from __future__ import annotations

import io
import resource

import pytest
import torch

from dsv3_megatron.checkpoint.tensor_frames import TensorFrame, frame_of, without_crc32

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    with without_crc32():
        torch.save(tensor, stream)
    return stream.getvalue()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4096), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_and_bytes_are_what_torch_saves(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    frame = frame_of(dtype, shape)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
        content = frame.head + bytes_of(tensor) + frame.tail
        assert content == saved(tensor) and frame.length == len(content)
        assert torch.equal(torch.load(io.BytesIO(content)).float(), tensor.float())


def test_the_memory_of_a_large_tensor_is_not_touched() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    frame = frame_of(torch.float32, (1 << 14, 1 << 14))
    assert frame.num_bytes == 1 << 30 and len(frame.head) + len(frame.tail) < 4096
    # 262,144 small pages.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20_000


MARK = bytes.fromhex("504b0708")  # what torch's writer knows a checksum by


def test_what_the_memory_held_before_is_not_in_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's file differed in 17 digits of this id once in some hundred kills: the memory had held a file."""
    held = torch.frombuffer(bytearray(MARK * 1600), dtype=torch.float32)
    with_mark, without = saved(held.view(40, 40)), saved(torch.zeros(40, 40))
    monkeypatch.setattr(torch, "empty", lambda shape, **_: held.clone().view(shape))
    frame = frame_of.__wrapped__(torch.float32, (40, 40))
    assert frame.head + bytes(6400) + frame.tail == without
    assert frame.head + bytes_of(held) + frame.tail != with_mark  # torch's own exception, which may go away


def test_a_torch_that_writes_in_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_pieces(tensor: torch.Tensor, stream: io.BytesIO) -> None:
        view = memoryview(tensor.numpy()).cast("B")
        stream.write(b"head")
        stream.write(view[:8])
        stream.write(view[8:])

    monkeypatch.setattr(torch, "save", in_pieces)
    with pytest.raises(RuntimeError, match=r"float32 of shape \(11,\) in 0 pieces: .*--no-async-save"):
        frame_of.__wrapped__(torch.float32, (11,))


def test_the_checksum_of_torch_is_back_afterwards() -> None:
    before = torch.serialization.get_crc32_options()
    with without_crc32():
        assert torch.serialization.get_crc32_options() is False
    assert torch.serialization.get_crc32_options() is before
    assert isinstance(frame_of(torch.float32, (3,)), TensorFrame)
