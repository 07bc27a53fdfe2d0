#!/usr/bin/env bash
# Trains the visualizer on the nodes of a Slurm job.
#   IMAGE_FOLDER=/data/pictures sbatch --nodes=4 --partition=… visualization/submit.sh --unfreeze_unet True
# The job stops before its time limit or when it is preempted, saves, puts itself back into the queue and goes on with
# the next picture. Arguments go to `metamorph train-visualizer`.
#SBATCH --job-name=metamorph-visualizer
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

# Data: a folder of pictures or tar shards, or JSON/JSONL files that list them (separated by spaces) and the folder they
# are in.
IMAGE_FOLDER="${IMAGE_FOLDER:?set IMAGE_FOLDER to a folder of pictures or tar shards}"
IMAGE_JSONS="${IMAGE_JSONS:-}"

# Checkpoints and result, on a file system that all nodes see.
OUTPUT_DIR="${OUTPUT_DIR:-runs/visualizer}"

# Models.
DIFFUSION_MODEL="${DIFFUSION_MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}"
VISION_TOWER="${VISION_TOWER:-siglip/CLIP-ViT-SO400M-14-384}"
NUM_TOKENS="${NUM_TOKENS:-64}"
MODE="${MODE:-mlp}"

# Pictures per optimizer step = BATCH_SIZE × ACCUMULATION × GPUs per node × nodes.
BATCH_SIZE="${BATCH_SIZE:-32}"
ACCUMULATION="${ACCUMULATION:-1}"
TRAINING_STEPS="${TRAINING_STEPS:-16000}"
LR="${LR:-1e-4}"
MIXED_PRECISION="${MIXED_PRECISION:-bf16}"

# Where the numbers go: tensorboard, wandb, … Keys are read from the environment, never written here.
REPORT_TO="${REPORT_TO:-none}"

# shellcheck source=scripts/slurm_common.sh
source "${METAMORPH_HOME}/scripts/slurm_common.sh"

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

run_job train-visualizer "${flags[@]}" "$@"
