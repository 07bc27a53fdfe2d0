# shellcheck shell=bash
# What the Slurm scripts share. Sourced by them, not run.

# shellcheck source=scripts/common.sh
source "${METAMORPH_HOME}/scripts/common.sh"

# run_job COMMAND FLAGS…: run `metamorph COMMAND FLAGS…` on all nodes of the job, one task per node, and put the job
# back into the queue if it was asked to make room.
run_job() {
    local status=0 first_node
    first_node=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?submit this script with sbatch}" | head -n 1)
    export OUTPUT_DIR
    export NNODES="${SLURM_JOB_NUM_NODES}"
    export MASTER_ADDR="${MASTER_ADDR:-${first_node}}"
    export MASTER_PORT="${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 10000))}" # jobs that share a node do not meet
    export RDZV_ID="${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}"
    echo "job ${SLURM_JOB_ID}, start ${SLURM_RESTART_COUNT:-0}, on ${SLURM_JOB_NODELIST}, $(date -u +%FT%TZ)"

    step=""
    trap 'forward USR1' USR1 # #SBATCH --signal=B:USR1@…, or scancel --batch --signal=USR1
    trap 'forward TERM' TERM # Slurm ends the job; it signals the processes itself
    # --cpu-bind=none: the one task gets all CPUs that the job has on its node. --wait: when one node has failed, the
    # others hang in a collective; when a run has ended everywhere, a slow node may still be closing down.
    srun --nodes="${NNODES}" --ntasks="${NNODES}" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=300 \
        bash "${METAMORPH_HOME}/scripts/launch.sh" "$@" &
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

# A job that was cancelled, or that Slurm requeues itself, is not running any more: it is left alone.
requeue() {
    if ! scontrol show job --oneliner "${SLURM_JOB_ID}" | grep -q 'JobState=RUNNING'; then
        return
    fi
    echo "job ${SLURM_JOB_ID} saved a checkpoint and goes back into the queue"
    if ! scontrol requeue "${SLURM_JOB_ID}"; then
        echo "scontrol requeue failed: submit the script again with the same OUTPUT_DIR, and training goes on" >&2
        return
    fi
    # Slurm ends this script. If it ended by itself meanwhile, Slurm would have two ends of one start to deal with.
    sleep 60 &
    wait $! || true
}
