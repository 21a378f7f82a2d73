"""Phases lie within one another, add up, and wait for the device where they say so."""

from __future__ import annotations

import pytest

from dsv3_megatron.metrics.step_clock import StepClock


class Time:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_phase_does_not_count_what_lies_within_it() -> None:
    time = Time()
    clock = StepClock(("outer", "inner", "innermost", "unused"), now=time)
    time.now += 7  # between steps: nobody's
    with clock.part("outer"):
        time.now += 1
        with clock.part("inner"):
            time.now += 2
            with clock.part("innermost"):
                time.now += 4
            time.now += 8
        time.now += 16
    with clock.part("inner"):
        time.now += 32
    assert clock.take() == {"outer": 17.0, "inner": 42.0, "innermost": 4.0, "unused": 0.0}
    assert set(clock.take().values()) == {0.0}


def test_taking_within_a_phase_leaves_the_rest_for_later() -> None:
    time = Time()
    clock = StepClock(("logging",), now=time)
    with clock.part("logging"):
        time.now += 3
        assert clock.take() == {"logging": 3.0}
        time.now += 5
    assert clock.take() == {"logging": 5.0}


def test_an_error_ends_its_phases() -> None:
    time = Time()
    clock = StepClock(("outer", "inner"), now=time)
    with pytest.raises(ValueError, match="stop"), clock.part("outer"), clock.part("inner"):
        time.now += 2
        raise ValueError("stop")
    time.now += 4
    assert clock.take() == {"outer": 0.0, "inner": 2.0}


def test_waiting_counts_until_an_item_is_there() -> None:
    time = Time()
    clock = StepClock(("data", "work"), now=time)

    def slow_items():
        for item in range(3):
            time.now += 10
            yield item

    seen = []
    with clock.part("work"):
        for item in clock.waiting(slow_items(), "data"):
            time.now += 1
            seen.append(item)
    assert seen == [0, 1, 2]
    assert clock.take() == {"data": 30.0, "work": 3.0}


def test_the_device_is_waited_for_at_both_ends_but_not_for_data() -> None:
    time = Time()
    calls = []

    def synchronize() -> None:
        calls.append(time.now)
        time.now += 5  # the device finishes

    clock = StepClock(("optimizer", "data"), synchronize, now=time)
    with clock.part("optimizer"):
        time.now += 1
    with clock.part("data", waits_for_device=False):
        time.now += 2
    assert len(calls) == 2
    assert clock.take() == {"optimizer": 6.0, "data": 2.0}
