"""A Hugging Face checkpoint to one of ours, file by file: no model is built, no tensor but those in work is in memory.

What keeps its dtype goes from file to file in pieces; FP8 is dequantized to BF16. The result is a checkpoint of
weights to start a run from (`--load`), under any layout; it also keeps what it takes to make the source again, byte
for byte (`source.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.checkpoint.byte_ranges import RangeReader, copy_byte_ranges, write_tensor
from dsv3_megatron.checkpoint.folder import (
    WEIGHTS,
    CheckpointError,
    RunProgress,
    finish_save,
    iteration_path,
    saving_path,
)
from dsv3_megatron.checkpoint.hf.audit import Audit, audit
from dsv3_megatron.checkpoint.hf.directory import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, Storage, checkpoint_place, tensors_by_parameter
from dsv3_megatron.checkpoint.hf.row_strips import row_strips
from dsv3_megatron.checkpoint.hf.safetensors_file import header_bytes
from dsv3_megatron.checkpoint.hf.source import (
    DESCRIPTION,
    FILE_PREFIX,
    SCALES,
    carried_files,
    description_of,
    scales_of,
)
from dsv3_megatron.checkpoint.hf.stored import MegatronWeights
from dsv3_megatron.checkpoint.hf.workplace import (
    OutputFile,
    ProgressDisplay,
    Report,
    Workplace,
    ignore,
)
from dsv3_megatron.checkpoint.tensor_files import TensorPart, lay_out, write_index
from dsv3_megatron.checkpoint.tensor_frames import frame_of
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import HUGGING_FACE, preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.version import __version__
from dsv3_megatron.data.hashed_files import HashedFile
from dsv3_megatron.ops.fp8.published import LARGEST_SCALE, SMALLEST_SCALE
from dsv3_megatron.parallel.layout import stage_layouts

logger = logging.getLogger(__name__)

MODEL_FILE = "model.json"
# Small enough to share among threads and to lose little at a stop.
FILE_BYTES = 1_000_000_000
_SEQ_LENGTH = 4096
_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def convert_to_megatron(source: str | Path, output: str | Path, *, parallel: ParallelConfig | None = None,
                        num_workers: int = 4, max_file_bytes: int = FILE_BYTES, is_verified: bool = False,
                        verify_files: str = "read", progress: ProgressDisplay | None = None) -> Audit | None:
    """Make OUTPUT/iter_0000000 of a Hugging Face checkpoint, and OUTPUT/model.json for `--config`.

    Tensors keep their dtype; FP8 becomes BF16, and router biases are FP32. Where a parameter of ours is made of tensors
    of several dtypes it is FP32.

    Args:
        source: Folder in Hugging Face's layout.
        output: Folder to make; must not exist or be empty. An unfinished one goes on from OUTPUT.partial.
        parallel: Layout to check the model against and to record; the checkpoint loads under any.
        num_workers: Files written at a time.
        max_file_bytes: About how large a file becomes.
        is_verified: Compare every tensor with the source before the result gets its name.
        verify_files: How far the source's files are compared with their checksums, where it has them: "read", "all"
            or "none".
        progress: Told what is done.

    Returns:
        The comparison, if asked for.

    Raises:
        CheckpointError: the source is damaged, the output is not empty, the disk is full; nothing is under OUTPUT then.
        ConfigError: the layout does not fit the model.
    """
    directory = HuggingFaceDirectory(source, verify=verify_files)
    run = _run_of(directory.model, parallel or ParallelConfig())
    files = _plan_files(directory, max_file_bytes)
    place = Workplace(output, {
        "conversion": "hf-to-megatron", "input": os.path.abspath(source), "max_file_bytes": max_file_bytes,
        "version": __version__, "parallel": dataclasses.asdict(run.parallel),
        "files": {entry.file.name: [entry.file.stat().st_size, entry.file.stat().st_mtime_ns]
                  for entry in directory.stored.values()}})
    folder = saving_path(place.result, 0).name
    _undo_finish(place.result)
    pieces = [OutputFile(f"{folder}/{name}", sum(chunk.num_bytes for _, chunk in chunks),
                         partial(_write_file, directory, chunks)) for name, chunks in files.items()]
    pieces += _side_pieces(directory, folder)
    place.open(sum(piece.num_bytes for piece in pieces))
    try:
        directory.check_copies()
        report = progress.start("convert", sum(piece.num_bytes for piece in pieces)) if progress else ignore
        place.run(pieces, num_workers=num_workers, report=report)
        written = [TensorPart(**_with_tuples(chunk)) for piece in pieces[: len(files)] for chunk in place.told(piece)]
        write_index(place.result / folder, written, {"optimizer_step": 0})
        precision = "fp32" if all(chunk.dtype == "float32" for chunk in written) else "bf16"
        checksums = {Path(name).name: known for name, known in place.checksums(pieces).items()}
        finish_save(place.result, RunProgress(0, 0, 0), run.as_dict(), world_size=1, precision=precision,
                    contents=WEIGHTS, checksums=checksums,
                    versions={"dsv3_megatron": __version__, "torch": torch.__version__,
                              "megatron_core": version("megatron-core")})
        (place.result / MODEL_FILE).write_text(
            json_text({"model": dataclasses.asdict(run.model)}, indent=2) + "\n", encoding="utf-8")
        result = None
        if is_verified:
            result = audit(directory, MegatronWeights(place.result), num_workers=num_workers, progress=progress)
            result.require_equal()
        place.publish()
    except OSError as error:
        raise CheckpointError(f"{place.root}: {error.strerror} ({error.filename})") from error
    finally:
        place.close()
    return result


def _run_of(model: ModelConfig, parallel: ParallelConfig) -> RunConfig:
    """A run of this architecture, checked as a training run would be."""
    base = preset("dsv3-671b")
    seq_length = min(_SEQ_LENGTH, model.max_position_embeddings)
    run = dataclasses.replace(base, preset=HUGGING_FACE, model=model, parallel=parallel).override(
        seq_length=seq_length, phases=(), stop_after_phase=None)
    run.validate()
    stage_layouts(model, parallel)
    return run


def _plan_files(directory: HuggingFaceDirectory, max_file_bytes: int
                ) -> dict[str, list[tuple[HuggingFaceTensor, TensorPart]]]:
    """Each file's tensors in the order of the forward pass, and the part of our checkpoint that each one is."""
    parts = tensors_by_parameter(directory.model)
    dtypes: dict[str, torch.dtype] = {}
    for parameter, tensors in parts.items():
        key, _ = checkpoint_place(parameter)
        stored = {directory.stored[tensor.name].dtype for tensor in tensors}
        is_wide = torch.float32 in stored or tensors[0].storage is Storage.BIAS
        if is_wide or dtypes.get(key) is None:
            dtypes[key] = torch.float32 if is_wide else torch.bfloat16
    files: dict[str, list[tuple[HuggingFaceTensor, TensorPart]]] = {}
    filled = max_file_bytes
    name = ""
    for parameter, tensors in parts.items():
        key, index = checkpoint_place(parameter)
        shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
        for tensor in tensors:
            offsets, sizes = (tensor.first_row, *(0 for _ in shape[1:])), tensor.shape
            if index is not None:
                whole = (directory.model.num_experts, *shape)
                offsets, sizes = (index, *offsets), (1, *sizes)
            else:
                whole = shape
            if filled >= max_file_bytes:
                name = f"__0_{len(files)}.distcp"
                files[name], filled = [], 0
            chunk = TensorPart(key, whole, offsets, sizes, _NAMES[dtypes[key]], name)
            files[name].append((tensor, chunk))
            filled += chunk.num_bytes
    return files


