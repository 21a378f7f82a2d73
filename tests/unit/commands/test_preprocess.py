"""`dsv3 preprocess` on good input: the bytes of Megatron-LM's tool, from every kind of input, however shared."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from dsv3_megatron.data.indexed import dataset_paths, read_header, read_sidecar
from dsv3_megatron.data.inspection import read_document
from dsv3_megatron.data.merge import find_datasets, merge_datasets
from dsv3_megatron.data.tokenizer import BOS_TOKEN, fingerprint, load_tokenizer
from dsv3_megatron.data.transforms.fim import find_fim_sentinels, invert_fim
from tests.unit.commands.conftest import TOOLS

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "\t \n\n",
    "plain ASCII",
    "def f(x):\n\treturn {'a': [x]}  # why?\n\n\n",
    "中文字，東京。カタカナ ひらがな",
    "naïve Ünïcödé שלום नमस्ते ไทย 한국어",
    "👍🏽 👨‍👩‍👧 \u200b\ufeff\u2028",
    "\0\x01\x7f\x85",
    "1234567 ½ Ⅷ",
    "<｜User｜>x<｜end▁of▁sentence｜>",
]


def read_pair(prefix):
    return [Path(path).read_bytes() for path in dataset_paths(prefix)[:2]]


def documents_of(prefix):
    return [read_document(os.fspath(prefix), number).tolist() for number in range(read_header(prefix).num_documents)]


def write_with_megatron(prefix, tokenizer, texts, *, eod=True, dtype=None):
    """What Megatron-LM's tool does: Hugging Face's ids, Megatron-Core's builder, document by document."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype or DType.optimal_dtype(tokenizer.get_vocab_size()))
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids += [1] if ids and eod else []
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("eod", [True, False])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_bytes_are_megatron_lms(preprocess, tmp_path, texts, tokenizer_dir, eod, is_ascii):
    texts = [*texts, *HARD_TEXTS]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=is_ascii) for text in texts]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    status, out, err = preprocess(tmp_path / "x.jsonl", options=["--append-eod"] * eod)
    assert status == 0 and "tokenizer: gigatoken (the ids of tokenizers for every text" in err
    write_with_megatron(tmp_path / "m", load_tokenizer(tokenizer_dir), texts, eod=eod)
    assert read_pair(tmp_path / "m") == read_pair(tmp_path / "out_text_document")
    sidecar = read_sidecar(tmp_path / "out_text_document")
    assert sidecar.tokenizer_fingerprint == fingerprint(tokenizer_dir)
    assert (sidecar.vocab_size, sidecar.num_documents, sidecar.options["eod_id"]) == (340, len(texts), 1)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert sidecar.counts["text_bytes"] == num_bytes and sidecar.counts["documents"] == len(texts)
    assert out.startswith(
        f"{len(texts)} documents in, {len(texts)} written, 1 of them empty, 0 left out; "
        f"{num_bytes / 1e6:.1f} MB of text, {sidecar.num_tokens} tokens, "
        f"{num_bytes / sidecar.num_tokens:.2f} bytes/token; "
    )
    assert out.endswith(f"-> {tmp_path}/out_text_document.bin\n")
    data = IndexedDataset(os.fspath(tmp_path / "out_text_document"))
    read = [data[number].tolist() for number in range(len(data))]
    assert read == [document for document in documents_of(tmp_path / "out_text_document") if document]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=12))
def test_bytes_are_megatron_lms_for_any_text(preprocess, tmp_path, tokenizer_dir, some_texts):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in some_texts))
    assert preprocess(tmp_path / "x.jsonl", options=["--append-eod", "--overwrite"])[0] == 0
    write_with_megatron(tmp_path / "m", load_tokenizer(tokenizer_dir), some_texts)
    assert read_pair(tmp_path / "m") == read_pair(tmp_path / "out_text_document")


