"""The memory hand-over: only one order, nothing lost, and a usable trainer after any failure."""

import itertools

import pytest
import torch

import treepo_mega.sync.handover as handover_module
from treepo_mega.sync.handover import (
    ORDER,
    PARTS,
    Bookkeeping,
    DeviceMemory,
    Handover,
    HandoverError,
    HostBlocks,
    State,
)

SIZES = {"grads": 4, "optimizer": 12, "params": 2, "weights": 2, "kv_cache": 14}
STEPS = ["offload", "wake_weights", "refit", "free_actor", "wake_kv", "sleep", "resume"]


def call(handover: Handover, step: str) -> object:
    return handover.refit(lambda: "moved") if step == "refit" else getattr(handover, step)()


def test_a_round_never_holds_more_than_the_device_and_ends_where_it_began():
    books = Bookkeeping(SIZES)
    handover = Handover(books)
    for _ in range(2):
        peak = 0
        for step in STEPS:
            assert call(handover, step) == ("moved" if step == "refit" else None)
            peak = max(peak, books.used)
        assert handover.state is State.TRAIN and books.used == 18
        assert peak == 18, "the engine never gets memory before the trainer has given as much away"
    freed, taken = sum(t.freed for t in handover.log), sum(t.taken for t in handover.log)
    assert freed == taken == 2 * (4 + 12 + 2 + 2 + 14)
    assert [t.target for t in handover.log[:7]] == [*ORDER[1:], State.TRAIN]


@pytest.mark.parametrize("done", range(7))
def test_any_other_order_raises_and_changes_nothing(done):
    for step in STEPS:
        books = Bookkeeping(SIZES)
        handover = Handover(books)
        for s in STEPS[:done]:
            call(handover, s)
        before, used = handover.state, books.used
        if step == STEPS[done]:
            call(handover, step)
        elif done and step == STEPS[done - 1] and step != "refit":
            call(handover, step)
            assert (handover.state, books.used) == (before, used), "once more is no change"
        elif step == "resume" and done == 0:
            call(handover, step)
            assert handover.state is State.TRAIN
        elif not (step == "refit" and done == 3):
            with pytest.raises(
                HandoverError, match=f"{step} goes from .* but the state is {before.name}: {STEPS[done]}"
            ):
                call(handover, step)
            assert (handover.state, books.used) == (before, used)


def test_refitting_again_really_moves_again():
    handover, moves = Handover(Bookkeeping(SIZES)), []
    handover.offload()
    handover.wake_weights()
    for n in range(3):
        assert handover.refit(lambda n=n: moves.append(n) or n) == n
    assert moves == [0, 1, 2] and handover.state is State.REFITTED


def test_weights_stay_in_an_engine_that_keeps_them_until_they_change():
    books = Bookkeeping(SIZES)
    handover = Handover(books)
    handover.offload()
    handover.wake_weights()
    with pytest.raises(HandoverError, match="keep_weights: the actor's weights changed since the last refit; call"):
        handover.keep_weights()
    for step in STEPS[2:]:
        call(handover, step)
    assert handover.weights_current
    with pytest.raises(HandoverError, match="the state is TRAIN: offload comes next"):
        handover.keep_weights()
    for step in ["offload", "wake_weights", "keep_weights", *STEPS[3:]]:
        call(handover, step)
    assert handover.state is State.TRAIN and books.used == 18 and handover.weights_current
    handover.weights_changed()
    assert not handover.weights_current
    for step in STEPS[:2]:
        call(handover, step)
    with pytest.raises(HandoverError, match="half way"):
        handover.refit(half_way)
    assert not handover.weights_current, "what a failed refit leaves is not the actor's"


def half_way():
    raise MemoryError("half way")


def test_an_engine_that_drops_its_weights_must_be_refitted():
    memory = DeviceMemory({part: [] for part in PARTS}.__getitem__, Engine(), level=2)
    memory.sleep()
    handover = Handover(memory)
    for step in STEPS:
        call(handover, step)
    assert not handover.weights_current
    handover.offload()
    handover.wake_weights()
    with pytest.raises(HandoverError, match="keep_weights: the engine drops its weights when it sleeps; call refit"):
        handover.keep_weights()


@pytest.mark.parametrize("parts", [[], ["optimizer"], ["grads", "optimizer"], list(PARTS)])
def test_selective_offload(parts):
    books = Bookkeeping(SIZES)
    handover = Handover(books, offload=parts)
    for step in STEPS[:5]:
        call(handover, step)
    assert books.away == set(parts)
    for step in STEPS[5:]:
        call(handover, step)
    assert books.used == 18
    with pytest.raises(HandoverError, match="'weights'; expected some of grads, optimizer, params"):
        Handover(books, offload=["weights"])


@pytest.mark.parametrize("failing", STEPS[:-1])
def test_a_failed_transition_leaves_a_usable_trainer(failing):
    books = Bookkeeping(SIZES)
    handover = Handover(books)

    def fail(*_):
        raise MemoryError("no room")

    method = {"offload": "offload", "wake_weights": "wake", "free_actor": "offload", "wake_kv": "wake"}.get(failing)
    for step in STEPS[: STEPS.index(failing)]:
        call(handover, step)
    if method:
        setattr(books, method, fail)
    if failing == "sleep":
        once = itertools.count()
        sleep = books.sleep
        books.sleep = lambda: fail() if next(once) == 0 else sleep()
    with pytest.raises(
        HandoverError, match=f"{failing} failed in state .*: no room.*usable|{failing} failed .*no room"
    ):
        handover.refit(fail) if failing == "refit" else call(handover, failing)
    assert handover.state is State.TRAIN and books.used == 18 and not books.awake
    if method:
        delattr(books, method)
    for step in STEPS:
        call(handover, step)
    assert handover.state is State.TRAIN


