#!/usr/bin/env bash
#SBATCH --job-name=treepo-70b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# TreePO on a Llama-3-70B-shaped model, 16 nodes x 8 GPUs (examples/llama3_70b_16x8.yaml).
#
#   bash slurm/treepo_70b.sh --dry-run                     check everything for this size, anywhere, without Slurm or a GPU
#   sbatch slurm/treepo_70b.sh model.hf_checkpoint=DIR     submit from the checkout (or set TREEPO_HOME)
#   sbatch --nodes=N slurm/treepo_70b.sh my.yaml           another size, another configuration
#
# 1800 seconds before the time limit the ranks are told to save; the job then requeues itself and resumes. Give the
# options of your cluster (partition, account) to sbatch. Variables: see slurm/common.sh.
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

treepo_main "${BASH_SOURCE[0]}" examples/llama3_70b_16x8.yaml "$@"
