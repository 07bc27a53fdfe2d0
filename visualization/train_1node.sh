#!/usr/bin/env bash
# Trains the visualizer on all GPUs of this machine. Every variable can be set from outside:
#   IMAGE_FOLDER=/data/pictures OUTPUT_DIR=runs/visualizer bash visualization/train_1node.sh
# Arguments of the script are passed on:  bash visualization/train_1node.sh --unfreeze_unet True --seed 1
set -euo pipefail

# Data: a folder of pictures, or JSON/JSONL files that list them (separated by spaces) and the folder they are in.
IMAGE_FOLDER="${IMAGE_FOLDER:?set IMAGE_FOLDER to a folder of pictures}"
IMAGE_JSONS="${IMAGE_JSONS:-}"
OUTPUT_DIR="${OUTPUT_DIR:-runs/visualizer}"

# Models.
DIFFUSION_MODEL="${DIFFUSION_MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}"
VISION_TOWER="${VISION_TOWER:-siglip/CLIP-ViT-SO400M-14-384}"
NUM_TOKENS="${NUM_TOKENS:-64}"
MODE="${MODE:-mlp}"

# Batch: pictures per optimizer step = NUM_PROCESSES * BATCH_SIZE * ACCUMULATION.
NUM_PROCESSES="${NUM_PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}"
BATCH_SIZE="${BATCH_SIZE:-32}"
ACCUMULATION="${ACCUMULATION:-1}"
TRAINING_STEPS="${TRAINING_STEPS:-16000}"
LR="${LR:-1e-4}"
MIXED_PRECISION="${MIXED_PRECISION:-bf16}"

if [[ "${NUM_PROCESSES}" -lt 1 ]]; then
    NUM_PROCESSES=1
fi

data=(--image_folder "${IMAGE_FOLDER}")
if [[ -n "${IMAGE_JSONS}" ]]; then
    read -r -a jsons <<< "${IMAGE_JSONS}"
    data+=(--image_jsons "${jsons[@]}")
fi

exec torchrun --standalone --nproc-per-node "${NUM_PROCESSES}" -m metamorph train-visualizer \
    --pretrained_model_name_or_path "${DIFFUSION_MODEL}" \
    --vision_tower "${VISION_TOWER}" \
    --num_tokens "${NUM_TOKENS}" \
    --mode "${MODE}" \
    "${data[@]}" \
    --output_dir "${OUTPUT_DIR}" \
    --batch_size "${BATCH_SIZE}" \
    --gradient_accumulation_steps "${ACCUMULATION}" \
    --training_steps "${TRAINING_STEPS}" \
    --lr "${LR}" \
    --mixed_precision "${MIXED_PRECISION}" \
    --resume_from_checkpoint latest \
    "$@"
