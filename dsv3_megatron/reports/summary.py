"""The short summary at a run's end: has the model learned more than counting tokens would tell?

    python -m dsv3_megatron.reports.summary RUN_DIR [--resume-command COMMAND] [--max-train-tokens N]

Reads RUN_DIR/tensorboard/{metrics.jsonl,config.json}, counts a unigram and a bigram model on the very tokens the
run trained on, scores both on the tokens it validated on (the first `num_sequences` of the validation data), and
prints losses, verdict, speed and where everything is. Writes RUN_DIR/loss.png and RUN_DIR/summary.json.

Exit code 0: the last validation loss is below both baselines; 1: it is not; 2: the run cannot be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.run import SECTIONS, RunConfig
from dsv3_megatron.config.streams import run_command
from dsv3_megatron.metrics.parameters import count_parameters
from dsv3_megatron.metrics.progress import compact
from dsv3_megatron.metrics.run_records import CONFIG_FILE, METRICS_FILE, RunRecords, read_records
from dsv3_megatron.process.stop import end_with_a_line
from dsv3_megatron.reports.plot import plot_run

if TYPE_CHECKING:
    from dsv3_megatron.data.ngram import NgramBaselines

MAX_TRAIN_TOKENS = 100_000_000


@dataclass(frozen=True)
class RunSummary:
    """What the summary says; losses in nats per token (None: not finite), paths as text."""

    preset: str
    num_parameters: int
    iterations: int
    train_iters: int
    consumed_tokens: int
    training_seconds: float
    first_loss: float | None
    last_loss: float | None
    num_steps_in_last_loss: int
    validation_loss: float | None
    validation_iteration: int
    unigram_loss: float
    bigram_loss: float
    num_counted_tokens: int
    num_validation_tokens: int
    is_better_than_both: bool
    tokens_per_second: float
    model_flops_per_second: float
    num_skipped: int
    checkpoint: str | None
    plot: str
    tensorboard: str
    resume_command: str


def read_run_config(path: Path) -> RunConfig:
    """The resolved configuration a run wrote beside its logs.

    Raises:
        ValueError: the file is missing, or is not one of ours.
    """
    try:
        values = read_json(path)
        return RunConfig(preset=values["preset"], from_hf=values.get("from_hf"), **{
            name: cls(**values[name]) for name, cls in SECTIONS.items()
            if name in values or name not in ("guards", "policy")})
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give the folder of a run, with tensorboard/{CONFIG_FILE} in it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run's configuration: {error!r}; a run writes it when it starts") from None


def measure_baselines(run: RunConfig, num_train_sequences: int, num_valid_sequences: int,
                      phase: str | None = None) -> NgramBaselines:
    """Count on the first training sequences of the run's order, score on the first validation sequences.

    Args:
        run: The run.
        num_train_sequences: Sequences to count on, of the run's first dataset.
        num_valid_sequences: Sequences to score on.
        phase: Name of the phase whose dataset is read; None: the first.

    Raises:
        ValueError: the data cannot be read, or there is no validation data.
    """
    from dsv3_megatron.data.batches import read_token_sequences
    from dsv3_megatron.data.datasets import build_datasets, dataset_config
    from dsv3_megatron.data.ngram import measure_ngram_baselines

    config = dataset_config(run)
    data = build_datasets(config)
    recipe = run.recipe()
    span = next((recipe.span_of(planned) for planned in recipe.phases if planned.name == phase), recipe.spans[0])
    valid = build_datasets(dataset_config(run, span)).valid if span.index else data.valid
    if valid is None:
        raise ValueError("the run has no validation data to score the baselines on; set valid_data_path or split")
    return measure_ngram_baselines(
        read_token_sequences(data.train, 0, min(num_train_sequences, len(data.train))),
        read_token_sequences(valid, 0, min(num_valid_sequences, len(valid))),
        vocab_size=run.model.vocab_size,
        eod_id=config.eod_id if config.eod_mask_loss else None,
    )


def resume_command(run: RunConfig, run_dir: Path, iterations: int) -> str:
    """The command that goes on with the run; one that is finished goes on to twice its length.

    It does so at the learning rate that its decay has reached: a decay over twice the length would lead from another
    past, back up.
    """
    config = run_dir / "tensorboard" / CONFIG_FILE
    load = run.checkpoint.save or str(run_dir / "checkpoints")
    words = ["bash", "examples/pretrain_dsv3.sh", "--config", str(config), "--load", load]
    training = run.training
    if iterations >= training.train_iters and not training.phases:
        words += ["--train-iters", str(2 * training.train_iters)]
        if training.lr_decay_style != "constant":
            words += ["--lr-decay-iters", str(training.lr_decay_iters or training.train_iters)]
        if run.checkpoint.export_hf:  # a finished export is not written over
            words += ["--export-hf", f"{run.checkpoint.export_hf.rstrip('/')}_{2 * training.train_iters}"]
    return shlex.join(words)


def newest_checkpoint(run: RunConfig, run_dir: Path) -> str | None:
    """The folder of the newest checkpoint, `iter_` and its number, or None."""
    folder = Path(run.checkpoint.save) if run.checkpoint.save else run_dir / "checkpoints"
    if not folder.is_dir():
        return None
    found = {int(path.name[5:]): path for path in folder.glob("iter_*") if path.is_dir() and path.name[5:].isdigit()}
    return str(found[max(found)]) if found else None


def read_run_records(path: Path) -> RunRecords:
    """The metrics of a run that took a step and validated.

    Raises:
        ValueError: the file is missing or damaged, or holds no step with a finite loss, or no validation.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: the run took no step")
    records = read_records(path)
    if not records.column("lm_loss"):
        raise ValueError(f"{path} holds no step with a finite loss")
    if not records.validations:
        raise ValueError(f"{path} holds no validation; set eval_interval above 0 and no larger than train_iters")
    return records


