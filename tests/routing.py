"""Two whole runs whose sums differ in order, compared through their routers' ties (`certification/routing_notes.py`).

    python -m tests.routing NOTES GIVEN ARGUMENTS     training, noted in the folder NOTES, with the choices in the
                                                      folder GIVEN ("-": its own)
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dsv3_megatron.certification.routing_notes import Notes, RoutingWatch, compare_notes, merge_notes


def compare_routing(expected: Notes, found: Notes, *, rounding: float, common_steps: int = 0) -> int:
    """Check the routing of a run that took another's choices against that other's; see `compare_notes`.

    Returns:
        The number of ties: tokens of which the second run chose other experts.

    Raises:
        AssertionError: they are not the same run but for rounding, or what was compared is nothing.
    """
    assert expected, "the first run noted no choices"
    result = compare_notes(expected, found, rounding=rounding, common_steps=common_steps)
    assert not result.faults, result.faults[0]
    print(f"routing: {len(expected)} routers and passes, affinities within {result.largest:.2g}, "
          f"{len(result.ties)} ties")
    return len(result.ties)


def write_notes(notes: Notes, folder: Path, rank: int) -> None:
    """Leave a rank's notes for `read_notes`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(notes, folder / f"rank-{rank}.pt")


def read_notes(folder: Path) -> Notes:
    """The notes that all ranks of a run have left, as one."""
    files = sorted(folder.glob("rank-*.pt"))
    assert files, f"no notes in {folder}"
    return merge_notes([torch.load(file, weights_only=False) for file in files])


def train(notes: Path, given: Path | None, arguments: list[str]) -> int:
    """One process of a training run, noted; passes are named "step N" and "validation K after step N"."""
    from dsv3_megatron.commands import train as command
    from dsv3_megatron.platform import prepare

    prepare()  # before anything imports Megatron-Core
    from dsv3_megatron.runs.trainer import Trainer

    routing = RoutingWatch(read_notes(given) if given else None)
    own_step, own_evaluate = Trainer.train_step, Trainer.evaluate
    validations = itertools.count(1)

    def train_step(trainer: Trainer) -> Any:
        nonlocal validations
        validations = itertools.count(1)
        routing.begin(f"step {trainer.iteration + 1}")
        return own_step(trainer)

    def evaluate(trainer: Trainer, *name: str) -> Any:
        routing.begin(f"validation {next(validations)} after step {trainer.iteration}")
        return own_evaluate(trainer, *name)

    with routing.watched(), mock.patch.object(Trainer, "train_step", train_step), \
            mock.patch.object(Trainer, "evaluate", evaluate):
        code = command.main(arguments)
    write_notes(routing.notes, notes, int(os.environ.get("RANK", "0")))
    return code


if __name__ == "__main__":
    # Pickled notes name this module as the tests import it, not as "__main__".
    from tests import routing as module

    sys.exit(module.train(Path(sys.argv[1]), None if sys.argv[2] == "-" else Path(sys.argv[2]), sys.argv[3:]))
