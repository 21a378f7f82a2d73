"""The statistic on made-up losses: silent under noise and drift, loud at spikes, the same after a resume."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.config.guards import GuardConfig
from dsv3_megatron.guards.spikes import GRAD_NORM, LOSS, SpikeDetector, upper_limit


def ordinary_run(generator: random.Random, *, steps: int, noise: float, norm_noise: float
                 ) -> list[tuple[float, float]]:
    """Losses that fall as a power law from 11 to about 2, with normal noise that shrinks with them; norms that fall
    with the loss, rise again slowly as they do in long runs, and vary log-normally, with a heavy tail."""
    values = []
    for step in range(steps):
        level = 1.8 + 9.0 * (1 + step / 20) ** -0.5
        loss = level * (1 + noise * generator.gauss(0, 1))
        slow = 0.3 + 3.0 * math.exp(-step / 100) + 0.3 * step / steps
        tail = generator.gauss(0, 1) if generator.random() < 0.95 else generator.gauss(0, 2)
        values.append((loss, slow * math.exp(norm_noise * tail)))
    return values


def flags(values: list[tuple[float, float]], config: GuardConfig) -> list[int]:
    """Steps that a detector flags; it takes in each as the run does."""
    detector, found = SpikeDetector(config), []
    for step, (loss, norm) in enumerate(values):
        spikes = detector.judge(loss, norm)
        detector.record(loss, norm, is_spike=bool(spikes))
        if spikes:
            found.append(step)
    return found


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), noise=st.floats(0.0, 0.05), norm_noise=st.floats(0.0, 0.3))
def test_noise_and_drift_are_no_spikes_and_spikes_are(seed: int, noise: float, norm_noise: float) -> None:
    generator = random.Random(seed)
    values = ordinary_run(generator, steps=400, noise=noise, norm_noise=norm_noise)
    assert flags(values, GuardConfig()) == []
    at = generator.randrange(200, 400)
    loss, norm = values[at]
    # A loss of a model that knows nothing, a gradient scaled by 1e4: whatever the noise above.
    for spike in ((loss + 9.0, norm), (loss, norm * 1e4)):
        assert flags([*values[:at], spike, *values[at + 1:]], GuardConfig()) == [at]


def test_two_thousand_ordinary_steps_are_quiet() -> None:
    for seed in range(2):
        assert flags(ordinary_run(random.Random(seed), steps=2000, noise=0.02, norm_noise=0.25), GuardConfig()) == []


def test_the_limit_is_median_and_mad_or_the_floor() -> None:
    # Deviations from 3: 2, 1, 0, 1, 97; their median is 1, and the outlier does not count.
    assert upper_limit([1, 2, 3, 4, 100], threshold=2.0, floor=0.0) == (pytest.approx(3 + 2 * 1.4826), 3)
    assert upper_limit([3.0] * 9, threshold=8.0, floor=0.25) == (3.25, 3.0)


def test_a_constant_window_fires_above_its_floors_only() -> None:
    config = GuardConfig(spike_min_steps=4, spike_window=8, spike_loss_floor=0.5, spike_grad_norm_floor=3.0)
    quiet = [(2.0, 1.0)] * 6
    assert flags([*quiet, (2.4, 2.9)], config) == []
    assert flags([*quiet, (2.6, 1.0)], config) == [6] == flags([*quiet, (2.0, 3.1)], config)
    assert flags([*quiet, (0.1, 0.0)], config) == [], "falls are no spikes"
    assert flags([(2.0, 1.0)] * 3 + [(9.0, 99.0)], config) == [], "too few steps to judge by"


def test_a_threshold_of_zero_turns_its_value_off() -> None:
    config = GuardConfig(spike_min_steps=4, spike_loss_threshold=0.0)
    detector = SpikeDetector(config)
    for _ in range(4):
        detector.record(2.0, 1.0, is_spike=False)
    assert detector.judge(50.0, 1.0) == ()
    assert [spike.name for spike in detector.judge(50.0, 50.0)] == [GRAD_NORM]
    config = GuardConfig(spike_min_steps=4, spike_grad_norm_threshold=0.0)
    detector = SpikeDetector(config)
    for _ in range(4):
        detector.record(2.0, 1.0, is_spike=False)
    (spike,) = detector.judge(50.0, 50.0)
    assert spike.name == LOSS and str(spike) == "lm loss 50 exceeds 2.25 (median 2 of the last 4 good steps)"


def test_spikes_do_not_enter_the_window_until_they_are_the_level() -> None:
    config = GuardConfig(spike_min_steps=4, spike_window=8)
    quiet, high = [(2.0, 1.0)] * 8, [(6.0, 1.0)] * 10
    # Three are spikes, the fourth makes a window of them; two and a good one do not.
    assert flags([*quiet, *high], config) == [8, 9, 10, 11]
    assert flags([*quiet, *high[:2], *quiet, *high[:2]], config) == [8, 9, 18, 19]
    detector = SpikeDetector(config)
    for value in quiet:
        assert not detector.record(*value, is_spike=False)
    assert [detector.record(*value, is_spike=True) for value in high[:4]] == [False, False, False, True]
    assert detector.window == high[:4]


@given(seed=st.integers(0, 2**32), cut=st.integers(0, 120))
@settings(max_examples=30)
def test_a_saved_state_decides_as_the_one_it_was_saved_from(seed: int, cut: int) -> None:
    config = GuardConfig(spike_min_steps=8, spike_window=16, spike_loss_threshold=2.0, spike_grad_norm_threshold=2.0,
                         spike_loss_floor=0.0, spike_grad_norm_floor=1.0)  # so tight that many steps are flagged
    values = ordinary_run(random.Random(seed), steps=120, noise=0.05, norm_noise=0.5)
    first, second = SpikeDetector(config), SpikeDetector(config)
    for step, (loss, norm) in enumerate(values):
        if step == cut:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        spikes = first.judge(loss, norm)
        first.record(loss, norm, is_spike=bool(spikes))
        if step >= cut:
            assert second.judge(loss, norm) == spikes
            second.record(loss, norm, is_spike=bool(spikes))
            assert second.state_dict() == first.state_dict()
