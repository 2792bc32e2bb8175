#!/usr/bin/env bash
# Shared by the job scripts of this folder: plain srun and torchrun, no Ray, no controller process.
#
# What a job does: check the whole configuration for this allocation before any GPU is touched; start one
# torchrun per node, which meet at the first host of the allocation; hand the warning signal on to the ranks, which
# save and stop; requeue itself. A requeued job resumes from its newest complete checkpoint.
#
# How the warning travels (--signal=B:USR1@...): Slurm -> batch script -> srun -> task wrapper -> ranks. The wrapper is
# there because clusters that use proctrack/cgroup signal only the step's direct child: torchrun would die of USR1 and
# take the ranks with it before they saved, and torchrun's own hand-over kills them after 30 seconds, which a large
# checkpoint does not fit in.
# Seen on Slurm 22.05 with proctrack/cgroup, two nodes with two CPU processes each in the trainer's place: a save of 40
# seconds finished on all four, the job requeued itself, started again and completed. Not yet run on GPU nodes.
#
# Variables (all optional):
#   TREEPO_CONFIG          configuration file, when none is given as an argument
#   TREEPO_HOME            the checkout, when jobs are submitted from elsewhere
#   TREEPO_PYTHON          interpreter of the environment (default: .venv/bin/python of the checkout)
#   TREEPO_NPROC_PER_NODE  ranks per node (default: GPUs per node)
#   TREEPO_MAX_RESTARTS    restarts of one job, planned or not (default 50)
#   TREEPO_MAX_FAILURES    of these, restarts after an unexpected failure (default 3)
#   TREEPO_PORT            rendezvous port (default: from the job id)
#   TREEPO_DOCTOR          0: do not look at the nodes before the start (default: 1)
set -euo pipefail

log() { printf '[treepo +%ds] %s\n' "$SECONDS" "$*"; }
fail() {
    printf 'treepo: error: %s\n' "$*" >&2
    exit 2
}

# The value of one #SBATCH option in a job script, such as: sbatch_option treepo_70b.sh nodes
sbatch_option() {
    sed -n "s/^#SBATCH --$2=\([^[:space:]]*\).*/\1/p" "$1" | tail -n 1
}

# GPU counts may carry a type (h100:8).
plain_count() { printf '%s' "${1##*:}"; }

# Sets NODES and NPROC: from the allocation inside a job, else from the script's #SBATCH lines.
resolve_layout() {
    NODES=${SLURM_JOB_NUM_NODES:-$(sbatch_option "$1" nodes)}
    NPROC=${TREEPO_NPROC_PER_NODE:-$(plain_count "${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(sbatch_option "$1" gpus-per-node)}}")}
    [[ $NODES =~ ^[1-9][0-9]*$ && $NPROC =~ ^[1-9][0-9]*$ ]] ||
        fail "cannot tell the size of the job: nodes '$NODES', ranks per node '$NPROC' (set TREEPO_NPROC_PER_NODE)"
}

# Sets PY, the interpreter of the environment.
resolve_python() {
    PY=${TREEPO_PYTHON:-$TREEPO_HOME/.venv/bin/python}
    [[ -x $PY ]] || fail "no Python environment at $PY: run 'make setup' in the checkout, or set TREEPO_PYTHON"
}

# treepo_main SCRIPT DEFAULT_CONFIG [--dry-run] [CONFIG] [a.b=c ...]
treepo_main() {
    local script=$1 default=$2 dry_run=0 arg
    shift 2
    CONFIG=${TREEPO_CONFIG:-$default}
    OVERRIDES=()
    for arg in "$@"; do
        case $arg in
        --dry-run) dry_run=1 ;;
        -*) fail "unknown option $arg; usage: $(basename "$script") [--dry-run] [CONFIG.yaml] [a.b=c ...]" ;;
        *=*) OVERRIDES+=("$arg") ;;
        *) CONFIG=$arg ;;
        esac
    done
    [[ $dry_run = 1 || -n ${SLURM_JOB_ID:-} ]] ||
        fail "not inside a Slurm job: submit with 'sbatch $script', or check with --dry-run"
    # A configuration named from where the user stands comes before one of the checkout.
    [[ -e $CONFIG ]] && CONFIG=$(realpath "$CONFIG")
    cd "$TREEPO_HOME"
    resolve_python
    resolve_layout "$script"
    log "$NODES nodes x $NPROC ranks = world size $((NODES * NPROC)); configuration $CONFIG"
    check_configuration
    if [[ $dry_run = 1 ]]; then
        log "would start on each node: $(launch_command HEAD:PORT JOB-RESTART)"
        return 0
    fi
    run_job
}

check_configuration() {
    "$PY" -m treepo_mega.cli train "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} --dry-run --world-size $((NODES * NPROC))
}

# launch_command ENDPOINT ID: the torchrun command line, shell-quoted.
launch_command() {
    printf '%q ' "$PY" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$NPROC" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$1" --rdzv-id="$2" -m treepo_mega.cli train "$CONFIG" \
        ${OVERRIDES[@]+"${OVERRIDES[@]}"}
}

