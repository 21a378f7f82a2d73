"""The rules of GRPO's settings: each says what is wrong and the way out, and a run without prompts has none of them."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.fine_tuning import policy_tuned
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig

GIVEN: dict[str, Any] = {
    "prompts": "p.jsonl", "reward": ("numeric",), "rollouts": "kept", "tokenizer_model": "tok", "seq_length": 64,
    "max_new_tokens": 16, "group_size": 4, "global_batch_size": 8, "micro_batch_size": 1}


def run_with(**changes: Any) -> RunConfig:
    return policy_tuned(preset("tiny")).override(**GIVEN).override(**changes)


def test_the_defaults() -> None:
    run = run_with()
    run.validate(1)
    policy, training = run.policy, run.training
    assert policy.is_on and (policy.grpo_level, policy.rollout_kv_cache) == ("sequence", "training")
    assert (training.lr, training.min_lr, training.lr_decay_style) == (1e-6, 1e-6, "constant")
    assert (training.weight_decay, training.mtp_loss_scaling_factor, training.ema_decay) == (0, 0, 0)
    assert not preset("tiny").policy.is_on


@pytest.mark.parametrize(("changes", "told"), [
    ({"group_size": 3}, "group_size=3 must divide global_batch_size=8"),
    ({"group_size": 1}, "group_size=1 must be at least 2"),
    ({"clip_epsilon": -0.1}, "clip_epsilon=-0.1 must be at least 0"),
    ({"kl_coefficient": float("nan")}, "kl_coefficient=nan must be a finite number"),
    ({"reward_timeout_s": 0.0}, "reward_timeout_s=0.0 must be greater than 0"),
    ({"updates_per_rollout": 2, "reference_interval": 3}, "updates_per_rollout=2 must divide reference_interval=3"),
    ({"max_new_tokens": 65}, "max_new_tokens=65 must not exceed seq_length=64"),
    ({"grpo_level": "word"}, "grpo_level='word' must be one of sequence, answer, token"),
    ({"reward": ()}, "reward is not set"),
    ({"rollouts": None}, "rollouts=None and replay=None: give one of them"),
    ({"replay": "kept"}, "rollouts=kept and replay=kept: give one of them"),
    ({"data_path": ("data",)}, "data_path cannot go with prompts"),
    ({"sft": False}, "sft=False cannot go with prompts"),
    ({"long_conversations": "cut"}, "long_conversations=cut cannot go with prompts"),
    ({"tokenizer_model": None}, "tokenizer_model is not set"),
    ({"ema_decay": 0.9}, "ema_decay=0.9 cannot go with prompts"),
    ({"on_spike": "rollback", "save": "s"}, "on_spike=rollback cannot go with prompts"),
    ({"moe_aux_loss_coeff": 1e-4}, "moe_aux_loss_coeff=0.0001 cannot go with prompts"),
    ({"context_parallel_size": 2}, "context_parallel_size=2 cannot go with prompts"),
    ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2 cannot go with prompts that are to be"),
    ({"expert_model_parallel_size": 2}, "expert_model_parallel_size=2 cannot go with prompts that are to be answered"),
    ({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
     "expert_tensor_parallel_size=2 cannot go with prompts that are to be answered"),
    ({"fp8": "blockwise"}, "fp8=blockwise cannot go with prompts that are to be answered"),
    ({"valid_prompts": "v.jsonl", "eval_interval": 0}, "valid_prompts=v.jsonl is answered at validations"),
    ({"rollout_speculative": "mtp", "mtp_num_layers": 0}, "rollout_speculative=mtp needs an MTP module"),
])
def test_what_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_with(**changes).validate()


def test_kept_rollouts_are_learnt_from_under_any_layout() -> None:
    run_with(rollouts=None, replay="kept", reward=(), pipeline_model_parallel_size=2, global_batch_size=8).validate(2)


def test_without_prompts_a_setting_is_for_nothing() -> None:
    with pytest.raises(ConfigError, match="group_size=4 is about GRPO, and there are no prompts to answer"):
        preset("tiny").override(group_size=4).validate()
