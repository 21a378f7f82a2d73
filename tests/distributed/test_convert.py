"""Converted checkpoints in real runs: a run starts from Hugging Face's weights, and its own become Hugging Face's."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from dsv3_megatron.certification.weight_names import reference_names, router_bias_name, whole_from_reference
from dsv3_megatron.checkpoint.folder import latest_iteration, read_manifest
from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.checkpoint.hf.to_megatron import convert_to_megatron
from dsv3_megatron.checkpoint.store import RunProgress, load_checkpoint, save_checkpoint
from dsv3_megatron.commands import train
from dsv3_megatron.config.family_json import model_config_from_json
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import SEQ_LENGTH, merge, small_run, start
from tests.family import small_folder
from tests.hugging_face import config_json, published_weights, write_checkpoint

pytestmark = pytest.mark.distributed

PP2_EP2 = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
MTP_ALONE = PP2 | {"pipeline_model_parallel_layout": "Etttt|mL"}
LOSS_APART = {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Ett|tt|m|L"}
TP2_EP2_ETP2 = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
MODEL = small_run().model


def train_from(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Take a step, load over it, and take two more."""
    training = start(small_run(**changes))
    training.step(0)
    progress = load_checkpoint(folder, training.run, training.chunks, training.optimizer, training.groups)
    assert progress == RunProgress(0, 0, 0)
    return {"state": training.whole_state(), "losses": [training.step(number) for number in range(2)]}


@pytest.mark.parametrize(("ranks", "changes"), [(4, PP2_EP2), (1, {"precision": "bf16"}), (2, MTP_ALONE),
                                               (4, LOSS_APART)],
                         ids=["PP2xEP2", "bf16", "MTP-alone", "loss-apart"])
def test_a_run_starts_from_hugging_face(tmp_path, ranks, changes):
    """Weights in the modules' dtype, the optimizer's in FP32 without a rounding between, moments zero."""
    weights = published_weights(MODEL, torch.float32)
    source = write_checkpoint(tmp_path / "hf", config_json(MODEL, max_position_embeddings=SEQ_LENGTH), weights)
    convert_to_megatron(source, tmp_path / "ours")
    results = run_ranks(ranks, train_from, tmp_path / "ours", changes)
    for key, value in merge([result["state"] for result in results]).items():
        what, name = key.split(":")
        if what in ("exp_avg", "exp_avg_sq"):
            assert not value.any(), key
        elif what == "bias":
            assert torch.equal(value, weights[router_bias_name(int(name))])
        else:
            wanted = whole_from_reference(name, weights, MODEL.num_layers)
            is_rounded = what == "weight" and "precision" in changes
            assert torch.equal(value, wanted.bfloat16() if is_rounded else wanted), key
    first, second = results[0]["losses"]
    assert first == first and second != first, "it trains on"


def train_and_save(folder: Path, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    training = start(small_run(**changes))
    training.step(0)
    save_checkpoint(folder, RunProgress(1, 4, 64), training.run, training.chunks, training.optimizer, training.groups,
                    keep_last=0)
    return training.whole_state()


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(("ranks", "changes"), [(4, TP2_EP2_ETP2), (2, PP2 | {"precision": "bf16"}),
                                               (2, MTP_ALONE | {"precision": "bf16"}),
                                               (4, LOSS_APART | {"precision": "bf16"})],
                         ids=["TP2xEP2xETP2", "PP2-bf16", "MTP-alone-bf16", "loss-apart-bf16"])
def test_a_run_becomes_hugging_face(tmp_path, ranks, changes):
    """Whatever layout wrote the checkpoint: the weights as trained, and in FP32 the optimizer's."""
    state = merge(run_ranks(ranks, train_and_save, tmp_path / "ours", changes))
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "hf", is_verified=True, max_shard_bytes=50_000)
    convert_to_hugging_face(tmp_path / "ours", tmp_path / "wide", dtype="fp32", is_verified=True)
    as_trained, wide = read_all(tmp_path / "hf"), read_all(tmp_path / "wide")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    covered = set()
    for key, value in state.items():
        what, parameter = key.split(":")
        if what == "bias":
            assert torch.equal(as_trained[router_bias_name(int(parameter))], value)
            covered.add(router_bias_name(int(parameter)))
        elif what in ("weight", "param"):
            found = whole_from_reference(parameter, as_trained if what == "weight" else wide, MODEL.num_layers)
            assert found.dtype == value.dtype and torch.equal(found, value), key
            covered |= set(reference_names(parameter, MODEL.num_layers))
    copies = {name for name in as_trained if "embed_tokens" in name or "shared_head.head" in name} - covered
    assert as_trained.keys() == wide.keys() == covered | copies
    assert torch.equal(as_trained["model.layers.4.embed_tokens.weight"], as_trained["model.embed_tokens.weight"])
    assert torch.equal(as_trained["model.layers.4.shared_head.head.weight"], as_trained["lm_head.weight"])


