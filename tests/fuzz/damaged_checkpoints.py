"""Flips single bits in a checkpoint and loads it: refused, without effect, or silently other?

    python -m tests.fuzz.damaged_checkpoints --flips 1000

Each flip is one bit of one file; every file gets the same number of flips, at places drawn at random. "Harmless" means
that what was loaded is what was saved: every weight, moment, average and bias, the states of the random number
generators, progress, the description of the run, and the files of texts. Anything else that loads is silent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.checkpoint.folder import TRACKER, CheckpointError, RunProgress, iteration_path, read_manifest
from dsv3_megatron.checkpoint.store import load_checkpoint, save_checkpoint
from dsv3_megatron.checkpoint.text_files import TextFiles
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import Training, small_run, start

TEXTS = {"hf_file.tokenizer.json": b'{"version": "1.0"}' * 50, "text_form.json": b'{"begin_ids": [], "end_ids": [1]}'}
CHANGES = {"ema_decay": 0.9, "exp_avg_dtype": "bf16"}


def prepare(directory: Path) -> Training:
    """A small run of one process whose state after two steps is saved in a folder, as iterations 1 and 2."""
    training = start(small_run(**CHANGES))
    for number in range(2):
        training.step(number)
        progress = RunProgress(number + 1, 4 * (number + 1), 64 * (number + 1), {"counters": {"jumps": []}})
        save_checkpoint(directory, progress, training.run, training.chunks, training.optimizer, training.groups,
                        keep_last=0, average=training.average, text_files=TextFiles(TEXTS), run_id="run")
    return training


def loaded_state(training: Training, directory: Path) -> dict[str, Any]:
    """Everything that is loaded of the newest checkpoint of a folder.

    Raises:
        CheckpointError: it is refused.
    """
    with torch.no_grad():  # what a load leaves out stays in sight
        for chunk in training.chunks:
            for tensor in [*chunk.module.parameters(), *chunk.module.buffers()]:
                tensor.zero_()
    torch.manual_seed(0)
    progress = load_checkpoint(directory, training.run, training.chunks, training.optimizer, training.groups,
                               average=training.average)
    manifest = read_manifest(directory)
    said = {name: value for name, value in dataclasses.asdict(manifest).items() if name != "path"}
    texts = {name: (manifest.path / name).read_bytes() for name in TEXTS}
    return {"state": {name: tensor.clone() for name, tensor in training.whole_state().items()}, "said": said,
            "texts": texts, "progress": progress, "random": torch.get_rng_state()}


def is_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two loads gave the same, bit for bit."""
    states = [first["state"], second["state"]]
    return (all(first[name] == second[name] for name in ("said", "texts", "progress"))
            and torch.equal(first["random"], second["random"]) and states[0].keys() == states[1].keys()
            and all(torch.equal(value.contiguous().view(torch.uint8), states[1][name].contiguous().view(torch.uint8))
                    for name, value in states[0].items()))


def flip_bits(directory: Path, flips: int, seed: int) -> dict[str, dict[str, int]]:
    """Outcomes of single flipped bits, counted by file; "refused", "harmless", "silent", and errors by their names."""
    training = prepare(directory)
    original = loaded_state(training, directory)
    rng = random.Random(seed)
    files = sorted(path for path in iteration_path(directory, 2).iterdir())
    files.append(directory / TRACKER)
    outcomes: dict[str, Counter[str]] = {file.name: Counter() for file in files}
    for number in range(flips):
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        whole = file.read_bytes()
        file.write_bytes(content)
        try:
            outcome = "harmless" if is_same(loaded_state(training, directory), original) else "silent"
        except CheckpointError:
            outcome = "refused"
        except Exception as error:  # noqa: BLE001 - counted, by its name
            outcome = f"traceback {type(error).__name__}"
        finally:
            file.write_bytes(whole)
        outcomes[file.name][outcome] += 1
    assert is_same(loaded_state(training, directory), original), "the checkpoint is as it was"
    return {name: dict(counter) for name, counter in outcomes.items()}


def main() -> int:
    """Run the flips and print what became of them; 0 if none was silent and none ended in a traceback."""
    parser = argparse.ArgumentParser(description="Flip single bits in a checkpoint, and load it.")
    parser.add_argument("--flips", type=int, default=1000, metavar="N", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (outcomes,) = run_ranks(1, flip_bits, Path(folder) / "saved", options.flips, options.seed, timeout_s=3600)
    for name, counts in outcomes.items():
        print(f"{name:28} {json.dumps(counts)}")
    total: Counter[str] = sum((Counter(counts) for counts in outcomes.values()), Counter())
    print(f"{'together':28} {json.dumps(total)} in {time.perf_counter() - started:.0f} s")
    return 0 if set(total) <= {"refused", "harmless"} else 1


if __name__ == "__main__":
    from tests.fuzz import damaged_checkpoints  # by its name, so that the ranks find it

    sys.exit(damaged_checkpoints.main())
