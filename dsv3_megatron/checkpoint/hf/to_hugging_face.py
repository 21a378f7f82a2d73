"""A checkpoint of ours to Hugging Face's layout, file by file, whatever layout wrote it; a training run's, or one that
was converted from Hugging Face.

A converted one, asked for in its source's own dtype, becomes its source again: the same files, byte for byte. That
holds for FP8 because the source's scales were kept: dividing by them and rounding gives back the original values
(`ops/block_fp8.py` says why), and each tensor is checked for it. Everything else is written in the published form:
4.25 GB files, MTP modules with their copies of embedding and head, router biases in FP32, and FP8 by the reference
quantizer, amax / 448 in each block of 128 x 128.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dsv3_megatron import __version__
from dsv3_megatron.checkpoint.hf.audit import Audit, audit
from dsv3_megatron.checkpoint.hf.config import QUANTIZATION, model_config_to_json
from dsv3_megatron.checkpoint.hf.directory import CONFIG, INDEX, SCALE_SUFFIX, HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, hugging_face_tensors
from dsv3_megatron.checkpoint.hf.shards import MAX_SHARD_BYTES, Shard, ShardEntry, index_json, plan_shards
from dsv3_megatron.checkpoint.hf.source import FILE_PREFIX, carried_files
from dsv3_megatron.checkpoint.hf.spellings import is_frequencies
from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
from dsv3_megatron.checkpoint.hf.workplace import MemoryBudget, Piece, Progress, Report, Workplace, ignore, memory_for
from dsv3_megatron.checkpoint.layout import CheckpointError
from dsv3_megatron.checkpoint.segments import copy_segments, write_tensor
from dsv3_megatron.checkpoint.text_files import read_form
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.output import json_text
from dsv3_megatron.data.special_tokens import TOKENIZER, SpecialTokens, read_special_tokens
from dsv3_megatron.data.text_form import TextForm
from dsv3_megatron.data.tokenizer import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, load_tokenizer
from dsv3_megatron.ops.block_fp8 import dequantize_weight_blocks, quantize_weight_blocks, requantize_weight_blocks

logger = logging.getLogger(__name__)

_FP8 = torch.float8_e4m3fn
_TORCH_NAMES = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Export:
    """A conversion that is ready to run, by one process or by several that each write a part of the files.

    Attributes:
        place: Where it is made.
        pieces: The files of weights.
        finish: Writes the rest; called once, when all pieces are finished.
        is_master: The fp32 master weights are exported, where the checkpoint has them.
    """

    place: Workplace
    pieces: list[Piece]
    finish: Callable[[], None]
    is_master: bool

    @property
    def num_bytes(self) -> int:
        """Of all files of weights."""
        return sum(piece.num_bytes for piece in self.pieces)


def convert_to_hugging_face(source: str | Path, output: str | Path, *, iteration: int | None = None,
                            dtype: str | None = None, tokenizer: str | Path | None = None, num_workers: int = 4,
                            max_shard_bytes: int = MAX_SHARD_BYTES, is_verified: bool = False,
                            is_average: bool = False, progress: Progress | None = None) -> Audit | None:
    """Make a folder in Hugging Face's layout of a checkpoint of ours.

    Args:
        source: Folder of checkpoints.
        output: Folder to make; must not exist or be empty. An unfinished one goes on from OUTPUT.partial.
        iteration: Which checkpoint; None: the newest.
        dtype: "bf16", "fp8" or "fp32"; None: as its source was, or as the weights were trained. "fp32" takes the
            optimizer's master weights where the checkpoint has them.
        tokenizer: Folder whose tokenizer files to add; None: those of the checkpoint's source, or of the run's data.
        num_workers: Files written at a time.
        max_shard_bytes: Largest file; of no effect where the source's files are made again.
        is_verified: Compare every tensor with the checkpoint before the result gets its name.
        is_average: Export the moving average of the weights.
        progress: Told what is done.

    Returns:
        The comparison, if asked for.

    Raises:
        CheckpointError: the checkpoint is damaged, the output is not empty, the disk is full; nothing is under OUTPUT
            then.
        ConfigError: dtype or max_shard_bytes is wrong.
    """
    export = prepare_export(source, output, iteration=iteration, dtype=dtype, tokenizer=tokenizer,
                            max_shard_bytes=max_shard_bytes, is_average=is_average)
    place = export.place
    place.open(export.num_bytes)
    try:
        place.run(export.pieces, num_workers=num_workers, report=progress.start("convert", export.num_bytes) if progress
                  else ignore)
        export.finish()
        result = None
        if is_verified:
            weights = MegatronWeights(source, iteration, is_average=is_average)
            result = audit(HuggingFaceDirectory(place.result), weights,
                           is_master=export.is_master, num_workers=num_workers, progress=progress)
            result.require_expected()
        place.publish()
    finally:
        place.close()
    return result


def prepare_export(source: str | Path, output: str | Path, *, iteration: int | None = None, dtype: str | None = None,
                   tokenizer: str | Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
                   is_average: bool = False) -> Export:
    """Plan a conversion without starting it; arguments and errors as of `convert_to_hugging_face`."""
    weights = MegatronWeights(source, iteration, is_average=is_average)
    manifest, kept = weights.manifest, weights.source
    chosen = dtype or (kept.dtype if kept else manifest.precision)
    is_again = kept is not None and chosen == kept.dtype and not is_average
    shards = kept.shards if kept is not None and is_again else plan_shards(weights.model, chosen, max_shard_bytes)
    files = _files_to_add(weights, tokenizer)
    _note_other_form(files, manifest.path)
    place = Workplace(output, {
        "conversion": "megatron-to-hf", "input": str(manifest.path.resolve()), "dtype": chosen,
        "max_shard_bytes": max_shard_bytes, "version": __version__, "is_average": is_average, "files": manifest.files,
        "tokenizer": sorted(map(str, files.values()))})
    tensors = {tensor.name: tensor for tensor in hugging_face_tensors(weights.model)}
    writer = _ShardWriter(weights, tensors, is_again, chosen == "fp32",
                          MemoryBudget(memory_for(entry.num_bytes for shard in shards for entry in shard.entries)))
    pieces = [Piece(shard.file, shard.num_bytes, partial(writer.write, shard)) for shard in shards]

    def finish() -> None:
        try:
            _write(place.result / CONFIG, _config_text(weights, chosen, is_again, files))
            index = kept.index if kept is not None and is_again else _index_text(shards)
            if index is not None:
                _write(place.result / INDEX, index)
            for name, file in files.items():
                shutil.copyfile(file, place.result / name)
        except OSError as error:
            raise CheckpointError(f"{place.result}: {error.strerror} ({error.filename})") from error

    return Export(place, pieces, finish, chosen == "fp32")


@dataclass(frozen=True)
class _ShardWriter:
    """Writes files of one export; used by several threads."""

    weights: MegatronWeights
    tensors: dict[str, HuggingFaceTensor]
    is_again: bool
    is_master: bool
    budget: MemoryBudget

    def write(self, shard: Shard, path: Path, report: Report) -> None:
        """One file."""
        path.write_bytes(shard.header)
        places = {entry.name: entry for entry in shard.entries}
        target = os.open(path, os.O_RDWR)
        try:
            os.truncate(target, shard.num_bytes)
            for entry in shard.entries:
                if entry.name.endswith(SCALE_SUFFIX) or is_frequencies(entry.name):
                    if self.is_again:
                        assert self.weights.source is not None
                        scale = self.weights.source.scales[entry.name]
                        copy_segments([scale.segment()], target, entry.offset, entry.name, report)
                    continue  # else written with its weight
                self._write_weight(target, entry, places, report)
        finally:
            os.close(target)

    def _write_weight(self, target: int, entry: ShardEntry, places: dict[str, ShardEntry], report: Report) -> None:
        tensor = self.tensors[entry.name]
        dtype = self.weights.dtype(tensor, self.is_master) if tensor.num_elements else entry.dtype
        segments = self.weights.segments(tensor, self.is_master)
        if segments is not None and dtype == entry.dtype:
            copy_segments(segments, target, entry.offset, entry.name, report)
            return
        with self.budget.take(dtype.itemsize * tensor.num_elements + entry.num_bytes):
            weight = self.weights.read(tensor, self.is_master)
            if entry.dtype != _FP8:
                write_tensor(target, entry.offset, weight.to(entry.dtype))
            elif self.is_again:
                write_tensor(target, entry.offset, self._original(entry.name, weight))
            else:
                values, scales = self._quantize(entry.name, weight)
                write_tensor(target, entry.offset, values)
                scale = places[entry.name + SCALE_SUFFIX]
                write_tensor(target, scale.offset, scales)
                report(scale.num_bytes)
        report(entry.num_bytes)

    def _original(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The FP8 values that a dequantized weight came from, by the scales that were kept."""
        assert self.weights.source is not None
        scales = self.weights.source.scales[name + SCALE_SUFFIX].read()
        values = requantize_weight_blocks(weight, scales)
        if not torch.equal(dequantize_weight_blocks(values, scales, weight.dtype), weight):
            raise CheckpointError(
                f"checkpoint {self.weights.manifest.path}: {name} is not what was converted: its values are no FP8 "
                "values times the kept scales; convert the source again, or export with --dtype bf16")
        return values

    def _quantize(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return quantize_weight_blocks(weight)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.weights.manifest.path}: {name}: {error}") from error


