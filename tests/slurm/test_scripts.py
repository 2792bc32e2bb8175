"""The job scripts as scripts: what --dry-run resolves, and what they do with signals and failures.

No Slurm daemon runs here. `srun` and `scontrol` are stand-ins that run the one task locally and record a
requeue; the ranks are real processes that wait for the signal.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPTS = {
    "treepo_70b.sh": (16, 8, "llama3_70b_16x8"),
    "treepo_7b.sh": (2, 8, "qwen25_7b_2x8"),
    "treepo_cpu.sh": (2, 2, "tiny_cpu"),
}
DEADLINE = 60


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TREEPO_", "WORLD_SIZE"))}
    return {**clean, "TREEPO_PYTHON": sys.executable, "PYTHONPATH": str(REPO), **extra}


def bash(script: str, *args: str, cwd: Path = REPO, **extra: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPO / "slurm" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=cwd, env=environment(**extra))


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_resolves_the_size_from_the_script_anywhere(script, tmp_path):
    nodes, gpus, recipe = SCRIPTS[script]
    done = bash(script, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        f"{nodes} nodes x {gpus} ranks = world size {nodes * gpus}; configuration examples/{recipe}.yaml" in done.stdout
    )
    assert f"# world size {nodes * gpus} = TP" in done.stdout
    assert f"--nnodes={nodes} --nproc-per-node={gpus} --max-restarts=0 --rdzv-backend=c10d" in done.stdout


def test_an_allocation_and_the_arguments_win_over_the_script():
    extra = {
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_GPUS_PER_NODE": "h100:4",
        "TREEPO_CONFIG": "examples/qwen25_7b_2x8.yaml",
    }
    done = bash("treepo_70b.sh", "train.lr=1e-5", "--dry-run", **extra)
    assert done.returncode == 0, done.stderr
    assert "4 nodes x 4 ranks = world size 16; configuration" in done.stdout
    assert "lr: 1.0e-05" in done.stdout
    assert "qwen25_7b_2x8.yaml train.lr=1e-5" in done.stdout
    done = bash("treepo_70b.sh", "--dry-run", "examples/llama3_70b_16x8.yaml", **extra)
    assert done.returncode == 2
    assert "world size 16 is not a multiple of" in done.stderr


@pytest.mark.parametrize(
    ("args", "extra", "message"),
    [
        (["--dry-run", "train.nonsense=1"], {}, "train.nonsense: unknown key"),
        (["--dry-run", "nowhere.yaml"], {}, "nowhere.yaml: cannot read the configuration"),
        (["--dryrun"], {}, "unknown option --dryrun"),
        ([], {}, "not inside a Slurm job"),
        (["--dry-run"], {"TREEPO_PYTHON": "/nonexistent/python"}, "no Python environment at /nonexistent/python"),
        (["--dry-run"], {"SLURM_JOB_NUM_NODES": "many"}, "cannot tell the size of the job"),
        (["--dry-run"], {"TREEPO_HOME": "/nonexistent"}, "no checkout at /nonexistent"),
    ],
)
def test_bad_input_ends_with_one_message(args, extra, message):
    done = bash("treepo_7b.sh", *args, **extra)
    assert done.returncode == 2
    assert message in done.stderr


def test_common_is_not_a_job_script():
    done = bash("common.sh")
    assert done.returncode == 2
    assert "started by the job scripts" in done.stderr


LAUNCHER = """\
#!{python}
# Stands for the interpreter: the trainer's dry run is real; torchrun is two ranks that behave as $RANKS says.
import os, subprocess, sys, time
if "torch.distributed.run" not in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
RANK = '''
import os, signal, sys, time
def save(*_):
    open(os.environ["OUT"] + "/saved" + sys.argv[1], "w").close()
    sys.exit(1)
signal.signal(signal.SIGUSR1, save)
open(os.environ["OUT"] + "/ready" + sys.argv[1], "w").close()
if os.environ["RANKS"] == "wait":
    time.sleep(60)
sys.exit(0 if os.environ["RANKS"] == "finish" else 3)
'''
open(os.environ["OUT"] + "/launch", "w").write(" ".join(sys.argv))
ranks = [subprocess.Popen([{python!r}, "-c", RANK, str(i)]) for i in range(2)]
sys.exit(max(r.wait() for r in ranks))
"""

# Slurm takes a requeued job back by killing its batch script; here the stand-in does.
SCONTROL = """\
#!/bin/bash
case $1 in
show) printf 'node1\\nnode2\\n' ;;
requeue) echo "$2" >>"$OUT/requeued"; kill -KILL "$PPID" ;;
esac
"""
SRUN = """\
#!/bin/bash
while [[ $1 = --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def job(tmp_path):
    """Starts a job of treepo_7b.sh whose Slurm commands are the stand-ins above; returns the process."""
    for folder in ("slurm", "examples"):
        (tmp_path / folder).symlink_to(REPO / folder)
    (tmp_path / "bin").mkdir()
    tools = {"python": LAUNCHER.format(python=sys.executable), "scontrol": SCONTROL, "srun": SRUN}
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    started = []

    def start(ranks: str, **extra: str) -> subprocess.Popen[str]:
        env = environment(
            PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            TREEPO_HOME=str(tmp_path),
            TREEPO_PYTHON=str(tmp_path / "bin" / "python"),
            SLURM_JOB_ID="77",
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_JOB_NUM_NODES="2",
            SLURM_GPUS_PER_NODE="8",
            OUT=str(tmp_path),
            RANKS=ranks,
            # Its srun would meet a launcher in Python's place; run.sh runs it on real nodes.
            TREEPO_DOCTOR="0",
            **extra,
        )
        command = ["bash", str(REPO / "slurm/treepo_7b.sh"), "train.lr=2e-6"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=DEADLINE)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert process.poll() is None, f"the job ended before {path.name}: {process.communicate()[0][-2000:]}"
        assert time.monotonic() < deadline, f"waited {DEADLINE} s for {path.name}"
        time.sleep(0.05)


def test_a_finished_job_is_not_requeued(job, tmp_path):
    process = job("finish", SLURM_RESTART_COUNT="2")
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out
    assert not (tmp_path / "requeued").exists()
    launch = (tmp_path / "launch").read_text()
    assert "--rdzv-endpoint=node1:20077 --rdzv-id=77-2 -m treepo_mega.cli train" in launch
    assert launch.endswith("train.lr=2e-6")


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_the_warning_reaches_every_rank_and_the_job_requeues(job, tmp_path, sent):
    process = job("wait")
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}", process)
    os.kill(process.pid, sent)
    out, _ = process.communicate(timeout=DEADLINE)
    assert {p.name for p in tmp_path.glob("saved*")} == {"saved0", "saved1"}, out
    assert (tmp_path / "requeued").read_text() == "77\n"
    assert not (tmp_path / "runs").exists(), "a planned stop is no failure"


def test_failures_are_requeued_and_bounded(job, tmp_path):
    for failure in (1, 2):
        process = job("fail", TREEPO_MAX_FAILURES="2", SLURM_RESTART_COUNT=str(failure - 1))
        process.communicate(timeout=DEADLINE)
        assert len((tmp_path / "requeued").read_text().split()) == failure
    process = job("fail", TREEPO_MAX_FAILURES="2", SLURM_RESTART_COUNT="2")
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 3, out
    assert len((tmp_path / "requeued").read_text().split()) == 2
    # Job ids begin anew on a new cluster: the first start of a job has no failures behind it.
    process = job("fail", TREEPO_MAX_FAILURES="2")
    process.communicate(timeout=DEADLINE)
    assert len((tmp_path / "requeued").read_text().split()) == 3


def test_restarts_are_bounded(job, tmp_path):
    process = job("fail", SLURM_RESTART_COUNT="5", TREEPO_MAX_RESTARTS="5")
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert "status 3 after 5 restarts" in out
    assert not (tmp_path / "requeued").exists()
