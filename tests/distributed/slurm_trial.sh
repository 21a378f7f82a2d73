#!/usr/bin/env bash
# The Slurm example scaled down, on a cluster of this machine's own: start, time limit, requeue, resume, and a guard's
# end without a requeue. Slurm (Debian's slurm-wlm) must be running, with two nodes and MinJobAge of an hour.
#
#   bash tests/distributed/slurm_trial.sh FOLDER DATA_PREFIX TOKENIZER
#
# FOLDER is made; its job-*.log are Slurm's logs of the two jobs. The example is changed in what the machine decides
# (nodes, GPUs, time) and in the run (a tiny one of some minutes); the rest is what it is. MINUTES is the time limit, a
# minute before which the run is told to stop: on a busy machine it must have begun by then.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$1 data=$2 tokenizer=$3
mkdir "$folder"

scaled() { # scaled FILE FLAGS...
    local file=$1
    shift
    sed -e 's/^#SBATCH --nodes=.*/#SBATCH --nodes=2/; /^#SBATCH --gpus-per-node/d; /^#SBATCH --exclusive/d; /^#SBATCH --mem/d' \
        -e 's/^#SBATCH --cpus-per-task=.*/#SBATCH --cpus-per-task=1/' \
        -e "s/^#SBATCH --time=.*/#SBATCH --time=${MINUTES:-6}/" \
        -e 's/^#SBATCH --signal=.*/#SBATCH --signal=TERM@60/' \
        -e "s/--preset dsv3-671b\$/--preset tiny --vocab-size 512 --lr-warmup-iters 1 $*/" \
        -e 's/--save-interval 500 .*/--save-interval 10/; s/--eval-interval 1000/--eval-interval 0/' \
        "$repo/examples/slurm/pretrain_dsv3_2048.sbatch" >"$file"
}

submit() { # submit NAME: prints the job's id
    cd "$repo"
    DATA=$data VALID=$data TOKENIZER=$tokenizer OUTPUT=$folder/$1 NPROC_PER_NODE=1 OMP_NUM_THREADS=1 \
        DSV3_MASTER_ADDR=127.0.0.1 SHUTDOWN_TIMEOUT=60 \
        CUDA_VISIBLE_DEVICES="" GLOO_SOCKET_IFNAME=lo PYTHON=${PYTHON:-python} \
        sbatch --parsable --output="$folder/job-$1.log" "$folder/$1.sbatch"
}

state() { scontrol show job "$1" | grep -oE "JobState=[A-Z]+|Restarts=[0-9]+" | tr '\n' ' '; }

follow() { # follow JOB: until it has ended for good
    local now seen=""
    while :; do
        now=$(state "$1")
        [ "$now" = "$seen" ] || echo "$(date +%T) job $1: $now"
        seen=$now
        # A requeued job waits for two minutes.
        [[ "$now" != *PENDING* ]] || scontrol update JobId="$1" StartTime=now 2>/dev/null || true
        case "$now" in *COMPLETED* | *FAILED* | *CANCELLED* | *TIMEOUT* | *NODE_FAIL*) break ;; esac
        sleep 2
    done
}

scaled "$folder/long.sbatch" --train-iters "${STEPS:-150}" --lr 1e-3 --lr-decay-style constant
follow "$(submit long)"
grep -E "ended with|goes on|resumed at|stopped by|is complete" "$folder/job-long.log"
scaled "$folder/guard.sbatch" --train-iters 60 --lr 1e12 --lr-decay-style constant --max-consecutive-skips 0
follow "$(submit guard)"
grep -E "ended with|guard" "$folder/job-guard.log" | tail -4
