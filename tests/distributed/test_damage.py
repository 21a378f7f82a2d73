"""Checkpoints that are not what was written, by accident or on purpose: refused, and nothing in them runs."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_megatron.checkpoint.folder import (
    MANIFEST,
    TRACKER,
    CheckpointError,
    DamagedCheckpointError,
    iteration_path,
    read_manifest,
)
from dsv3_megatron.checkpoint.hf.names import hugging_face_tensors
from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
from dsv3_megatron.checkpoint.open import open_checkpoint
from dsv3_megatron.checkpoint.store import load_checkpoint, load_weights
from dsv3_megatron.commands.verify import main as verify
from dsv3_megatron.commands.verify import verify_checkpoint
from dsv3_megatron.data.indexed_writer import DatasetWriter
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import Training, architecture_arguments, small_run
from tests.fuzz.damaged_checkpoints import flip_bits, is_same, loaded_state, prepare
from tests.signing import sign

pytestmark = pytest.mark.distributed


def test_no_flipped_bit_is_silent(tmp_path: Path) -> None:
    """The quick part of tests/fuzz/damaged_checkpoints.py."""
    (outcomes,) = run_ranks(1, flip_bits, tmp_path / "saved", 60, 1)
    assert set(outcomes) >= {".metadata", "__0_0.distcp", "checkpoint.json", "metadata.json", "hf_file.tokenizer.json",
                             "text_form.json", TRACKER}
    assert {outcome for counts in outcomes.values() for outcome in counts} <= {"refused", "harmless"}
    assert set(outcomes["__0_0.distcp"]) == {"refused"}


# ---- what was not written by this library ----


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def change_index(folder: Path, change: Callable[[Any], Any]) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata) or metadata))


def put_entry(folder: Path, begin: str, content: bytes, relative_path: str | None = None) -> None:
    """Have the index place the first entry whose name begins so in bytes of somebody else's."""
    def change(metadata: Any) -> None:
        index = min((index for index in metadata.storage_data if index.fqn.startswith(begin)),
                    key=lambda index: (index.fqn, index.offset or ()))
        place = metadata.storage_data[index]
        file = folder / (relative_path or place.relative_path)
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(before + content)
        new = copy.copy(place)
        for name, value in (("relative_path", relative_path or place.relative_path), ("offset", len(before)),
                            ("length", len(content))):
            object.__setattr__(new, name, value)
        metadata.storage_data[index] = new

    change_index(folder, change)


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


WEIGHT, MOMENT = "decoder.layers.0.self_attention.linear_proj.weight", "optimizer.state.exp_avg."


def put_payload(place: str, folder: Path, payload: Payload) -> None:
    def set_first(mapping: dict[Any, Any]) -> None:
        mapping[next(iter(mapping))] = payload

    def add_plans(metadata: Any) -> None:
        metadata.all_local_plans = [payload]

    match place:
        case "the index":
            change_index(folder, lambda metadata: payload)
        case "an entry of the index":
            change_index(folder, lambda metadata: set_first(metadata.state_dict_metadata))
        case "a place in the index":
            change_index(folder, lambda metadata: set_first(metadata.storage_data))
        case "the planner's part of the index":
            change_index(folder, lambda metadata: setattr(metadata, "planner_data", payload))
        case "the storage's part of the index":
            change_index(folder, lambda metadata: setattr(metadata, "storage_meta", payload))
        case "the plans in the index":
            change_index(folder, add_plans)
        case "random states":
            put_entry(folder, "rng_state", saved([payload]))
        case "random states as a bare pickle":
            put_entry(folder, "rng_state", pickle.dumps([payload]))
        case "what is common":
            put_entry(folder, "common_state", saved([payload]))
        case "a weight":
            put_entry(folder, WEIGHT, saved(payload))
        case "a weight as a bare pickle":
            put_entry(folder, WEIGHT, pickle.dumps(payload))
        case "a moment":
            put_entry(folder, MOMENT, saved(payload))
        case "an older release's common.pt":
            (folder / "common.pt").write_bytes(saved(payload))
        case "a file outside":
            put_entry(folder, WEIGHT, saved(payload), "../../x.distcp")
    sign(folder)


PLACES = ("the index", "an entry of the index", "a place in the index", "the planner's part of the index",
          "the storage's part of the index", "the plans in the index", "random states",
          "random states as a bare pickle", "what is common", "a weight", "a weight as a bare pickle", "a moment",
          "an older release's common.pt", "a file outside")


def read_all(training: Training, directory: Path) -> dict[str, str]:
    """Everything that reads a checkpoint: what it says, "read" where it took it."""
    def convert() -> None:
        weights = MegatronWeights(directory)
        for tensor in hugging_face_tensors(weights.model):
            for is_master in (False, True):
                weights.byte_ranges(tensor, is_master)
                weights.read(tensor, is_master)

    def evaluate() -> None:  # generation reads the same
        open_checkpoint(str(directory))
        load_weights(directory, training.run, training.chunks, training.groups)

    readers: dict[str, Callable[[], Any]] = {
        "--load": lambda: load_checkpoint(directory, training.run, training.chunks, training.optimizer,
                                          training.groups, average=training.average),
        "evaluate": evaluate, "convert": convert, "verify": lambda: verify_checkpoint(directory, 2, 1),
        "average": lambda: load_weights(directory, training.run, training.chunks, training.groups, is_average=True)}
    said = {}
    for name, read in readers.items():
        try:
            read()
            said[name] = "read"
        except CheckpointError as error:
            said[name] = str(error)
    return said


