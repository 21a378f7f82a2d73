"""A `config.json` as Transformers reads it: the same folder loaded by both gives the same logits, or is refused here.

Legend: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_megatron.checkpoint.folder import CheckpointError
from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.pretrained import load_hugging_face
from dsv3_megatron.config.family_json import ignored_settings
from dsv3_megatron.model.build import build_stages
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.architectures import run_of, variant
from tests.parity.compare import relative_error

# Both compute in fp32 and sum in other orders.
FP32_TOLERANCE = 1e-5
ABSENT = object()
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}
GROUPS = variant("groups", mtp_num_layers=0)


def folder_of(tmp_path: Path, model: Any = GROUPS, **changes: Any) -> Path:
    """Weights in fp32 beside a config.json with these changes."""
    content = config_json(model, torch_dtype="float32", rope_theta=50.0, max_position_embeddings=640) | changes
    content = {name: value for name, value in content.items() if value is not ABSENT}
    return write_checkpoint(tmp_path / "hf", content, published_weights(model, torch.float32), num_shards=0)


def logits_of_both(folder: Path, groups: Any, length: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and Transformers' logits of random tokens, [B, S, V]."""
    model = HuggingFaceDirectory(folder).model
    stages, _config = build_stages(run_of(model), groups, precision="fp32")
    load_hugging_face(folder, list(stages), groups)
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens_BS = torch.randint(0, model.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BSV = stages[0].eval()(input_ids=tokens_BS, position_ids=torch.arange(length).expand(2, -1),
                                    attention_mask=None)
        return ours_BSV, theirs.eval()(tokens_BS).logits


MSCALES = [dict(zip(("mscale", "mscale_all_dim"), pair, strict=True))
           for pair in itertools.product((ABSENT, None, 0, 0.7, 1.0, 1.3), repeat=2)]


@pytest.mark.parametrize("mscales", MSCALES, ids=lambda pair: "-".join(
    "absent" if value is ABSENT else str(value) for value in pair.values()))
def test_yarn_multipliers(tmp_path, groups, mscales):
    """Transformers takes the one formula where both multipliers are there and not 0, and another where one is not."""
    scaling = {name: value for name, value in {**YARN, **mscales}.items() if value is not ABSENT}
    ours_BSV, theirs_BSV = logits_of_both(folder_of(tmp_path, rope_scaling=scaling), groups)
    assert relative_error(ours_BSV, theirs_BSV) <= FP32_TOLERANCE


@pytest.mark.parametrize(("original", "theta", "betas"), [
    (4, 50.0, {}), (64, 50.0, {"beta_fast": 0, "beta_slow": None}), (4096, 50.0, {}), (16, 1e6, {"beta_slow": 8}),
], ids=str)
def test_yarn_ramps(tmp_path, groups, original, theta, betas):
    """Also where no pair, or every pair, turns often enough, so that the ends of the ramp are in the wrong order."""
    scaling = {**YARN, "original_max_position_embeddings": original, "beta_fast": 32, **betas}
    ours_BSV, theirs_BSV = logits_of_both(folder_of(tmp_path, rope_scaling=scaling, rope_theta=theta,
                                                    max_position_embeddings=40 * original), groups)
    assert relative_error(ours_BSV, theirs_BSV) <= FP32_TOLERANCE


SAME_MODEL = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": ABSENT, "rope_scaling": ABSENT},
    {"rope_theta": ABSENT, "rope_scaling": ABSENT},
    {"rope_scaling": {**YARN, "truncate": True, "attention_factor": None, "beta_fast": None}},
    {"original_max_position_embeddings": 16},
    {"rms_norm_eps": 1e-4},
    {"hidden_act": "swish"},
    {"attention_dropout": 0.1},
    {"pretraining_tp": 2},
    {"n_group": ABSENT, "topk_group": ABSENT, "n_shared_experts": ABSENT, "num_experts_per_tok": 4,
     "num_nextn_predict_layers": ABSENT, "rope_interleave": ABSENT, "norm_topk_prob": ABSENT},
    {"scoring_func": ABSENT, "topk_method": ABSENT, "moe_layer_freq": ABSENT},
    {"layer_types": ["full_attention"] * 3, "sliding_window": None},
    {"pad_token_id": 3, "eos_token_id": [1, 2], "dtype": "float32"},
    {"moe_router_dtype": "float32", "routed_expert_dropout": 0.1, "my_note": {"any": ["thing"]}, "summary_type": "x"},
]


