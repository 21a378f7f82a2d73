"""`dsv3 merge` and dsv3 inspect: what they write, print, and refuse."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from dsv3_megatron.commands import inspect, merge
from dsv3_megatron.data.indexed import dataset_paths, read_sidecar
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.inspection import measure, read_document, verify
from dsv3_megatron.data.merge import merge_datasets
from tests.signing import change_sidecar


@pytest.fixture(scope="module")
def merge_tool():
    return merge


@pytest.fixture(scope="module")
def inspect_tool():
    return inspect


def write(prefix, documents, *, vocab_size=100, **keywords):
    with DatasetWriter(prefix, vocab_size=vocab_size, **keywords) as writer:
        ids = np.array([token for document in documents for token in document], dtype=np.int64)
        writer.add_documents(ids, np.array([len(document) for document in documents]))
    return os.fspath(prefix)


def read_pair(prefix):
    return [Path(path).read_bytes() for path in dataset_paths(prefix)[:2]]


DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=5)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DOCUMENTS, min_size=1, max_size=4))
def test_merged_bytes_are_megatron_cores(tmp_path, parts):
    """Megatron-LM's merge tool is IndexedDatasetBuilder.add_index, dataset after dataset."""
    prefixes = [write(tmp_path / f"p{number}", part, is_overwrite_allowed=True) for number, part in enumerate(parts)]
    merge_datasets(prefixes, os.fspath(tmp_path / "ours"), is_overwrite_allowed=True)
    write(tmp_path / "whole", [document for part in parts for document in part], is_overwrite_allowed=True)
    assert read_pair(tmp_path / "ours") == read_pair(tmp_path / "whole")
    assert verify(os.fspath(tmp_path / "ours")) == []
    if all(any(part) for part in parts):  # Megatron-Core cannot map an empty .bin
        builder = IndexedDatasetBuilder(os.fspath(tmp_path / "theirs.bin"), dtype=np.uint16)
        for prefix in prefixes:
            builder.add_index(prefix)
        builder.finalize(os.fspath(tmp_path / "theirs.idx"))
        assert read_pair(tmp_path / "ours") == read_pair(tmp_path / "theirs")


def test_merge_command(merge_tool, tmp_path, capsys):
    for name, documents in {"a": [[1, 2]], "b": [[3], []]}.items():
        write(
            tmp_path / "in" / name,
            documents,
            tokenizer_fingerprint="f" * 64,
            options={"append_eod": True, "json_key": name},
        )
    command = ["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out")]
    assert merge_tool.main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == f"2 datasets, 3 documents, 3 tokens -> {tmp_path}/out.bin\n"
    assert printed.err == f"appended {tmp_path}/in/a\nappended {tmp_path}/in/b\n"
    sidecar = read_sidecar(tmp_path / "out")
    assert (
        sidecar.options == {"append_eod": True, "merged_from": ["a", "b"]} and sidecar.tokenizer_fingerprint == "f" * 64
    )
    assert merge_tool.main(command) == 2
    assert "out.bin exists: pass --overwrite" in capsys.readouterr().err
    assert merge_tool.main([*command, "--overwrite"]) == 0


