"""Changes files of every kind that the library reads, and has every command read them: what became of it?

    python -m tests.fuzz.files --cases 10000 --seed 0
    python -m tests.fuzz.files --cases 200 --only verify --show

Each case copies specimens (tests/fuzz/specimens.py), changes one file (tests/fuzz/changes.py) and carries out a command
in a forked process with 1.5 GB of memory beyond what it begins with, and 30 seconds of computing. What is counted:

- refused: the command ends with an exit code that is not 0, and with a message.
- harmless: it made and printed what it makes of the undamaged file, bit for bit (times aside).
- as it stands: the changed file is another valid file of a kind of which nobody knows what should be in it (text,
  settings, prompts), and an independent reading of it gives the same as the command.
- silent: the command made something else, and said nothing.
- traceback, killed, hang, mute: a traceback or a panic; a signal; more than 30 seconds of computing, or two minutes of
  the clock; an exit code without a message.
- unquoted: something in the file could write control characters to the terminal, or a line like one of ours.

Exit status: 0 if every case is one of the first three.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_megatron.process.parent import freeze_before_forks
from tests.fuzz.changes import change_bytes, structured
from tests.fuzz.readers import Reader, readers
from tests.fuzz.specimens import stop_halfway, write_specimens
from tests.fuzz.trials import Trial, try_command

GOOD = ("refused", "harmless", "as it stands")
PRELOADED = ("dsv3_megatron.runs.trainer", "dsv3_megatron.runs.evaluator", "torch._dynamo", "pyarrow.parquet",
             "tokenizers", "yaml", "numpy", "safetensors", "tensorboard.backend.event_processing.event_accumulator",
             "dsv3_megatron.generation.generator", "dsv3_megatron.checkpoint.hf.to_hugging_face",
             "dsv3_megatron.checkpoint.hf.to_megatron", "dsv3_megatron.data.preprocess",
             "dsv3_megatron.data.chat.encoding", "dsv3_megatron.data.chat.packed_samples", *(
                 f"dsv3_megatron.commands.{name}" for name in (
                     "train", "sft", "preprocess", "train_tokenizer", "inspect", "merge", "verify", "convert",
                     "evaluate", "generate", "plan", "simulate", "draw_schedule")))


@dataclass(frozen=True)
class Case:
    """One change, one command, and what became of it.

    Attributes:
        reader: The command.
        file: Name of the changed file among the specimens.
        change: Description of the change.
        outcome: One of the words at the top of this file.
        trial: How the command ended.
        seed: Seed that makes the case again.
    """

    reader: str
    file: str
    change: str
    outcome: str
    trial: Trial
    seed: int


def write(folder: Path, words: list[str], *, is_stopped: bool = False) -> None:
    """Carry out a command that writes specimens, whole or until it is stopped.

    Raises:
        RuntimeError: it ends in another way.
    """
    def work() -> int:
        from dsv3_megatron.commands.dispatch import main

        if is_stopped:
            stop_halfway()
        return main(words)

    trial = try_command(work, folder, timeout_s=120)
    if (trial.ending == "done") == is_stopped:
        raise RuntimeError(f"{' '.join(words)}: {trial.ending} {trial.code}\n{trial.said[0]}\n{trial.said[1]}")


class Fuzzer:
    """Carries out cases.

    Args:
        folder: Empty folder for specimens and copies.
        only: Part of a reader's name; other readers are left out.
        is_quick: Leave out the readers that take long, and take it as given that the others do the same twice.
    """

    def __init__(self, folder: Path, only: str = "", *, is_quick: bool = False) -> None:
        self.folder, self.specimens = folder, folder / "specimens"
        copied = folder / "copy"  # unfinished conversions name the folder in which they were begun
        copied.mkdir()
        write_specimens(copied, partial(write, copied), partial(write, copied, is_stopped=True))
        copied.rename(self.specimens)
        self._runs = 1 if is_quick else 2
        self.readers = [reader for reader in readers() if only in reader.name and (reader.weight >= 1 or not is_quick)]
        self._original = {reader.name: self._undamaged(reader) for reader in self.readers}

    def _copy(self, reader: Reader) -> Path:
        copied = self.folder / "copy"
        shutil.rmtree(copied, ignore_errors=True)
        copied.mkdir()
        for name in reader.needs:
            source = self.specimens / name
            if source.is_dir():
                shutil.copytree(source, copied / name)
            else:
                shutil.copy2(source, copied / name)
        return copied

    def _undamaged(self, reader: Reader) -> dict[str, Any]:
        results = []
        for _ in range(self._runs):
            copied = self._copy(reader)
            trial = try_command(reader.run, copied, timeout_s=120)
            if trial.ending != "done":
                raise RuntimeError(f"{reader.name} does not read the specimens: {trial}")
            results.append(reader.result(copied, trial.said[0]))
        if results[0] != results[-1]:
            raise RuntimeError(f"{reader.name} gives two results: {results}")
        print(f"{reader.name}: {trial.seconds:.2f} s", file=sys.stderr, flush=True)
        return results[0]

    def case(self, seed: int) -> Case:
        """Carry out the case of a seed."""
        rng = random.Random(seed)
        (reader,) = rng.choices(self.readers, [reader.weight for reader in self.readers])
        copied = self._copy(reader)
        files = sorted({file for pattern in reader.reads for file in copied.glob(pattern) if file.is_file()})
        file = rng.choice(files)
        before = file.read_bytes()
        change = structured(file.name) if rng.random() < 0.5 else change_bytes
        if rng.random() < 0.03:
            file.unlink()
            what = "gone"
        else:
            after, what = change(before, rng)
            file.write_bytes(after)
        stands = self._standing(reader, copied)
        trial = try_command(reader.run, copied)
        return Case(reader.name, str(file.relative_to(copied)), what, self._outcome(reader, copied, trial, stands),
                    trial, seed)

    def _standing(self, reader: Reader, copied: Path) -> Any:
        if reader.stands is None:
            return None
        try:
            return reader.stands(copied)
        except Exception:  # noqa: BLE001 - the independent reader's errors are many: it cannot read the file
            return None

    def _outcome(self, reader: Reader, copied: Path, trial: Trial, stands: Any) -> str:
        if not trial.is_quoted:
            return "unquoted"
        if trial.ending != "done":
            return trial.ending
        if reader.result(copied, trial.said[0]) == self._original[reader.name]:
            return "harmless"
        try:
            return "as it stands" if stands is not None and stands(trial.said[0]) else "silent"
        except (ValueError, KeyError, TypeError, OSError, StopIteration):
            return "silent"


def run_cases(fuzzer: Fuzzer, seeds: Iterable[int], *, shows: bool = False) -> Iterator[Case]:
    """Carry out many cases; what went wrong is printed as it is found."""
    for seed in seeds:
        case = fuzzer.case(seed)
        if shows or case.outcome not in GOOD:
            print(f"{case.outcome}: {case.reader}: {case.file}: {case.change} (seed {case.seed}, "
                  f"{case.trial.seconds:.1f} s)\n    {case.trial.said[1].strip()[-600:]!r}", flush=True)
        yield case


def preload() -> None:
    """Import what the commands import, so that a fork need not."""
    import importlib

    from dsv3_megatron.platform import prepare

    prepare()
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            traceback.print_exc()
    freeze_before_forks()


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print the table; returns 0 if all is well."""
    parser = argparse.ArgumentParser(description="Change files, and have commands read them.")
    add = parser.add_argument
    add("--cases", type=int, default=1000, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add("--first", type=int, default=0, metavar="N", help="number of the first case (%(default)s)")
    add("--only", default="", metavar="NAME", help="readers whose name has this in it")
    add("--quick", action="store_true", help="without the readers that take long")
    add("--show", action="store_true", help="print every case")
    add("--seeds", type=int, nargs="+", metavar="N", help="carry out the cases of these seeds alone, as printed")
    add("--json", type=Path, metavar="FILE", help="write the counts there, every hundred cases too")
    options = parser.parse_args(arguments)
    preload()
    started = time.perf_counter()
    seeds = options.seeds or [options.seed * 1_000_000 + number
                              for number in range(options.first, options.first + options.cases)]
    counts: dict[str, Counter[str]] = {"together": Counter()}
    slowest, cpu_s = 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), options.only, is_quick=options.quick)
        for number, case in enumerate(run_cases(fuzzer, seeds, shows=options.show or bool(options.seeds)), start=1):
            for name in ("together", case.reader):
                counts.setdefault(name, Counter())[case.outcome] += 1
            slowest, cpu_s = max(slowest, case.trial.seconds), cpu_s + case.trial.cpu_s
            if options.json is not None and (number % 100 == 0 or number == len(seeds)):
                options.json.write_text(json.dumps(counts, indent=1))
    total = counts.pop("together")
    for name in sorted(counts):
        print(f"{name:28} {json.dumps(counts[name])}")
    print(f"{'together':28} {json.dumps(total)}: {len(seeds)} cases in {time.perf_counter() - started:.0f} s, "
          f"{cpu_s:.0f} s of computing; the slowest {slowest:.1f} s")
    return 0 if set(total) <= set(GOOD) else 1


if __name__ == "__main__":
    from tests.fuzz import files  # by its name, so that the forks find it

    sys.exit(files.main())
