#!/usr/bin/env bash
# What a pod runs: the launcher with the place that Kubernetes gave this node. As the pod's first process it gets
# Kubernetes' SIGTERM, has the run save a checkpoint, and ends.
#
#   node.sh FLAGS...       a node of the run
#   node.sh rendezvous     the place where nodes meet that come and go
#
# From the environment:
#   PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT, PET_NPROC_PER_NODE   as Kubeflow Trainer sets them
#   NNODES, JOB_COMPLETION_INDEX, MASTER_ADDR, MASTER_PORT                            without it, as the JobSets here do
#   ELASTIC_MIN, MEET_ADDR   nodes come and go: the fewest of them, and the host of `node.sh rendezvous`
#   DSV3_ALIVE               folder for the signs of life that the pod's liveness probe looks at
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

if [ "${1:-}" = rendezvous ]; then
    exec "${PYTHON:-python}" -m dsv3_megatron rendezvous --port "${MASTER_PORT:-29500}"
fi

nodes=${PET_NNODES:-${NNODES:-1}}
[ -z "${PET_NPROC_PER_NODE:-}" ] || [ "$PET_NPROC_PER_NODE" = auto ] || export NPROC_PER_NODE=$PET_NPROC_PER_NODE
if [ -n "${ELASTIC_MIN:-}" ]; then
    export NNODES="$ELASTIC_MIN:$nodes" MASTER_ADDR=$MEET_ADDR MASTER_PORT="${MEET_PORT:-29500}"
    unset NODE_RANK
else
    export NNODES=$nodes NODE_RANK="${PET_NODE_RANK:-${JOB_COMPLETION_INDEX:-0}}"
    export MASTER_ADDR="${PET_MASTER_ADDR:-${MASTER_ADDR:-127.0.0.1}}" MASTER_PORT="${PET_MASTER_PORT:-${MASTER_PORT:-29500}}"
fi
# torchrun would read them too, and they are said above.
unset PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_NPROC_PER_NODE
if [ -n "${DSV3_ALIVE:-}" ]; then
    mkdir -p "$DSV3_ALIVE"
    rm -f "$DSV3_ALIVE"/rank-*
fi
# A pod that ends with 0 is not made again: that is for a run that is complete.
export DSV3_STOPPED_CODE=75
exec bash "$repo/examples/pretrain_dsv3.sh" "$@"
