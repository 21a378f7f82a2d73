"""A checkpoint as a model that generates, in one process, whatever layout saved it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from dsv3_megatron.checkpoint.finite import require_finite_weights
from dsv3_megatron.checkpoint.store import load_weights
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.generation.forward import CachedModel
from dsv3_megatron.model.build import build_stages
from dsv3_megatron.parallel.groups import create_groups, start_process_group
from dsv3_megatron.platform import prepare, resolve_precision

logger = logging.getLogger(__name__)


def load_model(run: RunConfig, load: Callable[[list[Any], Any], None] | None = None) -> CachedModel:
    """Start this process's group, build the model, and fill it from a checkpoint.

    Args:
        run: Validated, of one process, with transformer_impl="local".
        load: Puts a checkpoint into the stages; None loads the newest in the folder `run.checkpoint.load`.

    Raises:
        CheckpointError: the checkpoint cannot be used, or its weights are not finite.
    """
    device = prepare()
    start_process_group(device)
    groups = create_groups(run.parallel, run.training.seed)
    precision = resolve_precision(run.training.precision, device)
    stages, _config = build_stages(run, groups, precision=precision)
    started = time.monotonic()
    if load is not None:
        load(list(stages), groups)
    else:
        assert run.checkpoint.load is not None
        load_weights(run.checkpoint.load, run, list(stages), groups)
    require_finite_weights(list(stages), groups, str(run.checkpoint.load))
    logger.info("loaded the weights in %.1f s; %s on %s", time.monotonic() - started, precision, device.name)
    return CachedModel(stages[0].eval())
