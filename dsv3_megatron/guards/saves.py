"""Decides when a run's state is worth a checkpoint, and when older ones may go. Pure Python.

A checkpoint replaces an older one in the end, so it is written only of a state that is at least as good: one that has
taken in an update since the run began, was loaded or went back, and whose last step's update was applied. A save that
falls due while updates are being left out waits for the next one that is applied; a run that a guard ends writes none.
So a damaged state that was loaded, or came up on the way, costs no sound checkpoint, and does not look like progress.
"""

from __future__ import annotations


class SaveSchedule:
    """Decides after each step whether a checkpoint is due. The same on every rank, from the same facts.

    Args:
        interval: Steps between checkpoints.

    Attributes:
        saved_at: Iteration of the last checkpoint that was loaded or saved; None before any.
        has_advanced: Whether an update was applied since the run began, was loaded or went back.
        is_settled: Whether the last step's update was applied; False while updates are being left out.
        num_failures: Checkpoints in a row that could not be written.
    """

    def __init__(self, interval: int) -> None:
        self.saved_at: int | None = None
        self.has_advanced = self.is_settled = False
        self._interval = interval
        self._is_due = False
        self._next_attempt = 0
        self._under_way: int | None = None
        self.num_failures = 0

    def note_step(self, iteration: int, *, is_applied: bool) -> None:
        """Take in a step, counted from 1."""
        self.has_advanced |= is_applied
        self.is_settled = is_applied
        self._is_due |= iteration % self._interval == 0

    def wants(self, iteration: int, *, is_last: bool) -> bool:
        """Whether the state after `iteration` steps is to be saved.

        Args:
            iteration: Steps taken.
            is_last: The run ends here: it is saved whatever the schedule says, if there is anything new in it.
        """
        if not self.has_advanced or iteration in (self.saved_at, self._under_way):
            return False
        return is_last or (self._is_due and self.is_settled and iteration >= self._next_attempt)

    def started(self, iteration: int) -> None:
        """A checkpoint of `iteration` is being written: what becomes of it is said later."""
        self._under_way = iteration
        self._is_due = False

    def saved(self) -> None:
        """The checkpoint that was started last has been written."""
        self.saved_at, self._under_way = self._under_way, None
        self._next_attempt = self.num_failures = 0

    def failed(self, iteration: int) -> int:
        """The checkpoint that was started last could not be written; one is due after 1, 2, 4, ... steps, at most an
        interval.

        Args:
            iteration: Steps taken by now.

        Returns:
            The iteration of the next attempt.
        """
        self._is_due, self._under_way = True, None
        self._next_attempt = iteration + min(self._interval, 2**self.num_failures)
        self.num_failures += 1
        return self._next_attempt

    def went_back(self, iteration: int) -> None:
        """The run's state is that of the checkpoint of `iteration`, loaded or gone back to: nothing is new in it."""
        self.saved_at = iteration
        self.has_advanced = self.is_settled = self._is_due = False
        self._next_attempt = self.num_failures = 0
