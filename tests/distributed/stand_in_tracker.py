"""A run with a stand-in for the package wandb, which may not be installed, and which fails when it is first written to.

    python -m tests.distributed.stand_in_tracker NOTES ARGUMENTS    training; each call is a line of the file NOTES
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any


class StandInRun:
    """What `wandb.init` gives back."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes
        self._num_logged = 0
        self.config = types.SimpleNamespace(update=lambda values, allow_val_change: self.note("config", list(values)))

    def note(self, call: str, what: Any) -> None:
        with self._notes.open("a") as file:
            file.write(json.dumps({"rank": os.environ["RANK"], "call": call, "what": what}) + "\n")

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.note("define_metric", name)

    def log(self, row: dict[str, Any]) -> None:
        self._num_logged += 1
        if self._num_logged == 1:
            raise OSError(28, "No space left on device")
        self.note("log", {tag: value if isinstance(value, int | float) else "picture" for tag, value in row.items()})

    def finish(self) -> None:
        self.note("finish", None)


def stand_in(notes: Path) -> types.ModuleType:
    """A module of the name wandb, with what is used of it."""
    def init(**settings: Any) -> StandInRun:
        run = StandInRun(notes)
        run.note("init", {name: settings[name] for name in ("project", "id", "name", "resume")})
        return run

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin=__file__)
    module.__dict__.update(init=init, Settings=dict, Histogram=lambda np_histogram: object(),
                           Image=lambda image: object())
    return module


if __name__ == "__main__":
    sys.modules["wandb"] = stand_in(Path(sys.argv[1]))
    from dsv3_megatron.commands.train import main

    sys.exit(main(sys.argv[2:]))
