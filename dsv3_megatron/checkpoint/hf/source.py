"""What a converted checkpoint keeps of the Hugging Face checkpoint it was made from, so that it can be made again.

Beside its tensors, in the same folder:

    hf_source.json          config.json, the index and every file's header, as they were
    hf_scales.safetensors   block scales of what was FP8: ours holds the dequantized weights; and stored tables that
                            are no weights
    hf_file.NAME            the tokenizer's and other small files

A training run's own checkpoints have none of this: their weights are others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.directory import CONFIG, INDEX, SCALE_SUFFIX, HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.safetensors_file import SINGLE, SUFFIX, StoredTensor, read_header, read_header_text
from dsv3_megatron.checkpoint.hf.weight_files import WeightFile, shard_from_header
from dsv3_megatron.config.json_files import read_json
from dsv3_megatron.data.folder_checksums import CHECKSUMS

DESCRIPTION, SCALES, FILE_PREFIX = "hf_source.json", "hf_scales.safetensors", "hf_file."
# What is carried over of a folder besides the weights: by the ends of names, up to a size.
_CARRIED = (".json", ".txt", ".model", ".jinja", ".py", ".md")
_CARRIED_NAMES = ("LICENSE", "LICENSE-MODEL", "LICENSE-CODE", "NOTICE")
_CARRIED_BYTES = 64_000_000
FOLLOW_LINKS = "DSV3_FOLLOW_LINKS"


@dataclass(frozen=True)
class Source:
    """A Hugging Face checkpoint as it was.

    Attributes:
        config: Text of its `config.json`.
        index: Text of its index; None where it was one file without.
        headers: Text of each file's header, by the file's name.
        scales: Block scales by name, and stored tables that are no weights.
    """

    config: str
    index: str | None
    headers: dict[str, str]
    scales: dict[str, StoredTensor]

    @property
    def shards(self) -> list[WeightFile]:
        """The source's files of weights, to be written again byte for byte."""
        return [shard_from_header(file, header) for file, header in self.headers.items()]

    @property
    def dtype(self) -> str:
        """"fp8" if any tensor was, else "fp32" if the head was, else "bf16"."""
        dtypes = {entry.name: entry.dtype for shard in self.shards for entry in shard.entries}
        if torch.float8_e4m3fn in dtypes.values():
            return "fp8"
        return "fp32" if dtypes["lm_head.weight"] == torch.float32 else "bf16"


def description_of(directory: HuggingFaceDirectory) -> dict[str, Any]:
    """Content of `hf_source.json` for a folder."""
    files = sorted({entry.file for entry in directory.stored.values()})
    index = directory.path / INDEX
    return {"config": (directory.path / CONFIG).read_text(encoding="utf-8"),
            "index": index.read_text(encoding="utf-8") if index.is_file() else None,
            "headers": {file.name: read_header_text(file) for file in files}}


def scales_of(directory: HuggingFaceDirectory) -> list[StoredTensor]:
    """The folder's block scales and stored tables that are no weights, in the order of their names."""
    scales = {name: entry for name, entry in directory.stored.items() if name.endswith(SCALE_SUFFIX)}
    return [entry for _name, entry in sorted((scales | directory.beside).items())]


def carried_files(path: Path) -> Iterator[Path]:
    """Small files of a Hugging Face folder that go with the model: tokenizer, generation settings, model code.

    Raises:
        CheckpointError: one is a link that leads out of the folder (that of the hub's cache which it is in), and
            DSV3_FOLLOW_LINKS=1 does not say that it may: whoever gets the copy would get a file of somewhere else.
    """
    for file in sorted(path.iterdir()):
        is_known = file.name.endswith(_CARRIED) or file.name in _CARRIED_NAMES
        is_ours = file.name in (CONFIG, INDEX, SINGLE, CHECKSUMS) or file.name.endswith(
            (SUFFIX, SUFFIX + ".index.json"))
        if file.is_file() and is_known and not is_ours and file.stat().st_size <= _CARRIED_BYTES:
            if file.is_symlink() and os.environ.get(FOLLOW_LINKS) != "1" and not _is_inside(file, path):
                raise CheckpointError(f"{file} is a link to {file.resolve()}, outside of its folder: put a copy in its "
                                      f"place, or set {FOLLOW_LINKS}=1 to have it copied from there")
            yield file


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a link leads to a file in its folder, or in that of the same model in the hub's cache."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    return file.resolve().is_relative_to(root)


def read_source(folder: Path) -> Source | None:
    """What a checkpoint of ours keeps of the one it was converted from; None for a training run's.

    Raises:
        CheckpointError: what the checkpoint keeps of its source cannot be read.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        scales = read_header(folder / SCALES) if (folder / SCALES).is_file() else {}
        return Source(content["config"], content["index"], content["headers"], scales)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
