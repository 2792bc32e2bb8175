"""The job scripts as scripts: what --dry-run resolves, and what they do with signals and failures.

No Slurm daemon runs here. `srun`, `scontrol` and `sinfo` are stand-ins that run the one task locally and record what
is asked of Slurm; the ranks are real processes that wait for the signal. run.sh has the real daemons.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treepo_mega.config import check, load_config

REPO = Path(__file__).parents[2]
SCRIPTS = {
    "treepo_70b.sh": (16, 8, "llama3_70b_16x8"),
    "treepo_7b.sh": (2, 8, "qwen25_7b_2x8"),
    "treepo_cpu.sh": (2, 2, "tiny_cpu"),
}
DEADLINE = 120


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
    kind = "CPU" if recipe == "tiny_cpu" else "H100"
    assert f" on {nodes * gpus} x {kind}, {gpus} a node" in done.stdout, "the plan: memory and seconds of every phase"


@pytest.mark.slow
def test_a_size_that_cannot_be_is_answered_with_one_that_can():
    done = bash("treepo_70b.sh", "--dry-run", SLURM_JOB_NUM_NODES="2")
    assert done.returncode == 2
    assert "world size 16 is not a multiple of" in done.stderr
    assert "nothing fits on 16 ranks; on 32, the fastest first:" in done.stderr
    assert "proposal: sbatch --nodes=4 " in done.stderr
    assert "would start" not in done.stdout


def test_a_sweep_is_checked_line_by_line_and_refuses_a_task_without_one(tmp_path):
    sweep = tmp_path / "two.txt"
    sweep.write_text("# two lines\n\ntrain.lr=1e-6 'logging.project=two words'\ntrain.lrr=1\n")
    done = bash("treepo_sweep.sh", str(sweep), "--dry-run", "examples/tiny_cpu.yaml", TREEPO_NPROC_PER_NODE="2")
    assert done.returncode == 2
    assert f"run directory: {REPO}/runs/sweeps/two/1" in done.stdout and "project: two words" in done.stdout
    assert "train.lrr: unknown key" in done.stderr
    done = bash("treepo_sweep.sh", str(sweep), SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="3", TREEPO_HOME=str(REPO))
    assert done.returncode == 2 and f"task 3 of the array has no line: {sweep} has 2" in done.stderr
    done = bash("treepo_sweep.sh", str(sweep))
    assert done.returncode == 2 and "sbatch --array=1-2 " in done.stderr


def test_every_line_of_the_example_is_a_set_of_overrides():
    lines = (REPO / "examples/sweeps/lr_and_branching.txt").read_text().splitlines()
    tasks = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    (array,) = re.findall(r"^#SBATCH --array=1-(\d+)%", (REPO / "slurm/treepo_sweep.sh").read_text(), re.M)
    assert len(tasks) == int(array)
    for overrides in tasks:
        check(load_config(REPO / "examples/qwen25_7b_2x8.yaml", overrides), 16)


def test_the_scripts_are_clean():
    """shellcheck knows what bash does with a missing quote."""
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    scripts = [*(REPO / "slurm").glob("*.sh"), *(REPO / "tests/slurm").glob("*.sh")]
    done = subprocess.run(
        ["shellcheck", *map(str, scripts)], cwd=REPO, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout


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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.nonsense=1", "train.nonsense: unknown key"),
        ("nowhere.yaml", "nowhere.yaml: cannot read the configuration"),
    ],
)
def test_a_bad_configuration_ends_with_its_message(argument, message):
    """What is wrong with the scripts' own input: tests/errors."""
    done = bash("treepo_7b.sh", "--dry-run", argument)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("script", ["common.sh", "task.sh"])
def test_what_is_shared_is_not_a_job_script(script):
    done = bash(script)
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
print("rank " + sys.argv[1] + " is here" + chr(10), end="", flush=True)
stop = "runs/demo/stop"
if os.environ["RANKS"] == "wait":
    time.sleep(60)
if os.environ["RANKS"] in ("obey", "fail after a stop file"):
    open(stop, "w").write("saved after step 3" if os.environ["RANKS"] == "obey" else "")
