"""The number that the FP8 experiment reports, from curves made up here; its flags are a run's."""

from types import SimpleNamespace

import pytest

from dsv3_megatron.config.load import parse_command
from tools.experiments.fp8 import VARIANTS, relative_errors
from tools.experiments.variants import Curve


def curve(losses, variant="fp8"):
    return Curve(variant, 1, SimpleNamespace(column=lambda _: list(enumerate(losses, 1))))  # type: ignore[arg-type]


def test_errors_are_of_the_last_half_and_relative():
    mean, magnitude = relative_errors(curve([9.0, 9.0, 2.02, 0.99]), curve([1.0, 1.0, 2.0, 1.0], "no fp8"))
    assert mean == pytest.approx(0.0) and magnitude == pytest.approx(0.01)
    with pytest.raises(ValueError, match="fp8, seed 1: no step in common with no fp8"):
        relative_errors(curve([]), curve([1.0], "no fp8"))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_run_that_may_be(name):
    run = parse_command(["--preset", "tiny", *VARIANTS[name]]).run
    run.validate(1)
    assert run.fp8.is_enabled == (name not in ("no fp8", "other order"))
