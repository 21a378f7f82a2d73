"""What each pipeline rank did when, measured: a timeline like a simulated one, for the same pictures.

Clocks are read where an action's inputs are there and where it is complete: CUDA events on the current stream of
a GPU, else the process's clock. The ranks start from a barrier, which is time 0 for each.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from dsv3_megatron.schedule.actions import Action
from dsv3_megatron.schedule.draw import write_trace
from dsv3_megatron.schedule.plan import Plan
from dsv3_megatron.schedule.timeline import Span, Timeline

_MILLISECONDS = 1000.0

logger = logging.getLogger(__name__)


class StepRecorder:
    """Times of the actions of one rank in one step.

    Args:
        is_cuda: Use CUDA events, which wait for no kernel; else `now`.
        now: Function that returns the moment, in seconds since any one; the process's clock unless told otherwise.
    """

    def __init__(self, *, is_cuda: bool, now: Callable[[], float] = time.perf_counter) -> None:
        self.is_cuda, self._now = is_cuda, now
        self._marks: list[tuple[Action, Any, Any]] = []
        self._begun: Any = None
        self._zero: Any = None

    def start(self, group: torch.distributed.ProcessGroup) -> None:
        """Meet the other ranks; their times count from here."""
        if self.is_cuda:
            torch.cuda.synchronize()
        torch.distributed.barrier(group=group)
        self._zero = self._mark()

    def begin(self, action: Action) -> None:
        """Note when the action's inputs were there."""
        self._begun = self._mark()

    def end(self, action: Action) -> None:
        """Note when the action was complete."""
        self._marks.append((action, self._begun, self._mark()))

    def spans(self) -> tuple[Span, ...]:
        """The actions so far, in milliseconds."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return tuple(Span(action, self._since_start(begun), self._since_start(ended))
                     for action, begun, ended in self._marks)

    def _mark(self) -> Any:
        if not self.is_cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since_start(self, mark: Any) -> float:
        return self._zero.elapsed_time(mark) if self.is_cuda else (mark - self._zero) * _MILLISECONDS


def measure_step(group: torch.distributed.ProcessGroup, run: Callable[[StepRecorder], None],
                 now: Callable[[], float] | None = None) -> Timeline:
    """Run a step on all ranks of a pipeline and bring their times together.

    Args:
        group: The pipeline's ranks, all of which call.
        run: Runs this rank's part.
        now: Function that returns the moment in seconds; None: the device's clock.

    Returns:
        By rank, in milliseconds; the same on every rank.
    """
    recorder = StepRecorder(is_cuda=torch.cuda.is_available()) if now is None else StepRecorder(is_cuda=False, now=now)
    recorder.start(group)
    run(recorder)
    gathered: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, recorder.spans(), group=group)
    return tuple(gathered)


class ScheduleTrace:
    """Records the first two training steps of a process; the file holds the second, which allocates nothing new.

    Of several pipelines beside each other (data and tensor parallelism) it is the one of global rank 0.

    Args:
        path: File for Chrome, Perfetto and `dsv3 draw-schedule`.
    """

    NUM_STEPS = 2

    def __init__(self, path: str) -> None:
        self.path, self.num_recorded = path, 0
        self._unwritten: tuple[Plan, Timeline] | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the next step is to be recorded."""
        return self.num_recorded < self.NUM_STEPS

    def record(self, plan: Plan, group: torch.distributed.ProcessGroup, run: Callable[[StepRecorder], None]) -> None:
        """Run a step, measured, and write what it was; what cannot be written is tried again when the process ends."""
        timeline = measure_step(group, run)
        self.num_recorded += 1
        if torch.distributed.get_rank() == 0:
            self._unwritten = plan, timeline
            self._write()

    def _write(self) -> None:
        """Write the last step, if it is not written yet; raises nothing."""
        if self._unwritten is None:
            return
        atexit.unregister(self._write)
        try:
            write_trace(*self._unwritten, self.path)
        except OSError as error:
            logger.warning("trace_schedule=%s cannot be written: %s; the run goes on, and it is tried again at its end",
                           self.path, error.strerror or error)
            atexit.register(self._write)
        else:
            self._unwritten = None
