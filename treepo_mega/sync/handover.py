"""Handing device memory from trainer to engine and back: an asserted state machine.

    TRAIN -> OFFLOADED -> WEIGHTS_AWAKE -> REFITTED -> ACTOR_FREED -> ROLLOUT -> ASLEEP -> TRAIN

    handover = Handover(backend)
    handover.offload()                # gradients and optimizer state leave the device
    handover.wake_weights()           # the engine gets memory for its weights
    handover.refit(move)              # move() copies the actor's weights into them (or keep_weights())
    handover.free_actor()             # the trainer's own copy of the weights leaves (if `offload` names params)
    handover.wake_kv()                # the rest is the engine's KV cache: sampling may begin
    handover.sleep()                  # the engine gives everything back
    handover.resume()                 # the trainer's state returns

Waking the engine's weights while gradients and optimizer state are there, or its KV cache while the trainer's copy
is, runs out of memory; sampling before a refit runs on stale weights, in silence. So each transition is allowed from
one state only and otherwise raises HandoverError, which names both; a transition whose target is the current state
does nothing. Each is logged with the bytes that it freed and took (`log`).

Saving a checkpoint between two rollouts needs the optimizer state, hence TRAIN, but no weight changes: an engine that
keeps its weights while it sleeps (vLLM's level 1 copies them to the host; on the CPU nothing moves) wakes up with those
of the last refit. `weights_current` says so, and `keep_weights()` then stands for the refit. Level 2 drops them, and
every wake is followed by a refit. The trainer reports every update with `weights_changed()`.

A transition that fails is undone: the engine is put to sleep, whatever the trainer had given away comes back, the state
is TRAIN, and HandoverError tells what happened. If even that fails, the state is BROKEN and every call says so.

Backends do the work. `DeviceMemory` frees real memory: it empties the storages under the trainer's tensors (views of
them stay valid) after copying what must be kept to host memory, pinned on CUDA, and puts the engine to sleep and wakes
it by tag. `Bookkeeping` counts the same bytes and checks the same rules, but leaves memory where it is: on the CPU,
trainer and engine share one memory and there is nothing to gain.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from treepo_mega.errors import TreepoError
from treepo_mega.runtime.device import free_memory_bytes, has_cuda, release_cached_memory

Moved = TypeVar("Moved")
"""What a transfer returns."""

PARTS = ("grads", "optimizer", "params")
"""What the trainer can give away, in the order in which it does."""


class HandoverError(TreepoError):
    """A transition came in a wrong order, or failed; the message names the states and what to do."""


class State(enum.Enum):
    """Who has the memory."""

    TRAIN = "train"
    OFFLOADED = "offloaded"
    WEIGHTS_AWAKE = "weights awake"
    REFITTED = "refitted"
    ACTOR_FREED = "actor freed"
    ROLLOUT = "rollout"
    ASLEEP = "asleep"
    BROKEN = "broken"


ORDER = (
    State.TRAIN,
    State.OFFLOADED,
    State.WEIGHTS_AWAKE,
    State.REFITTED,
    State.ACTOR_FREED,
    State.ROLLOUT,
    State.ASLEEP,
)
VERBS = dict(zip(ORDER, ("resume", "offload", "wake_weights", "refit", "free_actor", "wake_kv", "sleep"), strict=True))


@dataclass(frozen=True, slots=True)
class Transition:
    """One entry of the log. Bytes of device memory, seconds of wall time."""

    source: State
    target: State
    freed: int
    taken: int
    seconds: float


class SleepingEngine(Protocol):
    """What gives device memory away and takes it back (`engine.engine.Engine`)."""

    def sleep(self, level: int) -> None:
        """Give all memory away."""

    def wake_up(self, tags: Sequence[str]) -> None:
        """Take the memory of these tags back."""


class Backend(Protocol):
    """Moves memory. Every method returns bytes of device memory and does nothing when there is nothing to do."""

    def offload(self, part: str) -> int:
        """Take one of PARTS off the device; bytes freed."""

    def restore(self, part: str) -> int:
        """Bring it back; bytes taken."""

    def wake(self, tag: str) -> int:
        """Give the engine memory for "weights" or "kv_cache"; bytes taken."""

    def sleep(self) -> int:
        """Take all memory from the engine; bytes freed."""

    @property
    def keeps_weights(self) -> bool:
        """True when the engine's weights come back from its sleep."""


