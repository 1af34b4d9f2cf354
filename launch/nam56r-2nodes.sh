#!/usr/bin/env bash
# NAM56R, 4.70 B parameters, 3.01 B active; PP1 EP8 on 8 H200
# 2 nodes of 8 processes.
# The launcher sets for the ranks: HF_HUB_OFFLINE, OMP_NUM_THREADS, PYTORCH_ALLOC_CONF, TOKENIZERS_PARALLELISM,
# TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, TORCH_NCCL_ASYNC_ERROR_HANDLING, TORCH_NCCL_DUMP_ON_TIMEOUT,
# TORCH_NCCL_TRACE_BUFFER_SIZE.
#
# The working directory must be on a file system that all nodes share: the run directory, the data and, for a recipe
# that is a file, the recipe lie there. megacpp-stp must be on the PATH of each node, in the same version.
# Start it on each of the 2 nodes with the same arguments but the first, 0, 1, ...
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: $0 NODE_RANK HOST_OF_NODE_0:PORT RUN_DIR [OPTION ...]" >&2
  exit 2
fi
node_rank="$1"
endpoint="$2"
run_dir="$3"
shift 3

command=(
  megacpp-stp launch nam56r
  --device cuda
  --set launch.nodes=2
  --nnodes 2
  --nproc 8
  --rdzv-endpoint "$endpoint"
  --node-rank "$node_rank"
  --run-dir "$run_dir"
  "$@"
)

exec "${command[@]}"
