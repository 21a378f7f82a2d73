"""The made-up run of the tests of `metrics/`."""

from tests.unit.metrics.conftest import make_report, speed

__all__ = ["make_report", "speed"]  # fixtures
