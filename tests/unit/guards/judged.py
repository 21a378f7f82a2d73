"""A guard that has seen some steps, and steps to show it."""

from __future__ import annotations

from typing import Any

from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.guards.decisions import Finding, Guard

NOTHING, SPIKE, NONFINITE = Finding.NOTHING, Finding.SPIKE, Finding.NONFINITE


def guard(**changes: Any) -> Guard:
    """A guard with a window of four ordinary steps."""
    made = Guard(GuardConfig(**{"spike_min_steps": 4, "spike_window": 8, **changes}))
    for _ in range(4):
        assert made.decide(NOTHING, 2.0, 1.0)
    return made
