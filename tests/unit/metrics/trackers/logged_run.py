"""A made-up run that writes every tag of the table, and the table's tags as that run spells them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import RunSpeed, flops_per_token
from dsv3_megatron.metrics.gradients import COMPONENTS
from dsv3_megatron.metrics.instruments import STEP_PARTS
from dsv3_megatron.metrics.measurements import Measurements, RouterMeasurements
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.metrics.tags import TAGS
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread
from dsv3_megatron.metrics.writer import MetricsWriter

LAYERS = (1, 4)
CONFIG: dict[str, Any] = {"preset": "made-up", "model": {"num_layers": 4}}
ENVIRONMENT: dict[str, Any] = {"world_size": 4, "device": "none"}
# Numbers that every logged step has: of GRPO, and those of a GPU's memory among the measurements.
GRPO = {f"grpo/{name}": 0.5 for name in ("reward", "reward/exact", "length", "unfinished", "entropy", "no-signal", "kl",
                                         "clip-fraction", "ratio")}
MEMORY = {"host-peak-resident": 10**9, "gpu-allocated": 1, "gpu-peak-allocated": 2, "gpu-peak-reserved": 3}
_FILLED = {"layer": tuple(map(str, LAYERS)), "group": ("0", "1"), "depth": ("1",), "component": COMPONENTS,
           "phase": STEP_PARTS, "rule": ("exact",), "set": ("code", "web-2")}


def expected_tags(*kinds: str) -> set[str]:
    """Tags of the table, of some kinds, as the made-up run spells them."""
    expected = set()
    for tag in TAGS:
        places = re.findall("{(.*?)}", tag.name)
        for values in itertools.product(*(_FILLED[place] for place in places)) if tag.kind in kinds else ():
            expected.add(tag.name.format(**dict(zip(places, values, strict=True))))
    return expected


def write_run(folder: Path, trackers: list[TrackerThread], *, first: int = 1, last: int = 3,
              resumed_iteration: int = 0) -> None:
    """Log steps first..last, each with pictures, then a validation; the loss of step n is 8 / n."""
    speed = RunSpeed(256, flops_per_token(preset("tiny").model, 256), num_devices=4, peak_flops_per_device=1e9)
    writer = MetricsWriter(folder, speed, num_layers=4, resumed_iteration=resumed_iteration, trackers=trackers)
    writer.write_config(CONFIG, environment=ENVIRONMENT)
    for iteration in range(first, last + 1):
        writer.write_step(_report(iteration))
    writer.write_validation(last, 2.5, mtp_losses=(3.5,), sets={"code": (2.5, (3.5,)), "web-2": (3.0, (4.0,))})
    writer.write_average_validation(last, 2.25, sets={"code": 2.25, "web-2": 2.75})
    writer.write_answers(last, {"grpo/reward": 0.75, "grpo/length": 12.0})
    writer.close()


def _report(iteration: int) -> StepReport:
    router = RouterMeasurements(score_counts=[10, 20, 30, 40], tokens_per_group=[60, 40],
                                tokens_by_num_groups=[0, 60, 20], bias=[0.0, 0.25, -0.5, 0.125])
    measurements = Measurements(dict.fromkeys(LAYERS, router), dict.fromkeys(COMPONENTS, 0.1), (0.5,),
                                dict.fromkeys(STEP_PARTS, 0.25), dict.fromkeys(STEP_PARTS, 0.5), MEMORY)
    return StepReport(
        iteration=iteration, consumed_samples=16 * iteration, consumed_tokens=4096 * iteration, lm_loss=8.0 / iteration,
        mtp_losses=(9.0 / iteration,), balance_loss=1.5, grad_norm=0.25, learning_rate=1e-3, batch_size=16,
        step_time_s=0.5, expert_load={layer: [30, 10, 20, 20] for layer in LAYERS}, seq_length=256, mtp_weight=0.3,
        bias_update_rate=1e-3, measurements=measurements, extras=GRPO)
