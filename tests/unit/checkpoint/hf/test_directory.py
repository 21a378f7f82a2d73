"""Reading a Hugging Face checkpoint: every variant's tensors, and every kind of damage refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_megatron.certification.reference_weights import is_router_bias, weight_shapes
from dsv3_megatron.certification.weight_names import reference_names
from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory, hugging_face_tensors, tensors_by_parameter
from dsv3_megatron.config.presets import preset
from tests.hugging_face import config_json, dequantized, published_weights, quantized, write_checkpoint
from tests.parity.architectures import PUBLISHED, variant

SHARD = "model-00002-of-000003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes(name):
    """Against the tests' own list of the published checkpoint's tensors, and their own translation to ours."""
    model = variant(name)
    listed = [tensor for tensor in hugging_face_tensors(model) if not tensor.is_copy and tensor.num_elements]
    expected = weight_shapes(model)
    assert [tensor.name for tensor in listed] == sorted(expected, key=[t.name for t in listed].index)
    assert {tensor.name: tensor.shape for tensor in listed} == expected
    for parameter, parts in tensors_by_parameter(model).items():
        if parameter.endswith("expert_bias"):
            assert is_router_bias(parts[0].name)
            continue
        assert tuple(part.name for part in parts) == reference_names(parameter, model.num_layers)
        assert [part.first_row for part in parts] == [sum(p.shape[0] for p in parts[:i]) for i in range(len(parts))]
    copies = [tensor for tensor in hugging_face_tensors(model) if tensor.is_copy]
    assert len(copies) == 2 * model.mtp_num_layers


def test_published_model_has_46183_weights():
    assert len(hugging_face_tensors(preset("dsv3-671b").model)) == 46_183


@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("name", ["plain", "full-rank-query", "mtp-2-groups", "no-shared", "all-dense"])
def test_values(tmp_path, name, kind):
    model = variant(name)
    weights = published_weights(model, torch.float32 if kind == "fp32" else torch.bfloat16)
    weights = quantized(weights) if kind == "fp8" else weights
    directory = HuggingFaceDirectory(write_checkpoint(tmp_path / "hf", config_json(model), weights,
                                                      num_shards=0 if kind == "fp32" else 3))
    expected = dequantized(weights)
    assert directory.tensors.keys() == expected.keys()
    assert directory.is_fp8 == (kind == "fp8")
    directory.check_copies()
    for tensor_name, value in expected.items():
        actual = directory.tensor(tensor_name)
        assert actual.dtype == value.dtype and torch.equal(actual, value), tensor_name
    wide = dequantized(weights, torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(directory.tensor(name, torch.float32), wide[name].float())


def test_copies_and_mtp_may_be_left_out(tmp_path):
    model = variant("plain")
    weights = published_weights(model)
    without = {name: value for name, value in weights.items() if "shared_head.head" not in name}
    assert HuggingFaceDirectory(write_checkpoint(tmp_path / "a", config_json(model), without)).model.mtp_num_layers == 1
    main = {name: value for name, value in weights.items() if not name.startswith(f"model.layers.{model.num_layers}.")}
    directory = HuggingFaceDirectory(write_checkpoint(tmp_path / "b", config_json(model), main))
    assert directory.model.mtp_num_layers == 0
    assert directory.tensors.keys() == main.keys()


# ---- damage ----


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    model = dataclasses.replace(variant("plain"), hidden_size=130)
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "hf", config_json(model),
                            quantized(published_weights(model)))


def change_tensors(folder: Path, change: dict[str, torch.Tensor | None], file: str = SHARD) -> None:
    """Replace, add or remove tensors of one shard, and of the index."""
    content = load_file(folder / file)
    index = json.loads((folder / INDEX).read_text())
    for name, value in change.items():
        content.pop(name, None)
        index["weight_map"].pop(name, None)
        if value is not None:
            content[name] = value
            index["weight_map"][name] = file
    save_file(content, folder / file)
    (folder / INDEX).write_text(json.dumps(index))


def change_json(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({key: value for key, value in (content | changes).items()
                                           if value != "remove"}))


def file_of(folder: Path, name: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def truncate_header(folder: Path) -> None:
    os.truncate(folder / SHARD, 100)


def save_over(folder: Path) -> None:
    """What another program leaves that writes one file beside the old ones and their index."""
    content = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    save_file(content, folder / "model.safetensors")


def save_over_and_remove(folder: Path) -> None:
    """The same of a program that knows the old files again, but not their index."""
    save_over(folder)
    for file in folder.glob("model-*"):
        file.unlink()


def lose_index(folder: Path) -> None:
    save_over(folder)
    (folder / INDEX).unlink()


def other_shards(folder: Path) -> None:
    shutil.copyfile(folder / SHARD, folder / "model-00002-of-00004.safetensors")


def add_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def lose_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def index_names_more(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["model.layers.9.ghost.weight"] = SHARD
    (folder / INDEX).write_text(json.dumps(content))


def index_names_less(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    del content["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(content))


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def replace(name: str, value: torch.Tensor | None):
    def change(folder: Path) -> None:
        change_tensors(folder, {name: value}, file_of(folder, name))
    return change


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(("damage", "message"), [
    (truncate, f"{SHARD} is truncated: tensor .* ends at byte"),
    (truncate_header, f"{SHARD} is truncated: it has 100 bytes, its header alone takes"),
    (lose_shard, f"{SHARD} is missing: the index says that it holds"),
    (save_over, "more than one set of weights: model.safetensors beside model-00001-of-000003.safetensors and 2 more "
     f"named by {INDEX}; transformers reads model.safetensors, other programs the 3 that the index names: .* Remove"),
    (save_over_and_remove, "beside .* other programs the 3 that the index names, of which 3 are gone"),
    (lose_index, "model-00001-of-000003.safetensors, .* beside model.safetensors without an index; move away"),
    (other_shards, "model-00002-of-00004.safetensors beside model-00001-of-000003.safetensors and 2 more"),
    (add_adapter, r"holds an adapter \(adapter_config.json\): transformers adds it"),
    (index_names_more, f"tensor model.layers.9.ghost.weight is in {SHARD}, which does not hold it"),
    (index_names_less, "holds tensor model.norm.weight; .* has it nowhere"),
    (pickled, r"holds pickled weights \(pytorch_model.bin\): loading a pickle runs whatever code is in it"),
    (replace("model.norm.weight", None), "1 tensors of the model .* are in no file: model.norm.weight"),
    (lambda folder: change_tensors(folder, {"model.layers.1.mlp.experts.down_proj": torch.ones(12, 130, 16)}),
     "experts.down_proj holds model.layers.1.mlp.experts.0.down_proj.weight, which is stored by itself too"),
    (lambda folder: change_tensors(folder, {"model.layers.1.mlp.experts.down_proj": torch.ones(130, 16)}),
     r"experts.down_proj has shape \[130, 16\]; all experts' down_proj of a layer are .experts, rows, columns."),
    (lambda folder: change_tensors(folder, {"model.layers.1.mlp.experts.gate_up_proj": torch.ones(12, 33, 130)}),
     r"experts.gate_up_proj has shape \[12, 33, 130\]; all experts' gate_proj on up_proj"),
    (replace("model.norm.weight", torch.ones(131)), r"model.norm.weight has shape \[131\], .* has \[130\]"),
    (replace("model.norm.weight", torch.ones(130, dtype=torch.float16)), "model.norm.weight is F16; this library"),
    (replace("lm_head.weight", torch.ones(48, 130).to(torch.float8_e4m3fn)), "lm_head.weight is FP8; embedding"),
    (lambda folder: change_tensors(folder, {"model.layers.0.self_attn.rotary.weight": torch.ones(2)}),
     f"1 tensors are not of the model .*: model.layers.0.self_attn.rotary.weight .the first in {SHARD}"),
    (lambda folder: change_json(folder, "config.json", num_hidden_layers=4),
     "num_hidden_layers=4 .* num_nextn_predict_layers=1 = 5 layers, the weights have 4"),
    (lambda folder: change_json(folder, "config.json", num_nextn_predict_layers=0),
     "tensors are not of the model .*: model.layers.3.*= 3 layers, the weights have 4"),
    (lambda folder: change_json(folder, "config.json", quantization_config="remove"),
     "is FP8, but config.json has no quantization_config"),
    (lambda folder: change_json(folder, "config.json", quantization_config={
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}), r"weight_block_size=\[64, 64\]"),
    (replace(O_PROJ + "_scale_inv", None), "o_proj.weight is FP8, but .*_scale_inv is in no file"),
    (replace(O_PROJ + "_scale_inv", torch.ones(1, 1)),
     r"o_proj.weight_scale_inv is F32 \[1, 1\]; the scales of \[130, 24\] .* are F32 \[2, 1\]"),
    (replace(O_PROJ, torch.ones(130, 24, dtype=torch.bfloat16)), "scales a tensor that is not FP8 or not there"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_damage_is_found_on_opening(tmp_path, sound, damage, message):
    folder = tmp_path / "hf"
    shutil.copytree(sound, folder)
    HuggingFaceDirectory(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        HuggingFaceDirectory(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_none(tmp_path, sound, value):
    folder = tmp_path / "hf"
    shutil.copytree(sound, folder)
    name = O_PROJ + "_scale_inv"
    replace(name, torch.tensor([[1.0], [value]]))(folder)
    with pytest.raises(CheckpointError, match=rf"{file_of(folder, name)}: tensor {name} has {value} for block \(1, 0"):
        HuggingFaceDirectory(folder).tensor(O_PROJ)


def test_a_copy_that_differs(tmp_path, sound):
    folder = tmp_path / "hf"
    shutil.copytree(sound, folder)
    name = "model.layers.3.shared_head.head.weight"
    value = load_file(folder / file_of(folder, name))[name].clone()
    value[-1, -1] += 1
    replace(name, value)(folder)
    with pytest.raises(CheckpointError, match=f"{name} differs from lm_head.weight"):
        HuggingFaceDirectory(folder).check_copies()


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="config.json does not exist: .* is no Hugging Face checkpoint"):
        HuggingFaceDirectory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read as JSON"):
        HuggingFaceDirectory(tmp_path)
