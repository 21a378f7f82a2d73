"""The trackers that there are: the setting that asks for each, the package it needs, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.config.training import LoggingConfig
from dsv3_megatron.metrics.trackers.mlflow_runs import MlflowTracker
from dsv3_megatron.metrics.trackers.prometheus_file import PrometheusTracker
from dsv3_megatron.metrics.trackers.tracked_values import Tracker
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread
from dsv3_megatron.metrics.trackers.wandb_runs import WandbTracker


@dataclass(frozen=True)
class TrackerKind:
    """One kind of tracker.

    Attributes:
        field: Setting of LoggingConfig that asks for it.
        module: Name that its package is imported by.
        remedy: Command that installs the package.
        make: Maker of a tracker, from the settings and the run's identity and name.
    """

    field: str
    module: str
    remedy: str
    make: Callable[[LoggingConfig, str, str], Tracker]

    @property
    def flag(self) -> str:
        """The setting as a flag of the command line."""
        return "--" + self.field.replace("_", "-")


def _wandb(log: LoggingConfig, run_id: str, run_name: str) -> Tracker:
    assert log.wandb_project and log.tensorboard_dir
    return WandbTracker(log.wandb_project, run_id, log.wandb_exp_name or run_name, entity=log.wandb_entity,
                        save_dir=log.wandb_save_dir or log.tensorboard_dir)


def _mlflow(log: LoggingConfig, run_id: str, run_name: str) -> Tracker:
    assert log.mlflow_experiment
    return MlflowTracker(log.mlflow_experiment, run_id, run_name)


def _prometheus(log: LoggingConfig, run_id: str, run_name: str) -> Tracker:
    assert log.prometheus_file
    return PrometheusTracker(log.prometheus_file, run_id, run_name)


TRACKER_KINDS = (
    TrackerKind("wandb_project", "wandb", "pip install 'wandb>=0.20'", _wandb),
    TrackerKind("mlflow_experiment", "mlflow", "pip install 'mlflow-skinny>=3.0', or mlflow for a database without a "
                "server", _mlflow),
    TrackerKind("prometheus_file", "prometheus_client", "pip install 'prometheus-client>=0.20'", _prometheus),
)


def require_tracker_packages(log: LoggingConfig) -> None:
    """Check that the package of each tracker that is asked for is installed; none is imported.

    Raises:
        ConfigError: one is not; says how to install it.
    """
    for kind in _asked(log):
        if not is_installed(kind.module):
            raise ConfigError(f"{kind.field}={getattr(log, kind.field)} needs the package {kind.module}, which is not "
                              f"installed: {kind.remedy}; or leave {kind.flag} out")


def start_trackers(log: LoggingConfig, *, run_id: str, run_name: str) -> list[TrackerThread]:
    """Start every tracker that is asked for.

    Args:
        log: Settings of the run.
        run_id: Identity of the run, the same for each start of it.
        run_name: Name for people where the settings have none.

    Raises:
        ConfigError: the package of one is not installed.
    """
    require_tracker_packages(log)
    return [TrackerThread(kind.make(log, run_id, run_name)) for kind in _asked(log)]


def _asked(log: LoggingConfig) -> Iterator[TrackerKind]:
    return (kind for kind in TRACKER_KINDS if getattr(log, kind.field))
