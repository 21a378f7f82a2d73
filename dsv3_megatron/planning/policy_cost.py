"""What a run of GRPO costs: its rollouts, the reference's passes, and the training on packed answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.planning.run_cost import PhaseCost, RunCost, only_phase, require_possible
from dsv3_megatron.planning.time.rollout_time import (
    AnswerLengths,
    RolloutTime,
    forward_share,
    packed_sequences,
    rollout_time,
)
from dsv3_megatron.planning.time.step_time import StepTime, step_time
from dsv3_megatron.planning.time.work import Setting


@dataclass(frozen=True)
class PolicyStep:
    """An optimizer step of GRPO on a machine.

    Attributes:
        lengths: Mean lengths of prompts and answers.
        num_answers: Answers of the step.
        rollout: Generation of a rollout; None where kept ones are replayed.
        updates_per_rollout: Steps that share it.
        reference_seconds: Seconds of the reference's forward pass over the step's answers.
        training: Training step on the packed answers.
        refusal: Why `dsv3 grpo` would not do the run as it stands; empty if it would.
    """

    lengths: AnswerLengths
    num_answers: int
    rollout: RolloutTime | None
    updates_per_rollout: int
    reference_seconds: float
    training: StepTime
    refusal: str = ""

    @property
    def rollout_seconds(self) -> float:
        """Seconds of the rollout that fall to one step."""
        return self.rollout.seconds / self.updates_per_rollout if self.rollout else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of a whole step, its share of a rollout among them."""
        return self.rollout_seconds + self.reference_seconds + self.training.seconds


def policy_step(run: RunConfig, setting: Setting, lengths: AnswerLengths, copy_devices: int | None = None
                ) -> PolicyStep:
    """Predict a step of a run of GRPO.

    Args:
        run: A run of GRPO, valid but for the number of devices.
        setting: The machine.
        lengths: Mean lengths of prompts and answers.
        copy_devices: Devices that a copy of the model generates on; None: the fewest that hold one with room to spare.

    Raises:
        ConfigError: lengths, devices or layout cannot be.
    """
    for name, value in (("prompt-tokens", lengths.prompt), ("answer-tokens", lengths.answer)):
        if not value > 0:
            raise ConfigError(f"--{name}={value:g} must be greater than 0")
    (phase,) = run.recipe().phases
    part = only_phase(run, phase, global_batch_size=packed_sequences(run, lengths, setting.num_devices))
    require_possible(part, setting.num_devices)
    training = step_time(part, setting, with_transfers=False)
    rollout = None if run.policy.replay is not None else rollout_time(run, setting, lengths, copy_devices)
    # A replayed rollout has the reference's log-probabilities.
    has_pass = rollout is not None and run.policy.kl_coefficient > 0
    reference = training.pipeline * forward_share(part, setting) if has_pass else 0.0
    return PolicyStep(lengths, run.training.global_batch_size, rollout, run.policy.updates_per_rollout, reference,
                      training, _refusal(run))


def _refusal(run: RunConfig) -> str:
    try:
        run.policy.validate(run.data, run.training, run.parallel, run.guards, fp8=run.fp8.fp8,
                            mtp_num_layers=run.model.mtp_num_layers)
    except ConfigError as error:
        return str(error)
    return ""


def policy_cost(run: RunConfig, setting: Setting, step: PolicyStep, *, price_per_gpu_hour: float | None = None
                ) -> RunCost:
    """Cost of a whole run of GRPO, which is one phase."""
    num_steps = float(run.training.train_iters)
    num_tokens = num_steps * step.num_answers * (step.lengths.prompt + step.lengths.answer)
    note = (f"a step of {step.num_answers} answers takes {step.seconds:.2f} s: rollout {step.rollout_seconds:.2f}, "
            f"reference {step.reference_seconds:.2f}, training {step.training.seconds:.2f}")
    phase = PhaseCost("grpo", num_steps, num_tokens, num_steps * step.seconds, setting.num_devices, step.training, note)
    return RunCost((phase,), price_per_gpu_hour)


def policy_text(step: PolicyStep) -> str:
    """Write where a step goes as text for a terminal."""
    lines = [f"a step of GRPO: {step.num_answers} answers of {step.lengths.answer:g} tokens to prompts of "
             f"{step.lengths.prompt:g}, {step.seconds:.2f} s"]
    rollout, sequences = step.rollout, step.training.run.training.global_batch_size
    if rollout is not None:
        lines += [
            f"  rollout   {step.rollout_seconds:10.2f} s a step: {rollout.num_steps:.0f} decoding steps of "
            f"{rollout.answers_at_once:g} answers at once on {rollout.copy_devices} devices a copy",
            f"            by bytes {rollout.bandwidth_seconds:.2f} s ({rollout.step_bytes / 1e9:.2f} GB of a device a "
            f"step), by operations {rollout.compute_seconds:.2f} s; prompts {rollout.prompt_seconds:.2f} s",
            f"  reference {step.reference_seconds:10.2f} s, a forward pass"]
    lines += [f"  training  {step.training.seconds:10.2f} s, {sequences} packed sequences"]
    if rollout is not None:
        lines.append("  assumed: answers of one length, exchanges within a copy that cost nothing")
    if step.refusal:
        lines.append(f"  refused as it stands: {step.refusal}")
    return "\n".join(lines)


def policy_json(step: PolicyStep) -> dict[str, Any]:
    """Plain values; seconds, tokens, bytes."""
    rollout = step.rollout
    found: dict[str, Any] = {
        "num_answers": step.num_answers, "prompt_tokens": step.lengths.prompt, "answer_tokens": step.lengths.answer,
        "step_time_s": step.seconds, "rollout_s": step.rollout_seconds, "reference_s": step.reference_seconds,
        "training_s": step.training.seconds,
        "packed_sequences": step.training.run.training.global_batch_size, "refusal": step.refusal}
    if rollout is not None:
        found |= {"rollout_devices": rollout.copy_devices, "answers_at_once": rollout.answers_at_once,
                  "decoding_steps": rollout.num_steps, "decoding_step_bytes": rollout.step_bytes,
                  "decoding_by_bytes_s": rollout.bandwidth_seconds,
                  "decoding_by_operations_s": rollout.compute_seconds, "prompts_s": rollout.prompt_seconds}
    return found
