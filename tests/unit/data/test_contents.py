"""What a dataset's files hold: stale sidecars, ids outside the vocabulary, and how often they are looked for."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.commands.train import main
from dsv3_megatron.data import contents
from dsv3_megatron.data.blend import check_data, read_vocab_size
from dsv3_megatron.data.contents import read_contents, require_index
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.rows import open_token_array, open_windows
from dsv3_megatron.data.signed_json import with_signature
from tests.signing import change_sidecar


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents.tempfile, "tempdir", str(tmp_path / "tmp"))


def write(prefix: Path, ids: list[int], dtype: type = np.int32, *, has_sidecar: bool = False) -> str:
    """Documents of two ids, as another tool writes them: any dtype, any id."""
    with DatasetWriter(prefix, vocab_size=70_000 if np.dtype(dtype).itemsize == 4 else 100,
                       is_overwrite_allowed=True) as writer:
        writer.add_documents(np.zeros(len(ids), dtype=np.int64), np.full(len(ids) // 2, 2))
    codes = {np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5, np.float32: 7}
    raw = np.array(ids, dtype=dtype).tobytes()
    Path(f"{prefix}.bin").write_bytes(raw)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[17] = codes[dtype]
    count, size = len(ids) // 2, np.dtype(dtype).itemsize
    index[34 + 4 * count : 34 + 12 * count] = (np.arange(count, dtype=np.int64) * 2 * size).tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    if not has_sidecar:
        os.unlink(f"{prefix}.json")
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_ids_outside_the_vocabulary_are_found_without_a_sidecar(tmp_path: Path, dtype: type) -> None:
    prefix = write(tmp_path / "d", [3, 9, 0, 99, 5, 7], dtype)
    found = read_contents(prefix)
    assert (found.lowest_id, found.highest_id, found.num_sequences) == (0, 99, 3)
    assert found.bin_sha256 == hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    assert found.idx_sha256 == hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
    check_data([prefix], vocab_size=100)
    with pytest.raises(ValueError, match=r"vocabulary of the data \(100\) larger than the model's \(99\)"):
        check_data([prefix], vocab_size=99)
    negative = write(tmp_path / "n", [3, 9, -2, 4], dtype)
    with pytest.raises(ValueError, match=r"n holds the id -2: ids must not be negative"):
        check_data([negative], vocab_size=100)


def test_one_id_far_into_a_large_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every one of its chunks, not in some of them."""
    monkeypatch.setattr("dsv3_megatron.data.indexed._READ_BYTES", 64)
    for place in range(0, 1000, 77):
        ids = [1] * 1000
        ids[place] = 500
        assert read_vocab_size(write(tmp_path / f"d{place}", ids)) == 501


def test_tokens_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [3, 9], np.float32)
    with pytest.raises(ValueError, match=r"d\.idx says that the tokens are float32; ids must be integers"):
        check_data([prefix], vocab_size=100)


def test_they_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = contents._read_tokens
    monkeypatch.setattr(contents, "_read_tokens", lambda *args: calls.append(args) or real(*args))
    prefix = write(tmp_path / "d", [3, 9, 5, 7])
    first = read_contents(prefix)
    assert read_contents(prefix) == first and len(calls) == 1
    assert [path.name for path in tmp_path.glob("d.*.json")] == ["d.checked.json"]
    write(tmp_path / "d", [3, 9, 5, 77])  # as large, another time
    assert read_contents(prefix).highest_id == 77 and len(calls) == 2
    times = os.stat(f"{prefix}.bin"), os.stat(f"{prefix}.idx")
    write(tmp_path / "d", [3, 9, 5, 7, 8, 8])
    for path, stat in zip((f"{prefix}.bin", f"{prefix}.idx"), times, strict=True):
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_contents(prefix).num_sequences == 3 and len(calls) == 3  # another size at the same time
    (tmp_path / "d.checked.json").write_text("{")
    assert read_contents(prefix).highest_id == 9 and len(calls) == 4
    cache = tmp_path / "cache"
    read_contents(prefix, cache_dir=str(cache))
    assert len(calls) == 5 and len(list(cache.iterdir())) == 1
    read_contents(prefix, cache_dir=str(cache))
    assert len(calls) == 5


