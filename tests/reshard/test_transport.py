"""Transports without other processes: what goes by which, what a round reads, and who is named at a deadline."""

import math
import os
import time
from types import SimpleNamespace

import pytest
import torch

from treepo_mega.reshard.plan import Cluster, Copy, Parcel, RankRound
from treepo_mega.reshard.transport import p2p, pairs, shared_memory
from treepo_mega.reshard.transport.base import TransportError
from treepo_mega.reshard.transport.shared_memory import SharedMemoryTransport


def parcel(source, targets, offset, size):
    box = ((0, size),)
    return Parcel(source, targets, offset, (Copy("weight", box, box, 0, "weight", box, 0, 1),))


@pytest.fixture
def two_ranks(monkeypatch):
    """Ranks 0 and 1 of a node in this process: each maps the segments of both."""
    segments = []

    def gather(value):
        if value is not None:
            segments.append(value)
        return [*segments, segments[-1]][:2]

    monkeypatch.setattr(shared_memory.dist, "gather_objects", gather)
    options = {"rounds": 3, "slot_elements": 8, "dtype": torch.float32, "timeout_s": 0.05}
    first = SharedMemoryTransport(rank=0, peers=[], **options)
    second = SharedMemoryTransport(rank=1, peers=[0], **options)
    first._peers = {1: shared_memory._Segment.of_peer(*segments[1])}
    return first, second


def test_a_parcel_is_read_where_its_source_packed_it(two_ranks):
    source, receiver = two_ranks
    sent = parcel(0, (1,), 2, 4)
    for call in range(2):  # counters go on: the second call does not see the rounds of the first as its own
        for number in range(3):
            source.wait_sent(number - 2)
            source.send_buffers[number % 2, 2:6] = torch.arange(4.0) + 10 * number + 100 * call
            receiver.submit_recv(number, sent)
            with pytest.raises(TransportError, match=f"rank 1 waited 0 s for rank 0 to publish .* round {number} of 3"):
                next(receiver.received(number))
            receiver.submit_recv(number, sent)
            source.submit_send(number, sent, 1)
            source.run(number)
            ((got, values),) = receiver.received(number)
            assert got is sent
            assert values.tolist() == [10 * number + 100 * call + i for i in range(4)]
            assert values.data_ptr() != source.send_buffers.data_ptr(), "another mapping of the same memory"
            receiver.release(number)
        for number in (1, 2):
            source.wait_sent(number)
        source.end()
        receiver.end()


def test_a_transport_that_is_gone_leaves_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    transport = SharedMemoryTransport(rank=0, peers=[0], rounds=1, slot_elements=4, dtype=torch.float32, timeout_s=1)
    assert len(os.listdir("/proc/self/fd")) > before
    del transport
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_buffer_is_not_used_again_before_it_was_read(two_ranks):
    source, receiver = two_ranks
    sent = parcel(0, (1,), 0, 8)
    source.submit_send(0, sent, 1)
    source.run(0)
    with pytest.raises(TransportError, match="rank 0 waited 0 s for rank 1 to take its parcels of round 0 of 3"):
        source.wait_sent(0)
    receiver.release(0)
    source.submit_send(0, sent, 1)
    source.wait_sent(0)


def test_each_pair_of_ranks_has_its_transport(monkeypatch):
    """Rank 1 of nodes of two: rank 0 is near, rank 2 is far, and one parcel goes to both."""
    log = []

    class Recorder:
        def __init__(self, name, *_, **options):
            self.name, self.options, self.buffer_bytes = name, options, 7
            self.send_buffers = torch.empty(2, options.get("slot_elements", 0))

        def submit_send(self, number, _, target):
            log.append((self.name, "send", number, target))

        def submit_recv(self, number, wanted):
            log.append((self.name, "recv", number, wanted.source))

        def run(self, number):
            log.append((self.name, "run", number))

    monkeypatch.setattr(pairs, "SharedMemoryTransport", lambda **options: Recorder("shared", **options))
    monkeypatch.setattr(pairs, "PointToPointTransport", lambda *args, **_: Recorder("messages", inbox=args[1]))
    mine, near, far = parcel(1, (0, 2), 0, 5), parcel(0, (1,), 0, 3), parcel(2, (1,), 0, 4)
    rounds = [RankRound((), (mine,), (near, far))]
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "timeout_s": 1}
    for shared, expected in [(None, ["shared", "messages"]), (False, ["messages", "messages"])]:
        log.clear()
        transport = pairs.TransportByPair(rounds, 1, Cluster(4, 2), **options, shared_memory=shared)
        for wanted in (near, far):
            transport.submit_recv(0, wanted)
        for target in mine.targets:
            transport.submit_send(0, mine, target)
        transport.run(0)
        verbs = [("recv", 0, 0), ("recv", 0, 2), ("send", 0, 0), ("send", 0, 2)]
        assert log[:4] == [(name, *verb) for name, verb in zip(expected * 2, verbs, strict=True)]
        assert log[4:] == [(name, "run", 0) for name in dict.fromkeys(expected)]
        assert transport._messages.options["inbox"] == (4 if shared is None else 7)
        assert transport.buffer_bytes == 2 * 5 * 4 + 7
    assert transport._shared is None


class Work:
    """A message on a stream: `wait` returns at once, and the device is through with it after `polls` looks."""

    def __init__(self, polls: float) -> None:
        self.polls = polls

    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        self.polls -= 1
        return self.polls < 0


def messages_on_a_stream(monkeypatch, polls_of_rounds, timeout_s):
    """Rank 1 sent a parcel to ranks 0 and 2 in each round, over a stand-in for NCCL, and waited for the rounds."""
    rounds = iter(polls_of_rounds)
    monkeypatch.setattr(p2p.torch_dist, "P2POp", lambda kind, values, peer: SimpleNamespace(peer=peer))
    monkeypatch.setattr(p2p.torch_dist, "batch_isend_irecv", lambda operations: [Work(next(rounds))])
    buffers = torch.empty(2, 8, device="meta")
    transport = p2p.PointToPointTransport(buffers, 0, rank=1, timeout_s=timeout_s)
    for number in range(len(polls_of_rounds)):
        for target in (2, 0):
            transport.submit_send(number, parcel(1, (0, 2), 0, 4), target)
        transport.run(number)
        transport.wait_sent(number)
    return transport


def test_a_round_that_is_not_through_is_named_before_the_watchdog_would_end_the_process(monkeypatch):
    transport = messages_on_a_stream(monkeypatch, [0, math.inf, 0], timeout_s=0.05)
    started = time.monotonic()
    with pytest.raises(TransportError, match="rank 1 waited 0 s for the messages of round 1, with rank 0, rank 2"):
        transport.end()
    assert time.monotonic() - started < 5


def test_the_end_waits_for_what_the_device_still_does(monkeypatch):
    transport = messages_on_a_stream(monkeypatch, [3, 5], timeout_s=60)
    transport.end()
    assert transport._on_streams == []
    transport.end()


def test_rounds_that_are_through_are_forgotten(monkeypatch):
    transport = messages_on_a_stream(monkeypatch, [0] * 50, timeout_s=60)
    assert transport._on_streams == []
