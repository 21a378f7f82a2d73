"""What an export has besides its weights, and who is said not to read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, GenerationConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from dsv3_megatron.certification.reference_weights import weight_shapes
from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf.config_json import export_refusals
from dsv3_megatron.checkpoint.hf.model_card import Losses, count_exported
from dsv3_megatron.checkpoint.hf.readers import reader_notes
from dsv3_megatron.checkpoint.hf.source import carried_files
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
from dsv3_megatron.commands import convert as convert_checkpoint
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import PRESETS, preset
from dsv3_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from dsv3_megatron.metrics.parameters import count_parameters
from dsv3_megatron.metrics.run_records import last_losses
from dsv3_megatron.ops.fp8.published import dequantize_weight_blocks, quantize_weight_blocks
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.architectures import variant
from tests.signing import sign
from tests.unit.checkpoint.hf.trained import MODEL, trained


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["some words, and some more words"] * 40, vocab_size=MODEL.vocab_size), folder)
    return folder


def exported(tmp_path: Path, checkpoint: Path, **options: Any) -> Path:
    convert_to_hugging_face(checkpoint, tmp_path / "exported", **options)
    return tmp_path / "exported"


def test_files_that_the_hub_and_its_readers_expect(tmp_path, tokenizer):
    folder = exported(tmp_path, trained(tmp_path), tokenizer=tokenizer)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "checksums.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((folder / "config.json").read_text())
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [0, 1, 2]
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.model_max_length == 256 and loaded.pad_token_id == 2
    assert loaded("some words").input_ids == AutoTokenizer.from_pretrained(tokenizer)("some words").input_ids


@pytest.mark.parametrize(("stated", "written"), [(131072, 256), (1e30, 256), (100, 100), (None, 256)])
def test_length_of_the_tokenizer(tmp_path, tokenizer, stated, written):
    own = tmp_path / "tokenizer"
    own.mkdir()
    (own / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text())
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": stated, "é": "ü"}))
    folder = exported(tmp_path, trained(tmp_path), tokenizer=own)
    content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert content == settings | {"model_max_length": written, "é": "ü"}


def test_without_a_token_that_pads(tmp_path, tokenizer):
    """Whoever generates pads with the end; whoever trains on must not freeze the end's embedding for it."""
    own = tmp_path / "tokenizer"
    own.mkdir()
    (own / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text().replace("▁pad▁", "other"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = exported(tmp_path, trained(tmp_path), tokenizer=own)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    assert GenerationConfig.from_pretrained(folder).pad_token_id == 1


def test_model_card(tmp_path, tokenizer):
    folder = exported(tmp_path, trained(tmp_path), tokenizer=tokenizer, license_id="mit",
                      losses=Losses(2.34567, 2.5, 30))
    card = (folder / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    assert "license: mit\n" in front and "library_name: transformers\n" in front
    total = sum(torch.Size(shape).numel() for name, shape in weight_shapes(MODEL).items()
                if "layers.3." not in name and "e_score_correction_bias" not in name)
    for text in (f"{total:,} parameters", "| Tokens | 81,920 |", "| Optimizer steps | 40 |",
                 "| Balance loss | seq_aux_loss, weight 0.0001 |",
                 "| Training loss | 2.3457 nats per token |",
                 "| Validation loss | 2.5000 nats per token after step 30 |",
                 "| Context | 256 tokens |", "AutoTokenizer"):
        assert text in body, text
    assert "Licence" not in body
    assert "mlx-lm 0.32: refuses: num_layers=3, mtp_num_layers=1" in body


def test_model_card_of_what_is_not_known(tmp_path):
    card = (exported(tmp_path, trained(tmp_path)) / "README.md").read_text()
    assert "license: unknown\n" in card and "## Licence\n\nNot stated." in card
    assert "| Training loss | not known |" in card and "AutoTokenizer" not in card


def test_model_card_of_what_was_not_trained_on_plain_texts(tmp_path):
    """What GRPO logs as its loss is an objective: in a card it would be read as a loss of texts."""
    checkpoint = trained(tmp_path)
    sign(checkpoint / "iter_0000000", lambda content: content["run"].update(data={"sft": True}))
    card = (exported(tmp_path, checkpoint, losses=Losses(1.5)) / "README.md").read_text()
    assert "| Fine-tuned on | conversations |" in card and "1.5000 nats per token" in card
    sign(checkpoint / "iter_0000000", lambda content: content["run"].update(policy={"prompts": "sums.jsonl"}))
    convert_to_hugging_face(checkpoint, tmp_path / "learnt", losses=Losses(-0.25))
    card = (tmp_path / "learnt" / "README.md").read_text()
    assert "| Learnt from | its own answers to prompts, by their rewards (GRPO) |" in card and "nats" not in card


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameters_of_the_card(name):
    """As metrics/parameters.py counts them, from the layers and not from the tensors of a file."""
    model, table = preset(name).model, count_parameters(preset(name).model)
    counts = count_exported(model)
    assert (counts.main, counts.active, counts.mtp) == (table.main_total, table.main_active, table.mtp_total)


def test_losses_of_a_run(tmp_path):
    lines = [{"kind": "step", "iteration": 1, "lm_loss": 4.0}, {"kind": "step", "iteration": 2, "lm_loss": 3.0},
             {"kind": "validation", "iteration": 1, "lm_loss": 3.5},
             {"kind": "validation", "iteration": 3, "lm_loss": 2}]
    assert last_losses(None, 2) == last_losses(tmp_path, 2) == (None, None, None)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_losses(tmp_path, 2) == (3.0, 3.5, 1)
    assert last_losses(tmp_path, 3) == (None, 2, 3)
    (tmp_path / "metrics.jsonl").write_text("{\n")
    assert last_losses(tmp_path, 2) == (None, None, None)


def test_without_mtp(tmp_path, capsys):
    checkpoint = trained(tmp_path)
    command = ["megatron-to-hf", "--input", str(checkpoint), "--output", str(tmp_path / "exported"), "--verify"]
    assert convert_checkpoint.main([*command, "--no-mtp"]) == 0
    folder = tmp_path / "exported"
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
    model, loading = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert "multi-token" not in (folder / "README.md").read_text().lower()
    del model
    assert convert_checkpoint.main([*command[:-1], "--output", str(tmp_path / "whole"), "--verify"]) == 0
    _model, loading = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert len(loading["unexpected_keys"]) > 10


def test_without_mtp_of_a_converted_checkpoint(tmp_path):
    """Not its source any more: its config.json says so, and names are those of an export."""
    source = write_checkpoint(tmp_path / "hf", config_json(MODEL), published_weights(MODEL))
    convert_to_megatron(source, tmp_path / "ours")
    folder = exported(tmp_path, tmp_path / "ours", is_without_mtp=True, is_verified=True)
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    assert (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").exists()


# ---- readers ----


@pytest.mark.parametrize("width", [96, 256, 192, 200, 320, 576, 10944])
def test_fp8_in_transformers_without_a_gpu(width):
    """It divides a matrix into equal blocks: it refuses, or computes other weights, exactly where the table says so."""
    model = dataclasses.replace(MODEL, hidden_size=128, ffn_hidden_size=width)
    is_named = any("Transformers 5.23: refuses: " in note and f"ffn_hidden_size={width}" in note
                   for note in reader_notes(model, "fp8"))
    generator = torch.Generator().manual_seed(0)
    values, scales = quantize_weight_blocks(torch.randn(width, 128, generator=generator) * torch.arange(width)[:, None])
    expected = dequantize_weight_blocks(values, scales, torch.float32)
    try:
        theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
        is_taken = torch.equal(theirs, expected)
    except ValueError:
        is_taken = False
    assert is_taken == (not is_named)


# ---- what cannot be exported at all ----


def test_refusals_need_no_weights():
    assert export_refusals(preset("dsv3-671b").model) == []
    model = dataclasses.replace(variant("groups"), moe_router_topk=6, layernorm_epsilon=1e-5, rope_type="yarn",
                                rotary_scaling_factor=4.0, mscale=0.7, mscale_all_dim=0.0)
    reasons = export_refusals(model)
    assert [reason.partition("=")[0] for reason in reasons] == [
        "moe_router_group_score_topk", "layernorm_epsilon", "mscale"]
    assert all("; " in reason for reason in reasons), "each says the way out"


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer=.*nowhere is not a folder"):
        convert_to_hugging_face(trained(tmp_path), tmp_path / "exported", tokenizer=tmp_path / "nowhere")


def test_links_out_of_a_folder_are_not_copied(tmp_path, monkeypatch):
    model = tmp_path / "models--a--b" / "snapshots" / "1"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    model.mkdir(parents=True)
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "models--a--b" / "blobs" / "f00").write_text("{}")
    (model / "tokenizer.json").symlink_to("../../blobs/f00")  # as the hub's cache has it
    (model / "merges.txt").write_text("")
    (model / "vocab.txt").symlink_to("merges.txt")
    assert [file.name for file in carried_files(model)] == ["merges.txt", "tokenizer.json", "vocab.txt"]
    (model / "added_tokens.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is a link to .*secret\.json, outside of its folder"):
        list(carried_files(model))
    monkeypatch.setenv("DSV3_FOLLOW_LINKS", "1")
    assert len(list(carried_files(model))) == 4
