"""What is exported computes in `transformers` what it computes here: same keys, same logits.

Legend: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.pretrained import load_hugging_face
from dsv3_megatron.checkpoint.hf.source import DESCRIPTION
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
from dsv3_megatron.model.build import build_stages
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.architectures import run_of, variant
from tests.parity.compare import relative_error
from tests.signing import sign

# Both compute in fp32 and sum in other orders; the bound is 1e-5 of the largest logit.
FP32_TOLERANCE = 1e-5


def export(tmp_path: Path, name: str) -> Path:
    """Random weights in a checkpoint of ours that knows nothing of Hugging Face, exported."""
    model = variant(name)
    source = write_checkpoint(tmp_path / "hf", config_json(model), published_weights(model, torch.float32))
    convert_to_megatron(source, tmp_path / "ours")
    checkpoint = tmp_path / "ours" / "iter_0000000"
    (checkpoint / DESCRIPTION).unlink()
    sign(checkpoint)
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "exported", max_shard_bytes=30_000)
    return tmp_path / "exported"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("name", ["plain", "groups", "yarn", "yarn-mscale", "full-rank-query", "no-shared",
                                  "two-shared", "no-mtp", "mtp-2"])
def test_loads_in_transformers_with_the_same_logits(tmp_path, groups, name):
    folder = export(tmp_path, name)
    model = HuggingFaceDirectory(folder).model
    theirs, loading = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    mtp = tuple(f"model.layers.{model.num_layers + depth}." for depth in range(model.mtp_num_layers))
    assert all(key.startswith(mtp) for key in loading["unexpected_keys"])

    run = run_of(dataclasses.replace(model, max_position_embeddings=256))
    stages, _config = build_stages(run, groups, precision="fp32")
    load_hugging_face(folder, list(stages), groups)
    tokens_BS = torch.randint(0, model.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BSV = stages[0].eval()(input_ids=tokens_BS, position_ids=torch.arange(17).expand(2, -1),
                                    attention_mask=None)
        theirs_BSV = theirs.eval()(tokens_BS).logits
    assert relative_error(ours_BSV, theirs_BSV) <= FP32_TOLERANCE
