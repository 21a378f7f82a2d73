"""What it costs to prove files: preprocessing, opening a dataset, reading its tokens, loading a checkpoint, exporting.

Each is done with checksums and without them, in turns, in one process; the numbers are medians of the time and of what
was computed, and the least of each, which other work disturbs least. Without them means, for what is read,
`--verify-files none`; for what is written, that nothing makes the checksums: the functions that do are replaced, for no
run can leave them out. What is read comes from memory, where the last turn left it: there a checksum costs most beside
the rest. With `--cold` the system forgets the files before every turn, and they come from disk, as when a run starts on
another host. A dataset is opened without them as it was before there were any: the index has its hash compared, and its
numbers are not looked at.

    preprocess   text to tokens with their checksums, one worker, from the first block to the finished dataset
    open         a dataset of many short documents, from its name to its first sample, twenty times
    read         every token of the same dataset once, in the order of a training run
    load         a checkpoint of a run into its model and optimizer
    export       the same checkpoint to Hugging Face's layout, in bf16, two workers
    import       that export back
    hash         the checksum alone, of bytes that were just read and of bytes that come from memory

Usage:
    python -m tools.bench.bench_verification --preset laptop --rounds 7 --folder /tmp/bench-verification
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tools.bench.random_run import random_token_trainer
from tools.bench.records import Measurement, append_rows, load_average, warn_of_load

# An action is given whether files are proved, does what is timed, and returns nothing.
Action = Callable[[bool], None]
_DOCUMENTS, _DOCUMENT_TOKENS, _SEQ_LENGTH = 200_000, 400, 4096


@contextlib.contextmanager
def unproved(is_verified: bool) -> Iterator[None]:
    """Have nothing make checksums of what is written, nor look at every number of an index, unless `is_verified`."""
    from dsv3_megatron.checkpoint import folder
    from dsv3_megatron.data import checksums, contents, folder_checksums, hashed_files, indexed_writer

    def nothing(path: str | os.PathLike[str] | int) -> checksums.FileChecksums:
        size = os.path.getsize(path)
        empty = checksums.FileChecksums(checksums.ALGORITHM, checksums.BLOCK_BYTES, size, "")
        width = checksums.num_digits(checksums.ALGORITHM)
        return checksums.FileChecksums(empty.algorithm, empty.block_bytes, size, "0" * width * empty.num_blocks)

    def size_alone(file: Any) -> checksums.FileChecksums:
        return nothing(file._descriptor)

    def hash_of_ids(writer: Any, suffix: str, data: Any) -> None:
        if suffix == "bin":  # the sidecar's hash is older than checksums
            writer._hashes[suffix].update(data)

    with contextlib.ExitStack() as stack:
        if not is_verified:
            for module in (folder, folder_checksums):
                stack.enter_context(mock.patch.object(module, "checksum_file", nothing))
            stack.enter_context(mock.patch.object(hashed_files.HashedFile, "_take", lambda *_: None))
            stack.enter_context(mock.patch.object(hashed_files.HashedFile, "checksums", size_alone))
            stack.enter_context(mock.patch.object(contents, "check_index", lambda prefix: None))
            stack.enter_context(mock.patch.object(contents, "is_known", lambda algorithm: False))
            stack.enter_context(mock.patch.object(indexed_writer.DatasetWriter, "_take", hash_of_ids))
        yield


def preprocessing(folder: Path) -> Action:
    """Text that this machine has, about 30 MB, to tokens."""
    from dsv3_megatron.commands import train_tokenizer
    from dsv3_megatron.data.corpus import build_quickstart_corpus
    from dsv3_megatron.data.encoder import choose_encoder
    from dsv3_megatron.data.preprocess import PreprocessOptions, preprocess
    from dsv3_megatron.data.reading.inputs import expand_inputs

    build_quickstart_corpus(folder / "corpus", target_bytes=30_000_000)
    text, tokenizer = str(folder / "corpus" / "train.jsonl"), str(folder / "tokenizer")
    if train_tokenizer.main(["--input", text, "--vocab-size", "8192", "--max-train-bytes", "5000000",
                             "--output", tokenizer]):
        raise RuntimeError("no tokenizer")
    encoder, _ = choose_encoder(tokenizer)
    files = expand_inputs([text])

    def act(is_verified: bool) -> None:
        preprocess(PreprocessOptions(files, ("text",), str(folder / "made"), True, num_workers=1,
                                     is_overwrite_allowed=True), encoder)

    return act


def written_dataset(folder: Path) -> str:
    """A dataset of random ids in short documents, with its sidecar and checksums."""
    import numpy as np

    from dsv3_megatron.data.indexed_writer import DatasetWriter

    generator = np.random.default_rng(0)
    prefix = str(folder / "ids")
    with DatasetWriter(prefix, vocab_size=32_000) as writer:
        for _ in range(_DOCUMENTS // 1000):
            lengths = generator.integers(1, 2 * _DOCUMENT_TOKENS, 1000)
            writer.add_documents(generator.integers(0, 32_000, int(lengths.sum())), lengths)
    return prefix


def opening(prefix: str, *, is_read: bool) -> Action:
    """From a dataset's name to its first sample, or to its last."""
    from dsv3_megatron.data.blend import check_data, parse_blend
    from dsv3_megatron.data.datasets import DatasetConfig, build_datasets

    def act(is_verified: bool) -> None:
        for _ in range(1 if is_read else 20):
            check_data([prefix], vocab_size=32_000)
            config = DatasetConfig(seq_length=_SEQ_LENGTH, seed=1, train_blend=parse_blend((prefix,), "data_path"),
                                   is_validated=False, is_verified=is_verified)
            samples = build_datasets(config).train
            for number in range(_DOCUMENTS * _DOCUMENT_TOKENS // _SEQ_LENGTH - 1 if is_read else 1):
                samples[number]

    return act


def checkpoints(folder: Path, preset_name: str) -> dict[str, Action]:
    """A checkpoint of a run, loaded into it, exported, and taken back."""
    from dsv3_megatron.checkpoint.folder import RunProgress
    from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
    from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
    from dsv3_megatron.checkpoint.store import load_checkpoint, save_checkpoint
    from dsv3_megatron.config.presets import preset

    run = preset(preset_name).override(transformer_impl="local", micro_batch_size=1, global_batch_size=1)
    trainer = random_token_trainer(run)
    trainer.train_step()
    save_checkpoint(folder / "saved", RunProgress(1, 1, 1), run, trainer.chunks, trainer.optimizer, trainer.groups,
                    keep_last=0)
    convert_to_hugging_face(folder / "saved", folder / "exported", dtype="bf16", num_workers=2)

    def ways(is_verified: bool) -> str:
        return "read" if is_verified else "none"

    def load(is_verified: bool) -> None:
        load_checkpoint(folder / "saved", run.override(verify_files=ways(is_verified)), trainer.chunks,
                        trainer.optimizer, trainer.groups)

    def export(is_verified: bool) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        convert_to_hugging_face(folder / "saved", folder / "out", dtype="bf16", num_workers=2,
                                verify_files=ways(is_verified))

    def take_back(is_verified: bool) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        convert_to_megatron(folder / "exported", folder / "out", num_workers=2, verify_files=ways(is_verified))

    return {"load": load, "export": export, "import": take_back}


def forget(folder: Path) -> None:
    """Have the system read a folder's files from disk when they are read next; they must have been written to it."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def in_turns(action: Action, rounds: int, cold: Path | None = None) -> dict[bool, list[tuple[float, float]]]:
    """Seconds, and CPU seconds, of each time with and without; one time of each before is not counted.

    Args:
        action: What is timed.
        rounds: Times with, and as many without.
        cold: Folder whose files come from disk in every turn; None: from memory.
    """
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(rounds + 1):
        for is_verified in ((True, False) if number % 2 else (False, True)):
            os.sync()
            if cold:
                forget(cold)
            with unproved(is_verified):
                wall, cpu = time.perf_counter(), cpu_seconds()
                action(is_verified)
                taken = time.perf_counter() - wall, cpu_seconds() - cpu
            if number:
                times[is_verified].append(taken)
    return times


def cpu_seconds() -> float:
    """What this process, its threads and the processes that it has waited for have computed so far, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def report(name: str, config: str, times: dict[bool, list[tuple[float, float]]]) -> list[Measurement]:
    """Print one action's numbers, and return them."""
    wall = {way: statistics.median(seconds for seconds, _ in times[way]) for way in times}
    cpu = {way: statistics.median(seconds for _, seconds in times[way]) for way in times}
    least = {way: min(seconds for seconds, _ in times[way]) for way in times}
    least_cpu = {way: min(seconds for _, seconds in times[way]) for way in times}
    # Of each turn by itself, so that what disturbs the machine for a while meets both.
    ratios = [one[0] / other[0] for one, other in zip(times[True], times[False], strict=True)]
    print(f"{name:12} {wall[True]:8.3f} s with, {wall[False]:8.3f} s without: "
          f"{100 * (wall[True] / wall[False] - 1):+.1f}% (of turns {100 * (statistics.median(ratios) - 1):+.1f}%); CPU "
          f"{cpu[True]:.3f} and {cpu[False]:.3f} s; the least {least[True]:.3f} and {least[False]:.3f} s, CPU "
          f"{least_cpu[True]:.3f} and {least_cpu[False]:.3f} s", flush=True)
    return [Measurement(name, config, "with_median", wall[True], "s"),
            Measurement(name, config, "without_median", wall[False], "s"),
            Measurement(name, config, "cost", wall[True] / wall[False] - 1, "1"),
            Measurement(name, config, "cost_median_of_turns", statistics.median(ratios) - 1, "1"),
            Measurement(name, config, "with_cpu_median", cpu[True], "s"),
            Measurement(name, config, "without_cpu_median", cpu[False], "s"),
            Measurement(name, config, "cost_cpu", cpu[True] / cpu[False] - 1, "1"),
            Measurement(name, config, "with_least", least[True], "s"),
            Measurement(name, config, "without_least", least[False], "s"),
            Measurement(name, config, "cost_of_least", least[True] / least[False] - 1, "1"),
            Measurement(name, config, "with_cpu_least", least_cpu[True], "s"),
            Measurement(name, config, "without_cpu_least", least_cpu[False], "s"),
            Measurement(name, config, "cost_of_least_cpu", least_cpu[True] / least_cpu[False] - 1, "1"),
            Measurement(name, config, "rounds", len(ratios), "1")]


def hash_rates() -> list[Measurement]:
    """Print what a checksum costs by itself on one core, in CPU time, and return it."""
    from dsv3_megatron.data.checksums import ALGORITHM, PIECE_BYTES, checksum_of

    def rate(data: memoryview) -> float:
        times = []
        for _ in range(9):
            cpu = time.thread_time()
            for at in range(0, len(data), PIECE_BYTES):
                checksum_of(data[at: at + PIECE_BYTES])
            times.append(time.thread_time() - cpu)
        return len(data) / statistics.median(times)

    large = memoryview(bytearray(os.urandom(PIECE_BYTES) * 512))
    rows = []
    for config, found in (("in cache", statistics.median(rate(large[:PIECE_BYTES]) for _ in range(99))),
                          ("from memory", rate(large))):
        print(f"{ALGORITHM} {config}: {found / 1e9:.1f} GB/s", flush=True)
        rows.append(Measurement("hash", f"{ALGORITHM}, {PIECE_BYTES >> 10} KiB {config}", "rate", found, "B/s"))
    return rows


def main() -> int:
    """Measure, and append to results/verification.csv."""
    parser = argparse.ArgumentParser(description="Time what proving files costs.")
    parser.add_argument("--preset", default="laptop", help="run whose checkpoint is loaded and exported (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="(%(default)s)")
    parser.add_argument("--cold", action="store_true", help="read files from disk, not from memory")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the seven above")
    parser.add_argument("--folder", type=Path, help="folder to work in; none: the system's temporary one")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args()

    warn_of_load()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench-verification-", dir=options.folder) as name:
        folder = Path(name)

        def wanted(*names: str) -> bool:
            return not options.only or any(name in options.only for name in names)

        actions: dict[str, tuple[str, Action]] = {}
        if wanted("preprocess"):
            actions["preprocess"] = "30 MB JSON lines, one worker", preprocessing(folder)
        if wanted("open", "read"):
            prefix = written_dataset(folder)
            config = f"{_DOCUMENTS} documents, {os.path.getsize(f'{prefix}.bin') / 1e6:.0f} MB"
            actions |= {name: (config, opening(prefix, is_read=name == "read")) for name in ("open", "read")}
        if wanted("load", "export", "import"):
            made = checkpoints(folder, options.preset)
            size = sum(file.stat().st_size for file in (folder / "saved").rglob("*") if file.is_file())
            config = f"{options.preset}, checkpoint of {size / 1e6:.0f} MB"
            actions |= {each: (config, action) for each, action in made.items()}
        rows = hash_rates() if wanted("hash") else []
        for each, (config, action) in actions.items():
            if wanted(each):
                rows += report(each, config, in_turns(action, options.rounds, folder if options.cold else None))
    if not options.no_csv:
        from dsv3_megatron.platform import detect_device

        cache = "files read from disk" if options.cold else "warm page cache"
        device = f"{detect_device().name}, {options.threads} threads, {cache}, load {load_average():.1f}"
        print(append_rows("verification.csv", rows, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
