"""The training loop, and the one place where every stage of a run meets.

The steps themselves are learner.py's. Batch size, learning rate, lambda, gamma and sequence length of a step follow
from the steps and tokens before it (config/recipe.py); samples, checkpoints, guards' endings and reports belong here.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dsv3_megatron.checkpoint.agreement import on_first_rank
from dsv3_megatron.checkpoint.base_weights import load_base
from dsv3_megatron.checkpoint.folder import (
    TRACKER,
    CheckpointError,
    DamagedCheckpointError,
    RunProgress,
    passed_over,
    saved_iterations,
)
from dsv3_megatron.checkpoint.hf.model_card import Losses
from dsv3_megatron.checkpoint.resume import plan_resumption
from dsv3_megatron.checkpoint.store import load_checkpoint
from dsv3_megatron.checkpoint.text_files import collect_text_files
from dsv3_megatron.config.launches import EXIT_NEXT_LAYOUT
from dsv3_megatron.config.recipe import PlannedPhase, StepPlan
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import BatchIterator
from dsv3_megatron.data.current import CurrentData, open_current_data
from dsv3_megatron.guards.claims import RunClaim
from dsv3_megatron.guards.decisions import EXIT_GUARD
from dsv3_megatron.guards.hang import Watchdog
from dsv3_megatron.guards.keeper import CheckpointKeeper
from dsv3_megatron.guards.step_losses import StepLosses
from dsv3_megatron.metrics.flops import RunSpeed, device_peak_flops, flops_per_token
from dsv3_megatron.metrics.progress import TrainingDisplay
from dsv3_megatron.metrics.run_records import StepReport, last_losses
from dsv3_megatron.metrics.trackers.kinds import start_trackers
from dsv3_megatron.metrics.writer import MetricsWriter
from dsv3_megatron.model.losses import sum_over_ranks
from dsv3_megatron.model.rotary import change_context
from dsv3_megatron.model.stage.buckets import finish_gathering
from dsv3_megatron.parallel.groups import destroy_groups, start_process_group
from dsv3_megatron.platform import prepare
from dsv3_megatron.process.logs import configure_logging
from dsv3_megatron.process.stop import signal_name, stop_calls
from dsv3_megatron.runs.learner import Learner, build_for_training
from dsv3_megatron.runs.validation_report import report_average, report_validation
from dsv3_megatron.schedule.forward_backward import iterate_chunks

logger = logging.getLogger(__name__)


class Trainer(Learner):
    """The share of a training run that one process has.

    Args:
        run: A run validated against the number of processes (torchrun's WORLD_SIZE, 1 without it).
        data: Data to read in place of the run's, in every phase; None: those that its fields name.
    """

    def __init__(self, run: RunConfig, *, data: CurrentData | None = None) -> None:
        self.device = prepare()
        start_process_group(self.device, timeout_s=run.guards.collective_timeout_s)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        configure_logging(self.rank)
        self.claim = RunClaim(run.checkpoint, run.logging.tensorboard_dir)
        self.start = on_first_rank(self.claim.take, "the run's folders")
        # Asked for this start alone: a start from the run's config.json does not ask for it again.
        run = run.override(overwrite_run=False, load=self.start.load or run.checkpoint.load)
        asked, load = run, self.start.load
        self.resumption = on_first_rank(partial(plan_resumption, run, load, self.start.iteration), f"load={load}")
        self._whole_layout = run.parallel
        self.part = self.resumption.part
        self.recipe = self.part.recipe
        super().__init__(build_for_training(self.part.run))
        run = self.run
        self.watchdog = Watchdog(run.guards.hang_timeout_s, folder=run.logging.tensorboard_dir)
        self.text_files = collect_text_files(run) if self.rank == 0 else None
        self.iteration = self.consumed_samples = self.consumed_tokens = 0
        self.keeper = CheckpointKeeper(run.checkpoint, list(self.chunks), self.optimizer, self.groups,
                                       average=self.average, claim=self.claim, run_id=self.start.run,
                                       say=lambda text: self.display.message(text))
        if self.start.load:
            position = self._load(self.start.load, self.start.iteration)
            if position.iteration != self.start.iteration:
                self._plan_again(asked, position.iteration)
            self._go_to(position)
            self.guard.load_state_dict(position.guards)
            self.keeper.loaded(self.start.load, self.iteration)
        elif run.checkpoint.pretrained_checkpoint:
            load_base(run.checkpoint.pretrained_checkpoint, run, list(self.chunks), self.optimizer, self.groups)
        self.stop_signal: int | None = None
        self._left_off = 0  # the signal for which the last validation ended early
        self.step_plan = self._plan_step()
        self.phase = self.step_plan.phase if self.step_plan else self.recipe.phases_to_run[-1]
        self._given_data = data
        self._open_data()
        if self.resumption.position and self.recipe.span_of(self.phase).index == self.resumption.span:
            self.data.check(self.resumption.position, load)
        on_first_rank(self.claim.settle, "the run's folders")
        self._build_reports()
        for note in self.resumption.notes:
            self.display.message(f"resumed at iteration {self.iteration}: {note}")
        if self.step_plan is None:
            self.display.message(f"the run is complete: {self.iteration} of {self.recipe.num_steps} steps")
        if self.phase.index:
            change_context(self.chunks, self.phase.model)

    @property
    def is_complete(self) -> bool:
        """Whether all steps of the run have been taken."""
        return self.step_plan is None and self.part.next_phase is None

    # -- phases ------------------------------------------------------------------------------------

    def _plan_step(self) -> StepPlan | None:
        """What the next step is taken with; None where the run stops."""
        return self.recipe.step(self.iteration, self.consumed_tokens)

    def _go_to(self, position: RunProgress) -> None:
        self.iteration, self.consumed_samples = position.iteration, position.consumed_samples
        self.consumed_tokens = position.consumed_tokens

    def _enter_phase(self, phase: PlannedPhase) -> None:
        """Go on with another phase's context, data and speed; weights and optimizer stay."""
        is_other_data = self.recipe.span_of(phase) != self.recipe.span_of(self.phase)
        self.phase = phase
        self.watchdog.slow("another phase")
        change_context(self.chunks, phase.model)
        if is_other_data:
            self._open_data()
        self._iterate_from_here()
        self.speed = self._speed()
        self.display.change_speed(self.speed)
        if self.writer:
            self.writer.change_speed(self.speed)
        self.display.message(f"phase {phase.name} from iteration {self.iteration + 1}: {phase.summary}")

    def _open_data(self) -> None:
        first_sample = self.resumption.start_of(self.recipe.span_of(self.phase))
        self.data = self._given_data or open_current_data(self.run, self.phase, first_sample)
        self._iterate_from_here()

    @property
    def data_position(self) -> int:
        """The sample that the next step begins with, of all the run's datasets: rollbacks may have jumped over some."""
        return self.consumed_samples + self.guard.jumped_samples

    def _iterate_from_here(self) -> None:
        self.batches = self._iterate(self.data.train, self.data.position(self.data_position))

    def _iterate(self, dataset: Any, consumed_samples: int) -> list[BatchIterator]:
        """An iterator for each chunk."""
        return iterate_chunks(dataset, self.phase.training, self.run.parallel, self.groups,
                              consumed_samples=consumed_samples,
                              eod_id=self.data.eod_id if self.run.data.reset_attention_mask else None)

    def _speed(self) -> RunSpeed:
        seq_length = self.phase.training.seq_length
        return RunSpeed(seq_length, flops_per_token(self.run.model, seq_length), self.world_size,
                        device_peak_flops(self.device.name, self.precision))

    def _build_reports(self) -> None:
        log = self.run.logging
        self.speed = self._speed()
        is_reporter = self.rank == 0
        self.display = TrainingDisplay(self.recipe.num_steps, self.speed, start_iteration=self.iteration,
                                       log_interval=log.log_interval, enabled=is_reporter)
        self.writer = None
        if log.tensorboard_dir:
            self.writer = MetricsWriter(
                log.tensorboard_dir, self.speed, num_layers=self.run.model.num_layers, log_interval=log.log_interval,
                picture_interval=log.picture_interval, resumed_iteration=self.iteration, enabled=is_reporter,
                trackers=start_trackers(log, run_id=self.start.run, run_name=f"{self.run.name} {self.start.run}")
                if is_reporter else ())
            # A start from these settings begins with the layout that the run was asked for.
            asked = replace(self.run, parallel=self._whole_layout)
            self.writer.write_config(asked.as_dict(), environment={
                "precision": self.precision, "world_size": self.world_size, "device": self.device.name})

    def beat(self, doing: str) -> None:
        """Tell the watchdog that the step goes on, and with what."""
        self.watchdog.beat(doing)

    # -- a step ------------------------------------------------------------------------------------

    def train(self) -> int:
        """Train to the end of the run, until a signal asks to stop, or until a guard ends it.

        The first two save what is new since the last checkpoint; after a guard's end that one stays the newest.

        Returns:
            The exit code: 0, EXIT_GUARD, or EXIT_NEXT_LAYOUT where the next phase has another layout.
        """
        with closing(self.claim), stop_calls(self._note_signal):
            return self._train()

    def _train(self) -> int:
        run, interval = self.run, self.run.training.eval_interval
        stopped = 0
        self.watchdog.start()
        self.are_weights_read = False  # but by those who gather them first
        try:
            if run.guards.on_spike == "rollback" and self.keeper.schedule.saved_at is None:
                self.save(is_needed=True)  # to go back to, until the first one of the schedule
            while self.step_plan and not stopped and not self.guard.end_reason:
                report, stopped = self.train_step()
                self.watchdog.beat("reporting")
                with self.instruments.clock.part("logging"):
                    self.display.update(report)
                    if self.writer:
                        self.writer.write_step(report)
                    self.guard_log.flush()
                self.keeper.schedule.note_step(self.iteration, is_applied=not report.skipped)
                self.keeper.look(self.iteration)
                if self.guard.must_roll_back:
                    self._roll_back()
                    continue
                last = self.step_plan is None
                if interval and (last or self.iteration % interval == 0) and not stopped and not self.guard.end_reason:
                    stopped = self._validate()
                ends = last or bool(stopped)
                if ends:
                    self._finish_save()
                if not self.guard.end_reason and self.keeper.wants(self.iteration, is_last=ends):
                    self.save(is_needed=ends)
                    stopped = stopped or self._agree_to_stop()  # it took long, and all of it is saved now
            self._finish_save()
            # One that could not be written before the signal.
            if not self.guard.end_reason and self.keeper.wants(self.iteration, is_last=True):
                self.save(is_needed=True)
            if run.checkpoint.export_hf and self.is_complete and not stopped and not self.guard.end_reason:
                self.watchdog.slow("export")
                losses = Losses(*last_losses(run.logging.tensorboard_dir, self.iteration))
                with stop_calls(None):  # all is saved; an export can be made again
                    self.keeper.export(self.iteration, self.precision, losses)
            finish_gathering(self.chunks)
        finally:
            self.keeper.close()
            self.watchdog.stop()
            self.are_weights_read = True
        if stopped:
            self.display.message(f"stopped by {signal_name(stopped)} after iteration {self.iteration}, "
                                 f"{self.keeper.what_was_saved(self.iteration)}")
        goes_on = (self.part.next_phase is not None and self.step_plan is None and not stopped
                   and not self.guard.end_reason)
        if goes_on:
            assert self.part.next_phase is not None
            self.display.message(f"phase {self.part.next_phase.name} is next, under another layout: the launcher "
                                 "starts the run again; without one, start the same command with --resume auto")
        self.display.close()
        if self.writer:
            self.writer.close()
        self.guard_log.finish(self.guard, run.checkpoint.save)
        destroy_groups()
        return EXIT_GUARD if self.guard.end_reason else EXIT_NEXT_LAYOUT if goes_on else 0

    def train_step(self) -> tuple[StepReport, int]:
        """One optimizer step; there must be one left.

        Returns:
            What it did, and the number of a signal that any rank has received, else 0.
        """
        run, plan = self.run, self.step_plan
        assert plan is not None, "the run has stopped"
        if plan.phase is not self.phase:
            self._enter_phase(plan.phase)
        started = time.perf_counter()
        self.watchdog.begin_step(self.iteration + 1)
        step = self.take_step(plan, self.batches, iteration=self.iteration + 1,
                              first_sample=self.data.position(self.data_position))
        stopped = self._agree_to_stop()
        self.iteration += 1
        self.consumed_samples += plan.global_batch_size
        self.consumed_tokens += plan.num_tokens
        self.step_plan = self._plan_step()
        return StepReport(
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_tokens,
            lm_loss=step.losses.main,
            mtp_losses=step.losses.mtp,
            balance_loss=step.balance_loss,
            grad_norm=step.outcome.grad_norm,
            learning_rate=plan.learning_rate,
            batch_size=plan.global_batch_size,
            step_time_s=time.perf_counter() - started,
            expert_load={row: counts for row, counts in enumerate(step.loads_LE.tolist()) if sum(counts)},
            skipped=not step.outcome.is_applied,
            is_spike=step.outcome.is_spike,
            num_spikes=self.guard.counters.spikes,
            num_rollbacks=self.guard.counters.rollbacks,
            seq_length=plan.phase.training.seq_length,
            mtp_weight=plan.mtp_weight if run.model.mtp_num_layers else None,
            bias_update_rate=plan.bias_update_rate,
            phase=plan.phase.name if run.training.phases else None,
            measurements=step.measurements,
            extras=step.extras,
        ), stopped

    def _agree_to_stop(self) -> int:
        """The number of a signal that any rank has received, else 0; called by every rank at the same points."""
        stop_signal = torch.full((), self.stop_signal or 0, device=self.device.torch_device)
        torch.distributed.all_reduce(stop_signal, op=torch.distributed.ReduceOp.MAX)
        return int(stop_signal)

    def evaluate(self, name: str | None = None) -> StepLosses:
        """Mean losses over the first eval_iters global batches of a validation set; no state changes.

        Batches without a token that counts are left out of the mean. After a signal to stop, the mean is that of the
        batches that are done: at least one.

        Args:
            name: Name of the set; None: the first.
        """
        for chunk in self.chunks:
            chunk.eval()
        batches = self._iterate(self.data.valid if name is None else self.data.validation_sets[name], 0)
        losses: list[StepLosses] = []
        stopped = 0
        while len(losses) < self.run.training.eval_iters and not stopped:
            with torch.no_grad():
                reports = self.run_microbatches(batches, self.phase.training.global_batch_size, forward_only=True)
            tokens, *sums = sum_over_ranks(reports, self.groups, self.device,
                                           num_mtp_layers=self.run.model.mtp_num_layers)
            stopped = self._agree_to_stop()
            losses.append(StepLosses.of_sums(tokens, sums))
        self._left_off = stopped
        return StepLosses.mean(losses)

    def _evaluate_sets(self) -> dict[str, StepLosses]:
        """Mean losses of each validation set, by name; none after a signal to stop."""
        found: dict[str, StepLosses] = {}
        for name in self.data.validation_sets:
            self.watchdog.slow("validation")
            found[name] = self.evaluate(name)
            if self._left_off:
                return {}
        return found

    def _validate(self) -> int:
        """Validate and report; a signal to stop ends it after the global batch at hand, and nothing is reported.

        Returns:
            The number of the signal, else 0.
        """
        if self.data.valid is None:
            return 0
        losses, training = self._evaluate_sets(), self.phase.training
        if self._left_off:
            self.display.message(f"validation at iteration {self.iteration} left off: {signal_name(self._left_off)}")
            return self._left_off
        has_loss = report_validation(self.iteration, losses, self.display, self.writer,
                                     num_sequences=training.eval_iters * training.global_batch_size)
        if has_loss and self.average and self.average.num_updates and self.run.training.eval_ema:
            with self.average.swapped_in():
                losses = self._evaluate_sets()
            report_average(self.iteration, losses, self.display, self.writer)
        return self._left_off

    def save(self, *, is_needed: bool) -> None:
        """Write a checkpoint of this moment; of one that cannot be written it is only said, unless it is needed."""
        self.watchdog.slow("checkpoint")
        position = RunProgress(self.iteration, self.consumed_samples, self.consumed_tokens, self.guard.state_dict(),
                               self.resumption.schedules_at(self.iteration),
                               self.data.state_dict(self.data_position))
        made_by = replace(self.run.in_phase(self.recipe.phase_before(self.consumed_tokens)), parallel=self.run.parallel)
        self.keeper.save(position, made_by, self.text_files, is_needed=is_needed)

    def _finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        self.watchdog.slow("checkpoint")
        self.keeper.finish(self.iteration)

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, and on with the samples after the flagged step's; noted in it at once."""
        self._finish_save()
        source, next_sample = self.keeper.newest_in, self.data_position
        assert source is not None
        self.watchdog.slow("rollback")
        position = self._load(source)
        self._go_to(position)
        self.keeper.loaded(source, self.iteration)
        self.guard.rolled_back(position.guards, first_sample=self.data_position, next_sample=next_sample)
        self.step_plan = self._plan_step()
        assert self.step_plan is not None, "a step was taken from here"
        if self.step_plan.phase is not self.phase:
            self._enter_phase(self.step_plan.phase)
        self._iterate_from_here()
        self.display.close()
        if self.writer:
            self.writer.close()
        self._build_reports()
        self.display.message(f"rolled back to iteration {self.iteration}; the next sample is {next_sample}")
        self.keeper.note_rollback(self.iteration, self.guard.state_dict())

    def _load(self, source: str, iteration: int | None = None) -> RunProgress:
        """Load a checkpoint, the newest or that of an iteration; in place of a damaged one, the sound one before it.

        Raises:
            CheckpointError: there is none that is sound.
        """
        first: DamagedCheckpointError | None = None
        while True:
            try:
                return load_checkpoint(source, self.run, self.chunks, self.optimizer, self.groups,
                                       average=self.average, iteration=iteration)
            except DamagedCheckpointError as error:
                first, damage = first or error, error
            earlier = on_first_rank(lambda at=damage.iteration: [  # type: ignore[misc]
                number for number in saved_iterations(source) if number < at], f"load={source}")
            if not earlier:
                raise first
            iteration = earlier[-1]
            if self.rank == 0:
                logger.warning("%s", passed_over(source, damage, iteration))

    def _plan_again(self, asked: RunConfig, iteration: int) -> None:
        """Place the run at an earlier checkpoint than the one it was to go on from."""
        load, before = self.start.load, self.part.run
        self.resumption = on_first_rank(partial(plan_resumption, asked, load, iteration), f"load={load}")
        self.part = self.resumption.part
        self.recipe = self.part.recipe
        if self.part.run != before:
            raise CheckpointError(f"load={load}: the newest checkpoint is damaged, and from that of iteration "
                                  f"{iteration} this run would go on by other settings; write {iteration} into "
                                  f"{load}/{TRACKER}, and start it again")

    def _note_signal(self, number: int) -> None:
        """Finish the step, or the batch of a validation, first: every rank learns of the signal with its losses."""
        self.stop_signal = number
