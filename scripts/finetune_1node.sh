#!/usr/bin/env bash
# Stage 2 on this machine: language model, connector and vision head are trained together.
#   PRETRAIN_MM_MLP_ADAPTER=runs/stage1 DATA_PATH=finetune.jsonl IMAGE_FOLDER=images bash scripts/finetune_1node.sh
# Uses all GPUs (or NPROC_PER_NODE processes), or the CPU without any. The same command resumes a run that was stopped.
# For all variables see train_flags in scripts/common.sh.
# Arguments go to `metamorph train`: scripts/finetune_1node.sh --seed 1
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
train_flags 2
run_here train "${flags[@]}" "$@"
