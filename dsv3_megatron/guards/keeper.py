"""The checkpoints of a run under way: written when they are due, gone back to, exported in the end.

`saves.py` says when; `checkpoint/store.py` writes, most of it while training goes on. Every rank has a keeper, and all
of them do the same. One save at a time: whatever needs the newest checkpoint, and the next save, waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.checkpoint.agreement import on_first_rank
from dsv3_megatron.checkpoint.background import BackgroundWriter
from dsv3_megatron.checkpoint.folder import CheckpointError, RunProgress, record_guards
from dsv3_megatron.checkpoint.hf.export import export_run
from dsv3_megatron.checkpoint.hf.model_card import Losses
from dsv3_megatron.checkpoint.pending import PendingSave
from dsv3_megatron.checkpoint.store import start_checkpoint
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
        is_behind = bool(config.save) and config.async_save and BackgroundWriter.is_possible()
        self._background = BackgroundWriter() if is_behind else None
        self._pending: PendingSave | None = None

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

        The one before is waited for. Of this one no more than the copy to memory is, unless it is needed. One that
        cannot be written costs no earlier one and does not end the run: it is said, and due again later.

        Args:
            progress: How far the run has come.
            run: Configuration as it is in the phase of the run's last step: what reads the checkpoint builds that
                model.
            text_files: What the checkpoint keeps of the run's tokenizer.
            is_needed: The run cannot go on without it, or ends here: it is waited for, and tried again at once, some
                times.

        Raises:
            CheckpointError: on every rank, if one that is needed cannot be written, too many in a row could not, or
                another run has taken the folder over.
        """
        save = self._config.save
        assert save is not None
        self.finish(progress.iteration)
        for more in reversed(range(NEEDED_ATTEMPTS)):
            on_first_rank(self._claim.check, f"save={save}")
            self.schedule.started(progress.iteration)
            try:
                self._pending = start_checkpoint(
                    save, progress, run, self._chunks, self._optimizer, self._groups, average=self._average,
                    run_id=self._run_id, text_files=text_files, before_publishing=self._claim.check,
                    keep_last=self._config.keep_last if self.schedule.is_settled else 0,
                    background=None if is_needed else self._background)
                if is_needed or self._background is None:
                    self._finish()
                return
            except CheckpointError as error:
                if not is_needed:
                    self._failed(progress.iteration, progress.iteration, error)
                    return
                if not more:
                    raise
                self._say(f"no checkpoint of iteration {progress.iteration}: {error}. Tried again in "
                          f"{NEEDED_PAUSE_S:g} s, {more} more time(s)")
                time.sleep(NEEDED_PAUSE_S)

    def look(self, iteration: int) -> None:
        """Take in what has become of a save under way, without waiting for it; after each step, of `iteration`.

        Raises:
            CheckpointError: on every rank, if it failed, as too many in a row have.
        """
        if self._pending is not None and self._pending.is_over():
            self.finish(iteration)

    def finish(self, iteration: int) -> None:
        """Wait for a save under way, if there is one; errors and arguments are those of `look`."""
        if self._pending is None:
            return
        of = self._pending.iteration
        try:
            self._finish()
        except CheckpointError as error:
            self._failed(of, iteration, error)

    def close(self) -> None:
        """Let go of the process that writes checkpoints; a save that nobody has waited for is lost."""
        if self._background is not None:
            self._background.close()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        path = pending.finish()
        self.schedule.saved()
        self.newest_in = self._config.save
        self._say(f"checkpoint saved: {path}")

    def _failed(self, of: int, iteration: int, error: CheckpointError) -> None:
        """Say that the checkpoint of iteration `of` could not be written, and end the run if that was one too many."""
        again, most = self.schedule.failed(iteration), self._config.max_failed_saves
        count = f"{self.schedule.num_failures} in a row"
        failed = f"no checkpoint of iteration {of}: {error}"
        if most and self.schedule.num_failures > most:
            raise CheckpointError(f"{failed}. That was {count}, more than max_failed_saves={most}: the run ends. Go on "
                                  "from the newest checkpoint when saves work again; --max-failed-saves 0 never ends a "
                                  "run for this") from error
        self._say(f"{failed}. That is {count}{f', of {most} that may fail' if most else ''}. The run goes on, and "
                  f"tries again after iteration {again}")

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
