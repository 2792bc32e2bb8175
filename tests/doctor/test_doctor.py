"""What the doctor says of a node and of a cluster: each fault is named with its host and what to do."""

from __future__ import annotations

import resource
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from treepo_mega import cli
from treepo_mega.config import load_config
from treepo_mega.doctor import meeting, node
from treepo_mega.doctor.finding import State, table
from treepo_mega.modelspec.spec import ModelSpec

GIB = 1 << 30


def failed(findings):
    return [each for each in findings if each.state is State.FAIL]


class Cards:
    """NVML with `used` bytes on each card; `apart`: pairs that do not reach each other."""

    NVML_P2P_CAPS_INDEX_READ = pynvml.NVML_P2P_CAPS_INDEX_READ
    NVML_P2P_STATUS_OK = pynvml.NVML_P2P_STATUS_OK
    NVMLError = pynvml.NVMLError

    def __init__(self, used, apart=(), driver="575.57"):
        self.used = used
        self.apart = apart
        self.driver = driver

    def nvmlInit(self):
        if self.driver is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlDeviceGetCount(self):
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, card):
        return "H100"

    def nvmlDeviceGetMemoryInfo(self, card):
        return SimpleNamespace(used=self.used[card])

    def nvmlDeviceGetP2PStatus(self, first, second, what):
        return pynvml.NVML_P2P_STATUS_NOT_SUPPORTED if (first, second) in self.apart else pynvml.NVML_P2P_STATUS_OK


def test_the_stand_in_has_only_names_of_the_library():
    assert all(hasattr(pynvml, name) for name in vars(Cards) if name.startswith(("nvml", "NVML")))


def test_cards_that_are_there_and_free_are_fine():
    (found,) = node.check_cards(2, Cards([0, GIB]), None)
    assert (found.state, found.found) == (State.OK, "2 x H100, driver 575.57")
    assert node.check_cards(0, None, None) == []


@pytest.mark.parametrize(
    ("cards", "visible", "words"),
    [
        (None, None, "nvidia-ml-py is missing"),
        (Cards([0] * 8, driver=None), None, "8 asked for, but no driver"),
        (Cards([0] * 8), "0,1", "8 asked for, 2 visible (CUDA_VISIBLE_DEVICES=0,1)"),
        (Cards([0] * 7 + [70 * GIB]), None, "card 7 has 70.0 GiB in use before the run"),
    ],
)
def test_cards_that_are_missing_or_taken_fail(cards, visible, words):
    (found,) = failed(node.check_cards(8, cards, visible))
    assert words in found.found and found.remedy


def test_cards_that_do_not_reach_each_other_are_named():
    found = node.check_cards(2, Cards([0, 0], apart=[(0, 1)]), None)[-1]
    assert found.state is State.WARN
    assert "cards 0-1 do not read each other's memory" in found.found


def test_limits(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024))
    disk = SimpleNamespace(free=32 << 20)
    monkeypatch.setattr(node.shutil, "disk_usage", lambda place: disk)
    files, locked, shm = node.check_limits(8, 8)
    assert files.state is State.FAIL and "1024 a process, expected 4096" in files.found
    assert locked.state is State.WARN
    assert shm.state is State.FAIL and "2.0 GiB" in shm.remedy
    disk.free = 3 * GIB
    assert node.check_limits(8, 0)[-1].state is State.OK
    assert node.check_limits(16, 0)[-1].state is State.WARN