sys.exit(0 if os.environ["RANKS"] == "finish" else 3)
'''
open(os.environ["OUT"] + "/launch", "w").write(" ".join(sys.argv))
ranks = [subprocess.Popen([{python!r}, "-c", RANK, str(i)]) for i in range(2)]
sys.exit(max(r.wait() for r in ranks))
"""

# Slurm takes a requeued job back by killing its batch script; here that happens when it has done all and waits for it.
SLEEP = """\
#!/bin/bash
[[ $1 != 120 ]] || kill -KILL 0
exec /bin/sleep "$@"
"""
SCONTROL = """\
#!/bin/bash
case "$1 $2" in
"show hostnames") tr , '\\n' <<<"${3/node\\[1-2\\]/node1,node2}" ;;
"show job") echo "JobId=77 Partition=gpu ExcNodeList=${EXCLUDED:-(null)} NodeList=node[1-2]" ;;
requeue*) echo "$2" >>"$OUT/requeued" ;;
update*) echo "$3" >>"$OUT/updated" ;;
esac
"""
SINFO = """\
#!/bin/bash
case "$*" in
*%t) echo idle ;;
*) printf '%s\\n' ${CLUSTER:-node1 node2 node3} ;;
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
    tools = {
        "python": LAUNCHER.format(python=sys.executable),
        "scontrol": SCONTROL,
        "srun": SRUN,
        "sinfo": SINFO,
        "sleep": SLEEP,
    }
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
            SLURM_GPUS_PER_NODE="8",
            SLURMD_NODENAME="node2",
            # Its dry run is the shortest.
            TREEPO_CONFIG="examples/tiny_cpu.yaml",
            OUT=str(tmp_path),
            RANKS=ranks,
            # Its srun would meet a launcher in Python's place; run.sh runs it on real nodes.
            **{"TREEPO_DOCTOR": "0", "SLURM_JOB_NUM_NODES": "2", **extra},
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
    folder = tmp_path / "runs/demo/slurm/77"
    assert not (folder / "failures").exists() and not (folder / "blamed").exists(), "a planned stop is no failure"
    assert "rank 1 is here" in (folder / "attempt-0/node2.log").read_text()


def run_of(tmp_path: Path) -> Path:
    """The run directory of the stand-in's recipe."""
    (tmp_path / "runs/demo").mkdir(parents=True, exist_ok=True)
    return tmp_path / "runs/demo"


def test_a_stop_file_keeps_a_job_from_starting(job, tmp_path):
    (run_of(tmp_path) / "stop").touch()
    process = job("finish")
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and "nothing is started; remove the file" in out
    assert not (tmp_path / "launch").exists()


@pytest.mark.parametrize(("ranks", "status"), [("obey", 0), ("fail after a stop file", 3)])
def test_a_job_with_a_stop_file_is_not_requeued(job, tmp_path, ranks, status):
    run_of(tmp_path)
    process = job(ranks)
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == status, out
    assert "not requeued" in out and not (tmp_path / "requeued").exists()
    assert ("(saved after step 3)" in out) == (status == 0)


def test_a_node_that_fails_again_is_left_out(job, tmp_path):
    out, _ = job("fail").communicate(timeout=DEADLINE)
    assert "attempt 0 failed on node2: its ranks failed by themselves (status 3 own)" in out
    assert not (tmp_path / "updated").exists(), "once may be chance"
    out, _ = job("fail", SLURM_RESTART_COUNT="1", EXCLUDED="node9").communicate(timeout=DEADLINE)
    assert (tmp_path / "updated").read_text() == "ExcNodeList=node2,node9\n", "what the user excluded stays so"
    assert "the next start leaves out node2,node9" in out


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"CLUSTER": "node1 node2"}, "the partition has 1 nodes of 2: not left out"),
        ({"TREEPO_MAX_EXCLUDED": "0"}, "only 0 are left out"),
    ],
)
def test_no_node_is_left_out_beyond_the_bound(job, tmp_path, extra, words):
    job("fail").communicate(timeout=DEADLINE)
    out, _ = job("fail", SLURM_RESTART_COUNT="1", **extra).communicate(timeout=DEADLINE)
    assert words in out
    assert not (tmp_path / "updated").exists()


def test_a_node_that_the_doctor_finds_unfit_is_left_out_at_once(job, tmp_path):
    # One node of two: the other would be waited for.
    extra = {"GLOO_SOCKET_IFNAME": "nowhere0", "TREEPO_DOCTOR": "quick", "SLURM_JOB_NUM_NODES": "1"}
    out, _ = job("finish", **extra).communicate(timeout=DEADLINE)
    assert "GLOO_SOCKET_IFNAME=nowhere0: no interface nowhere0" in out
    assert "attempt 0 failed on node2: not fit, as the doctor says" in out
    assert (tmp_path / "updated").exists(), out
    assert (tmp_path / "updated").read_text() == "ExcNodeList=node2\n"
    assert not (tmp_path / "launch").exists(), "no weights are read on an unfit node"


def test_a_batch_script_that_died_with_its_node_blames_it(job, tmp_path):
    attempt = run_of(tmp_path) / "slurm/77/attempt-0"
    attempt.mkdir(parents=True)
    (attempt / "hosts").write_text("node1\nnode2\n")
    out, _ = job("finish", SLURM_RESTART_COUNT="1").communicate(timeout=DEADLINE)
    assert "attempt 0 failed on node1: the batch script ended without a word there" in out


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
