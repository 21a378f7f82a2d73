"""A small run on words with its tokenizer, and its conversion: what tests of text from a model begin with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsv3_megatron.checkpoint.hf.to_hugging_face import convert_to_hugging_face
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import fingerprint, save_tokenizer, train_tokenizer
from tests.distributed.launch import run_ranks
from tests.distributed.small_run import architecture_arguments, small_run

VOCAB_SIZE, CONTEXT = 320, 64
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards quietly vex big frogs".split()


def train_on_words(folder: Path) -> Path:
    """Four steps under PP2 x EP2 on four processes, in fp32; `run`, and `hf` converted from it.

    The run's MTP module is in the stage before that of the head and the loss.
    """
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=40)) for _ in range(60)]
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE)
    save_tokenizer(tokenizer, folder / "tokenizer")
    ids = [tokenizer.encode(text).ids for text in texts]
    with DatasetWriter(str(folder / "train"), vocab_size=VOCAB_SIZE,
                       tokenizer_fingerprint=fingerprint(folder / "tokenizer")) as writer:
        writer.add_documents(np.concatenate(ids), np.array(list(map(len, ids))))
    # Groups are scored by two experts, as the programs that read Hugging Face's files do.
    run = small_run(vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, moe_router_group_score_topk=2)
    run_ranks(4, "dsv3_megatron", "train", *architecture_arguments(run), *(
        "--seq-length 16 --micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 1e-2 --min-lr 1e-3 "
        "--lr-warmup-iters 0 --precision fp32 --eval-interval 0 --pipeline-model-parallel-size 2 "
        "--pipeline-model-parallel-layout Ettttm|L --expert-model-parallel-size 2 "
        f"--data-path {folder}/train --tokenizer-model {folder}/tokenizer --save {folder}/run").split())
    convert_to_hugging_face(folder / "run", folder / "hf", dtype="fp32")
    return folder
