#!/usr/bin/env bash
# Shared by the job scripts of this folder: plain srun and torchrun, no Ray, no controller process.
#
# What a job does: check the whole configuration for this allocation before any GPU is touched; let every node look at
# itself and meet the others; start one torchrun per node (task.sh), which meet at the first host of the allocation; hand
# the warning signal on to the ranks, which save and stop; requeue itself, without nodes that failed again and again
# (nodes.sh). A requeued job resumes from its newest complete checkpoint.
#
# How the warning travels (--signal=B:USR1@...): Slurm -> batch script -> srun -> task.sh -> ranks. task.sh is
# there because clusters that use proctrack/cgroup signal only the step's direct child: torchrun would die of USR1 and
# take the ranks with it before they saved, and torchrun's own hand-over kills them after 30 seconds, which a large
# checkpoint does not fit in.
#
# `touch RUN/stop`: the ranks finish their step, save and leave, and the job ends without a requeue.
#
# In RUN/slurm/JOB/: a folder attempt-N for each start with a log a node, the failures, and the nodes that were blamed.
#
# Variables (all optional):
#   TREEPO_CONFIG          configuration file, when none is given as an argument
#   TREEPO_HOME            the checkout, when jobs are submitted from elsewhere
#   TREEPO_PYTHON          interpreter of the environment (default: .venv/bin/python of the checkout)
#   TREEPO_NPROC_PER_NODE  ranks per node (default: GPUs per node)
#   TREEPO_MAX_RESTARTS    restarts of one job, planned or not (default 50)
#   TREEPO_MAX_FAILURES    of these, restarts after an unexpected failure (default 3)
#   TREEPO_EXCLUDE_AFTER   failures of one node after which a requeue leaves it out (default 2; 0: never)
#   TREEPO_MAX_EXCLUDED    nodes that a job leaves out at most (default 2)
#   TREEPO_PORT            rendezvous port (default: from the job id)
#   TREEPO_NIC             network interface between nodes (default: the one on the route to another node)
#   TREEPO_DOCTOR          0: do not look at the nodes before the start; quick: without the all-reduce (default: 1)
set -euo pipefail

if [[ ${BASH_SOURCE[0]} = "$0" ]]; then
    echo "treepo: error: this file is started by the job scripts beside it" >&2
    exit 2
fi
# shellcheck source=slurm/nodes.sh
source "$TREEPO_HOME/slurm/nodes.sh"

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
    [[ $dry_run = 1 ]] || listen
    # A configuration named from where the user stands comes before one of the checkout.
    [[ -e $CONFIG ]] && CONFIG=$(realpath "$CONFIG")
    cd "$TREEPO_HOME"
    resolve_python
    resolve_layout "$script"
    log "$NODES nodes x $NPROC ranks = world size $((NODES * NPROC)); configuration $CONFIG"
    if [[ $dry_run = 1 ]]; then
        plan "$script"
        return 0
    fi
    check_configuration || exit 2
    run_job
}

