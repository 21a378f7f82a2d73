"""Each tracker's setting, package and extra agree; a package that is not there is an error before anything starts."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.training import NO_LOGS, TRACKERS, LoggingConfig
from dsv3_megatron.metrics.trackers.kinds import (
    TRACKER_KINDS,
    require_tracker_packages,
    start_trackers,
)

ROOT = Path(__file__).resolve().parents[4]
FLAGS = {"wandb_project": ["--wandb-project", "p"], "mlflow_experiment": ["--mlflow-experiment", "e"],
         "prometheus_file": ["--prometheus-file", "x.prom"]}


def logging_of(field: str) -> LoggingConfig:
    return parse_command(["--tensorboard-dir", "logs", *FLAGS[field]]).run.logging


def test_each_tracker_has_a_setting_a_package_and_an_extra() -> None:
    assert tuple(kind.field for kind in TRACKER_KINDS) == TRACKERS
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for kind in TRACKER_KINDS:
        (line,) = extras[kind.field.partition("_")[0]]
        assert str(Requirement(line)) in kind.remedy


@pytest.mark.parametrize("kind", TRACKER_KINDS, ids=lambda kind: kind.module)
def test_without_its_package_the_error_says_what_to_install(kind, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        require_tracker_packages(logging_of(kind.field))
    assert str(error.value) == (
        f"{kind.field}={FLAGS[kind.field][1]} needs the package {kind.module}, which is not installed: {kind.remedy}; "
        f"or leave {kind.flag} out")
    with pytest.raises(ConfigError, match="is not installed"):
        start_trackers(logging_of(kind.field), run_id="r", run_name="n")


def test_a_run_that_asks_for_none_starts_none() -> None:
    assert start_trackers(LoggingConfig(tensorboard_dir="logs"), run_id="r", run_name="n") == []


def test_a_run_without_logs_is_one_without_trackers() -> None:
    run = parse_command(["--tensorboard-dir", "logs", *(word for words in FLAGS.values() for word in words),
                         "--wandb-entity", "us"]).run
    run.validate()
    run.override(**NO_LOGS).validate()