def test_when_nothing_can_be_taken_back_every_call_says_so():
    books = Bookkeeping(SIZES)
    handover = Handover(books)
    handover.offload()

    def fail(*_):
        raise MemoryError("no room")

    books.wake = books.restore = fail
    with pytest.raises(HandoverError, match=r"BROKEN \(wake_weights failed: no room; taking it back failed: no room\)"):
        handover.wake_weights()
    with pytest.raises(HandoverError, match="offload: the hand-over is BROKEN"):
        handover.offload()
    with pytest.raises(HandoverError, match="needs the state TRAIN; it is BROKEN"):
        handover.require(State.TRAIN)


class Engine:
    """vLLM's surface for sleeping, as a list of calls."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags):
        self.calls.append(("wake_up", *tags))


def test_storages_are_really_emptied_and_views_come_back_with_their_values():
    buffer = torch.arange(12, dtype=torch.float32)
    views = [buffer[:4].view(2, 2), buffer[4:]]
    parts = {"grads": [torch.ones(5)], "optimizer": [torch.full((3,), 7.0)], "params": [buffer, *views]}
    engine = Engine()
    memory = DeviceMemory(parts.__getitem__, engine)
    memory.sleep()
    handover = Handover(memory)
    for step in STEPS[:5]:
        call(handover, step)
    assert [t.untyped_storage().nbytes() for ts in parts.values() for t in ts] == [0] * 5
    assert [(t.freed, t.taken) for t in handover.log] == [(20 + 12, 0), (0, 0), (0, 0), (48, 0), (0, 0)]
    for step in STEPS[5:]:
        call(handover, step)
    assert torch.equal(buffer, torch.arange(12.0)) and torch.equal(views[1], buffer[4:])
    assert torch.equal(views[0], torch.arange(4.0).view(2, 2))
    assert torch.equal(parts["optimizer"][0], torch.full((3,), 7.0))
    assert torch.equal(parts["grads"][0], torch.zeros(5)), "gradients are not worth a copy"
    assert engine.calls == [("sleep", 2), ("wake_up", "weights"), ("wake_up", "kv_cache"), ("sleep", 2)]


def test_host_memory_is_taken_once_and_in_blocks_that_are_not_padded(monkeypatch):
    """Three rounds of three storages, one of which is larger than a block: by count, and no copy is another's."""
    monkeypatch.setattr(HostBlocks, "BLOCK", 1 << 10)
    size = 5 * (1 << 10) + 64
    parts = {"grads": [torch.ones(9)], "optimizer": [torch.randn(size // 4), torch.randn(7)], "params": [torch.ones(3)]}
    before = [t.clone() for t in parts["optimizer"]]
    memory = DeviceMemory(parts.__getitem__)
    for _ in range(3):
        for part in PARTS:
            memory.offload(part)
        assert not any(t.untyped_storage().nbytes() for tensors in parts.values() for t in tensors)
        for part in reversed(PARTS):
            memory.restore(part)
    assert all(torch.equal(now, then) for now, then in zip(parts["optimizer"], before, strict=True))
    assert memory.host.taken == 5 * (1 << 10) + 64 + 32 + 16, "a single block of 5,184 bytes would take 8,192"


def test_the_engine_is_built_while_the_trainers_state_is_away_and_then_sleeps():
    parts = {"grads": [torch.ones(5)], "optimizer": [torch.full((3,), 7.0)], "params": [torch.ones(2)]}
    memory = DeviceMemory(parts.__getitem__)
    handover = Handover(memory, offload=("grads", "optimizer"))
    with handover.room_for_a_new_engine():
        here = [sum(t.untyped_storage().nbytes() for t in parts[part]) for part in PARTS]
        memory.engine = engine = Engine()
    assert here == [0, 0, 8], "what is free now is what vLLM sizes its KV cache by"
    assert engine.calls == [("sleep", 2)] and handover.state is State.TRAIN
    assert torch.equal(parts["optimizer"][0], torch.full((3,), 7.0))
    handover.offload()
    handover.wake_weights()
    assert engine.calls[1:] == [("wake_up", "weights")], "from here on as after any other sleep"
    with pytest.raises(HandoverError, match="needs the state TRAIN"), handover.room_for_a_new_engine():
        pass


def test_the_bytes_of_sleep_and_wake_are_the_engines_alone(monkeypatch):
    """A device of 100 bytes: the engine holds 40, torch keeps 25 that nobody uses, and vLLM's calls free those too."""
    held = {"weights": 10, "kv_cache": 30}
    device = {"engine": 40, "unused": 25}

    def release() -> None:
        device["unused"] = 0

    class Sleeper:
        def sleep(self, level: int) -> None:
            release()
            device["engine"] = 0

        def wake_up(self, tags: list[str]) -> None:
            release()
            device["engine"] += sum(held[tag] for tag in tags)

    monkeypatch.setattr(handover_module, "free_memory_bytes", lambda: 100 - sum(device.values()))
    monkeypatch.setattr(handover_module, "release_cached_memory", release)
    memory = DeviceMemory(lambda part: [], Sleeper())
    assert memory.sleep() == 40
    for tag, nbytes in held.items():
        device["unused"] = 25
        assert memory.wake(tag) == nbytes


def test_an_engine_that_cannot_be_built_leaves_the_trainer_its_state():
    parts = {"grads": [torch.ones(5)], "optimizer": [torch.full((3,), 7.0)], "params": []}
    handover = Handover(DeviceMemory(parts.__getitem__))
    with pytest.raises(ValueError, match="no room"), handover.room_for_a_new_engine():
        raise ValueError("no room")
    assert torch.equal(parts["optimizer"][0], torch.full((3,), 7.0)) and handover.state is State.TRAIN
