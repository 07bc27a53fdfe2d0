#!/usr/bin/env bash
# Runs `metamorph "$@"` with one process per GPU of this machine, or one on the CPU. The other scripts call it.
#
# Several machines train together when each calls it with the same NNODES, MASTER_ADDR and RDZV_ID and its own
# NODE_RANK, as `run_job` in common.sh does.
#
# SIGUSR1 and SIGTERM are forwarded to the processes, which save a checkpoint after the current step and stop.
# If one of them fails, torchrun restarts all of them, at most MAX_RESTARTS times, and they resume from the newest
# checkpoint.
# Exit status: 75 if they stopped because of a signal, otherwise that of torchrun.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
source "${here}/common.sh"

OUTPUT_DIR="${OUTPUT_DIR:?set OUTPUT_DIR to the folder that the run writes to}"
PYTHON="${PYTHON:-python}"                                # that metamorph is installed in
NPROC_PER_NODE="${NPROC_PER_NODE:-$(count_processes)}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"

PREEMPTED=75                                              # EX_TEMPFAIL: try again later
marker="${OUTPUT_DIR}/preempted.json"                     # torchrun does not pass on how its processes exit
resend_seconds=5

if ((NNODES == 1)); then
    NODE_RANK=0
    rendezvous=(--standalone)
else
    is_host=$( ((NODE_RANK == 0)) && echo true || echo false)
    rendezvous=(
        --nnodes "${NNODES}"
        --rdzv-backend c10d
        --rdzv-id "${RDZV_ID:-metamorph}"
        --rdzv-endpoint "${MASTER_ADDR:?set MASTER_ADDR to the host name of the first machine}:${MASTER_PORT:-29500}"
        --rdzv-conf "is_host=${is_host},read_timeout=600" # machines may start minutes apart
    )
fi

echo "$(basename "$0"): ${NPROC_PER_NODE} processes on $(hostname), machine $((NODE_RANK + 1)) of ${NNODES}" >&2
torchrun="" relay="" requested=""

# A signal that comes while Python is still starting is lost, so it is repeated until the processes are gone.
pass_on() {
    requested=$1
    if [[ -z "${torchrun}" || -n "${relay}" ]]; then
        return
    fi
    echo "$(basename "$0"): forwarding SIG${requested} to the training processes of $(hostname)" >&2
    (
        trap '' USR1 TERM INT
        while kill -0 "${torchrun}" 2> /dev/null; do
            for child in $(cat "/proc/${torchrun}/task/${torchrun}/children" 2> /dev/null || pgrep -P "${torchrun}"); do
                kill -s "${requested}" "${child}" 2> /dev/null || true
            done
            sleep "${resend_seconds}"
        done
    ) &
    relay=$!
}

trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
trap '[[ -z "${torchrun}" ]] || kill -INT "${torchrun}"' INT

if ((NODE_RANK == 0)); then
    rm -f "${marker}" # of an earlier run
fi
# Without this, restarted processes meet in a store that has the addresses of the failed ones, and hang (PyTorch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
export PYTHONUNBUFFERED=1 # log lines appear when they are written
# torchrun must ignore both signals: by default it would kill its processes 30 seconds after SIGTERM.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGINT,SIGHUP,SIGQUIT}"
set -m # a separate process group, in which Bash does not ignore Ctrl-C
(
    trap '' USR1 TERM
    exec "${PYTHON}" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "${NPROC_PER_NODE}" \
        --max-restarts "${MAX_RESTARTS}" -m metamorph "$@"
) &
torchrun=$!
set +m
if [[ -n "${requested}" ]]; then
    pass_on "${requested}"
fi

status=0
wait_through_signals "${torchrun}" || status=$?
if [[ -n "${relay}" ]]; then
    { kill -KILL "${relay}" && wait "${relay}"; } 2> /dev/null || true # without Bash's message that it was killed
fi
if [[ -e "${marker}" ]]; then
    status=${PREEMPTED}
    echo "$(basename "$0"): the run has saved and can be resumed; torchrun may report this as a failure above" >&2
fi
exit "${status}"
