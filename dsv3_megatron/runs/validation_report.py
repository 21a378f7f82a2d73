"""What a run says of a validation: on the console, and to the writer of its metrics.

Losses come by the name of the validation set, in the order of `--valid-data-path`; "" is the name of the one set of a
run that names none. What stands for the validation as a whole is the first set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3_megatron.guards.step_losses import StepLosses
from dsv3_megatron.metrics.progress import TrainingDisplay
from dsv3_megatron.metrics.writer import MetricsWriter


def report_validation(iteration: int, losses: Mapping[str, StepLosses], display: TrainingDisplay,
                      writer: MetricsWriter | None, *, num_sequences: int) -> bool:
    """Report the losses of a validation.

    Args:
        iteration: Steps taken.
        losses: Mean losses by set.
        display: The console.
        writer: The metrics; None: they are not written.
        num_sequences: Sequences that each set was measured on.

    Returns:
        Whether a token of any set counted: else there is no loss.
    """
    counted = {name: (own.main, own.mtp) for name, own in losses.items() if own.main is not None}
    for name in losses:
        if name in counted:
            main, mtp = counted[name]
            display.validation(iteration, main, mtp_losses=mtp, name=name)
        else:
            display.message(f"validation{_of(name)} at iteration {iteration}: no token of the validation data counts "
                            "in the loss (eod_mask_loss leaves out the one after each EOD)")
    if writer and counted:
        main, mtp = next(iter(counted.values()))
        writer.write_validation(iteration, main, mtp_losses=mtp, num_sequences=num_sequences, sets=_named(counted))
    return bool(counted)


def report_average(iteration: int, losses: Mapping[str, StepLosses], display: TrainingDisplay,
                   writer: MetricsWriter | None) -> None:
    """Report the main losses of the weights' moving average, likewise."""
    mains = {name: own.main for name, own in losses.items() if own.main is not None}
    for name, loss in mains.items():
        display.message(f"validation{_of(name)} of the average at iteration {iteration}: lm loss {loss:.4f}")
    if writer and mains:
        writer.write_average_validation(iteration, next(iter(mains.values())), sets=_named(mains))


def _of(name: str) -> str:
    return f" {name}" if name else ""


def _named(by_set: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in by_set.items() if name}
