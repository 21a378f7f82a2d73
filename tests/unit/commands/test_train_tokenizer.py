"""`dsv3 train-tokenizer`: what it writes, from which part of which input, and what it says about bad input."""

import gzip
import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.commands import train_tokenizer
from dsv3_megatron.data.tokenizer import count_ids, fingerprint, load_tokenizer

TOOL = Path(__file__).resolve().parents[3] / "tools" / "train_tokenizer.py"
WORDS = "tokens follow an order that depends on the hash of 中文字 and été; (x + 1) == 3.14159\n".split(" ")


def make_documents(start, stop):
    return [
        " ".join(WORDS[(7 * i + k * k) % len(WORDS)] + str(i * k % 97) for k in range(60)) for i in range(start, stop)
    ]


def write(path, documents, key="text"):
    lines = "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8")
    with opened as stream:
        stream.write(lines)
    return path


@pytest.fixture(scope="module")
def tool():
    return train_tokenizer


@pytest.fixture
def run(tool, tmp_path, capsys):
    """Run the command; returns (status, stdout, stderr)."""

    def call(*arguments, size=400, output="out"):
        status = tool.main([str(part) for part in ("--vocab-size", size, "--output", tmp_path / output, *arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_what_is_piped_is_learned(tmp_path):
    """The same tokenizer from files and from pipes, which give their bytes once, with one key and with two."""
    rows = [{"text": text, "more": f"{text[:50]} more"} for text in make_documents(0, 400)]
    for name, part in {"a": rows[:200], "b": rows[200:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    found = []
    for number, inputs in enumerate((f"{a} {b}", f"{a} <(cat {b})", f"<(gzip -c {a}) /dev/stdin < {b}")):
        for keys in ("text", "text more"):
            output = tmp_path / f"{number} {keys}"
            options = f"--vocab-size 400 --output '{output}' --json-keys {keys}"
            command = f"{sys.executable} {TOOL} {options} --input {inputs}"
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert f"of {400 * len(keys.split())} documents" in done.stderr
            found.append(fingerprint(output))
    assert found == found[:2] * 3 and found[0] != found[1]


def test_it_trains_and_transformers_loads(run, tmp_path):
    file = write(tmp_path / "a.jsonl", make_documents(0, 400))
    status, out, err = run("--input", file)
    assert status == 0, err
    assert out.startswith("tokenizer: 400 ids in ") and fingerprint(tmp_path / "out")[:12] in out
    assert " bytes/token on " in out and "held out" in out
    assert re.fullmatch(r"learning from 39\d documents, 0\.2 MB, of 400 documents, 0\.2 MB read\n", err)
    ours = load_tokenizer(tmp_path / "out")
    assert count_ids(ours) == 400
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(theirs) == 400
    for text in [*make_documents(500, 503), "\r\n\x00 👩‍🚀 <｜fim▁hole｜>", ""]:
        ids = ours.encode(text).ids
        assert theirs(text).input_ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


def test_files_globs_folders_and_keys_are_one_input(run, tmp_path):
    documents = make_documents(0, 200)
    whole = write(tmp_path / "whole.jsonl", documents)
    write(tmp_path / "parts" / "b.jsonl", documents[:80])
    write(tmp_path / "parts" / "deep" / "a.jsonl.gz", documents[80:120])
    write(tmp_path / "x1.jsonl", documents[120:150])
    write(tmp_path / "x2.jsonl", documents[150:])
    assert run("--input", whole, output="one")[0] == 0
    assert run("--input", tmp_path / "x*.jsonl", tmp_path / "parts", tmp_path / "x1.jsonl", output="two")[0] == 0
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")  # the order of documents does not count
    pairs = [{"q": first, "a": second} for first, second in zip(documents[::2], documents[1::2], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert run("--input", tmp_path / "pairs.jsonl", "--json-keys", "q", "a", output="three")[0] == 0
    assert fingerprint(tmp_path / "three") == fingerprint(tmp_path / "one")


def test_the_sample_is_spread_over_the_input(run, tmp_path):
    halves = [f"{word} " * 30 + str(i) for word in ("head", "tail") for i in range(300)]
    file = write(tmp_path / "a.jsonl", halves)
    status, _, err = run("--input", file, "--max-train-bytes", 20_000, size=290)
    assert status == 0 and " of 600 documents, 0.1 MB read" in err
    assert {"Ġhead", "Ġtail"} <= load_tokenizer(tmp_path / "out").get_vocab().keys()  # the first half has no "tail"
    first = fingerprint(tmp_path / "out")
    assert run("--input", file, "--max-train-bytes", 20_000, "--seed", 5, "--overwrite", size=290)[0] == 0
    assert fingerprint(tmp_path / "out") != first
    status, _, err = run("--input", file, "--max-train-bytes", 0, "--overwrite", size=290)
    assert status == 0 and err == "learning from all of the input\n"


def test_an_existing_tokenizer_is_not_replaced(run, tmp_path):
    file = write(tmp_path / "a.jsonl", make_documents(0, 200))
    assert run("--input", file)[0] == 0
    before = fingerprint(tmp_path / "out")
    status, out, err = run("--input", file, size=420)
    assert (status, out) == (2, "")
    assert f"already holds a tokenizer, {before[:12]}: give --overwrite to replace it, or another --output" in err
    assert fingerprint(tmp_path / "out") == before
    assert run("--input", file, "--overwrite", size=420)[0] == 0
    assert count_ids(load_tokenizer(tmp_path / "out")) == 420


def test_an_output_that_cannot_be(run, tmp_path, tool, monkeypatch):
    file = write(tmp_path / "a.jsonl", make_documents(0, 20))
    assert f"a.jsonl/t: {file} is a file; give another folder" in run("--input", file, output="a.jsonl/t")[2]
    monkeypatch.setattr(tool.os, "access", lambda path, mode: False)  # as root every folder can be written to
    status, _, err = run("--input", file)
    assert status == 2 and f"out: {tmp_path} cannot be written to; give another folder" in err


@pytest.mark.parametrize(("size", "message"), [
    (3, "error: vocab_size=3 must be at least 274"),
    (1_292_800, "error: vocab_size=1292800 must be at most 262144; DeepSeek-V3 has 129280"),
    (30_000, r"fewer than --vocab-size 30000 (nothing was written): give more text than 20 documents, 0.0 MB"),
])
def test_sizes_out_of_reach(run, tmp_path, size, message):
    file = write(tmp_path / "a.jsonl", make_documents(0, 20))
    status, out, err = run("--input", file, size=size)
    assert (status, out) == (2, "") and message in err
    assert not (tmp_path / "out").exists()


def test_bad_input(run, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    write(tmp_path / "blank.jsonl", ["", ""])
    write(tmp_path / "other.jsonl", ["words"], key="content")
    for name, message in {
        "empty.jsonl": "empty.jsonl: the input is empty; give JSON Lines with a text each",
        "blank.jsonl": "the input is empty",
        "folder": "folder: the folder holds no files",
        "other.jsonl": "other.jsonl, line 1, byte 0: no key 'text' (keys: content); name the text's key",
        "none*.jsonl": "matches no file",
    }.items():
        status, out, err = run("--input", tmp_path / name)
        assert (status, out) == (2, "") and message in err, (name, err)
    file = write(tmp_path / "a.jsonl", make_documents(0, 20))
    assert "error: min_frequency=0 must be at least 1" in run("--input", file, "--min-frequency", 0)[2]
    assert "error: seed=-1 must be an integer" in run("--input", file, "--seed", -1)[2]
    with pytest.raises(SystemExit):
        run("--input", file, "--max-train-bytes", -1)
    assert "bytes/token not measured" in run("--input", write(tmp_path / "b.jsonl", make_documents(0, 5)), size=290)[1]


def test_ctrl_c_ends_the_learning_and_leaves_nothing(tmp_path):
    words = random.Random(0)
    documents = [" ".join(f"{words.getrandbits(48):x}" for _ in range(2000)) for _ in range(200)]
    file = write(tmp_path / "a.jsonl", documents)
    command = [sys.executable, TOOL, "--input", file, "--vocab-size", "100000", "--output", tmp_path / "out"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    assert process.stderr.readline().startswith("learning from ")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)  # it is at work
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=2) == -signal.SIGINT
    assert process.stderr.read() == ""
    process.stderr.close()
    assert not (tmp_path / "out").exists()
