"""Checkpoints of real runs: bit for bit under the same layout and any other, and nothing lost when a save fails."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from dsv3_megatron.certification.routing_notes import Notes, merge_notes
from dsv3_megatron.checkpoint.folder import (
    TRACKER,
    CheckpointError,
    RunProgress,
    iteration_path,
    latest_iteration,
    read_manifest,
    saved_iterations,
)
from dsv3_megatron.checkpoint.manifest_file import signed_text
from dsv3_megatron.checkpoint.store import load_checkpoint, save_checkpoint
from tests.distributed.launch import RankError, run_ranks
from tests.distributed.noted_runs import noted_steps
from tests.distributed.small_run import GLOBAL_BATCH, SEQ_LENGTH, Training, differences, merge, small_run, start
from tests.routing import compare_routing

pytestmark = pytest.mark.distributed

# They load and save without a step: expert-tensor parallelism, and a layout that has too few micro-batches here.
SAVES_ALONE = ("TP2xEP2xETP2", "DualPipe PP4")
PP2_EP2 = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
# Each layout loads what the one before it saved.
CHAIN: list[tuple[str, int, dict[str, Any]]] = [
    ("PP2xEP2", 4, PP2_EP2),
    ("EP4", 4, {"expert_model_parallel_size": 4}),
    ("one process", 1, {}),
    ("TP2", 2, {"tensor_model_parallel_size": 2}),
    ("interleaved PP2", 2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    ("DualPipe PP2", 2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipe"}),
    ("DP2", 2, {}),
    ("DualPipeV PP2", 2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev"}),
    ("TP2xEP2xETP2", 4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2,
                         "expert_tensor_parallel_size": 2}),
    ("PP2xTP2", 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ("PP2xEP2", 4, PP2_EP2),
]
# Layouts with the MTP module and the loss in a stage of their own, or the embedding.
ALONE: list[tuple[str, int, dict[str, Any]]] = [
    (name, ranks, {"pipeline_model_parallel_size": 2, **changes} if ranks > 1 else changes)
    for name, ranks, changes in (
        ("PP2", 2, {"pipeline_model_parallel_layout": "Etttt|mL"}),
        ("one process", 1, {}),
        ("interleaved PP2", 2, {"num_virtual_stages_per_pipeline_rank": 2,
                                "pipeline_model_parallel_layout": "E|tt|tt|mL"}),
        ("DualPipe PP2", 2, {"pipeline_schedule": "dualpipe", "pipeline_model_parallel_layout": "Etttt|mL"}),
        ("PP2xTP2", 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_layout": "Etttt|mL"}),
        ("usual PP2", 2, {}),
        ("ZBV PP2", 2, {"pipeline_schedule": "zbv", "pipeline_model_parallel_layout": "Et|tt|t|mL"}),
        ("PP2", 2, {"pipeline_model_parallel_layout": "Etttt|mL"}),
    )]
# Layouts with the MTP modules in a stage before that of the loss, where the optimizer's state of the embedding is split
# between other ranks; usual ones between them.
APART: list[tuple[str, int, dict[str, Any]]] = [
    (name, ranks, {"mtp_num_layers": 2, **changes})
    for name, ranks, changes in (
        ("PP4", 4, {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Ett|tt|mm|L"}),
        ("one process", 1, {}),
        ("PP2", 2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ettttmm|L"}),
        ("interleaved PP2", 2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2,
                                "pipeline_model_parallel_layout": "Et|tt|tmm|L"}),
        ("usual PP2xTP2", 4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
        ("ZBV PP2xDP2", 4, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv",
                            "pipeline_model_parallel_layout": "Ett|tt|mm|L"}),
        ("DualPipe PP4", 4, {"pipeline_model_parallel_size": 4, "pipeline_schedule": "dualpipe",
                             "pipeline_model_parallel_layout": "Et|tt|tmm|L", "global_batch_size": 2 * GLOBAL_BATCH}),
        ("usual DualPipeV PP2", 2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev"}),
        ("PP4", 4, {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Ett|tt|mm|L"}),
    )]
# The first stage ends within the alignment of the buffers that its parameters are in; so does the last under PP2 alone.
UNALIGNED: list[tuple[str, int, dict[str, Any]]] = [
    (name, ranks, {"q_lora_rank": 70, **changes})
    for name, ranks, changes in (
        ("PP2", 2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttmL"}),
        ("one process", 1, {}),
        ("PP2xDP2", 4, {"pipeline_model_parallel_size": 2}),
        ("PP2", 2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttmL"}),
    )]
# Everything that a checkpoint can hold besides weights and biases.
RECIPE = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "ema_decay": 0.9}
# One step's loss by another order of fp32 sums: a few units in the last place of 4.9.
FP32_ROUNDING = 2e-6


def save(training: Training, directory: Path, iteration: int, keep_last: int = 0) -> None:
    progress = RunProgress(iteration, iteration * GLOBAL_BATCH, iteration * GLOBAL_BATCH * SEQ_LENGTH)
    save_checkpoint(directory, progress, training.run, training.chunks, training.optimizer, training.groups,
                    keep_last=keep_last, average=training.average)


def load(training: Training, directory: Path) -> RunProgress:
    return load_checkpoint(directory, training.run, training.chunks, training.optimizer, training.groups,
                           average=training.average)


def continue_run(changes: dict[str, Any], source: Path | None, target: Path | None, extra_steps: int,
                 given: Notes | None = None) -> dict[str, Any]:
    """Train two steps or load, save, then train on; the state at the save, and losses, routing and state after it.

    The steps after the save take the choices of experts in `given`, if there are any.
    """
    training = start(small_run(**changes))
    if source is None:
        for number in range(2):
            training.step(number)
        torch.rand(3)
        iteration = 2
    else:
        progress = load(training, source)
        assert progress == RunProgress(2, 2 * GLOBAL_BATCH, 2 * GLOBAL_BATCH * SEQ_LENGTH)
        iteration = progress.iteration
    result: dict[str, Any] = {"saved": training.whole_state()}
    if target is not None:
        save(training, target, iteration)
    result["draw"] = torch.rand(3)
    result["losses"], result["notes"] = noted_steps(training, range(iteration, iteration + extra_steps), given)
    result["after"] = training.whole_state()
    return result


@pytest.mark.parametrize("chain", [CHAIN, ALONE, APART, UNALIGNED],
                         ids=["usual", "mtp-alone", "loss-apart", "unaligned"])
def test_resharding_keeps_every_bit(tmp_path, chain):
    expected: dict[str, torch.Tensor] = {}
    loss = float("nan")
    notes: Notes = {}
    source = None
    for number, (name, ranks, changes) in enumerate(chain):
        target = tmp_path / str(number)
        steps = 0 if name in SAVES_ALONE else 1
        results = run_ranks(ranks, continue_run, {**changes, **RECIPE}, source, target, steps, notes)
        state = merge([result["saved"] for result in results])
        if not expected:
            expected, loss = state, results[0]["losses"][0]
            notes = merge_notes([result["notes"] for result in results])
            kinds = {key.split(":")[0] for key in state}
            assert kinds == {"weight", "param", "exp_avg", "exp_avg_sq", "average", "bias"}
            assert {tensor.dtype for key, tensor in state.items() if key.startswith("exp_avg")} == {torch.bfloat16}
            assert all(state[key].abs().sum() > 0 for key in state if key.startswith("exp_avg_sq:mtp"))
            assert any(state[key].any() for key in state if key.startswith("bias:"))
        assert not differences(expected, state), f"{name} differs in {differences(expected, state)[:5]}"
        merge([result["after"] for result in results])  # replicas, and DualPipe's copies, stay equal
        if steps:
            compare_routing(notes, merge_notes([result["notes"] for result in results]), rounding=FP32_ROUNDING,
                            common_steps=2)
        for result in results:
            assert result["losses"] == pytest.approx([loss] * steps, rel=FP32_ROUNDING), name
        source = target


@pytest.mark.parametrize(("ranks", "changes"), [(4, {**PP2_EP2, **RECIPE}), (1, {"precision": "bf16"})],
                         ids=["PP2xEP2-fp32", "one-process-bf16"])
def test_resume_is_bit_for_bit(tmp_path, ranks, changes):
    straight = run_ranks(ranks, continue_run, changes, None, tmp_path, 2)
    resumed = run_ranks(ranks, continue_run, changes, tmp_path, None, 2)
    for before, after in zip(straight, resumed, strict=True):
        assert after["losses"] == before["losses"]
        assert torch.equal(after["draw"], before["draw"])
    for moment in ("saved", "after"):
        expected = merge([result[moment] for result in straight])
        assert not differences(expected, merge([result[moment] for result in resumed]))
    if "precision" in changes:
        name = next(key for key in expected if key.startswith("param:") and "linear_proj" in key)
        assert expected[name].dtype == torch.float32
        assert not torch.equal(expected[name], expected[name].bfloat16().float()), "fp32 weights were not kept"


def test_change_of_precision(tmp_path):
    """fp32 weights come back whole on every replica, from a checkpoint whose trained weights are bf16; and back.

    On the way back the moments become bf16, rounded to nearest, and the average starts anew.
    """
    written = run_ranks(1, continue_run, {"precision": "bf16"}, None, tmp_path / "bf16", 0)
    wide = run_ranks(2, continue_run, {"precision": "fp32"}, tmp_path / "bf16", tmp_path / "fp32", 0)
    narrow = run_ranks(1, continue_run, {"precision": "bf16", **RECIPE}, tmp_path / "fp32", tmp_path / "narrow", 0)
    wider = run_ranks(1, continue_run, {"precision": "bf16"}, tmp_path / "narrow", None, 0)
    expected, state = merge([written[0]["saved"]]), merge([result["saved"] for result in wide])
    for name, tensor in expected.items():
        kind, parameter = name.split(":")
        assert torch.equal(state[name], expected[f"param:{parameter}"] if kind == "weight" else tensor), name
    expected |= {name: tensor.bfloat16() for name, tensor in expected.items() if name.startswith("exp_avg")}
    state = merge([narrow[0]["saved"]])
    assert not any(state.pop(name).any() for name in list(state) if name.startswith("average"))
    assert not differences(expected, state)
    expected |= {name: tensor.float() for name, tensor in expected.items() if name.startswith("exp_avg")}
    assert not differences(expected, merge([wider[0]["saved"]]))


# ---- what is in the folder ----


def save_before_training_and_often(directory: Path) -> None:
    training = start(small_run())
    for iteration in range(5):
        save(training, directory, iteration, keep_last=2)
        if iteration == 0:
            again = load(training, directory)
            assert again.iteration == 0
        training.step(iteration)
    save(training, directory, 4, keep_last=2)


def test_keep_last_tracker_and_manifest(tmp_path):
    run_ranks(1, save_before_training_and_often, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iter_0000003", "iter_0000004", TRACKER]
    assert (tmp_path / TRACKER).read_text() == "4\n"
    content = json.loads((tmp_path / "iter_0000004" / "checkpoint.json").read_text())
    assert content["run"]["model"]["hidden_size"] == 32
    assert content["progress"] == {"iteration": 4, "consumed_samples": 16, "consumed_tokens": 256,
                                   "guards": {}, "schedules": [], "data": {}}
    assert set(content["versions"]) == {"dsv3_megatron", "torch", "megatron_core"}


# ---- crashes ----


def fill(training: Training, value: float) -> None:
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(value)


def save_until_killed(directory: Path, seed: int) -> None:
    training = start(small_run())
    fill(training, 1)
    save(training, directory, 1)
    delay = random.Random(seed).uniform(0.0, 1.5)
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for iteration in range(2, 10_000):
        fill(training, iteration)
        save(training, directory, iteration, keep_last=2)


def load_filled(directory: Path) -> int:
    training = start(small_run())
    iteration = load(training, directory).iteration
    values = {value for chunk in training.chunks for parameter in chunk.parameters()
              for value in parameter.unique().tolist()}
    assert values == {float(iteration)}
    save(training, directory, iteration + 1, keep_last=1)
    return iteration


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_saving(tmp_path, seed):
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, save_until_killed, tmp_path, seed)
    latest = latest_iteration(tmp_path)
    assert latest is not None and read_manifest(tmp_path).progress.iteration == latest
    assert run_ranks(1, load_filled, tmp_path) == [latest]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"iter_{latest + 1:07d}", TRACKER]


# ---- failures that every rank must hear of ----


def message_of(action: Any, *args: Any) -> str:
    try:
        action(*args)
    except CheckpointError as error:
        return str(error)
    return "no error"


def fail_to_save(directory: Path) -> dict[str, str]:
    """Saves that go wrong on one rank; what each rank is told."""
    training = start(small_run())
    rank = torch.distributed.get_rank()
    training.step(0)
    save(training, directory, 1)
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    told = {}
    # Rank 1 writes a part of the tensors; rank 0 finds no reason of its own.
    with mock.patch("dsv3_megatron.checkpoint.writing.os.fsync", full):
        told["writing"] = message_of(save, training, directory, 2)
    with mock.patch("dsv3_megatron.checkpoint.folder.flush", side_effect=OSError(errno.ENOSPC, "No space left")):
        told["flushing"] = message_of(save, training, directory, 3)
    # Rank 0 alone writes the index and the description, while the others wait for it in different places.
    with mock.patch.object(FileSystemWriterAsync, "finish", side_effect=OSError(errno.ENOSPC, "No space left")):
        told["index"] = message_of(save, training, directory, 3)
    with mock.patch("dsv3_megatron.checkpoint.writing.save_config",
                    side_effect=OSError(errno.ENOSPC, "No space left")):
        told["description"] = message_of(save, training, directory, 3)
    with mock.patch("dsv3_megatron.checkpoint.store.remove_old", side_effect=OSError(errno.EBUSY, "Device busy")):
        told["removing"] = message_of(save, training, directory, 4)
    told["left"] = str(sorted(path.name for path in directory.iterdir()))
    with mock.patch("dsv3_megatron.checkpoint.agreement.shutil.disk_usage", return_value=mock.Mock(free=1000)):
        told["too small"] = message_of(save, training, directory, 5)
    save(training, directory, 5)
    return told


def test_failed_save_is_told_to_every_rank(tmp_path):
    told = run_ranks(2, fail_to_save, tmp_path)
    assert told[0] == told[1]
    assert "iteration 2 could not be saved: " in told[0]["writing"]
    assert "process 1: No space left on device" in told[0]["writing"]
    assert told[0]["writing"].endswith("the newest checkpoint is still that of iteration 1")
    assert told[0]["removing"] == "no error" and "saving" not in told[0]["left"]
    for moment in ("index", "description"):
        assert "iteration 3 could not be saved: " in told[0][moment]
    for moment in ("writing", "flushing", "index", "description"):
        assert "free some space, lower keep_last, or choose another folder" in told[0][moment]
    assert "0.00 GB are free there" in told[0]["too small"]
    assert saved_iterations(tmp_path) == [1, 4, 5]
    assert latest_iteration(tmp_path) == 5


def fail_to_load(directory: Path, damaged: list[Path]) -> list[str]:
    training = start(small_run())
    return [message_of(load, training, folder) for folder in (directory, *damaged)]


def save_twice(directory: Path) -> None:
    training = start(small_run())
    for iteration in (1, 2):
        save(training, directory, iteration)


def save_without_mtp(directory: Path) -> None:
    save(start(small_run(mtp_num_layers=0)), directory, 1)


def test_damaged_checkpoints(tmp_path):
    empty, cut, zeroed, index, other = (tmp_path / name for name in ("empty", "cut", "zeroed", "index", "other"))
    empty.mkdir()
    for folder in (cut, zeroed, index):
        run_ranks(2, save_twice, folder)
    run_ranks(2, save_without_mtp, other)

    largest = max(iteration_path(cut, 2).glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    for file in iteration_path(zeroed, 2).glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    file = iteration_path(index, 2) / ".metadata"
    file.write_bytes(bytes(file.stat().st_size))
    # Its configuration says what its tensors do not hold.
    manifest = iteration_path(other, 1) / "checkpoint.json"
    content = json.loads(manifest.read_text())
    content["run"]["model"]["mtp_num_layers"] = 1
    manifest.write_text(signed_text(content))

    first, second = run_ranks(2, fail_to_load, empty, [cut, zeroed, index, other])
    assert first == second
    assert first[0] == f"load={empty} has no checkpoint: no {TRACKER} in it"
    for message, folder in zip(first[1:4], (cut, zeroed, index), strict=True):
        assert f"checkpoint {iteration_path(folder, 2)} is truncated or corrupt" in message
        assert f"write 1 into {folder / TRACKER} (the newest complete checkpoint there)" in message
    assert largest.name in first[1]
    assert "does not fit this model" in first[4] and "mtp.layers.0" in first[4]
