"""What the programs are given, and what this library computes of it.

The weights are random and large: another model is 0.05 off and more. The head's rows of words are larger than the
others, so that an answer is text, which programs print alike.

Legend: S positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv3_megatron.certification.reference_weights import is_router_bias
from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.pretrained import load_hugging_face
from dsv3_megatron.checkpoint.hf.readers import LIMITS
from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, save_tokenizer, train_tokenizer
from dsv3_megatron.model.build import build_stages
from tests.clients.environments import ROOT, Client
from tests.hugging_face import dequantized, published_weights
from tests.parity.architectures import run_of
from tests.unit.checkpoint.hf.trained import trained

VOCAB = MIN_VOCAB_SIZE + 14
# All compute in fp32 and sum in another order; another model is 0.05 off and more.
TOLERANCE = 1e-4
# The text whose log-probabilities the pages compute, and the question that they ask.
TEXT, QUESTION, ANSWER_TOKENS = "The quick brown fox jumps over the lazy dog.", "some more words", 16
WORDS = "some words, and some more words"
BOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


@dataclass(frozen=True)
class Shape:
    """An architecture and how it is exported.

    Attributes:
        changes: Fields unlike the quickstart's.
        dtype: Of the export's matrices.
        router_bias: What is added to every router's bias. With 2, as with -2, all keep one sign.
        harmless: Subjects of `readers.py` that this model has, and that change nothing in it.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"
    router_bias: float = 2.0
    harmless: tuple[str, ...] = ()

    @property
    def model(self) -> ModelConfig:
        """The quickstart's architecture with a small vocabulary, changed and checked."""
        model: ModelConfig = dataclasses.replace(preset("tiny").model, **{"vocab_size": VOCAB, **self.changes})
        model.validate()
        return model

    def effects(self, reader: str, read: ModelConfig) -> set[str]:
        """What `readers.py` says that a reader does with this export, whose architecture is `read`."""
        return {limit.effect for limit in LIMITS if reader in limit.readers and limit.subject not in self.harmless
                and limit.found_in(read, self.dtype)}


GROUPS = "groups of experts that a token may not go to"
ONE_GROUP = {"moe_router_num_groups": 1, "moe_router_group_topk": 1, "moe_router_group_score_topk": None,
             "mtp_num_layers": 0}
