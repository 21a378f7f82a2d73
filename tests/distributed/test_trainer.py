"""Whole runs of the trainer in several processes: resume, change of layout, signals, a rank that dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsv3_megatron.certification.routing_notes import in_steps
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.metrics.gradients import COMPONENTS
from dsv3_megatron.metrics.instruments import STEP_PARTS
from dsv3_megatron.metrics.tags import TAGS
from dsv3_megatron.process.loopback import free_port
from tests.distributed.launch import ROOT, run_ranks
from tests.routing import compare_routing, read_notes

pytestmark = pytest.mark.distributed

VOCAB = 96
MODEL = (
    "--num-layers 3 --num-dense-layers 1 --hidden-size 32 --num-attention-heads 2 --q-lora-rank 24 --kv-lora-rank 16 "
    "--qk-nope-head-dim 8 --qk-rope-head-dim 8 --v-head-dim 8 --ffn-hidden-size 48 --num-experts 4 "
    "--moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 "
    f"--vocab-size {VOCAB} --seq-length 16 --micro-batch-size 1 --global-batch-size 4 --lr 3e-3 --min-lr 3e-4 "
    "--lr-warmup-iters 5 --lr-decay-iters 20 --precision fp32 --eval-interval 0 --log-interval 1 "
    "--moe-router-bias-update-rate 0.01 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --ema-decay 0.9").split()
# Affinities, in 0..1, of fp32 runs whose sums differ in order, for each optimizer step; largest seen 3e-6 a step.
SCORE_ROUNDING = 2e-5
PP2_EP2 = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a dataset of text-like token statistics."""
    prefix = tmp_path_factory.mktemp("data") / "train"
    generator = np.random.default_rng(0)
    with DatasetWriter(str(prefix), vocab_size=VOCAB) as writer:
        lengths = generator.integers(20, 60, size=60)
        ids = generator.zipf(1.3, size=int(lengths.sum())) % VOCAB
        writer.add_documents(ids.astype(np.int64), lengths)
    return ["--data-path", str(prefix), "--split", "100,0,0"]


def steps(folder: Path) -> dict[int, dict]:
    """The step records of a run by iteration."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["iteration"]: record for record in records if record["kind"] == "step"}


def with_model(*arguments: str) -> list[str]:
    """MODEL's flags and a test's, of which a later value takes an earlier one's place: a run refuses a flag twice."""
    flags: dict[str, list[str]] = {}
    for word in (*MODEL, *arguments):
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    return [word for flag, values in flags.items() for word in (flag, *values)]


def train(num_ranks: int, *arguments: str) -> None:
    run_ranks(num_ranks, "dsv3_megatron", "train", *with_model(*arguments), timeout_s=180)


def train_noted(num_ranks: int, folder: Path, given: Path | None, *arguments: str) -> None:
    """Train with logs, and notes of the routing, in `folder`; with the choices of experts that are noted in `given`."""
    run_ranks(num_ranks, "tests.routing", str(folder / "routing"), str(given / "routing") if given else "-",
              *with_model(*arguments), "--tensorboard-dir", str(folder / "logs"), timeout_s=180)


