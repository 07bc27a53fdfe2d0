#!/usr/bin/env bash
# Trains the visualizer on this machine.
#   IMAGE_FOLDER=/data/images bash visualization/train_1node.sh
# Uses all GPUs (or NPROC_PER_NODE processes), or the CPU without any. The same command resumes a run that was stopped.
# For all variables see visualizer_flags in scripts/common.sh.
# Arguments go to `metamorph train-visualizer`: visualization/train_1node.sh --seed 1
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
visualizer_flags
run_here train-visualizer "${flags[@]}" "$@"