class Handover:
    """See the module's page. `offload` names the PARTS that leave the device; the rest stays (selective offload)."""

    def __init__(self, backend: Backend, offload: Iterable[str] = PARTS) -> None:
        self.parts = tuple(offload)
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise HandoverError(f"cannot offload {unknown[0]!r}; expected some of {', '.join(PARTS)}")
        self.state = State.TRAIN
        self.log: list[Transition] = []
        """Transitions so far; whoever reads them may clear it."""
        self._backend = backend
        self._why = ""
        self._moved = False  # since the actor's weights last changed

    @contextlib.contextmanager
    def room_for_a_new_engine(self) -> Iterator[None]:
        """In TRAIN: an engine is built in this context, which then sleeps; the trainer's state is away meanwhile.

        vLLM sizes its KV cache once and for all, by the memory that is free while it is built.
        """
        self.require(State.TRAIN)
        try:
            self._give("grads", "optimizer")
            yield
            # The new engine sleeps before the trainer's state returns: the device need not hold both at once.
            self._backend.sleep()
        finally:
            self._take_back()

    def offload(self) -> None:
        """TRAIN -> OFFLOADED."""
        self._go(State.OFFLOADED, lambda: (self._give("grads", "optimizer"), 0))

    def wake_weights(self) -> None:
        """OFFLOADED -> WEIGHTS_AWAKE."""
        self._go(State.WEIGHTS_AWAKE, lambda: (0, self._backend.wake("weights")))

    def refit(self, move: Callable[[], Moved]) -> Moved:
        """WEIGHTS_AWAKE -> REFITTED; returns what `move` returns. From REFITTED it moves again (never skipped)."""
        out: list[Moved] = []

        def work() -> tuple[int, int]:
            out.append(move())
            return 0, 0

        if self.state is State.REFITTED:
            self.state = State.WEIGHTS_AWAKE
        # If `move` fails half way, the engine holds neither the old weights nor the new ones.
        self._moved = False
        self._go(State.REFITTED, work)
        self._moved = True
        return out[0]

    @property
    def weights_current(self) -> bool:
        """True when an engine that wakes up has the actor's weights: `keep_weights` may stand for `refit`."""
        return self._moved and self._backend.keeps_weights

    def weights_changed(self) -> None:
        """The actor's weights are no longer those of the last refit."""
        self._moved = False

    def keep_weights(self) -> None:
        """WEIGHTS_AWAKE -> REFITTED without moving anything. Raises HandoverError unless `weights_current`."""
        if not self.weights_current:
            why = (
                "the actor's weights changed since the last refit"
                if self._backend.keeps_weights
                else ("the engine drops its weights when it sleeps")
            )
            raise HandoverError(f"keep_weights: {why}; call refit")
        self._go(State.REFITTED, lambda: (0, 0))

    def free_actor(self) -> None:
        """REFITTED -> ACTOR_FREED."""
        self._go(State.ACTOR_FREED, lambda: (self._give("params"), 0))

    def wake_kv(self) -> None:
        """ACTOR_FREED -> ROLLOUT."""
        self._go(State.ROLLOUT, lambda: (0, self._backend.wake("kv_cache")))

    def sleep(self) -> None:
        """ROLLOUT -> ASLEEP."""
        self._go(State.ASLEEP, lambda: (self._backend.sleep(), 0))

    def resume(self) -> None:
        """ASLEEP -> TRAIN."""
        self._go(State.TRAIN, lambda: (0, self._take_back()))

    def require(self, *states: State) -> None:
        """Raise HandoverError unless the state is one of these: for code that touches the memory itself."""
        if self.state not in states:
            names = " or ".join(state.name for state in states)
            raise HandoverError(f"this needs the state {names}; it is {self.state.name}{self._why}")

    def _give(self, *parts: str) -> int:
        return sum(self._backend.offload(part) for part in parts if part in self.parts)

    def _take_back(self) -> int:
        return sum(self._backend.restore(part) for part in reversed(PARTS) if part in self.parts)

    def _go(self, target: State, work: Callable[[], tuple[int, int]]) -> None:
        if self.state is target:
            return
        source = ORDER[ORDER.index(target) - 1]
        if self.state is not source:
            if self.state is State.BROKEN:
                raise HandoverError(f"{VERBS[target]}: the hand-over is BROKEN{self._why}; restart from a checkpoint")
            now = ORDER.index(self.state)
            follows = VERBS[ORDER[(now + 1) % len(ORDER)]]
            raise HandoverError(
                f"{VERBS[target]} goes from {source.name} to {target.name}, but the state is {self.state.name}: "
                f"{follows} comes next"
            )
        started = time.perf_counter()
        try:
            freed, taken = work()
        except Exception as e:
            self._recover(VERBS[target], source, e)
        self.state = target
        self.log.append(Transition(source, target, freed, taken, time.perf_counter() - started))

    def _recover(self, verb: str, source: State, error: Exception) -> None:
        """Undo: the engine sleeps, the trainer has everything. Raises HandoverError in any case."""
        try:
            freed = self._backend.sleep()
            taken = self._take_back()
        except Exception as second:
            self.state = State.BROKEN
            self._why = f" ({verb} failed: {error}; taking it back failed: {second})"
            raise HandoverError(f"the hand-over is BROKEN{self._why}; restart from a checkpoint") from error
        self.state = State.TRAIN
        self.log.append(Transition(source, State.TRAIN, freed, taken, 0.0))
        raise HandoverError(
            f"{verb} failed in state {source.name}: {error}. The engine sleeps, the trainer has its state back "
            "(TRAIN): training and saving go on; sampling needs the whole hand-over again"
        ) from error


