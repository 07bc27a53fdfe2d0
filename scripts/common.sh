# shellcheck shell=bash
# Functions of the training scripts. Sourced, not run.

# optional FLAG VALUE: append both to the array `flags`, unless the value is empty.
optional() {
    if [[ -n "$2" ]]; then
        flags+=("$1" "$2")
    fi
}

# count_processes: print the number of GPUs that this shell may use, and 1 without any: training then runs on the CPU.
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
