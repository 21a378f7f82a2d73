"""Runs that go on under other settings, as commands: what they refuse, and what they do where they are told to."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.reports.summary import read_run_config, resume_command
from tests.distributed.launch import run_command

pytestmark = pytest.mark.distributed

VOCAB = 96
FLAGS = (
    "--num-layers 2 --num-dense-layers 1 --hidden-size 32 --num-attention-heads 2 --q-lora-rank 24 --kv-lora-rank 16 "
    "--qk-nope-head-dim 8 --qk-rope-head-dim 8 --v-head-dim 8 --ffn-hidden-size 48 --num-experts 4 "
    "--moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 "
    f"--vocab-size {VOCAB} --seq-length 16 --micro-batch-size 2 --global-batch-size 8 --precision fp32 "
    "--eval-interval 0 --log-interval 1 --split 100,0,0 --lr 5e-3 --min-lr 1e-4 --lr-warmup-iters 2 "
    "--lr-decay-style cosine --train-iters 10").split()


def arguments(*changes: str) -> list[str]:
    """FLAGS, without those whose flag is given again."""
    kept = [pair for pair in zip(FLAGS[::2], FLAGS[1::2], strict=True) if pair[0] not in changes]
    return [*(word for pair in kept for word in pair), *changes]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Documents of 40 samples in all: five steps are an epoch."""
    return write(tmp_path / "train", 0)


def write(prefix: Path, seed: int) -> str:
    generator = np.random.default_rng(seed)
    with DatasetWriter(prefix, vocab_size=VOCAB) as writer:
        writer.add_documents(generator.integers(0, VOCAB, 22 * 30), np.full(22, 30))
    return str(prefix)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    """One process of training, without a launcher."""
    return run_command("dsv3_megatron", "train", *flags)


def train(*flags: str) -> str:
    result = run(*arguments(*flags))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr


def steps(folder: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["iteration"]: record for record in records if record["kind"] == "step"}


NUMBERS = ("lm_loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens", "batch_size")


def test_a_longer_run_takes_the_samples_of_the_shorter_one_first(data: str, tmp_path: Path) -> None:
    """Twelve steps are over two epochs, bit for bit those of six, which are over one, and six more."""
    flags = ("--data-path", data, "--lr-decay-style", "constant")
    train(*flags, "--train-iters", "12", "--tensorboard-dir", str(tmp_path / "whole"))
    train(*flags, "--train-iters", "6", "--save", str(tmp_path / "saved"))
    said = train(*flags, "--train-iters", "12", "--load", str(tmp_path / "saved"), "--tensorboard-dir",
                 str(tmp_path / "rest"))
    assert "train_iters=12 (checkpoint: 6): the 6 steps up to the checkpoint would have been the same" in said
    whole, rest = steps(tmp_path / "whole"), steps(tmp_path / "rest")
    assert sorted(rest) == list(range(7, 13))
    for iteration, record in rest.items():
        assert [record[name] for name in NUMBERS] == [whole[iteration][name] for name in NUMBERS]


def test_the_printed_command_goes_on_without_a_jump(data: str, tmp_path: Path) -> None:
    logs = tmp_path / "tensorboard"
    train("--data-path", data, "--train-iters", "6", "--save", str(tmp_path / "saved"), "--tensorboard-dir", str(logs))
    before = steps(logs)
    command = shlex.split(resume_command(read_run_config(logs / "config.json"), tmp_path, 6))
    assert command[:2] == ["bash", "examples/pretrain_dsv3.sh"]
    result = run(*command[2:])
    assert result.returncode == 0, result.stderr
    after = {iteration: record for iteration, record in steps(logs).items() if iteration > 6}
    assert sorted(after) == list(range(7, 13))
    assert {record["learning_rate"] for record in after.values()} == {1e-4}
    assert after[7]["learning_rate"] <= before[6]["learning_rate"]
    assert max(record["lm_loss"] for record in after.values()) < before[6]["lm_loss"] + 0.2


def test_another_batch_length_or_data_must_be_meant(data: str, tmp_path: Path) -> None:
    saved, other = tmp_path / "saved", write(tmp_path / "other", 1)
    train("--data-path", data, "--save", str(saved), "--save-interval", "5", "--keep-last", "0")
    shutil.rmtree(saved / "iter_0000010")
    (saved / "latest_checkpointed_iteration.txt").write_text("5")
    for path in saved.iterdir():  # what tells whose folder it is
        assert path.name.startswith(("iter_", "latest", "run", ".")), path
    cases = [(data, ["--global-batch-size", "4"], "global batch size of step 5 was 8, here 4"),
             (data, ["--global-batch-size", "16"], "global batch size of step 5 was 8, here 16"),
             (data, ["--seq-length", "32", "--max-position-embeddings", "32"], "seq_length of step 5 was 16, here 32"),
             (data, ["--train-iters", "20"], "learning rate of step 5 was"),
             (data, ["--train-iters", "3"], "the run would have ended after 3 steps"),
             (data, ["--seed", "5"], "seed=5 (checkpoint: 1234)"),
             (other, [], "the data are other of 22 sequences")]
    for path, changes, message in cases:
        result = run(*arguments("--data-path", path, *changes, "--load", str(saved), "--check-only"))
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.count("error:") == 1
    wanted = [5e-3 * (step / 2 if step <= 2 else 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * (step - 3) / 8)))
              for step in range(6, 11)]
    for path, changes in ((data, ["--global-batch-size", "16"]), (other, ["--allow-data-change"]),
                          (data, ["--seq-length", "32", "--max-position-embeddings", "32", "--allow-data-change"])):
        logs = tmp_path / str(len(list(tmp_path.iterdir())))
        said = train("--data-path", path, *changes, "--load", str(saved), "--tensorboard-dir",
                     str(logs), "--override-opt-param-scheduler")
        taken = steps(logs)
        assert sorted(taken) == list(range(6, 11)) and "iteration 10/10" in said
        assert [record["learning_rate"] for record in taken.values()] == pytest.approx(wanted)
        assert ("read from their first sample" in said) == ("--allow-data-change" in changes)
