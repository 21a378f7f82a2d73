"""What follows from a step: applied, skipped, rolled back, or the end of the run; with every counter. Pure Python.

The state is saved in each checkpoint and decides, together with the steps' reduced values, all that follows: a resumed
run decides as the uninterrupted one did. A rollback goes back to the last checkpoint and on with the data after the
flagged step, so that the samples before and during the spike are not met again. Source: PaLM, arXiv 2204.02311,
section 5.1, which goes back some hundred steps and skips some hundred batches. Samples that were jumped over are not
consumed: schedules and consumed tokens go on as if they were not in the data.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.guards.spikes import GRAD_NORM, LOSS, SpikeDetector

# What a process returns whose run the guards have ended.
EXIT_GUARD = 3


class Finding(enum.IntEnum):
    """What is wrong with a step; of what several ranks find, the largest counts."""

    NOTHING = 0
    SPIKE = 1
    NONFINITE = 2


@dataclass(frozen=True)
class Judgement:
    """One rank's finding, with what was found in words."""

    finding: Finding
    reasons: tuple[str, ...] = ()


@dataclass
class Counters:
    """What has happened in the whole run, this one and those it resumed from.

    Attributes:
        skipped: Updates left out.
        spikes: Steps flagged as spikes, applied or not.
        rollbacks: Returns to a checkpoint.
        consecutive_skips: Updates left out since the last applied one.
        jumps: [first, stop) of the dataset's samples that rollbacks jumped over, in order.
    """

    skipped: int = 0
    spikes: int = 0
    rollbacks: int = 0
    consecutive_skips: int = 0
    jumps: list[tuple[int, int]] = field(default_factory=list)


class Guard:
    """Judges each step, and keeps what later decisions depend on.

    Per step: `judge`, then `decide`, on every rank and from the same numbers (guarded_step.py).

    Attributes:
        counters: Totals of the run.
        must_roll_back: The last step asks for a rollback, which `rolled_back` reports as done.
        end_reason: Why the run must end; None while it may go on.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.detector = SpikeDetector(config)
        self.counters = Counters()
        self.must_roll_back = False
        self.end_reason: str | None = None

    @property
    def jumped_samples(self) -> int:
        """Samples of the dataset that lie before the next step's and were never trained on."""
        return sum(stop - first for first, stop in self.counters.jumps)

    def judge(self, losses: Mapping[str, float], grad_norm: float) -> Judgement:
        """What is wrong with a step, before its update; nothing changes.

        Args:
            losses: All losses of the step by name, LOSS among them; reduced over ranks.
            grad_norm: Norm of the gradient before clipping.
        """
        wrong = [f"{name} is {value}" for name, value in {**losses, GRAD_NORM: grad_norm}.items()
                 if not math.isfinite(value)]
        if wrong:
            return Judgement(Finding.NONFINITE, tuple(wrong))
        spikes = self.detector.judge(losses[LOSS], grad_norm)
        return Judgement(Finding.SPIKE if spikes else Finding.NOTHING, tuple(map(str, spikes)))

    def decide(self, finding: Finding, loss: float, grad_norm: float) -> bool:
        """Take in a step with its finding, the same on every rank; whether its update is to be applied.

        May set `must_roll_back` or `end_reason`.
        """
        counters, config = self.counters, self.config
        counters.spikes += finding is Finding.SPIKE
        if finding is not Finding.NONFINITE:
            self.detector.record(loss, grad_norm, is_spike=finding is Finding.SPIKE)
        if finding is Finding.NOTHING or (finding is Finding.SPIKE and config.on_spike == "log"):
            counters.consecutive_skips = 0
            return True
        counters.skipped += 1
        if finding is Finding.SPIKE and config.on_spike == "rollback":
            if counters.rollbacks < config.max_rollbacks:
                self.must_roll_back = True
            else:
                self.end_reason = (f"a spike after {counters.rollbacks} rollbacks (max_rollbacks="
                                   f"{config.max_rollbacks})")
            return False
        counters.consecutive_skips += 1
        if counters.consecutive_skips > config.max_consecutive_skips:
            self.end_reason = (f"{counters.consecutive_skips} updates in a row were left out (max_consecutive_skips="
                               f"{config.max_consecutive_skips})")
        return False

    def pass_over(self) -> None:
        """Take in a step without a token that counts: its update is left out, and says nothing about the run's state.

        It is neither one of the updates in a row that end a run, nor the end of such a row.
        """
        self.counters.skipped += 1

    def rolled_back(self, saved: Mapping[str, Any], *, first_sample: int, next_sample: int) -> None:
        """The run is back at a checkpoint: take its window, and note the jump.

        What has been counted since the checkpoint stays counted: it has happened.

        Args:
            saved: The checkpoint's state of the guard; empty if it was written without guards.
            first_sample: Position in the dataset that the checkpoint would go on from.
            next_sample: Position that the run goes on from instead.
        """
        self.detector = SpikeDetector(self.config)
        self.counters.consecutive_skips = 0
        if saved:
            self.detector.load_state_dict(saved["detector"])
            self.counters.consecutive_skips = saved["counters"]["consecutive_skips"]
        self.counters.rollbacks += 1
        self.counters.jumps.append((first_sample, next_sample))
        self.must_roll_back = False

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on, as plain JSON values that keep every bit."""
        counters = {**vars(self.counters), "jumps": [list(jump) for jump in self.counters.jumps]}
        return {"counters": counters, "detector": self.detector.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; an empty one, of a checkpoint without guards, changes nothing."""
        if not state:
            return
        self.counters = Counters(**{**state["counters"], "jumps": [tuple(jump) for jump in state["counters"]["jumps"]]})
        self.detector.load_state_dict(state["detector"])
