"""The files of examples/cluster: their fields are those of the APIs, and they start what the Slurm script does."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.cluster.schemas import SkyTask, TrainingRuntime, TrainJob
from treepo_mega.cli import _parser
from treepo_mega.config import check, load_config

REPO = Path(__file__).parents[2]
FOLDER = REPO / "examples/cluster"
KUBEFLOW = FOLDER / "kubeflow_llama3_70b.yaml"
SKYPILOT = FOLDER / "skypilot_llama3_70b.yaml"


def kubeflow() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBEFLOW.read_text(encoding="utf-8")))


def skypilot() -> dict[str, Any]:
    return yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))


def test_every_file_has_a_schema():
    assert set(FOLDER.iterdir()) == {KUBEFLOW, SKYPILOT}


def test_kubeflow():
    first, second = kubeflow()
    runtime = TrainingRuntime.model_validate(first)
    job = TrainJob.model_validate(second)
    assert job.spec.runtimeRef.name == runtime.metadata.name
    (node,) = runtime.spec.template.spec.replicatedJobs
    # Trainer finds the container that it fills by this label.
    assert node.template.metadata.labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    trainer = job.spec.trainer
    assert trainer.numProcPerNode == int(trainer.resourcesPerNode.limits["nvidia.com/gpu"])
    assert "bash slurm/task.sh doctor && exec bash slurm/task.sh train" in trainer.args[0]
    env = {each.name: each.value for each in trainer.env}
    size = trainer.numNodes * trainer.numProcPerNode
    check_commands(env["TREEPO_LAUNCH"], env["TREEPO_EXAMINE"], size)
    grace = node.template.spec.template.spec.terminationGracePeriodSeconds
    (warning,) = re.findall(r"--signal=B:USR1@(\d+)", (REPO / "slurm/treepo_70b.sh").read_text())
    assert grace == int(warning), "a checkpoint takes as long on either cluster"


def test_skypilot():
    task = SkyTask.model_validate(skypilot())
    gpus = int(task.resources.accelerators.partition(":")[2])
    # What its `run` hands to task.sh on the second of two nodes; `bash` and `exec` only show it.
    shown = (
        task.run.replace("source .venv/bin/activate", "")
        .replace("bash slurm/task.sh doctor", "")
        .replace(
            "exec bash slurm/task.sh train",
            'printf "%s\\n" "$TREEPO_HOST" "$TREEPO_HOSTS" "$TREEPO_LAUNCH" "$TREEPO_EXAMINE"',
        )
    )
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_TASK_ID": "sky-1"}
    given |= {"SKYPILOT_NUM_NODES": str(task.num_nodes), "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus)}
    environment = {"PATH": "/usr/bin:/bin", **{k: v or "" for k, v in task.envs.items()}, **given}
    done = subprocess.run(
        ["bash", "-c", shown], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    host, hosts, launch, examine = done.stdout.splitlines()
    assert (host, hosts.split()) == ("10.0.0.2", ["10.0.0.1", "10.0.0.2"])
    assert f"--nnodes={task.num_nodes} --nproc-per-node={gpus} --node-rank=1 --master-addr=10.0.0.1" in " ".join(
        launch.split()
    )
    check_commands(launch, examine, task.num_nodes * gpus)


def check_commands(launch: str, examine: str, size: int) -> None:
    """Both are commands that exist, of a configuration that fits `size` ranks: the size of the Slurm script."""
    script = (REPO / "slurm/treepo_70b.sh").read_text()
    sizes = [int(re.findall(rf"--{name}=(\d+)", script)[0]) for name in ("nodes", "gpus-per-node")]
    assert size == sizes[0] * sizes[1]
    for command in (launch, examine):
        words = shlex.split(command)
        start = words.index("treepo-mega") + 1
        arguments = _parser().parse_args(words[start:])
        cfg = load_config(REPO / arguments.config, arguments.overrides)
        check(cfg.replace({"model.hf_checkpoint": str(REPO / "examples/configs/llama3_70b")}), size)
        assert arguments.config == "examples/llama3_70b_16x8.yaml"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("spec", "trainer", "numNode", 16), "numNode"),
        (("spec", "trainer", "numNodes", "16"), "valid integer"),
        (("spec", "trainer", "resourcesPerNode", {"requests": {"nvidia.com/gpu": "4"}}), "must be equal"),
    ],
)
def test_the_schema_refuses_what_kubernetes_would(change, words):
    job = kubeflow()[1]
    *path, key, value = change
    place = job
    for step in path:
        place = place[step]
    place[key] = value
    with pytest.raises(ValidationError, match=words):
        TrainJob.model_validate(job)


def test_the_schema_refuses_an_unknown_field_of_a_task():
    with pytest.raises(ValidationError, match="num_node"):
        SkyTask.model_validate({**skypilot(), "num_node": 2})