def _index_text(shards: list[Shard]) -> str | None:
    """The index of several files; one is complete without."""
    return json_text(index_json(shards), indent=2) + "\n" if len(shards) > 1 else None


def _config_text(weights: MegatronWeights, dtype: str, is_again: bool, files: Mapping[str, Path]) -> str:
    """`config.json`: the source's own where there is one, changed in what the dtype changes."""
    source = weights.source
    if source is None:
        ids = special_ids(files)
        content = model_config_to_json(weights.model, dtype=_TORCH_NAMES[dtype], is_fp8=dtype == "fp8",
                                       bos_token_id=ids.bos_id, eos_token_id=ids.eos_id)
    elif is_again:
        return source.config
    else:
        content = json.loads(source.config)
        content.pop("quantization_config", None)
        for name in ("torch_dtype", "dtype"):
            if name in content:
                content[name] = _TORCH_NAMES[dtype]
        if dtype == "fp8":
            content["quantization_config"] = dict(QUANTIZATION)
    return json_text(content, indent=2) + "\n"


def _files_to_add(weights: MegatronWeights, tokenizer: str | Path | None) -> dict[str, Path]:
    """Files besides weights and configuration, by their name in the result."""
    folder = weights.manifest.path
    files = {file.name.removeprefix(FILE_PREFIX): file for file in sorted(folder.glob(FILE_PREFIX + "*"))}
    given = tokenizer or (None if TOKENIZER in files else weights.manifest.run.get("data", {}).get("tokenizer_model"))
    if given is None:
        return files
    if not Path(given).is_dir():
        if tokenizer is not None:
            raise ConfigError(f"tokenizer={given} is not a folder")
        logger.warning("tokenizer_model=%s of the run is not here: exported without tokenizer files", given)
        return files
    return files | {file.name: file for file in carried_files(Path(given))
                    if file.name != "generation_config.json" and not file.name.endswith((".py", ".md"))}


