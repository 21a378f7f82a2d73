"""A model that learns: one optimizer step from the micro-batches that it is given.

A step is: micro-batches through the pipeline by its schedule, gradients reduced and divided by the number of tokens,
one optimizer step, one update of the routers' biases. The loss of a step is the mean over its tokens: main loss +
lambda / D * sum of the MTP losses (each summed over the positions that have a target and divided by all positions, as
in the report) + the balance losses, mean over sequences.

Every pipeline stage reads the batch itself, so each knows where its documents end, if they are isolated: attention and
the MTP modules treat a document as a sequence. Balance losses stay per sequence and expert loads per step: the router
sees tokens, not documents.

What the steps are taken with, on which data and how long is the caller's: trainer.py's by a run's recipe, notebook.py's
one by one.

Shapes: B micro-batch, S sequence, L layers with MTP modules, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from dsv3_megatron.config.pipeline import SPLIT_BACKWARD
from dsv3_megatron.config.recipe import StepPlan
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import Batch, BatchIterator
from dsv3_megatron.guards.decisions import Guard
from dsv3_megatron.guards.events import EventLog
from dsv3_megatron.guards.guarded_step import StepFacts, StepOutcome, guarded_step
from dsv3_megatron.guards.step_losses import StepLosses
from dsv3_megatron.metrics.instruments import Instruments
from dsv3_megatron.metrics.measurements import Measurements
from dsv3_megatron.model.build import wrap_stages
from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.model.losses import sum_losses
from dsv3_megatron.model.packed_documents import with_labels_that_count
from dsv3_megatron.model.stage.buckets import buckets_of, finish_gathering
from dsv3_megatron.model.stage.runner import LossFunction
from dsv3_megatron.ops.fp8.held_weights import constant_weights
from dsv3_megatron.optim.ema import WeightAverage
from dsv3_megatron.optim.optimizer import build_optimizer, set_learning_rate
from dsv3_megatron.optim.router_bias import update_router_biases
from dsv3_megatron.parallel.groups import groups_of_gradients
from dsv3_megatron.parallel.sequence_parts import SequenceParts
from dsv3_megatron.platform.device import overlaps_reductions
from dsv3_megatron.runs.built_model import BuiltModel, build_model
from dsv3_megatron.runs.step_sums import sum_step
from dsv3_megatron.schedule.forward_backward import ForwardStep, build_forward_backward, read_step


@dataclass(frozen=True)
class TakenStep:
    """What an optimizer step did; the same on every rank.

    Attributes:
        losses: Mean losses of the step's tokens.
        extras: Further means of a loss of its own kind, by the learner's `extra_names`.
        balance_loss: Balance loss before alpha, mean over sequences and MoE layers; None where there is none.
        outcome: What the guards made of the step: whether the update was applied, and the gradient's norm.
        loads_LE: int64 [L, E], on the host: tokens that each expert got; rows of dense layers are zero.
        measurements: What the instruments saw; None unless they look at this step.
    """

    losses: StepLosses
    extras: dict[str, float]
    balance_loss: float | None
    outcome: StepOutcome
    loads_LE: torch.Tensor
    measurements: Measurements | None


def build_for_training(run: RunConfig) -> BuiltModel:
    """Build this process's stages of a run that trains them."""
    return build_model(run, delays_engine_weights=run.parallel.has_pairs or run.parallel.schedule in SPLIT_BACKWARD)