# ---- --from-hf ----


def test_a_run_of_a_models_architecture_resumes_and_exports(tmp_path: Path) -> None:
    """Moonlight, shrunk: from its weights under PP2, on from a checkpoint, and out as the same architecture."""
    content, weights = small_folder("moonlight-16b")
    source = write_checkpoint(tmp_path / "Moonlight", content, weights, 2)
    convert_to_megatron(source, tmp_path / "ours")
    with DatasetWriter(str(tmp_path / "data"), vocab_size=content["vocab_size"]) as writer:
        ids = np.random.default_rng(0).integers(0, content["vocab_size"], size=2000)
        writer.add_documents(ids.astype(np.int64), np.full(50, 40))
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    flags = ["--seq-length", "16", "--global-batch-size", "4", "--precision", "fp32", "--lr-decay-style", "constant",
             "--eval-interval", "0", "--data-path", str(tmp_path / "data"), "--split", "100,0,0", "--save", str(saved),
             "--pipeline-model-parallel-size", "2", "--tensorboard-dir", str(tmp_path / "logs")]
    run_ranks(2, "dsv3_megatron", "train", "--from-hf", str(source), "--load", str(tmp_path / "ours"),
              "--train-iters", "2", *flags)
    manifest = read_manifest(saved)
    assert (manifest.progress.iteration, manifest.run["from_hf"]) == (2, str(source))
    (source / "config.json").rename(tmp_path / "moved.json")  # what the run recorded is enough
    recorded = ["--config", str(tmp_path / "logs/config.json"), "--load", str(saved), "--train-iters", "3"]
    run_ranks(2, "dsv3_megatron", "train", *recorded, "--export-hf", str(exported))
    assert latest_iteration(saved) == 3
    found = HuggingFaceDirectory(exported)
    assert found.model == model_config_from_json(content) and found.tensors.keys() == {
        name for name in weights if not name.endswith("inv_freq")}


# ---- --export-hf ----

VOCAB = MIN_VOCAB_SIZE + 14
RUN = (
    "--num-layers 3 --num-dense-layers 1 --hidden-size 32 --num-attention-heads 2 --q-lora-rank 24 --kv-lora-rank 16 "
    "--qk-nope-head-dim 8 --qk-rope-head-dim 8 --v-head-dim 8 --ffn-hidden-size 48 --num-experts 4 "
    "--moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 "
    f"--vocab-size {VOCAB} --seq-length 16 --micro-batch-size 1 --global-batch-size 4 --train-iters 2 "
    "--lr-warmup-iters 0 --precision fp32 --eval-interval 0 --expert-model-parallel-size 2").split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a dataset and its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer(["some words, and some more words"] * 40, vocab_size=VOCAB)
    fingerprint = save_tokenizer(tokenizer, folder / "tokenizer")
    with DatasetWriter(str(folder / "train"), vocab_size=VOCAB, tokenizer_fingerprint=fingerprint) as writer:
        ids = np.random.default_rng(0).integers(0, VOCAB, size=2000)
        writer.add_documents(ids.astype(np.int64), np.full(50, 40))
    return ["--data-path", str(folder / "train"), "--split", "100,0,0", "--tokenizer-model", str(folder / "tokenizer")]


def test_a_run_exports_itself(tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The folder loads in transformers, and is what the command makes of the run's last checkpoint."""
    saved, exported = tmp_path / "saved", tmp_path / "hf"
    arguments = [*RUN, *data, "--save", str(saved), "--export-hf", str(exported)]
    run_ranks(2, "dsv3_megatron", "train", *arguments)
    assert latest_iteration(saved) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "saved"]
    convert_to_hugging_face(saved, tmp_path / "again", dtype="fp32")
    names = sorted(file.name for file in exported.iterdir())
    assert filecmp.cmpfiles(exported, tmp_path / "again", names, shallow=False) == (names, [], [])

    model, loading = DeepseekV3ForCausalLM.from_pretrained(exported, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all(".layers.3." in name for name in loading["unexpected_keys"]), "MTP aside"
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert AutoTokenizer.from_pretrained(exported).decode([1]) == "<｜end▁of▁sentence｜>"

    # A run of its own, into the finished export of another.
    again = [*RUN, *data, "--save", str(tmp_path / "other"), "--export-hf", str(exported)]
    assert train.main([*again, "--check-only", "--world-size", "2"]) == 2
    assert f"error: {exported} is not empty; choose another output" in capsys.readouterr().err