@pytest.mark.parametrize("changes", SAME_MODEL, ids=lambda changes: "+".join(changes))
def test_settings_that_are_read_as_transformers_does(tmp_path, groups, changes):
    model = dataclasses.replace(GROUPS, num_experts=16, moe_router_num_groups=8, moe_router_group_topk=4,
                                moe_router_group_score_topk=2, num_shared_experts=1)
    ours_BSV, theirs_BSV = logits_of_both(folder_of(tmp_path, model, **changes), groups)
    assert relative_error(ours_BSV, theirs_BSV) <= FP32_TOLERANCE


@pytest.mark.parametrize("changes", [
    {"rope_interleave": False}, {"rope_interleave": None}, {"norm_topk_prob": False}, {"norm_topk_prob": None},
    {"hidden_act": "gelu"}, {"is_causal": False}, {"n_group": 2}, {"topk_group": 3}, {"routed_scaling_factor": 1.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {**YARN, "attention_factor": 1.2}},
    {"rope_scaling": {**YARN, "truncate": False, "original_max_position_embeddings": 64, "beta_fast": 3}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 32},
], ids=lambda changes: "+".join(f"{name}={value}" for name, value in changes.items())[:60])
def test_settings_that_change_transformers_logits_are_refused_or_change_ours(tmp_path, groups, changes):
    """Each of them makes another model in Transformers; here it is read as such, or refused with its name."""
    plain = folder_of(tmp_path / "plain", **({"rope_scaling": YARN} if "rope_scaling" in changes else {}))
    _ours, before_BSV = logits_of_both(plain, groups)
    folder = folder_of(tmp_path / "changed", **changes)
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens_BS = torch.randint(0, GROUPS.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(theirs.eval()(tokens_BS).logits, before_BSV) > 1e-3, "no effect in Transformers"
    try:
        ours_BSV, theirs_BSV = logits_of_both(folder, groups)
    except CheckpointError as error:
        assert any(name in str(error) for name in changes)
        return
    assert relative_error(ours_BSV, theirs_BSV) <= FP32_TOLERANCE


def test_every_setting_that_transformers_reads_is_known(tmp_path):
    """Watched while it builds a model and runs it: what a file can say of it is translated, fixed or harmless here."""
    read: set[str] = set()

    class Watched(DeepseekV3Config):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("__"):
                read.add(name)
            return super().__getattribute__(name)

    config = Watched.from_pretrained(folder_of(tmp_path))
    model = DeepseekV3ForCausalLM(config).eval()
    read.clear()  # of making a configuration and of naming a model's default ways to generate
    DeepseekV3ForCausalLM(config)
    built, tokens_BS = set(read), torch.tensor([[5, 6, 7]])
    read.clear()
    with torch.no_grad():
        cache = model(tokens_BS, use_cache=True).past_key_values
        model(tokens_BS[:, :1], past_key_values=cache)
    assert {"num_experts_per_tok", "norm_topk_prob"} & built and {"rope_interleave", "is_causal"} <= read
    settings = {name for name in read | built if not name.startswith("_")
                and not callable(getattr(DeepseekV3Config, name, None))
                and not isinstance(getattr(DeepseekV3Config, name, None), property)}
    unknown = {setting.partition("=")[0] for setting in ignored_settings(dict.fromkeys(settings))}
    assert not unknown - HARMLESS, " ".join(sorted(unknown - HARMLESS))


# Around the model, not in it: how it is spread over devices, and looks for the parts of models that see.
HARMLESS = {"base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan",
            "vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy"}


# ---- other spellings of the weights ----

def fused(weights: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """Each layer's experts in two tensors, as `save_pretrained(save_original_format=False)` writes them."""
    result = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] + ".experts" for name in weights if ".mlp.experts." in name}):
        gate, up, down = (torch.stack([weights[f"{prefix}.{expert}.{kind}_proj.weight"]
                                       for expert in range(num_experts)]) for kind in ("gate", "up", "down"))
        result |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), 1), f"{prefix}.down_proj": down}
    return result


