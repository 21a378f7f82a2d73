"""A Hugging Face checkpoint into the modules of a run, each rank its part, under any layout."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.directory import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.names import tensors_by_parameter
from dsv3_megatron.model.global_names import global_name, whole_parameters


def load_hugging_face(directory: HuggingFaceDirectory | str | Path, chunks: list[torch.nn.Module],
                      groups: ProcessGroupCollection) -> None:
    """Fill this rank's stages with the weights and router biases of a Hugging Face checkpoint.

    Called by every rank; each reads the tensors that it holds a part of, one at a time, and no rank waits for another.
    FP8 is dequantized; values are rounded to the modules' dtype. An optimizer that already exists keeps the weights it
    was built with until its `reload_model_params()`.

    Args:
        directory: An opened checkpoint, or its folder.
        chunks: This rank's stages, bare or wrapped, of a model of `directory.model`'s architecture.
        groups: The run's process groups.

    Raises:
        CheckpointError: the checkpoint cannot be used, or is of another architecture than the modules.
    """
    if not isinstance(directory, HuggingFaceDirectory):
        directory = HuggingFaceDirectory(directory)
    parts = tensors_by_parameter(directory.model)
    with torch.no_grad():
        for chunk in chunks:
            for whole in whole_parameters(chunk, groups):
                if whole.name not in parts:
                    raise CheckpointError(f"{directory.path} has no tensor for this model's parameter {whole.name}: it "
                                          "is of another architecture")
                tensors = [directory.tensor(part.name) for part in parts[whole.name]]
                full = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
                if tuple(full.shape) != whole.shape:
                    raise CheckpointError(
                        f"{directory.path}: {' and '.join(part.name for part in parts[whole.name])} make shape "
                        f"{list(full.shape)}, this model's {whole.name} has {list(whole.shape)}: it is of another "
                        "architecture")
                whole.local.copy_(whole.take(full))
            for path, buffer in chunk.named_buffers():  # the routers' biases
                for part in parts.get(global_name(path, chunk), ()):
                    buffer.copy_(directory.tensor(part.name))