# check_nodes HOST...: before weights are read, every node looks at itself and meets the others.
check_nodes() {
    local gpus=0 names
    [[ -z ${SLURM_GPUS_PER_NODE:-} ]] || gpus=$(plain_count "$SLURM_GPUS_PER_NODE")
    names=$(IFS=, && printf '%s' "$*")
    srun --ntasks-per-node=1 --nodes="$NODES" --ntasks="$NODES" \
        "$PY" -m treepo_mega.cli doctor "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} \
        --nodes "$NODES" --hosts "$names" --gpus "$gpus" --ranks "$NPROC" --port "$(rendezvous_port)" && return 0
    # A node that is unfit now is so a minute later too, and a requeued job may get it again.
    fail "a node is not fit for the run, as said above: exclude it (sbatch --exclude), or set TREEPO_DOCTOR=0"
}

rendezvous_port() { printf '%s' "${TREEPO_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"; }

# The batch script's part: one srun for the whole job, the hand-over of signals, and the requeue.
run_job() {
    local hosts rc=0 step asked=0
    # Job ids begin anew on a new cluster: failures that another job of this id left are not this one's.
    [[ ${SLURM_RESTART_COUNT:-0} != 0 ]] || rm -f "$TREEPO_HOME/runs/.slurm/$SLURM_JOB_ID.failures"
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [[ ${#hosts[@]} -gt 0 ]] || fail "scontrol named no hosts for $SLURM_JOB_NODELIST"
    # The restart count keeps ranks of an earlier start, should any linger, out of this one's rendezvous.
    TREEPO_LAUNCH=$(launch_command "${hosts[0]}:$(rendezvous_port)" \
        "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}")
    export TREEPO_LAUNCH
    export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron orders communication and compute by it
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    log "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID, head ${hosts[0]}"
    [[ ${TREEPO_DOCTOR:-1} = 0 ]] || check_nodes "${hosts[@]}"
    # --cpus-per-task: a step does not inherit the job's, and would be bound to one core on many clusters.
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 --nodes="$NODES" --ntasks="$NODES" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" \
        bash "$TREEPO_HOME/slurm/common.sh" task &
    step=$!
    # shellcheck disable=SC2317,SC2329 # called by the traps
    hand_on() {
        asked=1
        log "asked to stop: the ranks save and leave"
        kill -USR1 "$step" 2>/dev/null || true # srun passes it to the step
    }
    trap hand_on USR1 TERM
    # `wait` returns early whenever a trap runs: only a step that is gone ends the loop.
    while :; do
        rc=0
        wait "$step" || rc=$?
        kill -0 "$step" 2>/dev/null || break
    done
    trap '' USR1 TERM
    finish "$asked" "$rc"
}

# finish ASKED RC: requeue when the job was asked to stop, or failed unexpectedly and not too often; else leave with RC.
# ASKED decides, not RC: at a planned stop srun reports whichever of several statuses came first.
finish() {
    local asked=$1 rc=$2 failures=0 state=$TREEPO_HOME/runs/.slurm
    if [[ $asked = 0 && $rc = 0 ]]; then
        log "finished"
        rm -f "$state/$SLURM_JOB_ID.failures"
        exit 0
    fi
    if [[ ${SLURM_RESTART_COUNT:-0} -ge ${TREEPO_MAX_RESTARTS:-50} ]]; then
        fail "status $rc after ${SLURM_RESTART_COUNT} restarts, the most allowed (TREEPO_MAX_RESTARTS): not requeued"
    fi
    if [[ $asked = 0 ]]; then
        mkdir -p "$state"
        failures=$(($(cat "$state/$SLURM_JOB_ID.failures" 2>/dev/null || echo 0) + 1))
        echo "$failures" >"$state/$SLURM_JOB_ID.failures"
        if [[ $failures -gt ${TREEPO_MAX_FAILURES:-3} ]]; then
            log "failure $failures with status $rc, more than TREEPO_MAX_FAILURES allows: not requeued"
            exit "$rc"
        fi
        log "failure $failures with status $rc: a node may be gone"
    fi
    log "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 120 # Slurm ends this script when it takes the job back
    exit 1
}

# One node's part, started by srun: torchrun, with USR1 going to the ranks and past torchrun itself.
run_task() {
    local agent rc=0
    trap '' USR1 # inherited: torchrun ignores it, and so does a rank until it has set its own handler
    eval "exec $TREEPO_LAUNCH" &
    agent=$!
    # shellcheck disable=SC2317 # called by the trap
    to_ranks() {
        local ranks
        mapfile -t ranks < <(ps -o pid= --ppid "$agent")
        [[ ${#ranks[@]} -eq 0 ]] || kill -USR1 "${ranks[@]// /}" 2>/dev/null || true
    }
    # TERM comes before a preemption or a cancellation: the ranks get the same chance to save.
    trap to_ranks USR1 TERM
    while :; do
        rc=0
        wait "$agent" || rc=$?
        kill -0 "$agent" 2>/dev/null || exit "$rc"
    done
}

if [[ ${BASH_SOURCE[0]} = "$0" ]]; then
    [[ ${1:-} = task && -n ${TREEPO_LAUNCH:-} ]] || fail "this file is started by the job scripts beside it"
    run_task
fi
