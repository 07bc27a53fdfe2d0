#!/usr/bin/env bash
# Runs a command with a Slurm of its own: a controller and two virtual nodes, n1 and n2, as daemons on this machine.
#   bash tests/parts/with_slurm.sh python -m pytest -m slurm
# Needs root, slurmctld, slurmd and munged (Debian: apt-get install slurm-wlm munge); an installed Slurm is not touched.
# Everything lives in a temporary folder and ends with the command. Each node claims 16 CPUs and 8 GPUs it does not have.
set -euo pipefail

nodes=2
folder=$(mktemp -d "${TMPDIR:-/tmp}/metamorph-slurm.XXXXXX")
chmod 755 "${folder}" # munged refuses a socket that others cannot reach
host=$(hostname -s)
port=$((20000 + $$ % 10000)) # of the controller; the nodes take the next ones

# shellcheck disable=SC2329 # the exit trap calls it
stop() {
    local file
    for file in "${folder}"/slurmd.*.pid "${folder}/slurmctld.pid" "${folder}/munged.pid"; do
        if [[ -f "${file}" ]]; then
            kill "$(cat "${file}")" 2> /dev/null || true
        fi
    done
    sleep 1
    rm -rf "${folder}"
}
trap stop EXIT

# Prints the reason and the logs; the exit trap stops what has started.
give_up() {
    echo "with_slurm.sh: $1" >&2
    tail -n 20 "${folder}"/*.log >&2 || true
    exit 1
}

start_authentication() {
    dd if=/dev/urandom of="${folder}/munge.key" bs=1024 count=1 status=none
    chmod 400 "${folder}/munge.key"
    munged --force --key-file="${folder}/munge.key" --socket="${folder}/munge.sock" --pid-file="${folder}/munged.pid" \
        --log-file="${folder}/munged.log" --seed-file="${folder}/munge.seed" || give_up "munged did not start"
}

# No cgroups, accounting or prologs: what a container lets root do. Jobs of the partition `urgent` preempt the others.
# Slurm holds a requeued job until the credential of its first start has expired: 20 seconds here, by default 120.
write_configuration() {
    local node gpu
    mkdir "${folder}/state"
    cat > "${folder}/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=${host}(127.0.0.1)
SlurmctldPort=${port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=${folder}/munge.sock,cred_expire=20
StateSaveLocation=${folder}/state
SlurmdSpoolDir=${folder}/spool.%n
SlurmctldPidFile=${folder}/slurmctld.pid
SlurmdPidFile=${folder}/slurmd.%n.pid
SlurmctldLogFile=${folder}/slurmctld.log
SlurmdLogFile=${folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=120
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
CONF
    for node in $(seq "${nodes}"); do
        echo "NodeName=n${node} NodeHostname=${host} NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=16 Gres=gpu:8" \
            >> "${folder}/slurm.conf"
    done
    for gpu in $(seq 0 7); do
        touch "${folder}/gpu${gpu}" # stands for /dev/nvidia0, …
    done
    echo "Name=gpu File=${folder}/gpu[0-7]" > "${folder}/gres.conf"
}

wait_for_nodes() {
    for _ in $(seq 60); do
        if (($(sinfo --noheader --Node --partition=test --states=idle | wc -l) == nodes)); then
            return
        fi
        sleep 0.5
    done
    give_up "the nodes did not come up within 30 seconds"
}

start_authentication
write_configuration
export SLURM_CONF="${folder}/slurm.conf"
slurmctld -c -f "${SLURM_CONF}" || give_up "slurmctld did not start"
for node in $(seq "${nodes}"); do
    slurmd -c -N "n${node}" -f "${SLURM_CONF}" || give_up "slurmd of n${node} did not start"
done
wait_for_nodes

status=0
"$@" || status=$?
exit "${status}"
