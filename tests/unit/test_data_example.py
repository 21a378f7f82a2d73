"""examples/data/prepare_corpus.py: planted duplicates are gone, the rest is encoded as by `dsv3 preprocess`.

The jobs that it gives Slurm are looked at, and run as Slurm would, one after another.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.commands.preprocess import main as preprocess
from dsv3_megatron.data.inspection import measure
from dsv3_megatron.data.tokenizer import save_tokenizer, train_tokenizer

pytest.importorskip("datatrove", reason="datatrove is not installed (pip install -e '.[datatrove]')")
pytest.importorskip("orjson", reason="datatrove's reader of JSON lines needs orjson (pip install -e '.[datatrove]')")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "data" / "prepare_corpus.py"
NUM_FILES, EACH = 4, 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Four files; every tenth document is a copy of one of another file, whole or with one word changed.

    Returns:
        The folder, and the texts that must be left.
    """
    folder = tmp_path_factory.mktemp("corpus")
    chosen = random.Random(2)
    words = ["".join(chosen.choices("abcdefghijklmnopqrstuvwxyz", k=chosen.randint(2, 9))) for _ in range(3000)]
    single = [" ".join(chosen.choices(words, k=chosen.randint(100, 200))) for _ in range(NUM_FILES * EACH * 9 // 10)]
    copies = []
    for number, text in enumerate(chosen.sample(single, NUM_FILES * EACH - len(single))):
        changed = text.split()
        changed[50] = "other" if number % 2 else changed[50]
        copies.append(" ".join(changed))
    texts = single + copies
    chosen.shuffle(texts)
    save_tokenizer(train_tokenizer(texts, vocab_size=500), folder / "tokenizer")
    (folder / "text").mkdir()
    for number in range(NUM_FILES):
        (folder / "text" / f"{number}.jsonl").write_text("".join(
            json.dumps({"text": text}) + "\n" for text in texts[number::NUM_FILES]))
    return folder, single


def words_of(corpus: Path, folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--input", str(corpus / "text"), "--work", str(folder / "work"),
            "--tokenizer-model", str(corpus / "tokenizer"), "--output-prefix", str(folder / "train"), "--append-eod",
            "--no-filters", "--tasks", "4", *more]


def run(words: list[str], **environment: str) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kept_texts(corpus: Path, folder: Path) -> list[str]:
    """The texts of a dataset, decoded."""
    from dsv3_megatron.data.inspection import read_document
    from dsv3_megatron.data.tokenizer import load_tokenizer

    tokenizer, prefix = load_tokenizer(corpus / "tokenizer"), str(folder / "train_text_document")
    return [tokenizer.decode(read_document(prefix, number).tolist())
            for number in range(measure(prefix).num_documents)]


def same_but_one_word(one: str, other: str) -> bool:
    pairs = list(zip(one.split(), other.split(), strict=False))
    return len(one.split()) == len(other.split()) and sum(a != b for a, b in pairs) <= 1


def check_dataset(corpus: Path, single: list[str], folder: Path) -> None:
    """One of each text and its copies is left, in the order of the input, with the bytes of `dsv3 preprocess`."""
    texts = kept_texts(corpus, folder)
    assert len(texts) == len(single) == len(set(texts))
    assert all(any(same_but_one_word(text, kept) for kept in texts) for text in single)
    inputs = [json.loads(line)["text"] for number in range(NUM_FILES)
              for line in (corpus / "text" / f"{number}.jsonl").read_text().splitlines()]
    places = [inputs.index(text) for text in texts]
    assert places == sorted(places)
    (folder / "left.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert preprocess(["--input", str(folder / "left.jsonl"), "--tokenizer-model", str(corpus / "tokenizer"),
                       "--append-eod", "--workers", "1", "--output-prefix", str(folder / "again")]) == 0
    for suffix in ("bin", "idx"):
        assert (folder / f"train_text_document.{suffix}").read_bytes() == \
            (folder / f"again_text_document.{suffix}").read_bytes()


def test_planted_duplicates_are_gone(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, single = corpus
    run(words_of(folder, tmp_path))
    check_dataset(folder, single, tmp_path)
    assert "is there already" in run(words_of(folder, tmp_path))


SBATCH = """#!/usr/bin/env bash
# Keeps the script that it is given under its number, and the words, as Slurm would keep a job.
number=$(( $(ls "$JOBS"/*.sh 2>/dev/null | wc -l) + 1 ))
cp "${@: -1}" "$JOBS/$number.sh"
echo "$@" > "$JOBS/$number.words"
echo "Submitted batch job $number"
"""


SCONTROL = """#!/usr/bin/env bash
echo localhost
"""
# The tasks of a job array in one process: what datatrove's launch_pickled_pipeline does, for each of them.
TASKS = """
import os, sys
import dill
for task in range(int(sys.argv[2])):
    os.environ["SLURM_ARRAY_TASK_ID"] = str(task)
    with open(sys.argv[1], "rb") as file:
        dill.load(file).run()
"""


def test_the_jobs_of_slurm(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Their order and arrays are asked for as they must be; their tasks, run one by one, give the same dataset."""
    folder, single = corpus
    programs, jobs = tmp_path / "programs", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    for name, script in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    printed = run(words_of(folder, tmp_path, "--executor", "slurm", "--partition", "cpu"), PATH=path, JOBS=str(jobs))
    assert "when the jobs have ended: dsv3 merge" in printed
    scripts = {int(file.stem): file.read_text() for file in jobs.glob("*.sh")}
    stages = {number: re.search(r"srun .* launch_pickled_pipeline (.*)/executor.pik", text)
              for number, text in scripts.items()}
    order = [(number, Path(found[1]).name) for number, found in sorted(stages.items()) if found]
    assert [name for _, name in order] == ["filter", "signatures", "buckets", "clusters", "tokens"]
    for (number, name), before in zip(order, [None, *(number for number, _ in order)], strict=False):
        num_tasks = {"buckets": 14, "clusters": 1}.get(name, 4)
        assert f"--array=0-{num_tasks - 1}" in scripts[number]
        words = (jobs / f"{number}.words").read_text()
        assert (f"--dependency=afterok:{before}" in words) == (before is not None)
        run([sys.executable, "-c", TASKS, str(tmp_path / "work" / "logs" / name / "executor.pik"), str(num_tasks)],
            PATH=path, SLURM_JOB_ID="1", SLURM_NODELIST="localhost", SLURM_CPUS_PER_TASK="1", SLURM_MEM_PER_CPU="2048")
    run([sys.executable, "-m", "dsv3_megatron", "merge", *printed.strip().split("dsv3 merge ")[1].split()])
    check_dataset(folder, single, tmp_path)
