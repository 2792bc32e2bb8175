#!/usr/bin/env bash
# Which node of a job failed, and which nodes its next start leaves out. Sourced by common.sh.
#
# When one rank dies, the ranks of all other nodes die of it a moment later. Blamed is, in this order: a node that
# Slurm itself calls down; one whose rank was ended by a signal of its own (SIGKILL for memory, SIGBUS, SIGSEGV); one whose
# rank failed without naming a lost peer; one that left no word at all while the others lost a peer. Where more
# than half of the nodes fail by themselves, it is the program and no node.
#
# In RUN/slurm/JOB/: blamed has a line "ATTEMPT HOST REASON" for each time; attempt-N/failed.HOST is what task.sh wrote.
set -euo pipefail

# open_attempt HOST...: sets JOB_FOLDER and ATTEMPT, the folder of this start.
open_attempt() {
    local before=$((${SLURM_RESTART_COUNT:-0} - 1))
    JOB_FOLDER=$RUN_DIR/slurm/$SLURM_JOB_ID
    ATTEMPT=$JOB_FOLDER/attempt-${SLURM_RESTART_COUNT:-0}
    # Job ids begin anew on a new cluster: what another job of this id left is not this one's.
    [[ ${SLURM_RESTART_COUNT:-0} != 0 ]] || rm -rf "$JOB_FOLDER"
    mkdir -p "$ATTEMPT"
    printf '%s\n' "$@" >"$ATTEMPT/hosts"
    export TREEPO_ATTEMPT=$ATTEMPT
    # Only the death of its node ends a batch script without a word.
    if [[ -e $JOB_FOLDER/attempt-$before/hosts && ! -e $JOB_FOLDER/attempt-$before/ended &&
        ! -e $JOB_FOLDER/attempt-$before/asked ]]; then
        accuse "$before" "$(head -n 1 "$JOB_FOLDER/attempt-$before/hosts")" "the batch script ended without a word there"
    fi
}

accuse() { # accuse ATTEMPT HOST REASON
    log "attempt $1 failed on $2: $3"
    echo "$1 $2 $3" >>"$JOB_FOLDER/blamed"
}

