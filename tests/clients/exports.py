"""What the programs are given, and what this library computes of it.

The weights are random and large: another model is 0.05 off and more. The head's rows of words are larger than the
others, so that an answer is text, which programs print alike.

Legend: S positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.checkpoint.hf import HuggingFaceDirectory
from dsv3_megatron.checkpoint.hf.pretrained import load_hugging_face
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, save_tokenizer, train_tokenizer
from dsv3_megatron.model.build import build_stages
from tests.clients.environments import ROOT
from tests.hugging_face import published_weights
from tests.parity.architectures import run_of
from tests.unit.checkpoint.hf.trained import trained

VOCAB = MIN_VOCAB_SIZE + 14
# All compute in fp32 and sum in another order; another model is 0.05 off and more.
TOLERANCE = 1e-4
# The text whose log-probabilities the pages compute, and the question that they ask.
TEXT, QUESTION, ANSWER_TOKENS = "some words, and some more words", "some more words", 16
BOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


def small_model(**changes: Any) -> ModelConfig:
    """The quickstart's architecture with a small vocabulary, changed and checked."""
    model: ModelConfig = dataclasses.replace(preset("tiny").model, **{"vocab_size": VOCAB, **changes})
    model.validate()
    return model


def make_quickstart(folder: Path, model: ModelConfig) -> None:
    """Make what the pages presuppose in a folder: `runs/quickstart/` with its model and tokenizer, and `examples/`."""
    quickstart = folder / "runs" / "quickstart"
    save_tokenizer(train_tokenizer([TEXT] * 40, vocab_size=VOCAB), quickstart / "tokenizer")
    tokenizer = load_tokenizer(quickstart / "tokenizer")
    weights = published_weights(model)
    no_words = [id_ for id_ in range(VOCAB) if not tokenizer.decode([id_]).strip(" ,").isalpha()
                or not tokenizer.decode([id_]).isascii()]
    for name, weight in weights.items():
        if name == "lm_head.weight" or name.endswith("shared_head.head.weight"):
            weight[no_words] *= 0.1
    trained(folder / "made", model, weights, rms_norm_eps=model.layernorm_epsilon)
    (folder / "made" / "ours").rename(quickstart / "checkpoints")
    (folder / "examples").symlink_to(ROOT / "examples")


def our_log_probabilities(export: Path, ids: list[int], groups: Any) -> torch.Tensor:
    """This library's log-probabilities of the whole vocabulary after each prefix, fp32, [S, V]."""
    read = HuggingFaceDirectory(export).model
    stages, _config = build_stages(run_of(read), groups, precision="fp32")
    load_hugging_face(export, list(stages), groups)
    with torch.no_grad():
        logits_BSV = stages[0].eval()(input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None],
                                      attention_mask=None)
    return logits_BSV[0].log_softmax(-1)


def our_answer(export: Path, question: str, groups: Any, num_tokens: int = ANSWER_TOKENS) -> str:
    """The likeliest token each time, in this library, after a user's question in the form of the examples' template."""
    tokenizer = load_tokenizer(export)
    ids = tokenizer.encode(f"{BOS}{USER}{question}{ASSISTANT}").ids
    length = len(ids)
    for _ in range(num_tokens):
        ids.append(int(our_log_probabilities(export, ids, groups)[-1].argmax()))
    return tokenizer.decode(ids[length:])
