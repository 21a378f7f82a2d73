"""What makes the fullest rank full, and which settings would lower it by how much: each is tried by estimating again.

Usage:
    advice = advise(run, world_size=2048)
    print("\\n".join(describe(advice)))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.planning.flags import flags
from dsv3_megatron.planning.memory.estimate import RankMemory, estimate_memory, kept_by_name

_COMPONENTS = {
    "parameter_bytes": "weights", "gradient_bytes": "main gradients", "optimizer_bytes": "optimizer states",
    "activation_bytes": "activations", "deferred_bytes": "weight gradients that wait",
    "working_bytes": "working memory of a pass", "communication_bytes": "transfers between stages",
    "buffer_bytes": "tables and counts", "fp8_weight_bytes": "weights in FP8",
}


@dataclass(frozen=True)
class Remedy:
    """A change of settings that lowers the fullest rank.

    Attributes:
        changes: Fields of the run and their values.
        peak_bytes: Peak of the rank that is then the fullest.
        saved_bytes: Bytes by which the peak is lower than before.
    """

    changes: Mapping[str, Any]
    peak_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class Advice:
    """The fullest rank of a run, and what would lower its peak.

    Attributes:
        worst: The fullest pipeline rank.
        components: Components of that rank by name, in bytes, largest first.
        activations: Activations of that rank by name, in bytes, largest first.
        remedies: Changes that would lower its peak, the largest saving first.
    """

    worst: RankMemory
    components: Mapping[str, int]
    activations: Mapping[str, int]
    remedies: tuple[Remedy, ...]


def advise(run: RunConfig, world_size: int | None = None, *, device: str = "cuda", imbalance: float = 1.0) -> Advice:
    """Find the fullest rank and what would lower it.

    Args:
        run: A valid run.
        world_size: Processes; None: the fewest that the layout runs on. No remedy changes it.
        device: "cuda" or "cpu": which operations the modules choose.
        imbalance: Rows that a rank's experts get, as a multiple of the mean over ranks; 1 is balance.
    """
    size = run.parallel.minimum_world_size if world_size is None else world_size
    worst = fullest_rank(run, size, device=device, imbalance=imbalance)
    remedies = []
    for changes in _candidates(run):
        try:
            changed = run.override(**changes)
            changed.validate(size)
        except ConfigError:  # not a way out of this run's
            continue
        peak = fullest_rank(changed, size, device=device, imbalance=imbalance).peak_bytes
        if peak < worst.peak_bytes:
            remedies.append(Remedy(changes, peak, worst.peak_bytes - peak))
    remedies.sort(key=lambda remedy: -remedy.saved_bytes)
    components = {name: getattr(worst, field) for field, name in _COMPONENTS.items()}
    return Advice(worst, dict(sorted(components.items(), key=lambda item: -item[1])), kept_by_name(worst),
                  tuple(remedies))


def fullest_rank(run: RunConfig, world_size: int, *, device: str = "cuda", imbalance: float = 1.0) -> RankMemory:
    """The rank with the highest peak in any phase that the run trains.

    Args:
        run: A valid run.
        world_size: Number of processes of the run.
        device: "cuda" or "cpu": which operations the modules choose.
        imbalance: Rows that a rank's experts get, as a multiple of the mean over ranks; 1 is balance.
    """
    phases = {(phase.training.seq_length, phase.training.micro_batch_size, phase.parallel): run.in_phase(phase)
              for phase in run.recipe().phases_to_run}
    return max((rank for phase in phases.values()
                for rank in estimate_memory(phase, world_size, device=device, imbalance=imbalance)),
               key=lambda rank: rank.peak_bytes)


def _candidates(run: RunConfig) -> Iterator[dict[str, Any]]:
    """Single steps from a run's settings; those that are not valid are left out later."""
    training, parallel = run.training, run.parallel
    if training.recompute_granularity is None or training.recompute_modules:
        yield {"recompute_granularity": "selective", "recompute_modules": ()}
    if training.recompute_granularity != "full":
        yield {"recompute_granularity": "full", "recompute_modules": ()}
    if training.micro_batch_size > 1:
        yield {"micro_batch_size": training.micro_batch_size // 2}
    if not run.fp8.is_enabled:
        yield {"fp8": "blockwise"}
    if "fp32" in (training.exp_avg_dtype, training.exp_avg_sq_dtype):
        yield {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    if training.precision == "fp32":
        yield {"precision": "bf16"}
    for name in ("expert_model_parallel_size", "pipeline_model_parallel_size", "tensor_model_parallel_size"):
        yield {name: 2 * getattr(parallel, name)}
    if parallel.pipeline_model_parallel_size > 1:
        for schedule in ("1f1b", "zb1p", "dualpipev", "zbv"):
            if schedule != parallel.schedule:
                yield {"pipeline_schedule": schedule, "num_virtual_stages_per_pipeline_rank": 1}


def describe(advice: Advice, *, count: int = 5) -> list[str]:
    """Describe the fullest rank, its largest components and the best remedies in lines for a reader."""
    worst = advice.worst
    shares = [f"{name} {_gigabytes(size)}" for name, size in list(advice.components.items())[:3] if size]
    lines = [f"pipeline rank {worst.pipeline_rank} is the fullest: {_gigabytes(worst.peak_bytes)}, of which "
             + ", ".join(shares)]
    kept = [f"{name} {_gigabytes(size)}" for name, size in list(advice.activations.items())[:3] if size]
    if kept:
        lines.append("largest activations: " + ", ".join(kept))
    for remedy in advice.remedies[:count]:
        lines.append(f"{flags(remedy.changes)}: {_gigabytes(remedy.saved_bytes)} less, {_gigabytes(remedy.peak_bytes)}")
    return lines


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
