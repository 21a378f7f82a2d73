"""Means where some batches have no token that counts, and where none has."""

from __future__ import annotations

from dsv3_megatron.guards.step_losses import StepLosses

NONE = StepLosses(None, ())


def test_means_are_over_what_counts() -> None:
    assert StepLosses.of_sums(4.0, [8.0, 2.0, 1.0]) == StepLosses(2.0, (0.5, 0.25))
    assert StepLosses.of_sums(0.0, [0.0, 0.0]) == NONE
    assert StepLosses.mean([StepLosses(2.0, (1.0,)), NONE, StepLosses(4.0, (2.0,))]) == StepLosses(3.0, (1.5,))
    assert StepLosses.mean([NONE, NONE]) == StepLosses.mean([]) == NONE


def test_names() -> None:
    assert StepLosses(1.0, (2.0,)).by_name(3.0) == {"lm loss": 1.0, "mtp_1 loss": 2.0, "balance loss": 3.0}
    assert NONE.by_name(3.0) == {"balance loss": 3.0} and NONE.by_name(None) == {}
