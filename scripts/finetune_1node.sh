#!/usr/bin/env bash
# Stage 2 on this machine: language model, connector and vision head learn together.
#   PRETRAIN_MM_MLP_ADAPTER=runs/stage1 DATA_PATH=finetune.jsonl IMAGE_FOLDER=images bash scripts/finetune_1node.sh
# Uses all GPUs (set NPROC_PER_NODE for another number of processes), or the CPU if there are none. The same command
# goes on with a run that was stopped. Arguments go to `metamorph train`: bash scripts/finetune_1node.sh --seed 1
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
source "${here}/common.sh"

# What it starts from. Empty: as in the recipe, a name of `metamorph recipes` or a YAML file of flags.
RECIPE="${RECIPE:-llama3.1-8b-stage2}"
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-}"
VISION_TOWER="${VISION_TOWER:-}"
PRETRAIN_MM_MLP_ADAPTER="${PRETRAIN_MM_MLP_ADAPTER:?set PRETRAIN_MM_MLP_ADAPTER to the folder that stage 1 wrote}"

# What it learns from: records (JSON array, JSON Lines, tars, mixture) and the folder that their images' paths start at.
DATA_PATH="${DATA_PATH:?set DATA_PATH to the training records}"
IMAGE_FOLDER="${IMAGE_FOLDER:-}"

# Checkpoints and result.
OUTPUT_DIR="${OUTPUT_DIR:-runs/model}"

# Samples (with packing: rows) per optimizer step = batch size × accumulation × GPUs.
# Empty: as in the recipe.
PER_DEVICE_TRAIN_BATCH_SIZE="${PER_DEVICE_TRAIN_BATCH_SIZE:-}"
GRADIENT_ACCUMULATION_STEPS="${GRADIENT_ACCUMULATION_STEPS:-}"
LEARNING_RATE="${LEARNING_RATE:-}"
SHARDING="${SHARDING:-}" # auto, ddp, fsdp2, zero2, zero3, zero2_offload, zero3_offload

# Where the numbers go: tensorboard, wandb, … Keys are read from the environment, never written here.
REPORT_TO="${REPORT_TO:-none}"

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

export OUTPUT_DIR
exec bash "${here}/launch.sh" train "${flags[@]}" "$@"
