"""A run with failures, as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_megatron.planning.goodput.failures import young_interval
from dsv3_megatron.planning.goodput.run_goodput import RunGoodput

_SHARE_WORDS = {"training": "training that counts", "saving": "waiting for saves", "repeated": "done again",
                "restarting": "starting again", "waiting": "no spare node"}


def goodput_json(found: RunGoodput, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Plain values; seconds, days, GPU-hours, shares of time."""
    failures, spread = found.failures, found.spread
    price = None if price_per_gpu_hour is None else found.gpu_hours * price_per_gpu_hour
    return {
        "seconds_between_failures": failures.seconds_between, "checkpoint_seconds": failures.save_seconds,
        "checkpoint_write_seconds": failures.write_seconds, "restart_seconds": failures.restart_seconds,
        "spares": failures.spares, "repair_hours": failures.repair_hours, "notes": list(found.notes),
        "save_interval": found.num_steps, "interval_seconds": found.num_steps * found.step_seconds,
        "interval_seconds_by_young": young_interval(failures),
        "effective_training_time": found.shares.training, "shares": dataclasses.asdict(found.shares),
        "training_days": found.training_days, "days": found.days, "num_gpus_paid": found.gpus,
        "gpu_hours": found.gpu_hours, "price": price,
        "simulated": None if spread is None else {
            "num_runs": spread.num_runs, "effective_training_time": found.training_days / spread.mean_days,
            "mean_days": spread.mean_days, "low_days": spread.low_days, "high_days": spread.high_days},
        "own_save_interval": None if found.own_interval is None else {
            "save_interval": found.own_interval[0], "effective_training_time": found.own_interval[1]},
        "effective_training_time_with": dict(found.changed),
    }


def goodput_text(found: RunGoodput, price_per_gpu_hour: float | None) -> str:
    """Lines for a terminal."""
    failures, interval, share = found.failures, found.num_steps * found.step_seconds, found.shares.training
    behind = f", written within {_time(failures.write_seconds)} behind training" if failures.write_seconds else ""
    lines = [
        f"with failures: one in {_time(failures.seconds_between)} (a GPU in {failures.mtbf_hours_per_gpu:,.0f} hours), "
        f"a save {_time(failures.save_seconds)}{behind}, a restart {_time(failures.restart_seconds)}",
        *(f"  {note}" for note in found.notes),
        f"  save every {found.num_steps} steps, {_time(interval)} (--save-interval {found.num_steps}; by Young's rule "
        f"{_time(young_interval(failures))})",
        f"  effective training time {share:.1%}: " + ", ".join(
            f"{word} {value:.1%}" for (name, word) in _SHARE_WORDS.items()
            if name != "training" and (value := getattr(found.shares, name)) >= 5e-4)]
    if found.own_interval is not None and found.own_interval[0] != found.num_steps:
        lines.append(f"  with --save-interval {found.own_interval[0]}, as the run has it, {found.own_interval[1]:.1%}")
    lines.append("  " + _cost(found, found.days, price_per_gpu_hour) + f"; without failures or saves "
                 f"{found.training_days:.2f} days")
    if found.spread is None:
        lines.append("  no spread: too many saves or failures to draw runs at random")
    else:
        share = found.training_days / found.spread.mean_days
        lines.append(f"  {found.spread.num_runs} runs drawn at random: {share:.1%}, nine of ten between")
        lines += ["    " + _cost(found, days, price_per_gpu_hour) for days in (found.spread.low_days,
                                                                                found.spread.high_days)]
    lines.append("  and with " + ", ".join(f"{name} {value:.1%}" for name, value in found.changed.items()))
    return "\n".join(lines)


def _cost(found: RunGoodput, days: float, price_per_gpu_hour: float | None) -> str:
    gpu_hours = days * 24 * found.gpus
    spares = found.gpus - found.failures.num_gpus
    text = f"{days:.2f} days, {gpu_hours:,.0f} GPU-hours" + (f" ({spares} GPUs of spare nodes with them)" if spares
                                                             else "")
    return text if price_per_gpu_hour is None else f"{text}, price {gpu_hours * price_per_gpu_hour:,.0f}"


def _time(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
