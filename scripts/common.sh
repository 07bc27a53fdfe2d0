# shellcheck shell=bash
# Functions of the scripts in this folder and in visualization/. Sourced, not run.

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# train_flags STAGE: set OUTPUT_DIR, and the array `flags` from these variables of the environment. An empty one keeps
# the value of the recipe.
#   DATA_PATH                    records: JSON array, JSON Lines, tar archives or a mixture (required)
#   PRETRAIN_MM_MLP_ADAPTER      output folder of stage 1 (stage 2: required)
#   IMAGE_FOLDER                 folder that relative image paths start from
#   OUTPUT_DIR                   checkpoints and result, on a file system that all nodes see. Another folder for each run:
#                                do not export it, or the next stage and the visualizer write there too
#   RECIPE                       a name of `metamorph recipes`, or a YAML file of flags
#   MODEL_NAME_OR_PATH, VISION_TOWER
#   PER_DEVICE_TRAIN_BATCH_SIZE, GRADIENT_ACCUMULATION_STEPS
#                                batch size × accumulation × GPUs × nodes = samples (with packing: rows) per step
#   LEARNING_RATE
#   SHARDING                     auto, ddp, fsdp2, zero2, zero3, zero2_offload, zero3_offload
#   REPORT_TO                    tensorboard, wandb, …; keys are read from the environment, never written here
train_flags() {
    local folders=("" runs/stage1 runs/model) name
    OUTPUT_DIR="${OUTPUT_DIR:-${folders[$1]}}"
    flags=(--config "${RECIPE:-llama3.1-8b-stage$1}")
    if (($1 == 2)); then
        : "${PRETRAIN_MM_MLP_ADAPTER:?set PRETRAIN_MM_MLP_ADAPTER to the output folder of stage 1}"
        flags+=(--pretrain_mm_mlp_adapter "${PRETRAIN_MM_MLP_ADAPTER}")
    fi
    flags+=(--data_path "${DATA_PATH:?set DATA_PATH to the training records}")
    flags+=(--output_dir "${OUTPUT_DIR}" --report_to "${REPORT_TO:-none}")
    for name in MODEL_NAME_OR_PATH VISION_TOWER IMAGE_FOLDER PER_DEVICE_TRAIN_BATCH_SIZE GRADIENT_ACCUMULATION_STEPS \
        LEARNING_RATE SHARDING; do
        if [[ -n "${!name:-}" ]]; then
            flags+=("--$(tr '[:upper:]' '[:lower:]' <<< "${name}")" "${!name}")
        fi
    done
}

# visualizer_flags: the same for the visualizer.
#   IMAGE_FOLDER                 folder of images or tar archives (required)
#   IMAGE_JSONS                  JSON or JSONL files that list the images in it, separated by spaces
#   BATCH_SIZE, ACCUMULATION     batch size × accumulation × GPUs × nodes = images per step
visualizer_flags() {
    OUTPUT_DIR="${OUTPUT_DIR:-runs/visualizer}"
    flags=(
        --pretrained_model_name_or_path "${DIFFUSION_MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}"
        --vision_tower "${VISION_TOWER:-siglip/CLIP-ViT-SO400M-14-384}"
        --num_tokens "${NUM_TOKENS:-64}"
        --mode "${MODE:-mlp}"
        --image_folder "${IMAGE_FOLDER:?set IMAGE_FOLDER to a folder of images or tar archives}"
        --output_dir "${OUTPUT_DIR}"
        --batch_size "${BATCH_SIZE:-32}"
        --gradient_accumulation_steps "${ACCUMULATION:-1}"
        --training_steps "${TRAINING_STEPS:-16000}"
        --lr "${LR:-1e-4}"
        --mixed_precision "${MIXED_PRECISION:-bf16}"
        --report_to "${REPORT_TO:-none}"
        --resume_from_checkpoint latest
    )
    if [[ -n "${IMAGE_JSONS:-}" ]]; then
        local jsons
        read -r -a jsons <<< "${IMAGE_JSONS}"
        flags+=(--image_jsons "${jsons[@]}")
    fi
}

