"""`treepo-mega doctor`: its arguments, what a job tells it, and the table that it prints."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treepo_mega.config import Config
from treepo_mega.doctor import meeting, node, reduce
from treepo_mega.doctor.finding import Finding, State, table
from treepo_mega.modelspec.spec import ModelSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments beside the configuration."""
    parser.add_argument("--nodes", type=int, help="nodes that meet (default: those of the Slurm step, else 1)")
    parser.add_argument("--hosts", default="", metavar="A,B,...", help="their names, so that absent ones are named")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that this node must have (default: 0)")
    parser.add_argument("--ranks", type=int, help="processes on this node (default: --gpus, else 1)")
    parser.add_argument("--port", type=int, help="rendezvous port; looked at on the first node")
    parser.add_argument("--meet", type=Path, metavar="DIR", help="shared directory, new for every start")
    parser.add_argument(
        "--all-reduce", action="store_true", help="sum a tensor over all nodes, with a rank a GPU, else one a node"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="for nodes to come (default: 120)")


def run(args: argparse.Namespace, cfg: Config, environment: Mapping[str, str] = os.environ) -> int:
    """Check this node and meet the others; 0 when nothing failed, else 1."""
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    first = environment.get("SLURM_NODEID", "0") == "0"
    # Outside a step the allocation's size says nothing about who runs this command.
    in_step = "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "").isdigit()
    nodes = args.nodes or (int(environment.get("SLURM_STEP_NUM_NODES", "1")) if in_step else 1)
    findings = examine(args, cfg, environment, first=first)
    place = args.meet or Path(cfg.logging.run_dir) / ".doctor" / _start(environment)
    hosts = [name for name in args.hosts.split(",") if name]
    met = meeting.meet(place, host, nodes, args.timeout, hosts)
    findings += met
    # Nodes that did not find each other would only wait here once more.
    if args.all_reduce and not any(each.state is State.FAIL for each in met):
        names = meeting.names(place) if nodes > 1 else [host]
        with tempfile.TemporaryDirectory(prefix="treepo-doctor-") as alone:
            # A node alone has met nobody, in no directory that is new.
            shared = place if nodes > 1 else Path(alone)
            findings += reduce.check_all_reduce(shared, host, names, args.gpus, args.timeout)
    failed = sum(each.state is State.FAIL for each in findings)
    # The first node speaks for what is fine everywhere: a thousand equal tables hide the line that matters.
    print("\n".join(table(host, findings, all_of_them=first)), flush=True)
    if failed:
        print(f"{host}  {failed} of {len(findings)} checks failed: the run would not start or not survive here")
    return 1 if failed else 0


def examine(args: argparse.Namespace, cfg: Config, environment: Mapping[str, str], *, first: bool) -> list[Finding]:
    """Findings about this node alone."""
    ranks = args.ranks or args.gpus or 1
    return [
        *node.check_packages(),
        *node.check_cards(args.gpus, _nvml() if args.gpus else None, environment.get("CUDA_VISIBLE_DEVICES")),
        *node.check_limits(ranks, args.gpus),
        *node.check_disks(cfg, ModelSpec.from_hf(cfg.model.hf_checkpoint)),
        *node.check_network(args.port if first else None, environment),
    ]


def _nvml() -> Any | None:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _start(environment: Mapping[str, str]) -> str:
    """A name of this start of the job, the same on all nodes."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return re.sub(r"[^\w.-]", "_", "-".join(environment.get(name, "0") for name in names))
