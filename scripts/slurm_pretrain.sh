#!/usr/bin/env bash
# Stage 1 on the nodes of a Slurm job: the connector learns to map visual tokens to the language model.
#   DATA_PATH=pretrain.jsonl IMAGE_FOLDER=images \
#       sbatch --nodes=4 --partition=… scripts/slurm_pretrain.sh
# Before its time limit, or when it is preempted, the job saves, requeues itself and resumes at the next sample.
# For all variables see train_flags in scripts/common.sh.
# Arguments go to `metamorph train`: sbatch scripts/slurm_pretrain.sh --seed 1
#SBATCH --job-name=metamorph-pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# Slurm runs a copy of this script: METAMORPH_HOME is the folder that sbatch was called in, unless it is set.
METAMORPH_HOME="${METAMORPH_HOME:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}"
if [[ ! -r "${METAMORPH_HOME}/scripts/common.sh" ]]; then
    echo "${METAMORPH_HOME} is not the repository: submit from its folder, or set METAMORPH_HOME to it" >&2
    exit 1
fi
# shellcheck source=scripts/common.sh
source "${METAMORPH_HOME}/scripts/common.sh"
train_flags 1
run_job train "${flags[@]}" "$@"
