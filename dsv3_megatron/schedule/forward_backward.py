"""A step's forward and backward passes over a pipeline, behind the interface of Megatron-Core's schedules.

Without a pipeline it is Megatron-Core's own function; with one, a plan run by the executor on stages in pieces
(`model/stage/runner.py`). What goes between stages is [S / CP / TP, B, H] in the pipeline's dtype. From a stage with
MTP modules to one with the losses it is [(1 + D) S / CP / TP, B, H]: the hidden states of the main model, then of
each of D modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.data.batches import Batch, BatchIterator
from dsv3_megatron.model.packed_documents import forward_stage
from dsv3_megatron.model.router import weigh_balance_losses
from dsv3_megatron.model.stage.runner import LossFunction, ModelChunk
from dsv3_megatron.parallel.groups import pipelines, replicas
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.schedule.execute import Executor
from dsv3_megatron.schedule.plan import PlanSizes, forward_plan, known_plan
from dsv3_megatron.schedule.recorder import ScheduleTrace
from dsv3_megatron.schedule.transfers import edges_of
from dsv3_megatron.schedule.transport import PipelineChannels

ForwardBackward = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True)
class ForwardStep:
    """Megatron-Core's `forward_step_func`, of which a stage in pieces takes the parts.

    Attributes:
        read: Takes the next batch of a chunk, to the stage's device.
        data: Data configuration of the run: whether documents are kept apart.
        loss: Makes of a batch and its token losses the sum to differentiate, the number of tokens, what to report.
    """

    read: Callable[[Iterator[Batch]], Batch]
    data: DataConfig
    loss: LossFunction

    def __call__(self, batches: Iterator[Batch], stage: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        """A micro-batch through a whole stage, and how its output becomes a loss."""
        batch = self.read(batches)
        return forward_stage(stage, batch, self.data), partial(self.loss, batch)

    def chunk(self, stage: torch.nn.Module, batches: Iterator[Batch]) -> ModelChunk:
        """The stage in pieces; its micro-batches come in the order of their batches, as every plan has them."""
        numbers = count()

        def batch_of(microbatch: int) -> Batch:
            assert microbatch == next(numbers), "batches are read in order"
            return self.read(batches)

        return ModelChunk(stage, batch_of=batch_of, data=self.data, loss_function=self.loss)


def iterate_chunks(dataset: Any, training: TrainingConfig, parallel: ParallelConfig, groups: ProcessGroupCollection, *,
                   consumed_samples: int = 0, eod_id: int | None = None) -> list[BatchIterator]:
    """This rank's micro-batches of a dataset, an iterator for each of its chunks.

    Args:
        dataset: Samples, in the order in which the run takes them.
        training: The run's training configuration, for its batch sizes.
        parallel: The run's layout.
        groups: Process groups of the run.
        consumed_samples: Samples that the whole run has taken, where the iterators begin.
        eod_id: Token at which documents end, where they are kept apart.
    """
    return [BatchIterator(dataset, micro_batch_size=training.micro_batch_size,
                          global_batch_size=training.global_batch_size, data_parallel_rank=rank,
                          data_parallel_size=size, consumed_samples=consumed_samples, eod_id=eod_id)
            for rank, size in replicas(parallel, groups)]


def read_step(batches: Sequence[Iterator[Batch]], iterators: Sequence[BatchIterator],
              chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection, device: torch.device
              ) -> list[Iterator[Batch]]:
    """Read a training step's micro-batches ahead of its first forward pass; called by every rank.

    Its tokens that count, by `loss_mask_BS`, are what the routers' balance losses have to be multiplied by.

    Args:
        batches: Micro-batches of each chunk of this rank, without end.
        iterators: The iterators that `batches` come from, one for each chunk.
        chunks: This rank's stages.
        groups: The run's process groups.
        device: Device of this process, for the sum over ranks.

    Returns:
        The micro-batches of each chunk, from the step's first.
    """
    read = [list(islice(part, iterator.num_micro_batches)) for part, iterator in zip(batches, iterators, strict=True)]
    # Chunks with the same part of the data have the same tokens; those of DualPipe's two directions have not.
    counts = {iterator.data_parallel_rank: sum(int(batch.loss_mask_BS.sum()) for batch in part)
              for part, iterator in zip(read, iterators, strict=True)}
    # Filled in, not copied: a GPU's host would wait for the copy.
    tokens = torch.full((), sum(counts.values()), device=device)
    torch.distributed.all_reduce(tokens, group=groups.dp)
    weigh_balance_losses(chunks, num_tokens=int(tokens), num_sequences=iterators[0].global_batch_size)
    return [iter(part) for part in read]


def build_forward_backward(parallel: ParallelConfig, groups: ProcessGroupCollection, config: TransformerConfig, *,
                           trace: str | None = None) -> ForwardBackward:
    """The function that takes a step's micro-batches through the stages; called by every rank, for it makes groups.

    Args:
        parallel: The run's; its schedule.
        groups: The run's process groups.
        config: Configuration of the stages; its `finalize_model_grads_func` is called at the end of a step, with the
            tokens that the gradients are to be divided by: those of one whole pipeline, the same on each of its ranks.
        trace: File for what each rank did when in a training step; see `recorder`. Needs a pipeline.

    Returns:
        Takes the arguments of Megatron-Core's forward_backward functions that a run uses.
    """
    if parallel.pipeline_model_parallel_size == 1:
        return forward_backward_no_pipelining
    return PipelineStep(parallel, groups, config, trace=ScheduleTrace(trace) if trace else None)


class PipelineStep:
    """The function that `build_forward_backward` returns for a pipeline."""

    def __init__(self, parallel: ParallelConfig, groups: ProcessGroupCollection, config: TransformerConfig, *,
                 trace: ScheduleTrace | None) -> None:
        self.parallel, self.groups, self.config, self.trace = parallel, groups, config, trace
        self.device = (torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available()
                       else torch.device("cpu"))
        self.channels = PipelineChannels(pipelines(groups), edges_of(placement(parallel)), device=self.device)
        self._executors: dict[Any, Executor] = {}

    def __call__(self, *, forward_step_func: ForwardStep, data_iterator: Any, model: Any, num_microbatches: int,
                 seq_length: int, micro_batch_size: int, forward_only: bool = False) -> list[dict[str, Any]]:
        """Run one step of a pipeline.

        Args:
            forward_step_func: Reads a batch and says its loss.
            data_iterator: Batches of each chunk; not in a list if there is one chunk.
            model: This rank's chunks, likewise.
            num_microbatches: Micro-batches of the whole pipeline, over both directions of DualPipe.
            seq_length: Tokens of a sequence.
            micro_batch_size: Sequences of a micro-batch.
            forward_only: No backward, and no finishing of gradients.

        Returns:
            The loss function's reports; none on a rank without a last stage.
        """
        modules: list[torch.nn.Module] = list(model) if isinstance(model, list) else [model]
        iterators: list[Iterator[Any]] = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        executor = self._executor(num_microbatches, seq_length, micro_batch_size, forward_only)
        chunks = [forward_step_func.chunk(module, batches)
                  for module, batches in zip(modules, iterators, strict=True)]
        with torch.set_grad_enabled(not forward_only):
            if self.trace is not None and self.trace.is_wanted and not forward_only:
                self.trace.record(executor.plan, self.groups.pp, partial(executor.run, chunks))
            else:
                executor.run(chunks)
        results = [chunk.take_reports() for chunk in chunks]
        if not forward_only:
            num_tokens = sum((tokens.to(self.device) for tokens, _ in results),
                             torch.zeros((), dtype=torch.int32, device=self.device))
            torch.distributed.all_reduce(num_tokens, group=self.groups.pp)
            assert self.config.finalize_model_grads_func is not None
            self.config.finalize_model_grads_func(modules, num_tokens)
        return [report for _, reports in results for report in reports]

    def _executor(self, num_microbatches: int, seq_length: int, micro_batch_size: int, forward_only: bool) -> Executor:
        """One for each kind of step: plans of many micro-batches take a while to make."""
        key = (num_microbatches, seq_length, micro_batch_size, forward_only)
        if key not in self._executors:
            if forward_only:
                plan = forward_plan(self.parallel.schedule, num_ranks=self.groups.pp.size(),
                                    num_microbatches=num_microbatches, virtual_stages=self.parallel.stages_per_rank)
            else:
                plan = known_plan(PlanSizes.of_run(self.parallel, num_microbatches))
            transport = self.channels.transport(
                shape=(seq_length // (self.groups.cp.size() * self.groups.tp.size()), micro_batch_size,
                       self.config.hidden_size),
                dtype=self.config.pipeline_dtype, device=self.device)
            self._executors[key] = Executor(plan, self.groups.pp.rank(), transport, self._lengths())
        return self._executors[key]

    def _lengths(self) -> dict[int, int]:
        """Hidden states that cross the last boundary, if they are several: MTP modules are in the stage before it."""
        if not self.config.mtp_standalone:
            return {}
        return {self.parallel.num_stages - 2: 1 + self.config.mtp_num_layers}
