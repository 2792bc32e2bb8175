"""The grader process of rewards that wait (`flights.py`), as `pool.py` drives it: many calls at a time, in any order.

What hangs or dies is charged to the call that the process names, else to all that had begun. They are then tried one by
one, so that in the end the guilty alone are lost.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from treepo_mega.data.rewards.grader import Grader, GraderFailed

if TYPE_CHECKING:
    from treepo_mega.config import RewardConfig

logger = logging.getLogger(__name__)

QUEUE = 8
"""Requests that the process holds, for each call that it may have in flight: it must not run dry between two looks."""

GRACE_S = 5.0
"""How much longer than reward.timeout_s the process may be silent: it names a call that blocks it by itself."""


class FlightGrader(Grader):
    """One process for all rewards of a kind."""

    module = "flights"

    def __init__(self, cfg: RewardConfig, kind: Literal["async", "http"]) -> None:
        # The tokens of reward servers are for the process that asks them.
        hidden = () if kind == "http" else tuple(server.token_env for server in cfg.servers if server.token_env)
        super().__init__(cfg, hidden)
        self.flying: dict[int, str] = {}
        """Ticket to verifier of what it has not answered yet."""
        self.begun: set[int] = set()
        self._alone = False
        servers = [server.model_dump() for server in cfg.servers] if kind == "http" else []
        of_servers = [server.in_flight * server.batch_size for server in cfg.servers]
        self._room = QUEUE * max([cfg.in_flight] if kind == "async" else of_servers)
        settings = {"timeout_s": cfg.timeout_s, "in_flight": cfg.in_flight, "servers": servers}
        self.unsent = memoryview(json.dumps({"settings": settings}).encode() + b"\n")
        self.write()

    @property
    def busy(self) -> bool:
        """Whether it owes answers."""
        return bool(self.flying)

    @property
    def gathers(self) -> bool:
        """Its replies are not worth waiting for together."""
        return False

    def room(self, *, suspect: bool) -> int:
        """Requests that it takes now; a suspect is tried alone."""
        if suspect or self._alone:
            return 0 if self.flying else 1
        return max(0, self._room - len(self.flying))

    def give(self, batch: Sequence[tuple[int, str]], message: bytes, *, suspect: bool = False) -> None:
        """Hand it more requests."""
        # Not with every batch: a process that hangs must not live on what it is given.
        news = {name for _, name in batch} - self.imported - set(self.flying.values())
        renew = news or not self.flying
        self._alone = suspect
        self.flying.update(batch)
        if renew:
            self._renew()
        self.unsent = memoryview(bytes(self.unsent) + message)
        self.write()

    def _start_item(self) -> None:
        """Its clock is renewed by signs of life alone."""

    def _renew(self) -> None:
        if all(name in self.imported for name in self.flying.values()):
            self._start_clock("grading, without a sign of life,", self.cfg.timeout_s + GRACE_S)
        else:
            self._start_clock("starting up (importing its verifier)", self.cfg.startup_timeout_s)

    def read(self) -> list[tuple[int, dict[str, Any]]]:
        """(ticket, final reply) of all that has come. Raises GraderFailed on nonsense, or on death when none came."""
        *lines, self.unread = (self.unread + self._received()).split(b"\n")
        finished: list[tuple[int, dict[str, Any]]] = []
        for line in lines:
            try:
                reply = json.loads(line)
                self._take(reply, finished)
            except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
                if finished:  # these are good; the next read meets the nonsense again
                    self.unread = line + b"\n" + self.unread
                    break
                raise GraderFailed(f"the grader sent something that is no reply: {line[:80]!r}") from None
            if reply.get("retire") or "load_error" in reply:
                break
        self._renew()
        return finished

    def _take(self, reply: dict[str, Any], finished: list[tuple[int, dict[str, Any]]]) -> None:
        if "note" in reply:
            logger.warning("%s", reply["note"])
        elif "alive" in reply or "ready" in reply:
            return
        elif "loaded" in reply:
            self.imported.add(self.flying[reply["id"]])
        elif "begun" in reply:
            self.begun.add(reply["id"])
        else:
            # Before the reply is looked at: what is not in flight is nonsense.
            self.flying.pop(reply["id"])
            self.begun.discard(reply["id"])
            finished.append((reply["id"], reply))

    def suspects(self, guilty: int | None) -> tuple[list[int], list[int]]:
        """(tickets that may have ended it, the others that it had)."""
        others = [ticket for ticket in self.flying if ticket != guilty]
        if guilty is not None:
            return [guilty], others
        begun = [ticket for ticket in others if ticket in self.begun]
        waits_for = [ticket for ticket in others if self.flying[ticket] not in self.imported]
        charged = begun or (waits_for or others)[:1]
        return charged, [ticket for ticket in others if ticket not in set(charged)]