def shard(index, count, **options):
    return {"shard": f"{index}/{count}", "job": "j", "json_key": "text"} | options


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"a": {}, "b": {"vocab_size": 70_000}}, "holds int32, .*a uint16: datasets of different vocabularies"),
        ({"a": {"tokenizer_fingerprint": "x"}, "b": {"tokenizer_fingerprint": "y"}}, "made by different tokenizers"),
        (
            {"a": {"options": shard(1, 3)}, "b": {"options": shard(3, 3)}},
            "shards 2/3 are missing: make them with --shard",
        ),
        (
            {"a": {"options": shard(1, 2)}, "b": {"options": shard(2, 2, job="k")}},
            "are shards of different jobs: give those",
        ),
        ({"a": {"options": shard(1, 2)}, "b": {"options": shard(1, 2)}}, "are both shard 1/2: give each once"),
        (
            {"a": {"options": {"begin_ids": [7]}}, "b": {"options": {"begin_ids": []}}},
            "begin and end in different ways: those of .*a begin with 7; those of .*b have no ids around them",
        ),
    ],
)
def test_what_cannot_be_merged(tmp_path, datasets, message):
    prefixes = [write(tmp_path / name, [[1]], **keywords) for name, keywords in datasets.items()]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        merge_datasets(prefixes, os.fspath(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


def test_merge_refuses_missing_and_damaged_input(merge_tool, tmp_path, capsys):
    prefix = write(tmp_path / "a", [[1]])
    for name, message in ((tmp_path / "none", "data file"), (f"{tmp_path}/no*", "names no dataset: give prefixes")):
        assert merge_tool.main(["--input", str(name), "--output-prefix", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert merge_tool.main(["--input", prefix, "--output-prefix", prefix]) == 2
    assert "is one of the inputs: give another --output-prefix" in capsys.readouterr().err
    Path(f"{prefix}.bin").write_bytes(b"")
    assert merge_tool.main(["--input", prefix, "--output-prefix", str(tmp_path / "out")]) == 2
    assert "has 0 bytes, its index says 2" in capsys.readouterr().err


def test_datasets_of_other_tools_are_merged(tmp_path):
    prefixes = []
    for name in "ab":
        builder = IndexedDatasetBuilder(os.fspath(tmp_path / f"{name}.bin"), dtype=np.int64)
        builder.add_document([70_000, 2], [2])
        builder.finalize(os.fspath(tmp_path / f"{name}.idx"))
        prefixes.append(os.fspath(tmp_path / name))
    sidecar = merge_datasets(prefixes, os.fspath(tmp_path / "out"))
    assert (sidecar.dtype, sidecar.max_token_id, sidecar.num_tokens) == ("int64", 70_000, 4)


def test_a_prefix_beside_a_folder_of_its_name(merge_tool, tmp_path, capsys):
    """A training run keeps Megatron-Core's index cache in a folder that is called like the dataset."""
    for name in ("a", "b"):
        prefix = write(tmp_path / "in" / name, [[1, 2]])
        Path(prefix).mkdir()
        (Path(prefix) / "x-GPTDataset-train-shuffle_index.npy").touch()
    for number, named in enumerate((["in/a", "in/b"], ["in/a.bin", "in/b.idx"], ["in"], ["in/"], ["in/*"])):
        inputs = [f"{tmp_path}/{name}" for name in named]
        assert merge_tool.main(["--input", *inputs, "--output-prefix", str(tmp_path / f"out{number}")]) == 0
        assert capsys.readouterr().err == f"appended {tmp_path}/in/a\nappended {tmp_path}/in/b\n"


@pytest.mark.parametrize("folder", ["data[1]", "a[b]c", "x*y", "q?"])
def test_names_with_the_signs_of_globs(merge_tool, tmp_path, folder, capsys):
    prefix = write(tmp_path / folder / "train[0]", [[1, 2]])
    other = write(tmp_path / folder / "train[1]", [[3]])
    inputs = [[prefix, other], [f"{prefix}.idx", f"{other}.bin"], [str(tmp_path / folder)]]
    inputs += [[f"{tmp_path}/{folder}/train[[]*"], [f"{tmp_path}/{folder}/train*"]] if "[" not in folder else []
    inputs += [[f"{tmp_path}/{folder}/*"]]
    for number, names in enumerate(inputs):
        assert merge_tool.main(["--input", *names, "--output-prefix", str(tmp_path / f"out{number}")]) == 0, names
        assert read_sidecar(tmp_path / f"out{number}").num_tokens == 3


def test_the_vocabulary_of_a_merge_is_that_of_all_its_ids(tmp_path, monkeypatch, inspect_tool):
    """A dataset without a sidecar, so large that a look at it before a run reads parts of it only."""
    monkeypatch.setattr("dsv3_megatron.data.blend._SCAN_BYTES", 64, raising=False)
    monkeypatch.setattr("dsv3_megatron.data.indexed._SCAN_CHUNK_BYTES", 32, raising=False)
    monkeypatch.setattr("dsv3_megatron.data.indexed._READ_BYTES", 64)
    prefix = write(tmp_path / "a", [[number % 8 for number in range(500)], [1, 9, 2], [3] * 500])
    Path(f"{prefix}.json").unlink()
    known = write(tmp_path / "b", [[1]], vocab_size=6)
    sidecar = merge_datasets([prefix, known], os.fspath(tmp_path / "out"))
    assert (sidecar.vocab_size, sidecar.max_token_id) == (10, 9)
    assert inspect_tool.main([os.fspath(tmp_path / "out"), "--verify"]) == 0


def test_an_id_that_a_sidecar_does_not_know_is_not_merged(tmp_path):
    prefix = write(tmp_path / "a", [[9]])
    change_sidecar(prefix, vocab_size=8, max_token_id=7)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a holds id 9, its sidecar says vocab_size=8: make it again"):
        merge_datasets([prefix], os.fspath(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------------------------- inspect


@pytest.fixture
def dataset(tmp_path, texts, jsonl_file, preprocess):
    assert preprocess(jsonl_file, prefix="d", options=["--append-eod"])[0] == 0
    return os.fspath(tmp_path / "d_text_document")


def test_statistics(tmp_path):
    prefix = write(tmp_path / "d", [[1] * length for length in (0, 1, 2, 3, 4, 100)])
    found = measure(prefix)
    assert (found.num_documents, found.num_empty_documents, found.num_sequences, found.num_tokens) == (6, 1, 5, 110)
    assert (found.longest, found.percentiles[50], found.mean_length, found.dtype) == (100, 2, 110 / 6, "uint16")
    assert read_document(prefix, 2).tolist() == [1, 1] and read_document(prefix, 0).tolist() == []
    with pytest.raises(ValueError, match=r"document 6 of .* must lie in 0\.\.5"):
        read_document(prefix, 6)
    empty = write(tmp_path / "e", [])
    assert measure(empty).num_tokens == 0 and verify(empty) == []


def test_inspect_command(inspect_tool, dataset, texts, tokenizer_dir, tmp_path, capsys):
    status = inspect_tool.main(
        [
            f"{dataset}.bin",
            "--verify",
            "--histogram",
            str(tmp_path / "h.png"),
            "--documents",
            "3",
            "59",
            "--tokenizer-model",
            str(tokenizer_dir),
        ]
    )
    out = capsys.readouterr().out
    assert status == 0
    assert f"documents            {len(texts)} (0 empty)\n" in out and "append_eod=True" in out
    assert texts[3] in out and texts[59] in out and "--- document 59, " in out
    assert out.endswith("verified: sound (structure and checksums)\n")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert inspect_tool.main([dataset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_documents"] == len(texts)


def test_inspect_refuses_another_tokenizer(inspect_tool, dataset, tmp_path, tokenizer_dir, capsys):
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    assert inspect_tool.main([dataset, "--documents", "0", "--tokenizer-model", str(tmp_path / "other")]) == 2
    assert "was made by tokenizer" in capsys.readouterr().err
    assert inspect_tool.main([dataset, "--documents", "99"]) == 2
    assert inspect_tool.main([str(tmp_path / "none")]) == 2


def change(path, edit):
    raw = bytearray(Path(path).read_bytes())
    edit(raw)
    Path(path).write_bytes(raw)


def flip(at):
    def edit(raw):
        raw[at] ^= 1

    return edit


def cut(raw):
    del raw[-1]


# The index of 60 documents: 34 bytes of header, 240 of lengths, 480 of offsets, 488 of boundaries.
DAMAGES = {
    "flipped token": (".bin", flip(101), "d_text_document.bin is not what .* vouches for: sha256"),
    "cut tokens": (".bin", cut, "d_text_document.bin has .* bytes, its index says"),
    "longer tokens": (".bin", lambda raw: raw.extend(b"ab"), "d_text_document.bin has .* bytes, its index says"),
    "cut index": (".idx", cut, "d_text_document.idx has .* bytes, its header says"),
    "flipped magic": (".idx", flip(0), "is not a Megatron-Core index"),
    "flipped length": (".idx", flip(34 + 4 * 7), "sequence 8 begins at byte .*, not "),
    "negative length": (".idx", flip(34 + 4 * 7 + 3), "sequence 8 begins at byte .*, not "),
    "flipped offset": (".idx", flip(34 + 240 + 8 * 5), "sequence 5 begins at byte .*, not "),
    "flipped boundary": (".idx", flip(34 + 720 + 8 * 9 + 1), "document 9 ends before it begins"),
    "flipped last boundary": (".idx", flip(34 + 720 + 8 * 60), "documents run from sequence 0 to 61, not 0 to 60"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_damage(inspect_tool, dataset, damage, capsys):
    suffix, edit, message = DAMAGES[damage]
    change(f"{dataset}{suffix}", edit)
    assert inspect_tool.main([dataset, "--verify"]) == 1
    import re

    assert re.search(f"damaged: .*{message}", capsys.readouterr().err)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_verify_finds_any_flipped_bit(dataset, data):
    path = data.draw(st.sampled_from(dataset_paths(dataset)[:2]))
    original = Path(path).read_bytes()
    at, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    raw = bytearray(original)
    raw[at] ^= 1 << bit
    Path(path).write_bytes(raw)
    try:
        assert verify(dataset)
    finally:
        Path(path).write_bytes(original)
    assert verify(dataset) == []


def test_verify_reads_every_byte_once(dataset, monkeypatch):
    from dsv3_megatron.data import inspection

    told, opened = [], []
    monkeypatch.setattr(inspection, "read_chunks", lambda path: (opened.append(path), [Path(path).read_bytes()])[1])
    reader = inspection.ProvedTokens
    monkeypatch.setattr(inspection, "ProvedTokens", lambda *given, **named: (opened.append(given[0]),
                                                                             reader(*given, **named))[1])
    assert verify(dataset, report=told.append) == []
    assert sum(told) == sum(os.path.getsize(path) for path in dataset_paths(dataset)[:2])
    assert opened == [dataset, dataset_paths(dataset)[1]], "tokens and index, each once"


def test_verify_without_a_sidecar_says_so(inspect_tool, dataset, capsys):
    Path(f"{dataset}.json").unlink()
    assert inspect_tool.main([dataset, "--verify"]) == 0
    assert "verified: sound (structure only: no sidecar with checksums)" in capsys.readouterr().out
    change(f"{dataset}.idx", flip(34 + 240 + 8 * 5))
    assert inspect_tool.main([dataset, "--verify"]) == 1


def test_verify_sees_a_sidecar_of_another_dataset(dataset, tmp_path):
    change_sidecar(dataset, num_tokens=1, vocab_size=10)
    problems = verify(dataset)
    assert any("speaks of documents, sequences, tokens, dtype" in problem for problem in problems)
    assert any("the vocabulary has 10" in problem for problem in problems)
    Path(f"{dataset}.json").write_text("{}")
    assert any("is not a dataset's sidecar" in problem for problem in verify(dataset))
