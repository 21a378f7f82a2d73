"""datatrove with this library's encoder, beside `dsv3 preprocess` alone and beside datatrove's own tokenizer.

Each contender is a whole process, from its start to its exit, on the same files of made-up text in the same run, with
four tasks (workers two at a time); contenders take turns. The parts of both pipelines of datatrove are left as
they are; joining ours is measured apart. All must have written the same tokens.

    python -m tools.bench.bench_datatrove --work-dir /tmp/bench --megabytes 1000 --runs 3 --device "AMD EPYC (2 cores)"

Text is drawn from a vocabulary with the frequencies of natural language (Zipf's), in documents of some thousand
characters; datatrove's own tokenizer is much slower, so it gets an input of its own (--peer-megabytes), which all take.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from dsv3_megatron.data.indexed import map_index
from tools.bench.bench_preprocess import REPOSITORY, Run, measure
from tools.bench.records import Measurement, append_rows, load_average

ALONE, STEP, THEIRS, MERGE = "dsv3 preprocess", "datatrove, our step", "datatrove, its own", "dsv3 merge"
TASKS, WORKERS = 4, 2
_VOCABULARY, _SEED = 60_000, 5

PIPELINE = f"TASKS, WORKERS = {TASKS}, {WORKERS}" + """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
folder, tokenizer, output, kind = sys.argv[1:]
if kind == "ours":
    from dsv3_megatron.data.datatrove_step import TokenizeDocuments
    step = TokenizeDocuments(f"{output}/part", tokenizer, append_eod=True)
else:
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from dsv3_megatron.data.tokenizer import EOS_TOKEN
    step = MegatronDocumentTokenizer(output, "part", f"{tokenizer}/tokenizer.json", EOS_TOKEN)
LocalPipelineExecutor([JsonlReader(folder), step], tasks=TASKS, workers=WORKERS, logging_dir=f"{output}/logs").run()
"""


def make_text(folder: Path, megabytes: int) -> int:
    """Write files of JSON lines, two for each task, once; returns the bytes of text."""
    note = folder / "made.json"
    if note.exists():
        return int(json.loads(note.read_text())["text_bytes"])
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(_SEED)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(["".join(generator.choice(letters, size=1 + generator.poisson(4))) for _ in range(_VOCABULARY)])
    total, files = 0, 2 * TASKS
    for number in range(files):
        with open(folder / f"{number}.jsonl", "w", encoding="utf-8") as stream:
            size = 0
            while size < megabytes * 1_000_000 // files:
                ranks = np.minimum(generator.zipf(1.2, size=generator.integers(200, 2000)), _VOCABULARY) - 1
                text = " ".join(words[ranks])
                stream.write(json.dumps({"text": text}) + "\n")
                size += len(text)
            total += size
    note.write_text(json.dumps({"text_bytes": total}))
    return total


def command_of(name: str, text: Path, tokenizer: Path, output: Path) -> list[str]:
    """A contender's command line."""
    if name == ALONE:
        # The order of datatrove's tasks: the first has the files 0, 4, ...
        files = [str(text / f"{number}.jsonl") for rank in range(TASKS) for number in range(rank, 2 * TASKS, TASKS)]
        return [sys.executable, "-m", "dsv3_megatron", "preprocess", "--input", *files, "--tokenizer-model",
                str(tokenizer), "--append-eod", "--workers", str(WORKERS), "--output-prefix", f"{output}/whole"]
    if name == MERGE:
        return [sys.executable, "-m", "dsv3_megatron", "merge", "--input",
                f"{output}/part_text_document.shard-*-of-{TASKS}.idx", "--output-prefix", f"{output}/joined"]
    kind = "ours" if name == STEP else "theirs"
    return [sys.executable, "-c", PIPELINE, str(text), str(tokenizer), str(output), kind]


def run_contenders(text: Path, tokenizer: Path, work: Path, names: tuple[str, ...], runs: int) -> dict[str, list[Run]]:
    """Take turns, and compare what was written in the last one."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(runs):
        shutil.rmtree(work, ignore_errors=True)
        for name in names:
            folder = work / ("step" if name == MERGE else name.replace(" ", "-").replace(",", ""))
            folder = work / "step" if name == STEP else folder
            folder.mkdir(parents=True, exist_ok=True)
            found[name].append(measure(command_of(name, text, tokenizer, folder), environment))
            print(f"{name:24} {found[name][-1].seconds:8.2f} s  load {load_average():.2f}", flush=True)
    whole = work / ALONE.replace(" ", "-") / "whole_text_document"
    for suffix in ("bin", "idx"):
        if Path(f"{whole}.{suffix}").read_bytes() != (work / "step" / f"joined.{suffix}").read_bytes():
            raise RuntimeError(f"the joined parts are not what dsv3 preprocess made: .{suffix}")
    if THEIRS in names:
        folder = work / THEIRS.replace(" ", "-").replace(",", "")
        parts = [folder / f"part_{rank:05d}_tokens" for rank in range(TASKS)]
        if b"".join(Path(f"{part}.bin").read_bytes() for part in parts) != Path(f"{whole}.bin").read_bytes():
            raise RuntimeError("datatrove's own tokenizer wrote other tokens")
    print(f"the same bytes: {map_index(whole).lengths_Q.size} documents, {map_index(whole).lengths_Q.sum()} tokens")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--work-dir", required=True, help="folder for the text (kept) and outputs")
    add("--megabytes", type=int, default=1000, help="text for ours (%(default)s)")
    add("--peer-megabytes", type=int, default=60, help="text for all three (%(default)s)")
    add("--runs", type=int, default=3, help="turns (%(default)s)")
    add("--device", required=True, help="what this is, for the CSV")
    add("--dry-run", action="store_true", help="print, but do not append to the results")
    options = parser.parse_args(arguments)
    folder, loads = Path(options.work_dir), [load_average()]
    tokenizer, rows = folder / "tokenizer", []
    for megabytes, names in ((options.peer_megabytes, (ALONE, STEP, MERGE, THEIRS)),
                             (options.megabytes, (ALONE, STEP, MERGE))):
        if not megabytes:
            continue
        text = folder / f"text-{megabytes}"
        size = make_text(text, megabytes)
        if not (tokenizer / "tokenizer.json").exists():
            subprocess.run([sys.executable, "-m", "dsv3_megatron", "train-tokenizer", "--input", str(text / "0.jsonl"),
                            "--vocab-size", "16384", "--max-train-bytes", "5000000", "--output", str(tokenizer)],
                           check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        config = f"{megabytes} MB of made-up text, {TASKS} tasks, {WORKERS} at a time"
        for name, runs in run_contenders(text, tokenizer, folder / "out", names, options.runs).items():
            median = statistics.median(run.seconds for run in runs)
            for metric, value, unit in (("time_median", median, "s"), ("throughput", size / 1e6 / median, "MB/s"),
                                        ("peak_memory", max(run.peak_bytes for run in runs) / 1e6, "MB"),
                                        ("num_runs", len(runs), "")):
                rows.append(Measurement(name, config, metric, value, unit))
            print(f"{config:48} {name:24} {median:7.2f} s {size / 1e6 / median:7.1f} MB/s ({len(runs)} runs)")
        loads.append(load_average())
    if not options.dry_run:
        print(append_rows("datatrove.csv", rows, f"{options.device}, load {min(loads):.1f} to {max(loads):.1f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
