"""What the tests of the guards run in each process: single steps under faults, and whole runs, many in one start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from dsv3_megatron.checkpoint.folder import latest_iteration
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.run_records import StepReport
from tests.distributed.faulty_run import Fault, FaultyTrainer
from tests.distributed.small_run import GLOBAL_BATCH, Training, differences, parts, small_run

# Faults of a single step strike in this one.
BAD_STEP = 3


def guarded_run(data: str, **changes: Any) -> RunConfig:
    """Two layers, one of them MoE, and an MTP module; a short window, so that a few steps fill it."""
    length = {} if "phases" in changes else {"train_iters": 40, "lr_decay_style": "constant", "lr_warmup_iters": 0}
    return small_run(**{
        "num_layers": 2, "data_path": [data], "split": "100,0,0", "eval_interval": 0, "lr": 3e-3, **length,
        "spike_min_steps": 2, "spike_window": 16, "spike_grad_norm_floor": 3.0, "log_interval": 100, **changes})


@contextlib.contextmanager
def faulty(run: RunConfig, faults: Sequence[Fault] = ()) -> Iterator[FaultyTrainer]:
    """A trainer in the process group that is there, which it leaves as it was."""
    run.validate(torch.distributed.get_world_size())
    yield FaultyTrainer(run, faults)
    parallel_state.destroy_model_parallel()


def whole_state(trainer: FaultyTrainer) -> dict[str, torch.Tensor]:
    """This rank's weights, fp32 weights, moments and biases by name, and the steps that AdamW has counted."""
    training = Training(trainer.run, trainer.groups, trainer.mcore_config, trainer.chunks, trainer.optimizer,
                        trainer.forward_backward)
    state = training.whole_state()
    for number, part in enumerate(parts(trainer.optimizer)):
        steps = [values["step"] for values in part.optimizer.state.values()]
        state[f"steps:{number}"] = torch.stack([torch.as_tensor(step) for step in steps])
    return {name: tensor.nan_to_num(nan=-7.0) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()}  # NaN stands for what another rank has


# -- single steps --------------------------------------------------------------------------------------


@dataclass
class BadStep:
    """What one rank saw of a step under a fault.

    Attributes:
        changed: Names of what differs after the step from before it.
        report: Of the bad step.
        events: What was logged, as text.
        changed_after: Names of what the next step, an ordinary one, changed.
        after: Its report.
        counters: Of the guard, at the end.
    """

    changed: list[str]
    report: StepReport
    events: list[str]
    changed_after: list[str]
    after: StepReport
    counters: dict[str, Any] = field(default_factory=dict)


def bad_steps(data: str, cases: list[tuple[str, dict[str, Any], Fault]]) -> dict[str, BadStep]:
    """Ordinary steps, one under a fault, an ordinary one; for each case.

    A fault strikes in the step that is its first; corrupted samples in the step that reads them.
    """
    results = {}
    for name, changes, fault in cases:
        with faulty(guarded_run(data, **changes), [fault]) as trainer:
            bad_step = fault.steps[0] if fault.kind != "corrupt" else fault.steps[0] // GLOBAL_BATCH + 1
            for _ in range(bad_step - 1):
                assert not trainer.train_step()[0].skipped
            before = whole_state(trainer)
            report, _ = trainer.train_step()
            between = whole_state(trainer)
            after, _ = trainer.train_step()
            results[name] = BadStep(
                differences(before, between), report, [str(event) for event in trainer.guard_log.events],
                differences(between, whole_state(trainer)), after, vars(trainer.guard.counters))
    return results


def steps_in_halves_and_whole(data: str) -> list[str]:
    """Differences between Megatron-Core's own optimizer step and ours, after three steps with clipping."""
    # Megatron-Core's own step leaves no weights to the next passes.
    changes = {"expert_model_parallel_size": 2, "clip_grad": 0.5, "overlap_param_gather": False}
    states = []
    for is_whole in (False, True):
        with faulty(guarded_run(data, **changes)) as trainer:
            if is_whole:
                def whole_step(optimizer: Any, norm: float) -> None:
                    is_applied, whole_norm, _ = optimizer.step()
                    assert is_applied and whole_norm == norm > 0.5

                with mock.patch("dsv3_megatron.guards.guarded_step.apply_gradients", whole_step):
                    reports = [trainer.train_step()[0] for _ in range(3)]
            else:
                reports = [trainer.train_step()[0] for _ in range(3)]
            norms = torch.tensor([report.grad_norm for report in reports], dtype=torch.float64)
            states.append({**whole_state(trainer), "norms": norms})
    return differences(*states)


# -- whole runs ----------------------------------------------------------------------------------------


@dataclass
class WholeRun:
    """What one rank saw of a run.

    Attributes:
        code: The exit code.
        reports: Of all steps it took, those that a rollback took back among them.
        samples: [first, stop) that each of them read.
        guard: State of the guard at the end.
        state: `whole_state` at the end.
        latest: Iteration of the newest checkpoint; None without any.
    """

    code: int
    reports: list[StepReport]
    samples: list[tuple[int, int]]
    guard: dict[str, Any]
    state: dict[str, torch.Tensor]
    latest: int | None


def whole_runs(data: str, runs: list[tuple[str, dict[str, Any], list[Fault]]]) -> dict[str, WholeRun]:
    """Run after run from start to end, each with its changes and faults; one may load what an earlier one saved."""
    results = {}
    for name, changes, faults in runs:
        run = guarded_run(data, **changes)
        with faulty(run, faults) as trainer:
            # The process group stays for the next run.
            with mock.patch("dsv3_megatron.runs.trainer.destroy_groups"):
                code = trainer.train()
            save = run.checkpoint.save
            latest = latest_iteration(save) if save and Path(save).is_dir() else None
            results[name] = WholeRun(code, trainer.reports, trainer.samples, trainer.guard.state_dict(),
                                     whole_state(trainer), latest)
    return results
