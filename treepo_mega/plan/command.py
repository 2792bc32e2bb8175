"""`treepo-mega plan`: its arguments, and what it prints. Pure; `--prove` is in `prove/`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from treepo_mega.config import Config, ConfigError, check
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.mcore_layout import LayoutError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.plan.calibrate import calibrate
from treepo_mega.plan.hardware import Rates, check_speeds, gpu_of
from treepo_mega.plan.lengths import Lengths, read_lengths
from treepo_mega.plan.run import RunPlan, plan_run
from treepo_mega.plan.search import Found, search, smallest_that_fits
from treepo_mega.plan.timing import Cluster

LINKS = {"local": "copies in a device's memory", "node": "within a node", "network": "between nodes"}
MEANS = {"response_mean": "response", "prompt_mean": "prompt", "kept": "kept"}


class DoesNotFit(TreepoError):
    """A configuration needs more memory than its devices have; the message says where, and what would fit."""


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """Those of `treepo-mega plan`, but for configuration, overrides and world size."""
    plan.add_argument("--gpu", help="H100, H200, B200, A100 or CPU (default: H100, CPU for a config in fp32)")
    plan.add_argument("--ranks-per-node", type=int, default=8, help="default: %(default)s")
    for link, what in LINKS.items():
        plan.add_argument(f"--{link}-gb-per-s", type=float, help=f"speed of {what}, a rank and direction, GB/s")
    plan.add_argument("--response-mean", type=float, metavar="TOKENS", help="mean response (default: assumed)")
    plan.add_argument("--prompt-mean", type=float, metavar="TOKENS", help="mean prompt (default: assumed)")
    plan.add_argument("--kept", type=float, metavar="SHARE", help="prompts that dynamic sampling keeps")
    plan.add_argument("--lengths", metavar="RUN", help="take response lengths from the trees that a run kept")
    plan.add_argument("--calibrate", metavar="RUN", help="take rates and lengths from a run's metrics")
    plan.add_argument("--price", type=float, help="of a device and hour: adds the cost of the run")
    plan.add_argument("--search", action="store_true", help="the best layouts for the model on so many ranks")
    plan.add_argument("--prove", action="store_true", help="build ranks with fake tensors and compare (needs torch)")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def cluster_of(args: argparse.Namespace, cfg: Config) -> Cluster:
    """The cluster that the arguments say. Raises ConfigError and HardwareError."""
    stated = {link: getattr(args, f"{link}_gb_per_s") for link in LINKS}
    if bad := [link for link, value in stated.items() if value is not None and value <= 0]:
        raise ConfigError(f"--{bad[0]}-gb-per-s {stated[bad[0]]}: expected a positive number")
    if args.ranks_per_node < 1:
        raise ConfigError(f"--ranks-per-node {args.ranks_per_node}: expected a positive number")
    if args.price is not None and args.price <= 0:
        raise ConfigError(f"--price {args.price}: expected a positive number")
    rates = Rates()
    gpu = gpu_of(args.gpu or default_gpu(cfg))
    # A stated speed is one that is reached: the plan's share of a nominal speed must not be taken off it again.
    reached = {link: value / rates.link for link, value in stated.items() if value is not None}
    if "local" in reached:
        reached["hbm"] = 2 * reached.pop("local")
    gpu = dataclasses.replace(gpu, **{f"{link}_gb_s": value for link, value in reached.items()})
    check_speeds(gpu, rates.link)
    return Cluster(gpu, args.ranks_per_node, rates)


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What a plan is of, once all arguments are read."""

    cfg: Config
    spec: ModelSpec
    world_size: int
    cluster: Cluster
    lengths: Lengths
    notes: tuple[str, ...]
    price: float | None

    def plan(self) -> RunPlan:
        """Raises ConfigError and LayoutError for what cannot start, DoesNotFit for what has no room."""
        model = self.cfg.parallel.model_parallel_size
        if self.world_size % model:
            said = f"world size {self.world_size} is not a multiple of TP x PP x CP = {model}"
            raise DoesNotFit("\n  ".join([said, *self.proposals()]))
        try:
            check(self.cfg, self.world_size, self.spec)
            plan = plan_run(
                self.cfg, self.spec, world_size=self.world_size, cluster=self.cluster, lengths=self.lengths,
                price=self.price,
            )  # fmt: skip
        except LayoutError as error:
            raise ConfigError(str(error)) from None
        require_room(self, plan)
        return dataclasses.replace(plan, notes=(*plan.notes, *self.notes))

    def search(self) -> list[Found]:
        """The best layouts on this cluster."""
        return search(self.cfg, self.spec, world_size=self.world_size, cluster=self.cluster, lengths=self.lengths)

    def proposals(self) -> list[str]:
        """Sentences: layouts that fit on so many ranks, else on more, else that there is none."""
        if found := self.search():
            return [
                f"what fits on {self.world_size} ranks, the fastest first:",
                *(f"  {each.line()}" for each in found),
            ]
        world, found = smallest_that_fits(
            self.cfg, self.spec, above=self.world_size, cluster=self.cluster, lengths=self.lengths
        )
        if found:
            return [
                f"nothing fits on {self.world_size} ranks; on {world}, the fastest first:",
                *(f"  {each.line()}" for each in found),
            ]
        return [f"no layout fits on {self.world_size} ranks, nor on 64 times as many"]


