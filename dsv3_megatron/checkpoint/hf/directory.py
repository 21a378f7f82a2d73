"""A Hugging Face checkpoint as a folder: checked as a whole when it is opened, its tensors read one at a time.

What can be known from `config.json`, the index and the shards' headers is checked at once: every tensor of the model is
there, in its shape, in a known dtype, with scales where it is FP8, and nothing else is. The values are read when asked
for; FP8 comes dequantized.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.checkpoint.folder import TRACKER, CheckpointError
from dsv3_megatron.checkpoint.hf.config_json import check_quantization
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, Storage, hugging_face_tensors, layer_of
from dsv3_megatron.checkpoint.hf.row_strips import same_bits
from dsv3_megatron.checkpoint.hf.safetensors_file import NAMES, SINGLE, SUFFIX, WEIGHT_DTYPES, StoredTensor, read_header
from dsv3_megatron.checkpoint.hf.spellings import check_stored_frequencies, is_frequencies, is_fused, parts_of_fused
from dsv3_megatron.config.family_json import ignored_settings, model_config_from_json
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_files import read_json as read_json_file
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.data.checksums import BlockVerifier
from dsv3_megatron.data.folder_checksums import read_folder_checksums, require_all_whole
from dsv3_megatron.ops.fp8.published import dequantize_weight_blocks, scale_shape
from dsv3_megatron.ops.fp8.scale_groups import BLOCK, num_groups

logger = logging.getLogger(__name__)

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
SCALE_SUFFIX = "_scale_inv"
_FP8 = torch.float8_e4m3fn
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Rows compared at a time where a copy is checked.
_COMPARED_BYTES = 64_000_000


class HuggingFaceDirectory:
    """The tensors of a checkpoint in Hugging Face's layout, by name.

    Args:
        path: The folder.
        verify: How far files are compared with the checksums in `checksums.json`, where the folder has it: "read" (what
            is read), "all" (every file, on opening) or "none".

    Attributes:
        path: The folder.
        json: Content of its `config.json`.
        model: The architecture; without MTP modules where the folder has none of their tensors, as `transformers`
            writes it whatever its `config.json` says.
        tensors: The model's tensors by name, those of left-out copies not.
        stored: Places of every tensor's bytes, block scales included; by their published names, also where the file has
            the experts of a layer in one tensor.
        beside: Tensors that the model does not need: stored frequencies of the rotary embedding.
        is_fp8: Whether any matrix is stored in FP8.

    Raises:
        CheckpointError: on opening it, naming the file and tensor that is missing, truncated, unknown, of a wrong shape
            or dtype, or in contradiction with `config.json`.
    """

    def __init__(self, path: str | Path, *, verify: str = "read") -> None:
        self.path = Path(path)
        verifiers = _verifiers(self.path, verify)
        self.json = read_json(self.path, CONFIG)
        source = str(self.path / CONFIG)
        stated = _stated_model(self.json, source)
        self.model: ModelConfig = stated
        found = _published_names(_stored_tensors(self.path, verifiers))
        self.beside = {name: entry for name, entry in found.items() if is_frequencies(name)}
        self.stored = {name: entry for name, entry in found.items() if name not in self.beside}
        names = {name for name in self.stored if not name.endswith(SCALE_SUFFIX)}
        layers = [layer for name in names if (layer := layer_of(name)) is not None]
        if self.model.mtp_num_layers and max(layers, default=0) < self.model.num_layers:
            logger.info("%s: num_nextn_predict_layers=%d, but no tensor of an MTP module is there: read without",
                        self.path, self.model.mtp_num_layers)
            self.model = dataclasses.replace(self.model, mtp_num_layers=0)
        self._require_countable(len(found))
        expected = {tensor.name: tensor for tensor in hugging_face_tensors(self.model)}
        self._check_names(names, expected, stated, max(layers, default=-1) + 1)
        self.tensors = {name: tensor for name, tensor in expected.items() if name in names}
        for tensor in self.tensors.values():
            self._check_stored(tensor)
        self.is_fp8 = any(self.stored[name].dtype == _FP8 for name in names)
        self._check_scales_and_config(check_quantization(self.json, source))
        self._check_beside()

    # ---- reading -----------------------------------------------------------------------------------

    def tensor(self, name: str, dtype: torch.dtype | None = None, first_row: int = 0, num_rows: int | None = None
               ) -> torch.Tensor:
        """A tensor of the model, or some of its rows, dequantized, in memory of its own.

        Args:
            name: Hugging Face's name.
            dtype: Dtype to convert to; None keeps the stored one, BF16 for FP8. FP8 times scale is computed in FP32.
            first_row: First row to read, of FP8 a multiple of 128.
            num_rows: How many; None: all from there on.

        Raises:
            CheckpointError: a scale is not a positive finite number, or the file cannot be read.
        """
        entry = self.stored[name]
        if entry.dtype != _FP8:
            return entry.read(first_row, num_rows).to(dtype or entry.dtype)
        assert first_row % BLOCK == 0, first_row
        values = entry.read(first_row, num_rows)
        top = first_row // BLOCK
        scales = self.scales(name)[top: top + num_groups(values.shape[0])]
        return dequantize_weight_blocks(values, scales, dtype or torch.bfloat16)

    def scales(self, name: str) -> torch.Tensor:
        """Block scales of a tensor that is stored in FP8, fp32 [ceil(out/128), ceil(in/128)].

        Raises:
            CheckpointError: one of them is not a positive finite number.
        """
        entry = self.stored[name + SCALE_SUFFIX]
        scales = entry.read()
        wrong = ~(torch.isfinite(scales) & (scales > 0))
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise CheckpointError(f"{entry.file}: tensor {entry.name} has {scales[row, column].item()} for block "
                                  f"({row}, {column}); a scale must be a positive finite number")
        return scales

    def _require_countable(self, num_stored: int) -> None:
        """Refuse a description of far more tensors than are stored, before each of them is named."""
        model = self.model
        sparse = max(0, model.num_layers - model.num_dense_layers) + model.mtp_num_layers
        least = max(0, model.num_layers) + 3 * sparse * max(0, model.num_experts)
        if least > 1000 + 10 * num_stored:
            raise CheckpointError(f"{self.path / CONFIG} describes a model of {least:,} tensors or more, of "
                                  f"num_hidden_layers={model.num_layers} and n_routed_experts={model.num_experts}; the "
                                  f"files hold {num_stored:,}: it is the description of another model")

    def check_copies(self) -> None:
        """Compare each MTP module's stored copy of the embedding and the head with the main model's.

        Raises:
            CheckpointError: one differs: this library, like the published model, has one of each.
        """
        originals = {tensor.parameter: tensor.name for tensor in self.tensors.values() if not tensor.is_copy}
        for tensor in self.tensors.values():
            if not tensor.is_copy:
                continue
            copy, original = self.stored[tensor.name], self.stored[originals[tensor.parameter]]
            step = max(1, _COMPARED_BYTES // max(1, copy.num_bytes // copy.shape[0]))
            for row in range(0, copy.shape[0], step):
                rows = min(step, copy.shape[0] - row)
                if copy.dtype != original.dtype or not same_bits(copy.read(row, rows), original.read(row, rows)):
                    raise CheckpointError(
                        f"{copy.file}: tensor {copy.name} differs from {original.name}; an MTP module shares "
                        "embedding and head with the main model, and this library holds one of each")

    # ---- checking ----------------------------------------------------------------------------------

    def _check_names(self, names: set[str], expected: dict[str, HuggingFaceTensor], stated: ModelConfig,
                     num_layers: int) -> None:
        missing = [tensor.name for tensor in expected.values()
                   if tensor.name not in names and not tensor.is_copy and tensor.num_elements]
        extra = sorted(names - expected.keys())
        if not missing and not extra:
            return
        hint = ""
        num_stated = stated.num_layers + stated.mtp_num_layers
        if num_layers != num_stated:
            hint = (f"; {CONFIG} says num_hidden_layers={stated.num_layers} + num_nextn_predict_layers="
                    f"{stated.mtp_num_layers} = {num_stated} layers, the weights have {num_layers}")
        if missing:
            raise CheckpointError(f"{self.path}: {len(missing)} tensors of the model that {CONFIG} describes are in no "
                                  f"file: {', '.join(missing[:3])}{hint}")
        file = self.stored[extra[0]].file.name
        raise CheckpointError(f"{self.path}: {len(extra)} tensors are not of the model that {CONFIG} describes: "
                              f"{', '.join(extra[:3])} (the first in {file}){hint}")

    def _check_stored(self, tensor: HuggingFaceTensor) -> None:
        entry = self.stored[tensor.name]
        if entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{entry.file}: tensor {tensor.name} is {NAMES[entry.dtype]}; this library reads "
                                  f"{', '.join(NAMES[dtype] for dtype in WEIGHT_DTYPES)}")
        if entry.shape != tensor.shape:
            raise CheckpointError(f"{entry.file}: tensor {tensor.name} has shape {list(entry.shape)}, the model that "
                                  f"{CONFIG} describes has {list(tensor.shape)}")
        if entry.dtype == _FP8 and tensor.storage is not Storage.MATRIX:
            raise CheckpointError(f"{entry.file}: tensor {tensor.name} is FP8; embedding, head, router, eh_proj and "
                                  "norms are never quantized")

    def _check_beside(self) -> None:
        """Look at what is read no further: stored frequencies must be those of the model, settings are named."""
        for name, entry in self.beside.items():
            check_stored_frequencies(self.model, f"{entry.file}: tensor {name}", entry.read())
        if self.beside:
            logger.info("%s: %d stored tables of rotary frequencies are those that %s makes: not read further",
                        self.path, len(self.beside), CONFIG)
        ignored = ignored_settings(self.json)
        if ignored:
            logger.info("%s: settings that neither transformers nor this library reads: %s", self.path / CONFIG,
                        ", ".join(ignored))

    def _check_scales_and_config(self, is_stated: bool) -> None:
        quantized = {name for name in self.tensors if self.stored[name].dtype == _FP8}
        if quantized and not is_stated:
            raise CheckpointError(f"{self.path}: tensor {min(quantized)} is FP8, but {CONFIG} has no "
                                  "quantization_config")
        if is_stated and not quantized:
            raise CheckpointError(f"{self.path}: {CONFIG} has a quantization_config, but no tensor is FP8; remove it "
                                  "from the file if the weights have been dequantized")
        scaled = {name.removesuffix(SCALE_SUFFIX) for name in self.stored if name.endswith(SCALE_SUFFIX)}
        for name in sorted(quantized - scaled):
            raise CheckpointError(f"{self.stored[name].file}: tensor {name} is FP8, but {name}{SCALE_SUFFIX} is in no "
                                  "file")
        for name in sorted(scaled - quantized):
            entry = self.stored[name + SCALE_SUFFIX]
            raise CheckpointError(f"{entry.file}: tensor {entry.name} scales a tensor that is not FP8 or not there")
        for name in sorted(scaled):
            entry, shape = self.stored[name + SCALE_SUFFIX], scale_shape(self.tensors[name].shape)
            if entry.shape != shape or entry.dtype != torch.float32:
                raise CheckpointError(
                    f"{entry.file}: tensor {entry.name} is {NAMES[entry.dtype]} {list(entry.shape)}; the scales of "
                    f"{list(self.tensors[name].shape)} in 128 x 128 blocks are F32 {list(shape)}")


def _published_names(found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors with those of all experts of a layer taken apart, without reading them."""
    result: dict[str, StoredTensor] = {}
    for name, entry in found.items():
        try:
            parts = list(parts_of_fused(name, entry.shape, entry.dtype)) if is_fused(name) else []
        except ValueError as error:
            raise CheckpointError(f"{entry.file}: tensor {error}") from error
        entries = [dataclasses.replace(
            entry, name=part.name, shape=part.shape, offset=entry.offset + part.offset_bytes,
            num_bytes=entry.dtype.itemsize * math.prod(part.shape)) for part in parts] or [entry]
        for single in entries:
            if single.name in result or (single is not entry and single.name in found):
                raise CheckpointError(f"{entry.file}: tensor {name} holds {single.name}, which is stored by itself "
                                      "too; keep one of the two")
            result[single.name] = single
    return result


