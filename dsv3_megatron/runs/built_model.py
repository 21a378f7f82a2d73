"""The model of a run in this process, from its device to its weights: what training, evaluation and generation begin
with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.checkpoint.finite import require_finite_weights
from dsv3_megatron.checkpoint.store import load_weights
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.build import build_stages
from dsv3_megatron.model.language_model import DeepSeekV3Model
from dsv3_megatron.parallel.groups import create_groups, destroy_groups, start_process_group
from dsv3_megatron.parallel.multiprocessors import divide_multiprocessors
from dsv3_megatron.platform import Device, prepare, resolve_precision

logger = logging.getLogger(__name__)

# Puts a checkpoint into stages, given these and their groups.
LoadInto = Callable[[list[Any], Any], None]


@dataclass(frozen=True)
class BuiltModel:
    """The stages that one process holds, with everything that they run on.

    Attributes:
        run: The run that they were built for.
        device: Device of the process.
        groups: Process groups of the run; `parallel.groups.destroy_groups` leaves them.
        precision: "bf16" or "fp32", of weights and activations.
        stages: Modules of this process, one a chunk, not wrapped.
        config: Configuration that the stages share.
    """

    run: RunConfig
    device: Device
    groups: ProcessGroupCollection
    precision: str
    stages: list[DeepSeekV3Model]
    config: MLATransformerConfig

    def load(self, load: LoadInto | None = None) -> None:
        """Fill the stages from a checkpoint; called by every rank.

        Args:
            load: Puts the checkpoint into the stages; None loads the newest in the folder `run.checkpoint.load`.

        Raises:
            CheckpointError: the checkpoint cannot be used, or its weights are not finite.
        """
        started, source = time.monotonic(), self.run.checkpoint.load
        stages: list[Any] = list(self.stages)
        if load is not None:
            load(stages, self.groups)
        else:
            assert source is not None
            load_weights(source, self.run, stages, self.groups)
        require_finite_weights(stages, self.groups, str(source))
        logger.info("loaded the weights in %.1f s; %s on %s", time.monotonic() - started, self.precision,
                    self.device.name)


def build_model(run: RunConfig, *, delays_engine_weights: bool = False) -> BuiltModel:
    """Join the run's processes, make its groups, and build this process's stages with their initial weights.

    Args:
        run: A run validated against the number of processes.
        delays_engine_weights: Whether a schedule may split the stages' backward passes; see `build_stages`.
    """
    device = prepare()
    divide_multiprocessors(run.parallel, device)
    start_process_group(device)
    groups = create_groups(run.parallel, run.training.seed)
    try:
        precision = resolve_precision(run.training.precision, device)
        stages, config = build_stages(run, groups, precision=precision, delays_engine_weights=delays_engine_weights)
    except Exception:
        if torch.distributed.get_world_size() == 1:  # a process alone goes on, perhaps with other models
            destroy_groups()
        raise
    return BuiltModel(run, device, groups, precision, stages, config)
