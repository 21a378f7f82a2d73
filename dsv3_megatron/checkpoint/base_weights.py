"""The weights that a run begins with, out of another run's checkpoint or a Hugging Face folder; nothing else of these.

A run that is fine-tuned takes the weights of a base model (`--pretrained-checkpoint`). Its optimizer, step and data are
new. A base model with MTP modules may be taken without them.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.checkpoint.finite import require_finite_weights
from dsv3_megatron.checkpoint.folder import CheckpointError, check_architecture
from dsv3_megatron.checkpoint.open import OpenedCheckpoint, errors_of_base, open_checkpoint
from dsv3_megatron.checkpoint.store import load_into_new_run
from dsv3_megatron.config.model import architecture_differences
from dsv3_megatron.config.run import RunConfig


def check_base(folder: str, run: RunConfig) -> None:
    """Check that a run can begin with the weights of a folder; reads no tensors.

    Args:
        folder: Folder of a run's checkpoints, or of a Hugging Face model.
        run: The run.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it is of another architecture.
    """
    with errors_of_base(folder):
        opened = open_checkpoint(folder)
        if opened.load is None:
            check_architecture(folder, _with_base_mtp(opened, run))
        elif wrong := architecture_differences(asdict(opened.model), _with_base_mtp(opened, run).model):
            raise CheckpointError(f"the model is of another architecture: {'; '.join(wrong)}; use its values")


def load_base(folder: str, run: RunConfig, chunks: list[Any], optimizer: MegatronOptimizer,
              groups: ProcessGroupCollection) -> None:
    """Put the weights and router biases of a base model into a run's modules and its optimizer's fp32 weights.

    Called by every rank. Those of a run's checkpoint are its fp32 weights, not their bf16 copies.

    Args:
        folder: Folder of a run's checkpoints, or of a Hugging Face model.
        run: The run that begins.
        chunks: This rank's stages.
        optimizer: The distributed optimizer over them, fresh.
        groups: The run's process groups.

    Raises:
        CheckpointError: the checkpoint cannot be used, or its weights are not finite.
    """
    opened = open_checkpoint(folder)
    if opened.load is not None:
        opened.load(chunks, groups)
        optimizer.reload_model_params()
    else:
        load_into_new_run(folder, run, _with_base_mtp(opened, run), chunks, optimizer, groups)
    require_finite_weights(chunks, groups, folder)


def _with_base_mtp(opened: OpenedCheckpoint, run: RunConfig) -> RunConfig:
    """The run as the base model is to be: with its MTP modules, where the run has none."""
    if run.model.mtp_num_layers:
        return run
    return replace(run, model=replace(run.model, mtp_num_layers=opened.model.mtp_num_layers))
