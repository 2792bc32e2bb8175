"""Bad input: model directories and checkpoints, resuming, clusters."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from tests.errors.case import MODEL, REPO, BadInput, refusal, start

A = "Models and checkpoints"
RESUME = "Resuming and stopping"
CLUSTER = "Clusters"


def model(change: Callable[[Path], object]) -> Callable[[Path], str]:
    """A copy of the tiny model after `change`."""

    def answer(folder: Path) -> str:
        shutil.copytree(MODEL, folder / "model")
        change(folder / "model")
        return start("model.hf_checkpoint={here}/model")(folder)

    return answer


def key(file: str, **values: object) -> Callable[[Path], object]:
    """Keys of a JSON file; None takes one away."""

    def change(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **values}
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shape(folder: Path) -> None:
    """A tensor of the final norm that is one row short."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_experts(folder: Path) -> str:
    """The tiny model with 4 experts a layer, of which its config.json says that they are 8."""
    command = [sys.executable, str(REPO / "tools/make_tiny_moe.py"), "--out", str(folder / "model")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    key("config.json", num_local_experts=8)(folder / "model")
    return start("model.hf_checkpoint={here}/model")(folder)


def whole(folder: Path) -> str:
    """What is said of `folder`/step_000002 as a checkpoint to go on from."""
    from treepo_mega.checkpoint.mcore import check_complete

    return refusal(lambda: check_complete(folder / "step_000002"))


def no_manifest(folder: Path) -> str:
    (folder / "step_000002").mkdir()
    return whole(folder)


def damaged(folder: Path) -> str:
    """A file of a checkpoint that is shorter than its manifest says."""
    from treepo_mega.checkpoint.mcore import MANIFEST

    place = folder / "step_000002"
    place.mkdir()
    (place / "part").write_bytes(b"abc")
    manifest = {"step": 2, "files": {"part": 4}, "sha256": {"part": "0" * 64}}
    (place / MANIFEST).write_text(json.dumps(manifest))
    return whole(folder)


def megatron_lm(
    *names: str, tracker: str = "100", backend: str | None = None, overrides: tuple[str, ...] = ()
) -> Callable[[Path], str]:
    """What is said of a directory of Megatron-LM as initial weights. `names`: what is in it."""

    def answer(folder: Path) -> str:
        (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
        for name in names:
            (folder / name).mkdir(parents=True)
            if backend is not None:
                (folder / name / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
        return start(f"model.load={folder}", *overrides)(folder)

    return answer


def would_run(folder: Path) -> str:
    """A description of a checkpoint that would run a program."""
    from treepo_mega.checkpoint.description import read_description

    # Protocol 0, as text: call os.system.
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return refusal(lambda: read_description(folder))


def other_prompts(folder: Path) -> str:
    """The state of a cursor over other prompts."""
    from treepo_mega.data.cursor import PromptCursor
    from treepo_mega.data.prompts import Prompt

    def cursor(count: int) -> PromptCursor:
        prompts = [Prompt(f"train:{i}", "a", [1], "1", "exact", "train") for i in range(count)]
        return PromptCursor(prompts, seed=1, shuffle=True)

    return refusal(lambda: cursor(3).load_state_dict(cursor(4).state_dict(), source="step_000002"))


def asked_to_stop(folder: Path) -> str:
    (folder / "run").mkdir()
    (folder / "run/stop").touch()
    return start()(folder)


def script(*arguments: str, name: str = "treepo_7b.sh", **environment: str) -> Callable[[Path], str]:
    """What a job script says on stderr; it must end with 2."""

    def answer(_: Path) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TREEPO_", "WORLD_SIZE"))}
        given = {**clean, "TREEPO_PYTHON": sys.executable, "PYTHONPATH": str(REPO), **environment}
        command = ["bash", str(REPO / "slurm" / name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=REPO, env=given)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    return answer


def found(findings: object) -> str:
    """The failures and warnings of the doctor, as its table shows them."""
    from treepo_mega.doctor.finding import State, table

    bad = [each for each in findings if each.state is not State.OK]  # type: ignore[attr-defined]
    assert bad, "it was accepted"
    assert all(each.remedy for each in bad)
    return "\n".join(table("node7", bad))


def cards(visible: str | None, used: int) -> Callable[[Path], str]:
    """NVML with eight cards that have `used` bytes in use."""

    def answer(_: Path) -> str:
        from treepo_mega.doctor.node import check_cards

        nvml = SimpleNamespace(
            NVMLError=OSError,
            NVML_P2P_CAPS_INDEX_READ=0,
            NVML_P2P_STATUS_OK=0,
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: 8,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda card: "H100",
            nvmlSystemGetDriverVersion=lambda: "580",
            nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(used=used),
            nvmlDeviceGetP2PStatus=lambda *_: 0,
        )
        return found(check_cards(8, nvml, visible))

    return answer


def interface(_: Path) -> str:
    from treepo_mega.doctor.node import check_network

    return found(check_network(None, {"NCCL_SOCKET_IFNAME": "nowhere0"}))


def port(_: Path) -> str:
    from treepo_mega.doctor.node import check_network

    with socket.create_server(("", 0)) as server:
        return found(check_network(server.getsockname()[1], {}))


def absent(folder: Path) -> str:
    from treepo_mega.doctor.meeting import meet

    return found(meet(folder, "node7", 2, 0.1, ["node7", "node9"]))


def versions(_: Path) -> str:
    from treepo_mega.doctor.meeting import compare

    here = {"clock_s": 0.0, "versions": {"torch": "2.13.0"}}
    return found(compare({"node1": here, "node2": here, "node7": {**here, "versions": {"torch": "2.12.0"}}}))


def clocks(_: Path) -> str:
    from treepo_mega.doctor.meeting import compare

    here = {"clock_s": 0.0, "versions": {}}
    return found(compare({"node1": here, "node2": here, "node7": {**here, "clock_s": 9.0}}))


def sums(_: Path) -> str:
    from treepo_mega.doctor.reduce import judge

    one = {"wrong": 0, "seconds": 1.0, "bytes": 8, "world": 2, "rates": {"node7": 1.0}}
    return found(judge("node1", {"node1": one, "node7": {**one, "wrong": 3, "rates": {"node1": 1.0}}}))


def slow(_: Path) -> str:
    from treepo_mega.doctor.reduce import judge

    one = {"wrong": 0, "seconds": 1.0, "bytes": 8, "world": 3}
    rates = {"node1": {"node2": 9.0, "node7": 0.1}, "node2": {"node1": 9.0, "node7": 0.1}}
    rates["node7"] = {"node1": 0.1, "node2": 0.1}
    return found(judge("node1", {name: {**one, "rates": its} for name, its in rates.items()}))


CASES = (
    BadInput(
        A,
        "`num_local_experts` of another checkpoint in `config.json`",
        "config.json says 8 experts, and the routers of the weights choose among 4",
        "Put the `config.json` of these weights there.",
        other_experts,
    ),
    BadInput(
        A,
        "`model.load` of Megatron-LM without the iteration that its tracker names",
        "iter_0000100: no such iteration, although latest_checkpointed_iteration.txt says 100; there are: iter_0000050",
        "Name an iteration that is there, or copy the missing one.",
        megatron_lm("iter_0000050"),
    ),
    BadInput(
        A,
        "`model.load` of Megatron-LM in its old format",
        "has mp_rank_00: Megatron-LM's old format (--ckpt-format torch)",
        "Let Megatron-LM write it as `torch_dist`, as the message says.",
        megatron_lm("iter_0000100/mp_rank_00"),
    ),
    BadInput(
        A,
        "`model.load` of Megatron-LM in another distributed format",
        "the format is 'zarr', and only 'torch_dist' is read",
        "Let Megatron-LM write it as `torch_dist`, as the message says.",
        megatron_lm("iter_0000100", backend="zarr"),
    ),
    BadInput(
        A,
        "a reference whose `model.load` follows the tracker of Megatron-LM",
        "The frozen reference (algo.kl_loss_coef, reward.kl_coef) loads it again at every restart and would change",
        "Name the iteration, as the message does.",
        megatron_lm("iter_0000100", backend="torch_dist", overrides=("algo.kl_loss_coef=0.01",)),
    ),
    BadInput(
        A,
        "a checkpoint whose `.metadata` would run a program",
        ".metadata: names os.system, which the description of no checkpoint needs",
        "Take the checkpoint from a source that you trust.",
        would_run,
    ),
    BadInput(
        A,
        "a directory that is not there",
        "nowhere/config.json",
        "Name a directory with `config.json`, `*.safetensors` and the tokenizer.",
        start("model.hf_checkpoint={here}/nowhere"),
    ),
    BadInput(
        A,
        "no weights in the directory",
        "found no weights",
        "Copy the weight files.",
        model(lambda folder: (folder / "model.safetensors").unlink()),
    ),
    BadInput(
        A,
        "a weight file that was cut off",
        "not a readable safetensors file (truncated?)",
        "Copy or download the file once more.",
        model(lambda folder: cut(folder / "model.safetensors")),
    ),
    BadInput(
        A,
        "a Git LFS pointer in place of weights",
        "a Git LFS pointer of … bytes, not the weights",
        "Run `git lfs pull` in that directory.",
        model(
            lambda folder: (folder / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
            )
        ),
    ),
    BadInput(
        A,
        "pickled weights alone",
        "found pytorch_model.bin (convert to safetensors first",
        "Load it once with `transformers` and save it into a new directory.",
        model(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
    ),
    BadInput(
        A,
        "a tensor of another shape",
        "tensor … has shape [63]; config.json asks for [64]",
        "`config.json` and weights are of different models.",
        model(shape),
    ),
    BadInput(
        A,
        "`rope_type: ntk`",
        "rope_type 'ntk' is not supported",
        "Choose a model with one of the named rotary types.",
        model(key("config.json", rope_parameters={"rope_type": "ntk", "factor": 2.0})),
    ),
    BadInput(
        A,
        "another architecture",
        "architecture GPT2LMHeadModel is not supported",
        "Choose a model of a family that the message lists.",
        model(key("config.json", architectures=["GPT2LMHeadModel"])),
    ),
    BadInput(
        A,
        "`config.json` without `hidden_size`",
        "expected a transformers model configuration; missing or not an integer: hidden_size",
        "Take the `config.json` that came with the weights.",
        model(key("config.json", hidden_size=None)),
    ),
    BadInput(
        RESUME,
        "a checkpoint without its manifest",
        "step_000002: no manifest.json: not a checkpoint, or its writing was cut short",
        "It was not written to its end. Name an earlier one, or `checkpoint.load=auto`.",
        no_manifest,
    ),
    BadInput(
        RESUME,
        "a file that is shorter than its manifest says",
        "step_000002/part: expected 4 bytes, found 3: the checkpoint is damaged",
        "The named file is damaged. Load an earlier checkpoint with `checkpoint.load=DIR`.",
        damaged,
    ),
    BadInput(
        RESUME,
        "other prompts than at the checkpoint",
        "cannot resume: the prompts changed since the checkpoint",
        "Restore the data and the seed, or start afresh with `checkpoint.load=null`.",
        other_prompts,
    ),
    BadInput(
        RESUME,
        "a stop file from before",
        "run/stop asks this run to stop: remove the file to go on",
        "Remove the file.",
        asked_to_stop,
    ),
    BadInput(
        CLUSTER,
        "`bash slurm/treepo_7b.sh` outside a job",
        "not inside a Slurm job: submit with",
        "Submit it with `sbatch`, or check with `--dry-run`.",
        script(),
    ),
    BadInput(CLUSTER, "`--dryrun`", "unknown option --dryrun; usage:", "Correct the option.", script("--dryrun")),
    BadInput(
        CLUSTER,
        "`TREEPO_PYTHON=/nonexistent/python`",
        "no Python environment at /nonexistent/python",
        "Run `make setup` in the checkout, or set `TREEPO_PYTHON`.",
        script("--dry-run", TREEPO_PYTHON="/nonexistent/python"),
    ),
    BadInput(
        CLUSTER,
        "an allocation of `many` nodes",
        "cannot tell the size of the job",
        "Set `TREEPO_NPROC_PER_NODE`.",
        script("--dry-run", SLURM_JOB_NUM_NODES="many"),
    ),
    BadInput(
        CLUSTER,
        "`TREEPO_HOME=/nonexistent`",
        "no checkout at /nonexistent",
        "Submit from the checkout's top folder, or set `TREEPO_HOME`.",
        script("--dry-run", TREEPO_HOME="/nonexistent"),
    ),
    BadInput(
        CLUSTER,
        "a sweep without a file",
        "no file of a sweep at 'nowhere.txt'",
        "Name a file with a line of overrides for each task.",
        script("nowhere.txt", "--dry-run", name="treepo_sweep.sh"),
    ),
    BadInput(
        CLUSTER,
        "`CUDA_VISIBLE_DEVICES=0,1` and 8 ranks a node",
        "node7 FAIL GPUs 8 asked for, 2 visible",
        "Drain the node, or ask Slurm for `--gpus-per-node`.",
        cards("0,1", 0),
    ),
    BadInput(
        CLUSTER,
        "a process that was left on the cards",
        "node7 FAIL GPU memory card 0 has 70.0 GiB in use",
        "End the process that `nvidia-smi` names there.",
        cards(None, 70 << 30),
    ),
    BadInput(
        CLUSTER,
        "`NCCL_SOCKET_IFNAME=nowhere0`",
        "node7 FAIL network … no interface nowhere0",
        "Name one of the interfaces that are there.",
        interface,
    ),
    BadInput(
        CLUSTER,
        "a port that is taken",
        "node7 FAIL port …: Address already in use",
        "Set `TREEPO_PORT` to a free one.",
        port,
    ),
    BadInput(
        CLUSTER,
        "a node that does not see the run directory",
        "node7 FAIL nodes node9 did not come to",
        "Look at node9's log, and mount the run directory on all nodes.",
        absent,
    ),
    BadInput(
        CLUSTER,
        "nodes with different packages",
        "node7 FAIL same versions torch is 2.12.0 on node7, and 2.13.0 on the other 2",
        "Install one environment on all nodes.",
        versions,
    ),
    BadInput(
        CLUSTER,
        "clocks that differ",
        "node7 warn clocks … differ by 9.0 s: node7 is furthest",
        "Start an NTP client on it.",
        clocks,
    ),
    BadInput(
        CLUSTER,
        "memory that flips bits",
        "node7 FAIL all-reduce sums are wrong on node7 (3 elements on node7)",
        "Drain it, and test its memory, cards and links.",
        sums,
    ),
    BadInput(
        CLUSTER,
        "a cable that has come loose",
        "node7 FAIL links node7 exchanges 0.10 GB/s with its neighbours",
        "Look at its cards, cables and switch port, or drain it.",
        slow,
    ),
)
