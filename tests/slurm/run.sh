#!/usr/bin/env bash
# The job script with the real trainer on a real Slurm of two nodes x two ranks: stopped, killed and starved, every
# number must come out as in a run that nobody disturbed. `--help` lists what can be chosen.
#
#   bash tests/slurm/run.sh            TP2 x DP2 and PP2 x DP2
#   bash tests/slurm/run.sh --quick    TP2 x DP2 alone
#   bash tests/slurm/run.sh --only 'PP2 x DP2'      or 'lost node', 'stop file'
#
# Exit status: 0 all equal, 1 a difference or a fault, 3 this machine cannot run Slurm (it says why).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${VENV:-.venv}/bin/python" tests/slurm/scenarios.py "$@"
