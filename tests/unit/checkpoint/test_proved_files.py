"""The reader of a checkpoint's files beside torch's own: the same tensors, and no flipped bit in what it reads.

Files that torch.distributed.checkpoint writes by itself have other frames around tensors than ours (its CRC-32).
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dsv3_megatron.checkpoint import proved_files
from dsv3_megatron.checkpoint.folder import Manifest, RunProgress
from dsv3_megatron.checkpoint.proved_files import CheckpointFiles, ProvedReader
from dsv3_megatron.checkpoint.tensor_frames import without_crc32
from dsv3_megatron.checkpoint.tensor_index import READ_ERRORS
from dsv3_megatron.data.checksums import DamagedFileError, checksum_file


def state_of(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(1100, 1000, generator=generator)  # more than a block
    return {"large": large, "narrow": torch.randn(300, 7, generator=generator).to(torch.bfloat16),
            "number": torch.tensor(2.5), "none": torch.empty(0, 3), "twisted": torch.randn(5, 9, generator=generator).T,
            "words": {"seed": seed}}


@pytest.fixture(params=["ours", "torch's"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Manifest:
    with without_crc32() if request.param == "ours" else nullcontext():
        dcp.save(state_of(1), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    files = {file.name: checksum_file(file) for file in tmp_path.iterdir()}
    return Manifest(tmp_path, RunProgress(0, 0, 0), {}, {}, 1, "fp32", {name: own.num_bytes for name, own in
                                                                       files.items()}, checksums=files)


def loaded(manifest: Manifest, verify: str = "read") -> dict[str, Any]:
    state = state_of(2)
    dcp.load(state, storage_reader=ProvedReader(CheckpointFiles(manifest, verify)), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("verify", ["read", "none"])
def test_it_reads_what_torchs_reader_reads(manifest: Manifest, verify: str, request: pytest.FixtureRequest) -> None:
    theirs = state_of(2)
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(manifest.path), no_dist=True)
    with mock.patch.object(proved_files, "load_tensors", wraps=proved_files.load_tensors) as parsed:
        ours = loaded(manifest, verify)
    # The twisted one has strides of its own in either; of ours the others are read in place, as is what is empty.
    assert parsed.call_count == (4 if "torch's" in request.node.name else 1)
    assert ours.pop("words") == theirs.pop("words") == {"seed": 1}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and torch.equal(tensor, state_of(1)[name]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_flipped_bit_is_silent(manifest: Manifest) -> None:
    """In values, frames and between them: refused with its offset, or by what the frame is not."""
    rng = random.Random(4)
    (file,) = manifest.path.glob("*.distcp")
    content = file.read_bytes()
    found = 0
    for number in range(24):
        at = rng.randrange(len(content)) if number % 2 else rng.randrange(len(content) - 20_000, len(content))
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with pytest.raises((*READ_ERRORS, dcp.api.CheckpointException)) as caught:
            loaded(manifest)
        found += "do not have their checksum" in str(caught.value) or isinstance(caught.value, DamagedFileError)
    assert found == 24, "each is told as damage"
    file.write_bytes(content)
    loaded(manifest)
