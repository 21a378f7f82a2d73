"""Weights & Biases: each logged moment a row of a run, whose id is the run's own identity.

Steps are the metric `iteration`, not the library's own step: that one only grows, and the steps behind a checkpoint
are taken again after a rollback or a crash. Whether anything is sent is decided by its environment (WANDB_MODE=offline
keeps all on disk, for `wandb sync`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3_megatron.metrics.trackers.tracked_values import TrackedValues

ITERATION = "iteration"
# Seconds that a question for a key waits where a terminal is there to answer it.
_LOGIN_S = 30


class WandbTracker:
    """A run of Weights & Biases.

    Args:
        project: Project of the run.
        run_id: Identity of the run; one that went before under it is gone on with.
        run_name: Name that people see.
        entity: User or team; None: the default of whoever is logged in.
        save_dir: Folder in which the library makes its own, `wandb`.
    """

    name = "wandb"

    def __init__(self, project: str, run_id: str, run_name: str, *, entity: str | None, save_dir: str) -> None:
        self._settings: dict[str, Any] = {"project": project, "id": run_id, "name": run_name, "entity": entity,
                                          "dir": save_dir}
        self._run: Any = None
        self._library: Any = None

    def open(self) -> None:
        """Begin the run there, or go on with it."""
        import wandb

        self._library = wandb
        Path(self._settings["dir"]).mkdir(parents=True, exist_ok=True)
        # The console is not taken over: it is the run's, on every rank.
        settings = wandb.Settings(console="off", silent=True, reinit="create_new", login_timeout=_LOGIN_S)
        self._run = wandb.init(**self._settings, resume="allow", settings=settings)
        self._run.define_metric(ITERATION)
        self._run.define_metric("*", step_metric=ITERATION)

    def write(self, values: TrackedValues) -> None:
        """Hand over what was logged at one moment; documents become the run's configuration."""
        if values.documents:
            self._run.config.update(dict(values.documents), allow_val_change=True)
        if values.scalars:
            self._run.log({ITERATION: values.step, **values.scalars})
        # In a row of their own: an image is a file, which a full disk refuses before the row is there.
        pictures = {tag: self._library.Histogram(np_histogram=(list(histogram.counts), list(histogram.edges)))
                    for tag, histogram in values.histograms.items()}
        pictures |= {tag: self._library.Image(image_HWC) for tag, image_HWC in values.images_HWC.items()}
        if pictures:
            self._run.log({ITERATION: values.step, **pictures})

    def close(self) -> None:
        """Say that the run has ended."""
        self._run.finish()