def read_with_payloads(directory: Path, marker: Path) -> dict[str, dict[str, str]]:
    training = prepare(directory)
    result = {"none": read_all(training, directory)}
    for number, place in enumerate(PLACES):
        copied = directory.with_name(f"copy{number}")
        shutil.copytree(directory, copied)
        put_payload(place, iteration_path(copied, 2), Payload(marker))
        result[place] = read_all(training, copied)
        assert not marker.exists(), f"a payload in {place} was run"
    return result


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "run"
    (said,) = run_ranks(1, read_with_payloads, tmp_path / "saved", marker)
    assert not marker.exists()
    assert set(said.pop("none").values()) == {"read"}
    for place, answers in said.items():
        # A run needs everything; the others do not look at what they do not need.
        assert answers["--load"] != "read", place
        if place.endswith("index") or place == "a file outside" or place.startswith("a weight"):
            assert answers["evaluate"] != "read" and answers["convert"] != "read", place
    assert "names posix.mkdir, which no index of a checkpoint has" in said["the index"]["--load"]
    assert "places 'decoder.layers.0.self_attention.linear_proj.weight' in '../../x.distcp', which is no file of " \
        "this checkpoint" in said["a file outside"]["convert"]
    # The same payload is run by torch's own reader: the test can fail.
    pickle.loads((iteration_path(tmp_path / "copy0", 2) / ".metadata").read_bytes())
    assert marker.exists()


# ---- what is done about damage ----


def damage(folder: Path, offset: int) -> Path:
    file = folder / "__0_0.distcp"
    with open(file, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 4]))
    return file


def load_damaged(directory: Path) -> dict[str, str]:
    training = prepare(directory)
    original = loaded_state(training, directory)
    file = damage(iteration_path(directory, 2), 70_000)
    said = {}
    for mode in ("read", "all", "none"):
        training.run = training.run.override(verify_files=mode)
        try:
            loaded_state(training, directory)
            said[mode] = "loaded"
        except DamagedCheckpointError as error:
            said[mode] = str(error)
    damage(iteration_path(directory, 2), 70_000)
    # A checkpoint of an earlier release: no checksums, read as it is.
    manifest = iteration_path(directory, 2) / MANIFEST
    content = json.loads(manifest.read_text())
    for name in ("checksums", "manifest_checksum"):
        del content[name]
    manifest.write_text(json.dumps(content | {"format_version": 1}))
    assert read_manifest(directory).checksums is None
    training.run = training.run.override(verify_files="read")
    again = loaded_state(training, directory)
    again["said"] = original["said"]
    assert is_same(again, original)
    return said | {"file": str(file)}


def test_damage_is_named_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "saved"
    (said,) = run_ranks(1, load_damaged, directory)
    for mode in ("read", "all"):
        assert f"{said['file']} is damaged: the " in said[mode] and "bytes from offset 0 on do not have" in said[mode]
        assert f"write 1 into {directory / TRACKER} (the newest complete checkpoint there)" in said[mode]
    assert said["none"] == "loaded"
    assert verify([str(directory)]) == 0
    assert "no checksums, it is of an earlier release" in capsys.readouterr().out
    assert verify([str(directory), "--iteration", "1"]) == 0
    assert f"{directory}/iter_0000001: sound, 5 files" in capsys.readouterr().out
    damage(iteration_path(directory, 1), 80_000)
    assert verify([str(iteration_path(directory, 1))]) == 1
    assert "iter_0000001: DAMAGED\n  " in capsys.readouterr().out
    assert verify([str(directory), "--all"]) == 1
    assert verify([str(tmp_path / "nowhere")]) == 2


def test_a_run_goes_back_to_the_newest_sound_one(tmp_path: Path) -> None:
    """Past a damaged tensor and a damaged manifest; its steps are those of the run that was not disturbed."""
    with DatasetWriter(tmp_path / "data", vocab_size=128) as writer:
        writer.add_documents(np.random.default_rng(0).integers(0, 128, 4000), np.full(20, 200))
    folder = tmp_path / "saved"
    command = ("dsv3_megatron", "train", *architecture_arguments(small_run()), *(
        "--seq-length 16 --micro-batch-size 1 --global-batch-size 4 --precision fp32 --transformer-impl local "
        "--eval-interval 0 --log-interval 1 --save-interval 1 --lr-warmup-iters 0 --lr-decay-style constant "
        f"--keep-last 0 --data-path {tmp_path}/data --split 100,0,0 --tensorboard-dir {tmp_path}/logs --save {folder} "
        f"--load {folder} --train-iters").split())

    def losses() -> dict[int, float]:
        rows = map(json.loads, (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines())
        return {row["iteration"]: row["lm_loss"] for row in rows if "lm_loss" in row}

    run_ranks(1, *command, 3)
    undisturbed = losses()
    damage(iteration_path(folder, 3), 300_000)
    manifest = iteration_path(folder, 2) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"consumed_tokens": 128', '"consumed_tokens": 129'))
    found = verify_checkpoint(folder, 3, 1)["damages"], verify_checkpoint(folder, 2, 1)["damages"]
    assert "do not have their checksum" in found[0][0] and "its content does not have its checksum" in found[1][0]
    run_ranks(1, *command, 3)
    assert losses() == undisturbed and set(undisturbed) == {1, 2, 3}
    # Steps 2 and 3 were taken again, and saved.
    assert verify_checkpoint(folder, 3, 1)["damages"] == verify_checkpoint(folder, 2, 1)["damages"] == []
