"""What a run of GRPO learns from: prompts, rewards, rollouts and the terms of its objective. Frozen data, no torch.

A rollout is a group of answers for each of some prompts, with their log-probabilities and rewards. A global batch is a
number of answers here; packed behind their prompts they are fewer sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fields import ConfigError, option, require_finite
from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.config.values import hold_tuples

# Over what probabilities, ratios and divergences are taken, and over what they are averaged.
GRPO_LEVELS = ("sequence", "answer", "token")
ROLLOUT_CACHES = ("training", "latent", "full")


@dataclass(frozen=True)
class PolicyConfig:
    """Prompts, rewards, rollouts and objective of a run of GRPO; without `prompts` a run is none.

    Source: DeepSeek-V3 report, section 5.2.2, eq. 26-28, which gives no values: epsilon is that of PPO (Schulman et
    al., arXiv 1707.06347), beta that of DeepSeekMath (arXiv 2402.03300).
    """

    prompts: str | None = option(None, help="JSON lines of prompts; the run learns by GRPO from answers of its own")
    valid_prompts: str | None = option(None, help="JSON lines of prompts that are kept apart, answered at each "
                                       "validation; none: no validation")
    reward: tuple[str, ...] = option(
        (), nargs="*", help="what an answer is worth: RULE, or WEIGHT RULE WEIGHT RULE ...; a rule is exact, numeric, "
        "boxed, format, or FILE.py:FUNCTION")
    reward_timeout_s: float = option(10.0, help="seconds that one reward of one answer may take")
    group_size: int = option(8, help="answers to each prompt, G")
    updates_per_rollout: int = option(1, help="optimizer steps that share the answers of one rollout, each a part")
    max_new_tokens: int = option(128, help="longest answer, its end token included")
    clip_epsilon: float = option(0.2, help="epsilon: how far from 1 the ratio of probabilities counts")
    kl_coefficient: float = option(0.04, help="beta: weight of the divergence from the reference; 0: no reference")
    grpo_level: str = option(
        "sequence", choices=GRPO_LEVELS, help="sequence: ratio and divergence of whole answers, as in the report; "
        "answer: of tokens, mean over each answer, then over answers; token: of tokens, mean over all of a step")
    reference_interval: int = option(0, help="steps after which the reference becomes the weights of the time; 0: it "
                                     "stays what the run began with")
    rollouts: str | None = option(None, help="folder that keeps each rollout, as Parquet")
    replay: str | None = option(None, help="folder of kept rollouts to learn from, in place of generating any")
    rollout_kv_cache: str = option(
        "training", choices=ROLLOUT_CACHES, help="training: log-probabilities have the bits of the training forward, "
        "which sums as generation does; latent: faster, they have not; full: likewise")
    rollout_speculative: str | None = option(None, choices=("mtp",), help="mtp: the MTP module drafts")
    rollout_batch_size: int = option(64, help="answers that a replica generates at once")

    def __post_init__(self) -> None:
        hold_tuples(self)

    @property
    def is_on(self) -> bool:
        """Whether the run learns by GRPO."""
        return self.prompts is not None

    @property
    def has_generations_bits(self) -> bool:
        """Whether the training forward sums as generation does, so that both have the same bits."""
        return self.is_on and self.rollout_kv_cache == "training"

    def validate(self, data: DataConfig, training: TrainingConfig, parallel: ParallelConfig, guards: GuardConfig, *,
                 fp8: str, mtp_num_layers: int) -> None:
        """Check the settings against each other and the rest of the run.

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        require_finite(self)
        if not self.is_on:
            given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
            if given:
                raise ConfigError(f"{given[0]}={getattr(self, given[0])} is about GRPO, and there are no prompts to "
                                  "answer; give prompts too (dsv3 grpo), or leave it out")
            return
        self._validate_own()
        if training.global_batch_size % self.group_size:
            raise ConfigError(f"group_size={self.group_size} must divide global_batch_size="
                              f"{training.global_batch_size}, the answers of a step: each step has whole groups")
        if self.reference_interval % self.updates_per_rollout:
            raise ConfigError(f"updates_per_rollout={self.updates_per_rollout} must divide reference_interval="
                              f"{self.reference_interval}: a rollout has one reference")
        if self.max_new_tokens > training.seq_length:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must not exceed seq_length={training.seq_length}: "
                              "a prompt and its answer share a sequence")
        if self.rollout_speculative == "mtp" and not mtp_num_layers:
            raise ConfigError("rollout_speculative=mtp needs an MTP module, and mtp_num_layers=0; leave it out")
        self._validate_rest(data, training, parallel, guards, fp8)

    def _validate_own(self) -> None:
        least = {"group_size": 2, "updates_per_rollout": 1, "max_new_tokens": 1, "rollout_batch_size": 1,
                 "clip_epsilon": 0, "kl_coefficient": 0, "reference_interval": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {smallest}")
        if self.reward_timeout_s <= 0:
            raise ConfigError(f"reward_timeout_s={self.reward_timeout_s} must be greater than 0")
        for name, allowed in (("grpo_level", GRPO_LEVELS), ("rollout_kv_cache", ROLLOUT_CACHES),
                              ("rollout_speculative", (None, "mtp"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, allowed))}")
        if not self.reward and (self.replay is None or self.valid_prompts is not None):
            raise ConfigError("reward is not set: say what an answer is worth, as in --reward numeric")
        if (self.rollouts is None) == (self.replay is None):
            raise ConfigError(f"rollouts={self.rollouts} and replay={self.replay}: give one of them, a folder that "
                              "keeps the run's rollouts, or one whose rollouts are taken again")

    def _validate_rest(self, data: DataConfig, training: TrainingConfig, parallel: ParallelConfig, guards: GuardConfig,
                       fp8: str) -> None:
        if data.data_path or data.valid_data_path:
            raise ConfigError("data_path cannot go with prompts: a run of GRPO learns from answers of its own; leave "
                              "one out")
        if not data.sft:
            raise ConfigError("sft=False cannot go with prompts: answers are conversations, which share sequences and "
                              "do not see each other; leave it out")
        if data.long_conversations == "cut":
            raise ConfigError("long_conversations=cut cannot go with prompts, whose ends are what is asked; give "
                              "refuse or drop")
        if data.tokenizer_model is None:
            raise ConfigError("tokenizer_model is not set: prompts become tokens by it, as in --tokenizer-model DIR")
        if training.phases:
            raise ConfigError("phases cannot go with prompts: a run of GRPO is one phase; give train_iters")
        if training.ema_decay:
            raise ConfigError(f"ema_decay={training.ema_decay} cannot go with prompts: the reference takes the place "
                              "of the weights' average in memory and in checkpoints; give ema_decay=0")
        if training.moe_aux_loss_coeff:
            raise ConfigError(f"moe_aux_loss_coeff={training.moe_aux_loss_coeff} cannot go with prompts: the balance "
                              "loss is weighed by tokens, and this objective by answers; give 0")
        if self.valid_prompts is not None and not training.eval_interval:
            raise ConfigError(f"valid_prompts={self.valid_prompts} is answered at validations, and eval_interval=0 "
                              "turns them off; give eval_interval too")
        if guards.on_spike == "rollback":
            raise ConfigError("on_spike=rollback cannot go with prompts: the same weights would give the same answers; "
                              "give log or skip")
        if parallel.context_parallel_size > 1:
            raise ConfigError(f"context_parallel_size={parallel.context_parallel_size} cannot go with prompts: the "
                              "objective reads whole answers; use other ranks for data parallelism")
        split = {name: getattr(parallel, name) for name in
                 ("pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")}
        name = next((name for name, size in split.items() if size > 1), None)
        if name is not None and (self.replay is None or self.valid_prompts is not None):
            raise ConfigError(f"{name}={split[name]} cannot go with prompts that are to be answered: every rank "
                              "that generates has all layers and all experts; use data parallelism or tensor "
                              "parallelism, or learn from kept rollouts (replay) without valid_prompts")
        if fp8 != "none" and self.replay is None:
            raise ConfigError(f"fp8={fp8} cannot go with prompts that are to be answered: generation computes in bf16, "
                              "and would not have training's probabilities; give fp8=none")
