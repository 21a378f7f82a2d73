"""A small checkpoint to export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsv3_megatron.certification.reference import Weights
from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
from dsv3_megatron.data.tokenizer import MIN_VOCAB_SIZE
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.architectures import variant
from tests.signing import sign

MODEL = dataclasses.replace(variant("plain"), vocab_size=MIN_VOCAB_SIZE + 14)

PROGRESS = {"iteration": 40, "consumed_samples": 320, "consumed_tokens": 81920, "guards": {}}


def trained(tmp_path: Path, model: Any = MODEL, weights: Weights | None = None, **changes: Any) -> Path:
    """A checkpoint as a run leaves it: nothing of Hugging Face's in it, and steps behind it. Weights: random ones."""
    source = write_checkpoint(tmp_path / "hf", config_json(model, max_position_embeddings=256, **changes),
                              published_weights(model) if weights is None else weights)
    convert_to_megatron(source, tmp_path / "ours")
    folder = tmp_path / "ours" / "iter_0000000"
    for file in folder.glob("hf_*"):
        file.unlink()
    sign(folder, lambda content: content.update(progress=PROGRESS))
    return tmp_path / "ours"
