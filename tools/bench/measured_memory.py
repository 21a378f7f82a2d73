"""Bytes that one process of a real run holds: exact counts of its tensors, between steps and at a step's peak.

On a CPU from the allocator's events, which torch's profiler records (`metrics/live_bytes.py`): all tensors from before
the trainer is built to the end of its second step. On a GPU from the caching allocator's own counts, which round each
tensor up to 512 bytes; that path has not been run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_megatron.config.run import RunConfig
    from dsv3_megatron.trainer import Trainer

_MEMORY_ENTRIES = 30


@dataclass(frozen=True)
class MeasuredMemory:
    """Of one process, in bytes.

    Attributes:
        rank: Global.
        pipeline_rank: Among the pipeline's.
        parameters: Weights with their buffers' padding.
        gradients: Main gradients, likewise.
        optimizer: Master weights, moments, and the scratch that narrow moments need.
        average: Of the weights; on a CPU it is among the tensors counted here.
        state: Everything that is there between steps, without the average.
        peak: The most that is there at once during a step, without the average.
        imbalance: Rows that this rank's experts got in the step, as a multiple of the mean over ranks.
        at_peak: The largest of what came into being in the step and is there at its peak: bytes by operation.
    """

    rank: int
    pipeline_rank: int
    parameters: int
    gradients: int
    optimizer: int
    average: int
    state: int
    peak: int
    imbalance: float
    at_peak: tuple[tuple[str, int], ...]


def measure(run: RunConfig) -> MeasuredMemory:
    """Build the run's trainer on random tokens and take two steps; called in every process of the run."""
    import torch

    from tools.bench.random_run import random_token_trainer

    with _counted() as before:
        trainer = random_token_trainer(run)
        trainer.train_step()
    rows = _RowCounter(trainer)
    with _counted(explains=True) as step, rows:
        trainer.train_step()
    if trainer.average:
        trainer.average.wait()
    parameters, gradients, optimizer, average = _components(trainer)
    on_device = 0 if torch.cuda.is_available() else average
    state = before.at_end - on_device
    return MeasuredMemory(
        rank=trainer.rank, pipeline_rank=trainer.groups.pp.rank(), parameters=parameters, gradients=gradients,
        optimizer=optimizer, average=average, state=state, peak=state + step.peak, imbalance=rows.imbalance(),
        at_peak=step.at_peak)


@dataclass
class _Counted:
    at_end: int = 0
    peak: int = 0
    at_peak: tuple[tuple[str, int], ...] = ()


@contextmanager
def _counted(*, explains: bool = False) -> Iterator[_Counted]:
    """What a block allocates and does not free, and the most of that at once."""
    import torch

    counted = _Counted()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        started = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield counted
        torch.cuda.synchronize()
        counted.at_end = torch.cuda.memory_allocated() - started
        counted.peak = torch.cuda.max_memory_allocated() - started
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        yield counted
    results: Any = profiler.profiler
    events = [(event.start_ns(), event.nbytes()) for event in results.kineto_results.events()
              if event.name() == "[memory]"]
    for _, size in events:
        counted.at_end += size
        counted.peak = max(counted.peak, counted.at_end)
    if explains:
        counted.at_peak = _at_peak(results.kineto_results.experimental_event_tree())


def _at_peak(tree: Any) -> tuple[tuple[str, int], ...]:
    """What is there at the peak, by the operations that made it."""
    allocations: list[tuple[int, int, int, str]] = []
    stack = [(node, "") for node in tree]
    while stack:
        node, path = stack.pop()
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            allocations.append((node.start_time_ns, fields.ptr, fields.alloc_size, path))
            continue
        name = node.name.replace("autograd::engine::evaluate_function: ", "")
        stack += [(child, f"{path} > {name}" if path else name) for child in node.children]
    level = best = index = 0
    allocations.sort(key=lambda allocation: allocation[0])
    for number, (_, _, size, _) in enumerate(allocations, start=1):
        level += size
        if level > best:
            best, index = level, number
    alive: dict[int, tuple[int, str]] = {}
    for _, pointer, size, path in allocations[:index]:
        if size > 0:
            alive[pointer] = (size, path)
        else:
            alive.pop(pointer, None)
    sums: dict[str, int] = {}
    for size, path in alive.values():
        label = f"{path} [{size:,}]"
        sums[label] = sums.get(label, 0) + size
    return tuple(sorted(sums.items(), key=lambda item: -item[1])[:_MEMORY_ENTRIES])


class _RowCounter:
    """Counts the rows that this rank's experts get while it is entered."""

    def __init__(self, trainer: Trainer) -> None:
        from dsv3_megatron.model.experts import GroupedExperts

        self._trainer = trainer
        self._experts = [module for chunk in trainer.chunks for module in chunk.modules()
                         if isinstance(module, GroupedExperts)]
        self._rows = 0
        self._handles: list[Any] = []

    def __enter__(self) -> _RowCounter:
        def count(_module: Any, inputs: tuple[Any, ...]) -> None:
            self._rows += inputs[0].shape[0]

        self._handles = [module.register_forward_pre_hook(count) for module in self._experts]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def imbalance(self) -> float:
        """Rows of this rank over the mean of the ranks that share its layers' experts."""
        import torch

        group = self._trainer.groups.ep
        mean = torch.tensor(float(self._rows))
        torch.distributed.all_reduce(mean, group=group)
        return self._rows * group.size() / float(mean) if float(mean) else 1.0


def _components(trainer: Trainer) -> tuple[int, int, int, int]:
    """Bytes of weights, main gradients, optimizer and average."""
    from dsv3_megatron.optim.shards import distributed_parts

    buffers = [buffer for chunk in trainer.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    weights = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers}
    optimizer = 0
    for part in distributed_parts(trainer.optimizer):
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                if master.untyped_storage().data_ptr() not in weights:
                    optimizer += master.nbytes
        for state in part.optimizer.state.values():
            optimizer += sum(value.nbytes for value in state.values() if hasattr(value, "nbytes"))
        for scratch in getattr(part.optimizer, "_scratch", {}).values():
            optimizer += sum(value.nbytes for value in (*scratch.moments.values(), *scratch.tables.values(),
                                                        scratch.bits))
    average = sum(value.nbytes for value in trainer.average.averages) if trainer.average else 0
    return (sum(buffer.param_data.nbytes for buffer in buffers), sum(buffer.grad_data.nbytes for buffer in buffers),
            optimizer, average)
