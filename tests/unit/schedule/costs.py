"""Costs of a stage in plain numbers."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import strategies as st

from dsv3_megatron.schedule.plan import Plan
from dsv3_megatron.schedule.simulate import Costs

tenths = st.integers(1, 30).map(lambda number: Fraction(number, 10))


def uniform(plan: Plan, **costs) -> Costs:
    return Costs.uniform(plan.num_stages, **costs)
