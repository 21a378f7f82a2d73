"""Rotary settings of a `config.json`, to our fields and back. No torch.

`transformers` is the measure: what it computes from a file is what is read here. YaRN has two multipliers in a model,
one on cosines and sines, one in the softmax's scale. A file gives them by `mscale` and `mscale_all_dim`, and
`transformers` and DeepSeek's code read these alike only where both are there and neither is 0. Our two fields hold the
multipliers that `transformers` comes to, in every case, and are written so that all readers come to them.
"""

from __future__ import annotations

import math
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.json_numbers import typed_number
from dsv3_megatron.config.model import ModelConfig

# YaRN's settings that are numbers of ours too, and the order in which they are written.
_YARN = {"factor": "rotary_scaling_factor", "original_max_position_embeddings": "original_max_position_embeddings",
         "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
# What `transformers` takes for these where they are missing, null or 0.
_RAMP = {"beta_fast": 32.0, "beta_slow": 1.0}
# Settings of YaRN with one value that this library computes with; null is as good as missing.
_FIXED = {"truncate": True, "partial_rotary_factor": 1}


def rotary_fields(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Our rotary fields out of `rope_theta` + `rope_scaling` (published) or `rope_parameters` (`transformers` 5).

    Args:
        config: Content of a `config.json`.
        source: What to call it in messages.

    Raises:
        ConfigError: a kind of rotary embedding or a setting that this library does not compute with, or two that
            contradict each other.
    """
    spellings: list[tuple[str, dict[str, Any]]] = []
    for name in ("rope_scaling", "rope_parameters"):
        content = config.get(name)
        if content is not None:
            if not isinstance(content, dict):
                raise ConfigError(f"{source}: {name}={content!r} must hold settings by name")
            spellings.append((name, _one_spelling(content, f"{source}: {name}")))
    if config.get("rope_theta") is not None:
        theta = typed_number("rope_theta", config["rope_theta"], True, source)
        if not any(name == "rope_scaling" for name, _ in spellings) and "rope_scaling" in config:
            # The published spelling of plain rotary embedding: rope_scaling is null.
            spellings.append(("rope_scaling", {"rope_type": "rope"}))
        spellings.append(("rope_theta", {"rotary_base": theta}))
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, fields in spellings:
        for field, value in fields.items():
            if field in merged and merged[field] != value:
                raise ConfigError(f"{source}: {origin[field]} and {name} contradict each other: {field} is "
                                  f"{merged[field]!r} in one and {value!r} in the other")
            merged[field], origin[field] = value, name
    fields = {"rotary_base": 10000.0, "rope_type": "rope", **merged}
    outside = config.get("original_max_position_embeddings")
    if fields["rope_type"] == "yarn" and outside not in (None, fields["original_max_position_embeddings"]):
        raise ConfigError(
            f"{source}: original_max_position_embeddings={outside!r} contradicts {origin['rope_type']}, which has "
            f"{fields['original_max_position_embeddings']}; transformers would take the first, other programs the "
            "second")
    return fields


def rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """The `rope_scaling` of a model's `config.json`; None for plain rotary embedding.

    Raises:
        ConfigError: multipliers of YaRN that readers of the file would not agree on.
    """
    if model.rope_type != "yarn":
        return None
    if model.rotary_scaling_factor > 1 and not (model.mscale and model.mscale_all_dim) \
            and (model.mscale, model.mscale_all_dim) != (1, 0):
        raise ConfigError(
            f"mscale={model.mscale} with mscale_all_dim={model.mscale_all_dim}: DeepSeek's and transformers' code read "
            "a config.json with these differently; use mscale=1 with mscale_all_dim=0, or both above 0")
    return {"type": "yarn"} | {name: getattr(model, field) for name, field in _YARN.items()}


def _one_spelling(content: dict[str, Any], source: str) -> dict[str, Any]:
    types = {content[key] for key in ("type", "rope_type") if content.get(key) is not None}
    if len(types) > 1:
        raise ConfigError(f"{source}: type={content['type']!r} contradicts rope_type={content['rope_type']!r}")
    kind = types.pop() if types else "default"
    fields: dict[str, Any] = {}
    if content.get("rope_theta") is not None:
        fields["rotary_base"] = typed_number("rope_theta", content["rope_theta"], True, source)
    given = {key: value for key, value in content.items()
             if key not in ("type", "rope_type", "rope_theta") and value is not None}
    for name, value in _FIXED.items():
        if given.pop(name, value) != value:
            raise ConfigError(f"{source}: {name}={content[name]!r} is another rotary embedding than this "
                              f"library's, which has {name}={value!r}")
    if kind in ("default", "rope"):
        if given:
            raise ConfigError(f"{source}: {', '.join(sorted(given))}: without effect under rope_type={kind!r}; "
                              "remove them or set rope_type to 'yarn'")
        return {**fields, "rope_type": "rope"}
    if kind != "yarn":
        raise ConfigError(f"{source}: rope_type={kind!r} is not known to this library; it has 'default' and "
                          "'yarn'")
    return {**fields, "rope_type": "yarn", **_yarn(given, source)}


def _yarn(given: dict[str, Any], source: str) -> dict[str, Any]:
    """Our fields of YaRN, by what `transformers` makes of the settings."""
    unknown = sorted(given.keys() - _YARN.keys())
    if unknown:
        raise ConfigError(f"{source}: {', '.join(f'{name}={given[name]!r}' for name in unknown)}: not known to "
                          "this library, and may change what the weights compute")
    for name in ("factor", "original_max_position_embeddings"):
        if name not in given:
            raise ConfigError(f"{source}: {name} is missing")
    numbers = {name: typed_number(name, value, name != "original_max_position_embeddings", source)
               for name, value in given.items()}
    fields = {_YARN[name]: value for name, value in numbers.items()}
    fields |= {name: numbers.get(name) or default for name, default in _RAMP.items()}
    fields["mscale"], fields["mscale_all_dim"] = _multipliers(
        numbers["factor"], numbers.get("mscale", 0.0), numbers.get("mscale_all_dim", 0.0))
    return fields


def _multipliers(factor: float, mscale: float, mscale_all_dim: float) -> tuple[float, float]:
    """Our mscale and mscale_all_dim that make `transformers`' two multipliers of these; 0 is as good as missing.

    With m(x) = 0.1 x ln(factor) + 1 the softmax's scale has m(mscale_all_dim)^2 in both. Cosines and sines have
    m(mscale) / m(mscale_all_dim) in ours, and in `transformers` m(1) unless both are given.
    """
    if mscale and mscale_all_dim:
        return mscale, mscale_all_dim
    if factor <= 1:
        return 1.0, mscale_all_dim
    return 1.0 + mscale_all_dim * (1.0 + 0.1 * math.log(factor)), mscale_all_dim
