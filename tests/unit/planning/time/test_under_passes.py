"""What passes hide of a step's messages, against clocks that are worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.time.step_time import step_time
from dsv3_megatron.planning.time.under_passes import TimedPlace, _waited_for_reductions, _waited_for_weights
from dsv3_megatron.planning.time.work import Setting
from tests.unit.planning.small_run import small_run

# Forward, backward, reduction, gathering.
EMBEDDING, LAYER, HEAD = TimedPlace(0, 0, 2, 1), TimedPlace(1, 2, 3, 2), TimedPlace(1, 2, 1, 1)


def test_reductions_begin_where_the_last_pass_comes_by() -> None:
    # The last pass is from 10 to 16: the head's is over at 12 + 1, the layers' from 14 on at 17 and 20, then the
    # embedding's.
    assert _waited_for_reductions([[EMBEDDING, LAYER, LAYER, HEAD]], [(10, 16)], 16) == 22 - 16
    # On a rank that is done early all are over when the last one is.
    assert _waited_for_reductions([[EMBEDDING, LAYER, LAYER, HEAD]], [(10, 16)], 22) == 0
    # Of two chunks one is done before: 8 + 3, and 16 + 3.
    assert _waited_for_reductions([[LAYER], [LAYER]], [(4, 8), (10, 16)], 16) == 3
    # One message after the other: 8 + 3 + 3.
    assert _waited_for_reductions([[LAYER], [LAYER]], [(4, 8), (6, 9)], 9) == 5


def test_weights_are_waited_for_place_by_place() -> None:
    # There at 1, 3, 5, 6; without waiting the pass is at 0, 0, 1, 2.
    assert _waited_for_weights([[EMBEDDING, LAYER, LAYER, HEAD]], [0]) == 4
    # A rank whose first pass comes later waits for nothing.
    assert _waited_for_weights([[EMBEDDING, LAYER, LAYER, HEAD]], [4]) == 0
    assert _waited_for_weights([[LAYER], [LAYER]], [2, 3]) == 1


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_each_setting_hides_its_own_messages(schedule: str) -> None:
    run = small_run(pipeline_schedule=schedule)
    for name, part in (("overlap_grad_reduce", "gradient_reduction"), ("overlap_param_gather", "weight_gathering")):
        setting = Setting(find_hardware("h800"), 64)
        under, behind = (step_time(run.override(**{name: value}), setting).update for value in (True, False))
        assert getattr(under, part) < 0.7 * getattr(behind, part)
        others = [field.name for field in dataclasses.fields(under) if field.name not in (part, "hidden")]
        assert all(getattr(under, other) == getattr(behind, other) for other in others)
