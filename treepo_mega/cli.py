"""The `treepo-mega` command.

    treepo-mega train CONFIG.yaml [a.b=c ...]            the trainer; start it under torchrun or srun
    treepo-mega train CONFIG.yaml --dry-run --world-size 128
                                                         resolve and check everything, start nothing
    treepo-mega train --help-config                      every configuration key
    treepo-mega eval CONFIG.yaml [a.b=c ...] --sampler both
                                                         accuracy against compute: trees, independent samples
    treepo-mega plan CONFIG.yaml [a.b=c ...]             memory, time and cost of a run on a cluster, before it starts
    treepo-mega report RUN... [--baseline RUN] [--live]  where GPU-hours went: report.html, .json, .md
    treepo-mega top RUN                                  live: phase, ranks, curves and faults of a run
    treepo-mega tree RUN [--step N] [--prompt K]         a page of a step's trees, to read and to search
    treepo-mega doctor CONFIG.yaml [a.b=c ...] --gpus 8  is this node, and this job's cluster, fit for the run?
    treepo-mega environment NAME --call TOOL '{}'        what an environment offers, and what its tools answer
    treepo-mega replay DUMP                              an update that was not finite, again: where it begins
    treepo-mega convert {to-mcore,to-hf,relayout,verify} ...
                                                         checkpoints between Hugging Face and Megatron, verified

`--dry-run`, `--help-config`, `plan`, `report`, `top`, `tree`, `doctor` and `environment` need no GPU, vLLM or Megatron,
and all but the last no torch: they work on a laptop and on a login node. Exit status: 0 when done, 2 for bad input (one
message, no traceback); `train` and `eval` otherwise exit with what they return.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from treepo_mega import __version__
from treepo_mega.config import Config, ConfigError, dump_text, load_config
from treepo_mega.config.describe import help_config
from treepo_mega.convert.cli import add_verbs, convert
from treepo_mega.doctor.command import add_arguments as add_doctor
from treepo_mega.environment.command import add_arguments as add_environment
from treepo_mega.errors import TreepoError, nearest
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.monitor.progress import quieten_libraries
from treepo_mega.plan.command import add_arguments, planned_for
from treepo_mega.runtime.environment import check_environment
from treepo_mega.runtime.kin import end_with_launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit status."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # Here, not where a run begins: imports take long enough to lose a launcher meanwhile.
    end_with_launcher()
    # argparse hands back overrides that follow an option; anything else left over is a mistake.
    if rest and (args.command not in ("train", "eval", "plan", "doctor") or any(r.startswith("-") for r in rest)):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        if args.command == "report":
            return _report(args)
        if args.command == "top":
            return _top(args)
        if args.command == "tree":
            return _tree(args)
        if args.command == "replay":
            return _replay(args.dump)
        if args.command == "convert":
            return convert(args)
        if args.command == "eval":
            return _eval(args, [*args.overrides, *rest])
        if args.command == "environment":
            return _environment(args)
        if args.command == "doctor":
            return _doctor(args, [*args.overrides, *rest])
        if args.command == "plan":
            return _plan(args, [*args.overrides, *rest])
        if args.help_config:
            print("\n".join(help_config()))
            return 0
        return _train(args.config, [*args.overrides, *rest], args.dry_run, args.world_size, args.gpu)
    except TreepoError as e:
        print(f"treepo-mega: error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader left early, as in `treepo-mega train --help-config | head`
        # Python flushes stdout once more at exit: into the closed pipe that would fail again, with a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Parser(argparse.ArgumentParser):
    """argparse's parser, whose message about a word that is no choice names the nearest one."""

    def error(self, message: str) -> typing.NoReturn:
        """Usage and `message` on stderr; exit status 2."""
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[\w.-]+", found[2]))
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="treepo-mega", description="TreePO on Megatron-Core and vLLM.")
    parser.add_argument("--version", action="version", version=f"treepo-mega {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train (under torchrun or srun), or check a configuration with --dry-run")
    train.add_argument("config", nargs="?", help="YAML file; a key may be overridden by a.b=c arguments after it")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="override of one key, such as train.lr=1e-6")
    train.add_argument("--dry-run", action="store_true", help="resolve and check the configuration, then stop")
    train.add_argument("--world-size", type=_positive, help="processes to check for (--dry-run; default: WORLD_SIZE)")
    train.add_argument("--gpu", help="device to plan for (--dry-run; default: H100, CPU for a config in fp32)")
    train.add_argument("--help-config", action="store_true", help="print every configuration key and stop")
    evaluate = commands.add_parser("eval", help="accuracy against compute, for trees and for independent samples")
    evaluate.add_argument("config", help="YAML file; its data.eval are the prompts")
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c", help="such as model.hf_checkpoint=runs/demo/hf")
    evaluate.add_argument("--sampler", choices=["tree", "sequential", "both"], default="both")
    evaluate.add_argument("--samples", type=_numbers, default=(1, 2, 4, 8), metavar="K,K,...", help="default: 1,2,4,8")
    evaluate.add_argument("--branch-factor", type=_numbers, metavar="B,B,...", help="of trees; default: the config's")
    evaluate.add_argument("--temperature", type=float, help="default: eval.temperature")
    evaluate.add_argument(
        "--compute-budget", type=float, metavar="TOKENS", help="a prompt; longer series are cut there"
    )
    evaluate.add_argument("--output", type=Path, help="directory to write to (default: <logging.run_dir>/eval)")
    _add_plan(commands.add_parser("plan", help="memory, time and cost of a run on a cluster, before it starts"))
    doctor = commands.add_parser("doctor", help="check this node, and all nodes of a Slurm step, before a run")
    doctor.add_argument("config", help="YAML file; a key may be overridden by a.b=c arguments after it")
    doctor.add_argument("overrides", nargs="*", metavar="a.b=c")
    add_doctor(doctor)
    add_environment(commands.add_parser("environment", help="what an environment offers, and what its tools answer"))
    add_verbs(commands.add_parser("convert", help="checkpoints between Hugging Face and Megatron, verified"))
    _add_report(commands.add_parser("report", help="where the GPU-hours of runs went, as HTML, JSON and Markdown"))
    top = commands.add_parser("top", help="watch a run: phase, ranks, curves and faults")
    top.add_argument("run", type=Path, metavar="RUN", help="run directory")
    top.add_argument("--once", action="store_true", help="print one picture and stop")
    top.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (default: 2)")
    replay = commands.add_parser("replay", help="where the first non-finite value of a stopped run appears")
    replay.add_argument("dump", type=Path, metavar="DUMP", help="directory such as RUN/dumps/step_000012")
    tree = commands.add_parser("tree", help="write one HTML page of the trees of a step")
    tree.add_argument("run", type=Path, metavar="RUN", help="run directory (holds trees/)")
    tree.add_argument("--step", type=int, metavar="N", help="default: the last step with trees")
    tree.add_argument("--prompt", metavar="K", help="only this prompt: its id, or its number in the file")
    tree.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/trees/step_N.html")
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("config", help="YAML file; a key may be overridden by a.b=c arguments after it")
    plan.add_argument("overrides", nargs="*", metavar="a.b=c")
    plan.add_argument("--world-size", type=_positive, help="ranks (default: WORLD_SIZE, else the fewest that fit)")
    add_arguments(plan)


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a directory of them")
    report.add_argument("--baseline", action="append", type=Path, default=[], metavar="RUN", help="to compare with")
    report.add_argument("--output", type=Path, help="directory to write to (default: the first RUN)")
    report.add_argument("--live", action="store_true", help="write it again and again until the runs have finished")
    report.add_argument(
        "--every", type=float, default=30.0, metavar="S", help="period of --live (default: %(default)s)"
    )
    report.add_argument("--slurm-job", action="append", default=[], metavar="ID", help="ask sacct what it was charged")
    report.add_argument("--gpus", type=_positive, metavar="N", help="default: what the metrics say")
    report.add_argument("--plan", type=Path, metavar="FILE", help="what plan --json wrote, to compare with")
    report.add_argument("--price", type=float, metavar="P", help="of a GPU-hour, in any currency")


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan of the configuration's run, or the best layouts for it."""
    from treepo_mega.plan.command import read
    from treepo_mega.plan.refit import smallest_world

    cfg = load_config(args.config, overrides)
    world = args.world_size or int(os.environ.get("WORLD_SIZE", 0)) or smallest_world(cfg)
    asked = read(args, cfg, world)
    if args.search:
        found = asked.search()
        if not found:
            raise ConfigError("\n  ".join(asked.proposals()))
        if args.json:
            print(json.dumps([{"overrides": each.overrides, **each.plan.to_dict()} for each in found]))
        else:
            print(
                "\n".join([f"layouts that fit on {world} ranks, the fastest first:", *(each.line() for each in found)])
            )
        return 0
    plan = asked.plan()
    said = plan.to_dict()
    lines = plan.lines()
    if args.prove:
        # A GPU of this machine has no part in it, and must be hidden before torch looks.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from treepo_mega.prove.command import prove  # heavy: torch and Megatron

        proof = prove(cfg, asked.spec, world_size=world, ranks_per_node=args.ranks_per_node)
        said["proof"] = proof.to_dict()
        lines += proof.lines()
    print(json.dumps(said) if args.json else "\n".join(lines))
    return 0