def test_fused_experts(tmp_path, groups):
    """As Transformers writes them itself, and it reads them again."""
    folder = folder_of(tmp_path)
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    with safe_open(tmp_path / "fused" / "model.safetensors", "pt") as stored:
        assert "model.layers.1.mlp.experts.gate_up_proj" in stored.keys()
    ours_BSV, theirs_BSV = logits_of_both(tmp_path / "fused", groups)
    assert relative_error(ours_BSV, theirs_BSV) <= FP32_TOLERANCE
    before_BSV, _theirs = logits_of_both(folder, groups)
    assert torch.equal(ours_BSV, before_BSV)


def test_fused_experts_of_mtp_modules(tmp_path, groups):
    model = variant("mtp-2-groups")
    weights = published_weights(model, torch.float32)
    write_checkpoint(tmp_path / "apart", config_json(model), weights, num_shards=0)
    write_checkpoint(tmp_path / "fused", config_json(model), fused(weights, model.num_experts), num_shards=0)
    apart, together = (HuggingFaceDirectory(tmp_path / name) for name in ("apart", "fused"))
    assert together.model == apart.model and together.model.mtp_num_layers == 2
    assert together.tensors.keys() == apart.tensors.keys()
    assert all(torch.equal(together.tensor(name), apart.tensor(name)) for name in apart.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("prefixes", [[f"model.layers.{layer}.self_attn." for layer in range(3)], ["model."], [""]],
                         ids=["of-layers", "of-the-model", "bare"])
def test_stored_frequencies(tmp_path, groups, caplog, prefixes, dtype):
    """As older programs store them: compared with config.json's theta, then left alone by both."""
    frequencies = torch.tensor([50.0 ** (-2 * pair / 8) for pair in range(4)]).to(dtype)
    folder = with_frequencies(folder_of(tmp_path), {f"{prefix}rotary_emb.inv_freq": frequencies.clone()
                                                    for prefix in prefixes})
    with caplog.at_level("INFO", "dsv3_megatron"):
        ours_BSV, theirs_BSV = logits_of_both(folder, groups)
    assert relative_error(ours_BSV, theirs_BSV) <= FP32_TOLERANCE
    assert f"{len(prefixes)} stored tables of rotary frequencies are those that config.json makes" in caplog.text


def test_stored_frequencies_of_another_embedding(tmp_path):
    frequencies = torch.tensor([60.0 ** (-2 * pair / 8) for pair in range(4)])
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    folder = with_frequencies(folder_of(tmp_path / "a"), {name: frequencies})
    with pytest.raises(CheckpointError, match=rf"{name} holds \[1, 0.359304, .* config.json makes \[1, 0.37606"):
        HuggingFaceDirectory(folder)
    folder = with_frequencies(folder_of(tmp_path / "b"), {name: frequencies[:3]})
    with pytest.raises(CheckpointError, match=f"{name} holds"):
        HuggingFaceDirectory(folder)


def test_stored_frequencies_under_yarn(tmp_path):
    """Those before the extension, or after it as Transformers computes them."""
    folder = folder_of(tmp_path / "a", rope_scaling=YARN)
    after = DeepseekV3ForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    before = torch.tensor([50.0 ** (-2 * pair / 8) for pair in range(4)])
    assert not torch.allclose(before, after)
    for name, frequencies in (("b", before), ("c", after)):
        HuggingFaceDirectory(with_frequencies(folder_of(tmp_path / name, rope_scaling=YARN),
                                              {"model.rotary_emb.inv_freq": frequencies}))
    with pytest.raises(CheckpointError, match="another rotary embedding"):
        HuggingFaceDirectory(with_frequencies(folder_of(tmp_path / "d", rope_scaling=YARN),
                                              {"model.rotary_emb.inv_freq": (before + after) / 2}))


def with_frequencies(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