class Bookkeeping:
    """Counts bytes and checks that nothing is given away or taken twice. `sizes`: part or tag -> bytes."""

    keeps_weights = True
    """Nothing really moves."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.away: set[str] = set()
        self.awake: set[str] = set()

    @property
    def used(self) -> int:
        """Bytes on the device by the books."""
        here = sum(self.sizes.get(part, 0) for part in PARTS if part not in self.away)
        return here + sum(self.sizes.get(tag, 0) for tag in self.awake)

    def offload(self, part: str) -> int:
        """By the books."""
        return self._change(self.away, part, True)

    def restore(self, part: str) -> int:
        """By the books."""
        return self._change(self.away, part, False)

    def wake(self, tag: str) -> int:
        """By the books."""
        return self._change(self.awake, tag, True)

    def sleep(self) -> int:
        """By the books."""
        return sum(self._change(self.awake, tag, False) for tag in list(self.awake))

    def _change(self, group: set[str], name: str, into: bool) -> int:
        if (name in group) == into:
            return 0
        (group.add if into else group.discard)(name)
        return self.sizes.get(name, 0)


class HostBlocks:
    """Host memory for what has left the device: blocks that are taken once and used again by every later offload.

    `pinned` for a CUDA device. The allocator of pinned memory rounds up to a power of two, so bytes are kept in blocks
    of BLOCK and one smaller block: half of a large allocation would else be padding.
    """

    BLOCK = 64 << 20

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = {}
        self.taken = 0
        """Bytes that were ever allocated, as a power-of-two allocator counts them."""

    def keep(self, flat: Tensor) -> list[Tensor]:
        """Copy the bytes `flat` [n] to the host; the blocks that hold them."""
        blocks = []
        for values in flat.split(self.BLOCK):
            size = values.numel()
            free = self._free.get(size)
            blocks.append(free.pop() if free else self._allocate(size))
            blocks[-1].copy_(values)
        return blocks

    def give_back(self, blocks: list[Tensor], flat: Tensor) -> None:
        """Copy what `keep` kept into `flat` [n]; the blocks are free again."""
        for values, block in zip(flat.split(self.BLOCK), blocks, strict=True):
            values.copy_(block)
            self._free.setdefault(block.numel(), []).append(block)

    def _allocate(self, size: int) -> Tensor:
        self.taken += 1 << (size - 1).bit_length()
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)


class DeviceMemory:
    """Frees and takes real memory. `tensors(part)` lists the trainer's tensors; `engine` sleeps and wakes up, or None.

    "grads" come back as zeros; the other parts are kept on the host. `level` is vLLM's sleep level: 1 keeps the
    engine's weights on the host, 2 drops them (vLLM restores the model's buffers itself).
    """

    def __init__(
        self, tensors: Callable[[str], Iterable[Tensor]], engine: SleepingEngine | None = None, level: int = 2
    ) -> None:
        self.engine = engine
        self.host = HostBlocks(pinned=has_cuda())
        self._tensors = tensors
        self._level = level
        self._away: dict[str, list[tuple[torch.UntypedStorage, int, list[Tensor] | None]]] = {}
        # vLLM builds an engine awake: the first `sleep` must not find that there is nothing to do.
        self._awake = {"weights", "kv_cache"}

    @property
    def keeps_weights(self) -> bool:
        """Level 1 copies them to the host; level 2 drops them."""
        return self._level == 1

    def offload(self, part: str) -> int:
        """Empty the storages of a part, keeping a host copy of all but gradients; bytes freed."""
        if part in self._away:
            return 0
        gone = self._away.setdefault(part, [])
        seen: set[int] = set()
        for tensor in self._tensors(part):
            storage = tensor.untyped_storage()
            # Tensors may be views of one storage, which must be emptied once.
            if storage.nbytes() == 0 or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            # The whole storage: the tensor may be a view of a part of it, and the rest would be lost.
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            kept = None if part == "grads" else self.host.keep(flat)
            gone.append((storage, storage.nbytes(), kept))
            # Resized, not replaced: Megatron and the optimizer hold other views, which would keep the old one alive.
            storage.resize_(0)
        # PyTorch's allocator keeps freed memory; a waking engine asks the driver, which would have none of that.
        release_cached_memory()
        return sum(size for _, size, _ in gone)

    def restore(self, part: str) -> int:
        """Fill the storages again; bytes taken."""
        taken = 0
        for storage, size, kept in self._away.pop(part, ()):
            storage.resize_(size)
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            if kept is None:
                flat.zero_()
            else:
                self.host.give_back(kept, flat)
            taken += size
        return taken

    def wake(self, tag: str) -> int:
        """The engine's wake_up for one tag; bytes taken from the device as it counts them."""
        if tag in self._awake or self.engine is None:
            return 0
        release_cached_memory()
        before = free_memory_bytes()
        self.engine.wake_up(tags=[tag])
        self._awake.add(tag)
        return before - free_memory_bytes()

    def sleep(self) -> int:
        """The engine's sleep; bytes freed on the device as it counts them."""
        if not self._awake or self.engine is None:
            return 0
        # vLLM's sleep gives torch's unused blocks back as well. They are not the engine's, and must not count as its.
        release_cached_memory()
        before = free_memory_bytes()
        self.engine.sleep(level=self._level)
        self._awake.clear()
        return free_memory_bytes() - before
