"""What is wrong with a run of GRPO is said before anything is allocated; long prompts are warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.fine_tuning import policy_tuned
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.post_training.checks import check_policy
from dsv3_megatron.post_training.kept import write_rollout
from dsv3_megatron.post_training.rollout import Rollout
from tests.digit_tokenizer import write_digit_tokenizer, write_sums
from tests.unit.post_training.test_rollout import answer


def run_in(folder: Path, **changes: Any) -> RunConfig:
    given = {"prompts": write_sums(folder / "sums.jsonl"), "tokenizer_model": write_digit_tokenizer(folder / "tok"),
             "reward": ("numeric",), "rollouts": str(folder / "kept"), "seq_length": 24, "max_new_tokens": 4}
    return policy_tuned(preset("tiny")).override(**given | changes)


def test_a_run_that_can_begin(tmp_path: Path) -> None:
    assert check_policy(run_in(tmp_path), is_new=True) == []
    run = run_in(tmp_path, seq_length=8, max_new_tokens=4, long_conversations="drop")
    with pytest.raises(ConfigError, match="has no prompt of at most 5 tokens"):
        check_policy(run.override(seq_length=8), is_new=True)
    (tmp_path / "long.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+1+1+1", "answer": "4"}\n')
    run = run.override(seq_length=10, valid_prompts=str(tmp_path / "long.jsonl"))
    assert check_policy(run, is_new=True) == [f"1 prompts of {tmp_path}/long.jsonl are too long, and are left out"]


def test_rollouts_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_rollout(tmp_path / "kept", Rollout(0, (answer(0, 1.0),), (), "t"))
    assert check_policy(run, is_new=False) == []
    with pytest.raises(ConfigError, match="kept has rollouts of another run; give another folder"):
        check_policy(run, is_new=True)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file mine.py"):
        check_policy(run_in(tmp_path, reward=("mine.py:f",)), is_new=True)
    with pytest.raises(ConfigError, match="rollout-000004.parquet is not there"):
        check_policy(run_in(tmp_path, rollouts=None, replay=str(tmp_path), train_iters=5), is_new=True)
    (tmp_path / "tok/chat_template.jinja").unlink()
    run = run_in(tmp_path)
    write_digit_tokenizer(tmp_path / "tok", template="{{ raise_exception('never') }}")
    with pytest.raises(ConfigError, match=r"sums.jsonl, line 1: the chat template fails: TemplateError: never"):
        check_policy(run, is_new=True)
