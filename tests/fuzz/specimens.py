"""One small specimen of each kind of file that the library reads, written by the library itself.

`write_specimens` makes a folder with all of them. Only unfinished conversions name the folder, so that a copy under the
same name is as good as it is: everything is read with the copy as working directory.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.reading.file_content import decompressor

TEXTS = ["The river rose overnight, and by morning the lower field was under water.", "def area(width, height):\n"
         "    return width * height\n", "长江是亚洲最长的河流。", "Café, naïve, 12345 and 3.14159!\n\n\tTabs too.", ""]
VOCAB_SIZE = 300
_ARCHITECTURE = {
    "num_layers": 2, "num_dense_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "ffn_hidden_size": 48,
    "num_experts": 8, "moe_ffn_hidden_size": 16, "moe_router_topk": 2, "moe_router_num_groups": 2,
    "moe_router_group_topk": 1, "num_shared_experts": 1, "mtp_num_layers": 1, "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 32}
TRAIN = [*(part for name, value in _ARCHITECTURE.items() for part in (f"--{name.replace('_', '-')}", str(value))),
         *("--seq-length 16 --micro-batch-size 1 --global-batch-size 2 --precision fp32 --transformer-impl local "
           "--eval-interval 0 --log-interval 1 --lr-warmup-iters 0 --lr-decay-style constant --data-path "
           "data/d_text_document --split 100,0,0 --tokenizer-model tokenizer --save-interval 1 --train-iters").split()]
PREPROCESS = "preprocess --tokenizer-model tokenizer --append-eod --workers 1 --tokenizer-backend huggingface".split()
PLAN = "plan --preset dsv3-16b --num-gpus 8 --expert-model-parallel-size 8 --json".split()

CHAT = "preprocess --sft --tokenizer-model tokenizer --workers 1 --input chat.jsonl --output-prefix".split()
TO_HUGGING_FACE = "convert megatron-to-hf --input saved --output unfinished/exported --dtype fp32 --workers 1".split()
TO_MEGATRON = "convert hf-to-megatron --input exported --output unfinished/converted --workers 1".split()
UNFINISHED = [*PREPROCESS, "--input", "text.jsonl", "--output-prefix", "unfinished/made"]
# With marks around what counts, and a text that is easy to make in another way.
TEMPLATE = ("{%- for message in messages -%}{{- '[' + message['role'] + ']' -}}{%- if message['role'] == 'assistant' "
            "-%}{%- generation -%}{{- message['content'] + '.' -}}{%- endgeneration -%}{%- else -%}"
            "{{- message['content'] -}}{%- endif -%}{%- endfor -%}")

Command = Callable[[list[str]], None]


def write_specimens(folder: Path, command: Command, stopped: Command) -> None:
    """Write one of each kind into a folder that exists.

    Args:
        folder: The folder; the working directory while it is filled.
        command: Carries out a command of `dsv3`, given its words; raises where it fails.
        stopped: Carries out a command that ends in the middle of its work.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        _write_texts()
        _write_settings()
        command("train-tokenizer --input text.jsonl --vocab-size 300 --min-frequency 1 --output tokenizer".split())
        Path("tokenizer/chat_template.jinja").write_text(TEMPLATE)
        command([*PREPROCESS, "--input", "text.jsonl", "--output-prefix", "data/d"])
        command(["train", *TRAIN, "2", "--save", "saved", "--tensorboard-dir", "logs"])
        command("convert megatron-to-hf --input saved --output exported --dtype fp32 --workers 1".split())
        command("simulate --schedule 1f1b --pipeline-model-parallel-size 2 --num-microbatches 4 --trace "
                "trace.json".split())
        command([*PLAN, "--hardware", "h800", "--save-hardware", "machine.json"])
        command([*CHAT, "talk/chat"])
        for words in (UNFINISHED, TO_HUGGING_FACE, TO_MEGATRON):
            stopped(words)
    finally:
        os.chdir(before)


def stop_halfway() -> None:
    """Have this process's next preprocessing, or conversion, end after a part of its work, as if it were killed."""
    from dsv3_megatron.checkpoint.hf.workplace import Workplace
    from dsv3_megatron.data import preprocess

    run_pieces, take_block = Workplace.run, preprocess._Run.take

    def run(place: Workplace, pieces: Sequence[Any], **options: Any) -> None:
        run_pieces(place, pieces, **options)
        raise KeyboardInterrupt

    def take(job: Any, *block: Any) -> None:
        take_block(job, *block)
        if job.totals.documents >= 20:
            raise KeyboardInterrupt

    preprocess.BLOCK_BYTES = 1000
    Workplace.run, preprocess._Run.take = run, take  # type: ignore[method-assign]


def _write_texts() -> None:
    lines = "".join(json.dumps({"text": text, "source": number}, ensure_ascii=False) + "\n"
                    for number, text in enumerate(TEXTS * 8)).encode()
    Path("text.jsonl").write_bytes(lines)
    Path("text.zst.jsonl.zst").write_bytes(decompressor("zst").compress(lines))
    Path("text.gz.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS * 8}), "text.parquet")
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:40] or "Yes"}]},
        ensure_ascii=False) + "\n" for text in TEXTS * 4))
    Path("prompts.jsonl").write_text('{"prompt": "The river"}\n{"prompt": "def area("}\n')
    np.save("tokens.npy", np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 17), dtype=np.int32))


def _write_settings() -> None:
    Path("settings.toml").write_text('preset = "tiny"\n[model]\nnum_layers = 6\nrotary_base = 10000.5\n[training]\n'
                                     'seed = 77\nlr = 3e-4\n[parallel]\npipeline_schedule = "1f1b"\n'
                                     '[[phases]]\nname = "first"\ntrain_iters = 20\nseq_length = 64\n')
    Path("settings.yaml").write_text("preset: tiny\nmodel:\n  num_layers: 6\n  rotary_base: 10000.5\ntraining:\n  "
                                     "train_iters: 40\n  seed: 77\n  lr: 3.0e-4\nparallel:\n"
                                     "  pipeline_schedule: 1f1b\n")
    Path("settings.json").write_text(json.dumps({
        "preset": "tiny", "model": {"num_layers": 6, "rotary_base": 10000.5},
        "training": {"train_iters": 40, "seed": 77, "lr": 3e-4}, "parallel": {"pipeline_schedule": "1f1b"}}, indent=1))
    Path("sweep.toml").write_text('output = "made"\nseeds = [3, 14]\nat_a_time = 2\n[settings]\npreset = "tiny"\n'
                                  'train_iters = 60\nlr-warmup-iters = 6\n[grid]\nlr = [2e-3, 6e-3]\n'
                                  'mtp_num_layers = [0, 1]\n[variants.bias]\nmoe_aux_loss_coeff = 0.5\n'
                                  '[variants.nothing]\nmoe_router_bias_update_rate = 0.25\n')
