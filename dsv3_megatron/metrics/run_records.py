"""What a training step reports, and the file of reports (`metrics.jsonl`) that plots and summaries read.

One JSON object per line, strict JSON: {"kind": "step", "iteration": 1, "lm_loss": ..., ...} for each
step and {"kind": "validation", ...} for each validation. A value that is no finite number (a diverged
loss) is null, and its name is in the line's "nonfinite" list. Pure Python.

Usage:
    report = StepReport(iteration=1, ...)                 # the trainer fills one per step
    records = read_records(run_dir / "tensorboard" / "metrics.jsonl")
    records.column("lm_loss")                             # [(iteration, loss), ...]
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import parse_json
from dsv3_megatron.config.new_files import replacing
from dsv3_megatron.config.output import finite, json_text
from dsv3_megatron.metrics.measurements import Measurements

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
# The longest line has the load of every expert of a large model.
_TAIL_BYTES = 4 << 20
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; all values are over all replicas.

    Attributes:
        iteration: Optimizer steps taken so far, this one included: the first is 1.
        consumed_samples: Sequences trained on so far, this step's included.
        consumed_tokens: Tokens trained on so far, this step's included.
        lm_loss: Next-token cross-entropy in nats per token, mean over the step's tokens that count; None where none
            does.
        mtp_losses: One per MTP depth, in nats per token, not scaled by lambda; empty without MTP.
        balance_loss: Balance loss before alpha, mean over the MoE layers (as Megatron-LM logs it), or None.
        grad_norm: Global L2 norm of the gradient before clipping.
        learning_rate: Learning rate that this step was taken with.
        batch_size: Sequences of this step.
        step_time_s: Wall-clock seconds of this step.
        expert_load: Layer id (0-based over the main model, MTP depth k is num_layers + k) -> tokens
            routed to each expert in this step.
        skipped: The update was left out (NaN or Inf, or a spike that is not to be applied).
        is_spike: Loss or gradient norm are out of line with the steps before.
        num_spikes: Spikes of the whole run so far.
        num_rollbacks: Returns to a checkpoint of the whole run so far.
        seq_length: Tokens in a sequence of this step.
        mtp_weight: Weight of the MTP losses in this step, lambda; None without MTP.
        bias_update_rate: Step of the routers' biases, gamma; None without routed experts.
        phase: Name of the phase it belongs to; None in a run without phases.
        measurements: What the instruments saw; None on a step that is not logged.
        extras: Further numbers of a run with a loss of its own kind, by their tags.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    lm_loss: float | None
    mtp_losses: tuple[float, ...]
    balance_loss: float | None
    grad_norm: float
    learning_rate: float
    batch_size: int
    step_time_s: float
    expert_load: Mapping[int, list[int]] = field(default_factory=dict)
    skipped: bool = False
    is_spike: bool = False
    num_spikes: int = 0
    num_rollbacks: int = 0
    seq_length: int | None = None
    mtp_weight: float | None = None
    bias_update_rate: float | None = None
    phase: str | None = None
    measurements: Measurements | None = None
    extras: Mapping[str, float] = field(default_factory=dict)


def is_logged(iteration: int, log_interval: int) -> bool:
    """Whether a step, counted from 1, is one whose values TensorBoard gets: the first and every log_interval-th."""
    return iteration == 1 or iteration % log_interval == 0


@dataclass(frozen=True)
class RunRecords:
    """The lines of a metrics file by kind, in order."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    def column(self, name: str) -> list[tuple[int, Any]]:
        """(iteration, value) of every step that has a value under `name`; one that is not finite is none."""
        return [(r["iteration"], r[name]) for r in self.steps if r.get(name) is not None]

    def validation_column(self, name: str) -> list[tuple[int, float]]:
        """(iteration, value) of every validation that has a finite value under `name`."""
        return [(r["iteration"], r[name]) for r in self.validations if r.get(name) is not None]


def to_line(record: Mapping[str, Any]) -> str:
    """One record as a line of strict JSON, newline included; floats keep every bit."""
    nonfinite: list[str] = []
    converted = finite(record, nonfinite)
    if nonfinite:
        converted["nonfinite"] = nonfinite
    return json_text(converted, separators=(",", ":")) + "\n"


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, record) of each complete line; a last line without newline is one that a crash cut short.

    Raises:
        ConfigError: a complete line is not a record; gives file, line number and byte offset.
    """
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                record = parse_json(raw)
                if type(record["iteration"]) is not int or not isinstance(record["kind"], str):
                    raise TypeError("its iteration is no whole number, or its kind no text")
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number} (byte {offset}) is not a metrics record: {error}; delete that line to go on"
                ) from error
            yield raw.decode(), record
            offset += len(raw)


def read_records(path: str | os.PathLike[str]) -> RunRecords:
    """Read a metrics file, also while a run is still writing it.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: a complete line is not a record.
    """
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    for _, record in _whole_lines(Path(path)):
        (steps if record["kind"] == "step" else validations).append(record)
    return RunRecords(steps, validations)


def last_iteration(path: str | os.PathLike[str]) -> int:
    """The step of a metrics file's last whole line, without reading the others; 0 where there is none yet."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(parse_json(lines[-1])["iteration"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def last_losses(folder: str | os.PathLike[str] | None, iteration: int) -> tuple[float | None, float | None, int | None]:
    """Loss of a run in a step, and its last validation loss up to there with the step of that, in nats per token.

    Args:
        folder: Folder with the run's metrics file; None, or a folder without one: nothing is known.
        iteration: The step.

    Returns:
        None for what is not known: no file, no such line in it, or no finite value. A file that cannot be read is
        told of: what is made of a run must not fail by its log.
    """
    file = None if folder is None else Path(folder) / METRICS_FILE
    if file is None or not file.is_file():
        return None, None, None
    try:
        records = read_records(file)
    except (OSError, ValueError) as error:
        logger.warning("losses are not known: %s", error)
        return None, None, None
    training = [loss for step, loss in records.column("lm_loss") if step == iteration]
    validations = [(loss, step) for step, loss in records.validation_column("lm_loss") if step <= iteration]
    return (training[-1] if training else None, *(validations[-1] if validations else (None, None)))


def truncate_records(path: str | os.PathLike[str], last_iteration: int) -> tuple[RunRecords, int]:
    """Drop what lies beyond `last_iteration`: the steps a resumed run takes again.

    Shortens the file, or replaces it in one move where what is kept is not its start: a crash leaves either the old or
    the new one, and a full disk the old one.

    Returns:
        The records kept, and how many lines were dropped (a line cut short by a crash included).

    Raises:
        ConfigError: a complete line is not a record.
    """
    path = Path(path)
    if not path.exists():
        return RunRecords([], []), 0
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    kept: list[str] = []
    # Bytes of the file until the first line that is dropped; all that is kept, where none follows it.
    first_bytes, has_dropped, is_start = 0, False, True
    for line, record in _whole_lines(path):
        if record["iteration"] > last_iteration:
            has_dropped = True
            continue
        is_start = is_start and not has_dropped
        first_bytes += 0 if has_dropped else len(line.encode())
        kept.append(line)
        (steps if record["kind"] == "step" else validations).append(record)
    if is_start:
        if first_bytes < path.stat().st_size:
            os.truncate(path, first_bytes)
    else:
        _replace(path, kept)
    return RunRecords(steps, validations), num_lines - len(steps) - len(validations)


def _replace(path: Path, lines: Sequence[str]) -> None:
    with replacing(path, "w", is_durable=True, encoding="utf-8") as file:
        file.writelines(lines)