# blame HOST...: says which nodes made this attempt fail, and remembers them.
blame() {
    local host state kind guilty=() silent=() lost=0 attempt=${SLURM_RESTART_COUNT:-0}
    for host in "$@"; do
        state=$(sinfo --noheader --nodes="$host" --format=%t 2>/dev/null | head -n 1) || state=''
        case $state in
        *\* | down* | drain* | drng* | fail*)
            accuse "$attempt" "$host" "Slurm calls it $state"
            guilty+=("$host")
            ;;
        esac
    done
    # At a planned stop ranks are ended by signals, which says nothing of their nodes.
    [[ ${#guilty[@]} = 0 && $ASKED = 0 ]] || return 0
    for kind in signal own; do
        mapfile -t guilty < <(grep -l " $kind" "$ATTEMPT"/failed.* 2>/dev/null | sed 's/.*\/failed\.//')
        [[ ${#guilty[@]} = 0 ]] || break
    done
    for host in "$@"; do
        [[ -e $ATTEMPT/failed.$host ]] || silent+=("$host")
    done
    ! grep -q ' peer' "$ATTEMPT"/failed.* 2>/dev/null || lost=1
    if [[ ${#guilty[@]} -gt 0 ]]; then
        if [[ ${#guilty[@]} -gt 1 && $((2 * ${#guilty[@]})) -gt $# ]]; then
            log "${#guilty[@]} of $# nodes failed by themselves: no node is blamed"
            return 0
        fi
        for host in "${guilty[@]}"; do
            accuse "$attempt" "$host" "its ranks failed by themselves ($(cut -d' ' -f2- "$ATTEMPT/failed.$host"))"
        done
    elif [[ $lost = 1 && ${#silent[@]} -gt 0 && $((2 * ${#silent[@]})) -le $# ]]; then
        for host in "${silent[@]}"; do accuse "$attempt" "$host" "others lost it, and it left no word"; done
    else
        log "no node stands out: none is blamed"
    fi
}

# leave_unfit HOST...: after the doctor. Unfit nodes are left out at once, if they are few; else the job ends.
leave_unfit() {
    local host unfit=()
    for host in "$@"; do
        [[ ! -e $ATTEMPT/unfit.$host ]] || unfit+=("$host")
    done
    trap '' USR1 TERM
    echo "$STEP_STATUS" >"$ATTEMPT/ended"
    if [[ ${#unfit[@]} -gt 0 && $((2 * ${#unfit[@]})) -le $# && ${TREEPO_EXCLUDE_AFTER:-2} -gt 0 ]]; then
        for host in "${unfit[@]}"; do
            # As often as it takes: what is unfit now is so at the next start too.
            for _ in $(seq "${TREEPO_EXCLUDE_AFTER:-2}"); do accuse "${SLURM_RESTART_COUNT:-0}" "$host" "not fit, as the doctor says"; done
        done
        mapfile -t unfit < <(may_exclude)
        if [[ ${#unfit[@]} -gt 0 ]]; then
            count_failure "$STEP_STATUS"
            requeue
        fi
    fi
    fail "a node is not fit for the run, as said above: exclude it (sbatch --exclude), or set TREEPO_DOCTOR=0"
}

# A field of the job as Slurm knows it; empty for "(null)".
job_field() { scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/.* $1=\([^ ]*\).*/\1/p" | sed 's/^(null)$//'; }

# may_exclude: hosts that were blamed often enough, as many as may be left out, one a line. Says on stderr what it refuses.
may_exclude() {
    local after=${TREEPO_EXCLUDE_AFTER:-2} most=${TREEPO_MAX_EXCLUDED:-2} host bad=() given='' left
    [[ $after -gt 0 && -s $JOB_FOLDER/blamed ]] || return 0
    # The most blamed first; of equals, by name.
    mapfile -t bad < <(awk -v after="$after" '{ n[$2]++ } END { for (h in n) if (n[h] >= after) print n[h], h }' \
        "$JOB_FOLDER/blamed" | sort -k1,1nr -k2 | cut -d' ' -f2)
    [[ ${#bad[@]} -gt 0 ]] || return 0
    if [[ ${#bad[@]} -gt $most ]]; then
        log "${#bad[@]} nodes failed $after times or more (${bad[*]}): only $most are left out (TREEPO_MAX_EXCLUDED)" >&2
        bad=("${bad[@]:0:$most}")
    fi
    given=$(job_field ExcNodeList)
    left=$(sinfo --noheader --Node --partition="$(job_field Partition)" --format=%N | sort -u |
        grep -cvxF -f <(printf '%s\n' "${bad[@]}" && [[ -z $given ]] || scontrol show hostnames "$given")) || true
    if [[ ${left:-0} -lt $NODES ]]; then
        log "${bad[*]} failed $after times or more, but without it the partition has ${left:-0} nodes of $NODES: not left out" >&2
        return 0
    fi
    [[ ${#bad[@]} = 0 ]] || printf '%s\n' "${bad[@]}"
}

# exclude_nodes: of the pending job; nodes that the user or an earlier attempt excluded stay so.
exclude_nodes() {
    local given names
    names=$(may_exclude)
    [[ -n $names ]] || return 0
    given=$(job_field ExcNodeList)
    names=$({ [[ -z $given ]] || scontrol show hostnames "$given"; printf '%s\n' "$names"; } | sort -u | paste -sd, -)
    if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$names"; then
        log "the next start leaves out $names: failed $(printf '%s' "${TREEPO_EXCLUDE_AFTER:-2}") times or more in this job"
    else
        log "Slurm refuses to leave out $names: the next start may get it again"
    fi
}
