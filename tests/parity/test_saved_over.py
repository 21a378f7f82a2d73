"""An export that Transformers loads, changes and saves into the same folder: nobody reads old weights from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import DeepseekV3ForCausalLM

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
from dsv3_megatron.commands import evaluate, generate
from dsv3_megatron.data.folder_checksums import CHECKSUMS
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.architectures import variant


def exported(tmp_path: Path, max_shard_bytes: int) -> Path:
    model = variant("no-mtp")
    weights = published_weights(model, torch.float32)
    source = write_checkpoint(tmp_path / "hf", config_json(model, max_position_embeddings=256), weights)
    convert_to_megatron(source, tmp_path / "ours")
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "exported", dtype="bf16", max_shard_bytes=max_shard_bytes)
    return tmp_path / "exported"


def save_over(folder: Path, **options: object) -> None:
    """Save other weights over an export; its checksums tell of it."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)
    model.save_pretrained(folder, **options)
    with pytest.raises(CheckpointError, match=(
            r"Not as .*checksums\.json has them: (.*; )?config\.json \(.*\); .*model.*\.safetensors \(.*\)(; \d+ more)?"
            r"\. A program that saves into this folder, .* remove checksums\.json, or give --verify-files none")):
        HuggingFaceDirectory(folder)


def save_changed(folder: Path, **options: object) -> None:
    """Save other weights over an export, and remove its checksums as the message says."""
    save_over(folder, **options)
    (folder / CHECKSUMS).unlink()


def test_one_file_is_replaced(tmp_path):
    folder = exported(tmp_path, 10**9)
    assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
    save_over(folder)
    assert HuggingFaceDirectory(folder, verify="none").tensor("model.norm.weight").unique().tolist() == [7.0]
    (folder / CHECKSUMS).unlink()
    assert HuggingFaceDirectory(folder).tensor("model.norm.weight").unique().tolist() == [7.0]


def test_several_files_are_replaced_by_several(tmp_path):
    folder = exported(tmp_path, 30_000)
    before = sorted(file.name for file in folder.glob("*.safetensors"))
    count = len(before)
    assert count > 2 and before == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    save_changed(folder, max_shard_size=100_000)
    after = {file.name for file in folder.glob("*.safetensors")}
    assert after.isdisjoint(before), "Transformers knows the old files again"
    assert HuggingFaceDirectory(folder).tensor("model.norm.weight").unique().tolist() == [7.0]


def test_several_files_replaced_by_one_leave_an_index(tmp_path, capsys):
    """The index stays, so other programs look for the files that are gone: refused, and the message says what to do."""
    folder = exported(tmp_path, 30_000)
    save_changed(folder)
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    with pytest.raises(CheckpointError, match="holds more than one set of weights: .* Remove"):
        HuggingFaceDirectory(folder)
    for command in (lambda: evaluate.main(["--load", str(folder), "--tokens", "x.npy"]),
                    lambda: generate.main(["--load", str(folder), "--prompt", "x"])):
        assert command() == 2
        assert "holds more than one set of weights" in capsys.readouterr().err
    (folder / "model.safetensors.index.json").unlink()
    assert HuggingFaceDirectory(folder).tensor("model.norm.weight").unique().tolist() == [7.0]


def test_names_that_transformers_does_not_know(tmp_path):
    """As exports were named before: the old file and index stay beside the new one."""
    folder = exported(tmp_path, 10**9)
    old = folder / "model-00001-of-000001.safetensors"
    (folder / "model.safetensors").rename(old)
    with safe_open(old, "pt") as stored:
        names = list(stored.keys())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, old.name)}))
    HuggingFaceDirectory(folder)
    save_changed(folder)
    assert old.exists()
    with pytest.raises(CheckpointError, match=f"more than one set of weights: model.safetensors beside {old.name}"):
        HuggingFaceDirectory(folder)