def _verifiers(path: Path, verify: str) -> dict[str, BlockVerifier]:
    """What proves the files of a folder that has their checksums, by name; those that hold no tensors are proved now.

    Args:
        path: The folder.
        verify: "read", "all" (every file is proved now) or "none".
    """
    if verify == "none":
        return {}
    try:
        known = read_folder_checksums(path)
        require_all_whole(path, {name: checksums for name, checksums in known.items()
                                 if verify == "all" or not name.endswith(SUFFIX)})
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    return {name: BlockVerifier(path / name, checksums) for name, checksums in known.items() if name.endswith(SUFFIX)}


def _stored_tensors(path: Path, verifiers: Mapping[str, BlockVerifier]) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, which must be those that the index names."""
    if (path / ADAPTER).is_file():
        raise CheckpointError(f"{path} holds an adapter ({ADAPTER}): transformers adds it to the weights when it loads "
                              "the folder; merge it (merge_and_unload() in PEFT) and save the result elsewhere")
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise CheckpointError(_without_weights(path))
        _check_one_set(path, {SINGLE}, "without an index")
        return read_header(path / SINGLE, verifiers.get(SINGLE))
    weight_map = read_json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: weight_map must give the file of each tensor")
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(SUFFIX):
            raise CheckpointError(f"{path / INDEX}: {file!r} is not the name of a safetensors file in the same folder")
    _check_one_set(path, set(weight_map.values()), f"named by {INDEX}")
    for file in sorted(set(weight_map.values())):
        if not (path / file).is_file():
            first = min(name for name, where in weight_map.items() if where == file)
            raise CheckpointError(f"{path / file} is missing: the index says that it holds {first} and "
                                  f"{sum(where == file for where in weight_map.values()) - 1} more; get it again")
        for name, entry in read_header(path / file, verifiers.get(file)).items():
            if weight_map.get(name) != file:
                where = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{path / file} holds tensor {name}; {INDEX} has it {where}")
            stored[name] = entry
    lost = sorted(weight_map.keys() - stored.keys())
    if lost:
        raise CheckpointError(f"{path / INDEX} says that tensor {lost[0]} is in {weight_map[lost[0]]}, which does not "
                              f"hold it ({len(lost)} such)")
    return stored


def _check_one_set(path: Path, named: set[str], how: str) -> None:
    """Refuse a folder with files of weights besides those to be read: programs differ in which they take."""
    there = {file.name for file in path.glob(f"*{SUFFIX}")}
    others = sorted(there - named)
    if not others:
        return
    way_out = "move away those that are not the model's"
    if SINGLE in others:
        missing = len(named - there)
        gone = f", of which {missing} {'is' if missing == 1 else 'are'} gone," if missing else ""
        way_out = (f"transformers reads {SINGLE}, other programs the {len(named)} that the index names{gone}: a model "
                   f"saved over another one leaves the old index. Remove {INDEX} and its files if {SINGLE} is the "
                   f"newer, else {SINGLE}")
    raise CheckpointError(
        f"{path} holds more than one set of weights: {', '.join(others[:3])}{' ...' if len(others) > 3 else ''} beside "
        f"{min(named)}{f' and {len(named) - 1} more' if len(named) > 1 else ''} {how}; {way_out}")


def has_weights(path: Path) -> bool:
    """Whether a folder has files of weights, of whatever kind, or a run's checkpoints."""
    return any(file.name in (INDEX, ADAPTER, TRACKER) or file.name.endswith(SUFFIX) for file in path.iterdir()) or any(
        next(path.glob(pattern), None) is not None for pattern in _PICKLED)


def _without_weights(path: Path) -> str:
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        return (f"{path} holds pickled weights ({pickled[0]}): loading a pickle runs whatever code is in it, so only "
                "safetensors are read; save the model again with safe_serialization=True")
    return f"{path} has neither {INDEX} nor {SINGLE}: it is no Hugging Face checkpoint"


def _stated_model(config: Mapping[str, Any], source: str) -> ModelConfig:
    """The architecture that a folder's `config.json` describes."""
    try:
        return model_config_from_json(dict(config), source)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read the JSON object in a file of a Hugging Face folder.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    file = path / name
    try:
        content = read_json_file(file)
    except FileNotFoundError as error:
        reason = f"{file} does not exist: {path} is no Hugging Face checkpoint"
        raise CheckpointError(_without_weights(path) if list(path.glob("*.bin")) else reason) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content
