"""From JSON Lines to .bin/.idx, through the command that users run, and what it says about bad input."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.data.encoder import EncodedTexts, HuggingFaceEncoder
from dsv3_megatron.data.indexed import dataset_paths, read_header, read_sidecar
from dsv3_megatron.data.preprocess import append_to_documents, expand_inputs, preprocess_files
from dsv3_megatron.data.tokenizer import fingerprint, load_tokenizer

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, tokenizer_dir, tmp_path, capsys):
    """Run the command with the tests' tokenizer; returns (status, stdout, stderr)."""

    def call(*arguments, prefix="out", model=tokenizer_dir):
        common = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]
        command = [*common, "--output-prefix", tmp_path / prefix, "--workers", 1, "--input", *arguments]
        status = tool.main([str(part) for part in command])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def read_documents(prefix):
    header = read_header(prefix)
    bin_path, idx_path, _ = dataset_paths(prefix)
    tokens = np.fromfile(bin_path, dtype=header.dtype).tolist()
    lengths = np.fromfile(idx_path, dtype="<i4", offset=34, count=header.num_sequences)
    ends = np.cumsum(lengths).tolist()
    return [tokens[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


@pytest.mark.parametrize("is_eod_appended", [True, False])
def test_command_writes_every_token(run, jsonl_file, tmp_path, texts, tokenizer_dir, is_eod_appended):
    status, out, _ = run(jsonl_file, *(["--append-eod"] if is_eod_appended else []))
    assert status == 0
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = [tokenizer.encode(text).ids + [1] * is_eod_appended for text in texts]
    prefix = tmp_path / "out_text_document"
    assert read_documents(prefix) == expected
    sidecar = read_sidecar(prefix)
    assert sidecar.tokenizer_fingerprint == fingerprint(tokenizer_dir)
    assert (sidecar.vocab_size, sidecar.num_documents) == (340, len(texts))
    assert sidecar.options == {
        "json_key": "text",
        "append_eod": is_eod_appended,
        "eod_id": 1,
        "inputs": ["train.jsonl"],
    }
    num_bytes = sum(len(text.encode()) for text in texts)
    assert out.startswith(f"{len(texts)} documents, {num_bytes / 1e6:.1f} MB, {sum(map(len, expected))} tokens, ")
    assert out.endswith(f" s -> {prefix}.bin\n")


def test_bytes_are_megatron_lms(run, jsonl_file, tmp_path, texts, tokenizer_dir):
    """What Megatron-LM's tool does, step by step: its tokenizer wrapper's ids, its builder, document by document."""
    pytest.importorskip("transformers")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    assert run(jsonl_file, "--append-eod")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    builder = IndexedDatasetBuilder(os.fspath(tmp_path / "m.bin"), dtype=DType.optimal_dtype(len(tokenizer)))
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        builder.add_document(ids, [len(ids)])
    builder.finalize(os.fspath(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"m.{suffix}").read_bytes() == (tmp_path / f"out_text_document.{suffix}").read_bytes()


def test_several_files_globs_and_keys(run, write_jsonl, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["second"])
    write_jsonl(tmp_path / "a.jsonl", ["first"])
    assert expand_inputs([str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl")]) == [
        str(tmp_path / "b.jsonl"),
        str(tmp_path / "a.jsonl"),
    ]
    assert run(tmp_path / "*.jsonl")[0] == 0
    assert read_sidecar(tmp_path / "out_text_document").options["inputs"] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "two.jsonl").write_text('{"head": "x y", "body": "z"}\n')
    assert run(tmp_path / "two.jsonl", "--json-keys", "head", "body", prefix="two")[0] == 0
    assert len(read_documents(tmp_path / "two_head_document")) == len(read_documents(tmp_path / "two_body_document"))


def test_empty_documents_and_blank_lines_are_counted(run, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    status, out, _ = run(tmp_path / "x.jsonl", "--append-eod")
    assert status == 0
    assert "note: 1 documents without tokens (kept, empty), 1 blank lines (skipped)\n" in out
    header = read_header(tmp_path / "out_text_document")
    assert (header.num_documents, header.num_sequences) == (3, 2)


def test_progress_is_reported(jsonl_file, tmp_path, tokenizer_dir, monkeypatch, texts):
    monkeypatch.setattr("dsv3_megatron.data.preprocess._BATCH_DOCUMENTS", 7)
    seen = []
    totals = preprocess_files(
        [str(jsonl_file)],
        output_prefix=str(tmp_path / "out"),
        json_key="text",
        encoder=HuggingFaceEncoder(tokenizer_dir),
        is_eod_appended=True,
        log_interval=20,
        report=seen.append,
    )
    assert [progress.num_documents for progress in seen] == [21, 42, 60]
    assert totals.num_documents == len(texts) and totals.num_tokens == seen[-1].num_tokens
    assert str(totals).startswith(f"{len(texts)} documents, ")


def bad_line(content):
    return lambda folder: (folder / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + content)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "error: input {folder}/x.jsonl does not exist: give JSON Lines files or globs\n"),
        (lambda folder: (folder / "x.jsonl").touch(), "error: no documents in {folder}/x.jsonl: the input is empty; "),
        (bad_line(b'{"text": nope}\n'), "error: {folder}/x.jsonl, line 2, byte 26: invalid JSON (Expecting value); "),
        (bad_line(b'{"t": 1}\n'), "error: {folder}/x.jsonl, line 2, byte 17: no key 'text' (keys: t); name the text's"),
    ],
)
def test_bad_input_stops_with_one_line_and_no_files(run, tmp_path, prepare, message):
    prepare(tmp_path)
    status, out, err = run(tmp_path / "x.jsonl")
    assert (status, out) == (2, "")
    assert err.startswith(message.format(folder=tmp_path)) and err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_other_errors(run, tool, jsonl_file, tmp_path, capsys):
    assert run(jsonl_file)[0] == 0
    _, _, err = run(jsonl_file)
    assert err.startswith(f"error: output {tmp_path}/out_text_document.bin exists: pass --overwrite to replace it")
    assert run(jsonl_file, "--overwrite")[0] == 0
    assert run(tmp_path / "no*.jsonl")[2] == (
        f"error: input {tmp_path}/no*.jsonl matches no file: give JSON Lines files or globs\n"
    )
    assert run(jsonl_file, model=tmp_path)[2].startswith(
        f"error: tokenizer_model={tmp_path}: {tmp_path}/tokenizer.json"
    )
    with pytest.raises(ValueError, match=r"workers=0 must be at least 1; try \d+"):
        HuggingFaceEncoder(tmp_path, num_threads=0)
    with pytest.raises(SystemExit):
        run(jsonl_file, "--log-interval", 0)
    assert "--log-interval 0 must be at least 1; try 1000" in capsys.readouterr().err


class OverflowingEncoder:
    vocab_size, eod_id, fingerprint = 10, 1, ""

    def encode_texts(self, texts):
        return EncodedTexts(np.full(len(texts), 10), np.ones(len(texts), dtype=np.int64))


def test_an_id_outside_the_vocabulary_stops(jsonl_file, tmp_path):
    with pytest.raises(ValueError, match=r"token id 10 of document 0 does not fit: ids must lie in 0\.\.9"):
        preprocess_files(
            [str(jsonl_file)],
            output_prefix=str(tmp_path / "out"),
            json_key="text",
            encoder=OverflowingEncoder(),
            is_eod_appended=False,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the dataset under way was dropped\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
    ],
)
def test_a_stop_in_the_middle_leaves_nothing(run, jsonl_file, tmp_path, monkeypatch, error, status, message):
    def fail(*_):
        raise error

    monkeypatch.setattr("dsv3_megatron.data.preprocess.append_to_documents", fail)
    assert run(jsonl_file, "--append-eod") == (status, "", message)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_append_skips_empty_documents():
    result = append_to_documents(EncodedTexts(np.array([5, 6, 7]), np.array([0, 2, 0, 1])), 9)
    assert result.ids_T.tolist() == [5, 6, 9, 7, 9]
    assert result.lengths_D.tolist() == [0, 3, 0, 2]


def test_command_needs_neither_torch_nor_megatron():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['preprocess_data.py', '--help']\n"
        "try:\n    runpy.run_path(sys.argv.pop(0) and r'TOOL', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "loaded = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    ).replace("sys.argv.pop(0) and r'TOOL'", repr(str(TOOL)))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--append-eod" in result.stdout
