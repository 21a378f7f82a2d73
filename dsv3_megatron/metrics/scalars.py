"""TensorBoard scalars of a logged step. Pure Python.

What each tag means stands in `tags.py`, and from there in the README of this folder.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dsv3_megatron.metrics.balance import bias_direction, dead_share, least_load, max_violation, normalised_entropy
from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.measurements import Measurements
from dsv3_megatron.metrics.run_records import StepReport


def step_scalars(report: StepReport, speed: RunSpeed) -> dict[str, float]:
    """TensorBoard scalars of one step, by name."""
    rates = speed.rates(report.batch_size, report.step_time_s)
    scalars: dict[str, float] = {} if report.lm_loss is None else {"lm loss": report.lm_loss}
    scalars |= {f"mtp_{depth} loss": loss for depth, loss in enumerate(report.mtp_losses, start=1)}
    if report.balance_loss is not None:
        scalars["seq_load_balancing_loss"] = report.balance_loss
    scalars |= {
        "grad-norm": report.grad_norm,
        "learning-rate": report.learning_rate,
        "batch-size": report.batch_size,
        "iteration-time": report.step_time_s,
        "throughput": rates.tflops_per_device,
        "tokens-per-second": rates.tokens_per_second,
        "model-flops-per-second": rates.model_flops_per_second,
        "consumed-tokens": report.consumed_tokens,
        "consumed-samples": report.consumed_samples,
    }
    if rates.mfu is not None:
        scalars["mfu"] = rates.mfu
    for name, value in (("seq-length", report.seq_length), ("mtp-weight", report.mtp_weight),
                        ("bias-update-rate", report.bias_update_rate)):
        if value is not None:
            scalars[name] = value
    scalars |= report.extras
    scalars |= balance_scalars(report.expert_load)
    if report.measurements is not None:
        scalars |= measurement_scalars(report.measurements)
    return scalars


def balance_scalars(expert_load: Mapping[int, Sequence[int]]) -> dict[str, float]:
    """How evenly the experts of each layer are loaded, and the mean over the layers."""
    scalars: dict[str, float] = {}
    means: dict[str, list[float]] = {}
    for layer, counts in expert_load.items():
        found = {"max-violation": max_violation(counts), "least-load": least_load(counts),
                 "entropy": normalised_entropy(counts), "dead-experts": dead_share(counts)}
        scalars |= {f"expert-load/layer-{layer}/{name}": value for name, value in found.items()}
        found["router-bias/direction"] = scalars[f"router-bias/layer-{layer}/direction"] = bias_direction(counts)
        for name, value in found.items():
            means.setdefault(name if "/" in name else f"expert-load/{name}", []).append(value)
    return scalars | {name: statistics.fmean(values) for name, values in means.items()}


def measurement_scalars(measurements: Measurements) -> dict[str, float]:
    """What the instruments saw, as far as it is one number each."""
    scalars = {f"grad-norm/{component}": norm for component, norm in measurements.grad_norms.items()}
    for depth, share in enumerate(measurements.head_agreement, start=1):
        if share is not None:
            scalars[f"mtp_{depth} agreement"] = share
    scalars |= {f"time/{part}": seconds for part, seconds in measurements.part_seconds.items()}
    scalars |= {f"time-slowest-rank/{part}": seconds
                for part, seconds in measurements.slowest_part_seconds.items()}
    scalars |= {f"memory/{kind}": size for kind, size in measurements.memory_bytes.items()}
    routers = measurements.routers
    if any(len(router.tokens_per_group) > 1 for router in routers.values()):
        for layer, router in routers.items():
            scalars[f"expert-groups/layer-{layer}/groups-per-token"] = router.groups_per_token
            scalars[f"expert-groups/layer-{layer}/max-violation"] = max_violation(router.tokens_per_group)
        scalars["expert-groups/most-groups-per-token"] = max(r.most_groups_per_token for r in routers.values())
        for group, tokens in enumerate(zip(*(r.tokens_per_group for r in routers.values()), strict=True)):
            scalars[f"expert-groups/group-{group}"] = statistics.fmean(tokens)
    return scalars
