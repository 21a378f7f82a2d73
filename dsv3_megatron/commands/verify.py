"""Whether the checkpoints of a run are what was written: every byte of every file against its checksum.

    dsv3 verify checkpoints            the newest checkpoint of a folder
    dsv3 verify checkpoints --all      each one that is there
    dsv3 verify checkpoints/iter_0000500

Exit status: 0 sound, 1 damaged, 2 the command cannot be carried out. A release that made no checksums leaves no more to
be said of its checkpoints than that their files are there in their sizes.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.folder import (
    MANIFEST,
    CheckpointError,
    DamagedCheckpointError,
    Manifest,
    latest_iteration,
    read_manifest,
    saved_iterations,
)
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.slow_work import slow_work
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.data.checksums import BlockVerifier, damages
from dsv3_megatron.process.cores import usable_cores

_MAX_THREADS = 16


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsv3 verify", description="Compare every byte of a run's checkpoints with "
                                     "the checksums that were made while they were written.")
    add = parser.add_argument
    add("checkpoint", help="folder of checkpoints, or one checkpoint in it")
    add("--iteration", type=int, metavar="N", help="which checkpoint of the folder (the newest)")
    add("--all", action="store_true", help="every checkpoint of the folder")
    add("--threads", type=int, default=min(_MAX_THREADS, usable_cores()), metavar="N",
        help="blocks read at a time (%(default)s)")
    add("--json", action="store_true", help="print what was found as JSON, a line for each checkpoint")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads {options.threads} must be at least 1")
    return options


def verify_checkpoint(directory: Path, iteration: int, num_threads: int) -> dict[str, Any]:
    """Read a whole checkpoint and compare it.

    Args:
        directory: Folder of checkpoints.
        iteration: Step of the checkpoint.
        num_threads: Blocks read at a time.

    Returns:
        What was found, as plain values: "damages", a line each; "num_bytes" and "seconds" of what was compared;
        "has_checksums".

    Raises:
        CheckpointError: there is no such checkpoint.
        OSError: a file cannot be read.
    """
    started = time.perf_counter()
    try:
        manifest: Manifest | None = read_manifest(directory, iteration)
        found: list[str] = []
    except DamagedCheckpointError as error:
        manifest, found = None, list(error.reasons)
    checksums = (manifest.checksums or {}) if manifest else {}
    verifiers = {name: BlockVerifier(manifest.path / name, known) for name, known in checksums.items()} \
        if manifest else {}
    num_bytes = sum(known.num_bytes for known in checksums.values())
    with slow_work(f"verify step {iteration}", total=num_bytes, unit="B") as work:
        found += [str(error) for _, error in damages(verifiers, num_threads, work.add)]
    return {"iteration": iteration, "damages": found, "num_files": len(checksums),
            "num_bytes": num_bytes,
            "seconds": time.perf_counter() - started,
            "has_checksums": manifest is None or manifest.checksums is not None}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse_arguments(arguments)
    try:
        directory, iterations = _wanted(options)
        is_sound = True
        for iteration in iterations:
            found = verify_checkpoint(directory, iteration, options.threads)
            is_sound &= not found["damages"]
            print(json_text(found) if options.json else _as_text(directory, found))
    except (CheckpointError, OSError) as error:
        print_error(error)
        return 2
    return 0 if is_sound else 1


def _wanted(options: argparse.Namespace) -> tuple[Path, list[int]]:
    path = Path(options.checkpoint)
    named = re.fullmatch(r"iter_(\d{7,})", path.resolve().name)
    if named and (path / MANIFEST).exists():
        return path.resolve().parent, [int(named.group(1))]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder of checkpoints, or one checkpoint in it")
    if options.all:
        iterations = saved_iterations(path)
        if not iterations:
            raise CheckpointError(f"{path} has no checkpoints; give a folder that a run saved to")
        return path, iterations
    latest = options.iteration if options.iteration is not None else latest_iteration(path)
    if latest is None:
        read_manifest(path)  # says what is missing
    assert latest is not None
    return path, [latest]


def _as_text(directory: Path, found: dict[str, Any]) -> str:
    name = f"{directory}/iter_{found['iteration']:07d}"
    damaged = found["damages"]
    if damaged:
        return "\n".join([f"{name}: DAMAGED", *(f"  {line}" for line in damaged)])
    if not found["has_checksums"]:
        return f"{name}: no checksums, it is of an earlier release; its files are there in their sizes"
    num_bytes, seconds = found["num_bytes"], found["seconds"]
    return (f"{name}: sound, {found['num_files']} files, {num_bytes / 1e9:.3f} GB in {seconds:.2f} s "
            f"({num_bytes / 1e9 / seconds:.2f} GB/s)")
