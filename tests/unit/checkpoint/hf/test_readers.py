"""Which programs read an export, and what they say of what they do not take."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.hf.readers import LIMITS, READERS, reader_notes, readers_table
from dsv3_megatron.commands import convert as convert_checkpoint
from dsv3_megatron.config.presets import preset
from tests.unit.checkpoint.hf.trained import trained

ROOT = Path(__file__).resolve().parents[4]


def test_the_docs_have_the_table():
    page = (ROOT / "docs" / "export" / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- readers -->\n(.*)<!-- /readers -->", page, re.DOTALL)
    assert match is not None and match[1] == readers_table()


@pytest.mark.parametrize(("changes", "dtype", "expected"), [
    ({}, "bf16", []),
    ({"layernorm_epsilon": 1e-5, "latent_layernorm_epsilon": 1e-6}, "bf16",
     ["vLLM 0.32, SGLang 0.5.23, llama.cpp (Oct 2026): other results: layernorm_epsilon=1e-05"]),
    ({"moe_ffn_hidden_size": 96}, "bf16", []),
    ({"moe_ffn_hidden_size": 96}, "fp8", [
        "SGLang 0.5.23: refuses: moe_ffn_hidden_size=96, num_shared_experts * moe_ffn_hidden_size=96",
        "vLLM 0.32: refuses: moe_ffn_hidden_size=96", "Transformers 4.57: refuses: dtype=fp8"]),
    ({"ffn_hidden_size": 10944}, "fp8", ["SGLang 0.5.23: refuses: ffn_hidden_size=10944",
                                         "vLLM 0.32: refuses: ffn_hidden_size=10944",
                                         "Transformers 5.23: refuses: ffn_hidden_size=10944",
                                         "Transformers 4.57: refuses: dtype=fp8"]),
    # 3 + 3 rows of blocks apart, and 704 rows together have six too.
    ({"ffn_hidden_size": 352}, "fp8", ["SGLang 0.5.23: refuses: ffn_hidden_size=352",
                                       "vLLM 0.32: other results: ffn_hidden_size=352",
                                       "Transformers 5.23: refuses: ffn_hidden_size=352",
                                       "Transformers 4.57: refuses: dtype=fp8"]),
    ({"ffn_hidden_size": 10944, "num_dense_layers": 0}, "fp8", ["Transformers 4.57: refuses: dtype=fp8"]),
    # 1 + 3 rows of blocks, of 64 + 320 rows: three on top of each other. Of 64 + 512: five either way.
    ({"q_lora_rank": 64, "kv_lora_rank": 288, "qk_rope_head_dim": 32}, "fp8", [
        "vLLM 0.32, SGLang 0.5.23: refuses: q_lora_rank=64",
        "Transformers 5.23: refuses: kv_lora_rank + qk_rope_head_dim=320, kv_lora_rank=288",
        "Transformers 4.57: refuses: dtype=fp8"]),
    ({"q_lora_rank": 64}, "fp8", ["vLLM 0.32, SGLang 0.5.23: other results: q_lora_rank=64",
                                  "Transformers 4.57: refuses: dtype=fp8"]),
    ({"q_lora_rank": 64}, "bf16", []),
    ({"num_shared_experts": 0}, "bf16", [
        "SGLang 0.5.23, llama.cpp (Oct 2026), mlx-lm 0.32: refuses: num_shared_experts=0",
        "vLLM 0.32: refuses: num_shared_experts=0"]),
    ({"rope_type": "yarn", "rotary_scaling_factor": 4.0, "mscale_all_dim": 0.0}, "bf16",
     ["llama.cpp (Oct 2026): other results: mscale=1.0, mscale_all_dim=0.0"]),
    ({"rope_type": "yarn", "rotary_scaling_factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}, "bf16", []),
    ({"mtp_num_layers": 1}, "bf16", [
        "Transformers 5.23, Transformers 4.57, llama.cpp (Oct 2026): leaves out: mtp_num_layers=1",
        "mlx-lm 0.32: refuses: num_layers=4, mtp_num_layers=1"]),
    ({"mtp_num_layers": 1, "num_layers": 61}, "bf16", [
        "Transformers 5.23, Transformers 4.57, llama.cpp (Oct 2026): leaves out: mtp_num_layers=1"]),
    ({"mtp_num_layers": 2, "num_layers": 61}, "bf16", [
        "Transformers 5.23, Transformers 4.57, llama.cpp (Oct 2026): leaves out: mtp_num_layers=2",
        "mlx-lm 0.32: refuses: num_layers=61, mtp_num_layers=2", "SGLang 0.5.23: refuses: mtp_num_layers=2"]),
    ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, "bf16",
     ["Transformers 4.57, mlx-lm 0.32: other results: moe_router_num_groups=4, moe_router_group_topk=2"]),
    ({"moe_router_topk": 1}, "bf16", ["mlx-lm 0.32: other results: moe_router_topk=1"]),
    ({"q_lora_rank": None}, "bf16", ["llama.cpp (Oct 2026): refuses: q_lora_rank=None, num_layers=4"]),
    ({"q_lora_rank": None, "num_layers": 27}, "bf16", []),
    ({"kv_lora_rank": 512}, "bf16", ["vLLM 0.32: refuses: kv_lora_rank=512, qk_rope_head_dim=128"]),
    ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "bf16", []),
], ids=str)
def test_who_does_not_take_what(changes, dtype, expected):
    # Widths of whole blocks, latent and rotary key of 512 together, no MTP, no groups: what every reader takes.
    plain = dataclasses.replace(
        preset("tiny").model, mtp_num_layers=0, moe_router_num_groups=1, moe_router_group_topk=1, ffn_hidden_size=384,
        moe_router_group_score_topk=None, moe_ffn_hidden_size=128, q_lora_rank=128, kv_lora_rank=384,
        qk_rope_head_dim=128)
    notes = reader_notes(dataclasses.replace(plain, **changes), dtype)
    assert [": ".join(note.split(": ")[:3]) for note in notes] == expected
    assert all(reader in READERS for limit in LIMITS for reader in limit.readers)


def test_the_export_says_it(tmp_path, caplog, capsys):
    checkpoint = trained(tmp_path)
    with caplog.at_level("INFO", "dsv3_megatron"):
        assert convert_checkpoint.main(["megatron-to-hf", "--input", str(checkpoint), "--dtype", "fp8", "--output",
                                        str(tmp_path / "exported")]) == 0
    assert "not everything reads it: SGLang 0.5.23: refuses: ffn_hidden_size=40, " in caplog.text
    with pytest.raises(SystemExit):
        convert_checkpoint.main(["megatron-to-hf", "--help"])
    assert "vLLM load" not in capsys.readouterr().out
