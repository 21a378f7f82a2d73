"""What the order of a run's samples follows from: for a checkpoint to say, and a resumed run to compare. No torch.

Files are told apart by what they hold, not by where they lie: data that were moved are the same data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsv3_megatron.data.blend import read_tokenizer_fingerprint
from dsv3_megatron.data.chat.masked import mask_prefix
from dsv3_megatron.data.chat.prompts import open_run_prompts
from dsv3_megatron.data.contents import read_contents
from dsv3_megatron.data.datasets import DatasetConfig, dataset_config, parse_split

if TYPE_CHECKING:
    from dsv3_megatron.config.data import DataConfig
    from dsv3_megatron.config.recipe import PlannedPhase
    from dsv3_megatron.config.run import RunConfig

# Of the order in samples.py; another one would be another order of the same data.
_ORDER = 1
_HASHES = ("idx_sha256", "bin_sha256")


def data_identity(config: DatasetConfig, data: DataConfig) -> dict[str, Any]:
    """What a run's training samples, and what counts of them, follow from; plain values.

    Args:
        config: Configuration of the dataset that the run reads at the time.
        data: The run's data settings at the time.

    Raises:
        ValueError: a file is missing or damaged.
    """
    blend = config.blend or config.train_blend
    assert blend is not None
    share = parse_split(config.split)[0] if config.blend is not None else 1.0
    found = [read_contents(prefix, cache_dir=data.data_cache_path) for prefix in blend.prefixes]
    weights = blend.weights if blend.weights is not None and len(blend.prefixes) > 1 else None
    return {
        "order": _ORDER,
        "seed": config.seed,
        "seq_length": config.seq_length,
        "share for training": share,
        "weights": None if weights is None else [weight / sum(weights) for weight in weights],
        "datasets": [{"name": os.path.basename(prefix), "sequences": contents.num_sequences,
                      **{name: getattr(contents, name) for name in _HASHES}}
                     for prefix, contents in zip(blend.prefixes, found, strict=True)],
        "tokenizer": read_tokenizer_fingerprint(blend.prefixes),
        **{name: getattr(data, name) for name in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")},
        **(_of_conversations(blend.prefixes, data) if data.sft else {}),
    }


def run_identity(run: RunConfig, phase: PlannedPhase) -> dict[str, Any]:
    """What the samples of a phase of a run follow from: those of its datasets, or the answers to its prompts.

    Raises:
        ValueError: a file is missing or damaged.
    """
    span = run.recipe().span_of(phase)
    if not run.policy.is_on:
        return data_identity(dataset_config(run, span), phase.data)
    prompts = open_run_prompts(run)
    return {
        "order": _ORDER,
        "seed": run.training.seed,
        "group_size": run.policy.group_size,
        "datasets": [{"name": os.path.basename(prompts.file), "sequences": len(prompts.prompts),
                      **dict.fromkeys(_HASHES, prompts.sha256)}],
        "tokenizer": prompts.tokenizer,
    }


def _of_conversations(prefixes: Sequence[str], data: DataConfig) -> dict[str, Any]:
    """What of conversations is not in their tokens."""
    masks = [read_contents(mask_prefix(prefix), cache_dir=data.data_cache_path).bin_sha256 for prefix in prefixes]
    return {"sft": True, "long_conversations": data.long_conversations, "masks": masks}


def other_data(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What of two identities differs, in words; the second is a checkpoint's. A tokenizer that one does not know, does
    not differ."""
    found = []
    if [[item[name] for name in _HASHES] for item in mine["datasets"]] != [
            [item[name] for name in _HASHES] for item in theirs["datasets"]]:
        found.append(f"the data are {_names(mine)} (checkpoint: {_names(theirs)})")
    for name in mine:
        values = mine[name], theirs.get(name)
        if name == "datasets" or values[0] == values[1] or (name == "tokenizer" and None in values):
            continue
        shown = [str(value)[:12] if name == "tokenizer" else str(value) for value in values]
        found.append(f"{name}={shown[0]} (checkpoint: {shown[1]})")
    return found


def _names(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{item['name']} of {item['sequences']} sequences, hash {item['bin_sha256'][:8]}"
                     for item in identity["datasets"])