def planned_for(cfg: Config, world_size: int, gpu: str | None = None) -> RunPlan:
    """The plan of a start that is being checked.

    Raises DoesNotFit, and HardwareError for a device that is not known.
    """
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    device = gpu_of(gpu or default_gpu(cfg))
    cluster = Cluster(device, 8, Rates())
    lengths = Lengths.assumed(cfg, cluster.rates)
    plan = plan_run(cfg, spec, world_size=world_size, cluster=cluster, lengths=lengths, refit=False)
    require_room(Asked(cfg, spec, world_size, cluster, lengths, (), None), plan)
    return plan


def default_gpu(cfg: Config) -> str:
    """The device that a configuration seems to be for: fp32 is what runs on a CPU have."""
    return "CPU" if cfg.model.params_dtype == "fp32" else "H100"


def require_room(asked: Asked, plan: RunPlan) -> None:
    """Raise DoesNotFit when a phase has no room: with what is there, and what would fit."""
    if problems := plan.memory.problems():
        raise DoesNotFit("\n  ".join(["this run does not fit:", *problems, *asked.proposals()]))


def read(args: argparse.Namespace, cfg: Config, world_size: int) -> Asked:
    """The arguments with defaults, assumptions and measurements filled in. Raises TreepoError for bad ones."""
    cluster = cluster_of(args, cfg)
    spec = ModelSpec.from_hf(cfg.model.hf_checkpoint)
    notes: tuple[str, ...] = ()
    lengths = Lengths.assumed(cfg, cluster.rates)
    if args.calibrate:
        # Ranks on a CPU share its cores with each other and with other jobs, which CPU time does not count.
        found = calibrate(args.calibrate, cluster, clock="cpu_s" if cluster.gpu.is_cpu else "timing_s")
        cluster = dataclasses.replace(cluster, rates=found.rates)
        lengths = found.lengths
        notes = tuple(found.lines())
        if cluster.gpu.is_cpu:
            notes = (*notes, "seconds are CPU seconds of a rank: ranks that share a core take as many times as long")
    if args.lengths:
        measured = read_lengths(args.lengths)
        lengths = measured.put(lengths)
        notes = (*notes, f"lengths of {measured.leaves} responses of {measured.run}")
    given: dict[str, Any] = {
        name: getattr(args, option) for option, name in MEANS.items() if getattr(args, option) is not None
    }
    if not 0 < given.get("kept", 1.0) <= 1:
        raise ConfigError(f"--kept {given['kept']}: expected a share above 0, at most 1")
    return Asked(cfg, spec, world_size, cluster, dataclasses.replace(lengths, **given), notes, args.price)