class Learner:
    """One process's stages with their gradients, their optimizer and their guard.

    A learner with a loss of its own kind replaces `_loss`, and names in `extra_names` the sums that it reports behind
    the losses, which become means as these do.

    Args:
        built: The stages; their parameters move into the learner's buffers, where both still see them.

    Attributes:
        chunks: The stages, wrapped.
        optimizer: Distributed optimizer over them.
        average: Moving average of the weights; None if the run keeps none.
        guard: Judge of each step.
        phase: Phase of the step under way: its batch, sequence length and weight of the MTP losses.
        are_weights_read: Weights are read between this step and the next. Where nobody does, those of other ranks'
            shards may be left to the passes of the next step (`overlap_param_gather`); whoever reads them then calls
            `finish_gathering`.
    """

    extra_names: tuple[str, ...] = ()

    def __init__(self, built: BuiltModel) -> None:
        self.run = run = built.run
        self.device, self.groups, self.precision, self.mcore_config = (
            built.device, built.groups, built.precision, built.config)
        overlaps = overlaps_reductions(self.device)
        self.chunks = wrap_stages(
            built.stages, self.mcore_config, self.groups, reduces_early=overlaps and run.parallel.overlap_grad_reduce,
            gathers_late=overlaps and run.parallel.overlap_param_gather)
        self.are_weights_read = True
        self.optimizer = build_optimizer(run.training, list(self.chunks), self.groups, precision=self.precision)
        self.average = self.make_average()
        self.instruments = Instruments(run, self.chunks, self.optimizer, self.groups, self.device)
        self._groups_of_gradients = groups_of_gradients(run.model, run.parallel, self.groups)
        # The function that takes micro-batches through the stages calls it behind the last of them.
        self.mcore_config.finalize_model_grads_func = self.reduce_gradients
        self.forward_backward = build_forward_backward(
            run.parallel, self.groups, self.mcore_config, trace=run.logging.trace_schedule)
        self.guard = Guard(run.guards)
        self.guard_log = EventLog(run.logging.tensorboard_dir, enabled=torch.distributed.get_rank() == 0)
        self.phase = run.recipe().phases_to_run[0]

    def make_average(self) -> WeightAverage | None:
        """The moving average of the weights that the run keeps; None if it keeps none."""
        decay = self.run.training.ema_decay
        return WeightAverage(self.optimizer, list(self.chunks), self.groups, decay=decay) if decay else None

    def beat(self, doing: str) -> None:
        """Hear that the step goes on, and with what; for a watchdog."""

    def take_step(self, plan: StepPlan, iterators: Sequence[BatchIterator], *, iteration: int, first_sample: int
                  ) -> TakenStep:
        """Learn from the next global batch; called by every rank.

        Args:
            plan: Settings of the step.
            iterators: Micro-batches of each chunk of this rank.
            iteration: Number of the step, counted from 1.
            first_sample: Number of the global batch's first sample, for messages.
        """
        clock, self.phase = self.instruments.clock, plan.phase
        self.instruments.begin_step(iteration)
        with clock.part("forward-backward"):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            set_learning_rate(self.optimizer, plan.learning_rate)
            for batches in iterators:
                batches.set_global_batch_size(plan.global_batch_size)
            microbatches = read_step([clock.waiting(batches, "data") for batches in iterators], iterators, self.chunks,
                                     self.groups, self.device.torch_device)
            # Forward, backward, and with the last micro-batch `reduce_gradients`.
            collected = self.run_microbatches(microbatches, plan.global_batch_size, forward_only=False)
        self.beat("optimizer")
        with clock.part("optimizer"):
            sums = sum_step(self.run.model, self.chunks, self.optimizer, collected, self.groups, self.device,
                            num_extras=len(self.extra_names))
            balance_loss = self._mean_balance_loss(sums.balance_loss, plan.global_batch_size)
            if self.average:
                self.average.wait()
            samples = range(first_sample, first_sample + plan.global_batch_size)
            outcome = guarded_step(
                self.guard, self.guard_log, self.optimizer, self.chunks,
                StepFacts(iteration, sums.losses.by_name(balance_loss), samples, collected, sums.grad_norm,
                          sums.has_nonfinite_copy))
            if self.average and outcome.is_applied:
                self.average.update()
            if self.are_weights_read:
                finish_gathering(self.chunks)
        with clock.part("router-bias"):
            if outcome.is_applied:
                update_router_biases(self.chunks, sums.loads_on_device_LE, num_layers=self.run.model.num_layers,
                                     update_rate=plan.bias_update_rate)
        with clock.part("logging"):
            measurements = self.instruments.end_step()
        extras = dict(zip(self.extra_names, sums.extras, strict=True))
        return TakenStep(sums.losses, extras, balance_loss, outcome, sums.loads_LE, measurements)

    def run_microbatches(self, batches: Sequence[Iterator[Batch]], num_sequences: int, *, forward_only: bool,
                         loss: LossFunction | None = None) -> list[dict[str, Any]]:
        """Take one global batch through the pipeline; called by every rank.

        Args:
            batches: Micro-batches of each chunk.
            num_sequences: Sequences of the global batch.
            forward_only: No backward pass, and no reduction of gradients.
            loss: Function that makes of token losses what is reported; None: the run's loss.

        Returns:
            This rank's reports of its micro-batches.
        """
        training = self.phase.training
        num_microbatches = num_sequences // (training.micro_batch_size * self.groups.dp.size())
        for buckets in buckets_of(self.chunks):
            buckets.start_gathering()
            if not forward_only:
                buckets.begin_step(num_microbatches // self.run.parallel.num_model_copies)
        # No weight changes within a global batch: in FP8 each is quantized once for all its micro-batches.
        with constant_weights():
            return self.forward_backward(
                forward_step_func=ForwardStep(self._next_batch, self.run.data, loss or self._loss),
                data_iterator=list(batches) if len(batches) > 1 else batches[0],
                model=list(self.chunks) if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=num_microbatches,
                seq_length=training.seq_length,
                micro_batch_size=training.micro_batch_size,
                forward_only=forward_only,
            )

    def reduce_gradients(self, chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, *,
                         force_all_reduce: bool = False, **_groups: Any) -> None:
        """Add up over ranks what main gradients are not added up yet, and divide all by the tokens of the step.

        Args:
            chunks: This rank's stages, wrapped.
            num_tokens: Tokens that this rank's pipeline has counted, int32.
            force_all_reduce: An argument of Megatron-Core's, which no run sets: a rank gets the sums of its shard.
        """
        assert not force_all_reduce, "gradients are reduce-scattered"
        with self.instruments.clock.part("gradient-reduction"):
            finalize_model_grads(chunks, num_tokens, pg_collection=self._groups_of_gradients)
            for buckets in buckets_of(chunks):
                buckets.end_step()
        self.instruments.measure_gradients()

    def _mean_balance_loss(self, balance_loss: float, num_sequences: int) -> float | None:
        """Balance loss before alpha, mean over sequences and over the MoE layers, MTP modules included."""
        training, model = self.run.training, self.run.model
        # An MTP module's layer is of the kind of the main model's last one.
        layers = model.num_moe_layers and model.num_moe_layers + model.mtp_num_layers
        if not training.moe_aux_loss_coeff or not layers:
            return None
        return balance_loss / (training.moe_aux_loss_coeff * num_sequences * layers)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        self.beat("micro-batch")
        batch = next(batches).to(self.device.torch_device, is_non_blocking=True)
        return with_labels_that_count(batch, self.run.data)

    def _loss(self, batch: Batch, losses: TokenLosses) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return sum_losses(batch.loss_mask_BS, losses, mtp_weight=self.phase.training.mtp_loss_scaling_factor,
                          sample_ids_B=batch.sample_ids_B, parts=SequenceParts.of(self.groups))
