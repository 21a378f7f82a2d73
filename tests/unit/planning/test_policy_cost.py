"""A run of GRPO in hours, and its memory with a reference: through `dsv3 plan`, in JSON and text."""

from __future__ import annotations

import json

import pytest

from dsv3_megatron.commands import plan as command
from dsv3_megatron.config.fine_tuning import policy_tuned
from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.parameters import count_parameters
from dsv3_megatron.metrics.rank_state import checkpoint_bytes, rank_states

GRPO = ("--preset", "dsv3-16b", "--hardware", "h800", "--num-gpus", "64", "--prompts", "p.jsonl", "--reward", "numeric",
        "--tokenizer-model", "t", "--group-size", "16", "--max-new-tokens", "1024",
        "--rollout-batch-size", "1024", "--train-iters", "50")
ANSWERS = ("--global-batch-size", "1024")


def planned(capsys, *flags: str, answers: int = 1024) -> dict:
    assert command.main([*GRPO, "--global-batch-size", str(answers), *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_is_rollout_reference_and_training(capsys) -> None:
    found = planned(capsys, "--rollouts", "r")
    policy = found["policy"]
    assert policy["packed_sequences"] == 320  # 278 would hold them; 64 replicas take so many
    more = planned(capsys, "--rollouts", "r", answers=4096)["policy"]
    # Of 1280 tokens an answer, 254 are of a prompt that its group has once, and once more at 1100 borders.
    assert more["packed_sequences"] == 64 * 18 and 64 * 17 < (4096 * 1026 + (256 + 1100) * 254) / 4097 < 64 * 18
    assert policy["rollout_s"] > policy["reference_s"] > 0
    assert policy["step_time_s"] == pytest.approx(policy["rollout_s"] + policy["reference_s"] + policy["training_s"])
    assert policy["training_s"] == pytest.approx(found["step_time_s"])
    (phase,) = found["phases"]
    assert phase["gpu_hours"] == pytest.approx(50 * policy["step_time_s"] * 64 / 3600)
    assert phase["num_tokens"] == 50 * 1024 * 1280
    shared = planned(capsys, "--rollouts", "r", "--updates-per-rollout", "4")["policy"]
    assert shared["rollout_s"] < policy["rollout_s"]  # its decoding steps have four times the answers
    assert planned(capsys, "--rollouts", "r", "--kl-coefficient", "0")["policy"]["reference_s"] == 0
    replayed = planned(capsys, "--replay", "r")["policy"]
    assert replayed["rollout_s"] == replayed["reference_s"] == 0 and "rollout_devices" not in replayed


def test_text_says_what_is_assumed_and_what_would_be_refused(capsys) -> None:
    assert command.main([*GRPO, *ANSWERS, "--rollouts", "r", "--answer-tokens", "500"]) == 0
    out = capsys.readouterr().out
    for line in ("a step of GRPO: 1024 answers of 500 tokens to prompts of 256", "decoding steps of", "by bytes",
                 "assumed: answers of one length", "refused as it stands: expert_model_parallel_size=8 cannot go with"):
        assert line in out
    assert command.main([*GRPO, *ANSWERS, "--replay", "r"]) == 0
    assert "refused as it stands" not in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "told"), [
    (("--tokens", "1e9"), "--tokens cannot go with --prompts"),
    (("--search",), "--search cannot go with --prompts"),
    (("--answer-tokens", "0"), "--answer-tokens=0 must be at least 1"),
    (("--rollout-gpus", "48"), "rollout-gpus=48 must divide num-gpus=64"),
    (("--prompt-tokens", "4000"), "prompt-tokens + answer-tokens = 5024 must not exceed seq_length=4096"),
])
def test_wrong_input(capsys, flags: tuple[str, ...], told: str) -> None:
    assert command.main([*GRPO, *ANSWERS, "--rollouts", "r", *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_reference_is_kept_like_an_average() -> None:
    """fp32 on the host, shared by those that share the optimizer's state; and in a checkpoint."""
    run = policy_tuned(preset("tiny")).override(prompts="p.jsonl", kl_coefficient=0.0, precision="bf16")
    both = run.override(kl_coefficient=0.04)
    (without,), (beside,) = (rank_states(one, 1, precision="bf16") for one in (run, both))
    assert without.average_bytes == 0 and beside.average_bytes == pytest.approx(
        4 * count_parameters(run.model).total, rel=0.01)
    assert checkpoint_bytes(both) - checkpoint_bytes(run) == 4 * count_parameters(run.model).total
    assert beside.average_bytes == rank_states(preset("tiny").override(ema_decay=0.9, precision="bf16"), 1,
                                               precision="bf16")[0].average_bytes


def test_sft_is_planned_with_the_settings_of_dsv3_sft(capsys) -> None:
    words = ["--preset", "dsv3-16b", "--hardware", "h800", "--num-gpus", "64", "--sft", "--train-iters", "100",
             "--global-batch-size", "512", "--json"]
    assert command.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    (phase,) = found["phases"]
    assert phase["num_steps"] == 100 and phase["num_tokens"] == 100 * 512 * 4096
