"""What one rank holds of a training step: losses, gradients, counts, biases and parameters, by their global names.

A step is the trainer's own. The gradients are read where Megatron-Core has reduced them over all ranks and divided them
by the tokens, just before the optimizer step. There the distributed optimizer has left each data-parallel rank its
shard of the sums only, so the shards are put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.certification.random_samples import RandomSamples, unrecorded
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.progress import TrainingDisplay
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.model.global_names import WholeParameter, whole_parameters
from dsv3_megatron.model.stage.buckets import buckets_of
from dsv3_megatron.optim.router_bias import routers
from dsv3_megatron.runs.trainer import Trainer


@dataclass(frozen=True)
class RankPlace:
    """Place of a rank in a layout.

    Attributes:
        rank: Global rank.
        pipeline: Position in its pipeline.
        tensor: Position among the ranks that share its layers.
        expert: Position among the ranks that share its experts.
        data: Position among the replicas of its layers.
        context: Position among the ranks that share its sequences.
    """

    rank: int
    pipeline: int
    tensor: int
    expert: int
    data: int
    context: int = 0

    def __str__(self) -> str:
        context = f", context {self.context}" if self.context else ""
        return (f"rank {self.rank} (pipeline {self.pipeline}, tensor {self.tensor}, expert {self.expert}, "
                f"data {self.data}{context})")


@dataclass(frozen=True)
class RankStep:
    """What one rank holds of a step's result.

    Attributes:
        place: Place of the rank.
        report: Losses, gradient norm and expert loads, the same on every rank.
        gradients: Entries for the parameters that the rank holds or holds a part of; `local` is the gradient.
        values: Entries likewise; `local` is the parameter after the step.
        biases: Router biases after the step, by row of the load table.
        counters: Dtype of what counts the tokens of each expert, by row.
        sequence_parallel: Whether activations were split along the sequence.
        num_micro_batches: Forward passes of each chunk of this rank.
    """

    place: RankPlace
    report: StepReport
    gradients: list[WholeParameter]
    values: list[WholeParameter]
    biases: dict[int, torch.Tensor]
    counters: dict[int, torch.dtype]
    sequence_parallel: bool
    num_micro_batches: int


class StepHooks:
    """Moments of a step at which something can be looked at, or broken on purpose by a test; nothing happens here."""

    def before_step(self, trainer: Trainer) -> None:
        """Act on a trainer whose model is built."""

    def before_reduction(self, trainer: Trainer) -> None:
        """Act when the gradients of this rank's micro-batches are summed."""

    def after_step(self, trainer: Trainer) -> None:
        """Act when the parameters are updated."""


class MadeDataTrainer(Trainer):
    """The trainer on samples that are made up, which tells nothing.

    Args:
        run: A valid run; its folders of checkpoints count.
        samples: Samples to train on.
    """

    def __init__(self, run: RunConfig, samples: RandomSamples) -> None:
        super().__init__(run, data=unrecorded(samples))

    def _build_reports(self) -> None:
        self.speed, self.writer = self._speed(), None
        self.display = TrainingDisplay(self.recipe.num_steps, self.speed, enabled=False)


def take_step(trainer: Trainer, hooks: StepHooks | None = None) -> RankStep:
    """Take the trainer's next step; called by every rank.

    Args:
        trainer: A trainer with a step left.
        hooks: Things to do on the way.
    """
    hooks = hooks or StepHooks()
    hooks.before_step(trainer)
    gradients: list[WholeParameter] = []
    finalize = trainer.mcore_config.finalize_model_grads_func
    assert finalize is not None

    def finalize_and_note(*args: Any, **kwargs: Any) -> None:
        hooks.before_reduction(trainer)
        finalize(*args, **kwargs)
        for chunk in trainer.chunks:
            gather_gradient_shards(chunk)
        gradients.extend(local_parts(trainer, lambda parameter: parameter.main_grad))

    trainer.mcore_config.finalize_model_grads_func = finalize_and_note
    leave_weights_to_passes(trainer)
    try:
        report, _signal = trainer.train_step()
    finally:
        trainer.mcore_config.finalize_model_grads_func = finalize
    hooks.after_step(trainer)
    own_routers = list(routers(trainer.chunks, trainer.run.model.num_layers))
    return RankStep(
        place=place_of(trainer),
        report=report,
        gradients=gradients,
        values=parameter_values(trainer),
        biases={row: router.expert_bias.clone() for row, router in own_routers},
        counters={row: router.tokens_per_expert.dtype for row, router in own_routers},
        sequence_parallel=trainer.mcore_config.sequence_parallel,
        num_micro_batches=trainer.batches[0].num_micro_batches,
    )


def leave_weights_to_passes(trainer: Trainer) -> None:
    """Spoil the weights that other ranks update, where a run gathers them late: the next passes have to gather them."""
    for chunk, buckets in zip(trainer.chunks, buckets_of(trainer.chunks), strict=True):
        if not buckets.gathers_late:
            continue
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                for rank, shard in enumerate(bucket.param_data.chunk(group.size())):
                    if rank != group.rank():
                        shard.fill_(torch.nan)
        buckets.note_update()


def place_of(trainer: Trainer) -> RankPlace:
    """Place of the trainer's process in the layout."""
    groups = trainer.groups
    return RankPlace(trainer.rank, groups.pp.rank(), groups.tp.rank(), groups.ep.rank(), groups.dp.rank(),
                     groups.cp.rank())


def parameter_values(trainer: Trainer) -> list[WholeParameter]:
    """A copy of this rank's part of each parameter."""
    return local_parts(trainer, lambda parameter: parameter.data)


def gather_gradient_shards(chunk: Any) -> None:
    """Give every data-parallel rank the sums that the distributed optimizer's reduce-scatter left on one."""
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def local_parts(trainer: Trainer, tensor_of: Callable[[Any], torch.Tensor]) -> list[WholeParameter]:
    """A copy of this rank's part of some tensor of each parameter."""
    parts = []
    for chunk in trainer.chunks:
        for whole in whole_parameters(chunk, trainer.groups):
            tensor = tensor_of(whole.parameter)
            local = tensor if whole.expert is None else tensor[whole.expert]
            assert local.shape == whole.local.shape
            changes: dict[str, Any] = {"parameter": None, "local": local.detach().cpu().clone()}
            parts.append(dataclasses.replace(whole, **changes))
    return parts


def whole_tensors(ranks: Iterable[list[WholeParameter]]) -> dict[str, torch.Tensor]:
    """Whole tensors by global name from the parts that ranks hold; NaN where none has anything."""
    whole: dict[str, torch.Tensor] = {}
    for parts in ranks:
        for part in parts:
            part.put(whole.setdefault(part.name, torch.full(part.shape, torch.nan)), part.local)
    return whole
