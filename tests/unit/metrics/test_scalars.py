"""Names and values of the scalars of a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.metrics.scalars import step_scalars

Make = Callable[..., StepReport]


def test_scalars_have_megatron_names(make_report: Make, speed: RunSpeed) -> None:
    scalars = step_scalars(make_report(2), speed)
    tokens_per_second = 16 * 256 / 0.5
    flops = speed.flops.training * tokens_per_second
    entropy = -sum(share * math.log(share, 4) for share in (3 / 8, 1 / 8, 1 / 4, 1 / 4))
    assert scalars == {
        "lm loss": 4.0, "mtp_1 loss": 4.5, "seq_load_balancing_loss": 1.5, "grad-norm": 0.25, "learning-rate": 1e-3,
        "batch-size": 16, "iteration-time": 0.5, "throughput": flops / 4 / 1e12,
        "tokens-per-second": tokens_per_second, "model-flops-per-second": flops, "mfu": flops / 4 / 1e9,
        "consumed-tokens": 8192, "consumed-samples": 32,
        "expert-load/layer-1/max-violation": 0.5, "expert-load/layer-1/least-load": 0.5,
        "expert-load/layer-1/entropy": pytest.approx(entropy), "expert-load/layer-1/dead-experts": 0.0,
        "expert-load/layer-4/max-violation": 0.0, "expert-load/layer-4/least-load": 1.0,
        "expert-load/layer-4/entropy": pytest.approx(1.0), "expert-load/layer-4/dead-experts": 0.0,
        "router-bias/layer-1/direction": 0.0, "router-bias/layer-4/direction": 0.0, "router-bias/direction": 0.0,
        "expert-load/max-violation": 0.25, "expert-load/least-load": 0.75, "expert-load/dead-experts": 0.0,
        "expert-load/entropy": pytest.approx((1 + entropy) / 2),
    }
