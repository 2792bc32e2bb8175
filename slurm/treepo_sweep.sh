#!/usr/bin/env bash
#SBATCH --job-name=treepo-sweep
#SBATCH --array=1-4%2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#
# A sweep as a job array: task N of the array trains with the overrides of line N of a file (examples/sweeps). Blank
# lines and lines that begin with "#" do not count.
#
#   bash slurm/treepo_sweep.sh examples/sweeps/lr_and_branching.txt --dry-run   check every line, anywhere
#   sbatch --array=1-4%2 slurm/treepo_sweep.sh examples/sweeps/lr_and_branching.txt my.yaml
#
# Each task has a run directory of its own, runs/sweeps/NAME/N (or below logging.run_dir, if that is given), and is stopped,
# requeued and resumed by itself. Submit the same sweep again and every task goes on from its newest checkpoint.
# `%2` bounds how many run at once. `treepo-mega report runs/sweeps/NAME` compares them.
set -euo pipefail

# Slurm runs a copy of this file from its spool folder, so inside a job the checkout is where sbatch was called.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    : "${TREEPO_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}"
else
    : "${TREEPO_HOME:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
fi
export TREEPO_HOME
if [[ ! -f $TREEPO_HOME/slurm/common.sh ]]; then
    echo "treepo: error: no checkout at $TREEPO_HOME: submit from its top folder, or set TREEPO_HOME" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source "$TREEPO_HOME/slurm/common.sh"

# The file comes first: everything after it is as for the other job scripts.
SWEEP=${1:-}
[[ -f $SWEEP ]] || fail "no file of a sweep at '$SWEEP': name one, such as examples/sweeps/lr_and_branching.txt"
shift
mapfile -t LINES < <(grep -vE '^[[:space:]]*(#|$)' "$SWEEP")
[[ ${#LINES[@]} -gt 0 ]] || fail "$SWEEP has no line with overrides"

place=runs/sweeps/$(basename "${SWEEP%.*}")
for arg in "$@"; do
    [[ $arg != logging.run_dir=* ]] || place=${arg#*=}
done

# run_line N ARGUMENT...: the job script's work for one line. xargs takes quotes away and runs nothing.
run_line() {
    local number=$1 words
    shift
    mapfile -t words < <(xargs -n1 <<<"${LINES[number - 1]}")
    log "task $number of $SWEEP: ${words[*]}"
    treepo_main "${BASH_SOURCE[0]}" examples/qwen25_7b_2x8.yaml "$@" "${words[@]}" "logging.run_dir=$place/$number"
}

task=${SLURM_ARRAY_TASK_ID:-}
if [[ -n $task ]]; then
    [[ $task -ge 1 && $task -le ${#LINES[@]} ]] ||
        fail "task $task of the array has no line: $SWEEP has ${#LINES[@]} (sbatch --array=1-${#LINES[@]})"
    run_line "$task" "$@"
else
    [[ " $* " = *" --dry-run "* ]] ||
        fail "not a task of a job array: sbatch --array=1-${#LINES[@]} ${BASH_SOURCE[0]} $SWEEP, or check with --dry-run"
    for number in $(seq "${#LINES[@]}"); do (run_line "$number" "$@"); done
    log "${#LINES[@]} lines are fine: sbatch --array=1-${#LINES[@]} ${BASH_SOURCE[0]} $SWEEP"
fi
