#!/usr/bin/env bash
# Fine-tune the quickstart's model on conversations, let it learn from its own answers, and export it to a Hugging Face
# folder that chats.
#
#   bash examples/post_train_dsv3.sh            after bash examples/pretrain_dsv3.sh; all of it below runs/quickstart/chat
#
# It does five things: it writes conversations about small sums, gives the quickstart's tokenizer a chat template,
# prepares tokens with their masks (dsv3 preprocess --sft), fine-tunes the model on them (dsv3 sft), and lets it answer
# questions whose answers a rule judges (dsv3 grpo), whose last step is the export. Where Transformers is installed it
# then asks the exported model some of the questions that it has never been shown.
#
# From the environment: RUN_DIR, the quickstart's folder (runs/quickstart); PYTHON, as for the quickstart.
# A run that was stopped goes on with the same command. Exit codes: those of dsv3 sft and dsv3 grpo, and 130 where a
# signal stopped one of them with a checkpoint.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
run_dir="${RUN_DIR-$repo/runs/quickstart}"
chat_dir="$run_dir/chat"
# A fine-tuning that was stopped is not done, and nothing may follow it.
export DSV3_STOPPED_CODE=130

say() { printf '%s\n' "$*" >&2; }

prepare() { # the tokenizer with its template, conversations and prompts
    mkdir -p "$chat_dir/tokenizer"
    cp "$run_dir"/tokenizer/tokenizer*.json "$repo/examples/chat_template.jinja" "$chat_dir/tokenizer/"
    "$python" "$repo/examples/make_sums.py" --number 3000 --seed 1 --output "$chat_dir/sums.jsonl"
    "$python" "$repo/examples/make_sums.py" --number 2000 --seed 2 --prompts --output "$chat_dir/prompts.jsonl"
    "$python" "$repo/examples/make_sums.py" --number 160 --prompts --held-out --output "$chat_dir/held-out.jsonl"
    "$python" -m dsv3_megatron preprocess --sft --input "$chat_dir/sums.jsonl" \
        --tokenizer-model "$chat_dir/tokenizer" --output-prefix "$chat_dir/sums" --overwrite --workers 1
}

# A model of this size learns from few samples only at a rate that is large beside the report's 5e-6.
fine_tune() {
    "$python" -m dsv3_megatron sft --pretrained-checkpoint "$run_dir/checkpoints" \
        --data-path "$chat_dir/sums_conversations" --tokenizer-model "$chat_dir/tokenizer" --epochs 3 --lr 2e-3 \
        --min-lr 1e-4 --global-batch-size 4 --split 95,5,0 --eval-interval 50 --eval-iters 1 \
        --save "$chat_dir/checkpoints" --load "$chat_dir/checkpoints" --tensorboard-dir "$chat_dir/tensorboard"
}

reinforce() {
    # Rollouts that no checkpoint has learnt from are those of a run that ended before it saved one.
    [ -e "$chat_dir/grpo/checkpoints/latest_checkpointed_iteration.txt" ] || rm -rf "$chat_dir/grpo"
    "$python" -m dsv3_megatron grpo --pretrained-checkpoint "$chat_dir/checkpoints" \
        --tokenizer-model "$chat_dir/tokenizer" --prompts "$chat_dir/prompts.jsonl" \
        --valid-prompts "$chat_dir/held-out.jsonl" --reward boxed --max-new-tokens 12 --group-size 8 \
        --global-batch-size 64 --micro-batch-size 4 --lr 1e-4 --min-lr 1e-4 --train-iters 24 --eval-interval 12 \
        --save-interval 12 --save "$chat_dir/grpo/checkpoints" --load "$chat_dir/grpo/checkpoints" \
        --rollouts "$chat_dir/grpo/rollouts" --tensorboard-dir "$chat_dir/grpo/tensorboard" \
        --export-hf "$chat_dir/exported"
}

once() { # once NAME: do it, unless it has been done
    [ ! -e "$chat_dir/.done/$1" ] || return 0
    "$1"
    mkdir -p "$chat_dir/.done"
    touch "$chat_dir/.done/$1"
}

chat() {
    "$python" - "$chat_dir/exported" "$chat_dir/held-out.jsonl" <<'CHAT'
import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, held_out = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
with open(held_out, encoding="utf-8") as file:
    questions = [json.loads(line)["prompt"] for line in file][:3]
for question in questions:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
    print(f"user: {question}\nassistant: {tokenizer.decode(answer, skip_special_tokens=True)}")
CHAT
}

main() {
    if [ ! -f "$run_dir/checkpoints/latest_checkpointed_iteration.txt" ]; then
        say "error: $run_dir has no checkpoint of the quickstart; run bash examples/pretrain_dsv3.sh first, or set RUN_DIR"
        exit 2
    fi
    python=$(bash "$repo/examples/setup_environment.sh")
    [ ! -e "$chat_dir/.done/reinforce" ] || say "$chat_dir/exported is there; remove $chat_dir to begin again"
    once prepare
    once fine_tune
    once reinforce
    if "$python" -c 'import transformers' 2>/dev/null; then
        chat
    else
        say "Transformers is not installed: the model is in $chat_dir/exported"
    fi
}

main "$@"; exit # one line: all of the script has been read before it starts, and may change on disk meanwhile