def _write_file(directory: HuggingFaceDirectory, chunks: list[tuple[HuggingFaceTensor, TensorPart]],
                target: HashedFile, report: Report) -> list[dict[str, Any]]:
    """One file of our checkpoint; its chunks with their places."""
    placed = lay_out([chunk for _, chunk in chunks])
    with RangeReader() as reader:
        for (tensor, _), chunk in zip(chunks, placed, strict=True):
            entry, dtype = directory.stored[tensor.name], getattr(torch, chunk.dtype)
            frame = frame_of(dtype, chunk.sizes)
            position = chunk.start + len(frame.head)
            target.write(chunk.start, frame.head)
            if entry.dtype == dtype:
                copy_byte_ranges([entry.byte_range()], reader, target, position, tensor.name, report)
                target.write(position + frame.num_bytes, frame.tail)
                continue
            if entry.dtype == torch.float8_e4m3fn:
                _check_scales(directory, tensor.name)
            for first_row, num_rows in row_strips(tensor.shape):
                strip = directory.tensor(tensor.name, dtype, first_row, num_rows)
                write_tensor(target, position, strip)
                position += strip.nbytes
                report(strip.nbytes)
            target.write(position, frame.tail)
    return [dataclasses.asdict(chunk) for chunk in placed]


def _check_scales(directory: HuggingFaceDirectory, name: str) -> None:
    """Refuse scales with which BF16 would not hold every FP8 value, so that the bytes would not come back."""
    scales = directory.scales(name)
    if scales.min() < SMALLEST_SCALE or scales.max() > LARGEST_SCALE:
        entry = directory.stored[name + "_scale_inv"]
        raise CheckpointError(f"{entry.file}: tensor {entry.name} has scales from {scales.min().item():.3g} to "
                              f"{scales.max().item():.3g}; BF16 holds FP8 values exactly enough between "
                              f"{SMALLEST_SCALE:.3g} and {LARGEST_SCALE:.3g} only")


def _side_pieces(directory: HuggingFaceDirectory, folder: str) -> list[OutputFile]:
    """What is kept of the source besides the weights."""
    def write_description(target: HashedFile, report: Report) -> None:
        target.write(0, json_text(description_of(directory)).encode())

    def write_scales(target: HashedFile, report: Report) -> None:
        header, positions = header_bytes([(scale.name, scale.dtype, scale.shape) for scale in scales])
        target.write(0, header)
        with RangeReader() as reader:
            for scale in scales:
                copy_byte_ranges([scale.byte_range()], reader, target, positions[scale.name], scale.name, report)

    def copy_file(file: Path, target: HashedFile, report: Report) -> None:
        content = file.read_bytes()  # of 64 MB at most
        target.write(0, content)
        report(len(content))

    scales = scales_of(directory)
    pieces = [OutputFile(f"{folder}/{DESCRIPTION}", 0, write_description)]
    if scales:
        pieces.append(OutputFile(f"{folder}/{SCALES}", sum(scale.num_bytes for scale in scales), write_scales))
    pieces += [OutputFile(f"{folder}/{FILE_PREFIX}{file.name}", file.stat().st_size, partial(copy_file, file))
               for file in carried_files(directory.path)]
    return pieces


def _undo_finish(result: Path) -> None:
    """A stop between the checkpoint's own name and the result's: give it back the name it is written under."""
    final, saving = iteration_path(result, 0), saving_path(result, 0)
    if final.is_dir() and not saving.exists():
        os.rename(final, saving)


def _with_tuples(chunk: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in chunk.items()}
