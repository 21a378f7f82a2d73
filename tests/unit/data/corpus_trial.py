"""The whole pipeline of examples/data on a corpus of any size: planted copies, a kill among its last tasks, every byte.

    python -m tests.unit.data.corpus_trial --folder /tmp/trial --megabytes 1000 --copies 1000

The corpus is eight files of made-up text. Copies of documents, every second with one word changed, are put into other
files. `prepare_corpus.py` filters nothing, finds duplicates and encodes, four tasks and two at a time. When datatrove
has noted that the first part of the dataset is finished, all of its processes are killed (-9). The same command again
must finish.

What is checked: a part that was finished stays as it is. Of each document and its copies one is left, and every other
document. The dataset has the bytes of `dsv3 preprocess` on the texts that are left, in the order of the tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3_megatron.data.indexed import map_index
from tools.bench.bench_datatrove import TASKS, make_text

ROOT = Path(__file__).resolve().parents[3]
NUM_FILES = 2 * TASKS
# The order in which the parts have the files: task r reads files r, r + 4.
ORDER = [file for rank in range(TASKS) for file in range(rank, NUM_FILES, TASKS)]
_SEED = 11


def lines_of(file: Path) -> Iterator[str]:
    """The documents of a file of JSON lines, as they stand."""
    with open(file, encoding="utf-8") as stream:
        yield from stream


def plant_copies(plain: Path, folder: Path, number: int) -> list[int]:
    """Write the corpus with copies among its documents.

    Args:
        plain: Folder of the files without copies.
        folder: Where the files with copies go.
        number: Copies.

    Returns:
        For each document, in the order of the tasks: which text it is, a copy with its original's number.
    """
    chosen = random.Random(_SEED)
    sizes = [sum(1 for _ in lines_of(plain / f"{file}.jsonl")) for file in range(NUM_FILES)]
    starts = [sum(sizes[:file]) for file in range(NUM_FILES)]
    planted: dict[tuple[int, int], list[int]] = defaultdict(list)  # by file and line that they go before
    for original in chosen.sample(range(sum(sizes)), number):
        home = max(file for file in range(NUM_FILES) if starts[file] <= original)
        file = chosen.choice([other for other in range(NUM_FILES) if other != home])
        planted[file, chosen.randrange(sizes[file])].append(original)
    wanted = {original for originals in planted.values() for original in originals}
    texts: dict[int, str] = {}
    for file in range(NUM_FILES):
        for place, line in enumerate(lines_of(plain / f"{file}.jsonl"), start=starts[file]):
            if place in wanted:
                texts[place] = json.loads(line)["text"]
    folder.mkdir()
    identities, num_changed = {}, 0
    for file in range(NUM_FILES):
        identities[file] = []
        with open(folder / f"{file}.jsonl", "w", encoding="utf-8") as stream:
            for place, line in enumerate(lines_of(plain / f"{file}.jsonl")):
                for original in planted.get((file, place), ()):
                    words = texts[original].split(" ")
                    num_changed += 1
                    if num_changed % 2:
                        words[chosen.randrange(len(words))] = "changed"
                    stream.write(json.dumps({"text": " ".join(words)}) + "\n")
                    identities[file].append(original)
                stream.write(line)
                identities[file].append(starts[file] + place)
    return [identity for file in ORDER for identity in identities[file]]


def dsv3(*words: str) -> None:
    """Run a command of this library, or end with its error."""
    subprocess.run([sys.executable, "-m", "dsv3_megatron", *words], check=True, cwd=ROOT,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})


def run_and_kill(command: list[str], folder: Path) -> dict[str, int]:
    """Kill everything when the first part is finished and another has begun.

    Args:
        command: What is started.
        folder: Of the trial; gets the output, in killed.log.

    Returns:
        The parts that were finished, with the time of their last change.
    """
    with open(folder / "killed.log", "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    notes = folder / "work" / "logs" / "tokens" / "completions"
    while not list(notes.glob("*")) or not list(folder.glob("*.unfinished")):
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode} before it could be killed: see killed.log")
        time.sleep(0.05)
    finished = [folder / f"train_text_document.shard-{int(note.name) + 1}-of-{TASKS}.bin" for note in notes.glob("*")]
    changed = {path.name: path.stat().st_mtime_ns for path in finished}
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return changed


def documents_of(prefix: str) -> list[np.ndarray]:
    """The tokens of every document of a dataset, as views of its file."""
    index = map_index(prefix)
    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r")
    return np.split(tokens, np.cumsum(index.lengths_Q)[:-1])


def check_dataset(folder: Path, identities: list[int]) -> None:
    """Compare the dataset with the corpus in the order of the tasks.

    Args:
        folder: Of the trial.
        identities: As of `plant_copies`.
    """
    files = [str(folder / "text" / f"{file}.jsonl") for file in ORDER]
    flags = ["--tokenizer-model", str(folder / "tokenizer"), "--append-eod", "--workers", "2"]
    dsv3("preprocess", "--input", *files, *flags, "--output-prefix", str(folder / "all"))
    everything, dataset = str(folder / "all_text_document"), str(folder / "train_text_document")
    documents, left_documents = documents_of(everything), documents_of(dataset)
    num_all, num_left = len(documents), len(left_documents)
    assert num_all == len(identities)
    seen: set[int] = set()
    place = num_dropped = 0
    with open(folder / "left.jsonl", "w", encoding="utf-8") as left:
        lines = (line for file in ORDER for line in lines_of(folder / "text" / f"{file}.jsonl"))
        for number, line in enumerate(lines):
            if place < num_left and np.array_equal(documents[number], left_documents[place]):
                assert identities[number] not in seen, f"document {number} is there twice"
                seen.add(identities[number])
                left.write(line)
                place += 1
            else:
                num_dropped += 1
    assert place == num_left, f"document {place} of the dataset is none of the corpus, or stands at another place"
    assert seen == set(identities), f"{len(set(identities) - seen)} texts are gone with all of their copies"
    dsv3("preprocess", "--input", str(folder / "left.jsonl"), *flags, "--output-prefix", str(folder / "again"))
    for suffix in ("bin", "idx"):
        ours = (folder / f"train_text_document.{suffix}").read_bytes()
        assert ours == (folder / f"again_text_document.{suffix}").read_bytes(), f"other bytes: .{suffix}"
    print(f"{num_left} of {num_all} documents are left, {num_dropped} copies are gone; "
          f"{int(map_index(dataset).lengths_Q.sum())} tokens, bytes as of dsv3 preprocess", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the trial; an assertion says what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder, or none yet")
    parser.add_argument("--megabytes", type=int, default=1000, help="of text (%(default)s)")
    parser.add_argument("--copies", type=int, default=1000, help="planted (%(default)s)")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    size = make_text(folder / "plain", options.megabytes)
    identities = plant_copies(folder / "plain", folder / "text", options.copies)
    dsv3("train-tokenizer", "--input", str(folder / "text" / "0.jsonl"), "--vocab-size", "16384",
         "--max-train-bytes", "5000000", "--output", str(folder / "tokenizer"))
    command = [sys.executable, str(ROOT / "examples" / "data" / "prepare_corpus.py"), "--input", str(folder / "text"),
               "--work", str(folder / "work"), "--tokenizer-model", str(folder / "tokenizer"), "--output-prefix",
               str(folder / "train"), "--append-eod", "--no-filters", "--tasks", str(TASKS), "--workers", "2"]
    start = time.monotonic()
    finished = run_and_kill(command, folder)
    print(f"{size / 1e6:.0f} MB of text; killed after {time.monotonic() - start:.0f} s with {len(finished)} of {TASKS} "
          "parts finished", flush=True)
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    print(f"the same command again took {time.monotonic() - start:.0f} s", flush=True)
    for name, changed in finished.items():
        assert (folder / name).stat().st_mtime_ns == changed, f"{name} was finished, and was written again"
    check_dataset(folder, identities)
    return 0


if __name__ == "__main__":
    sys.exit(main())
