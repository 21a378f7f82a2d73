"""Answers with their log-probabilities, their rewards, and their advantages over the other answers to the same prompt.

Legend: T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsv3_megatron.config.fields import ConfigError


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    Attributes:
        line: Number of the prompt's line in its file, counted from 1.
        group: Number of the answer's group in the run; the answers to one prompt of a rollout are a group.
        prompt_ids: Token ids of the prompt.
        ids: Token ids of the answer, the end token among them if there is one.
        is_finished: Whether an end token ended it.
        text: Text of the answer, without its end token.
        logprobs_T: float32, of each token as it was generated, in nats.
        entropy: Entropy of what a token was drawn from, mean over the tokens, in nats.
        rewards: Reward by each rule, before its weight.
        reward: Weighted sum of these.
        advantage: Advantage over the group, in standard deviations; 0 where all of it has one reward.
        reference_logprobs_T: float32, of each token by the reference; None where there is no reference.
    """

    line: int
    group: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    is_finished: bool
    text: str
    logprobs_T: np.ndarray
    entropy: float
    rewards: tuple[float, ...]
    reward: float
    advantage: float = 0.0
    reference_logprobs_T: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.ids)


@dataclass(frozen=True)
class Rollout:
    """The answers of some optimizer steps.

    Attributes:
        number: Number of the rollout in the run, from 0.
        answers: Answers, those of a group behind each other.
        rules: Names of the rules that gave their rewards.
        tokenizer: Fingerprint of the tokenizer.
    """

    number: int
    answers: tuple[Answer, ...]
    rules: tuple[str, ...]
    tokenizer: str

    def numbers(self, group_size: int) -> dict[str, float]:
        """Means over the rollout, by their tags."""
        answers = self.answers
        groups = [answers[first: first + group_size] for first in range(0, len(answers), group_size)]
        num_tokens = sum(len(answer.ids) for answer in answers)
        by_rule = {f"grpo/reward/{rule}": statistics.fmean(answer.rewards[number] for answer in answers)
                   for number, rule in enumerate(self.rules)}
        return {
            "grpo/reward": statistics.fmean(answer.reward for answer in answers), **by_rule,
            "grpo/length": num_tokens / len(answers),
            "grpo/unfinished": statistics.fmean(not answer.is_finished for answer in answers),
            "grpo/entropy": sum(answer.entropy * len(answer.ids) for answer in answers) / num_tokens,
            "grpo/no-signal": statistics.fmean(not any(answer.advantage for answer in group) for group in groups)}


def advantages(rewards: Sequence[float]) -> list[float]:
    """Advantages of the answers of one group: (r - mean) / std, and 0 for all where their rewards are one.

    The standard deviation is that of the group as a sample, with G - 1, as torch's and TRL's.

    Args:
        rewards: Rewards of the group, at least two.

    Source: DeepSeek-V3 report, eq. 28.
    """
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    # Rewards may differ by less than their mean has digits.
    return [(reward - mean) / deviation for reward in rewards] if deviation else [0.0] * len(rewards)


def with_advantages(answers: Sequence[Answer], group_size: int) -> tuple[Answer, ...]:
    """Answers, those of a group behind each other, with their advantages."""
    done: list[Answer] = []
    for first in range(0, len(answers), group_size):
        group = answers[first: first + group_size]
        done += [replace(answer, advantage=value) for answer, value in
                 zip(group, advantages([answer.reward for answer in group]), strict=True)]
    return tuple(done)


def require_rollout(rollout: Rollout, *, group_size: int, num_answers: int, vocab_size: int, longest: int,
                    needs_reference: bool, tokenizer: str, place: str) -> None:
    """Check that a kept rollout can be learnt from by a run.

    Args:
        rollout: The rollout.
        group_size: The run's answers to a prompt.
        num_answers: Answers of the run's rollouts.
        vocab_size: Rows of the model's embedding.
        longest: Most tokens of a prompt with its answer.
        needs_reference: Whether the reference's log-probabilities are read from it.
        tokenizer: Fingerprint of the run's tokenizer.
        place: Name of the rollout in messages.

    Raises:
        ConfigError: another number of answers, another tokenizer, or values that are none; the message says which.
    """
    answers = rollout.answers
    groups = {answer.group for answer in answers}
    if len(answers) != num_answers or len(groups) * group_size != num_answers:
        raise ConfigError(f"{place} has {len(answers)} answers to {len(groups)} prompts, and the run's rollouts have "
                          f"{num_answers} in groups of group_size={group_size}: global_batch_size x updates_per_rollout"
                          " and group_size must be those that it was made with")
    if rollout.tokenizer != tokenizer:
        raise ConfigError(f"{place} was made with another tokenizer; give that one, tokenizer_model")
    for number, answer in enumerate(answers):
        ids = (*answer.prompt_ids, *answer.ids)
        if len(answer) > longest or not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ConfigError(f"{place}, answer {number}: {len(answer)} tokens with ids {min(ids)} to {max(ids)}; a "
                              f"sequence has room for {longest}, and the model has vocab_size={vocab_size}")
        if not (np.isfinite(answer.logprobs_T).all() and np.isfinite(answer.advantage)):
            raise ConfigError(f"{place}, answer {number}: a log-probability or the advantage is no finite number")
        if needs_reference and answer.reference_logprobs_T is None:
            raise ConfigError(f"{place} has no log-probabilities of a reference, and kl_coefficient is not 0; give "
                              "kl_coefficient=0")

