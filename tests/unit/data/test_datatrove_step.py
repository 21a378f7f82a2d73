"""The encoder as a step of datatrove's pipelines, against `dsv3 preprocess`; what datatrove's own tokenizer wrote."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.commands.inspect import main as inspect
from dsv3_megatron.commands.merge import main as merge
from dsv3_megatron.commands.preprocess import main as preprocess
from dsv3_megatron.data.indexed import read_sidecar
from dsv3_megatron.data.inspection import read_document
from dsv3_megatron.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

pytest.importorskip("datatrove", reason="datatrove is not installed (pip install -e '.[datatrove]')")
pytest.importorskip("orjson", reason="datatrove's reader of JSON lines needs orjson (pip install -e '.[datatrove]')")

ROOT = Path(__file__).resolve().parents[3]
NUM_FILES, TASKS = 5, 4
# The order in which the tasks' parts have the files: task r reads files r, r + 4, ...
ORDER = [file for rank in range(TASKS) for file in range(rank, NUM_FILES, TASKS)]
WORDS = "the quick brown fox jumps over a lazy dog größer naïve 価格 определение 👍🏽 x=1; \r\n\t !!".split(" ")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer`, and `text` with five files of 40 documents, of which some are of one character."""
    folder = tmp_path_factory.mktemp("corpus")
    chosen = random.Random(1)
    texts = [" ".join(chosen.choices(WORDS, k=chosen.choice([0, 3, 30, 200]))) or "a" for _ in range(40 * NUM_FILES)]
    save_tokenizer(train_tokenizer(texts, vocab_size=420), folder / "tokenizer")
    (folder / "text").mkdir()
    for number in range(NUM_FILES):
        (folder / "text" / f"{number}.jsonl").write_text("".join(
            json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[number::NUM_FILES]))
    return folder


def run_step(corpus: Path, folder: Path, *, tasks: int = TASKS, workers: int = 1, **settings: Any) -> None:
    """Read, encode and write with datatrove's executor of one machine."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader

    from dsv3_megatron.data.datatrove_step import TokenizeDocuments

    step = TokenizeDocuments(str(folder / "part"), corpus / "tokenizer", **settings)
    LocalPipelineExecutor([JsonlReader(str(corpus / "text")), step], tasks=tasks, workers=workers,
                          logging_dir=str(folder / "logs")).run()


def bytes_of(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_name(f"{prefix.name}.bin").read_bytes(), prefix.with_name(f"{prefix.name}.idx").read_bytes()


def expected(corpus: Path, folder: Path, *flags: str) -> tuple[bytes, bytes]:
    """What `dsv3 preprocess` makes of the files in the order of the tasks."""
    assert preprocess(["--input", *(str(corpus / "text" / f"{file}.jsonl") for file in ORDER), "--workers", "1",
                       "--tokenizer-model", str(corpus / "tokenizer"), "--output-prefix", str(folder / "whole"),
                       *flags]) == 0
    return bytes_of(folder / "whole_text_document")


@pytest.mark.parametrize(("settings", "flags", "workers"), [
    ({"append_eod": True}, ["--append-eod"], 2),
    ({"append_eod": True, "fim_rate": 0.5, "fim_spm_rate": 0.5, "seed": 7},
     ["--append-eod", "--fim-rate", "0.5", "--fim-spm-rate", "0.5", "--seed", "7"], 1),
    ({"tokenizer_backend": "huggingface"}, [], 1),
])
def test_the_parts_are_those_of_preprocess(corpus: Path, tmp_path: Path, settings: dict[str, Any], flags: list[str],
                                           workers: int) -> None:
    run_step(corpus, tmp_path, workers=workers, **settings)
    parts = sorted(tmp_path.glob("part_text_document.shard-?-of-4.idx"))
    assert len(parts) == TASKS and not list(tmp_path.glob("*.unfinished"))
    assert merge(["--input", *map(str, reversed(parts)), "--output-prefix", str(tmp_path / "joined")]) == 0
    assert bytes_of(tmp_path / "joined") == expected(corpus, tmp_path, *flags)
    joined, whole = read_sidecar(tmp_path / "joined"), read_sidecar(tmp_path / "whole_text_document")
    assert joined is not None and whole is not None and joined.counts == whole.counts
    assert joined.tokenizer_fingerprint == whole.tokenizer_fingerprint and joined.options["shard"] == "1/1"
    assert inspect([str(tmp_path / "joined"), "--verify"]) == 0


def test_a_missing_part_is_named_and_a_task_without_files_has_an_empty_one(
        corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_step(corpus, tmp_path, tasks=NUM_FILES + 1)
    parts = [str(path) for path in sorted(tmp_path.glob("part_text_document.shard-*.idx"))]
    assert len(parts) == NUM_FILES + 1
    assert merge(["--input", *parts[:-2], parts[-1], "--output-prefix", str(tmp_path / "joined")]) == 2
    assert "shards 5/6 are missing" in capsys.readouterr().err
    assert merge(["--input", *parts, "--output-prefix", str(tmp_path / "joined")]) == 0
    sidecar = read_sidecar(tmp_path / "joined")
    assert sidecar is not None and sidecar.num_documents == 40 * NUM_FILES


KILLED = """
import os, signal, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from dsv3_megatron.data.datatrove_step import TokenizeDocuments

def killed_in_the_middle(data, rank=0, world_size=1):
    for number, document in enumerate(data):
        if rank == 2 and number == 20 and sys.argv[3] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        yield document

corpus, folder = sys.argv[1:3]
step = TokenizeDocuments(f"{folder}/part", f"{corpus}/tokenizer", append_eod=True)
LocalPipelineExecutor([JsonlReader(f"{corpus}/text"), killed_in_the_middle, step], tasks=4, workers=1,
                      logging_dir=f"{folder}/logs").run()
