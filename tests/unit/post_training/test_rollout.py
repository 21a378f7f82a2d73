"""Advantages of a group, what a rollout says of itself, and what of a kept one is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.post_training.rollout import Answer, Rollout, advantages, require_rollout, with_advantages


def answer(group: int, reward: float, ids: tuple[int, ...] = (5, 1), **changes: Any) -> Answer:
    logprobs_T = np.linspace(-1, -0.5, len(ids), dtype=np.float32)
    made = Answer(group + 1, group, (0, 2, 7, 3), ids, True, "5", logprobs_T, 0.5, (reward,), reward,
                  reference_logprobs_T=logprobs_T - 0.1)
    return dataclasses.replace(made, **changes)


def test_advantages_are_those_of_torch() -> None:
    rewards = [0.0, 1.0, 0.25, 1.0]
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / values.std()
    assert advantages(rewards) == pytest.approx(expected.tolist(), rel=1e-14)


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.1] * 7, [1e16, 1e16 + 2e-3]])
def test_a_group_of_one_reward_has_no_advantage(rewards: list[float]) -> None:
    assert advantages(rewards) == [0.0] * len(rewards)


def test_the_numbers_of_a_rollout() -> None:
    answers = with_advantages([answer(0, 1.0), answer(0, 0.0, (5, 6, 8), is_finished=False), answer(1, 1.0),
                               answer(1, 1.0, entropy=1.4)], 2)
    assert [each.advantage for each in answers] == pytest.approx([2 ** -0.5, -2 ** -0.5, 0, 0])
    numbers = Rollout(0, answers, ("numeric",), "t").numbers(2)
    assert numbers == pytest.approx({
        "grpo/reward": 0.75, "grpo/reward/numeric": 0.75, "grpo/length": 2.25, "grpo/unfinished": 0.25,
        "grpo/entropy": (0.5 * 7 + 1.4 * 2) / 9, "grpo/no-signal": 0.5})


@pytest.mark.parametrize(("changes", "asked", "told"), [
    ({}, {"num_answers": 6}, "rollout has 4 answers to 2 prompts, and the run's rollouts have 6 in groups of "
                             "group_size=2"),
    ({}, {"group_size": 4}, "in groups of group_size=4"),
    ({}, {"tokenizer": "another"}, "made with another tokenizer"),
    ({}, {"vocab_size": 7}, "answer 0: 6 tokens with ids 0 to 7; a sequence has room for 9"),
    ({}, {"longest": 5}, "answer 0: 6 tokens"),
    ({"logprobs_T": np.array([np.nan, 0], np.float32)}, {}, "answer 0: a log-probability or the advantage is no"),
    ({"reference_logprobs_T": None}, {}, "no log-probabilities of a reference, and kl_coefficient is not 0"),
])
def test_a_kept_rollout_that_does_not_fit_the_run(changes: dict, asked: dict, told: str) -> None:
    answers = (answer(0, 1.0, **changes), answer(0, 0.0), answer(1, 1.0), answer(1, 0.0))
    settings = {"group_size": 2, "num_answers": 4, "vocab_size": 24, "longest": 9, "needs_reference": True,
                "tokenizer": "t", "place": "rollout"} | asked
    with pytest.raises(ConfigError, match=told):
        require_rollout(Rollout(0, answers, ("numeric",), "t"), **settings)
    require_rollout(Rollout(0, tuple(answer(place // 2, 1.0) for place in range(4)), (), "t"), **{
        **settings, "group_size": 2, "num_answers": 4, "vocab_size": 24, "longest": 9, "tokenizer": "t"})