# Prints the resolved configuration, and sets RUN_DIR from it; not 0 when the run could not start.
check_configuration() {
    local text
    text=$("$PY" -m treepo_mega.cli train "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} --dry-run \
        --world-size $((NODES * NPROC))) || return
    printf '%s\n' "$text"
    RUN_DIR=$(sed -n 's/^# run directory: //p' <<<"$text")
    [[ $RUN_DIR = /?* ]] || fail "the dry run named no run directory"
}

# plan SCRIPT: all that can be known of the run, and the command of a node; exit status 2 with a proposal if it cannot be.
plan() {
    local rc=0 said world=$((NODES * NPROC)) wanted
    check_configuration || rc=2
    # Also after a mistake: a size that cannot be is answered with the nearest that can.
    said=$("$PY" -m treepo_mega.cli plan "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} --world-size "$world" \
        --ranks-per-node "$NPROC" 2>&1) || rc=2
    if [[ $rc = 0 ]]; then
        printf '%s\n' "$said"
        log "would start on each node: $(launch_command HEAD:PORT JOB-RESTART)"
        return 0
    fi
    grep -q 'fastest first' <<<"$said" || exit "$rc" # no layout helps: the first message was all
    printf '%s\n' "$said" >&2
    wanted=$(sed -n 's/.* on \([0-9]*\) ranks\{0,1\}, the fastest first.*/\1/p;s/.*; on \([0-9]*\), the fastest first.*/\1/p' <<<"$said" | head -n 1)
    if [[ $wanted =~ ^[0-9]+$ && $wanted -ne $world ]]; then
        echo "treepo: proposal: sbatch --nodes=$(((wanted + NPROC - 1) / NPROC)) $script with the overrides of a line above" >&2
    else
        echo "treepo: proposal: sbatch --nodes=$NODES $script with the overrides of a line above" >&2
    fi
    exit "$rc"
}

# launch_command ENDPOINT ID: the torchrun command line, shell-quoted.
launch_command() {
    printf '%q ' "$PY" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$NPROC" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$1" --rdzv-id="$2" -m treepo_mega.cli train "$CONFIG" \
        ${OVERRIDES[@]+"${OVERRIDES[@]}"}
}

# doctor_command HOST...: what a node runs before weights are read, shell-quoted.
doctor_command() {
    local gpus=0 names reduce=()
    [[ -z ${SLURM_GPUS_PER_NODE:-} ]] || gpus=$(plain_count "$SLURM_GPUS_PER_NODE")
    names=$(IFS=, && printf '%s' "$*")
    [[ ${TREEPO_DOCTOR:-1} = quick ]] || reduce=(--all-reduce)
    printf '%q ' "$PY" -m treepo_mega.cli doctor "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} ${reduce[@]+"${reduce[@]}"} \
        --nodes "$NODES" --hosts "$names" --gpus "$gpus" --ranks "$NPROC" --port "$(rendezvous_port)"
}

rendezvous_port() { printf '%s' "${TREEPO_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"; }

# Asked to stop, by Slurm or by a person: from the first line of a job on, for a signal may come while nodes are checked.
listen() {
    ASKED=0 STEP='' AGAIN='' STEP_STATUS=0
    # shellcheck disable=SC2317,SC2329 # called by the traps
    hand_on() {
        [[ $ASKED = 1 ]] || log "asked to stop: the ranks save and leave"
        ASKED=1
        [[ -z ${ATTEMPT:-} ]] || touch "$ATTEMPT/asked" 2>/dev/null || true
        [[ -n $STEP ]] || return 0
        # Again and again: srun drops a signal before its step runs, and a rank ignores it while it imports.
        if [[ -z $AGAIN ]]; then
            (
                trap - USR1 TERM
                exec {quiet}<> <(:)
                while kill -USR1 "$STEP" 2>/dev/null; do read -rt 5 -u "$quiet" || true; done
            ) &
            AGAIN=$!
        fi
    }
    trap hand_on USR1 TERM
}

# run_step MODE: task.sh on every node; sets STEP_STATUS.
run_step() {
    # --cpus-per-task: a step does not inherit the job's, and would be bound to one core on many clusters.
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 --nodes="$NODES" --ntasks="$NODES" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" \
        bash "$TREEPO_HOME/slurm/task.sh" "$1" &
    STEP=$!
    # One that came while the step began found no STEP to tell.
    [[ $ASKED = 0 ]] || hand_on
    # `wait` returns early whenever a trap runs: only a step that is gone ends the loop.
    while :; do
        STEP_STATUS=0
        wait "$STEP" || STEP_STATUS=$?
        kill -0 "$STEP" 2>/dev/null || break
    done
    STEP=''
    [[ -z $AGAIN ]] || kill "$AGAIN" 2>/dev/null || true
    AGAIN=''
}

# The batch script's part: one srun for the whole job, the hand-over of signals, and the requeue.
run_job() {
    local hosts
    if [[ -e $RUN_DIR/stop ]]; then
        log "$RUN_DIR/stop is there: nothing is started; remove the file to go on"
        exit 0
    fi
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [[ ${#hosts[@]} -gt 0 ]] || fail "scontrol named no hosts for $SLURM_JOB_NODELIST"
    open_attempt "${hosts[@]}"
    # The restart count keeps ranks of an earlier start, should any linger, out of this one's rendezvous.
    TREEPO_LAUNCH=$(launch_command "${hosts[0]}:$(rendezvous_port)" \
        "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}")
    TREEPO_EXAMINE=$(doctor_command "${hosts[@]}")
    TREEPO_HOSTS="${hosts[*]}"
    export TREEPO_LAUNCH TREEPO_EXAMINE TREEPO_HOSTS
    log "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID, head ${hosts[0]}; logs in $ATTEMPT"
    [[ $ASKED = 0 ]] || finish
    if [[ ${TREEPO_DOCTOR:-1} != 0 ]]; then
        run_step doctor
        [[ $ASKED = 0 ]] || finish
        # A node that is unfit now is so a minute later too, and a requeued job may get it again.
        [[ $STEP_STATUS = 0 ]] || leave_unfit "${hosts[@]}"
    fi
    run_step train
    finish "${hosts[@]}"
}

# finish HOST...: requeue when the job was asked to stop, or failed unexpectedly and not too often; else leave.
# ASKED decides, not the status: at a planned stop srun reports whichever of several statuses came first.
finish() {
    trap '' USR1 TERM
    echo "$STEP_STATUS" >"$ATTEMPT/ended"
    if [[ $ASKED = 0 && $STEP_STATUS = 0 ]]; then
        log "finished"
        exit 0
    fi
    if [[ -e $RUN_DIR/stop ]]; then
        # The ranks say so in the file; a failure that came first is one.
        if [[ $ASKED = 1 || -s $RUN_DIR/stop ]]; then
            log "stopped, as $RUN_DIR/stop asks ($(head -n 1 "$RUN_DIR/stop")): not requeued; remove the file to go on"
            exit 0
        fi
        log "status $STEP_STATUS, and $RUN_DIR/stop is there: not requeued"
        exit "$STEP_STATUS"
    fi
    if [[ ${SLURM_RESTART_COUNT:-0} -ge ${TREEPO_MAX_RESTARTS:-50} ]]; then
        fail "status $STEP_STATUS after ${SLURM_RESTART_COUNT} restarts, the most allowed (TREEPO_MAX_RESTARTS): not requeued"
    fi
    # Also when asked: Slurm asks, and requeues, when it finds a node dead.
    blame "$@"
    [[ $ASKED = 1 ]] || count_failure "$STEP_STATUS"
    requeue
}

# count_failure STATUS: ends the job when there were too many.
count_failure() {
    local count
    echo "attempt ${SLURM_RESTART_COUNT:-0}: status $1" >>"$JOB_FOLDER/failures"
    count=$(wc -l <"$JOB_FOLDER/failures")
    if [[ $count -gt ${TREEPO_MAX_FAILURES:-3} ]]; then
        log "failure $count with status $1, more than TREEPO_MAX_FAILURES allows: not requeued"
        exit "$1"
    fi
    log "failure $count with status $1: a node may be gone"
}

requeue() {
    log "requeueing job $SLURM_JOB_ID"
    # Slurm may have done so already, when it asked because a node is dead.
    scontrol requeue "$SLURM_JOB_ID" || log "it is requeued already"
    # While the job is pending: Slurm changes the nodes of no other.
    exclude_nodes
    sleep 120 # Slurm ends this script when it takes the job back
    exit 1
}
