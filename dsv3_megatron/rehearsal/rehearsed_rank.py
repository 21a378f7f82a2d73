"""One rank of a rehearsal, in a process of its own, from a task to a result. The Trainer is the run's own."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import print_error
from dsv3_megatron.rehearsal.rank_kinds import position_of
from dsv3_megatron.rehearsal.rank_results import (
    BUILDING,
    FIRST_STEP,
    RESUMING,
    SAVING,
    STEP,
    Memory,
    PhaseWork,
    RankResult,
    RankTask,
)
from dsv3_megatron.rehearsal.rehearsed_run import rehearsed_run

# Lines of memory that a result lists.
_NUM_LINES = 24


def environment(task: RankTask) -> dict[str, str]:
    """The variables that torchrun would set for this rank, and those that the preloaded runtime reads."""
    nodes = min(task.gpus_per_node, task.world_size)
    return {"RANK": str(task.rank), "WORLD_SIZE": str(task.world_size), "LOCAL_RANK": str(task.rank % nodes),
            "LOCAL_WORLD_SIZE": str(nodes), "MASTER_ADDR": "rehearsal", "MASTER_PORT": "29500",
            "DSV3_REHEARSAL_GPUS": str(nodes), "DSV3_REHEARSAL_BYTES": str(task.device_bytes)}


def rehearse(task: RankTask) -> RankResult:
    """Build the run's Trainer as this rank, and take a step or several.

    Raises:
        ConfigError: the run cannot be.
    """
    from dsv3_megatron.rehearsal.checkpoint_stand_ins import CheckpointNotes, checkpoint_replacements
    from dsv3_megatron.rehearsal.collective_calls import calls_as_json
    from dsv3_megatron.rehearsal.replacement import replaced
    from dsv3_megatron.rehearsal.stand_ins import GroupCount, replacements
    from dsv3_megatron.rehearsal.watch import Watch, fake_mode

    asked = parse_command(task.arguments).run
    watch, groups, notes = Watch(), GroupCount(), CheckpointNotes()
    result = RankResult(task.rank, *position_of(task.rank, asked.parallel, task.world_size))
    started, cpu_started = time.perf_counter(), time.process_time()
    # Megatron-Core compiles functions as it is imported.
    from dsv3_megatron.platform import prepare

    prepare()
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="rehearsed-checkpoint-")) if task.saves else None
        run = rehearsed_run(asked, task.world_size, task.num_microbatches, folder)
        table = replacements(watch, groups, rank=task.rank, world_size=task.world_size, imbalance=task.imbalance)
        stack.enter_context(replaced(table + checkpoint_replacements(watch, notes)))
        stack.enter_context(fake_mode())
        stack.enter_context(watch)
        RankRehearsal(task, run, watch, result, groups).go()
    result.saved_bytes = notes.num_bytes
    result.faults = [(text, line, count) for (text, line), count in watch.faults.most_common()]
    result.work = {phase: _work(counts) for phase, counts in watch.counts.items()}
    result.calls = calls_as_json(watch.collectives.calls)
    result.seconds, result.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return result


class RankRehearsal:
    """What a rank does, phase after phase, and the memory of each, as far as it comes.

    Args:
        task: Task of the process.
        run: The run as it is rehearsed.
        watch: Watch that is on.
        result: Receives what is found.
        groups: Process groups, as they are counted.
    """

    def __init__(self, task: RankTask, run: Any, watch: Any, result: RankResult, groups: Any) -> None:
        self.task, self.run, self.watch, self.result, self.groups = task, run, watch, result, groups
        self.trainer: Any = None
        self._spans: dict[str, tuple[int, int]] = {}

    def go(self) -> None:
        """Go through all phases; an error ends them and is noted, with what was seen before it."""
        from dsv3_megatron.model.stage.buckets import buckets_of
        from dsv3_megatron.runs.trainer import Trainer

        memory = self.watch.memory
        try:
            with self._phase(BUILDING):
                self.trainer = Trainer(self.run)
            self.result.built_bytes = memory.total_at(memory.now)
            self.result.group_calls = self.groups.calls
            self.result.groups = self.groups.joined, self.groups.alone
            self.trainer.are_weights_read = False
            for buckets in buckets_of(self.trainer.chunks):  # the first step begins as any other
                buckets.note_update()
            for phase in (FIRST_STEP, STEP)[:self.task.num_steps]:
                with self._phase(phase):
                    self.trainer.train_step()
            if self.task.saves:
                with self._phase(SAVING):
                    self.trainer.save(is_needed=True)
                self._end_run()
                with self._phase(RESUMING):
                    self.trainer = Trainer(self.run)
        except Exception as error:  # noqa: BLE001 - what a rehearsal is there to find; it is reported
            self.result.failure = _failure(error)
            error.__traceback__ = None  # it would keep tensors alive
        if self.trainer is not None:
            name_states(self.trainer, memory)
        for phase, span in self._spans.items():
            # Of a phase that did not end nothing is known to be there from the first on.
            is_repeated = phase in (FIRST_STEP, STEP) and phase != self.result.failed_in
            self.result.peaks[phase] = _memory(memory.peak(*span, is_repeated=is_repeated))

    def _end_run(self) -> None:
        """End the run as a process would that is started again afterwards."""
        from dsv3_megatron.parallel.groups import destroy_groups

        name_states(self.trainer, self.watch.memory)
        self.trainer.claim.release()
        self.trainer = None
        destroy_groups()
        gc.collect()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = self.watch.memory.now
        self.watch.begin(name)
        try:
            yield
        except Exception:
            self.result.failed_in = name
            raise
        finally:
            self._spans[name] = start, self.watch.memory.now


def name_states(trainer: Any, memory: Any) -> None:
    """Say of each tensor that a rank holds between steps what it is; of one that is of two kinds the later one counts.
    """
    for component, tensors in _parts(trainer):
        for tensor in tensors:
            memory.name(tensor, component)


def _parts(trainer: Any) -> Iterator[tuple[str, list[Any]]]:
    import torch

    from dsv3_megatron.optim.shards import distributed_parts
    from dsv3_megatron.rehearsal.live_memory import BUFFERS, GRADIENTS, OPTIMIZER, PARAMETERS

    states: list[Any] = []
    for part in distributed_parts(trainer.optimizer):
        inner = part.optimizer
        states += [weight for group in inner.param_groups for weight in group["params"]]
        states += [value for state in inner.state.values() for value in state.values()
                   if isinstance(value, torch.Tensor)]
    yield OPTIMIZER, states
    yield BUFFERS, [buffer for chunk in trainer.chunks for buffer in chunk.module.buffers()]
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    yield GRADIENTS, [parameter.main_grad for parameter in parameters if hasattr(parameter, "main_grad")]
    yield PARAMETERS, parameters


def _memory(peak: Any) -> Memory:
    components: dict[str, int] = {}
    for label, size in peak.by_label.items():
        components[label.component] = components.get(label.component, 0) + size
    lines = [(label.line, label.operation, label.component, size)
             for label, size in list(peak.by_label.items())[:_NUM_LINES]]
    return Memory(peak.num_bytes, peak.allocated, components, lines, f"{peak.at.operation} at {peak.at.line}")


def _work(counts: Any) -> PhaseWork:
    waits, copies, assumed = ([(text, line, count) for (text, line), count in counter.most_common()]
                              for counter in (counts.waits, counts.copies, counts.assumed))
    return PhaseWork(waits, copies, dict(counts.launches.most_common()), assumed)


def _failure(error: BaseException) -> str:
    """An error with where it came from, the innermost line last."""
    from dsv3_megatron.rehearsal.source_lines import line_of

    lines = [line for frame, number in traceback.walk_tb(error.__traceback__)
             if (line := line_of(frame.f_code, number)) is not None]
    if os.environ.get("DSV3_REHEARSAL_TRACEBACK"):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}\n  through {' > '.join(lines[-6:]) or 'no line of the library'}"


def rehearse_to_file(task: RankTask, path: Path) -> int:
    """Rehearse a rank, and write what it did; the exit status: 2, with the error on stderr, if the run cannot be."""
    try:
        found = rehearse(task)
    except ValueError as error:
        print_error(error)
        return 2
    path.write_text(json_text(asdict(found)), encoding="utf-8")
    return 0
