"""Recorded messages, played back by hand-made times."""

from __future__ import annotations

import pytest

from tools.bench.recorded_link import Event, seconds_over

# Posted at 1 s and waited for at 3 s, while another is posted at 2 s and waited for at 3.5 s; 4 s in all.
EVENTS = [Event(1.0, 0, 100), Event(2.0, 1, 300), Event(3.0, 0, None), Event(3.5, 1, None)]


@pytest.mark.parametrize(("speed", "seconds"), [
    (float("inf"), 4.0),
    (400.0, 4.0),  # through at 1.25 and 2.75, before anyone waits
    (100.0, 5.5),  # through at 2, then from there to 5: the second wait ends 1.5 s late
    (10.0, 41.5),  # through at 11; the second from there to 41, and half a second of work behind it
])
def test_a_wait_lasts_until_the_message_is_through(speed: float, seconds: float) -> None:
    assert seconds_over(EVENTS, 0.0, 4.0, speed) == pytest.approx(seconds)


def test_time_begins_at_the_start() -> None:
    later = [event._replace(processor_s=event.processor_s + 7.0) for event in EVENTS]
    assert seconds_over(later, 7.0, 11.0, 100.0) == pytest.approx(5.5)