"""


def test_a_killed_task_begins_again_and_the_others_do_not(corpus: Path, tmp_path: Path) -> None:
    def run(how: str) -> int:
        with open(tmp_path / "output", "ab") as output:
            process = subprocess.Popen([sys.executable, "-c", KILLED, corpus, tmp_path, how], cwd=ROOT, stdout=output,
                                       stderr=output, start_new_session=True)
            status = process.wait(timeout=120)
        with contextlib.suppress(ProcessLookupError):  # the executor's own helper outlives it
            os.killpg(process.pid, signal.SIGKILL)
        return status

    assert run("killed") == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part*.bin")}
    assert len(done) == 2 and (tmp_path / "part_text_document.shard-3-of-4.unfinished").is_dir()
    # As if the machine had gone down between the second part's last byte and datatrove's note that it is finished.
    (tmp_path / "logs" / "completions" / "00001").unlink()
    assert run("whole") == 0
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part*.bin")}
    assert len(again) == TASKS and not list(tmp_path.glob("*.unfinished"))
    assert again["part_text_document.shard-1-of-4.bin"] == done["part_text_document.shard-1-of-4.bin"]
    assert merge(["--input", f"{tmp_path}/part_text_document.shard-*.idx", "--output-prefix",
                  str(tmp_path / "joined")]) == 0
    assert bytes_of(tmp_path / "joined") == expected(corpus, tmp_path, "--append-eod")


def test_documents_that_cannot_be_taken(tmp_path: Path, corpus: Path) -> None:
    from datatrove.data import Document

    from dsv3_megatron.data.datatrove_step import TokenizeDocuments

    documents = [Document("good", "1"), Document("half \ud800 a pair", "2"), Document("too long " * 20, "3")]

    def step(**settings: Any) -> TokenizeDocuments:
        return TokenizeDocuments(str(tmp_path / "one"), corpus / "tokenizer", max_document_bytes=100, **settings)

    for bad, message in ((1, "document 2: .*lone surrogate"), (2, "document 3: a document of 180 bytes, over")):
        with pytest.raises(ValueError, match=message):
            list(step().run(iter([documents[0], documents[bad]])))
        assert not list(tmp_path.iterdir())
    assert [document.id for document in step(on_error="skip").run(iter(documents))] == ["1", "2", "3"]
    sidecar = read_sidecar(tmp_path / "one_text_document")
    assert sidecar is not None and sidecar.num_documents == 1
    assert sidecar.counts["rejected"] == {"lone surrogate": 1, "document too large": 1}


@pytest.mark.parametrize(("settings", "message"), [
    ({"tokenizer_backend": "fast"}, "tokenizer_backend='fast' must be one of"),
    ({"on_error": "go on"}, "on_error='go on' must be stop or skip"),
    ({"fim_rate": 2.0}, "fim_rate"),
    ({"fim_rate": 0.1, "fim_sentinels": ["<a>", "<b>", "<c>"]}, "needs the sentinels"),
    ({"max_document_bytes": 0}, "must be at least 1"),
])
def test_wrong_settings_are_said_before_any_task(tmp_path: Path, corpus: Path, settings: dict[str, Any], message: str
                                                 ) -> None:
    from dsv3_megatron.data.datatrove_step import TokenizeDocuments

    with pytest.raises(ValueError, match=message):
        TokenizeDocuments(str(tmp_path / "part"), corpus / "tokenizer", **settings)
    with pytest.raises(ValueError, match="nowhere"):
        TokenizeDocuments(str(tmp_path / "part"), tmp_path / "nowhere")


def test_a_dataset_of_another_job_is_not_replaced(tmp_path: Path, corpus: Path) -> None:
    run_step(corpus, tmp_path, tasks=1)
    before = bytes_of(tmp_path / "part_text_document")
    (tmp_path / "logs" / "completions" / "00000").unlink()
    with pytest.raises(ValueError, match="exists: pass --overwrite"):
        run_step(corpus, tmp_path, tasks=1, append_eod=True)
    assert bytes_of(tmp_path / "part_text_document") == before
    run_step(corpus, tmp_path, tasks=1)  # this very job may


def test_what_datatroves_own_tokenizer_wrote_is_read(corpus: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Its .bin and .idx, without a sidecar: inspected, decoded and joined."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    LocalPipelineExecutor([
        JsonlReader(str(corpus / "text")),
        MegatronDocumentTokenizer(str(tmp_path), "theirs", str(corpus / "tokenizer" / "tokenizer.json"), None)],
        tasks=2, workers=1, logging_dir=str(tmp_path / "logs")).run()
    prefixes = [str(tmp_path / f"theirs_{rank:05d}_tokens") for rank in range(2)]
    tokenizer = load_tokenizer(corpus / "tokenizer")
    texts = [json.loads(line)["text"] for file in (0, 2, 4)
             for line in (corpus / "text" / f"{file}.jsonl").read_text().splitlines()]
    for number in (0, 40, 119):
        assert read_document(prefixes[0], number).tolist() == tokenizer.encode(texts[number]).ids
    assert inspect([prefixes[0], "--verify", "--documents", "1", "--tokenizer-model",
                    str(corpus / "tokenizer")]) == 0
    shown = capsys.readouterr().out
    assert "none: made by another tool" in shown and "120 (0 empty)" in shown and "structure only" in shown
    assert merge(["--input", *prefixes, "--output-prefix", str(tmp_path / "joined")]) == 0
    ours, theirs = bytes_of(tmp_path / "joined"), [bytes_of(Path(prefix)) for prefix in prefixes]
    assert ours[0] == theirs[0][0] + theirs[1][0] and np.frombuffer(ours[0], np.uint16).max() < 420