# run_here COMMAND FLAGS…: run `metamorph COMMAND FLAGS…` on this machine.
run_here() {
    export OUTPUT_DIR
    exec bash "${scripts}/launch.sh" "$@"
}

# count_processes: print the number of GPUs that this shell may use, or 1 without any (training then runs on the CPU).
count_processes() {
    local gpus=0
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        # Numbers or names such as GPU-8f3a; "-1" and Slurm's "NoDevFiles" mean none.
        gpus=$(tr ',' '\n' <<< "${CUDA_VISIBLE_DEVICES}" | grep -cE '^ *([0-9]+|GPU-|MIG-)' || true)
    elif command -v nvidia-smi > /dev/null; then
        gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)
    fi
    echo $((gpus > 0 ? gpus : 1))
}

# wait_through_signals PID: wait for a child and return its exit status. Bash's own `wait` also returns when a trapped
# signal arrives, with a status above 128.
wait_through_signals() {
    local status=0 again
    wait "$1" || status=$?
    while ((status > 128)) && kill -0 "$1" 2> /dev/null; do
        status=0
        wait "$1" || status=$?
    done
    if ((status > 128)); then # the child is gone; unless this was its own status, Bash still knows it
        again=0
        wait "$1" 2> /dev/null || again=$?
        if ((again != 127)); then
            status=${again}
        fi
    fi
    return "${status}"
}

# run_job COMMAND FLAGS…: run `metamorph COMMAND FLAGS…` on all nodes of a Slurm job, one task per node, and requeue the
# job if it was preempted or is about to reach its time limit.
run_job() {
    local status=0 first_node
    first_node=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?submit this script with sbatch}" | head -n 1)
    export OUTPUT_DIR PYTHON="${PYTHON:-python}"
    export NNODES="${SLURM_JOB_NUM_NODES}"
    export MASTER_ADDR="${MASTER_ADDR:-${first_node}}"
    export MASTER_PORT="${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 10000))}" # different for jobs that share a node
    export RDZV_ID="${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}"
    export MAX_RESTARTS="${MAX_RESTARTS:-3}" # see launch.sh
    echo "job ${SLURM_JOB_ID}, start ${SLURM_RESTART_COUNT:-0}, on ${SLURM_JOB_NODELIST}, $(date -u +%FT%TZ)"

    step=""
    trap 'forward USR1' USR1 # #SBATCH --signal=B:USR1@…, or scancel --batch --signal=USR1
    trap 'forward TERM' TERM # Slurm ends the job; it signals the processes itself
    # --cpu-bind=none: the task gets all CPUs of the job on its node. --wait: when one node has failed, the others hang
    # in a collective; when a run has ended everywhere, a slow node may still be closing down.
    srun --nodes="${NNODES}" --ntasks="${NNODES}" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=300 \
        bash "${scripts}/launch.sh" "$@" &
    step=$!
    wait_through_signals "${step}" || status=$?

    if ((status == 75)); then # see launch.sh
        requeue
    fi
    echo "job ${SLURM_JOB_ID} ends with status ${status}"
    exit "${status}"
}

# srun passes on to its tasks what it receives.
forward() {
    echo "job ${SLURM_JOB_ID}: SIG$1 at $(date -u +%FT%TZ)"
    if [[ -n "${step}" ]]; then
        kill -s "$1" "${step}" 2> /dev/null || true
    fi
}

# Not if the job was cancelled, or Slurm requeues it: then it is not running any more.
requeue() {
    if ! scontrol show job --oneliner "${SLURM_JOB_ID}" | grep -q 'JobState=RUNNING'; then
        return
    fi
    echo "job ${SLURM_JOB_ID} saved a checkpoint and is requeued"
    if ! scontrol requeue "${SLURM_JOB_ID}"; then
        echo "scontrol requeue failed: submit the script again with the same OUTPUT_DIR to resume" >&2
        return
    fi
    # Slurm ends this script. If it exited first, Slurm would see the same start end twice.
    sleep 60 &
    wait $! || true
}
