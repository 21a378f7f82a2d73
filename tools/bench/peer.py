"""The peer that benchmarks compare with: Transformers' configuration of one of this library's architectures."""

from __future__ import annotations

from typing import Any

from dsv3_megatron.checkpoint.hf.config_json import model_config_to_json
from dsv3_megatron.config.model import ModelConfig


def transformers_config(model: ModelConfig, **settings: Any) -> Any:
    """`DeepseekV3Config` as Transformers reads it from the `config.json` that this library writes.

    Args:
        model: The architecture.
        settings: Further settings, or other values.
    """
    from transformers import DeepseekV3Config

    return DeepseekV3Config(**(model_config_to_json(model, dtype="float32") | settings))
