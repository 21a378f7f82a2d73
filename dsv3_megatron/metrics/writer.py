"""Writes what a run measures: TensorBoard's event files, `metrics.jsonl` and `config.json`, all in one folder.

Trackers that are asked for (`trackers/`) get what TensorBoard gets.

Scalars have Megatron-LM's names where it has them (`lm loss`, `mtp_1 loss`, `seq_load_balancing_loss`, `grad-norm`,
`learning-rate`, `batch-size`, `iteration-time`, `throughput`, `lm loss validation`), so that its dashboards read them.
What cannot be written for a while, because a disk is full, is kept and written later: logs end no run.
All tags are in `tags.py`. TensorBoard gets the scalars of logged steps (the first and every log_interval-th), and
histograms and heat maps of every picture_interval-th of those; `metrics.jsonl` gets every step.

Usage (every process makes one; only the enabled one touches the disk):
    writer = MetricsWriter(directory, speed, log_interval=10, resumed_iteration=0, enabled=rank == 0)
    writer.write_config(run_config.as_dict())
    writer.write_step(report)
    writer.write_validation(iteration, lm_loss)
    writer.close()
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.metrics.balance import max_violation
from dsv3_megatron.metrics.flops import RunSpeed
from dsv3_megatron.metrics.kept_file import KeptFile, KeptText
from dsv3_megatron.metrics.run_records import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RunRecords,
    StepReport,
    is_logged,
    to_line,
    truncate_records,
)
from dsv3_megatron.metrics.scalars import step_scalars
from dsv3_megatron.metrics.trackers.tracker_thread import TrackerThread

__all__ = ["MetricsWriter", "StepReport"]

_LOGGER = logging.getLogger(__name__)


def step_record(report: StepReport, speed: RunSpeed) -> dict[str, Any]:
    """One step as a line of metrics.jsonl; expert loads as their max-violation, by layer and averaged."""
    rates = speed.rates(report.batch_size, report.step_time_s)
    violations = {layer: max_violation(counts) for layer, counts in report.expert_load.items()}
    return {
        "kind": "step",
        "iteration": report.iteration,
        "consumed_samples": report.consumed_samples,
        "consumed_tokens": report.consumed_tokens,
        "lm_loss": report.lm_loss,
        "mtp_losses": report.mtp_losses,
        "balance_loss": report.balance_loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "batch_size": report.batch_size,
        "seq_length": report.seq_length,
        "mtp_weight": report.mtp_weight,
        "bias_update_rate": report.bias_update_rate,
        "phase": report.phase,
        "step_time_s": report.step_time_s,
        "tokens_per_second": rates.tokens_per_second,
        "model_flops_per_second": rates.model_flops_per_second,
        "mfu": rates.mfu,
        "max_violation": sum(violations.values()) / len(violations) if violations else None,
        "layer_max_violation": {layer: round(violation, 4) for layer, violation in violations.items()},
        "skipped": report.skipped,
        "spike": report.is_spike,
        "num_rollbacks": report.num_rollbacks,
        **report.extras,
    }


class MetricsWriter:
    """The one writer of a run's metrics folder. Where not enabled, every method does nothing.

    Args:
        directory: Folder for event files, metrics.jsonl and config.json; created.
        speed: Turns step times into rates.
        num_layers: Transformer layers of the main model; layers beyond are MTP modules.
        log_interval: Steps between TensorBoard points.
        picture_interval: Such points between heat maps and histograms.
        resumed_iteration: Last step of the checkpoint the run starts from, 0 for a new run. What an earlier
            run logged beyond it is dropped: those steps are taken again.
        enabled: True on exactly one process.
        trackers: Trackers that get what TensorBoard gets; closed with the writer.

    Raises:
        ConfigError: metrics.jsonl in the folder cannot be read.
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, directory: str | Path, speed: RunSpeed, *, num_layers: int, log_interval: int = 1,
                 picture_interval: int = 1, resumed_iteration: int = 0, enabled: bool = True,
                 trackers: Sequence[TrackerThread] = ()) -> None:
        self.directory = Path(directory)
        self.enabled = enabled
        self._speed = speed
        self._log_interval = log_interval
        self._picture_interval = picture_interval
        self._num_skipped = 0
        self._sinks: Any = None
        self._file: KeptFile | None = None
        self._texts: list[KeptText] = []
        if not enabled:
            return
        path = self.directory / METRICS_FILE
        try:
            kept, num_dropped = truncate_records(path, resumed_iteration)
        except OSError as error:
            kept, num_dropped = RunRecords([], []), 0
            _LOGGER.warning("%s cannot be shortened to iteration %d: %s; the steps after it will be there twice", path,
                            resumed_iteration, error.strerror)
        if num_dropped:
            _LOGGER.info("%s: dropped %d lines beyond iteration %d", path, num_dropped, resumed_iteration)
        self._num_skipped = sum(bool(record.get("skipped")) for record in kept.steps)
        self._file = KeptFile(path, has_lines=True)
        from dsv3_megatron.metrics.event_writer import EventWriter  # slow to import, and only one process needs it
        from dsv3_megatron.metrics.pictures import Pictures
        from dsv3_megatron.metrics.sinks import MetricSinks

        self._sinks = MetricSinks(EventWriter(self.directory, purge_step=resumed_iteration + 1), trackers)
        self._pictures = Pictures(self._sinks, num_layers)

    def write_config(self, config: Mapping[str, Any], *, environment: Mapping[str, Any] | None = None) -> None:
        """Write the resolved configuration: config.json, and as text in TensorBoard.

        Args:
            config: `RunConfig.as_dict()`, and nothing else: the file is read back by `--config`.
            environment: What the run found rather than was told (device, world size, precision that `auto` became);
                goes to environment.json.
        """
        if not self.enabled:
            return
        for name, file, values in (("config", CONFIG_FILE, config), ("environment", ENVIRONMENT_FILE, environment)):
            if values is not None:
                self._texts.append(KeptText(self.directory / file))
                self._texts[-1].write(json_text(values, indent=2) + "\n")
                self._sinks.add_document(name, values)
        self._sinks.flush()

    def change_speed(self, speed: RunSpeed) -> None:
        """Turn the times of the steps from here on into rates with another sequence length."""
        self._speed = speed

    def write_step(self, report: StepReport) -> None:
        """Append the step to metrics.jsonl; to TensorBoard too if it is a logged one."""
        if not self.enabled:
            return
        self._num_skipped += report.skipped
        self._append(step_record(report, self._speed))
        for text in self._texts:
            text.flush()
        if not is_logged(report.iteration, self._log_interval):
            return
        for name, value in step_scalars(report, self._speed).items():
            self._sinks.add_scalar(name, value, report.iteration)
        for name, count in (("skipped-iterations", self._num_skipped), ("spikes", report.num_spikes),
                            ("rollbacks", report.num_rollbacks)):
            self._sinks.add_scalar(name, count, report.iteration)
        self._pictures.note(report)
        if is_logged(report.iteration, self._log_interval * self._picture_interval):
            self._pictures.write(report)
        self._sinks.flush()

    def write_validation(self, iteration: int, lm_loss: float, *, mtp_losses: Sequence[float] = (),
                         num_sequences: int | None = None,
                         sets: Mapping[str, tuple[float, Sequence[float]]] | None = None) -> None:
        """Log a validation after `iteration` steps.

        Args:
            iteration: Steps taken.
            lm_loss: Nats per token, mean over the validated tokens.
            mtp_losses: One per MTP depth, nats per token.
            num_sequences: Sequences it was measured on; the summary evaluates its baselines on as many.
            sets: Losses of each validation set that has a name, `lm_loss` and `mtp_losses`; the ones above are those of
                the first.
        """
        if not self.enabled:
            return
        record: dict[str, Any] = {"kind": "validation", "iteration": iteration, "lm_loss": lm_loss,
                                  "mtp_losses": list(mtp_losses), "num_sequences": num_sequences}
        if sets:
            record["sets"] = {name: {"lm_loss": loss, "mtp_losses": list(mtp)} for name, (loss, mtp) in sets.items()}
        self._append(record)
        named = ((f"/{name}", *own) for name, own in (sets or {}).items())
        for ending, loss, mtp in (("", lm_loss, mtp_losses), *named):
            self._sinks.add_scalar(f"lm loss validation{ending}", loss, iteration)
            self._sinks.add_scalar(f"lm loss validation ppl{ending}", math.exp(min(20.0, loss)), iteration)
            for depth, mtp_loss in enumerate(mtp, start=1):
                self._sinks.add_scalar(f"mtp_{depth} loss validation{ending}", mtp_loss, iteration)
        self._sinks.flush()

    def write_average_validation(self, iteration: int, lm_loss: float, *, sets: Mapping[str, float] | None = None
                                 ) -> None:
        """Log the loss of the weights' moving average on the validation data, and on each named set, nats per token."""
        if not self.enabled:
            return
        self._sinks.add_scalar("lm loss validation average", lm_loss, iteration)
        for name, loss in (sets or {}).items():
            self._sinks.add_scalar(f"lm loss validation average/{name}", loss, iteration)
        self._sinks.flush()

    def write_answers(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Log what answers to the prompts that are kept apart are worth, by tag, after `iteration` steps."""
        if not self.enabled:
            return
        self._append({"kind": "validation", "iteration": iteration, **numbers})
        for name, value in numbers.items():
            self._sinks.add_scalar(f"{name} validation", value, iteration)
        self._sinks.flush()

    def close(self) -> None:
        """Write what is buffered and release the files; may be called twice."""
        if self._file is not None:
            for text in self._texts:
                text.flush()
            self._file.close()
            self._sinks.close()
            self._file = None

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, "write after close"
        self._file.append(to_line(record).encode())
        self._file.flush()
