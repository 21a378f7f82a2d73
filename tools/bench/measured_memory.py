"""Bytes that one process of a real run holds: exact counts of its tensors, between steps and at a step's peak.

On a CPU from the allocator's events, which torch's profiler records: all tensors from before the trainer is built to
the end of its second step. On a GPU from the caching allocator's own counts, which round each tensor up to 512 bytes;
that path has not been run.

The profiler sees the threads of the block that it watches. What gloo's threads let go of last would stay on the books
for ever, so each transfer is let go of here after they have done so (`_settled_transfers`), and tensors that a
collective has made for itself and nobody has been seen to free are left out.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from dsv3_megatron.config.run import RunConfig
    from dsv3_megatron.runs.trainer import Trainer

_NUM_ENTRIES = 30
# Transfers of less are not waited for: there are many, and they do not show.
_NUM_BYTES_SEEN = 1 << 14
# What starts a transfer.
_TRANSFERS = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "all_gather_single", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "broadcast", "reduce",
    "gather", "scatter", "send", "recv")


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

    with _settled_transfers():
        with _counted() as before:
            trainer = random_token_trainer(run)
            trainer.train_step()
        rows = _RowCounter(trainer)
        with _counted() as step, rows:
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


class _SettledTransfer:
    """A transfer that gloo's thread has let go of before this process's main thread does."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def is_completed(self) -> bool:
        """As of torch's."""
        return self._work is None or self._work.is_completed()

    def wait(self, *args: Any) -> bool:
        """As of torch's; then let go of it."""
        if self._work is not None:
            self._work.wait(*args)
            _wait_for_gloo()
            self._work = None
        return True


def _wait_for_gloo() -> None:
    """Return when no other thread of this process has anything to do: what is done is then out of gloo's hands.

    A thread that waits for Python's lock looks idle, so they are looked at several times with the lock free between.
    """
    tasks, own = Path("/proc/self/task"), str(threading.get_native_id())
    num_idle = 0
    while num_idle < 3:
        time.sleep(0.0005)
        is_idle = not any(_is_busy(tasks / name / "stat") for name in os.listdir(tasks) if name != own)
        num_idle = num_idle + 1 if is_idle else 0


def _is_busy(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "S"
    except FileNotFoundError:  # the thread has ended
        return False


def _largest(values: Iterable[Any]) -> int:
    """Bytes of the largest tensor in nested lists."""
    import torch

    return max((value.nbytes if isinstance(value, torch.Tensor) else _largest(value) if isinstance(value, list) else 0
                for value in values), default=0)


@contextmanager
def _settled_transfers() -> Iterator[None]:
    import torch

    def settled(start: Callable[..., Any]) -> Callable[..., Any]:
        """A function, so that it is bound to the group that it is called on."""
        def started(*args: Any, **kwargs: Any) -> Any:
            work = start(*args, **kwargs)
            return work if work is None or _largest(args) < _NUM_BYTES_SEEN else _SettledTransfer(work)

        return started

    group = torch.distributed.ProcessGroup
    with ExitStack() as stack:
        for name in () if torch.cuda.is_available() else _TRANSFERS:
            stack.enter_context(mock.patch.object(group, name, settled(getattr(group, name))))
        yield


@dataclass
class _Counted:
    at_end: int = 0
    peak: int = 0
    at_peak: tuple[tuple[str, int], ...] = ()


@contextmanager
def _counted() -> Iterator[_Counted]:
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
    _replay(_allocations(results.kineto_results.experimental_event_tree()), counted)


class _Allocation(NamedTuple):
    """Of a tensor, or, with a negative size, its end."""

    time_ns: int
    pointer: int
    size: int
    path: str


def _allocations(tree: Any) -> list[_Allocation]:
    """In their order, each with the operations that it is in."""
    found = []
    stack = [(node, "") for node in tree]
    while stack:
        node, path = stack.pop()
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            found.append(_Allocation(node.start_time_ns, fields.ptr, fields.alloc_size, path))
            continue
        name = node.name.replace("autograd::engine::evaluate_function: ", "")
        stack += [(child, f"{path} > {name}" if path else name) for child in node.children]
    return sorted(found)


def _replay(allocations: list[_Allocation], counted: _Counted) -> None:
    """Add them up."""
    freed, latest = set(), dict[int, int]()
    for number, allocation in enumerate(allocations):
        if allocation.size > 0:
            latest[allocation.pointer] = number
        elif allocation.pointer in latest:
            freed.add(latest.pop(allocation.pointer))
    counts = [number for number, allocation in enumerate(allocations)
              if allocation.size < 0 or number in freed or not allocation.path.startswith("c10d::")]
    last = 0
    for number in counts:
        counted.at_end += allocations[number].size
        if counted.at_end > counted.peak:
            counted.peak, last = counted.at_end, number
    alive: dict[int, _Allocation] = {}
    for number in counts:
        allocation = allocations[number]
        if number > last:
            break
        if allocation.size > 0:
            alive[allocation.pointer] = allocation
        else:
            alive.pop(allocation.pointer, None)
    sums: dict[str, int] = {}
    for allocation in alive.values():
        label = f"{allocation.path} [{allocation.size:,}]"
        sums[label] = sums.get(label, 0) + allocation.size
    counted.at_peak = tuple(sorted(sums.items(), key=lambda item: -item[1])[:_NUM_ENTRIES])


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
