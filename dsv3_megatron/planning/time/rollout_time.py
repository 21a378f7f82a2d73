"""How long a step of GRPO takes: a rollout by the memory's bandwidth, passes over its answers by FLOPs.

    answers of a rollout -> decoding steps, each the longer of its bytes at the memory's bandwidth and its operations
    + prompts, the reference's forward pass, and a training step on the packed answers

A copy of the model generates on some devices: routed experts are spread over them, everything else is whole on each,
and each has the caches of its own answers. All answers are taken to have the mean length, and exchanges between the
devices of a copy to cost nothing: a rollout takes longer than this says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.parameters import (
    EXPERT,
    Component,
    ParameterTable,
    count_parameters,
    weight_bytes_per_parameter,
)
from dsv3_megatron.planning.memory.headroom import Headroom
from dsv3_megatron.planning.time.work import Setting, WorkPart, WorkTable

# Share of the tokens of one MTP module that are accepted. Source: DeepSeek-V3 report, section 5.4.3: 85% to 90%.
_ACCEPTED_DRAFTS = 0.85


@dataclass(frozen=True)
class AnswerLengths:
    """Mean lengths, in tokens, of what a rollout reads and writes."""

    prompt: float
    answer: float


@dataclass(frozen=True)
class RolloutTime:
    """Generation of a rollout's answers, on all devices at once.

    Attributes:
        copy_devices: Devices that one copy of the model generates on.
        answers_at_once: Answers that a copy generates at once.
        num_steps: Decoding steps, one behind the other.
        step_bytes: Bytes that a device reads in one of them, at an answer's mean length.
        bandwidth_seconds: Seconds of all steps by bytes.
        compute_seconds: Seconds of all steps by operations.
        prompt_seconds: Seconds of the prompts' forward pass, by operations.
    """

    copy_devices: int
    answers_at_once: float
    num_steps: float
    step_bytes: float
    bandwidth_seconds: float
    compute_seconds: float
    prompt_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole rollout."""
        return max(self.bandwidth_seconds, self.compute_seconds) + self.prompt_seconds


def packed_sequences(run: RunConfig, lengths: AnswerLengths, num_devices: int) -> int:
    """Sequences that the answers of a step fill with their prompts, as many as the layout can take.

    A group's answers share their prompt in a sequence; each has the prompt's last token, and one more for each MTP
    module, for itself. The prompt is there once more wherever a group goes on in the next sequence. Sequences are
    taken to be full, which answers of many lengths nearly make them.

    Raises:
        ConfigError: a prompt and its answer are longer than a sequence.
    """
    length, seq_length = lengths.prompt + lengths.answer, run.training.seq_length
    if length > seq_length:
        raise ConfigError(f"prompt-tokens + answer-tokens = {length:g} must not exceed seq_length={seq_length}: they "
                          "share a sequence; give a larger seq_length")
    answers = run.training.global_batch_size
    shared = max(0.0, lengths.prompt - 1 - run.model.mtp_num_layers)
    # Tokens are the answers with their own parts of a prompt, and the shared part of one for each group and border.
    num_rows = math.ceil((answers * (length - shared) + (answers / run.policy.group_size - 1) * shared)
                         / (seq_length + 1 - shared))
    while not run.parallel.takes_batch(num_rows, run.training.micro_batch_size, num_devices):
        num_rows += 1
    return num_rows


def smallest_copy(run: RunConfig, setting: Setting) -> int:
    """Devices, a power of two, on which a copy of the model leaves half of their usable memory to caches.

    Raises:
        ConfigError: the machine's devices are too few.
    """
    usable, table, size = Headroom.of(setting).usable_bytes, count_parameters(run.model), 1
    while size <= setting.num_devices:
        if _weight_bytes(run, table, size) <= usable / 2:
            return size
        size *= 2
    raise ConfigError(f"num-gpus={setting.num_devices} hold no copy of the model to generate with; give more, or "
                      "rollout-gpus")