def test_a_vocabulary_beyond_uint16(preprocess, tmp_path, texts, tokenizer_dir, write_jsonl):
    """Ids of DeepSeek-V3's size: int32 as Megatron-Core chooses it."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab |= {f"filler{number}": number for number in range(len(vocab), 128_800)}
    for number, token in enumerate(content["added_tokens"][3:]):  # behind the vocabulary, as in DeepSeek-V3
        token["id"] = 128_800 + number
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "tokenizer.json").write_text(json.dumps(content))
    texts = [*texts[:5], "a<｜User｜>b"]
    assert (
        preprocess(write_jsonl(tmp_path / "x.jsonl", texts), model=tmp_path / "big", options=["--append-eod"])[0] == 0
    )
    header = read_header(tmp_path / "out_text_document")
    assert header.dtype == np.int32 and max(documents_of(tmp_path / "out_text_document")[-1]) > 128_000
    write_with_megatron(tmp_path / "m", load_tokenizer(tmp_path / "big"), texts, dtype=np.int32)
    assert read_pair(tmp_path / "m") == read_pair(tmp_path / "out_text_document")


@pytest.fixture
def whole(preprocess, jsonl_file, tmp_path):
    """The dataset that one worker makes of the tests' texts, as bytes of .bin, .idx and .json."""
    assert preprocess(jsonl_file, prefix="whole", options=["--append-eod"])[0] == 0
    return [Path(path).read_bytes() for path in dataset_paths(tmp_path / "whole_text_document")]


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_workers_and_shards_do_not_show(preprocess, tmp_path, jsonl_file, whole, num_workers, num_shards, monkeypatch):
    shrink_blocks(monkeypatch, 700)
    for index in range(1, num_shards + 1):
        options = ["--append-eod", "--workers", num_workers, "--shard", f"{index}/{num_shards}"]
        assert preprocess(jsonl_file, prefix="whole", options=[*options, "--overwrite"])[0] == 0
    if num_shards > 1:
        names = [f"whole_text_document.shard-{index}-of-3" for index in (3, 1, 2)]
        assert sorted(path.name for path in tmp_path.glob("*.idx")) == sorted(
            [f"{name}.idx" for name in names] + ["whole_text_document.idx"]
        )
        merge_datasets([str(tmp_path / name) for name in names], str(tmp_path / "merged"))
        assert len(find_datasets([str(tmp_path / "whole_text_document.shard-*-of-3")])) == 3
    prefix = tmp_path / ("merged" if num_shards > 1 else "whole_text_document")
    assert [Path(path).read_bytes() for path in dataset_paths(prefix)] == whole


def shrink_blocks(monkeypatch, num_bytes):
    """Make the command cut its input into many blocks."""
    monkeypatch.setattr("dsv3_megatron.data.preprocess.BLOCK_BYTES", num_bytes)


def test_every_kind_of_input(preprocess, tmp_path, texts, jsonl_file, whole):
    halves = texts[:25], texts[25:]
    lines = jsonl_file.read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:25])))
    pq.write_table(pa.table({"text": halves[1]}), tmp_path / "b.parquet")
    assert preprocess(tmp_path / "a.jsonl.gz", tmp_path / "b.parquet", options=["--append-eod"])[0] == 0
    assert read_pair(tmp_path / "out_text_document") == whole[:2]
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number:03}.txt").write_text(text, encoding="utf-8")
    assert preprocess(tmp_path / "folder", options=["--append-eod", "--overwrite"])[0] == 0
    assert read_pair(tmp_path / "out_text_document") == whole[:2]


def test_standard_input(tmp_path, jsonl_file, tokenizer_dir, whole):
    command = [
        sys.executable,
        TOOLS / "preprocess_data.py",
        "--input",
        "-",
        "--tokenizer-model",
        tokenizer_dir,
        "--append-eod",
        "--output-prefix",
        tmp_path / "piped",
    ]
    with open(jsonl_file, "rb") as stream:
        subprocess.run(command, stdin=stream, check=True, capture_output=True)
    assert read_pair(tmp_path / "piped_text_document") == whole[:2]


PIPED = {
    "a substitution": "{tool} --input <(cat {file})",
    "two, compressed": "{tool} --input <(head -n 25 {file} | gzip -c) <(tail -n +26 {file} | xz -c)",
    "beside a file": "{tool} --input {half} <(tail -n +26 {file})",
    "before a file": "{tool} --input <(head -n 25 {file}) {other_half}",
    "/dev/stdin": "cat {file} | {tool} --input /dev/stdin",
    "/dev/stdin of a file": "{tool} --input /dev/stdin < {file}",
    "-, compressed": "gzip -c {file} | {tool} --input -",
    "a descriptor": "{tool} --input /dev/fd/5 5< {file}",
    "a FIFO": "mkfifo {folder}/fifo; cat {file} > {folder}/fifo & {tool} --input {folder}/fifo",
    "a slow writer": "(head -c 3 {file}; sleep 0.3; tail -c +4 {file}) | {tool} --input -",
}


