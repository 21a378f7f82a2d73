"""A checkpoint of ours to Hugging Face's layout, file by file, whatever layout wrote it; a training run's, or one that
was converted from Hugging Face.

A converted one, asked for in its source's own dtype, becomes its source again: the same files, byte for byte. That
holds for FP8 because the source's scales were kept: dividing by them and rounding gives back the original values
(`ops/fp8/published.py` says why), and each tensor is checked for it. Everything else is written in the published form:
4.25 GB files, MTP modules with their copies of embedding and head, router biases in FP32, and FP8 by the reference
quantizer, amax / 448 in each block of 128 x 128.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsv3_megatron.checkpoint.byte_ranges import RangeReader, copy_byte_ranges, write_tensor
from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.audit import Audit, audit
from dsv3_megatron.checkpoint.hf.directory import SCALE_SUFFIX, HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.model_card import UNKNOWN_LICENSE, Losses
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, hugging_face_tensors
from dsv3_megatron.checkpoint.hf.readers import reader_notes
from dsv3_megatron.checkpoint.hf.row_strips import row_strips, same_bits
from dsv3_megatron.checkpoint.hf.side_files import side_files
from dsv3_megatron.checkpoint.hf.source import FILE_PREFIX
from dsv3_megatron.checkpoint.hf.spellings import is_frequencies
from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
from dsv3_megatron.checkpoint.hf.weight_files import MAX_SHARD_BYTES, FileEntry, WeightFile, plan_shards
from dsv3_megatron.checkpoint.hf.workplace import (
    OutputFile,
    ProgressDisplay,
    Report,
    Workplace,
    ignore,
)
from dsv3_megatron.config.version import __version__
from dsv3_megatron.data.folder_checksums import write_folder_checksums
from dsv3_megatron.data.hashed_files import HashedFile
from dsv3_megatron.data.special_tokens import TOKENIZER
from dsv3_megatron.ops.fp8.published import dequantize_weight_blocks, quantize_weight_blocks, requantize_weight_blocks
from dsv3_megatron.ops.fp8.scale_groups import BLOCK, num_groups

logger = logging.getLogger(__name__)

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Export:
    """A conversion that is ready to run, by one process or by several that each write a part of the files.

    Attributes:
        place: Folder in which the files are made, and what is finished of them.
        pieces: The files of weights.
        finish: Writes the rest; called once, when all pieces are finished.
        is_master: The fp32 master weights are exported, where the checkpoint has them.
        notes: Which programs do not take all of it, a line each; none where the source's files are made again.
    """

    place: Workplace
    pieces: list[OutputFile]
    finish: Callable[[], None]
    is_master: bool
    notes: list[str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files of weights together."""
        return sum(piece.num_bytes for piece in self.pieces)


def convert_to_hugging_face(source: str | Path, output: str | Path, *, iteration: int | None = None,
                            dtype: str | None = None, tokenizer: str | Path | None = None, num_workers: int = 4,
                            max_shard_bytes: int = MAX_SHARD_BYTES, is_verified: bool = False,
                            is_average: bool = False, is_without_mtp: bool = False,
                            license_id: str = UNKNOWN_LICENSE, losses: Losses | None = None,
                            verify_files: str = "read", progress: ProgressDisplay | None = None) -> Audit | None:
    """Make a folder in Hugging Face's layout of a checkpoint of ours.

    Args:
        source: Folder of checkpoints.
        output: Folder to make; must not exist or be empty. An unfinished one goes on from OUTPUT.partial.
        iteration: Step of the checkpoint to convert; None: the newest.
        dtype: "bf16", "fp8" or "fp32"; None: as its source was, or as the weights were trained. "fp32" takes the
            optimizer's master weights where the checkpoint has them.
        tokenizer: Folder whose tokenizer files to add; None: those of the checkpoint's source, or of the run's data.
        num_workers: Files written at a time.
        max_shard_bytes: Largest file; of no effect where the source's files are made again.
        is_verified: Compare every tensor with the checkpoint before the result gets its name.
        is_average: Export the moving average of the weights.
        is_without_mtp: Leave the MTP modules out.
        license_id: The hub's name of a licence, for the model card.
        losses: Last losses of the run, for the model card.
        verify_files: How far the checkpoint's files are compared with their checksums: "read", "all" or "none".
        progress: Told what is done.

    Returns:
        The comparison, if asked for.

    Raises:
        CheckpointError: the checkpoint is damaged, the output is not empty, the disk is full; nothing is under OUTPUT
            then.
        ConfigError: dtype or max_shard_bytes is wrong.
    """
    export = prepare_export(source, output, iteration=iteration, dtype=dtype, tokenizer=tokenizer,
                            max_shard_bytes=max_shard_bytes, is_average=is_average, is_without_mtp=is_without_mtp,
                            license_id=license_id, losses=losses, verify_files=verify_files)
    place = export.place
    for note in export.notes:
        logger.info("%s: not everything reads it: %s", output, note)
    place.open(export.num_bytes)
    try:
        place.run(export.pieces, num_workers=num_workers, report=progress.start("convert", export.num_bytes) if progress
                  else ignore)
        export.finish()
        result = None
        if is_verified:
            weights = MegatronWeights(source, iteration, is_average=is_average, verify=verify_files)
            result = audit(HuggingFaceDirectory(place.result), weights,
                           is_master=export.is_master, num_workers=num_workers, progress=progress)
            result.require_expected()
        place.publish()
    finally:
        place.close()
    return result