def _doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    from treepo_mega.doctor.command import run

    return run(args, load_config(args.config, overrides))


def _environment(args: argparse.Namespace) -> int:
    from treepo_mega.environment.command import run

    return run(args)


def _replay(directory: Path) -> int:
    _require_environment()
    quieten_libraries()
    from treepo_mega.replay import main as run  # heavy: torch and Megatron

    run(directory)  # ends the process itself
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number of processes, got {value}")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        values = ()
    if not values or values[0] < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers with commas between, such as 1,2,4, got {text!r}")
    return values


def _require_environment() -> None:
    """One rank of each node speaks for it; the launcher ends the others when it leaves."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and (problems := check_environment()):
        raise ConfigError("\n  ".join(["this environment cannot run the trainer:", *problems]))


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    cfg = load_config(args.config, overrides)
    temperature = cfg.eval.temperature if args.temperature is None else args.temperature
    if temperature == 0 and max(args.samples) > 1:
        raise ConfigError("eval: greedy (temperature 0) has one sample a prompt: use --samples 1 --sampler sequential")
    if temperature < 0 or (args.compute_budget is not None and args.compute_budget <= 0):
        raise ConfigError("eval: --temperature must not be negative, and --compute-budget must be positive")
    _require_environment()
    quieten_libraries()
    from treepo_mega.evaluate import Plan
    from treepo_mega.evaluate import main as run  # heavy: torch and vLLM

    samplers = ("sequential", "tree") if args.sampler == "both" else (args.sampler,)
    branches = args.branch_factor or (cfg.rollout.branching.factor,)
    output = args.output or Path(cfg.logging.run_dir) / "eval"
    run(cfg, Plan(samplers, args.samples, branches, temperature, args.compute_budget, output))
    return 0


def _train(path: str | None, overrides: list[str], dry_run: bool, world_size: int | None, gpu: str | None) -> int:
    if path is None:
        raise ConfigError("train: name a configuration file, such as examples/llama3_70b_16x8.yaml")
    if world_size is not None and not dry_run:
        raise ConfigError("--world-size only goes with --dry-run: torchrun or srun decides it for a run")
    if gpu is not None and not dry_run:
        raise ConfigError("--gpu only goes with --dry-run: a run computes on the devices that are there")
    cfg = load_config(path, overrides)
    if dry_run:
        # A world size that is named is that of a cluster, not of the machine that plans.
        return _dry_run(
            cfg, world_size or int(os.environ.get("WORLD_SIZE", "1")), gpu, elsewhere=world_size is not None
        )
    # Again in runtime/dist.py, which knows the world size for sure; here a mistake costs no import of Megatron.
    _require_preflight(cfg, int(os.environ.get("WORLD_SIZE", "1")), starting=True)
    _require_environment()
    quieten_libraries()  # before the import: most of them warn while being imported
    from treepo_mega.train import main as run  # heavy: torch, Megatron and vLLM

    run(cfg)  # ends the process itself, with the trainer's exit status
    return 0


def _require_preflight(cfg: Config, world_size: int, *, starting: bool = False, elsewhere: bool = False) -> list[str]:
    """Notes for people. Raises ConfigError with every problem that can be known before weights are read."""
    from treepo_mega.preflight import preflight

    problems, notes = preflight(cfg, world_size, starting=starting, elsewhere=elsewhere)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join([f"this run cannot start, for {len(problems)} reasons:", *problems]))
    return notes


def _dry_run(cfg: Config, world_size: int, gpu: str | None, *, elsewhere: bool) -> int:
    """Print the resolved configuration and what follows from it, after every check that needs no weights."""
    notes = _require_preflight(cfg, world_size, elsewhere=elsewhere)
    if plan := planned_for(cfg, world_size, gpu):
        notes.append(plan.summary())
    print(dump_text(cfg), end="")
    print("---")
    # Job scripts read where the run is from this line.
    place = f"run directory: {Path(cfg.logging.run_dir).absolute()}"
    for note in [*notes, _describe_model(Path(cfg.model.hf_checkpoint)), place]:
        print(f"# {note}")
    # Only a warning: the machine that plans a run is rarely the one that runs it.
    for problem in check_environment(try_imports=False):
        print(f"# warning: on this machine, {problem}")
    print("# dry run: the configuration is consistent; nothing was started")
    return 0


def _describe_model(hf_dir: Path) -> str:
    spec = ModelSpec.from_hf(hf_dir)
    weights = "weights present" if any(hf_dir.glob("*.safetensors")) else "no weights there: architecture only"
    return (
        f"model {spec.architecture}: {spec.num_layers} layers, hidden {spec.hidden_size}, {spec.num_attention_heads} "
        f"heads, {spec.num_key_value_heads} key/value groups, vocabulary {spec.vocab_size} ({weights})"
    )


def _report(args: argparse.Namespace) -> int:
    from treepo_mega.monitor.report import Asked, ReportError, write_live, write_report

    if args.every < 5:
        raise ReportError(f"--every {args.every:g}: expected five seconds or more: a page needs one or two to open")
    if args.price is not None and args.price < 0:
        raise ReportError(f"--price {args.price:g}: must not be negative")
    asked = Asked(tuple(args.baseline), tuple(args.slurm_job), args.gpus, args.price, args.plan)
    output = args.output or args.runs[0]
    try:
        paths = write_live(args.runs, output, asked, period_s=args.every) if args.live else None
    except KeyboardInterrupt:
        # How people end it. The last page must not go on waiting for another one.
        paths = None
    for path in paths or write_report(args.runs, output, asked):
        print(f"wrote {path}")
    return 0


def _top(args: argparse.Namespace) -> int:
    from treepo_mega.monitor.top import watch

    if args.interval <= 0:
        raise ConfigError(f"top: --interval {args.interval:g}: expected a positive number of seconds")
    watch(args.run, once=args.once, interval_s=args.interval)
    return 0


def _tree(args: argparse.Namespace) -> int:
    from treepo_mega.monitor.tree_page import write_tree_page

    path, notes = write_tree_page(args.run, args.step, prompt=args.prompt, output=args.output)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