def test_data_that_cannot_be_written_beside_are_read_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder where none can be made stands for one without the right to write, which root always has."""
    prefix = write(tmp_path / "d", [3, 9, 5, 7])
    blocked = tmp_path / "file" / "folder"
    (tmp_path / "file").write_text("")
    first = read_contents(prefix, cache_dir=str(blocked))
    monkeypatch.setattr(contents, "_read_tokens", None)
    assert read_contents(prefix, cache_dir=str(blocked)) == first


def test_a_sidecar_of_other_files_is_noticed(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [3, 9, 5, 7, 8, 2], has_sidecar=False)
    with DatasetWriter(tmp_path / "own", vocab_size=70_000) as writer:
        writer.add_documents(np.array([3, 9, 5, 7]), np.array([2, 2]))
    with DatasetWriter(tmp_path / "same", vocab_size=70_000) as writer:
        writer.add_documents(np.array([3, 9, 5, 66_000]), np.array([2, 2]))
    with DatasetWriter(tmp_path / "cut", vocab_size=70_000) as writer:
        writer.add_documents(np.array([3, 9, 5, 66_000]), np.array([1, 3]))
    own = str(tmp_path / "own")
    assert read_contents(own).highest_id == 9 and not (tmp_path / "own.checked.json").exists()
    shutil.copyfile(f"{own}.json", f"{prefix}.json")
    with pytest.raises(ValueError, match=r"d\.json is the sidecar of other files .* \(num_tokens is 4 in it and 6 in "
                                         r"the index\): bring the three files of one dataset together"):
        check_data([prefix], vocab_size=70_000)
    for other, reason in (("same", "bin"), ("cut", "idx")):  # equal counts; equal index too
        for suffix in ("bin", "idx"):
            shutil.copyfile(tmp_path / f"{other}.{suffix}", f"{own}.{suffix}")
        with pytest.raises(ValueError, match=rf"own\.json is .* \(the hash of the \.{reason} file is another\)"):
            check_data([own], vocab_size=70_000)


def test_files_copied_in_any_order_keep_their_sidecar(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", vocab_size=50) as writer:
        writer.add_documents(np.array([3, 9, 5, 7]), np.array([2, 2]))
    for suffix in ("json", "idx", "bin"):
        shutil.copyfile(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    assert read_contents(str(tmp_path / "b")) == read_contents(str(tmp_path / "a"))
    assert read_vocab_size(str(tmp_path / "b")) == 50


def test_a_sidecar_whose_vocabulary_is_too_small_does_not_hide_an_id(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", vocab_size=50) as writer:
        writer.add_documents(np.array([3, 9, 5, 7]), np.array([2, 2]))
    change_sidecar(tmp_path / "a", vocab_size=8)
    assert read_vocab_size(str(tmp_path / "a")) == 10


def _ask(prefix: str, queue: multiprocessing.Queue) -> None:
    real, count = contents._read_tokens, [0]

    def counted(*args: object) -> tuple[str, int, int]:
        count[0] += 1
        return real(*args)  # type: ignore[arg-type]

    contents._read_tokens = counted  # type: ignore[assignment]
    queue.put((read_contents(prefix).highest_id, count[0]))


def test_processes_that_ask_together_read_once(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [1] * 2_000_000)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_ask, args=(prefix, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [highest for highest, _ in answers] == [1] * 4 and sum(count for _, count in answers) == 1


@pytest.mark.parametrize("ids, message", [([3, 150], "vocabulary of the data (151) larger than the model's (100)"),
                                          ([3, -7], "holds the id -7: ids must not be negative")])
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "expert"])
def test_every_rank_of_every_layout_stops_with_one_message(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ids: list[int],
        message: str, layout: str) -> None:
    """Before a process group starts; as the pre-check of a launcher does it too."""
    prefix = write(tmp_path / "d", ids)
    flags = ["--preset", "tiny", "--vocab-size", "100", "--data-path", prefix, "--split", "1"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        for arguments in ([], ["--check-only"]):
            if layout == "expert":
                parallel = ["--expert-model-parallel-size", "2"]
            else:
                parallel = [f"--{layout}-model-parallel-size", "2"]
            assert main([*flags, *parallel, *arguments]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert message in line and line.startswith("error: ")
            assert ("(rank 1 of 2, on " in line) == (rank == 1), "who is not the first says who it is"


def test_evaluation_looks_too(tmp_path: Path) -> None:
    for ids, message in (([3, 150], "larger than the model's"), ([3, -7], "must not be negative")):
        with pytest.raises(ValueError, match=message):
            open_windows(write(tmp_path / str(ids[1]), ids), length=1, vocab_size=100)
        np.save(tmp_path / "ids.npy", np.array([ids]))
        with pytest.raises(ValueError, match=rf"id {ids[1]} in row 0, position 1 must lie in 0\.\.99"):
            open_token_array(tmp_path / "ids.npy", vocab_size=100, max_length=8)


def test_every_number_of_the_index_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leads out of the tokens is named; before, only the last sequence was looked at."""
    monkeypatch.setattr("dsv3_megatron.data.indexed._CHECKED_AT_A_TIME", 16)
    count = 50
    lengths_at, offsets_at, documents_at = 34, 34 + 4 * count, 34 + 12 * count
    prefix = write(tmp_path / "d", [1] * (2 * count), has_sidecar=False)
    whole = Path(f"{prefix}.idx").read_bytes()
    size = os.path.getsize(f"{prefix}.bin")
    read_contents(prefix)
    for number, (at, value, message) in enumerate((
            (lengths_at + 4 * 7, np.int32(-1), "sequence 7 has -1 tokens"),
            (lengths_at + 4 * 40, np.int32(2**31 - 1), "sequence 40 has 2147483647 tokens"),
            (offsets_at + 8 * 33, np.int64(-2), "sequence 33 has 2 tokens from byte -2 on, which do not lie in"),
            (offsets_at + 8 * 12, np.int64(1), "sequence 12 has 2 tokens from byte 1 on"),
            (offsets_at + 8 * 12, np.int64(size), f"sequence 12 has 2 tokens from byte {size} on"),
            (offsets_at + 8 * 12, np.int64(2**63 - 2), "sequence 12 has 2 tokens from byte 9223372036854775806 on"),
            (documents_at, np.int64(1), "documents run from sequence 1 to 50, not 0 to 50"),
            (documents_at + 8 * 20, np.int64(60), "document 20 ends before it begins"))):
        damaged = bytearray(whole)
        damaged[at: at + value.nbytes] = value.tobytes()
        path = tmp_path / f"e{number}"
        shutil.copy(f"{prefix}.bin", f"{path}.bin")
        Path(f"{path}.idx").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_contents(str(path))


