"""Samples of a dataset and of a blend, in their order."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.order import InTurns
from dsv3_megatron.data.samples import ShuffledTokens


def write(prefix: Path, lengths: list[int], first_id: int = 0) -> str:
    with DatasetWriter(prefix, vocab_size=200_000) as writer:
        writer.add_documents(np.arange(first_id, first_id + sum(lengths)), np.array(lengths))
    return str(prefix)


@pytest.mark.parametrize("share", [(0, 9000), (1234, 8888), (5000, 5003)])
def test_an_epoch_is_all_documents_once_end_to_end(tmp_path: Path, share: tuple[int, int]) -> None:
    """Every token has an id of its own: the file's documents must lie in the epoch's samples, each whole and once."""
    lengths = np.random.default_rng(1).integers(1, 12, 9000).tolist()
    lengths[5000:5003] = [40, 1, 60]
    prefix, ends = write(tmp_path / "d", lengths), np.cumsum([0, *lengths])
    tokens = ShuffledTokens(prefix, share, seq_length=16, seed=5)
    wanted = int(ends[share[1]] - ends[share[0]])
    assert tokens.num_tokens == wanted and tokens.samples_per_epoch == (wanted - 1) // 16
    successors = {}
    for epoch in (0, 1):
        rows = [tokens.read(epoch * tokens.samples_per_epoch + place) for place in range(tokens.samples_per_epoch)]
        assert all(row.shape == (17,) and row.dtype == np.int64 for row in rows)
        inputs = np.concatenate([row[:-1] for row in rows])
        assert len(np.unique(inputs)) == len(inputs) == 16 * len(rows)
        assert inputs.min() >= ends[share[0]] and inputs.max() < ends[share[1]]
        # Each sample begins with the token that ends the one before it in the stream.
        following = {int(row[0]): row for row in rows}
        first = next(row for row in rows if int(row[0]) not in {int(other[-1]) for other in rows})
        stream = [*first.tolist()]
        while stream[-1] in following:
            stream += following[stream[-1]][1:].tolist()
        assert len(stream) == 16 * len(rows) + 1
        for token, after in itertools.pairwise(stream):
            assert after == token + 1 or (token + 1 in ends and after in ends)
        successors[epoch] = dict(itertools.pairwise(stream)), [int(row[0]) for row in rows]
    if share[1] - share[0] > 100:
        assert successors[0][0] != successors[1][0] and sorted(successors[0][1]) != successors[0][1]


def test_a_blend_takes_each_dataset_in_its_own_order(tmp_path: Path) -> None:
    """Also in later epochs of the smaller ones, and as the same dataset would come alone."""
    parts = [ShuffledTokens(write(tmp_path / str(number), [7] * documents, 50_000 * number), (0, documents),
                            seq_length=8, seed=2, number=number) for number, documents in enumerate((300, 20, 90))]
    blend, weights = InTurns(parts, (0.5, 0.3, 0.2)), (0.5, 0.3, 0.2)
    rows = [blend.read(place) for place in range(500)]
    for number, part in enumerate(parts):
        mine = [row for row in rows if row[0] // 50_000 == number]
        assert abs(len(mine) - 500 * weights[number]) < 2
        assert all(np.array_equal(row, part.read(place)) for place, row in enumerate(mine))
    assert len([row for row in rows if row[0] // 50_000 == 1]) > 8 * parts[1].samples_per_epoch


def test_no_index_is_built_however_far_a_run_goes(tmp_path: Path) -> None:
    """Sample 10^12 of a dataset of 60,000 documents: a megabyte or two of memory, for some groups of documents."""
    prefix = write(tmp_path / "d", [3] * 60_000)
    tokens = ShuffledTokens(prefix, (0, 60_000), seq_length=4, seed=5)
    tracemalloc.start()
    rows = [tokens.read(10**12 + place) for place in range(20)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({tuple(row.tolist()) for row in rows}) == 20
    assert peak < 4e6, peak


def test_an_index_with_gaps_is_refused(tmp_path: Path) -> None:
    """Two documents of three tokens where the index leaves a token out between them."""
    prefix = write(tmp_path / "d", [3, 4])
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    raw[34:42] = np.array([3, 3], np.int32).tobytes()
    raw[42:58] = np.array([0, 4 * 4], np.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(raw)
    with pytest.raises(ValueError, match=r"d\.idx: sequences 0 to 1 do not lie end to end in the \.bin file"):
        ShuffledTokens(prefix, (0, 2), seq_length=4, seed=5).read(0)
