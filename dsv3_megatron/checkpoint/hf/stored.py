"""The weights of a checkpoint of ours by Hugging Face's names, read a tensor at a time, under whatever layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dsv3_megatron.checkpoint.byte_ranges import ByteRange
from dsv3_megatron.checkpoint.folder import (
    AVERAGE_PREFIX,
    MASTER_PREFIX,
    CheckpointError,
    Manifest,
    incomplete,
    no_average,
    read_manifest,
)
from dsv3_megatron.checkpoint.hf.names import HuggingFaceTensor, checkpoint_place, tensors_by_parameter
from dsv3_megatron.checkpoint.hf.source import Source, read_source
from dsv3_megatron.checkpoint.tensor_files import TensorFiles
from dsv3_megatron.config.model import ModelConfig


class MegatronWeights:
    """One checkpoint of ours, checked to hold every tensor of its model in its shape.

    Args:
        directory: Folder of checkpoints.
        iteration: Step of the checkpoint to read; None: the newest.
        is_average: The moving average of its weights instead of the weights; the router biases are as they are.
        verify: How far its files are compared with their checksums: "read", "all" or "none".

    Attributes:
        manifest: What the checkpoint says of itself.
        model: Architecture that the checkpoint is of.
        source: The Hugging Face checkpoint it was converted from, if it was.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, corrupt, of a model that this library does not know, or
            has no average.
    """

    def __init__(self, directory: str | Path, iteration: int | None = None, *, is_average: bool = False,
                 verify: str = "read") -> None:
        self.is_average = is_average
        self.manifest: Manifest = read_manifest(directory, iteration)
        stored = self.manifest.run.get("model", {})
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        unknown = sorted(stored.keys() - known)
        if unknown:
            raise CheckpointError(f"checkpoint {self.manifest.path} has {', '.join(unknown)}, which this version does "
                                  "not know")
        try:
            self.model = ModelConfig(**stored)
        except TypeError as error:
            raise CheckpointError(f"checkpoint {self.manifest.path} does not describe its model: {error}") from error
        self.source: Source | None = read_source(self.manifest.path)
        self._files = TensorFiles(self.manifest, verify)
        self._keys = self._files.keys()
        if is_average and not any(key.startswith(AVERAGE_PREFIX) for key in self._keys):
            raise CheckpointError(no_average(self.manifest))
        self._rows: dict[str, int] = {}
        for parameter, parts in tensors_by_parameter(self.model).items():
            self._rows[parameter] = sum(part.shape[0] for part in parts)
            self._check(directory, parameter, (self._rows[parameter], *parts[0].shape[1:]))

    def dtype(self, tensor: HuggingFaceTensor, is_master: bool = False) -> torch.dtype:
        """Dtype in which a tensor is stored; of its fp32 master weights where asked for and there."""
        return self._files.dtype(self._key(tensor, is_master)[0])

    def byte_ranges(self, tensor: HuggingFaceTensor, is_master: bool = False) -> list[ByteRange] | None:
        """Find a tensor's bytes, where they lie in whole rows; else None. Arguments are those of `read`."""
        if not tensor.num_elements:
            return []
        key, index = self._key(tensor, is_master)
        return self._files.byte_ranges(key, index, tensor.first_row, tensor.shape[0])

    def read(self, tensor: HuggingFaceTensor, is_master: bool = False, first_row: int = 0, num_rows: int | None = None
             ) -> torch.Tensor:
        """A tensor, or some of its rows, in memory of its own.

        Args:
            tensor: Tensor out of `hugging_face_tensors(self.model)`.
            is_master: Read the optimizer's fp32 weight where the checkpoint has one.
            first_row: First row to read.
            num_rows: How many; None: all from there on.

        Raises:
            CheckpointError: a file cannot be read or has been cut.
        """
        if not tensor.num_elements:
            return torch.empty(tensor.shape, dtype=torch.bfloat16)
        key, index = self._key(tensor, is_master)
        rows = tensor.shape[0] - first_row if num_rows is None else num_rows
        return self._files.read(key, index, tensor.first_row + first_row, rows)

    def _key(self, tensor: HuggingFaceTensor, is_master: bool) -> tuple[str, int | None]:
        key, index = checkpoint_place(tensor.parameter)
        for is_wanted, prefix in ((self.is_average, AVERAGE_PREFIX), (is_master, MASTER_PREFIX)):
            if is_wanted and prefix + key in self._keys:
                return prefix + key, index
        return key, index

    def _check(self, directory: str | Path, parameter: str, shape: tuple[int, ...]) -> None:
        key, index = checkpoint_place(parameter)
        expected = shape if index is None else (self.model.num_experts, *shape)
        found = self._files.shape(key) if key in self._keys else None
        if found != expected:
            what = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(incomplete(directory, self.manifest.progress.iteration,
                                             f"tensor {key} {what}, the model has {list(expected)}"))
