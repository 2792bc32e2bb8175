"""Who holds the device memory: the two calls by which the loop hands it over.

    memory = Memory(handover, weights, engine)
    metrics = memory.to_engine()         # the engine may sample, with the actor's weights
    memory.to_trainer()                  # the trainer may compute, update and save

Both are collective over all ranks, and both do nothing when the memory is already there. `to_engine` moves new weights
only if an update has changed them since the last transfer, or if the engine's sleep dropped them. The state machine
below (`handover.py`) refuses every wrong order.
"""

from __future__ import annotations

from typing import Protocol

from treepo_mega.sync.handover import Handover, State, Transition
from treepo_mega.sync.refit import Refit


class CachingEngine(Protocol):
    """What this module needs of the engine."""

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values."""


class Memory:
    """Hands the device memory to the engine and back. `weights` moves the actor's weights into the engine."""

    def __init__(self, handover: Handover, weights: Refit, engine: CachingEngine) -> None:
        self.handover = handover
        self.weights = weights
        self.engine = engine

    def to_engine(self) -> dict[str, float]:
        """The engine wakes up with the actor's weights; the `reshard/` metrics, empty if nothing was moved.

        Raises HandoverError when a transition fails, RefitError when the engine computes with other weights.
        """
        if self.handover.state is State.ROLLOUT:
            return {}
        if not self.handover.weights_current:
            return self._refit()
        self._wake_with_kept_weights()
        return {}

    def to_trainer(self) -> None:
        """The engine sleeps; gradients and optimizer state return. Raises HandoverError when that fails."""
        if self.handover.state is State.ROLLOUT:
            self.handover.sleep()
            self.handover.resume()
        self.handover.require(State.TRAIN)

    def weights_changed(self) -> None:
        """An update begins: the engine's weights are no longer the actor's. Raises HandoverError unless TRAIN."""
        # An awake engine would go on sampling with the old weights, in silence.
        self.handover.require(State.TRAIN)
        self.handover.weights_changed()

    def _refit(self) -> dict[str, float]:
        handover = self.handover
        # Of the steps before, of which nobody asks any more: it would grow as long as the run goes on.
        handover.log.clear()
        # Gradients and optimizer state leave before the engine's weights wake: together they would run out of memory.
        handover.offload()
        handover.wake_weights()
        metrics = handover.refit(self.weights.transfer)
        # The trainer's weights leave before the KV cache wakes, which may need their memory.
        handover.free_actor()
        handover.wake_kv()
        moved = list(handover.log)
        # The canary scores on both sides, so it needs the KV cache that has just been woken.
        return metrics | self.weights.canary() | _bytes_of(moved)

    def _wake_with_kept_weights(self) -> None:
        handover = self.handover
        handover.offload()
        handover.wake_weights()
        handover.keep_weights()
        handover.free_actor()
        handover.wake_kv()
        # Keys and values did not survive the sleep, and a resumed run begins without any.
        self.engine.reset_prefix_cache()


def _bytes_of(transitions: list[Transition]) -> dict[str, float]:
    """Bytes of device memory that these transitions freed and took."""
    return {
        "reshard/handover_freed_bytes": float(sum(each.freed for each in transitions)),
        "reshard/handover_taken_bytes": float(sum(each.taken for each in transitions)),
    }