def _weight_bytes(run: RunConfig, table: ParameterTable, copy_devices: int) -> float:
    """Bytes of weights on a device that generates."""
    experts = _expert_parameters(table.main)
    return (table.main_total - experts + experts / copy_devices) * weight_bytes_per_parameter(run.training.precision)


def _expert_parameters(parts: Iterable[Component]) -> int:
    """Parameters of routed experts, which are spread over a copy's devices."""
    return sum(part.total for part in parts if part.sharding == EXPERT)


def rollout_time(run: RunConfig, setting: Setting, lengths: AnswerLengths, copy_devices: int | None = None
                 ) -> RolloutTime:
    """Predict the generation of one rollout.

    Args:
        run: A run of GRPO.
        setting: The machine; all of its devices generate.
        lengths: Mean lengths of prompts and answers.
        copy_devices: Devices of one copy of the model; None: `smallest_copy`.

    Raises:
        ConfigError: the devices of a copy do not divide the machine's.
    """
    hardware, policy, model = setting.hardware, run.policy, run.model
    size = smallest_copy(run, setting) if copy_devices is None else copy_devices
    if setting.num_devices % size:
        raise ConfigError(f"rollout-gpus={size} must divide num-gpus={setting.num_devices}: each copy of the model has "
                          "as many")
    answers = run.training.global_batch_size * policy.updates_per_rollout / (setting.num_devices / size)
    at_once = min(answers, policy.rollout_batch_size)
    drafts = policy.rollout_speculative == "mtp"
    per_step = 1 + _ACCEPTED_DRAFTS * drafts
    num_steps = math.ceil(answers / at_once) * lengths.answer / per_step
    context = lengths.prompt + lengths.answer / 2
    table = count_parameters(model)
    num_bytes = _step_bytes(run, table, size, at_once, context, with_drafts=drafts)
    kind = "fp32" if hardware.is_cpu else "bf16"
    share = f"{kind}_best_share"
    rate = hardware.peak(kind) * (hardware[share] if hardware.has(share) else 1.0)
    weights = table.main_active_without_embedding + table.mtp_active * drafts
    flops = (1 + drafts) * (2 * weights + _attention_flops(model, context)) * at_once / size
    # Prompts that are alike go through the model once.
    prompt_flops = 2 * weights * lengths.prompt * answers / policy.group_size / size
    return RolloutTime(size, at_once, num_steps, num_bytes, num_steps * num_bytes / hardware["memory_bandwidth"],
                       num_steps * flops / rate, prompt_flops / rate)


def _step_bytes(run: RunConfig, table: ParameterTable, copy_devices: int, at_once: float, context: float, *,
                with_drafts: bool) -> float:
    """Bytes that a device reads in a decoding step: dense weights, experts that some token goes to, and caches."""
    model, value_bytes = run.model, weight_bytes_per_parameter(run.training.precision)
    parts = [*table.main, *(table.mtp if with_drafts else ())]
    dense = sum(part.total for part in parts if part.sharding != EXPERT and part.part != "embedding")
    experts = _expert_parameters(parts)
    tokens = at_once * (1 + with_drafts)
    touched = 1 - (1 - model.moe_router_topk / model.num_experts) ** tokens if model.num_experts else 0.0
    cache = model.num_layers * (model.kv_lora_rank + model.qk_rope_head_dim) * context * at_once / copy_devices
    return value_bytes * (dense + experts * touched / copy_devices + cache)


def _attention_flops(model: ModelConfig, context: float) -> float:
    """Operations of one token's absorbed attention to so many latents, in all layers."""
    return (2 * model.num_layers * model.num_attention_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim)
            * context)


def forward_share(run: RunConfig, setting: Setting) -> float:
    """Share of a training step's pipeline that its forward passes alone take: what the reference's pass costs."""
    slowest = max(WorkTable(run, setting).stages(), key=lambda work: sum(one.alone for one in work.alone.values()))
    return slowest.alone[WorkPart.FORWARD].alone / sum(one.alone for one in slowest.alone.values())
