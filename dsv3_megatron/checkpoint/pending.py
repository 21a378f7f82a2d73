"""A save under way: parts that ranks are writing, then a checkpoint that rank 0 makes of them.

The ranks agree on each of the two in messages of the training thread, where all of them ask at the same point of a
step. No message is sent meanwhile: what runs behind training writes files, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch

from dsv3_megatron.checkpoint.agreement import from_all_ranks, on_first_rank, sum_over_ranks, why
from dsv3_megatron.checkpoint.background import BackgroundWriter
from dsv3_megatron.checkpoint.folder import CheckpointError, remove_partial
from dsv3_megatron.checkpoint.writing import ShardOutcome, gather_outcomes

__all__ = ["PendingSave", "can_write_behind"]

logger = logging.getLogger(__name__)


class PendingSave:
    """A checkpoint that is being written. Both methods are called by every rank, at the same points of the run.

    Args:
        iteration: Step of the checkpoint.
        target: Folder in which it is written, before it has its name.
        subject: What is being done, for the message of an error.
        writing: What becomes of this rank's part.
        publish: Makes a checkpoint of what all ranks have written; run on rank 0.
        run: Runs a function behind training.
    """

    def __init__(self, iteration: int, target: Path, subject: str, *, writing: Future[ShardOutcome],
                 publish: Callable[[list[ShardOutcome]], Path],
                 run: Callable[[Callable[[], Path]], Future[Path]]) -> None:
        self.iteration = iteration
        self._target, self._subject = target, subject
        self._writing, self._publish, self._run = writing, publish, run
        self._outcomes: list[ShardOutcome] | None = None
        self._publishing: Future[Path] | None = None  # on rank 0

    def is_over(self) -> bool:
        """Whether the checkpoint is complete, or has failed: `finish` would not wait."""
        if self._outcomes is None:
            if not _on_all_ranks(self._writing.done()):
                return False
            self._outcomes = gather_outcomes(self._writing.result())
            if torch.distributed.get_rank() == 0:
                self._begin_to_publish()
        return _on_all_ranks(self._publishing is None or self._publishing.done())

    def finish(self) -> Path:
        """Wait for the checkpoint.

        Returns:
            Its folder.

        Raises:
            CheckpointError: on every rank, if it could not be written; nothing is left of it.
        """
        if self._outcomes is None:
            self._outcomes = gather_outcomes(self._writing.result())
        try:
            return on_first_rank(lambda: (self._publishing or self._begin_to_publish()).result(), self._subject)
        except CheckpointError:
            remove_partial(self._target)
            raise

    def _begin_to_publish(self) -> Future[Path]:
        outcomes = self._outcomes
        assert outcomes is not None
        self._publishing = self._run(lambda: self._publish(outcomes))
        return self._publishing


def can_write_behind(background: BackgroundWriter, num_bytes: int) -> bool:
    """Whether every rank has the memory for a copy of its part, and a process that writes it; called by every rank.

    Why not is said once.

    Args:
        background: This rank's, which is prepared.
        num_bytes: Bytes of this rank's part.
    """
    reasons = []
    try:
        background.prepare(num_bytes)
    except OSError as error:
        reasons = [why(error)]
    if _on_all_ranks(not reasons):
        return True
    text = from_all_ranks(reasons, "")
    if text != background.refusal and torch.distributed.get_rank() == 0:
        logger.warning("training waits for checkpoints (--async-save has no effect for now): %s", text)
    background.refusal = text
    return False


def _on_all_ranks(is_so: bool) -> bool:
    return not sum_over_ranks(int(not is_so))