def _note_other_form(files: Mapping[str, Path], checkpoint: Path) -> None:
    """Say so where the tokenizer puts other ids around a text than the training texts had."""
    form, file = read_form(checkpoint), files.get(TOKENIZER)
    if form is None or file is None:
        return
    special = read_special_tokens(load_tokenizer(file), file)
    if (special.begin_ids, special.end_ids) != (form.begin_ids, form.end_ids):
        logger.warning("the texts of training %s, while the exported tokenizer makes texts that %s: readers of the "
                       "export should encode with add_special_tokens=False", form,
                       TextForm(special.begin_ids, special.end_ids))


def special_ids(files: Mapping[str, Path]) -> SpecialTokens:
    """The special ids of the tokenizer among an export's files; none of them known where there is no tokenizer.

    Args:
        files: The files, by their names in the result (`_files_to_add`).

    Raises:
        ValueError: the tokenizer is damaged.
    """
    file = files.get(TOKENIZER)
    if file is None:
        return SpecialTokens()
    tokenizer = load_tokenizer(file)
    found = read_special_tokens(tokenizer, file)
    # A tokenizer without settings beside it may still be one of V3's.
    def either(named: int | None, token: str) -> int | None:
        return tokenizer.token_to_id(token) if named is None else named

    return replace(found, bos_id=either(found.bos_id, BOS_TOKEN), eos_id=either(found.eos_id, EOS_TOKEN),
                   pad_id=either(found.pad_id, PAD_TOKEN))


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
