#!/usr/bin/env bash
# Pretrain a DeepSeek-V3-style model.
#
#   bash examples/pretrain_dsv3.sh              the quickstart: environment, corpus, tokenizer, tokens, a tiny model
#                                               trained on them, a summary. All of it below runs/quickstart
#                                               ($RUN_DIR); a second run skips what is finished and resumes the rest.
#   bash examples/pretrain_dsv3.sh --fresh      the same, from the start
#   bash examples/pretrain_dsv3.sh FLAGS...     a run with these flags (listed below), under torchrun
#
# From the environment, for runs with flags:
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT  nodes, this node's rank, and where rank 0 listens (1, 0, -, 29500)
#   GPUS_PER_NODE                                processes on this node with GPUs (default: as many as there are)
#   NPROC_PER_NODE                               processes on this node in any case (default without a GPU: the fewest
#                                                that the layout needs)
#   SHUTDOWN_TIMEOUT                             seconds from a dead rank to the forced end of the others (30)
#   PYTHON                                       the Python to use; see examples/setup_environment.sh
#
# Ctrl-C or SIGTERM: the run saves a checkpoint and ends; a second one ends it at once.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

# ------------------------------------------------------------------------------------------- the quickstart's settings

run_dir="${RUN_DIR:-$repo/runs/quickstart}"
run_dir="${run_dir#"$PWD"/}" # shorter to read where it can be
corpus_flags=(--seed 1234)
vocab_size=2048 # tiny's; batch, learning rate and length of the run are the preset's too
train_flags=(--preset tiny --vocab-size "$vocab_size" --log-interval 10 --save-interval 150)
# Layout by number of devices: PP2 x EP2 needs four processes; without a GPU four share the cores.
quickstart_layout() { # sets num_processes and layout_flags
    local num_gpus
    num_gpus=$(count_gpus)
    case "$num_gpus" in
        0) num_processes=4 layout_flags=(--pipeline-model-parallel-size 2 --expert-model-parallel-size 2) ;;
        1) num_processes=1 layout_flags=() ;;
        2 | 3) num_processes=2 layout_flags=(--expert-model-parallel-size 2) ;;
        4 | 5 | 6 | 7) num_processes=4 layout_flags=(--pipeline-model-parallel-size 2 --expert-model-parallel-size 2) ;;
        *) num_processes=8 layout_flags=(--pipeline-model-parallel-size 2 --expert-model-parallel-size 2) ;;
    esac
}

# ----------------------------------------------------------------------------------------------------- this machine

say() { printf '%s\n' "$*" >&2; }

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        case "$CUDA_VISIBLE_DEVICES" in
            "" | -1*) echo 0 && return ;;
        esac
        command -v nvidia-smi >/dev/null && tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . && return
    fi
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
}

count_cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1; }

use_environment() { # sets python
    local answer status=0
    answer=$(mktemp)
    guarded bash "$repo/examples/setup_environment.sh" >"$answer" || status=$?
    python=$(cat "$answer")
    rm -f "$answer"
    [ "$status" = 0 ] || exit "$status"
}

num_signals=0 last_signal=""

# guarded COMMAND...: runs it in a process group of its own and ends the whole of it on a signal. Without that a
# SIGTERM would end this script alone and leave the command running.
guarded() {
    local status num_seen
    set -m
    "$@" </dev/null &
    guarded_pid=$!
    set +m
    trap 'end_guarded INT' INT
    trap 'end_guarded TERM' TERM HUP
    while :; do # a signal cuts wait short
        num_seen=$num_signals status=0
        wait "$guarded_pid" || status=$?
        [ "$num_seen" != "$num_signals" ] || break
    done
    trap - INT TERM HUP
    return "$status"
}
end_guarded() {
    num_signals=$((num_signals + 1)) last_signal=$1
    kill -s TERM -- "-$guarded_pid" 2>/dev/null || true
}

# --------------------------------------------------------------------------------------------------- starting a run

torchrun_pid=""

