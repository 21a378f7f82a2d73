"""Exports in llama.cpp, converter and runtime: its log-probabilities beside ours and Transformers'.

Runs where the packages xllamacpp and gguf are installed and LLAMA_CPP names a folder with llama.cpp's
convert_hf_to_gguf.py. What `checkpoint/hf/readers.py` says of llama.cpp is held against what it does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.pretrained import load_hugging_face
from dsv3_megatron.checkpoint.hf.readers import DIFFERS, LLAMA_CPP, REFUSES, reader_notes
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, save_tokenizer, train_tokenizer
from dsv3_megatron.model.build import build_stages
from tests.parity.architectures import run_of
from tests.unit.checkpoint.hf.test_side_files import trained

ROOT = Path(__file__).resolve().parents[2]
CONVERTER = os.environ.get("LLAMA_CPP", "")
MISSING = [name for name in ("xllamacpp", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING) or not (Path(CONVERTER) / "convert_hf_to_gguf.py").is_file(),
    reason=f"needs xllamacpp and gguf (missing: {', '.join(MISSING) or 'none'}), and LLAMA_CPP={CONVERTER!r} to be a "
           "folder with llama.cpp's convert_hf_to_gguf.py")

# All compute in fp32, llama.cpp without flash attention, whose 16 bits make 4e-3; another model is 0.05 off and more.
TOLERANCE = 1e-4
VOCAB = MIN_VOCAB_SIZE + 14
TINY = dataclasses.replace(preset("tiny").model, vocab_size=VOCAB)
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
        "rotary_base": 50.0, "mtp_num_layers": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "all-moe-two-shared-odd-widths": {
        "num_dense_layers": 0, "num_layers": 3, "num_shared_experts": 2, "num_experts": 12, "moe_router_num_groups": 1,
        "moe_router_group_topk": 1, "moe_router_group_score_topk": None, "moe_router_topk": 5, "hidden_size": 96,
        "num_attention_heads": 3, "moe_ffn_hidden_size": 40, "q_lora_rank": 20, "moe_router_topk_scaling_factor": 1.5},
    # One layer of experts: over 27 a choice between nearly equal ones may flip.
    "full-rank-query-27-layers": {"num_layers": 27, "num_dense_layers": 26, "q_lora_rank": None, "hidden_size": 64,
                                  "mtp_num_layers": 0},
    "yarn": YARN,
    "yarn-mscale-0.7": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    # What the table says that it does not take.
    "epsilon": {"layernorm_epsilon": 1e-2, "latent_layernorm_epsilon": 1e-6},
    "no-shared": {"num_shared_experts": 0},
    "full-rank-query": {"q_lora_rank": None},
    "yarn-all-dim-0": {**YARN, "mscale_all_dim": 0.0},
    "yarn-mscale-0.7-1.2": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.llama_cpp", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def of_llama_cpp(folder: Path, ids: list[int], vocab_size: int, tmp_path: Path) -> torch.Tensor | None:
    """Its log-probabilities after each prefix, [S, V]; None where it does not take the model."""
    done = run("convert", CONVERTER, str(folder), str(tmp_path / "model.gguf"))
    if done.returncode:
        print(f"its converter ends with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
        return None
    (tmp_path / "ids.json").write_text(json.dumps({
        "ids": ids, "vocab_size": vocab_size, "letter_id": load_tokenizer(folder).token_to_id("a")}))
    done = run("score", str(tmp_path / "model.gguf"), str(tmp_path / "ids.json"), str(tmp_path / "scores.json"))
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if " E " in line or "Error" in line]
        print(f"its runtime ends with {done.returncode}: {' / '.join(said[-3:])}")
    return None if done.returncode else torch.tensor(json.loads((tmp_path / "scores.json").read_text()))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", SHAPES)
def test_log_probabilities(tmp_path, groups, name):
    model: ModelConfig = dataclasses.replace(TINY, **SHAPES[name])
    model.validate()
    changes: dict[str, Any] = {"rms_norm_eps": model.layernorm_epsilon}
    save_tokenizer(train_tokenizer(["some words, and some more words"] * 40, vocab_size=VOCAB), tmp_path / "tokenizer")
    convert_to_hugging_face(trained(tmp_path, model, **changes), tmp_path / "exported", dtype="fp32",
                            tokenizer=tmp_path / "tokenizer")
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    read = HuggingFaceDirectory(tmp_path / "exported").model
    stages, _config = build_stages(run_of(read), groups, precision="fp32")
    load_hugging_face(tmp_path / "exported", list(stages), groups)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    with torch.no_grad():
        ours_SV = stages[0].eval()(input_ids=ids, position_ids=torch.arange(24)[None], attention_mask=None)[0]
        theirs_SV = theirs.eval()(ids).logits[0]
    ours_SV, theirs_SV = ours_SV.log_softmax(-1), theirs_SV.log_softmax(-1)
    llama_SV = of_llama_cpp(tmp_path / "exported", ids[0].tolist(), VOCAB, tmp_path)

    notes = [note for note in reader_notes(read, "fp32") if LLAMA_CPP in note]
    refused = any(f": {REFUSES}: " in note for note in notes)
    differs = any(f": {DIFFERS}: " in note for note in notes)
    difference = None if llama_SV is None else (llama_SV - ours_SV).abs().max().item()
    print(f"{name}: llama.cpp - ours {difference}, Transformers - ours {(theirs_SV - ours_SV).abs().max().item():.1e}")
    assert (ours_SV - theirs_SV).abs().max() <= 1e-4
    assert (llama_SV is None) == refused
    if difference is not None:
        assert (difference > TOLERANCE) == differs
