"""The doctor's all-reduce: real ranks over gloo; which node the figures name; a rank that fails or hangs."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import pytest

from treepo_mega.doctor import exchange, reduce
from treepo_mega.doctor.finding import Finding, State


def test_two_nodes_sum_and_exchange(tmp_path):
    hosts = ["127.0.0.1", "127.0.0.2"]
    found: dict[str, list[Finding]] = {}

    def one(host: str) -> None:
        found[host] = reduce.check_all_reduce(tmp_path, host, hosts, 0, 120.0, bytes_each=1 << 16)

    threads = [threading.Thread(target=one, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(280)
    for host in hosts:
        words = [each.found for each in found[host]]
        assert [each.state for each in found[host]] == [State.OK, State.OK], words
        assert words[0].startswith("2 ranks: the sum is right, ")
        assert words[1].startswith("neighbours exchange ")


@pytest.mark.gpu
def test_all_cards_of_this_node_sum_over_nccl(tmp_path):
    torch = pytest.importorskip("torch")
    cards = torch.cuda.device_count()
    if cards < 2:
        pytest.skip("one card has nobody to sum with")
    (finding,) = reduce.check_all_reduce(tmp_path, "here", ["here"], cards, 120.0)
    assert finding.state is State.OK and finding.found.startswith(f"{cards} ranks: the sum is right")


def test_a_node_alone_has_nothing_to_sum(tmp_path):
    assert reduce.check_all_reduce(tmp_path, "here", ["here"], 0, 1.0) == []


@pytest.mark.parametrize("nodes", range(2, 9))
def test_every_neighbour_is_met_once_and_no_node_twice_in_a_round(nodes):
    plan = exchange.rounds(nodes)
    pairs = [tuple(sorted(pair)) for each in plan for pair in each]
    ring = {tuple(sorted((node, (node + 1) % nodes))) for node in range(nodes)}
    assert sorted(pairs) == sorted(ring)
    for each in plan:
        busy = [node for pair in each for node in pair]
        assert len(busy) == len(set(busy))


def ring(rates: list[float], **change: Any) -> dict[str, dict[str, Any]]:
    """What nodes in a ring write; `rates[i]` is that between node i and the next."""
    count = len(rates)
    return {
        f"node{i}": {
            **{"wrong": 0, "seconds": 0.1, "bytes": 10**8, "world": count, **change.get(f"node{i}", {})},
            "rates": {f"node{(i - 1) % count}": rates[i - 1], f"node{(i + 1) % count}": rates[i]},
        }
        for i in range(count)
    }


def test_a_slow_node_is_named_and_its_neighbours_are_not():
    (summed, slow) = reduce.judge("node0", ring([1.0, 1.1, 0.2, 0.2, 0.9]))
    assert summed.state is State.OK and "5 ranks: the sum is right, 1.60 GB/s" in summed.found
    assert slow.state is State.FAIL and slow.found.startswith("node3 exchanges 0.20 GB/s") and slow.remedy


def test_one_slow_cable_between_two_good_nodes_names_neither():
    (_, links) = reduce.judge("node0", ring([1.0, 1.0, 0.2, 1.0, 1.0]))
    assert links.state is State.OK and links.found == "neighbours exchange 0.20 to 1.00 GB/s"


def test_a_wrong_sum_names_its_node():
    (finding,) = reduce.judge("node0", ring([1.0] * 4, node2={"wrong": 7}))
    assert finding.state is State.FAIL and "sums are wrong on node2 (7 elements on node2)" in finding.found


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo joining the other ranks; echo no route to host; exit 1", "failed while joining the other ranks: no rou"),
        ("echo summing over 4 ranks; exec sleep 60", "was still summing over 4 ranks after"),
    ],
)
def test_a_rank_that_fails_or_hangs_says_where(tmp_path, monkeypatch, script, words):
    log = tmp_path / "0"
    with log.open("wb") as out:
        child = subprocess.Popen(["sh", "-c", script], stdout=out, stderr=out)
    try:
        # Its own patience is for imports, which this child has none of.
        about, problem = reduce._watch([child], [log], -58.0)
    finally:
        child.kill()
        child.wait()
    assert about is None and words in problem


def test_a_node_that_writes_no_figures_is_named(tmp_path, monkeypatch):
    about = ring([1.0, 1.0])["node0"]
    monkeypatch.setattr(reduce, "_run", lambda *_: (about, ""))
    (finding,) = reduce.check_all_reduce(tmp_path, "node0", ["node0", "node1"], 0, 0.1)
    assert finding.state is State.FAIL and finding.found == "no figures came from node1"
    assert (tmp_path / "node0.reduce").is_file(), "the others hear of this one"
