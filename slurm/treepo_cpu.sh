#!/usr/bin/env bash
#SBATCH --job-name=treepo-cpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# TreePO on the tiny reasoner, 2 nodes x 2 ranks without a GPU (examples/tiny_cpu.yaml): the smallest job that takes the
# whole path, to try a cluster with, and what the tests of this folder start.
#
#   bash slurm/treepo_cpu.sh --dry-run                     check everything for this size, anywhere, without Slurm
#   sbatch slurm/treepo_cpu.sh parallel.tensor_model_parallel_size=2
#
# 120 seconds before the time limit the ranks are told to save; the job then requeues itself and resumes. Give the
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

# A rank is a process here and not a GPU. One thread each: ranks of a node share its cores.
export TREEPO_NPROC_PER_NODE=${TREEPO_NPROC_PER_NODE:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
treepo_main "${BASH_SOURCE[0]}" examples/tiny_cpu.yaml "$@"
