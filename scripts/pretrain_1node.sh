#!/usr/bin/env bash
# Stage 1 on this machine: the connector learns to map visual tokens to the language model.
#   DATA_PATH=pretrain.jsonl IMAGE_FOLDER=images bash scripts/pretrain_1node.sh
# Uses all GPUs (or NPROC_PER_NODE processes), or the CPU without any. The same command resumes a run that was stopped.
# For all variables see train_flags in scripts/common.sh.
# Arguments go to `metamorph train`: scripts/pretrain_1node.sh --seed 1
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
train_flags 1
run_here train "${flags[@]}" "$@"