def prepare_export(source: str | Path, output: str | Path, *, iteration: int | None = None, dtype: str | None = None,
                   tokenizer: str | Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
                   is_average: bool = False, is_without_mtp: bool = False, license_id: str = UNKNOWN_LICENSE,
                   losses: Losses | None = None, verify_files: str = "read") -> Export:
    """Plan a conversion without starting it; arguments and errors are those of `convert_to_hugging_face`."""
    weights = MegatronWeights(source, iteration, is_average=is_average, verify=verify_files)
    manifest, kept = weights.manifest, weights.source
    chosen = dtype or (kept.dtype if kept else manifest.precision)
    model = dataclasses.replace(weights.model, mtp_num_layers=0) if is_without_mtp else weights.model
    is_again = kept is not None and chosen == kept.dtype and not is_average and model == weights.model
    shards = kept.shards if kept is not None and is_again else plan_shards(model, chosen, max_shard_bytes)
    beside = side_files(weights, model, shards, dtype=chosen, is_again=is_again, license_id=license_id, losses=losses,
                        tokenizer=_tokenizer_folder(weights, tokenizer))
    place = Workplace(output, {
        "conversion": "megatron-to-hf", "input": str(manifest.path.resolve()), "dtype": chosen,
        "max_shard_bytes": max_shard_bytes, "version": __version__, "is_average": is_average, "files": manifest.files,
        "is_without_mtp": is_without_mtp, "tokenizer": sorted(map(str, beside.copies.values()))})
    tensors = {tensor.name: tensor for tensor in hugging_face_tensors(model)}
    writer = _ShardWriter(weights, tensors, is_again, chosen == "fp32")
    pieces = [OutputFile(shard.file, shard.num_bytes, partial(writer.write, shard)) for shard in shards]

    def finish() -> None:
        try:
            for name, text in beside.texts.items():
                _write(place.result / name, text)
            for name, file in beside.copies.items():
                shutil.copyfile(file, place.result / name)
            write_folder_checksums(place.result, known=place.checksums(pieces))
        except OSError as error:
            raise CheckpointError(f"{place.result}: {error.strerror} ({error.filename})") from error

    return Export(place, pieces, finish, chosen == "fp32", [] if is_again else reader_notes(model, chosen))


@dataclass(frozen=True)
class _ShardWriter:
    """Writes files of one export; used by several threads."""

    weights: MegatronWeights
    tensors: dict[str, HuggingFaceTensor]
    is_again: bool
    is_master: bool

    def write(self, shard: WeightFile, target: HashedFile, report: Report) -> None:
        """Write one file of weights, header first."""
        target.write(0, shard.header)
        places = {entry.name: entry for entry in shard.entries}
        with RangeReader() as reader:
            for entry in shard.entries:
                if entry.name.endswith(SCALE_SUFFIX) or is_frequencies(entry.name):
                    if self.is_again:
                        assert self.weights.source is not None
                        scale = self.weights.source.scales[entry.name]
                        copy_byte_ranges([scale.byte_range()], reader, target, entry.offset, entry.name, report)
                    continue  # else written with its weight
                self._write_weight(reader, target, entry, places, report)

    def _write_weight(self, reader: RangeReader, target: HashedFile, entry: FileEntry, places: dict[str, FileEntry],
                      report: Report) -> None:
        tensor = self.tensors[entry.name]
        dtype = self.weights.dtype(tensor, self.is_master) if tensor.num_elements else entry.dtype
        ranges = self.weights.byte_ranges(tensor, self.is_master)
        if ranges is not None and dtype == entry.dtype:
            copy_byte_ranges(ranges, reader, target, entry.offset, entry.name, report)
            return
        place = entry.offset
        for first_row, num_rows in row_strips(tensor.shape):
            weight = self.weights.read(tensor, self.is_master, first_row, num_rows)
            top = first_row // BLOCK
            if entry.dtype != _FP8:
                strip = weight.to(entry.dtype)
            elif self.is_again:
                strip = self._original(entry.name, weight, top)
            else:
                strip, scales = self._quantize(entry.name, weight)
                write_tensor(target, places[entry.name + SCALE_SUFFIX].offset + top * scales[0].nbytes, scales)
                report(scales.nbytes)
            write_tensor(target, place, strip)
            place += strip.nbytes
            report(strip.nbytes)

    def _original(self, name: str, weight: torch.Tensor, top: int) -> torch.Tensor:
        """The FP8 values that rows of a dequantized weight came from, by the scales that were kept, from row `top`."""
        assert self.weights.source is not None
        scales = self.weights.source.scales[name + SCALE_SUFFIX].read(top, num_groups(weight.shape[0]))
        values = requantize_weight_blocks(weight, scales)
        if not same_bits(dequantize_weight_blocks(values, scales, weight.dtype), weight):
            raise CheckpointError(
                f"checkpoint {self.weights.manifest.path}: {name} is not what was converted: its values are no FP8 "
                "values times the kept scales; convert the source again, or export with --dtype bf16")
        return values

    def _quantize(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return quantize_weight_blocks(weight)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.weights.manifest.path}: {name}: {error}") from error


def _tokenizer_folder(weights: MegatronWeights, tokenizer: str | Path | None) -> Path | None:
    """Folder of the tokenizer to add to what the checkpoint carries."""
    if tokenizer is not None:
        return Path(tokenizer)
    given = weights.manifest.run.get("data", {}).get("tokenizer_model")
    if given is None or (weights.manifest.path / (FILE_PREFIX + TOKENIZER)).is_file():
        return None
    if Path(given).is_dir():
        return Path(given)
    logger.warning("tokenizer_model=%s of the run is not here: exported without tokenizer files", given)
    return None


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
