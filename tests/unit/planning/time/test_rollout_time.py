"""Rollouts by bytes and operations: the papers' own figures, limits of small and large batches, and wrong input."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.fine_tuning import policy_tuned
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.time.rollout_time import (
    AnswerLengths,
    forward_share,
    packed_sequences,
    rollout_time,
    smallest_copy,
)
from dsv3_megatron.planning.time.work import Setting
from dsv3_megatron.post_training.answer_rows import AnswerRows
from tests.unit.post_training.test_rollout import answer

H800 = find_hardware("h800")
LENGTHS = AnswerLengths(200.0, 400.0)


def run(**changes):
    given = {"prompts": "p.jsonl", "reward": ("numeric",), "rollouts": "kept", "global_batch_size": 64,
             "group_size": 8, "rollout_batch_size": 4096, "precision": "bf16"}
    return policy_tuned(preset("dsv3-671b").override(fp8="none")).override(**given | changes)


def test_a_token_of_one_answer_reads_what_it_activates_and_its_cache() -> None:
    """37B active parameters (report, section 1), and 70,272 bytes of cache a token (Insights, table 1)."""
    one = run(global_batch_size=1, group_size=1)
    short, long = (rollout_time(one, Setting(H800, 1), AnswerLengths(length, 1e-9), 1) for length in (0.0, 1000.0))
    assert short.step_bytes / 2 == pytest.approx(36.6e9, rel=0.01)  # without the embedding table, which is looked up
    assert long.step_bytes - short.step_bytes == pytest.approx(1000 * 70_272, rel=1e-4)
    assert long.compute_seconds < long.bandwidth_seconds


def test_seconds_are_bytes_over_the_bandwidth_as_long_as_that_is_longer() -> None:
    found = rollout_time(run(), Setting(H800, 64), LENGTHS, 64)
    assert found.num_steps == 400 and found.answers_at_once == 64
    assert found.bandwidth_seconds == pytest.approx(400 * found.step_bytes / 3.35e12)
    assert found.seconds == found.bandwidth_seconds + found.prompt_seconds
    # With enough answers every expert is read, and the rest is caches: then operations decide.
    many = rollout_time(run(global_batch_size=2**20, rollout_batch_size=2**20), Setting(H800, 64), LENGTHS, 64)
    assert many.compute_seconds > 0.2 * many.bandwidth_seconds
    assert many.seconds < 2**14 / 4 * found.seconds


def test_operations_are_those_of_the_forward_pass() -> None:
    """A third of training's, without attention, whose absorbed form does others."""
    model = run().model
    found = rollout_time(run(), Setting(H800, 64), AnswerLengths(100.0, 1.0), 64)
    forward = flops_per_token(model, 1).main / 3
    rate = H800["bf16_flops"] * H800["bf16_best_share"]
    assert found.prompt_seconds == pytest.approx(64 / 8 * 100 * forward / 64 / rate, rel=0.01)  # groups of 8


def test_drafts_make_fewer_steps_of_more_bytes() -> None:
    plain = rollout_time(run(), Setting(H800, 64), LENGTHS, 64)
    drafts = rollout_time(run(rollout_speculative="mtp"), Setting(H800, 64), LENGTHS, 64)
    assert drafts.num_steps == pytest.approx(plain.num_steps / 1.85)
    assert plain.step_bytes < drafts.step_bytes < 2 * plain.step_bytes and drafts.seconds < plain.seconds


def test_answers_that_are_too_many_at_once_come_one_batch_after_the_other() -> None:
    whole = rollout_time(run(), Setting(H800, 64), LENGTHS, 64)
    cut = rollout_time(run(rollout_batch_size=16), Setting(H800, 64), LENGTHS, 64)
    assert cut.num_steps == 4 * whole.num_steps and cut.answers_at_once == 16


def test_a_copy_leaves_half_of_the_memory() -> None:
    """34 GB are whole on each device, and 1.3 TB of experts spread: of 128 devices one has 44 GB, of 256 39 of 80."""
    assert smallest_copy(run(), Setting(H800, 2048)) == 256
    with pytest.raises(ConfigError, match="num-gpus=8 hold no copy of the model to generate with"):
        smallest_copy(run(), Setting(H800, 8))
    with pytest.raises(ConfigError, match="rollout-gpus=48 must divide num-gpus=64"):
        rollout_time(run(), Setting(H800, 64), LENGTHS, 48)


def test_answers_are_packed_into_what_the_layout_can_take() -> None:
    one = run(seq_length=1000, global_batch_size=640, group_size=1, pipeline_model_parallel_size=1,
              expert_model_parallel_size=1)
    assert packed_sequences(one, AnswerLengths(2.0, 598.0), 1) == 384  # 640 x 600 tokens
    assert packed_sequences(one, AnswerLengths(2.0, 598.0), 5) == 385
    with pytest.raises(ConfigError, match="= 600 must not exceed seq_length=500"):
        packed_sequences(one.override(seq_length=500), LENGTHS, 1)


@pytest.mark.parametrize(("prompt", "longest", "group_size"),
                         [(200, 400, 8), (400, 100, 16), (11, 300, 8), (300, 60, 1)])
def test_groups_share_their_prompts_as_the_trainer_packs_them(prompt: int, longest: int, group_size: int) -> None:
    """Against the sequences that training makes of answers of many lengths."""
    rng = np.random.default_rng(prompt)
    lengths = rng.integers(10, longest, size=256)
    answers = [answer(number // group_size, 0.0, (1,) * int(length), prompt_ids=(number // group_size,) * prompt)
               for number, length in enumerate(lengths)]
    one = run(seq_length=2000, global_batch_size=256, group_size=group_size, pipeline_model_parallel_size=1,
              expert_model_parallel_size=1)
    rows = AnswerRows(answers, 2000, filling=0, will_do=lambda _: True, num_repeated=1 + one.model.mtp_num_layers)
    planned = packed_sequences(one, AnswerLengths(float(prompt), float(lengths.mean())), 1)
    assert planned == pytest.approx(rows.num_rows, rel=0.1)


def test_a_forward_pass_is_about_a_third_of_a_step() -> None:
    one = preset("dsv3-16b").override(global_batch_size=64)
    assert 0.25 < forward_share(one, Setting(H800, 64)) < 0.4
