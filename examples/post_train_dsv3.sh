#!/usr/bin/env bash
# Fine-tune the quickstart's model on conversations, and export it to a Hugging Face folder that chats.
#
#   bash examples/post_train_dsv3.sh            after bash examples/pretrain_dsv3.sh; all of it below runs/quickstart/chat
#
# It does four things: it writes conversations about small sums, gives the quickstart's tokenizer a chat template,
# prepares tokens with their masks (dsv3 preprocess --sft), and fine-tunes the model on them (dsv3 sft), whose last step
# is the export. Where Transformers is installed it then asks the exported model a question.
#
# From the environment: RUN_DIR, the quickstart's folder (runs/quickstart); PYTHON, as for the quickstart.
# A run that was stopped goes on with the same command. Exit codes: those of dsv3 sft.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
run_dir="${RUN_DIR-$repo/runs/quickstart}"
chat_dir="$run_dir/chat"

say() { printf '%s\n' "$*" >&2; }

main() {
    if [ ! -f "$run_dir/checkpoints/latest_checkpointed_iteration.txt" ]; then
        say "error: $run_dir has no checkpoint of the quickstart; run bash examples/pretrain_dsv3.sh first, or set RUN_DIR"
        exit 2
    fi
    python=$(bash "$repo/examples/setup_environment.sh")
    if [ -e "$chat_dir/exported/config.json" ]; then
        say "$chat_dir/exported is there: the model is fine-tuned; remove $chat_dir to begin again"
    else
        mkdir -p "$chat_dir/tokenizer"
        cp "$run_dir"/tokenizer/tokenizer*.json "$repo/examples/chat_template.jinja" "$chat_dir/tokenizer/"
        if [ ! -e "$chat_dir/sums_conversations_mask.idx" ]; then
            "$python" "$repo/examples/make_sums.py" --number 3000 --seed 1 --output "$chat_dir/sums.jsonl"
            "$python" -m dsv3_megatron preprocess --sft --input "$chat_dir/sums.jsonl" \
                --tokenizer-model "$chat_dir/tokenizer" --output-prefix "$chat_dir/sums" --overwrite --workers 1
        fi
        # A model of this size learns from few samples only at a rate that is large beside the report's 5e-6.
        "$python" -m dsv3_megatron sft --pretrained-checkpoint "$run_dir/checkpoints" \
            --data-path "$chat_dir/sums_conversations" --tokenizer-model "$chat_dir/tokenizer" --epochs 6 --lr 2e-3 \
            --min-lr 1e-4 --global-batch-size 8 --split 95,5,0 --eval-interval 50 --eval-iters 1 \
            --save "$chat_dir/checkpoints" --load "$chat_dir/checkpoints" --tensorboard-dir "$chat_dir/tensorboard" \
            --export-hf "$chat_dir/exported"
    fi
    if "$python" -c 'import transformers' 2>/dev/null; then
        "$python" - "$chat_dir/exported" <<'CHAT'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
for question in ("What is 2 + 3?", "7 + 6 = ?", "Add 4 and 4."):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
    print(f"user: {question}\nassistant: {tokenizer.decode(answer, skip_special_tokens=True)}")
CHAT
    else
        say "Transformers is not installed: the model is in $chat_dir/exported"
    fi
}

main "$@"; exit # one line: all of the script has been read before it starts, and may change on disk meanwhile
