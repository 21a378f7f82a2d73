"""The training loop, and the one place where every stage of a run meets.

A step is: micro-batches through the pipeline by its schedule, gradients reduced and divided by the
number of tokens, one optimizer step, one update of the routers' biases. The loss of a step is the mean
over its tokens: main loss + lambda / D * sum of the MTP losses (each summed over the positions that have
a target and divided by all positions, as in the report) + the balance losses, mean over sequences.

Every pipeline stage reads the batch itself, so each knows where its documents end, if they are isolated: attention and
the MTP modules treat a document as a sequence. Balance losses stay per sequence and expert loads per step: the router
sees tokens, not documents.

Shapes: B micro-batch, S sequence, L layers with MTP modules, E experts.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.checkpoint.hf.export import export_run
from dsv3_megatron.checkpoint.layout import Progress as Position
from dsv3_megatron.checkpoint.store import load_checkpoint, save_checkpoint
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import Batch, BatchIterator
from dsv3_megatron.data.datasets import build_datasets, dataset_config
from dsv3_megatron.guards.decisions import EXIT_GUARD, Guard, require_room
from dsv3_megatron.guards.events import EventLog
from dsv3_megatron.guards.hang import Watchdog
from dsv3_megatron.guards.spikes import LOSS
from dsv3_megatron.guards.step import StepFacts, guarded_step
from dsv3_megatron.metrics.flops import RunSpeed, device_peak_flops, flops_per_token
from dsv3_megatron.metrics.instruments import Instruments
from dsv3_megatron.metrics.progress import Progress
from dsv3_megatron.metrics.records import StepReport
from dsv3_megatron.metrics.writer import MetricsWriter
from dsv3_megatron.model.build import build_stages, wrap_stages
from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.ops.fp8_weights import constant_weights
from dsv3_megatron.optim.build import build_optimizer, set_learning_rate
from dsv3_megatron.optim.lr import learning_rate
from dsv3_megatron.optim.router_bias import collect_expert_loads, update_router_biases
from dsv3_megatron.parallel.groups import create_groups, destroy_groups, groups_of_tokens, replicas, start_process_group
from dsv3_megatron.platform import Device, prepare, resolve_precision
from dsv3_megatron.schedule.forward_backward import ForwardStep, build_forward_backward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepLosses:
    """Mean losses of a step or a validation over all ranks, nats per token."""

    main: float
    mtp: tuple[float, ...]

    def by_name(self, balance_loss: float | None) -> dict[str, float]:
        """With the balance loss, all losses of a step by the names they are logged under."""
        named = {LOSS: self.main} | {f"mtp_{depth} loss": loss for depth, loss in enumerate(self.mtp, start=1)}
        return named if balance_loss is None else named | {"balance loss": balance_loss}


class Trainer:
    """One process's share of a training run.

    Args:
        run: A run validated against the number of processes (torchrun's WORLD_SIZE, 1 without it).
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.device = prepare()
        start_process_group(self.device)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        configure_logging(self.rank)
        self.precision = resolve_precision(run.training.precision, self.device)
        self.groups = create_groups(run.parallel, run.training.seed)
        stages, self.mcore_config = build_stages(run, self.groups, precision=self.precision)
        self.chunks = wrap_stages(stages, self.mcore_config, self.groups)
        self.optimizer = build_optimizer(run.training, list(self.chunks), self.groups, precision=self.precision)
        self.instruments = Instruments(run, self.chunks, self.optimizer, self.groups, self.device)
        self.mcore_config.finalize_model_grads_func = self.instruments.around_reduction(
            partial(finalize_model_grads, pg_collection=groups_of_tokens(self.groups)))
        # No weight changes within a global batch: in FP8 each is quantized once for all its micro-batches.
        self.forward_backward = constant_weights()(build_forward_backward(
            run.parallel, self.groups, self.mcore_config, trace=run.logging.trace_schedule))
        self.guard = Guard(run.guards)
        self.guard_log = EventLog(run.logging.tensorboard_dir, enabled=self.rank == 0)
        self.watchdog = Watchdog(run.guards.hang_timeout_s, folder=run.logging.tensorboard_dir)
        self.iteration = self.consumed_samples = 0
        if run.checkpoint.load:
            position = load_checkpoint(run.checkpoint.load, run, self.chunks, self.optimizer, self.groups)
            self.iteration, self.consumed_samples = position.iteration, position.consumed_samples
            self.guard.load_state_dict(position.guards)
        self.stop_signal: int | None = None
        self._build_data()
        self._build_reports()

    def _build_data(self) -> None:
        config = dataset_config(self.run)
        self.eod_id = config.eod_id
        self.data = build_datasets(config)
        self.batches = self._iterate(self.data.train, self.data_position)

    @property
    def data_position(self) -> int:
        """The dataset's sample that the next step begins with: rollbacks may have jumped over some before it."""
        return self.consumed_samples + self.guard.jumped_samples

    def _iterate(self, dataset: Any, consumed_samples: int) -> list[BatchIterator]:
        """An iterator for each chunk."""
        training = self.run.training
        return [BatchIterator(
            dataset, micro_batch_size=training.micro_batch_size, global_batch_size=training.global_batch_size,
            data_parallel_rank=rank, data_parallel_size=size, consumed_samples=consumed_samples,
            eod_id=self.eod_id if self.run.data.reset_attention_mask else None)
            for rank, size in replicas(self.run.parallel, self.groups)]

    def _build_reports(self) -> None:
        training, log = self.run.training, self.run.logging
        self.speed = RunSpeed(
            training.seq_length, flops_per_token(self.run.model, training.seq_length), self.world_size,
            device_peak_flops(self.device.name, self.precision))
        is_reporter = self.rank == 0
        self.progress = Progress(training.train_iters, self.speed, start_iteration=self.iteration,
                                 log_interval=log.log_interval, enabled=is_reporter)
        self.writer = None
        if log.tensorboard_dir:
            self.writer = MetricsWriter(
                log.tensorboard_dir, self.speed, num_layers=self.run.model.num_layers, log_interval=log.log_interval,
                picture_interval=log.picture_interval, resumed_iteration=self.iteration, enabled=is_reporter)
            self.writer.write_config(self.run.as_dict(), environment={
                "precision": self.precision, "world_size": self.world_size, "device": self.device.name})

    # -- a step ------------------------------------------------------------------------------------

    def train(self) -> int:
        """Train to the end of the run, until SIGINT or SIGTERM, or until a guard ends it; save in any case.

        After a spike that the run should have been able to go back from, the last checkpoint stays the newest.

        Returns:
            The exit code: 0, or EXIT_GUARD.
        """
        run, training = self.run, self.run.training
        previous = {sig: signal.signal(sig, self._note_signal) for sig in (signal.SIGINT, signal.SIGTERM)}
        stopped = 0
        saved_at = self.iteration if run.checkpoint.load else -1
        self.watchdog.start()
        try:
            if run.guards.on_spike == "rollback" and (saved_at < 1 or run.checkpoint.load != run.checkpoint.save):
                self.save()  # to go back to, until the first one of the schedule
                saved_at = self.iteration
            while self.iteration < training.train_iters and not stopped and not self.guard.end_reason:
                report, stopped = self.train_step()
                self.watchdog.beat("reporting")
                with self.instruments.clock.phase("logging"):
                    self.progress.update(report)
                    if self.writer:
                        self.writer.write_step(report)
                if self.guard.must_roll_back:
                    self._roll_back()
                    saved_at = self.iteration
                    continue
                last = self.iteration == training.train_iters
                if training.eval_interval and (last or self.iteration % training.eval_interval == 0) \
                        and not stopped and not self.guard.end_reason:
                    self._validate()
                if run.checkpoint.save and (last or stopped or self.iteration % run.checkpoint.save_interval == 0) \
                        and self.guard.is_state_good:
                    self.save()
                    saved_at = self.iteration
            if run.checkpoint.save and saved_at != self.iteration and self.guard.is_state_good:
                self.save()
            if run.checkpoint.export_hf and self.iteration >= training.train_iters and not stopped \
                    and not self.guard.end_reason:
                self.watchdog.slow("export")
                folder = export_run(run, self.iteration, precision=self.precision)
                self.progress.message(f"exported for Hugging Face: {folder}")
        finally:
            self.watchdog.stop()
            for sig, handler in previous.items():
                signal.signal(sig, handler)
        if stopped:
            saved = "with a checkpoint" if run.checkpoint.save else "without a checkpoint: save is not set"
            name = signal.Signals(stopped).name
            self.progress.message(f"stopped by {name} after iteration {self.iteration}, {saved}")
        self.progress.close()
        if self.writer:
            self.writer.close()
        if self.guard.end_reason:
            self.guard_log.write_end(self.guard, run.checkpoint.save)
        destroy_groups()
        return EXIT_GUARD if self.guard.end_reason else 0

    def train_step(self) -> tuple[StepReport, int]:
        """One optimizer step.

        Returns:
            What it did, and the number of a signal that any rank has received, else 0.
        """
        run, training = self.run, self.run.training
        started, clock = time.perf_counter(), self.instruments.clock
        self.watchdog.begin_step(self.iteration + 1)
        self.instruments.begin_step(self.iteration + 1)
        with clock.phase("forward-backward"):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            rate = learning_rate(training, self.iteration)
            set_learning_rate(self.optimizer, rate)
            samples = range(self.data_position, self.data_position + training.global_batch_size)
            losses, collected, stopped = self._run_microbatches(
                [clock.waiting(batches, "data") for batches in self.batches], forward_only=False)
        with clock.phase("router-bias"):
            loads_LE, balance_L = collect_expert_loads(
                self.chunks, num_layers=run.model.num_layers, num_mtp_layers=run.model.mtp_num_layers,
                num_experts=run.model.num_experts, device=self.device.torch_device)
        self.watchdog.beat("optimizer")
        with clock.phase("optimizer"):
            balance_loss = self._mean_balance_loss(balance_L)
            outcome = guarded_step(
                self.guard, self.guard_log, self.optimizer, self.chunks, self.groups,
                StepFacts(self.iteration + 1, losses.by_name(balance_loss), samples, collected))
        with clock.phase("router-bias"):
            if outcome.is_applied:
                update_router_biases(self.chunks, loads_LE, num_layers=run.model.num_layers,
                                     update_rate=training.moe_router_bias_update_rate)
        with clock.phase("logging"):
            measurements = self.instruments.end_step()
        self.iteration += 1
        self.consumed_samples += training.global_batch_size
        return StepReport(
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_samples * training.seq_length,
            lm_loss=losses.main,
            mtp_losses=losses.mtp,
            balance_loss=balance_loss,
            grad_norm=outcome.grad_norm,
            learning_rate=rate,
            batch_size=training.global_batch_size,
            step_time_s=time.perf_counter() - started,
            expert_load={row: counts for row, counts in enumerate(loads_LE.tolist()) if sum(counts)},
            skipped=not outcome.is_applied,
            is_spike=outcome.is_spike,
            num_spikes=self.guard.counters.spikes,
            num_rollbacks=self.guard.counters.rollbacks,
            mtp_weight=training.mtp_loss_scaling_factor if run.model.mtp_num_layers else None,
            bias_update_rate=training.moe_router_bias_update_rate,
            measurements=measurements,
        ), stopped

    def _mean_balance_loss(self, balance_L: torch.Tensor) -> float | None:
        """Balance loss before alpha, mean over sequences and over the MoE layers, MTP modules included."""
        training, model = self.run.training, self.run.model
        layers = model.num_moe_layers + model.mtp_num_layers
        if not training.moe_aux_loss_coeff or not layers:
            return None
        return float(balance_L.sum()) / (training.moe_aux_loss_coeff * training.global_batch_size * layers)

    def _run_microbatches(self, batches: Sequence[Iterator[Batch]], *, forward_only: bool
                          ) -> tuple[StepLosses, list[dict[str, Any]], int]:
        """One global batch through the pipeline; mean losses, this rank's reports of it and any rank's signal."""
        training = self.run.training
        collected = self.forward_backward(
            forward_step_func=ForwardStep(self._next_batch, self.run.data, self._loss),
            data_iterator=list(batches) if len(batches) > 1 else batches[0],
            model=list(self.chunks) if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=training.num_microbatches(self.groups.dp.size()),
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=forward_only,
        )
        tokens, *sums = sum_over_ranks(collected, self.groups, self.device,
                                       num_mtp_layers=self.run.model.mtp_num_layers)
        stop_signal = torch.tensor(self.stop_signal or 0, device=self.device.torch_device)
        torch.distributed.all_reduce(stop_signal, op=torch.distributed.ReduceOp.MAX)
        main, *mtp = (value / tokens for value in sums)
        return StepLosses(main, tuple(mtp)), collected, int(stop_signal)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        self.watchdog.beat("micro-batch")
        return next(batches).to(self.device.torch_device, is_non_blocking=True)

    def _loss(self, batch: Batch, losses: TokenLosses) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return sum_losses(batch.loss_mask_BS, losses, mtp_weight=self.mcore_config.mtp_loss_scaling_factor,
                          sample_ids_B=batch.sample_ids_B)

    def evaluate(self) -> StepLosses:
        """Mean losses over the first eval_iters global batches of the validation data; no state changes."""
        for chunk in self.chunks:
            chunk.eval()
        batches = self._iterate(self.data.valid, 0)
        losses = []
        for _ in range(self.run.training.eval_iters):
            with torch.no_grad():
                losses.append(self._run_microbatches(batches, forward_only=True)[0])
        count = len(losses)
        return StepLosses(sum(loss.main for loss in losses) / count,
                          tuple(sum(column) / count for column in zip(*(loss.mtp for loss in losses), strict=True)))

    def _validate(self) -> None:
        if self.data.valid is None:
            return
        self.watchdog.slow("validation")
        losses = self.evaluate()
        self.progress.validation(self.iteration, losses.main, mtp_losses=losses.mtp)
        if self.writer:
            self.writer.write_validation(self.iteration, losses.main, mtp_losses=losses.mtp)

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        checkpoint = self.run.checkpoint
        assert checkpoint.save is not None
        self.watchdog.slow("checkpoint")
        position = Position(self.iteration, self.consumed_samples,
                            self.consumed_samples * self.run.training.seq_length, self.guard.state_dict())
        save_checkpoint(checkpoint.save, position, self.run, self.chunks, self.optimizer, self.groups,
                        keep_last=checkpoint.keep_last)
        self.progress.message(f"checkpoint saved: {os.path.join(checkpoint.save, f'iter_{self.iteration:07d}')}")

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, and on with the samples after the flagged step's; saved at once.

        Raises:
            ConfigError: the dataset has not as many samples left as the run still needs.
        """
        save, next_sample = self.run.checkpoint.save, self.data_position
        assert save is not None
        self.watchdog.slow("rollback")
        position = load_checkpoint(save, self.run, self.chunks, self.optimizer, self.groups)
        training = self.run.training
        require_room(next_sample - position.consumed_samples, num_available=len(self.data.train),
                     num_needed=training.train_iters * training.global_batch_size)
        self.iteration, self.consumed_samples = position.iteration, position.consumed_samples
        self.guard.rolled_back(position.guards, first_sample=self.data_position, next_sample=next_sample)
        for batches in self.batches:
            batches.set_consumed_samples(self.data_position)
        self.progress.close()
        if self.writer:
            self.writer.close()
        self._build_reports()
        self.progress.message(f"rolled back to iteration {self.iteration}; the next sample is {next_sample}")
        self.save()

    def _note_signal(self, number: int, _frame: Any) -> None:
        """Finish the step first: every rank learns of the signal with the step's losses."""
        self.stop_signal = number


def sum_losses(loss_mask_BS: torch.Tensor, losses: TokenLosses, *, mtp_weight: float,
               sample_ids_B: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """A micro-batch's loss, summed over its tokens.

    Args:
        loss_mask_BS: 1 where the next token counts; 0 at an EOD with eod_mask_loss.
        losses: Of each position. An MTP loss is 0 already where the sequence, or an isolated document, ends first.
        mtp_weight: lambda.
        sample_ids_B: Reported with the sums, to say where a loss that is not finite came from.

    Returns:
        The sum to differentiate; the number of tokens to divide by, int32; and the sums to report, fp64:
        tokens, main loss, MTP losses by depth, each before its weight.

    Source: DeepSeek-V3 report, eq. 24-25; an MTP target counts where the token it stands for counts: at position i of
    depth k, where loss_mask[i + k] is 1. So with isolated documents of n tokens with their EOD, depth k has n - k
    targets, of which the last is the first token of the next document, which the main loss predicts from the EOD; with
    eod_mask_loss neither does, and there are n - k - 1.
    """
    losses = TokenLosses(*losses)  # the bf16 wrapper rebuilds tuples without their names
    tokens = loss_mask_BS.sum()
    main = (losses.main_BS * loss_mask_BS).sum()
    mtp = []
    for depth, losses_BS in enumerate(losses.mtp_BS, start=1):
        target_mask_BS = torch.nn.functional.pad(loss_mask_BS[:, depth:], (0, depth))
        mtp.append((losses_BS * target_mask_BS).sum())
    total = main + (mtp_weight / len(mtp) * torch.stack(mtp).sum() if mtp else 0.0)
    sums = torch.stack([tokens, main.detach(), *(loss.detach() for loss in mtp)]).double()
    return total, tokens.to(torch.int), {"sums": sums, "sample_ids": sample_ids_B}


def sum_over_ranks(collected: list[dict[str, Any]], groups: ProcessGroupCollection, device: Device, *,
                   num_mtp_layers: int) -> list[float]:
    """The sums that `sum_losses` reported, over micro-batches and replicas; the same on every rank, all of which call.

    Args:
        collected: This rank's reports; none but on the last pipeline stage.
        groups: The run's process groups; tensor-parallel ranks report the same numbers.
        device: Of this process.
        num_mtp_layers: MTP losses in a report.
    """
    sums = torch.zeros(2 + num_mtp_layers, dtype=torch.float64, device=device.torch_device)
    if groups.tp.rank() == 0:
        for report in collected:
            sums += report["sums"]
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def configure_logging(rank: int) -> None:
    """Rank 0 says what was chosen; the others only warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dsv3_megatron").setLevel(logging.INFO if rank == 0 else logging.WARNING)
