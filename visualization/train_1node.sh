#!/usr/bin/env bash
# Trains the visualizer on this machine.
#   IMAGE_FOLDER=/data/pictures bash visualization/train_1node.sh
# Uses all GPUs (set NPROC_PER_NODE for another number of processes), or the CPU if there are none. The same command
# goes on with a run that was stopped. Arguments go to `metamorph train-visualizer`:
#   bash visualization/train_1node.sh --unfreeze_unet True --seed 1
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")/../scripts" && pwd)

# Data: a folder of pictures or tar shards, or JSON/JSONL files that list them (separated by spaces) and the folder they
# are in.
IMAGE_FOLDER="${IMAGE_FOLDER:?set IMAGE_FOLDER to a folder of pictures or tar shards}"
IMAGE_JSONS="${IMAGE_JSONS:-}"

# Checkpoints and result.
OUTPUT_DIR="${OUTPUT_DIR:-runs/visualizer}"

# Models.
DIFFUSION_MODEL="${DIFFUSION_MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}"
VISION_TOWER="${VISION_TOWER:-siglip/CLIP-ViT-SO400M-14-384}"
NUM_TOKENS="${NUM_TOKENS:-64}"
MODE="${MODE:-mlp}"

# Pictures per optimizer step = BATCH_SIZE × ACCUMULATION × GPUs.
BATCH_SIZE="${BATCH_SIZE:-32}"
ACCUMULATION="${ACCUMULATION:-1}"
TRAINING_STEPS="${TRAINING_STEPS:-16000}"
LR="${LR:-1e-4}"
MIXED_PRECISION="${MIXED_PRECISION:-bf16}"

# Where the numbers go: tensorboard, wandb, … Keys are read from the environment, never written here.
REPORT_TO="${REPORT_TO:-none}"

flags=(
    --pretrained_model_name_or_path "${DIFFUSION_MODEL}"
    --vision_tower "${VISION_TOWER}"
    --num_tokens "${NUM_TOKENS}"
    --mode "${MODE}"
    --image_folder "${IMAGE_FOLDER}"
    --output_dir "${OUTPUT_DIR}"
    --batch_size "${BATCH_SIZE}"
    --gradient_accumulation_steps "${ACCUMULATION}"
    --training_steps "${TRAINING_STEPS}"
    --lr "${LR}"
    --mixed_precision "${MIXED_PRECISION}"
    --report_to "${REPORT_TO}"
    --resume_from_checkpoint latest
)
if [[ -n "${IMAGE_JSONS}" ]]; then
    read -r -a jsons <<< "${IMAGE_JSONS}"
    flags+=(--image_jsons "${jsons[@]}")
fi

export OUTPUT_DIR
exec bash "${scripts}/launch.sh" train-visualizer "${flags[@]}" "$@"
