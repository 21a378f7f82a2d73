"""`dsv3 preprocess` on bad input and through bad luck: what it says, what is lost (nothing), how it goes on."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_megatron.data.indexed import dataset_paths, read_sidecar
from dsv3_megatron.data.preprocess import InputError
from tests.unit.commands.conftest import TOOLS
from tests.unit.commands.test_preprocess import documents_of, shrink_blocks

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GOOD = b'{"text": "fine"}\n'  # 17 bytes
CHECKSUM = {zstd.CompressionParameter.checksum_flag: 1}  # as the zstd command writes it
COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstd.compress(data, options=CHECKSUM),
}


def line(content):
    return "x.jsonl", GOOD + content + b"\n" + GOOD


def nothing(path, texts):
    pq.write_table(pa.table({"text": texts}), path)
    return path.read_bytes()


# Name, bytes, what the message says after the file, the reason counted; the file holds two good documents beside it.
BAD_FILES = {
    "invalid JSON": (*line(b'{"text": nope}'), "line 2, byte 26: invalid JSON (Expecting value); each line must be"),
    "missing key": (
        *line(b'{"t": 1}'),
        "line 2, byte 17: no key 'text' (keys: t); name the text's key with --json-keys",
    ),
    "not a string": (*line(b'{"text": 7}'), "line 2, byte 17: 'text' holds a int; the text must be a JSON string"),
    "not an object": (*line(b'"text"'), "line 2, byte 17: a JSON str; each line must be one JSON object"),
    "invalid UTF-8": (*line(b'{"text": "a\xff"}'), "line 2, byte 28: not UTF-8 (byte 0xff); convert the file to UTF-8"),
    "lone surrogate": (
        *line(b'{"text": "\\udc00"}'),
        r"line 2, byte 17: 'text' has the lone surrogate '\udc00' at char",
    ),
    "NUL byte": (*line(b'{"text": "a\0"}'), "line 2, byte 28: a NUL byte; is it a text file? remove it"),
    "byte-order mark": (
        *line(b'\xef\xbb\xbf{"text": "a"}'),
        "line 2, byte 17: a byte-order mark inside the file; were",
    ),
    "document too large": (
        *line(b'{"text": "' + b"ab " * 100 + b'"}'),
        "line 2, byte 17: a document of 300 bytes, over max_document_bytes=200; raise --max-document-bytes",
    ),
}


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("reason", BAD_FILES)
def test_a_bad_document_stops_or_is_left_out(preprocess, tmp_path, reason):
    name, content, message = BAD_FILES[reason]
    (tmp_path / name).write_bytes(content)
    options = ["--append-eod", "--max-document-bytes", 200]
    status, out, err = preprocess(tmp_path / name, options=options)
    assert (status, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {tmp_path}/{name}, {message}")
    assert errors[0].endswith(", or leave such documents out with --on-error skip")
    assert files_of(tmp_path) == [name]

    status, out, _ = preprocess(tmp_path / name, options=[*options, "--on-error", "skip"])
    assert status == 0
    assert out.startswith("3 documents in, 2 written, 0 of them empty, 1 left out; ")
    assert f"left out: 1 {reason}\n" in out and "out.rejects.jsonl" in out
    (rejected,) = map(json.loads, (tmp_path / "out.rejects.jsonl").read_text().splitlines())
    assert (rejected["file"], rejected["line"], rejected["reason"]) == (str(tmp_path / name), 2, reason)
    assert rejected["message"].startswith(f"{tmp_path}/{name}, {message}")
    good, also_good = documents_of(tmp_path / "out_text_document")
    assert good == also_good
    assert read_sidecar(tmp_path / "out_text_document").counts["rejected"] == {reason: 1}


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_file(preprocess, tmp_path, kind, damage):
    numbers = random.Random(0)
    lines = [json.dumps({"text": numbers.randbytes(400).hex()}).encode() + b"\n" for _ in range(2500)]
    raw = bytearray(COMPRESSORS[kind](b"".join(lines)))
    if damage == "cut":
        del raw[len(raw) * 7 // 8 :]
    else:
        raw[len(raw) * 7 // 8] ^= 0xFF
    (tmp_path / f"x.jsonl.{kind}").write_bytes(raw)
    status, _, err = preprocess(tmp_path / f"x.jsonl.{kind}")
    assert status == 2 and f"error: {tmp_path}/x.jsonl.{kind}, line " in err
    if damage == "cut":
        assert ": the compressed file is cut short, what follows is lost; fetch or make the file again" in err
    status, out, _ = preprocess(tmp_path / f"x.jsonl.{kind}", options=["--on-error", "skip"])
    # Where damage is found late, what came out before may have been garbage: lines of their own kind of badness.
    rejects = [json.loads(row) for row in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rejects].count("damaged file") == 1 and rejects[-1]["reason"] == "damaged file"
    assert status == 0
    if damage == "cut":  # everything before the cut is there
        (rejected,) = rejects
        num_documents = rejected["line"] - 1
        assert num_documents > 1000
        assert out.startswith(f"{num_documents} documents in, {num_documents} written, ")
        assert rejected["byte"] == sum(map(len, lines[:num_documents]))


def test_bad_parquet(preprocess, tmp_path):
    file = tmp_path / "x.parquet"
    nothing(file, ["one", None, "two"])
    assert f"error: {file}, row 1: 'text' is null; give every row a text" in preprocess(file)[2]
    status, out, _ = preprocess(file, options=["--on-error", "skip"])
    assert status == 0 and out.startswith("3 documents in, 2 written")
    options = ["--overwrite", "--json-keys", "body"]
    assert (
        f"error: {file}, row 0: no column 'body' (columns: text); name the text's column"
        in preprocess(file, options=options)[2]
    )
    nothing(file, [1, 2])
    message = f"error: {file}, row 0: column 'text' holds int64; the text must be a column of strings"
    assert message in preprocess(file, options=["--overwrite"])[2]
    file.write_bytes(nothing(file, ["one"])[:-9])
    assert f"error: {file}, row 0: not a whole Parquet file (" in preprocess(file, options=["--overwrite"])[2]


def test_two_columns_of_one_name(preprocess, tmp_path):
    file = tmp_path / "x.parquet"
    columns = [pa.array(["a"]), pa.array([1]), pa.array(["b"]), pa.array([2])]
    pq.write_table(pa.table(columns, names=["text", "id", "text", "id"]), file)
    message = "row 0: columns 1 (string) and 3 (string) are all named 'text'; rename all but one of them"
    assert f"error: {file}, {message}" in preprocess(file)[2]
    pq.write_table(pa.table(columns[1:], names=["id", "text", "id"]), file)  # others do no harm
    assert preprocess(file)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tokenizer_dir, tmp_path):
    """They must not fail the job when all of it is done, neither in the input's names nor in the output's."""
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / f"{name}.jsonl").write_bytes(GOOD + b"{}\n")
    (tmp_path / name).mkdir()

    def run(prefix, *options):
        command = [sys.executable, TOOLS / "preprocess_data.py", "--input", tmp_path / f"{name}.jsonl"]
        command += ["--tokenizer-model", tokenizer_dir, "--output-prefix", prefix, *options]
        return subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8"}, check=False)

    stopped = run(tmp_path / "out")
    assert stopped.returncode == 2 and rb"caf\udce9.jsonl, line 2, byte 17: no key" in stopped.stderr
    for _ in range(2):  # the second finds it done
        done = run(tmp_path / "out", "--on-error", "skip", "--resume")
        assert done.returncode == 0, done.stderr
    assert read_sidecar(tmp_path / "out_text_document").options["inputs"] == [f"{name}.jsonl"]
    for file in ("out_text_document.json", "out.rejects.jsonl"):
        assert r"caf\udce9.jsonl" in (tmp_path / file).read_bytes().decode("utf-8")
    done = run(tmp_path / name / name, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    assert rb"caf\xe9_text_document.bin" in done.stdout


def test_bad_text_files(preprocess, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("fine")
    (folder / "b.txt").write_bytes(b"bin\0ary")
    (folder / "c.txt").write_text("x" * 300)
    (folder / "d.txt").write_bytes("sixteen".encode("utf-16"))
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"zipped" * 10)[:-5])
    (folder / "f.txt").write_text("\ufeffalso fine")
    options = ["--max-document-bytes", 200]
    assert (
        f"error: {folder}/b.txt, byte 3: a NUL byte; is it a text file? leave it out"
        in preprocess(folder, options=options)[2]
    )
    status, out, _ = preprocess(folder, options=[*options, "--on-error", "skip"])
    assert status == 0 and out.startswith("6 documents in, 2 written")
    rejects = [json.loads(row) for row in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["reason"]) for row in rejects] == [
        ("b.txt", "NUL byte"),
        ("c.txt", "document too large"),
        ("d.txt", "invalid UTF-8"),
        ("e.txt.gz", "damaged file"),
    ]
    assert "UTF-16 (by its byte-order mark); convert" in rejects[2]["message"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_line_beyond_all_bounds_is_never_held(preprocess, tmp_path, name, monkeypatch):
    shrink_blocks(monkeypatch, 100_000)
    content = GOOD + b'{"text": "' + b"a" * 3_000_000 + b'"}\n' + GOOD
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    options = ["--max-document-bytes", 100, "--on-error", "skip"]
    status, out, _ = preprocess(tmp_path / name, options=options)
    assert status == 0 and "2 written" in out and "left out: 1 document too large" in out
    (rejected,) = map(json.loads, (tmp_path / "out.rejects.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["byte"]) == (2, 17)


def test_line_numbers_hold_over_blocks_and_shards(preprocess, tmp_path, monkeypatch):
    shrink_blocks(monkeypatch, 40)
    content = GOOD * 50 + b"{}\n" + GOOD * 9 + b"[]\n"
    (tmp_path / "x.jsonl").write_bytes(content)
    found = []
    for index in (1, 2, 3):
        options = ["--on-error", "skip", "--workers", 2, "--shard", f"{index}/3"]
        assert preprocess(tmp_path / "x.jsonl", options=options)[0] == 0
        rejects = tmp_path / f"out.shard-{index}-of-3.rejects.jsonl"
        if rejects.exists():
            found += [(row["line"], row["byte"]) for row in map(json.loads, rejects.read_text().splitlines())]
    assert found == [(51, 850), (61, 1006)]


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (
            lambda folder: (folder / "x.jsonl").unlink(),
            [],
            "input {folder}/x.jsonl does not exist: give files, globs or",
        ),
        (lambda folder: (folder / "x.jsonl").write_text(""), [], "no documents in {folder}/x.jsonl: give JSON lines, "),
        (lambda folder: None, ["--workers", 0], "workers=0 must be at least 1; try "),
        (lambda folder: None, ["--max-document-bytes", 0], "max_document_bytes=0 must be at least 1"),
        (
            lambda folder: None,
            ["--json-keys", "text", "text"],
            "json_keys=text text must be one or more different keys",
        ),
        (lambda folder: None, ["--shard", "0/2"], "shard=0/2 must be I/N with 1 <= I <= N, the first shard of three"),
        (lambda folder: None, ["--fim-rate", 1.5], "fim_rate=1.5 must"),
        (
            lambda folder: None,
            ["--fim-rate", 0.1, "--fim-sentinels", "<a>", "<b>", "<c>"],
            "fim_rate > 0 needs the sentinels ",
        ),
        (
            lambda folder: (folder / "out_text_document.bin").touch(),
            [],
            "output {folder}/out_text_document.bin exists: pass",
        ),
    ],
)
def test_what_cannot_be(preprocess, tmp_path, prepare, options, message):
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    prepare(tmp_path)
    before = files_of(tmp_path)
    status, out, err = preprocess(tmp_path / "x.jsonl", options=options)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: " + message.format(folder=tmp_path))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "flags", [["--log-interval", 0], ["--keep-newlines"], ["--split-sentences", "--fim-rate", 0.1]]
)
def test_flags_that_do_not_go_together(preprocess, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        preprocess(tmp_path / "x.jsonl", options=flags)
    assert flags[0] in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there(preprocess, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    err = preprocess(tmp_path / "x.jsonl", model=tmp_path)[2]
    assert err.startswith(f"error: tokenizer_model={tmp_path}: {tmp_path}/tokenizer.json does not exist; give a folder")


class OverflowingEncoder:
    """Gives ids that its vocabulary does not have, for one text."""

    name, vocab_size, eod_id, fingerprint = "overflowing", 10, 1, ""
    begin_ids = end_ids = ()

    def encode_pieces(self, text):
        import numpy as np

        yield np.array([70_000 if text == "bad" else 3], np.uint32)

    def limit_memory(self):
        pass


@pytest.mark.parametrize("is_skipping", [False, True])
def test_an_id_that_does_not_fit(tmp_path, is_skipping):
    from dsv3_megatron.data.preprocess import PreprocessOptions, preprocess
    from dsv3_megatron.data.reading.inputs import expand_inputs

    (tmp_path / "x.jsonl").write_bytes(GOOD + b'{"text": "bad"}\n' + GOOD)
    options = PreprocessOptions(
        files=expand_inputs([str(tmp_path / "x.jsonl")]),
        keys=("text",),
        is_eod_appended=False,
        output_prefix=str(tmp_path / "out"),
        is_skipping=is_skipping,
    )
    if is_skipping:
        totals = preprocess(options, OverflowingEncoder())
        assert (totals.documents, totals.rejected) == (2, {"token id out of range": 1})
        assert documents_of(tmp_path / "out_text_document") == [[3], [3]]
        return
    message = (
        r"x\.jsonl, line 2, byte 17: token id 70000 with a vocabulary of 10, stored as uint16; use a tokenizer whose"
    )
    with pytest.raises(InputError, match=message):
        preprocess(options, OverflowingEncoder())
    assert files_of(tmp_path) == ["x.jsonl"]


# ------------------------------------------------------------------------------------------------------------ bad luck


@pytest.fixture
def long_job(tmp_path, texts, write_jsonl, tokenizer_dir):
    """A command of about a second in some hundred blocks, and the dataset it should make."""
    file = write_jsonl(tmp_path / "x.jsonl", [f"{number} {text}" for number in range(30) for text in texts])
    with open(file, "ab") as stream:
        stream.write(b"{}\n")
    code = (
        "import sys, runpy; from dsv3_megatron.data import preprocess; preprocess.BLOCK_BYTES = 3000;"
        "sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        code,
        TOOLS / "preprocess_data.py",
        "--input",
        file,
        "--tokenizer-model",
        tokenizer_dir,
        "--append-eod",
        "--on-error",
        "skip",
        "--fim-rate",
        "0.1",
    ]
    expected = [*command, "--output-prefix", tmp_path / "expected", "--workers", "1"]
    subprocess.run([str(part) for part in expected], check=True, capture_output=True)
    return command, result_of(tmp_path, "expected")


def result_of(folder, prefix):
    # The sidecar's hash of the job has the prefix in it.
    sidecar = read_sidecar(folder / f"{prefix}_text_document")
    options = {key: value for key, value in sidecar.options.items() if key != "job"}
    pair = [Path(path).read_bytes() for path in dataset_paths(folder / f"{prefix}_text_document")[:2]]
    return [*pair, options, sidecar.counts, (folder / f"{prefix}.rejects.jsonl").read_bytes()]


def children_of(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def kill_somewhere(process, state, numbers):
    """Kill a run at a random moment of its start or, three times out of four, of its work; False if it is through."""
    is_early = numbers.random() < 0.25
    before = state.stat().st_mtime_ns if state.exists() else None
    while not is_early and process.poll() is None:
        if state.exists() and state.stat().st_mtime_ns != before:  # it has finished a block
            break
        time.sleep(0.002)
    try:
        process.wait(numbers.uniform(0, 0.5))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    assert process.returncode == 0
    return False


def test_kill_9_at_random_moments(long_job, tmp_path):
    """Twenty times a run is killed somewhere and gone on with, with other numbers of workers, until it is through."""
    command, expected = long_job
    numbers = random.Random(5)
    num_kills = num_gone_on = num_runs = 0
    while num_kills < 20:
        num_runs += 1
        prefix = f"run{num_runs}"
        state = tmp_path / f"{prefix}.unfinished" / "state.json"
        is_killed = True
        while is_killed:
            options = ["--output-prefix", tmp_path / prefix, "--resume", "--workers", numbers.choice([1, 2, 4])]
            num_gone_on += state.exists()
            process = subprocess.Popen(
                [str(part) for part in [*command, *options]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            if num_kills == 20:
                assert process.wait(120) == 0
                break
            is_killed = kill_somewhere(process, state, numbers)
            num_kills += is_killed
        assert result_of(tmp_path, prefix) == expected
        assert not (tmp_path / f"{prefix}.unfinished").exists()
    assert num_gone_on >= 10


def test_finished_work_is_not_done_again(long_job, tmp_path):
    command, expected = long_job
    options = ["--output-prefix", tmp_path / "run", "--workers", 1]
    process = subprocess.Popen(
        [str(part) for part in [*command, *options]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    state = tmp_path / "run.unfinished" / "state.json"
    while not state.exists() or json.loads(state.read_text())["totals"]["documents"] < 300:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.endswith(
        f"interrupted\nfinished work is kept in {tmp_path}/run.unfinished: --resume goes on from there\n"
    )
    before = json.loads(state.read_text())
    assert not list(tmp_path.glob("run_text*"))
    again = subprocess.run([str(part) for part in [*command, *options]], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert (
        f"error: {tmp_path}/run.unfinished holds the unfinished work of an earlier run: pass --resume" in again.stderr
    )
    other = [*command, *options, "--resume", "--seed", 9]
    again = subprocess.run([str(part) for part in other], capture_output=True, text=True, check=False)
    assert "holds the unfinished work of another job, it differs in: transforms; give the same" in again.stderr
    # The input is gone up to where the work stood: what is finished is not read again.
    file = Path(command[command.index("--input") + 1])
    stat = file.stat()
    with open(file, "r+b") as stream:
        stream.write(b"\xff" * before["position"]["offset"])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    resumed = [*command, *options, "--resume", "--tokenizer-backend", "huggingface"]
    done = subprocess.run([str(part) for part in resumed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path, "run") == expected
    done = subprocess.run([str(part) for part in resumed], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1801 documents in, 1800 written")  # said again, nothing done


def test_a_killed_worker(long_job, tmp_path):
    command, expected = long_job
    options = ["--output-prefix", tmp_path / "run", "--workers", 2]
    process = subprocess.Popen(
        [str(part) for part in [*command, *options]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    state = tmp_path / "run.unfinished" / "state.json"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.005)
    workers = children_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"error: worker process {workers[0]} was killed by SIGKILL (was memory short?)\n" in err
    assert "--resume goes on from there" in err
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    subprocess.run([str(part) for part in [*command, *options, "--resume"]], check=True, capture_output=True)
    assert result_of(tmp_path, "run") == expected


def test_two_processes_do_not_write_one_output(preprocess, tmp_path, jsonl_file):
    import fcntl

    (tmp_path / "out.unfinished").mkdir()
    with open(tmp_path / "out.unfinished" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        err = preprocess(jsonl_file)[2]
    assert f"error: another process is at work in {tmp_path}/out.unfinished: wait for it, or give another" in err


def test_unfinished_work_in_which_nothing_was_finished_is_in_nobodys_way(preprocess, tmp_path, jsonl_file):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "job.json").write_text("{}")
    assert preprocess(jsonl_file)[0] == 0
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(("name", "change", "message"), [
    ("state.json", lambda raw: raw.replace(b'"offset": ', b'"offset": 1'), r"state\.json does not say how far the "
     r"unfinished work of an earlier run came \(its content does not have its checksum .*\): start over with --over"),
    ("state.json", lambda raw: raw[:-9], r"state\.json does not say how far the unfinished work"),
    ("rejects.jsonl", lambda raw: raw.replace(b'"line": 1', b'"line": 9'), r"rejects\.jsonl is not what was written: "
     "start over with --overwrite"),
    ("out_text_document.lengths", lambda raw: b"\x07" + raw[1:], "lengths is not what was written"),
])
def test_damaged_unfinished_work_is_refused_and_stays(preprocess, tmp_path, monkeypatch, name, change, message):
    shrink_blocks(monkeypatch, 40)
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" + GOOD * 9 + b"nope\n" + GOOD)
    monkeypatch.setattr("dsv3_megatron.data.preprocess._Run.finish", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess(tmp_path / "x.jsonl", options=["--on-error", "skip"])
    monkeypatch.undo()
    (file,) = (tmp_path / "out.unfinished").glob(name)
    file.write_bytes(change(file.read_bytes()))
    before = files_of(tmp_path / "out.unfinished")
    status, _, err = preprocess(tmp_path / "x.jsonl", options=["--on-error", "skip", "--resume"])
    assert status == 2 and re.search(message, err), err
    assert files_of(tmp_path / "out.unfinished") == before
    assert preprocess(tmp_path / "x.jsonl", options=["--on-error", "skip", "--overwrite"])[0] == 0
    assert documents_of(tmp_path / "out_text_document")


def test_unfinished_work_of_another_user_is_not_taken_over(preprocess, tmp_path, jsonl_file):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.unfinished").symlink_to(tmp_path / "elsewhere")
    status, _, err = preprocess(jsonl_file)
    assert status == 2 and "out.unfinished is a link, where a folder of this user's would be: remove it" in err
    assert not files_of(tmp_path / "elsewhere")


@pytest.mark.parametrize("failing_call", range(1, 6))
def test_an_error_while_publishing_loses_nothing(preprocess, tmp_path, jsonl_file, monkeypatch, failing_call):
    """Renames fail one after the other; each time the same command with --resume puts the dataset in place."""
    from dsv3_megatron.data import indexed_writer

    assert preprocess(jsonl_file, prefix="expected")[0] == 0
    calls = 0
    real = os.replace

    def replace(source, target):
        nonlocal calls
        if not str(source).endswith(".partial"):  # the job's own state
            calls += 1
            if calls == failing_call:
                raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(indexed_writer.os, "replace", replace)
    status, _, err = preprocess(jsonl_file)
    monkeypatch.undo()
    if failing_call <= 3:
        assert status == 2 and "error: [Errno 28] No space left on device" in err
        assert not (tmp_path / "out_text_document.idx").exists()
    assert preprocess(jsonl_file, options=["--resume"])[0] == 0
    for ours, theirs in zip(
        dataset_paths(tmp_path / "out_text_document")[:2],
        dataset_paths(tmp_path / "expected_text_document")[:2],
        strict=True,
    ):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()
    assert not (tmp_path / "out.unfinished").exists()


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from dsv3_megatron.data import preprocess
preprocess.BLOCK_BYTES = 3000
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk(long_job, tmp_path):
    """A limit on the size of files stands in for a disk that fills up while the dataset grows."""
    command, expected = long_job
    options = ["--output-prefix", tmp_path / "run", "--workers", 2]
    limited = [str(part) for part in [sys.executable, "-c", LIMITED, *command[3:], *options]]
    failed = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert failed.returncode == 2, failed.stderr
    assert "error: [Errno 27] File too large" in failed.stderr and "--resume goes on from there" in failed.stderr
    assert not list(tmp_path.glob("run_text*"))
    subprocess.run([str(part) for part in [*command, *options, "--resume"]], check=True, capture_output=True)
    assert result_of(tmp_path, "run") == expected


def test_a_target_that_cannot_be_written(preprocess, tmp_path, jsonl_file):
    (tmp_path / "file").touch()
    status, _, err = preprocess(jsonl_file, prefix="file/out")
    assert status == 2 and "error: " in err and f"{tmp_path}/file" in err
    assert files_of(tmp_path) == ["file", "train.jsonl"]
