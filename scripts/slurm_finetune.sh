#!/usr/bin/env bash
# Stage 2 on the nodes of a Slurm job: language model, connector and vision head learn together.
#   PRETRAIN_MM_MLP_ADAPTER=runs/stage1 DATA_PATH=finetune.jsonl IMAGE_FOLDER=images \
#       sbatch --nodes=4 --partition=… scripts/slurm_finetune.sh
# The job stops before its time limit or when it is preempted, saves, puts itself back into the queue and goes on with
# the next sample. Arguments are passed on to `metamorph train`: sbatch scripts/slurm_finetune.sh --seed 1
#SBATCH --job-name=metamorph-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# The repository: by default the folder that sbatch was called in (Slurm runs a copy of this script, which does not know
# where it came from). And the Python that metamorph is installed in.
METAMORPH_HOME="${METAMORPH_HOME:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}"
export PYTHON="${PYTHON:-python}"
if [[ ! -r "${METAMORPH_HOME}/scripts/slurm_common.sh" ]]; then
    echo "${METAMORPH_HOME} is not the repository: submit from its folder, or set METAMORPH_HOME to it" >&2
    exit 1
fi

# What it starts from. Empty: as in the recipe, a name of `metamorph recipes` or a YAML file of flags.
RECIPE="${RECIPE:-llama3.1-8b-stage2}"
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"
VISION_TOWER="${VISION_TOWER:-}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:?set PRETRAIN_MM_MLP_ADAPTER to the folder that stage 1 wrote}"

# What it learns from: records (JSON array, JSON Lines, tars, mixture) and the folder that their images' paths start at.
DATA_PATH="${DATA_PATH:?set DATA_PATH to the training records}"
IMAGE_FOLDER="${IMAGE_FOLDER:-}"

# Checkpoints and result, on a file system that all nodes see.
OUTPUT_DIR="${OUTPUT_DIR:-runs/model}"

# Samples (with packing: rows) per optimizer step = batch size × accumulation × GPUs per node × nodes.
# Empty: as in the recipe.
PER_DEVICE_TRAIN_BATCH_SIZE="${PER_DEVICE_TRAIN_BATCH_SIZE:-}"
GRADIENT_ACCUMULATION_STEPS="${GRADIENT_ACCUMULATION_STEPS:-}"
LEARNING_RATE="${LEARNING_RATE:-}"
SHARDING="${SHARDING:-}" # auto, ddp, fsdp2, zero2, zero3, zero2_offload, zero3_offload

# Where the numbers go: tensorboard, wandb, … Keys are read from the environment, never written here.
REPORT_TO="${REPORT_TO:-none}"

# shellcheck source=scripts/slurm_common.sh
source "${METAMORPH_HOME}/scripts/slurm_common.sh"

flags=(
    --config "${RECIPE}"
    --pretrain_mm_mlp_adapter "${PRETRAIN_MM_MLP_ADAPTER}"
    --data_path "${DATA_PATH}"
    --output_dir "${OUTPUT_DIR}"
    --report_to "${REPORT_TO}"
)
optional --model_name_or_path "${MODEL_NAME_OR_PATH}"
optional --vision_tower "${VISION_TOWER}"
optional --image_folder "${IMAGE_FOLDER}"
optional --per_device_train_batch_size "${PER_DEVICE_TRAIN_BATCH_SIZE}"
optional --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS}"
optional --learning_rate "${LEARNING_RATE}"
optional --sharding "${SHARDING}"

run_job train "${flags[@]}" "$@"
