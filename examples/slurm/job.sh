#!/usr/bin/env bash
# What the jobs in this folder have in common: inputs, the environment, the launch, and whether the job goes back into the
# queue. A job sources it, puts the flags of its run into the array `flags`, and calls run_job.
#
#   DATA VALID TOKENIZER OUTPUT      what the run reads, and the folder it writes; on a shared file system
#   DSV3_MASTER_ADDR                 host of node 0, where its name is not the address (default: the job's first node)
#   SHUTDOWN_TIMEOUT                 seconds that a node waits for its ranks' checkpoint when it is told to end (840)
: "${DATA:?prefix of the training tokens (PREFIX.bin, PREFIX.idx), on a shared file system}"
: "${VALID:?prefix of the validation tokens}"
: "${TOKENIZER:?folder of the tokenizer the tokens were made with}"
: "${OUTPUT:?folder for checkpoints and logs, on a shared file system}"

# Once here, not on every node; prints nothing if it is done, and exits if it cannot be.
PYTHON=$(bash "$repo/examples/setup_environment.sh")
export PYTHON

latest() {
    local step
    step=$(cat "$OUTPUT/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || true)
    [[ $step =~ ^[0-9]+$ ]] && echo "$((10#$step))" || echo 0
}

run_job() { # run_job FLAGS...: starts the run with the array `flags` and these, and ends the job
    local last_step first_iter status now ended
    last_step=$("$PYTHON" -m dsv3_megatron train "${flags[@]}" "$@" --print-schedule --json |
        "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["num_steps_before_stop"])')
    first_iter=$(latest)
    flags+=(--resume auto) # at the first start there is nothing to go on from: the run begins, and says so
    mkdir -p "$OUTPUT"
    rm -f "$OUTPUT/checkpoints/ended-by-guard.txt" # an earlier start's

    export NNODES=$SLURM_JOB_NUM_NODES GPUS_PER_NODE=8
    MASTER_ADDR=${DSV3_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    # Where Slurm signals every process of a step, torchrun too gets SIGTERM: let it wait for the checkpoint. A rank that
    # dies otherwise ends the others after the same time at the latest.
    export SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-840}

    # One launcher and so one torchrun per node; a node that fails takes the step down.
    status=0
    # shellcheck disable=SC2016 # SLURM_NODEID is the node's own
    srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' launch \
        "$repo/examples/pretrain_dsv3.sh" "${flags[@]}" "$@" || status=$?

    # The time limit, preemption and a broken node all end here. Back into the queue as long as the run gets on; one that
    # saved nothing new, that a guard ended (3) or that has a wrong setting (2) would only end the same way again. A guard's
    # end is looked for beside the checkpoints too: srun's exit code may be that of a node that was ended because of it.
    now=$(latest)
    ended="ended with exit code $status, saved at step $now of $last_step"
    if [ "$now" -ge "$last_step" ]; then
        echo "$ended: done"
    elif [ "$status" = 3 ] || [ -e "$OUTPUT/checkpoints/ended-by-guard.txt" ]; then
        echo "$ended: not requeued, a guard ended the run: see ended-by-guard.txt in $OUTPUT/checkpoints"
    elif [ "$status" = 2 ]; then
        echo "$ended: not requeued, a setting or an input is wrong"
    elif [ "$now" -le "$first_iter" ]; then
        echo "$ended: not requeued, nothing new was saved since step $first_iter"
    else
        echo "$ended: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