@pytest.mark.parametrize("how", PIPED)
def test_what_is_piped_is_read(tmp_path, jsonl_file, tokenizer_dir, whole, how):
    lines = jsonl_file.read_bytes().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_bytes(b"".join(lines[:25]))
    (tmp_path / "other.jsonl").write_bytes(b"".join(lines[25:]))
    tool = f"{sys.executable} {TOOLS}/preprocess_data.py --tokenizer-model {tokenizer_dir} --append-eod --workers 2"
    command = PIPED[how].format(
        tool=f"{tool} --output-prefix {tmp_path}/piped",
        file=jsonl_file,
        half=tmp_path / "half.jsonl",
        other_half=tmp_path / "other.jsonl",
        folder=tmp_path,
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert read_pair(tmp_path / "piped_text_document") == whole[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "1/2"], "input {pipe} (a pipe) cannot be cut into shards; give files"),
        (["--resume"], "--resume cannot go on with the pipe {pipe}: what was read is gone; use --overwrite"),
        (["--input-format", "parquet"], "input {pipe}: Parquet cannot be read from a pipe; give a file"),
        (["--input-format", "text"], "input {pipe}: a text file cannot be read from a pipe; give a file, or JSON"),
    ],
)
def test_what_a_pipe_cannot_do(preprocess, tmp_path, jsonl_file, options, message):
    os.mkfifo(tmp_path / "pipe")
    status, _, err = preprocess(jsonl_file, tmp_path / "pipe", options=options)
    assert status == 2 and f"error: {message.format(pipe=tmp_path / 'pipe')}" in err
    assert not list(tmp_path.glob("out*"))


