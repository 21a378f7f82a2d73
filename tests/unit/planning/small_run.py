"""A run that is small beside the cluster."""

from __future__ import annotations

from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.run_cost import main_phase, only_phase


def small_run(**changes):
    run = preset("dsv3-16b").override(global_batch_size=512, expert_model_parallel_size=8,
                                      pipeline_model_parallel_size=4, **changes)
    return only_phase(run, main_phase(run))