@pytest.fixture(scope="module")
def twenty_steps(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs and the checkpoints at 10 and 20 of an uninterrupted PP2 x EP2 run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_noted(4, folder, None, *data, *PP2_EP2, "--train-iters", "20", "--save", str(folder / "checkpoints"),
                "--save-interval", "10", "--keep-last", "0")
    return folder


def written_tags(folder: Path) -> set[tuple[str, str]]:
    """Kind and name of every tag in a folder's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    kinds = {"scalars": "scalar", "images": "image", "histograms": "histogram", "tensors": "text"}
    return {(kind, name) for key, kind in kinds.items() for name in events.Tags()[key]}


def test_a_run_writes_the_tags_of_the_table_and_no_others(twenty_steps: Path) -> None:
    """All but those of a GPU, of validations (`tests/unit/metrics/test_writer.py`) and of GRPO (`test_grpo.py`)."""
    names = {"layer": ("1", "2", "3"), "group": ("0", "1"), "depth": ("1",), "component": COMPONENTS,
             "phase": STEP_PARTS}
    expected = set()
    for tag in TAGS:
        if tag.when in ("gpu", "peak", "grpo", "grpo-validation") or tag.when.startswith(("validation", "average")):
            continue
        kind = re.search("{(.*?)}", tag.name)
        for value in names[kind.group(1)] if kind else ("",):
            expected.add((tag.kind, re.sub("{.*?}", value, tag.name)))
    assert written_tags(twenty_steps / "logs") == expected


def from_step_10(folder: Path, target: Path) -> list[str]:
    """Arguments to load a copy of the run's checkpoint at step 10."""
    target.mkdir()
    shutil.copytree(folder / "checkpoints" / "iter_0000010", target / "iter_0000010")
    (target / "latest_checkpointed_iteration.txt").write_text("10")
    return ["--load", str(target)]


def test_twenty_steps_equal_ten_and_ten_bit_for_bit(twenty_steps: Path, data: list[str], tmp_path: Path) -> None:
    train(4, *data, *PP2_EP2, "--train-iters", "20", *from_step_10(twenty_steps, tmp_path / "ten"),
          "--tensorboard-dir", str(tmp_path / "logs"), "--save", str(tmp_path / "saved"))
    whole, resumed = steps(twenty_steps / "logs"), steps(tmp_path / "logs")
    assert sorted(resumed) == list(range(11, 21))
    for iteration, record in resumed.items():
        for name in ("lm_loss", "mtp_losses", "balance_loss", "grad_norm", "learning_rate", "consumed_samples"):
            assert record[name] == whole[iteration][name], (iteration, name)
    first, second = twenty_steps / "checkpoints" / "iter_0000020", tmp_path / "saved" / "iter_0000020"
    shards = sorted(path.name for path in first.glob("**/*.distcp"))
    assert shards, "the checkpoint has no tensor files"
    expected, state = load_tensors(first), load_tensors(second)
    assert expected.keys() == state.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == state[key].dtype and tensor.shape == state[key].shape, key
        assert torch.equal(tensor.flatten().view(torch.uint8), state[key].flatten().view(torch.uint8)), key


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, by key."""
    (place,) = (file.parent for file in folder.glob("**/.metadata"))
    reader = FileSystemReader(place)
    kept = reader.read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in kept.items()
             if isinstance(entry, TensorStorageMetadata)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    assert any(key.startswith("average.decoder") for key in state)
    assert any("experts" in key for key in state) and any("expert_bias" in key for key in state)
    return state


@pytest.mark.parametrize("num_ranks, layout", [(4, ["--expert-model-parallel-size", "4"]), (1, [])],
                         ids=["ep4", "one process"])
def test_another_layout_goes_on_with_equal_losses(
    twenty_steps: Path, data: list[str], tmp_path: Path, num_ranks: int, layout: list[str]
) -> None:
    train_noted(num_ranks, tmp_path, twenty_steps, *data, *layout, "--train-iters", "13",
                *from_step_10(twenty_steps, tmp_path / "ten"))
    compare_routing(in_steps(read_notes(twenty_steps / "routing"), range(11, 14)), read_notes(tmp_path / "routing"),
                    rounding=SCORE_ROUNDING, common_steps=10)
    whole, resumed = steps(twenty_steps / "logs"), steps(tmp_path / "logs")
    # fp32 sums in another order; two more optimizer steps let the difference grow a little.
    for iteration, tolerance in ((11, 2e-6), (12, 1e-5), (13, 5e-5)):
        assert resumed[iteration]["lm_loss"] == pytest.approx(whole[iteration]["lm_loss"], rel=tolerance)
        assert resumed[iteration]["mtp_losses"] == pytest.approx(whole[iteration]["mtp_losses"], rel=tolerance)


def test_isolated_documents_resume_bit_for_bit(tmp_path: Path) -> None:
    """4 steps in two pipeline stages are 2 + 2, and 2 + 2 with the second half in one process but for rounding."""
    generator = np.random.default_rng(0)
    with DatasetWriter(str(tmp_path / "train"), vocab_size=VOCAB, options={"append_eod": True, "eod_id": 1}) as writer:
        lengths = generator.integers(3, 20, size=60)
        ids = generator.zipf(1.3, size=int(lengths.sum())) % (VOCAB - 2) + 2
        ids[np.cumsum(lengths) - 1] = 1
        writer.add_documents(ids.astype(np.int64), lengths)
    arguments = ["--data-path", str(tmp_path / "train"), "--split", "100,0,0", "--reset-attention-mask",
                 "--reset-position-ids", "--eod-mask-loss", "--micro-batch-size", "2", "--train-iters", "4"]
    pp2 = ["--pipeline-model-parallel-size", "2"]

    def records(name: str, num_ranks: int, given: Path | None, *more: str) -> dict[int, dict]:
        train_noted(num_ranks, tmp_path / name, given, *arguments, *more)
        return steps(tmp_path / name / "logs")

    whole = records("whole", 2, None, *pp2, "--save", str(tmp_path / "saved"), "--save-interval", "2", "--keep-last",
                    "0")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = records("resumed", 2, None, *pp2, "--load", str(tmp_path / "saved"))
    alone = records("alone", 1, tmp_path / "whole", "--load", str(tmp_path / "saved"))
    compare_routing(in_steps(read_notes(tmp_path / "whole" / "routing"), range(3, 5)),
                    read_notes(tmp_path / "alone" / "routing"), rounding=SCORE_ROUNDING, common_steps=2)
    assert sorted(whole) == [1, 2, 3, 4] and sorted(resumed) == sorted(alone) == [3, 4]
    for iteration in (3, 4):
        for name in ("lm_loss", "mtp_losses", "balance_loss", "grad_norm", "consumed_samples"):
            assert resumed[iteration][name] == whole[iteration][name], (iteration, name)
            assert alone[iteration][name] == pytest.approx(whole[iteration][name], rel=1e-5), (iteration, name)


def launch(*arguments: str) -> subprocess.Popen:
    """Two ranks under torchrun, in a session of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "dsv3_megatron", "train", *with_model(*arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(process: subprocess.Popen, sign: str) -> str:
    """Read output until a line holds `sign`; all of it so far."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if sign in line:
            return seen
    raise AssertionError(f"{sign!r} never appeared in:\n{seen}")


def workers(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "dsv3_megatron\0train" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_sigterm_saves_and_ends_cleanly(data: list[str], tmp_path: Path) -> None:
    process = launch(*data, "--train-iters", "100000", "--lr-decay-iters", "100000", "--save", str(tmp_path / "saved"))
    try:
        seen = wait_for(process, "iteration      3/100000")
        for pid in workers(process):
            os.kill(pid, signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, seen + rest
    assert "stopped by SIGTERM after iteration" in rest
    last = (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip()
    assert f"after iteration {last}, with a checkpoint" in rest


def test_a_log_that_nobody_reads_any_more_costs_no_step(data: list[str], tmp_path: Path) -> None:
    """As with `| head` or a `tee` that has died: the run saves and ends."""
    process = launch(*data, "--train-iters", "100000", "--lr-decay-iters", "100000", "--save", str(tmp_path / "saved"))
    try:
        wait_for(process, "iteration      3/100000")
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert int((tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text()) >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_in_a_validation_saves_and_ends_all(number: signal.Signals, data: list[str],
                                                                 tmp_path: Path) -> None:
    """The validation would last for hours; a signal ends it after the batch at hand."""
    process = launch(*data, "--split", "90,10,0", "--train-iters", "100000", "--lr-decay-iters", "100000",
                     "--save", str(tmp_path / "saved"), "--eval-interval", "2", "--eval-iters", "1000000")
    try:
        seen = wait_for(process, "iteration      2/100000")
        time.sleep(1)
        os.kill(workers(process)[1], number)
        rest, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, seen + rest
    assert f"validation at iteration 2 left off: {number.name}" in rest
    assert f"stopped by {number.name} after iteration 2, with a checkpoint" in rest
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_workers_save_and_end_with_a_torchrun_that_is_killed(data: list[str], tmp_path: Path) -> None:
    process = launch(*data, "--train-iters", "100000", "--lr-decay-iters", "100000", "--save", str(tmp_path / "saved"))
    wait_for(process, "iteration      3/100000")
    ranks = workers(process)
    process.kill()
    deadline = time.monotonic() + 40
    try:
        while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert left == []
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").exists()


def test_ranks_started_by_hand_end_with_one_that_finds_something_wrong(data: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    processes = [subprocess.Popen(
        [sys.executable, "-m", "dsv3_megatron", "train", *with_model(*arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
             "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank, arguments in enumerate([data, ["--data-path", str(tmp_path / "missing")]])]
    try:
        outputs = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2]
    missing = f"data file {tmp_path}/missing.idx does not exist"
    assert f"error: {missing}" in outputs[1] and f"(rank 1 of 2, on {socket.gethostname()})" in outputs[1]
    assert f"rank 0: ends, rank 1, on {socket.gethostname()}: {missing}" in outputs[0]


def test_a_dead_rank_ends_the_run(data: list[str]) -> None:
    process = launch(*data, "--train-iters", "100000", "--lr-decay-iters", "100000")
    try:
        wait_for(process, "iteration      3/100000")
        started = time.monotonic()
        os.kill(workers(process)[1], signal.SIGKILL)
        rest, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert time.monotonic() - started < 45
    assert "Signal 9 (SIGKILL)" in rest or "exitcode  : -9" in rest
    assert rest.count("Traceback") <= 1, rest