def test_pins_are_those_of_the_project(monkeypatch):
    wanted = ['nothing-such==1.0; extra == "cpu"', "numpy<1", 'vllm==0; extra == "gpu"', "pydantic>=2.12"]
    monkeypatch.setattr(node.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(node, "check_environment", lambda try_imports: [])
    words = [each.found for each in node.check_packages()]
    assert words[0] == "nothing-such is missing, expected nothing-such==1.0"
    assert words[1].startswith("numpy ") and words[1].endswith(", expected <1")
    assert len(words) == 2


def test_torch_decides_about_the_triton_that_it_brings(monkeypatch):
    asked = {"treepo-mega": ['pydantic==1.0; extra == "cpu"'], "torch": []}
    monkeypatch.setattr(node.metadata, "requires", asked.get)
    monkeypatch.setattr(node, "check_environment", lambda try_imports: [])
    monkeypatch.setattr(node, "_version", lambda name: None if name == "vllm" else "2.0")
    assert [each.found for each in node.check_packages()] == ["pydantic 2.0, expected ==1.0"]
    asked["torch"] = ['pydantic==2.0; python_version >= "3"', "pydantic==9; python_version < '3'"]
    assert [each.state for each in node.check_packages()] == [State.OK]


def test_a_disk_that_takes_no_file_and_a_small_one(tmp_path, monkeypatch):
    spec = ModelSpec.from_hf("examples/tiny_reasoner")
    cfg = load_config("examples/tiny_cpu.yaml", [f"logging.run_dir={tmp_path / 'run'}"])
    assert not failed(node.check_disks(cfg, spec))
    assert list(tmp_path.iterdir()) == [], "probes are taken away"
    # Root may write anywhere but into a file system that has no files.
    found = failed(node.check_disks(cfg.replace({"checkpoint.save": "/proc/run"}), spec))[0]
    assert found.found.startswith("/proc: ") and "logging.run_dir" in found.remedy
    monkeypatch.setattr(node, "check_space", lambda cfg, spec, beside: ["the run needs 3 TiB"])
    assert [each.found for each in failed(node.check_disks(cfg, spec))] == ["the run needs 3 TiB"]


def test_a_port_that_is_taken_and_an_interface_that_is_not_there():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (found,) = node.check_network(port, {})
        assert found.state is State.FAIL and found.found.startswith(f"{port}: Address already in use")
    assert node.check_network(port, {})[0].state is State.OK
    (found,) = node.check_network(None, {"NCCL_SOCKET_IFNAME": "^docker,loo"})
    assert found.state is State.OK
    (found,) = node.check_network(None, {"NCCL_SOCKET_IFNAME": "=loo"})
    assert found.state is State.FAIL
    assert "no interface loo (did you mean 'lo'?)" in found.found


def gather(directory: Path, hosts: list[str], nodes: int, timeout_s: float = 20.0, **expected) -> dict:
    """What each host finds; addresses of the loopback range are host names that every machine resolves."""
    found: dict = {}
    threads = [
        threading.Thread(
            target=lambda host=host: found.update({host: meeting.meet(directory, host, nodes, timeout_s, **expected)})
        )
        for host in hosts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_nodes_meet_and_reach_each_other(tmp_path):
    found = gather(tmp_path / "meet", ["127.0.0.1", "127.0.0.2", "127.0.0.3"], 3)
    assert len(found) == 3
    for findings in found.values():
        assert [each.check for each in findings] == ["nodes", "reach"]
        assert not failed(findings)
        assert findings[1].found == "connections to all others (2)"


def test_an_absent_node_is_named(tmp_path):
    (finding,) = gather(tmp_path, ["127.0.0.1"], 2, 0.2, expected=["127.0.0.1", "node2"])["127.0.0.1"]
    assert finding.state is State.FAIL
    assert finding.found.startswith("node2 did not come to ") and "(1 of 2 did)" in finding.found


def test_a_node_that_cannot_be_reached_and_one_that_is_another(tmp_path):
    with socket.create_server(("127.0.0.9", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"someone else"))
        thread.start()
        (found,) = meeting._reach("127.0.0.1", {"127.0.0.9": {"port": port, "word": "right"}})
        thread.join(10)
    assert "another process answers as 127.0.0.9" in found.found
    (found,) = meeting._reach("127.0.0.1", {"127.0.0.9": {"port": port, "word": "right"}})
    assert found.state is State.FAIL and f"127.0.0.1 cannot reach 127.0.0.9 port {port}" in found.found


def test_a_directory_that_is_not_shared_or_not_one(tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = meeting.meet(tmp_path / "file" / "meet", "127.0.0.1", 2, 0.1)
    assert found.state is State.FAIL and "logging.run_dir" in found.remedy


def test_the_command_ends_with_1_and_names_what_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    arguments = ["doctor", "examples/tiny_cpu.yaml", f"logging.run_dir={tmp_path}", "--ranks", "2"]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "GLOO_SOCKET_IFNAME=nowhere0: no interface nowhere0" in out
    assert "checks failed" in out
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert cli.main(arguments) == 0
    assert "takes files" in capsys.readouterr().out


def test_other_nodes_than_the_first_show_only_what_is_not_fine(tmp_path):
    findings = node.check_network(None, {})
    assert table("node2", findings, all_of_them=False) == []
    assert len(table("node1", findings)) == 1