workers() { # the training processes: torchrun's children
    cat /proc/"$torchrun_pid"/task/*/children 2>/dev/null || pgrep -P "$torchrun_pid" 2>/dev/null || true
}

# torchrun itself would give its workers half a minute and fail. Signalled directly they save and end by themselves,
# and so does torchrun, with exit code 0.
pass_on() {
    local pids
    num_signals=$((num_signals + 1)) last_signal=$1
    pids=$(workers)
    if [ "$num_signals" = 1 ]; then
        say ""
        say "SIG$1: the run saves a checkpoint and ends; once more ends it at once"
        # shellcheck disable=SC2086 # several pids
        kill -s "$1" ${pids:-$torchrun_pid} 2>/dev/null || true
    else
        # shellcheck disable=SC2086
        kill -s KILL $pids "$torchrun_pid" 2>/dev/null || true
    fi
}

# launch NUM_PROCESSES FLAGS...: the run's exit code is the function's.
launch() {
    local num_processes=$1 nnodes="${NNODES:-1}" node_rank="${NODE_RANK:-0}" status=0 num_seen rendezvous
    shift
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_process "$num_processes")}"
    if [ "$nnodes" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || { say "error: MASTER_ADDR is not set: with NNODES=$nnodes give the host of node 0"; return 2; }
        [ -n "${NODE_RANK:-}" ] || { say "error: NODE_RANK is not set: with NNODES=$nnodes give this node's, 0 to $((nnodes - 1))"; return 2; }
        rendezvous=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    elif [ -n "${MASTER_PORT:-}" ]; then
        rendezvous=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT")
    else
        rendezvous=(--standalone --local-addr 127.0.0.1) # a free port, and no look-up of the host's own name
        [ ! -e /sys/class/net/lo ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
    fi

    # A wrong setting is said once, here, and not under a heap of torchrun's own messages.
    WORLD_SIZE=$((num_processes * nnodes)) RANK=$node_rank "$python" -m dsv3_megatron.train "$@" --check-only || return

    # A process group of its own (set -m), so that Ctrl-C reaches the run once, through pass_on.
    set -m
    "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$num_processes" \
        --shutdown-timeout "${SHUTDOWN_TIMEOUT:-30}" -m dsv3_megatron.train "$@" </dev/null &
    torchrun_pid=$!
    set +m
    trap 'pass_on INT' INT
    trap 'pass_on TERM' TERM HUP
    while :; do # a signal cuts wait short
        num_seen=$num_signals status=0
        wait "$torchrun_pid" || status=$?
        [ "$num_seen" != "$num_signals" ] || break
    done
    trap - INT TERM HUP
    return "$status"
}

threads_per_process() { # threads_per_process NUM_PROCESSES
    local threads=$(($(count_cores) / $1))
    [ "$(count_gpus)" = 0 ] && [ "$threads" -gt 1 ] && echo "$threads" || echo 1
}

default_num_processes() { # default_num_processes FLAGS...
    local num_gpus
    num_gpus=$(count_gpus)
    if [ -n "${NPROC_PER_NODE:-}" ]; then
        echo "$NPROC_PER_NODE"
    elif [ -n "${GPUS_PER_NODE:-}" ]; then
        echo "$GPUS_PER_NODE"
    elif [ "$num_gpus" -gt 0 ]; then
        echo "$num_gpus"
    else # what is wrong with the flags, if anything is, is said by the check before the start
        "$python" -c 'import sys
from dsv3_megatron.config.load import parse_command
print(-(-parse_command(sys.argv[2:]).run.parallel.minimum_world_size // int(sys.argv[1])))' \
            "${NNODES:-1}" "$@" 2>/dev/null || echo 1
    fi
}

run_with_flags() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            -h | --help)
                sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | grep '^#' | sed 's/^# \{0,1\}//'
                echo
                python=$(bash "$repo/examples/setup_environment.sh" --find)
                exec "$python" -m dsv3_megatron.train --help
                ;;
        esac
    done
    use_environment
    for argument in "$@"; do
        case "$argument" in
            --print-model | --check-only) exec "$python" -m dsv3_megatron.train "$@" ;;
        esac
    done
    launch "$(default_num_processes "$@")" "$@"
}

# --------------------------------------------------------------------------------------------------- the quickstart

num_stages=5
stage_number=0
is_redone=0

# stage NAME TITLE COMMAND...: skipped if it finished before with the same command and so did all before it.
# COMMAND sees to signals itself (guarded, train).
stage() {
    local name=$1 title=$2 start=$SECONDS status=0
    shift 2
    stage_number=$((stage_number + 1))
    title="[$stage_number/$num_stages] $title"
    if [ "$is_redone" = 0 ] && [ "$(cat "$done_dir/$name" 2>/dev/null)" = "$*" ]; then
        say "$title: done before"
        return
    fi
    is_redone=1
    rm -f "$done_dir/$name"
    say "$title"
    "$@" || status=$?
    if [ -n "$last_signal" ]; then
        say "stopped by SIG$last_signal; the same command goes on from here"
        exit $((128 + $(kill -l "$last_signal")))
    elif [ "$status" != 0 ]; then
        say "$title: failed with exit code $status after $((SECONDS - start)) s"
        exit "$status"
    fi
    printf '%s' "$*" >"$done_dir/$name.new" && mv "$done_dir/$name.new" "$done_dir/$name"
    say "$title: $((SECONDS - start)) s"
}

make_tokens() { # make_tokens FLAGS...
    local part
    for part in train valid; do
        "$python" "$repo/tools/preprocess_data.py" --input "$run_dir/corpus/$part.jsonl" \
            --output-prefix "$run_dir/data/$part" --overwrite "$@" || return
    done
}

# A run that was cut short resumes from its last checkpoint if nothing before it changed.
train() { # train NUM_PROCESSES FLAGS...
    local key="$*" resume=()
    if [ "$(cat "$done_dir/train.started" 2>/dev/null)" != "$key" ]; then
        rm -rf "$run_dir/checkpoints" "$run_dir/tensorboard"
        printf '%s' "$key" >"$done_dir/train.started"
    elif has_checkpoint; then
        say "resuming from $run_dir/checkpoints"
        resume=(--load "$run_dir/checkpoints")
    fi
    launch "$@" ${resume[@]+"${resume[@]}"}
}
has_checkpoint() { [ -n "$(find "$run_dir/checkpoints" -mindepth 1 -maxdepth 1 -type d ! -name '.*' ! -name 'tmp*' 2>/dev/null)" ]; }

quickstart() {
    local start=$SECONDS num_processes layout_flags status=0
    done_dir="$run_dir/.done"
    use_environment
    mkdir -p "$done_dir" "$run_dir/data"
    stage corpus "corpus from this machine's Python sources and documentation" \
        guarded "$python" -m dsv3_megatron.data.corpus --output "$run_dir/corpus" "${corpus_flags[@]}"
    stage tokenizer "byte-level BPE tokenizer, $vocab_size tokens" \
        guarded "$python" "$repo/tools/train_tokenizer.py" --input "$run_dir/corpus/train.jsonl" \
        --vocab-size "$vocab_size" --max-train-bytes 10000000 --output "$run_dir/tokenizer" --overwrite
    stage tokens "tokens" guarded make_tokens --tokenizer-model "$run_dir/tokenizer" --append-eod --workers "$(count_cores)"
    quickstart_layout
    [ "$is_redone" = 0 ] || rm -f "$done_dir/train.started" # other data: nothing to resume
    stage train "training on $num_processes processes" train "$num_processes" "${train_flags[@]}" \
        ${layout_flags[@]+"${layout_flags[@]}"} \
        --data-path "$run_dir/data/train_text_document" --valid-data-path "$run_dir/data/valid_text_document" \
        --tokenizer-model "$run_dir/tokenizer" --save "$run_dir/checkpoints" --tensorboard-dir "$run_dir/tensorboard"
    say "[5/$num_stages] summary"
    guarded "$python" -m dsv3_megatron.metrics.summary "$run_dir" || status=$?
    say "quickstart: $((SECONDS - start)) s in all; everything is in $run_dir"
    return "$status"
}

# ------------------------------------------------------------------------------------------------------------- main

case "$*" in
    "") quickstart ;;
    --fresh)
        rm -rf "$run_dir"
        quickstart
        ;;
    *) run_with_flags "$@" ;;
esac
