"""The summary of a made-up run on real files: the tokens it counts, its verdict, its errors."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.checkpoint.folder import RunProgress, begin_save, finish_save
from dsv3_megatron.checkpoint.resume import plan_resumption
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.batches import BatchIterator, read_token_sequences
from dsv3_megatron.data.datasets import build_datasets, dataset_config
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.ngram import NgramBaselines, measure_ngram_baselines
from dsv3_megatron.metrics.flops import RunSpeed, flops_per_token
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.metrics.writer import MetricsWriter
from dsv3_megatron.reports.summary import (
    format_summary,
    main,
    measure_baselines,
    read_run_config,
    resume_command,
    summarize,
)

VOCAB, SEQ_LENGTH, BATCH, STEPS, EVAL_ITERS = 50, 32, 4, 12, 2


def write_tokens(prefix: Path, seed: int) -> None:
    """Documents in which each token is often the last one + 7: a bigram model does better than a unigram model."""
    rng = np.random.default_rng(seed)
    with DatasetWriter(prefix, vocab_size=VOCAB) as writer:
        for _ in range(80):
            steps = np.where(rng.random(90) < 0.7, 7, rng.integers(0, VOCAB, 90))
            writer.add_documents(np.cumsum(steps) % VOCAB, np.array([90]))


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second: one test here draws, test_plot.py tests the drawing."""
    monkeypatch.setattr("dsv3_megatron.reports.summary.plot_run", lambda *_, **__: None)


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    write_tokens(tmp_path / "data" / "train", 0)
    write_tokens(tmp_path / "data" / "valid", 1)
    return preset("tiny").override(
        vocab_size=VOCAB, seq_length=SEQ_LENGTH, global_batch_size=BATCH, micro_batch_size=2, train_iters=STEPS,
        eval_iters=EVAL_ITERS, data_path=[str(tmp_path / "data" / "train")],
        valid_data_path=[str(tmp_path / "data" / "valid")], save=str(tmp_path / "checkpoints"))


