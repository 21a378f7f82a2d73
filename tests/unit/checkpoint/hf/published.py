"""The published model, with its YaRN settings."""

from __future__ import annotations

import dataclasses

from dsv3_megatron.config.presets import preset

YARN_V3 = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 4096,
           "max_position_embeddings": 163840, "init_method_std": 0.02}

V3 = dataclasses.replace(preset("dsv3-671b").model, **YARN_V3)
