"""The checkpoints of a run under way: written when they are due, gone back to, exported in the end.

`saves.py` says when; `checkpoint/store.py` writes. Every rank has a keeper, and all of them do the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.checkpoint.agreement import on_first_rank
from dsv3_megatron.checkpoint.folder import CheckpointError, RunProgress, record_guards
from dsv3_megatron.checkpoint.hf.export import export_run
from dsv3_megatron.checkpoint.hf.model_card import Losses
from dsv3_megatron.checkpoint.store import save_checkpoint
from dsv3_megatron.checkpoint.text_files import TextFiles
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import CheckpointConfig
from dsv3_megatron.guards.claims import RunClaim
from dsv3_megatron.guards.saves import SaveSchedule
from dsv3_megatron.optim.ema import WeightAverage

# A checkpoint that the run cannot do without is tried so often, so many seconds apart.
NEEDED_ATTEMPTS, NEEDED_PAUSE_S = 5, 10.0


class CheckpointKeeper:
    """Writes a run's checkpoints and knows where the newest one is.

    Args:
        config: The run's checkpoint configuration: where checkpoints are saved, loaded and exported to, how often, and
            how many are kept.
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them.
        groups: The run's process groups.
        average: The weights' moving average, if the run has one.
        claim: The run's folders, on the rank that took them.
        run_id: Identity of the run.
        say: Prints a line for people; on the rank that prints.

    Attributes:
        schedule: Says when a checkpoint is due.
        newest_in: Folder of the newest checkpoint that the run has loaded or saved; None before any.
    """

    def __init__(self, config: CheckpointConfig, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer,
                 groups: ProcessGroupCollection, *, average: WeightAverage | None, claim: RunClaim, run_id: str,
                 say: Callable[[str], None]) -> None:
        self._config, self._claim, self._run_id, self._say = config, claim, run_id, say
        self._chunks, self._optimizer, self._groups, self._average = chunks, optimizer, groups, average
        self.schedule = SaveSchedule(config.save_interval)
        self.newest_in: str | None = None

    def loaded(self, directory: str, iteration: int) -> None:
        """The run's state is now that of a checkpoint, in which nothing is new."""
        self.newest_in = directory
        self.schedule.went_back(iteration)

    def wants(self, iteration: int, *, is_last: bool) -> bool:
        """Whether the state after `iteration` steps is to be saved; `SaveSchedule.wants` for a run that saves."""
        return self._config.save is not None and self.schedule.wants(iteration, is_last=is_last)

    def save(self, progress: RunProgress, run: RunConfig, text_files: TextFiles | None = None, *,
             is_needed: bool) -> None:
        """Write a checkpoint; older ones are removed only if the last step's update was applied.

        One that cannot be written costs no earlier one and does not end the run: it is said, and due again later.

        Args:
            progress: How far the run has come.
            run: Configuration as it is in the phase of the run's last step: what reads the checkpoint builds that
                model.
            text_files: What the checkpoint keeps of the run's tokenizer.
            is_needed: The run cannot go on without it, or ends here: it is tried again at once, some times.

        Raises:
            CheckpointError: on every rank, if one that is needed cannot be written, or another run has taken the
                folder over.
        """
        save = self._config.save
        assert save is not None
        for more in reversed(range(NEEDED_ATTEMPTS)):
            on_first_rank(self._claim.check, f"save={save}")
            try:
                save_checkpoint(
                    save, progress, run, self._chunks, self._optimizer, self._groups, average=self._average,
                    run_id=self._run_id, text_files=text_files,
                    keep_last=self._config.keep_last if self.schedule.is_settled else 0)
                break
            except CheckpointError as error:
                if is_needed and not more:
                    raise
                failed = f"no checkpoint of iteration {progress.iteration}: {error}. "
                if not is_needed:
                    again = self.schedule.failed(progress.iteration)
                    self._say(f"{failed}The run goes on, and tries again after iteration {again}")
                    return
                self._say(f"{failed}Tried again in {NEEDED_PAUSE_S:g} s, {more} more time(s)")
                time.sleep(NEEDED_PAUSE_S)
        self.schedule.saved(progress.iteration)
        self.newest_in = save
        self._say(f"checkpoint saved: {os.path.join(save, f'iter_{progress.iteration:07d}')}")

    def note_rollback(self, iteration: int, guards: dict[str, Any]) -> None:
        """Have the run's own checkpoint that it went back to say so: what resumes from it counts this rollback too."""
        save = self._config.save
        if save is None or self.newest_in != save:
            return
        try:
            on_first_rank(lambda: record_guards(save, iteration, guards), f"save={save}")
        except CheckpointError as error:
            self._say(f"the rollback is not noted in the checkpoint that the run went back to: {error}")

    def what_was_saved(self, iteration: int) -> str:
        """Whether the state after `iteration` steps is in a checkpoint, and if not why, as the end of a sentence."""
        if self._config.save is None:
            return "without a checkpoint: save is not set"
        if self.schedule.saved_at == iteration:
            return "with a checkpoint"
        since = "the run began" if self.schedule.saved_at is None else f"iteration {self.schedule.saved_at}"
        return f"without a checkpoint: no update was applied since {since}"

    def export(self, iteration: int, precision: str, losses: Losses | None = None) -> None:
        """Export the state that the run ended with to the folder of `export_hf`, from its checkpoint; if it has one.

        Args:
            iteration: Steps taken.
            precision: "bf16" or "fp32", of the weights as trained.
            losses: Last losses of the run, for the model card.

        Raises:
            CheckpointError: on every rank, if it cannot be written.
        """
        output = self._config.export_hf
        assert output is not None
        if self.newest_in is None or self.schedule.saved_at != iteration:
            self._say(f"nothing is exported to {output}: the run ended {self.what_was_saved(iteration)}")
            return
        folder = export_run(
            self.newest_in, output, iteration, precision=precision, losses=losses,
            is_without_mtp=self._config.export_without_mtp, license_id=self._config.export_license)
        self._say(f"exported for Hugging Face: {folder}")