@pytest.fixture
def make_run(tmp_path: Path, run_config: RunConfig, make_report: Callable[..., StepReport]) -> Iterator[
        Callable[..., Path]]:
    def make(validation_loss: float, *, num_sequences: int | None = BATCH * EVAL_ITERS, last_loss: float = 1.0) -> Path:
        speed = RunSpeed(SEQ_LENGTH, flops_per_token(run_config.model, SEQ_LENGTH))
        writer = MetricsWriter(tmp_path / "tensorboard", speed, num_layers=run_config.model.num_layers)
        writer.write_config(run_config.as_dict())
        for step in range(1, STEPS + 1):
            writer.write_step(make_report(step, consumed_samples=BATCH * step, batch_size=BATCH,
                                          consumed_tokens=BATCH * SEQ_LENGTH * step,
                                          lm_loss=last_loss if step == STEPS else 4.0 / step))
        writer.write_validation(STEPS // 2, 0.01, num_sequences=num_sequences)
        writer.write_validation(STEPS, validation_loss, num_sequences=num_sequences)
        writer.close()
        return tmp_path

    yield make


def expected_baselines(run: RunConfig) -> NgramBaselines:
    """Counted on what the trainer's iterator hands out, step by step, over two data-parallel ranks."""
    data = build_datasets(dataset_config(run))
    rows = []
    for rank in range(2):
        batches = BatchIterator(data.train, micro_batch_size=2, global_batch_size=BATCH, data_parallel_rank=rank,
                                data_parallel_size=2)
        for batch in batches:
            rows.append(np.concatenate([batch.tokens_BS.numpy(), batch.labels_BS.numpy()[:, -1:]], axis=1))
            if len(rows) == STEPS * (rank + 1):
                break
    assert data.valid is not None
    train = np.concatenate(rows)
    order = np.lexsort(train.T)  # the held-out share of the tuning depends on the order: restore it
    consumed = read_token_sequences(data.train, 0, BATCH * STEPS)
    assert np.array_equal(train[order], consumed[np.lexsort(consumed.T)])
    return measure_ngram_baselines(consumed, read_token_sequences(data.valid, 0, BATCH * EVAL_ITERS), vocab_size=VOCAB)


@pytest.mark.usefixtures("no_plot")
def test_baselines_are_counted_on_what_the_run_consumed(make_run: Callable[..., Path], run_config: RunConfig) -> None:
    summary = summarize(make_run(2.0))
    expected = expected_baselines(run_config)
    assert (summary.unigram_loss, summary.bigram_loss) == (expected.unigram_nats, expected.bigram_nats)
    assert expected.bigram_nats < expected.unigram_nats
    assert summary.num_counted_tokens == summary.consumed_tokens == BATCH * STEPS * SEQ_LENGTH
    assert summary.num_validation_tokens == BATCH * EVAL_ITERS * SEQ_LENGTH


def test_baselines_are_scored_on_what_the_loss_counts(run_config: RunConfig) -> None:
    """A run that masks the loss after an EOD is not compared with the loss there."""
    masked = run_config.override(eod_mask_loss=True)
    for prefix in run_config.data.data_path + run_config.data.valid_data_path:
        with DatasetWriter(prefix, vocab_size=VOCAB, options={"append_eod": True, "eod_id": 3},
                           is_overwrite_allowed=True) as writer:
            writer.add_documents(np.tile([5, 9, 17, 24, 3], 600), np.full(600, 5))
    data = build_datasets(dataset_config(masked))
    assert data.valid is not None
    num_sequences = BATCH * EVAL_ITERS
    num_counted = sum(data.valid[index]["loss_mask"].sum().item() for index in range(num_sequences))
    assert measure_baselines(run_config, 8, num_sequences).num_valid_tokens == SEQ_LENGTH * num_sequences
    assert measure_baselines(masked, 8, num_sequences).num_valid_tokens == num_counted < SEQ_LENGTH * num_sequences


def test_verdict_and_exit_code(make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(0.5)
    for name in ("iter_0000006", "iter_0000012", "iter_0000099.tmp", "other"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
    assert main([str(run_dir), "--resume-command", "again please"]) == 0
    out = capsys.readouterr().out
    assert "the model beats both baselines" in out and "WORSE" not in out
    assert "training loss    4.0000 -> 1.0000" in out
    assert f"checkpoint       {run_dir / 'checkpoints' / 'iter_0000012'}" in out
    assert f"tensorboard --logdir {run_dir / 'tensorboard'}" in out
    assert out.rstrip().endswith("resume           again please")
    assert (run_dir / "loss.png").stat().st_size > 10_000
    saved = json.loads((run_dir / "summary.json").read_text())
    assert saved["is_better_than_both"] is True and saved["validation_loss"] == 0.5
    assert saved["bigram_loss"] > 0.5


@pytest.mark.usefixtures("no_plot")
def test_losing_to_one_baseline_is_exit_code_1(make_run: Callable[..., Path],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(3.0)
    assert main([str(run_dir)]) == 1
    saved = json.loads((run_dir / "summary.json").read_text())
    assert saved["bigram_loss"] < 3.0 < saved["unigram_loss"]
    out = capsys.readouterr().out
    assert "does NOT beat both baselines" in out and "better by" in out and "WORSE by" in out


@pytest.mark.usefixtures("no_plot")
def test_a_diverged_end_is_not_hidden_by_an_earlier_validation(make_run: Callable[..., Path]) -> None:
    summary = summarize(make_run(float("nan"), last_loss=float("inf")))
    assert (summary.validation_loss, summary.last_loss, summary.is_better_than_both) == (None, None, False)
    text = format_summary(summary)
    assert "-> not finite" in text and "validation loss  not finite" in text and "does NOT beat" in text


@pytest.mark.usefixtures("no_plot")
def test_fewer_tokens_are_counted_where_asked(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(0.5, num_sequences=None)
    summary = summarize(run_dir, max_train_tokens=10 * SEQ_LENGTH)
    assert summary.num_counted_tokens == 10 * SEQ_LENGTH
    assert summary.num_validation_tokens == BATCH * EVAL_ITERS * SEQ_LENGTH
    assert "counted on the first 320 tokens it trained on" in format_summary(summary)


def test_resume_command_goes_beyond_a_finished_run(tmp_path: Path, run_config: RunConfig) -> None:
    command = resume_command(run_config, Path("runs/my run"), STEPS)
    assert command == ("bash examples/pretrain_dsv3.sh --config 'runs/my run/tensorboard/config.json' --load "
                       f"{tmp_path / 'checkpoints'} --train-iters 24 --lr-decay-iters 12")
    assert "--train-iters" not in resume_command(run_config, tmp_path, STEPS - 1)


@pytest.mark.parametrize("changes", [{}, {"lr_decay_iters": 9}, {"lr_decay_style": "cosine"},
                                     {"lr_decay_style": "constant"}, {"export_hf": "out/"}])
def test_the_resume_command_goes_on_where_the_learning_rate_is(tmp_path: Path, run_config: RunConfig,
                                                               changes: dict[str, Any]) -> None:
    """Parsed and planned as printed, and printed again by the run that it makes, and so on."""
    run, steps, tokens = run_config.override(lr_warmup_iters=3, **changes), STEPS, BATCH * SEQ_LENGTH * STEPS
    last = run.recipe().step(STEPS - 1, tokens - BATCH * SEQ_LENGTH)
    assert last is not None and last.learning_rate <= run.training.lr
    schedules = plan_resumption(run, None).schedules_at(STEPS)
    for _ in range(2):
        (begin_save(run.checkpoint.save, steps) / "__0_0.distcp").write_text("tensors")
        finish_save(run.checkpoint.save, RunProgress(steps, BATCH * steps, tokens, {}, schedules), run.as_dict(),
                    versions={}, world_size=1, precision="fp32")
        (tmp_path / "tensorboard").mkdir(exist_ok=True)
        (tmp_path / "tensorboard" / "config.json").write_text(json.dumps(run.as_dict()))
        command = parse_command(shlex.split(resume_command(run, tmp_path, steps))[2:])
        resumption = plan_resumption(command.run, command.run.checkpoint.load)
        end = run.training.lr if changes.get("lr_decay_style") == "constant" else run.training.min_lr
        for step in range(steps, 2 * steps):
            plan = resumption.recipe.step(step, BATCH * SEQ_LENGTH * step)
            assert plan is not None and plan.learning_rate == pytest.approx(end)
        assert resumption.recipe.step(2 * steps, BATCH * SEQ_LENGTH * 2 * steps) is None
        assert run.checkpoint.export_hf is None or command.run.checkpoint.export_hf != run.checkpoint.export_hf
        run, steps, tokens = resumption.run, 2 * steps, 2 * tokens
        schedules = resumption.schedules_at(steps)


def test_configuration_round_trip(make_run: Callable[..., Path], run_config: RunConfig) -> None:
    assert read_run_config(make_run(1.0) / "tensorboard" / "config.json") == run_config


def test_unreadable_runs(tmp_path: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    def error(folder: Path) -> str:
        assert main([str(folder)]) == 2
        return capsys.readouterr().err

    assert "config.json is missing: give the folder of a run" in error(tmp_path / "absent")
    run_dir = make_run(1.0)
    metrics = run_dir / "tensorboard" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"validation"' not in line))
    assert "holds no validation; set eval_interval above 0" in error(run_dir)
    metrics.write_text("")
    assert "holds no step with a finite loss" in error(run_dir)
    metrics.unlink()
    assert "the run took no step" in error(run_dir)
    (run_dir / "tensorboard" / "config.json").write_text('{"preset": "tiny"}')
    assert "is not a run's configuration: KeyError('model')" in error(run_dir)


def test_run_without_data(make_run: Callable[..., Path], run_config: RunConfig,
                          capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(1.0)
    config = run_config.override(valid_data_path=[], split="1,0,0").as_dict()
    (run_dir / "tensorboard" / "config.json").write_text(json.dumps(config))
    assert main([str(run_dir)]) == 2
    assert "no validation data to score the baselines on" in capsys.readouterr().err
