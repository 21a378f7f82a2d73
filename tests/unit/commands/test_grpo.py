"""`dsv3 grpo`: the base model's architecture, our settings, and errors before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_megatron.commands.grpo import main, parse
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from tests.unit.commands.test_sft import base

__all__ = ["base"]  # a fixture


def test_the_run_has_the_base_models_architecture(base: str) -> None:
    run = parse(["--pretrained-checkpoint", base, "--prompts", "p.jsonl", "--reward", "1", "numeric", "0.5", "format",
                  "--rollouts", "kept", "--tokenizer-model", "tok", "--max-new-tokens", "8"]).run
    assert run.model == preset("tiny").override(num_layers=6).model and run.data.sft
    assert (run.training.seq_length, run.training.precision, run.training.global_batch_size) == (16, "bf16", 64)
    assert run.policy.reward == ("1", "numeric", "0.5", "format") and run.training.train_iters == 100
    run.validate(1)


def test_without_prompts_there_is_nothing_to_do() -> None:
    with pytest.raises(ConfigError, match="prompts is not set"):
        parse(["--preset", "tiny"])


def test_a_wrong_setting_and_a_base_of_another_architecture_are_told(
        base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.digit_tokenizer import write_digit_tokenizer, write_sums

    given = ["--pretrained-checkpoint", base, "--prompts", write_sums(tmp_path / "p.jsonl"), "--reward", "numeric",
             "--rollouts", str(tmp_path / "kept"), "--tokenizer-model", write_digit_tokenizer(tmp_path / "tok"),
             "--max-new-tokens", "8", "--check-only"]
    assert main([*given, "--group-size", "7"]) == 2
    assert "group_size=7 must divide global_batch_size=64" in capsys.readouterr().err
    assert main([*given, "--num-layers", "5"]) == 2
    assert "num_layers" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_answers_share_a_sequence_that_is_longer_than_the_context(
        base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positions restart in each, so that a prompt with its answer is what must fit."""
    from tests.digit_tokenizer import write_digit_tokenizer, write_sums

    given = ["--pretrained-checkpoint", base, "--prompts", write_sums(tmp_path / "p.jsonl"), "--reward", "numeric",
             "--rollouts", str(tmp_path / "kept"), "--tokenizer-model", write_digit_tokenizer(tmp_path / "tok"),
             "--max-position-embeddings", "24", "--original-max-position-embeddings", "24"]
    run = parse([*given, "--seq-length", "96", "--max-new-tokens", "8"]).run
    run.validate(1)
    assert run.longest_answer == 24
    assert main([*given, "--seq-length", "96", "--max-new-tokens", "23", "--check-only"]) == 2
    assert "and max_position_embeddings + 1 - max_new_tokens = 2 are left for one" in capsys.readouterr().err
