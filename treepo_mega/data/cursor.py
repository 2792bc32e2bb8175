"""Endless epochs over prompts, in an order that depends on (seed, epoch) alone, resumable at any point.

    cursor = PromptCursor(prompts, seed=cfg.train.seed, shuffle=cfg.data.shuffle)
    batch = cursor.take(16)

Without weights every prompt comes once an epoch. With weights (`data.train.<i>.weight`) an epoch has as many draws as
there are prompts, dealt to the sources by their weights (largest remainders); a source whose prompts are used up begins
anew, in another order. Its passes are counted by themselves, so that the prompts of a large source all come in turn.

Ids. From the second pass over its source on, a prompt's id ends in `@<pass>`, so that no two trees of a run share an
id, and with it a seed, even where two passes meet in one batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from treepo_mega.data.prompts import Prompt, PromptSet
from treepo_mega.data.rows import PromptError
from treepo_mega.runtime.seeding import derive_seed

MAX_TEXTS = 100_000
"""Distinct prompts whose tokens are held as text at once, while the fingerprint is made."""


class PromptCursor:
    """Hands out prompts. The position is (epoch, index), whatever the world size.

    Every rank holds the same cursor, takes the global batch and keeps its share.
    """

    def __init__(self, prompts: PromptSet | Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts = list(prompts)
        if not self._prompts:
            raise PromptError("PromptCursor: no prompts")
        self._seed = seed
        self._shuffle = shuffle
        self._weights = list(prompts.weights) if isinstance(prompts, PromptSet) else []
        if self._weights and sum(count for count, _ in self._weights) != len(self._prompts):
            raise PromptError("PromptCursor: the weights are of other prompts than these")
        self._epoch = 0
        self._index = 0
        self._order: list[int] = []
        self._turns: list[int] = []
        self._begin_epoch()
        self.fingerprint = self._make_fingerprint()

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts. From the second pass on their ids end in `@<pass>`: ids never repeat in a run."""
        out = []
        for _ in range(n):
            if self._index == len(self._order):
                self._epoch += 1
                self._index = 0
                self._begin_epoch()
            prompt = self._prompts[self._order[self._index]]
            turn = self._turns[self._index] if self._turns else self._epoch
            out.append(replace(prompt, id=f"{prompt.id}@{turn}") if turn else prompt)
            self._index += 1
        return out

    def lookahead(self) -> PromptCursor:
        """A cursor that stands where this one does and moves alone."""
        # Its lists are replaced by new epochs and never changed, so both may hold the same.
        return copy.copy(self)

    def state_dict(self) -> dict[str, Any]:
        """`{"epoch", "index", "fingerprint"}`, JSON-safe."""
        return {"epoch": self._epoch, "index": self._index, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any], *, source: str = "the checkpoint") -> None:
        """Go on where `state`, of checkpoint `source`, was taken.

        Raises PromptError when the data or its order is no longer the same.
        """
        if state["fingerprint"] != self.fingerprint:
            raise PromptError(
                f"cannot resume: the prompts changed since the checkpoint (it had {_explain(state['fingerprint'])}; "
                f"now {_explain(self.fingerprint)}). Restore data.*, train.seed, data.shuffle and the tokenizer, or "
                f"begin a new run from its weights with model.load={source} checkpoint.load=null and another "
                "logging.run_dir"
            )
        self._epoch = int(state["epoch"])
        self._index = int(state["index"])
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        """Set the prompt of every draw of the epoch and, with weights, the pass over its source."""
        if self._weights:
            self._begin_weighted()
            return
        self._order = list(range(len(self._prompts)))
        if self._shuffle:
            # A generator of its own: the global one depends on what else the process drew, which differs between ranks.
            random.Random(derive_seed(self._seed, "prompts", self._epoch)).shuffle(self._order)

    def _begin_weighted(self) -> None:
        shares = deal(len(self._prompts), [weight for _, weight in self._weights])
        # Without shuffling the sources take turns evenly: each draw goes to the source that is furthest behind.
        keyed = [((k + 0.5) / share, i) for i, share in enumerate(shares) for k in range(share)]
        slots = [i for _, i in sorted(keyed)]
        if self._shuffle:
            random.Random(derive_seed(self._seed, "prompts", self._epoch)).shuffle(slots)
        # Computed, not carried over from the last epoch: a resumed run begins in the middle and has no history.
        drawn = [self._epoch * share for share in shares]
        first = [0]
        for count, _ in self._weights:
            first.append(first[-1] + count)
        passes: dict[tuple[int, int], list[int]] = {}
        self._order = []
        self._turns = []
        for source in slots:
            turn, position = divmod(drawn[source], self._weights[source][0])
            if (source, turn) not in passes:
                passes[source, turn] = self._pass(source, turn)
            self._order.append(first[source] + passes[source, turn][position])
            self._turns.append(turn)
            drawn[source] += 1

    def _pass(self, source: int, turn: int) -> list[int]:
        """The order of a source's prompts, from 0, in its pass `turn`."""
        order = list(range(self._weights[source][0]))
        if self._shuffle:
            random.Random(derive_seed(self._seed, "prompts", source, turn)).shuffle(order)
        return order

    def _make_fingerprint(self) -> str:
        """`<n>:<order>:<hash>`: the number of prompts, the rule of their order, and what they say."""
        # Not `hash`, which Python salts anew in every process.
        h = hashlib.blake2b(digest_size=8)
        # Repeated prompts share one list of tokens: its text, the longest part by far, is written once.
        texts: dict[int, str] = {}
        for p in self._prompts:
            tokens = texts.get(id(p.tokens))
            if tokens is None:
                if len(texts) >= MAX_TEXTS:
                    texts.clear()
                tokens = texts[id(p.tokens)] = json.dumps(p.tokens)
            # As json.dumps of the list [id, tokens, answer, verifier], which checkpoints hold a hash of.
            h.update(f"[{json.dumps(p.id)}, {tokens}, {json.dumps(p.answer)}, {json.dumps(p.verifier)}]".encode())
        if self._weights:
            h.update(json.dumps(self._weights).encode())
        rule = f"seed {self._seed}" if self._shuffle else "unshuffled"
        return f"{len(self._prompts)}:{rule}:{h.hexdigest()}"


def deal(draws: int, weights: Sequence[float]) -> list[int]:
    """`draws` in shares by `weights`, by largest remainders; every weight gets at least one draw if there are enough.

    >>> deal(10, [3, 1])
    [8, 2]
    """
    total = sum(weights)
    exact = [draws * weight / total for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: draws - sum(shares)]:
        shares[i] += 1
    for i, share in enumerate(shares):
        if not share and draws >= len(weights):
            shares[i] = 1
            shares[shares.index(max(shares))] -= 1
    return shares


def _explain(fingerprint: str) -> str:
    n, rule, digest = fingerprint.split(":")
    return f"{n} prompts, {rule}, contents {digest}"
