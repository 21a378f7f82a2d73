"""A run of GRPO: the training loop of any run, whose steps begin with answers of the model's own.

A rollout is made before the first of the steps that share it, with the weights of the time: answers are generated and
judged, each replica's share of them, and the reference's log-probabilities of their tokens are computed by the layers
that a generation has (generation/scoring.py). It is kept on disk, and a step takes its part of it as packed sequences.
All that the rest of a run has is as it is: layouts, guards, checkpoints, instruments. A run that is resumed between two
steps of a rollout reads this rollout again.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model

from dsv3_megatron.checkpoint.agreement import on_first_rank
from dsv3_megatron.config.recipe import StepPlan
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import Batch, BatchIterator
from dsv3_megatron.data.chat.prompts import ChatPrompts, open_run_prompts
from dsv3_megatron.generation.forward import CachedModel
from dsv3_megatron.generation.scoring import answer_logprobs
from dsv3_megatron.generation.text import TextCodec
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.model.language_model import TokenLosses
from dsv3_megatron.model.stage.buckets import finish_gathering
from dsv3_megatron.post_training.answer_rows import AnswerRows
from dsv3_megatron.post_training.frozen_reference import ReferenceWeights
from dsv3_megatron.post_training.kept import read_rollout, rollout_file, write_rollout
from dsv3_megatron.post_training.objective import REPORTED, ObjectiveSettings, packed_loss
from dsv3_megatron.post_training.rewards import Rewards
from dsv3_megatron.post_training.rollout import Answer, Rollout, require_rollout, with_advantages
from dsv3_megatron.post_training.sampler import Asked, Sampler, gathered
from dsv3_megatron.runs.learner import TakenStep
from dsv3_megatron.runs.trainer import Trainer
from dsv3_megatron.schedule.forward_backward import iterate_chunks


class PolicyTrainer(Trainer):
    """The share of a run of GRPO that one process has.

    Args:
        run: A run with prompts, validated against the number of processes.
    """

    extra_names = REPORTED

    def __init__(self, run: RunConfig) -> None:
        super().__init__(run)
        policy, tokenizer = self.run.policy, self.run.data.tokenizer_model
        assert tokenizer is not None
        self._prompts: ChatPrompts = self.data.train.prompts  # type: ignore[attr-defined]
        self._valid = None if policy.valid_prompts is None else open_run_prompts(self.run, policy.valid_prompts)
        rewards = Rewards.read(policy.reward, policy.reward_timeout_s) if policy.reward else Rewards((), 1.0)
        self.sampler = Sampler(self.run, TextCodec(tokenizer), rewards, self.beat)
        self._settings = ObjectiveSettings(policy.grpo_level, policy.clip_epsilon, policy.kl_coefficient)
        self._rollout: Rollout | None = None
        self._rows: AnswerRows | None = None
        reference = self._reference
        if reference is not None and not reference.num_updates:
            reference.take()
            if self.iteration:
                self.display.message("the checkpoint has no reference: it is the weights as they are now")

    def make_average(self) -> ReferenceWeights | None:
        """The reference, in the place of a moving average; None where the divergence has no weight."""
        if not self.run.policy.kl_coefficient:
            return None
        return ReferenceWeights(self.optimizer, list(self.chunks), self.groups)

    @property
    def _reference(self) -> ReferenceWeights | None:
        assert self.average is None or isinstance(self.average, ReferenceWeights)
        return self.average

    # -- a step ------------------------------------------------------------------------------------

    def take_step(self, plan: StepPlan, iterators: Sequence[BatchIterator], *, iteration: int, first_sample: int
                  ) -> TakenStep:
        """Learn from the next part of a rollout, which is made, or read again, where it is another one's turn.

        Args:
            plan: Settings of the step, whose batch is counted in answers.
            iterators: Iterators over the prompts, which are not read.
            iteration: Number of the step, counted from 1.
            first_sample: Number of the step's first answer, for messages.
        """
        policy, num_answers = self.run.policy, plan.global_batch_size
        if iteration == 1 and self._valid is not None:
            self._validate()
        number, part = divmod(iteration - 1, policy.updates_per_rollout)
        if self._rollout is None or self._rollout.number != number:
            self._rollout = self._next_rollout(number, is_begun=part > 0)
        answers = self._rollout.answers[part * num_answers: (part + 1) * num_answers]
        self._rows = self._pack(answers)
        self.beat("micro-batch")
        step = super().take_step(replace(plan, global_batch_size=self._rows.num_rows), self._iterators(self._rows),
                                 iteration=iteration, first_sample=first_sample)
        return replace(step, extras=step.extras | self._rollout.numbers(policy.group_size))

    def train_step(self) -> tuple[StepReport, int]:
        """One optimizer step, as `Trainer.train_step`; the batch that is reported is that of packed sequences."""
        report, stopped = super().train_step()
        assert self._rows is not None
        return replace(report, batch_size=self._rows.num_rows), stopped

    def _loss(self, batch: Batch, losses: TokenLosses) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return packed_loss(batch, losses, self._settings, mtp_weight=self.phase.training.mtp_loss_scaling_factor)

    # -- rollouts ----------------------------------------------------------------------------------

    def _next_rollout(self, number: int, *, is_begun: bool) -> Rollout:
        """The rollout of some steps: made, or, where its first steps have been taken or it is replayed, read."""
        policy = self.run.policy
        self.watchdog.slow("rollout")
        folder = policy.replay if policy.replay is not None else policy.rollouts
        assert folder is not None
        if policy.replay is not None or is_begun:
            path = rollout_file(folder, number)
            rollout = on_first_rank(lambda: read_rollout(path), str(path))
            require_rollout(
                rollout, group_size=policy.group_size, num_answers=self._num_answers,
                vocab_size=self.run.model.vocab_size, longest=self.run.longest_answer + 1,
                needs_reference=policy.kl_coefficient > 0, tokenizer=self._prompts.tokenizer, place=str(path))
            return rollout
        reference = self._reference
        steps = number * policy.updates_per_rollout
        if reference is not None and policy.reference_interval and steps and not steps % policy.reference_interval:
            reference.take()
        rollout = self._made_rollout(number)
        if self.rank == 0:
            write_rollout(folder, rollout)
        return rollout

    @property
    def _num_answers(self) -> int:
        """Number of answers of a rollout."""
        return self.run.training.global_batch_size * self.run.policy.updates_per_rollout

    def _made_rollout(self, number: int) -> Rollout:
        size, seed = self.run.policy.group_size, self.run.training.seed
        num_groups = self._num_answers // size
        first = number * num_groups
        asked = [Asked(self._prompts.of_group(first + place, seed), first + place, place * size + which)
                 for place in range(num_groups) for which in range(size)]
        answers = with_advantages(self._answers(asked, rollout=number), size)
        rules = tuple(rule.name for rule in self.sampler.rewards.rules)
        return Rollout(number, self._with_reference(answers), rules, self._prompts.tokenizer)

    def _answers(self, asked: Sequence[Asked], *, rollout: int | None) -> list[Answer]:
        """Answers of all replicas, in the order in which they were asked for."""
        finish_gathering(self.chunks)
        stage = unwrap_model(self.chunks[0]).eval()
        replicas, rank = self.groups.dp.size(), self.groups.dp.rank()
        is_judged = self.groups.tp.rank() == 0
        parts = gathered(lambda: self.sampler.answer(stage, asked[rank::replicas], rollout=rollout,
                                                     is_judged=is_judged), self.groups.dp, self.groups.tp)
        return [parts[place % replicas][place // replicas] for place in range(len(asked))]

    def _with_reference(self, answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
        """The answers with the reference's log-probabilities of their tokens, if there is a reference."""
        reference = self._reference
        if reference is None:
            return answers
        replicas, rank = self.groups.dp.size(), self.groups.dp.rank()
        mine = answers[rank::replicas]
        with reference.swapped_in():
            found = answer_logprobs(
                CachedModel(unwrap_model(self.chunks[0]).eval()), [answer.prompt_ids for answer in mine],
                [answer.ids for answer in mine], batch_size=self.run.policy.rollout_batch_size)
        everyone: list[list[np.ndarray]] = [[]] * replicas
        torch.distributed.all_gather_object(everyone, [values.cpu().numpy() for values in found], group=self.groups.dp)
        return tuple(replace(answer, reference_logprobs_T=everyone[place % replicas][place // replicas])
                     for place, answer in enumerate(answers))

    def logprobs(self, answers: Sequence[Answer]) -> list[np.ndarray]:
        """Log-probabilities of the answers' tokens by a training forward with the weights of the time.

        Called by every rank.

        Returns:
            float32 of each answer's tokens, in nats; the same on every rank.
        """
        rows = self._pack(answers)
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            reports = self.run_microbatches(self._iterators(rows), rows.num_rows, forward_only=True,
                                            loss=_report_logprobs)
        mine = {int(row): values for report in reports
                for row, values in zip(report["rows"], report["logprobs"], strict=True)}
        everyone: list[dict[int, np.ndarray]] = [{}] * self.world_size
        torch.distributed.all_gather_object(everyone, mine)
        by_row = {row: values for each in everyone for row, values in each.items()}
        return rows.by_answer([by_row[row] for row in range(len(rows.packing))])

    def _pack(self, answers: Sequence[Answer]) -> AnswerRows:
        def will_do(num_rows: int) -> bool:
            return self.run.parallel.takes_batch(num_rows, self.run.training.micro_batch_size, self.world_size)

        return AnswerRows(answers, self.run.training.seq_length, filling=self._prompts.eod_id, will_do=will_do,
                          num_repeated=1 + self.run.model.mtp_num_layers)

    def _iterators(self, rows: AnswerRows) -> list[BatchIterator]:
        training = replace(self.run.training, global_batch_size=rows.num_rows)
        return iterate_chunks(rows.samples(), training, self.run.parallel, self.groups)

    # -- prompts that are kept apart ---------------------------------------------------------------

    def _validate(self) -> int:
        """Answer the prompts that are kept apart by the likeliest tokens, and report what the answers are worth.

        Returns:
            The number of a signal to stop, else 0.
        """
        if self._valid is None:
            return 0
        self.watchdog.slow("validation")
        asked = [Asked(prompt, number, number) for number, prompt in enumerate(self._valid.prompts)]
        answers = self._answers(asked, rollout=None)
        numbers = {"grpo/reward": statistics.fmean(answer.reward for answer in answers),
                   "grpo/length": statistics.fmean(len(answer.ids) for answer in answers)}
        self.display.message(f"validation at iteration {self.iteration}: reward {numbers['grpo/reward']:.4f}, length "
                             f"{numbers['grpo/length']:.1f} tokens, of {len(answers)} answers")
        if self.writer:
            self.writer.write_answers(self.iteration, numbers)
        return self._agree_to_stop()


def _report_logprobs(batch: Batch, losses: TokenLosses) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """A loss function that reports what each row's labels have as log-probabilities."""
    main_BS = TokenLosses(*losses).main_BS
    report = {"rows": batch.sample_ids_B.tolist(), "logprobs": (-main_BS).float().cpu().numpy()}
    return main_BS.sum(), batch.loss_mask_BS.sum().to(torch.int), report
