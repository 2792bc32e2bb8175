#!/usr/bin/env bash
# One node's part of a job: `task.sh doctor` or `task.sh train`. srun starts it with what common.sh exports; the files of
# examples/cluster start it with TREEPO_LAUNCH, TREEPO_EXAMINE and TREEPO_ATTEMPT of their own.
#
# It names the interface between the nodes, keeps this node's output in RUN/slurm/JOB/attempt-N/HOST.log, hands the
# warning signal to the ranks and past torchrun itself, and leaves a word when the ranks fail (nodes.sh reads it).
set -euo pipefail

HOST=${TREEPO_HOST:-${SLURMD_NODENAME:-$(hostname -s)}}
LOG=${TREEPO_ATTEMPT:-}/$HOST.log
# What a rank says that lost another: NCCL, gloo, torch's store, this project's own deadlines.
LOST='[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|ncclRemoteError|remote process exit|TCPStore|waited .* s for|barrier passed'

note() { printf '[treepo %s] %s\n' "$HOST" "$*"; }

# The libraries guess an interface by name or by what the host name resolves to, and with a container bridge or a
# management network they guess wrong: ranks then wait for each other until a deadline. The route to another node of the job
# is the one that works. Each node has its own: names differ on mixed clusters.
choose_network() {
    local peer address nic=${TREEPO_NIC:-}
    if [[ -z $nic ]]; then
        for peer in ${TREEPO_HOSTS:-}; do [[ $peer = "$HOST" ]] || break; done
        [[ -n ${peer:-} && $peer != "$HOST" ]] || return 0 # alone: nothing leaves this node
        address=$(getent ahosts "$peer" | awk 'NR == 1 { print $1 }') || true
        nic=$(ip -o route get "${address:-none}" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || true
        if [[ -z $nic || $nic = lo ]]; then
            note "cannot tell the interface to $peer (${address:-no address}, ${nic:-no route}): the libraries choose; TREEPO_NIC names one"
            return 0
        fi
    fi
    # Gloo takes a name, NCCL the beginning of one unless "=" stands before it: eth1 would match eth10.
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$nic} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$nic}
    note "interface $nic"
}

set_environment() {
    export CUDA_DEVICE_MAX_CONNECTIONS=1              # Megatron orders communication and compute by it
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}      # ranks of a node share its cores
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}             # else a peer or a link that is lost has no name in the log
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}     # a link that flaps for seconds costs seconds and no restart
    export PYTHONUNBUFFERED=1                         # the last line before a death is the one that matters
    export UCX_WARN_UNUSED_ENV_VARS=n                 # sites set UCX_* for MPI; where NCCL's plug-in loads UCX, it warns of each
    choose_network
}

# Sets TEE. The signals are ignored while it starts: they may go to all processes of a step.
open_log() {
    trap '' USR1 TERM
    TEE=''
    mkdir -p "${LOG%/*}" 2>/dev/null || { note "no log at $LOG"; return 0; }
    exec > >(exec tee -a "$LOG") 2>&1
    TEE=$!
}

# Up to two seconds for the last lines, which Slurm would end together with this script.
close_log() {
    [[ -n $TEE ]] || return 0
    exec >&- 2>&-
    for _ in $(seq 20); do
        kill -0 "$TEE" 2>/dev/null || return 0
        sleep 0.1
    done
}

# leave_word STATUS: when, with which status, and whether this node's ranks failed by themselves.
leave_word() {
    local code kind=own
    sleep 0.2 # until tee has written the launcher's last lines
    code=$(sed -n '/Root Cause/,$s/.*exitcode *: *\(-\{0,1\}[0-9][0-9]*\).*/\1/p' "$LOG" 2>/dev/null | tail -n 1) || true
    case $code in
    -4 | -7 | -8 | -9 | -11) kind="signal ${code#-}" ;;
    -15) kind=peer ;; # ended from outside
    *) ! tail -n 400 "$LOG" 2>/dev/null | grep -qE "$LOST" || kind=peer ;;
    esac
    printf '%s status %s %s\n' "$(date +%s.%N)" "$1" "$kind" >"${LOG%/*}/failed.$HOST" 2>/dev/null || true
}

examine() {
    local rc=0
    eval "$TREEPO_EXAMINE" || rc=$?
    [[ $rc = 0 ]] || touch "${LOG%/*}/unfit.$HOST" 2>/dev/null || true
    close_log
    exit "$rc"
}

train() {
    local agent rc=0 asked=0
    # USR1 is ignored here, which children inherit: torchrun ignores it, and so does a rank that has no handler yet.
    trap - TERM
    eval "exec $TREEPO_LAUNCH" &
    agent=$!
    # shellcheck disable=SC2317,SC2329 # called by the trap
    to_ranks() {
        local ranks
        asked=1
        mapfile -t ranks < <(ps -o pid= --ppid "$agent")
        [[ ${#ranks[@]} -eq 0 ]] || kill -USR1 "${ranks[@]// /}" 2>/dev/null || true
    }
    # TERM comes before a preemption or a cancellation: the ranks get the same chance to save.
    trap to_ranks USR1 TERM
    while :; do
        rc=0
        wait "$agent" || rc=$?
        kill -0 "$agent" 2>/dev/null || break
    done
    [[ $rc = 0 || $asked = 1 ]] || leave_word "$rc"
    close_log
    exit "$rc"
}

case ${1:-} in
doctor | train)
    [[ -n ${TREEPO_LAUNCH:-} && -n ${TREEPO_EXAMINE:-} ]] ||
        { echo "treepo: error: this file is started by the job scripts beside it" >&2; exit 2; }
    open_log
    set_environment
    if [[ $1 = doctor ]]; then examine; else train; fi
    ;;
*)
    echo "treepo: error: this file is started by the job scripts beside it" >&2
    exit 2
    ;;
esac
