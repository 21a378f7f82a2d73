"""What a run of GRPO needs before anything is allocated: prompts, rewards, folders. No torch."""

from __future__ import annotations

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.chat.prompts import open_run_prompts
from dsv3_megatron.post_training.kept import kept_rollouts, read_rollout, rollout_file
from dsv3_megatron.post_training.rewards import Rewards


def check_policy(run: RunConfig, *, is_new: bool) -> list[str]:
    """Check prompts, rewards and folders of a run of GRPO before anything is allocated.

    Args:
        run: A valid run.
        is_new: Whether the run begins, instead of going on from a checkpoint.

    Returns:
        What there is to warn of.

    Raises:
        ConfigError: a prompt, a reward, or a kept rollout that is needed is missing or wrong.
    """
    policy = run.policy
    keys = Rewards.read(policy.reward, policy.reward_timeout_s).keys if policy.reward else ()
    warnings = []
    for file in (policy.prompts, policy.valid_prompts):
        if file is not None:
            prompts = open_run_prompts(run, file, keys=keys)
            if prompts.num_dropped:
                warnings.append(f"{prompts.num_dropped} prompts of {file} are too long, and are left out")
    if policy.rollouts is not None and is_new and kept_rollouts(policy.rollouts):
        raise ConfigError(f"rollouts={policy.rollouts} has rollouts of another run; give another folder, or "
                          "remove them")
    if policy.replay is not None:
        last = (run.training.train_iters - 1) // policy.updates_per_rollout
        read_rollout(rollout_file(policy.replay, last))
    return warnings