YARN = {**ONE_GROUP, "rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 4.0, "rotary_base": 50.0}
# Whole blocks of 128, or one that is not filled.
FP8 = {**ONE_GROUP, "qk_rope_head_dim": 32, "q_lora_rank": 128, "moe_ffn_hidden_size": 128}
SHAPES = {
    "tiny": Shape(harmless=(GROUPS,)),
    "tiny-without-mtp": Shape({"mtp_num_layers": 0}, harmless=(GROUPS,)),
    "all-moe-two-shared-odd-widths": Shape({
        **ONE_GROUP, "num_dense_layers": 0, "num_layers": 3, "num_shared_experts": 2, "num_experts": 12,
        "moe_router_topk": 5, "hidden_size": 96, "num_attention_heads": 3, "moe_ffn_hidden_size": 40, "q_lora_rank": 20,
        "moe_router_topk_scaling_factor": 1.5}),
    # One layer of experts: over 27 a choice between nearly equal ones may flip.
    "full-rank-query-27-layers": Shape({**ONE_GROUP, "num_layers": 27, "num_dense_layers": 26, "q_lora_rank": None,
                                        "hidden_size": 64}),
    "mtp-after-61-layers": Shape({**ONE_GROUP, "num_layers": 61, "num_dense_layers": 60, "hidden_size": 64,
                                  "mtp_num_layers": 1}),
    "yarn": Shape(YARN),
    "yarn-mscale-0.7": Shape({**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}),
    # What one reader or another does not take.
    "epsilon": Shape({**ONE_GROUP, "layernorm_epsilon": 1e-2, "latent_layernorm_epsilon": 1e-6}),
    "no-shared": Shape({**ONE_GROUP, "num_shared_experts": 0}),
    "full-rank-query": Shape({**ONE_GROUP, "q_lora_rank": None}),
    "yarn-all-dim-0": Shape({**YARN, "mscale_all_dim": 0.0}),
    "yarn-mscale-0.7-1.2": Shape({**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}),
    "groups-under-negative-biases": Shape({"mtp_num_layers": 0}, router_bias=-2.0),
    "one-expert-a-token": Shape({**ONE_GROUP, "moe_router_topk": 1}),
    "fp8": Shape(FP8, dtype="fp8"),
    "fp8-narrow-experts": Shape({**FP8, "moe_ffn_hidden_size": 96}, dtype="fp8"),
    "fp8-uneven-blocks": Shape({**FP8, "ffn_hidden_size": 385}, dtype="fp8"),
    # Rows of blocks of two projections on top of each other: as many as apart, in which scales move; or fewer.
    "fp8-moved-ffn": Shape({**FP8, "ffn_hidden_size": 352}, dtype="fp8"),
    "fp8-moved-query": Shape({**FP8, "q_lora_rank": 96}, dtype="fp8"),
    "fp8-fewer-queries": Shape({**FP8, "q_lora_rank": 32}, dtype="fp8"),
}


def shapes_of(client: Client) -> dict[str, Shape]:
    """The shapes that a client is given: all, with what it needs; and "narrow-latents" without, where it needs it."""
    shapes = {name: dataclasses.replace(shape, changes={**shape.changes, **client.needs})
              for name, shape in SHAPES.items()}
    return {**shapes, "narrow-latents": SHAPES["tiny"]} if client.needs else shapes


def make_quickstart(folder: Path, shape: Shape) -> Path:
    """Make what the pages presuppose in a folder: `runs/quickstart/` with its model and tokenizer, and `examples/`.

    Returns `runs/quickstart`.
    """
    model = shape.model
    quickstart = folder / "runs" / "quickstart"
    save_tokenizer(train_tokenizer([WORDS] * 40, vocab_size=VOCAB), quickstart / "tokenizer")
    tokenizer = load_tokenizer(quickstart / "tokenizer")
    weights = published_weights(model)
    no_words = [id_ for id_ in range(VOCAB) if not tokenizer.decode([id_]).strip(" ,").isalpha()
                or not tokenizer.decode([id_]).isascii()]
    for name, weight in weights.items():
        if name == "lm_head.weight" or name.endswith("shared_head.head.weight"):
            weight[no_words] *= 0.1
        if is_router_bias(name):
            weight += shape.router_bias
    trained(folder / "made", model, weights, rms_norm_eps=model.layernorm_epsilon)
    (folder / "made" / "ours").rename(quickstart / "checkpoints")
    (folder / "examples").symlink_to(ROOT / "examples")
    return quickstart


def export(folder: Path, shape: Shape) -> ModelConfig:
    """Make `exported/` of a shape in a folder; return the architecture that is read from it."""
    quickstart = make_quickstart(folder, shape)
    convert_to_hugging_face(quickstart / "checkpoints", folder / "exported", dtype=shape.dtype,
                            tokenizer=quickstart / "tokenizer")
    return HuggingFaceDirectory(folder / "exported").model


def without_rounding(export: Path, folder: Path) -> Path:
    """Make the FP32 model of an FP8 export in a folder: each value times its scale, by plain loops over blocks."""
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns("checksums.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = dequantized(load_file(export / "model.safetensors"), torch.float32)
    save_file({name: weight.float() for name, weight in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return folder


def our_model(export: Path, groups: Any) -> torch.nn.Module:
    """This library's model of an export, in fp32."""
    stages, _config = build_stages(run_of(HuggingFaceDirectory(export).model), groups, precision="fp32")
    load_hugging_face(export, list(stages), groups)
    return stages[0].eval()


def our_log_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """This library's log-probabilities of the whole vocabulary after each prefix, [S, V]."""
    with torch.no_grad():
        logits_BSV = model(input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None],
                           attention_mask=None)
    return logits_BSV[0].log_softmax(-1)


def our_answer(model: torch.nn.Module, export: Path, question: str, num_tokens: int = ANSWER_TOKENS) -> str:
    """The likeliest token each time, by whole passes, after a user's question in the form of the examples' template."""
    tokenizer = load_tokenizer(export)
    ids = tokenizer.encode(f"{BOS}{USER}{question}{ASSISTANT}").ids
    length = len(ids)
    for _ in range(num_tokens):
        ids.append(int(our_log_probabilities(model, ids)[-1].argmax()))
    return tokenizer.decode(ids[length:])
