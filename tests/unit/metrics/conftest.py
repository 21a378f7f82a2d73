"""A made-up run: reports with known numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import RunSpeed, flops_per_token
from dsv3_megatron.metrics.run_records import StepReport

BATCH, SEQ_LENGTH = 16, 256


@pytest.fixture
def speed() -> RunSpeed:
    return RunSpeed(SEQ_LENGTH, flops_per_token(preset("tiny").model, SEQ_LENGTH), num_devices=4,
                    peak_flops_per_device=1e9)


@pytest.fixture
def make_report() -> Callable[..., StepReport]:
    def make(iteration: int, **changes: object) -> StepReport:
        values: dict[str, object] = {
            "iteration": iteration, "consumed_samples": BATCH * iteration,
            "consumed_tokens": BATCH * SEQ_LENGTH * iteration, "lm_loss": 8.0 / iteration,
            "mtp_losses": (9.0 / iteration,), "balance_loss": 1.5, "grad_norm": 0.25, "learning_rate": 1e-3,
            "batch_size": BATCH, "step_time_s": 0.5, "expert_load": {1: [30, 10, 20, 20], 4: [20, 20, 20, 20]}}
        return StepReport(**{**values, **changes})  # type: ignore[arg-type]
    return make