def summarize(run_dir: Path, *, max_train_tokens: int = MAX_TRAIN_TOKENS, resume: str | None = None) -> RunSummary:
    """Read a run, measure its baselines, draw its plot, write its summary.json.

    Args:
        run_dir: Folder of the run.
        max_train_tokens: Count the n-grams on no more tokens than that, for runs that would not fit in memory.
        resume: The command that resumes, if the launcher knows better.

    Raises:
        ValueError: the run has no step, no validation or no readable data.
    """
    logs = run_dir / "tensorboard"
    run = read_run_config(logs / CONFIG_FILE)
    records = read_run_records(logs / METRICS_FILE)
    num_train = min(records.steps[-1]["consumed_samples"], max(1, max_train_tokens // run.training.seq_length))
    num_valid = records.validations[-1]["num_sequences"] or run.training.eval_iters * run.training.global_batch_size
    baselines = measure_baselines(run, num_train, num_valid, records.steps[-1].get("phase"))
    summary = _collect(run, run_dir, records, baselines, resume)
    title = f"{run.name}: {compact(summary.num_parameters)} parameters, {compact(summary.consumed_tokens)} tokens"
    plot_run(records, summary.plot, title=title,
             baselines={"unigram": baselines.unigram_nats, "bigram": baselines.bigram_nats})
    (run_dir / "summary.json").write_text(json_text(dataclasses.asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _collect(run: RunConfig, run_dir: Path, records: RunRecords, baselines: NgramBaselines,
             resume: str | None) -> RunSummary:
    num_last = max(1, min(10, len(records.steps) // 10))
    last_losses = [record["lm_loss"] for record in records.steps[-num_last:]]
    last_step, validation = records.steps[-1], records.validations[-1]
    validation_loss = validation["lm_loss"]
    rate = statistics.median(record["tokens_per_second"] for record in records.steps)
    return RunSummary(
        preset=run.name,
        num_parameters=count_parameters(run.model).total,
        iterations=last_step["iteration"],
        train_iters=run.recipe().num_steps,
        consumed_tokens=last_step["consumed_tokens"],
        training_seconds=sum(record["step_time_s"] for record in records.steps),
        first_loss=records.steps[0]["lm_loss"],
        last_loss=None if None in last_losses else statistics.fmean(last_losses),
        num_steps_in_last_loss=num_last,
        validation_loss=validation_loss,
        validation_iteration=validation["iteration"],
        unigram_loss=baselines.unigram_nats,
        bigram_loss=baselines.bigram_nats,
        num_counted_tokens=baselines.num_train_tokens,
        num_validation_tokens=baselines.num_valid_tokens,
        is_better_than_both=(validation_loss is not None
                             and validation_loss < min(baselines.unigram_nats, baselines.bigram_nats)),
        tokens_per_second=rate,
        model_flops_per_second=statistics.median(record["model_flops_per_second"] for record in records.steps),
        num_skipped=sum(bool(record["skipped"]) for record in records.steps),
        checkpoint=newest_checkpoint(run, run_dir),
        plot=str(run_dir / "loss.png"),
        tensorboard=str(run_dir / "tensorboard"),
        resume_command=resume or resume_command(run, run_dir, last_step["iteration"]),
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_summary(summary: RunSummary) -> str:
    """The summary as text for a terminal."""
    def loss(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    def against(baseline: float) -> str:
        if summary.validation_loss is None:
            return f"{baseline:.4f}"
        margin = baseline - summary.validation_loss
        return f"{baseline:.4f}  the model is {'better' if margin > 0 else 'WORSE'} by {abs(margin):.4f}"

    counted = "the tokens it trained on" if summary.num_counted_tokens >= summary.consumed_tokens else (
        f"the first {compact(summary.num_counted_tokens)} tokens it trained on")
    verdict = ("the model beats both baselines" if summary.is_better_than_both
               else "the model does NOT beat both baselines")
    of_all = "" if summary.iterations >= summary.train_iters else f" of {summary.train_iters}"
    skipped = f", {summary.num_skipped} skipped" if summary.num_skipped else ""
    rows = [
        ("run", f"{summary.preset}, {compact(summary.num_parameters)} parameters, {summary.iterations}{of_all} steps"
                f"{skipped}, {compact(summary.consumed_tokens)} tokens in {_duration(summary.training_seconds)}"),
        ("training loss", f"{loss(summary.first_loss)} -> {loss(summary.last_loss)} "
                          f"(first step -> mean of the last {summary.num_steps_in_last_loss})"),
        ("validation loss", f"{loss(summary.validation_loss)}  at step {summary.validation_iteration}, on "
                            f"{compact(summary.num_validation_tokens)} tokens"),
        ("  unigram model", against(summary.unigram_loss)),
        ("  bigram model", against(summary.bigram_loss)),
        ("", f"(both counted on {counted}, scored on the same validation tokens)"),
        ("verdict", verdict),
        ("speed", f"{summary.tokens_per_second:,.0f} tokens/s, {summary.model_flops_per_second / 1e12:.3g} TFLOP/s "
                  "(median step)"),
        ("checkpoint", summary.checkpoint or "none was saved"),
        ("loss plot", summary.plot),
        ("TensorBoard", f"tensorboard --logdir {shlex.quote(summary.tensorboard)}"),
        ("resume", summary.resume_command),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_megatron.reports.summary",
                                     description="Print the summary of a run and judge it against counting tokens.")
    parser.add_argument("run_dir", type=Path, help="folder with tensorboard/metrics.jsonl and tensorboard/config.json")
    parser.add_argument("--resume-command", help="the command that resumes the run; derived if not given")
    parser.add_argument("--max-train-tokens", type=int, default=MAX_TRAIN_TOKENS,
                        help="count the n-grams on at most so many tokens (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        summary = summarize(options.run_dir, max_train_tokens=options.max_train_tokens, resume=options.resume_command)
    except ValueError as error:
        print(f"summary: {error}", file=sys.stderr)
        return 2
    print(format_summary(summary))
    return 0 if summary.is_better_than_both else 1


if __name__ == "__main__":
    run_command(lambda: end_with_a_line(main, "nothing was changed"))