@pytest.mark.parametrize("algorithm", ["xxh3_64", "", "of later releases"])
def test_an_index_is_proved_by_its_checksum_or_by_its_hash(tmp_path: Path, algorithm: str) -> None:
    """A sidecar of an earlier release has no checksum of the index, one of a later release may have an unknown one."""
    with DatasetWriter(tmp_path / "d", vocab_size=50) as writer:
        writer.add_documents(np.array([3, 9, 5, 7]), np.array([2, 2]))
    prefix, index = str(tmp_path / "d"), tmp_path / "d.idx"
    if algorithm != "xxh3_64":
        change_sidecar(prefix, idx_checksum=algorithm and f"{algorithm}:00")
    assert read_contents(prefix).idx_sha256 == hashlib.sha256(index.read_bytes()).hexdigest()
    require_index(prefix)
    whole = index.read_bytes()
    index.write_bytes(whole[:34] + b"\x01" + whole[35:])  # the first sequence has a token less: one that may be
    for act in (read_contents, require_index):
        with pytest.raises(ValueError, match=r"\(the hash of the \.idx file is another\)"):
            act(prefix)


def test_what_another_user_says_of_our_data_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    """Somebody makes our folder in the system's temporary one before us, with a verdict in it."""
    prefix = write(tmp_path / "d", [3, 9, 5, 7, 8, 2], has_sidecar=False)
    (tmp_path / "d.checked.json").mkdir()  # so that the verdict is kept in the temporary folder
    assert read_contents(prefix).highest_id == 9
    (kept,) = Path(contents._temporary_folder() or "").glob("*.checked.json")
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    forged = json.loads(kept.read_text())
    forged["contents"]["highest_id"] = 1
    kept.write_text(json.dumps(with_signature(forged, "signature")))
    assert read_contents(prefix).highest_id == 1, "whoever may write there is believed"
    uid = os.geteuid()
    mine = kept.parent
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)  # now the folder is another user's
    mine.rename(mine.with_name(f"dsv3_megatron-{uid + 1}"))
    assert read_contents(prefix).highest_id == 9
    assert f"was made by another user (uid {uid}, this one is {uid + 1})" in caplog.text
    assert "no lock (there is no folder for it)" in caplog.text