def test_parquet_in_a_pipe_is_refused(tmp_path, tokenizer_dir):
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "x.parquet")
    tool = [sys.executable, TOOLS / "preprocess_data.py", "--tokenizer-model", tokenizer_dir, "--input", "-"]
    with open(tmp_path / "x.parquet", "rb") as stream:
        done = subprocess.run(
            [*tool, "--output-prefix", tmp_path / "out"], stdin=stream, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2 and "error: input -: Parquet cannot be read from a pipe; give a file" in done.stderr


def test_shards_of_texts_for_both_encoders_are_one_pass(preprocess, tmp_path, texts, write_jsonl):
    """A text that gigatoken would get wrong, in one shard only: what a shard holds must not choose its encoder."""
    texts = [*texts, "The price is \u20c1 250 a night.", "a \U00011de7b", *texts]
    file = write_jsonl(tmp_path / "x.jsonl", texts)
    assert preprocess(file, prefix="whole", options=["--append-eod"])[0] == 0
    for index in (1, 2, 3):
        assert preprocess(file, prefix="whole", options=["--append-eod", "--shard", f"{index}/3"])[0] == 0
    shards = find_datasets([str(tmp_path / "whole_text_document.shard-*-of-3")])
    merge_datasets(shards, str(tmp_path / "merged"))
    assert read_pair(tmp_path / "merged") == read_pair(tmp_path / "whole_text_document")


def test_several_keys_in_one_pass(preprocess, tmp_path, tokenizer_dir):
    (tmp_path / "x.jsonl").write_text('{"head": "x y", "body": "z\\n"}\n{"head": "", "body": "w"}\n')
    status, out, _ = preprocess(tmp_path / "x.jsonl", options=["--json-keys", "head", "body"])
    tokenizer = load_tokenizer(tokenizer_dir)
    assert status == 0 and out.count("\n-> ") == 2
    assert documents_of(tmp_path / "out_head_document") == [tokenizer.encode("x y").ids, []]
    assert documents_of(tmp_path / "out_body_document") == [tokenizer.encode("z\n").ids, tokenizer.encode("w").ids]


def test_the_fallback_gives_the_same(preprocess, tmp_path, jsonl_file, whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    status, _, err = preprocess(jsonl_file, options=["--append-eod"])
    assert status == 0 and err.startswith("tokenizer: huggingface (gigatoken is not installed (")
    assert read_pair(tmp_path / "out_text_document") == whole[:2]


def test_what_is_unusual_is_taken_and_counted(preprocess, tmp_path, tokenizer_dir):
    (tmp_path / "x.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": ""}\r\n   \n{"text": "two\\u0000"}'
    )
    (tmp_path / "empty.jsonl").touch()
    status, out, _ = preprocess(tmp_path / "empty.jsonl", tmp_path / "x.jsonl", options=["--append-eod"])
    assert status == 0
    assert out.startswith("3 documents in, 3 written, 1 of them empty, 0 left out; ")
    assert "note: 2 blank lines, skipped\n" in out
    assert "note: 1 byte-order mark at the start of a file, left out\n" in out
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = [tokenizer.encode(text).ids for text in ("one", "", "two\0")]
    assert documents_of(tmp_path / "out_text_document") == [[*part, 1] if part else [] for part in ids]


def test_fim(preprocess, tmp_path, texts, write_jsonl, tokenizer_dir, monkeypatch):
    texts = [f"{number} {text}" for number in range(10) for text in texts]
    file = write_jsonl(tmp_path / "x.jsonl", texts)
    options = ["--append-eod", "--fim-rate", 0.3, "--fim-spm-rate", 0.5, "--seed", 7]
    assert preprocess(file, options=options)[0] == 0
    first = read_pair(tmp_path / "out_text_document")
    shrink_blocks(monkeypatch, 900)
    status, out, _ = preprocess(file, options=[*options, "--overwrite", "--workers", 3])
    assert status == 0 and read_pair(tmp_path / "out_text_document") == first
    sentinels = find_fim_sentinels(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    restored, num_cut = [], 0
    for ids in documents_of(tmp_path / "out_text_document"):
        assert ids.pop() == 1
        prefix, suffix, middle = invert_fim(ids, sentinels)
        num_cut += sentinels.begin_id in ids
        restored.append("".join(tokenizer.decode(part) for part in (prefix, middle, suffix)))
    assert restored == texts
    assert abs(num_cut / len(texts) - 0.3) < 4 * (0.3 * 0.7 / len(texts)) ** 0.5
    assert f"note: {len(texts) - num_cut} fill-in-the-middle: not chosen\n" in out
    assert read_sidecar(tmp_path / "out_text_document").options["fim_rate"] == 0.3
    assert preprocess(file, options=[*options[:-1], 8, "--overwrite"])[0] == 0
    assert read_pair(tmp_path / "out_text_document") != first


def test_splitting_combined_tokens(preprocess, tmp_path, texts, jsonl_file, tokenizer_dir):
    options = ["--append-eod", "--split-combined-rate", 0.5]
    assert preprocess(jsonl_file, prefix="plain", options=["--append-eod"])[0] == 0
    assert preprocess(jsonl_file, options=options)[0] == 0
    tokenizer = load_tokenizer(tokenizer_dir)
    plain, split = documents_of(tmp_path / "plain_text_document"), documents_of(tmp_path / "out_text_document")
    assert [tokenizer.decode(ids[:-1]) for ids in split] == texts
    assert sum(map(len, split)) > sum(map(len, plain))


def test_sentences(preprocess, tmp_path, write_jsonl, tokenizer_dir):
    texts = ["This is one. This is two! Is this three?", "", "Only one here."]
    status, _, err = preprocess(
        write_jsonl(tmp_path / "x.jsonl", texts * 30), options=["--append-eod", "--split-sentences"]
    )
    assert status == 0 and "sentences: Punkt" in err
    prefix = tmp_path / "out_text_sentence"
    tokenizer = load_tokenizer(tokenizer_dir)
    data = IndexedDataset(os.fspath(prefix))
    parts = [["This is one.", "This is two!", "Is this three?"], [], ["Only one here."]]
    expected = [[tokenizer.encode(sentence).ids for sentence in sentences] for sentences in parts]
    for sentences in expected:
        if sentences:
            sentences[-1].append(1)
    bounds = data.document_indices
    found = [[data[at].tolist() for at in range(bounds[number], bounds[number + 1])] for number in range(90)]
    assert found == expected * 30
    assert read_sidecar(prefix).options["sentence_model"].startswith("Punkt")


def test_progress_is_reported(preprocess, tmp_path, jsonl_file, texts, monkeypatch):
    shrink_blocks(monkeypatch, 1500)
    status, _, err = preprocess(jsonl_file, options=["--log-interval", 20])
    lines = [line for line in err.splitlines() if line.startswith("processed ")]
    assert status == 0 and 2 <= len(lines) <= 3
    assert all(" documents, " in line and " tokens, " in line and line.endswith(" MB/s") for line in lines)


def test_command_needs_neither_torch_nor_megatron(tmp_path, jsonl_file, tokenizer_dir):
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "loaded = {'torch', 'megatron', 'transformers', 'awkward', 'pyarrow', 'nltk'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    arguments = [
        TOOLS / "preprocess_data.py",
        "--input",
        jsonl_file,
        "--tokenizer-model",
        tokenizer_dir,
        "--output-prefix",
        tmp_path / "out",
    ]
    code = f"import sys; sys.argv[:] = {list(map(str, arguments))!r}\n" + code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def beginning_dir(tmp_path_factory, tokenizer_dir):
    """The tests' tokenizer with Llama 3's kind of post-processor, which puts a begin token before every text."""
    folder = tmp_path_factory.mktemp("begins")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_dir / name).read_bytes())
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS_TOKEN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS_TOKEN: {"id": BOS_TOKEN, "ids": [0], "tokens": [BOS_TOKEN]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


class TestBeginToken:
    """What a tokenizer puts around a text stands in the data, as in that of Megatron-LM's tool."""

    def test_bytes_are_megatron_lms(self, preprocess, tmp_path, texts, beginning_dir, write_jsonl):
        from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import (
            HuggingFaceTokenizer,
        )

        texts = [*texts, *HARD_TEXTS]
        write_jsonl(tmp_path / "x.jsonl", texts)
        status, _, _ = preprocess(tmp_path / "x.jsonl", model=beginning_dir, options=["--append-eod"])
        assert status == 0
        theirs = HuggingFaceTokenizer(str(beginning_dir))
        builder = IndexedDatasetBuilder(f"{tmp_path}/m.bin", dtype=DType.optimal_dtype(theirs.vocab_size))
        for text in texts:
            ids = theirs.text_to_ids(text)
            ids += [theirs.eod] if ids else []
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{tmp_path}/m.idx")
        assert read_pair(tmp_path / "m") == read_pair(tmp_path / "out_text_document")
        options = read_sidecar(tmp_path / "out_text_document").options
        assert (options["begin_ids"], options["end_ids"]) == ([0], [])

    def test_left_out(self, preprocess, tmp_path, texts, beginning_dir, tokenizer_dir, write_jsonl):
        write_jsonl(tmp_path / "x.jsonl", texts)
        assert preprocess(tmp_path / "x.jsonl", model=beginning_dir, options=["--no-add-special-tokens"])[0] == 0
        assert preprocess(tmp_path / "x.jsonl", prefix="plain", model=tokenizer_dir)[0] == 0
        assert read_pair(tmp_path / "plain_text_document") == read_pair(tmp_path / "out_text_document")
        assert read_sidecar(tmp_path / "out_text_document").options["begin_ids"] == []

    def test_once_in_documents_that_are_transformed_and_in_long_ones(
        self, preprocess, tmp_path, beginning_dir, write_jsonl
    ):
        write_jsonl(tmp_path / "x.jsonl", ["alpha beta gamma\n" * 40, "delta" * 9, "epsilon " * 600_000])
        for options in ((), ("--fim-rate", 1.0), ("--split-combined-rate", 0.5)):
            status, _, err = preprocess(
                tmp_path / "x.jsonl", model=beginning_dir, options=["--append-eod", "--overwrite", *options]
            )
            assert status == 0, err
            for ids in documents_of(tmp_path / "out_text_document"):
                assert ids[0] == 0 and ids[-1] == 1 and ids.count(0) == 1

    def test_a_resumed_job_with_the_other_choice_is_another_job(
        self, preprocess, tmp_path, texts, beginning_dir, write_jsonl, monkeypatch
    ):
        import dsv3_megatron.data.preprocess as module

        write_jsonl(tmp_path / "x.jsonl", texts)
        monkeypatch.setattr(module._Run, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert preprocess(tmp_path / "x.jsonl", model=beginning_dir)[0] == 130
        monkeypatch.undo()
        options = ["--resume", "--no-add-special-tokens"]
        status, _, err = preprocess(tmp_path / "x.jsonl", model=beginning_dir, options=options)
        assert status == 2 and "unfinished work of another job, it differs in: begin_ids" in err
        assert preprocess(tmp_path / "x.jsonl", model=beginning_dir, options=["--resume"])[0] == 0
