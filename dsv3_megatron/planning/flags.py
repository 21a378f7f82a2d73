"""Settings as flags to paste into a command.

Usage:
    flags({"recompute_granularity": "full"})           # "--recompute-granularity full"
    differing_flags(given, found)                       # what turns one run into the other
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.precision import Fp8Config
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import TrainingConfig

_FIELDS = {field.name: field for section in (ParallelConfig, TrainingConfig, Fp8Config)
           for field in dataclasses.fields(section)}
# What a layout is named by: told whether or not the run has it already.
_NAMED = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank",
          "expert_model_parallel_size", "expert_tensor_parallel_size", "pipeline_schedule", "micro_batch_size",
          "recompute_granularity", "context_parallel_size")


def flags(changes: Mapping[str, Any]) -> str:
    """Fields of a run and their values as the command line takes them, quoted for a shell."""
    words: list[str] = []
    for name, value in changes.items():
        flag = _FIELDS[name].metadata["flag"] or name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    return shlex.join(words)


def differing_flags(given: RunConfig, found: RunConfig) -> str:
    """Flags that give a run the layout of another, in the place of its command's own of the same names.

    Args:
        given: The run as it was asked for.
        found: The run in another layout.
    """
    changes: dict[str, Any] = {}
    for before, after in ((given.parallel, found.parallel), (given.training, found.training)):
        for field in dataclasses.fields(after):
            value = getattr(after, field.name)
            if field.name in _NAMED or value != getattr(before, field.name):
                changes[field.name] = value
    if changes["pipeline_schedule"] == "auto":  # one pipeline rank: there is none to name
        if given.parallel.pipeline_schedule == "auto":
            del changes["pipeline_schedule"]
    return flags(changes)
