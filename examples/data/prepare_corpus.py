#!/usr/bin/env python3
"""From folders of JSON lines to token files, by datatrove: filters, MinHash deduplication, and this library's encoder.

On this machine, four tasks, two at a time:

    python examples/data/prepare_corpus.py --input corpus/ --work runs/corpus --tokenizer-model tokenizer/ \
        --output-prefix data/train --append-eod --tasks 4 --workers 2

With Slurm, a hundred tasks of each stage; every stage waits for the one before it:

    python examples/data/prepare_corpus.py --input corpus/ --work runs/corpus --tokenizer-model tokenizer/ \
        --output-prefix data/train --append-eod --tasks 100 --executor slurm --partition cpu --time 04:00:00

Five stages, each with its log in WORK/logs/STAGE. The same command again does what is missing: a task that ended is not
repeated, one that was killed begins again. Change the number of tasks, the input or a setting, and give another --work.
At the end the parts are joined with `dsv3 merge`; with Slurm that command is printed, for when the jobs have ended.

Needs: pip install -e '.[datatrove]'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def stages(options: argparse.Namespace) -> list[tuple[str, int, list[Any]]]:
    """Name, number of tasks and steps of each stage."""
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    from dsv3_megatron.data.datatrove_step import PlainWords, TokenizeDocuments

    # SHA-1, since datatrove's other hash needs a release of xxhash before 4.
    work, words, config = Path(options.work), PlainWords(), MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    kept = str(work / "kept")
    filters = [] if options.no_filters else [
        GopherRepetitionFilter(language=words), GopherQualityFilter(language=words, min_stop_words=0)]
    return [
        ("filter", options.tasks, [JsonlReader(options.input, text_key=options.text_key), *filters, JsonlWriter(kept)]),
        ("signatures", options.tasks, [
            JsonlReader(kept), MinhashDedupSignature(str(work / "signatures"), config, language=words)]),
        ("buckets", config.num_buckets, [
            MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=config)]),
        ("clusters", 1, [MinhashDedupCluster(str(work / "buckets"), str(work / "duplicates"), config=config)]),
        ("tokens", options.tasks, [
            JsonlReader(kept), MinhashDedupFilter(str(work / "duplicates")),
            TokenizeDocuments(options.output_prefix, options.tokenizer_model, append_eod=options.append_eod,
                              fim_rate=options.fim_rate)]),
    ]


def executors(options: argparse.Namespace) -> list[Any]:
    """An executor for each stage, which waits for the one before it."""
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    made: list[Any] = []
    for name, tasks, steps in stages(options):
        logs = str(Path(options.work) / "logs" / name)
        if options.executor == "local":
            made.append(LocalPipelineExecutor(steps, tasks=tasks, workers=min(options.workers, tasks),
                                              logging_dir=logs))
            continue
        made.append(SlurmPipelineExecutor(
            steps, tasks=tasks, time=options.time, partition=options.partition, job_name=f"corpus-{name}",
            workers=options.workers, logging_dir=logs, depends=made[-1] if made else None, mail_type="NONE",
            env_command=options.env_command))
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run or launch the stages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, metavar="DIR", help="folder of JSON lines, compressed or not")
    add("--text-key", default="text", metavar="KEY", help="key of the text (%(default)s)")
    add("--work", required=True, metavar="DIR", help="folder for what stages hand on, and logs; all tasks see it")
    add("--tokenizer-model", required=True, metavar="DIR", help="folder with a tokenizer.json")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_text_document.bin and .idx")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--fim-rate", type=float, default=0.0, metavar="X", help="share of documents cut for fill-in-the-middle")
    add("--no-filters", action="store_true", help="deduplicate only")
    add("--tasks", type=int, default=4, metavar="N", help="parts of the work (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="tasks at a time; -1: all (%(default)s)")
    add("--executor", choices=["local", "slurm"], default="local", help="where tasks run (%(default)s)")
    add("--partition", default="cpu", metavar="NAME", help="with slurm (%(default)s)")
    add("--time", default="24:00:00", metavar="TIME", help="with slurm: limit of a task (%(default)s)")
    add("--env-command", metavar="COMMAND", help="with slurm: what activates the Python environment on a node")
    options = parser.parse_args(arguments)
    dataset = f"{options.output_prefix}_text_document"
    merge = ["--input", f"{dataset}.shard-*-of-{options.tasks}.idx" if options.tasks > 1 else f"{dataset}.idx",
             "--output-prefix", dataset]
    if Path(f"{dataset}.idx").exists():
        print(f"{dataset} is there already")
        return 0
    launched = executors(options)
    if options.executor == "slurm":
        launched[-1].run()  # launches those that it waits for
        print("when the jobs have ended: dsv3 merge", *merge)
        return 0
    for executor in launched:
        executor.run()
    if options.tasks == 1:
        return 0  # one task writes the dataset itself
    from dsv3_megatron.commands.merge import main as merge_datasets

    return merge_datasets(merge)


if __name__ == "__main__":
    sys.exit(main())
