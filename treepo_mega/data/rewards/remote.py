"""A reward server asked over HTTP, in the event loop of a grader process (`flights.py`).

    server = RemoteServer(settings)                  # a RewardServer of the configuration, as JSON
    replies = await server.call(requests)            # one for each; never raises

POST, JSON: `{"items": [{"prompt", "data_source", "solution_str", "ground_truth", "extra_info"}]}`. The reply is
`{"scores": [...]}` with one entry an item: a finite number, an object with "score" and further numbers, or an object
with "error", a text that says why there is none. docs/guides/remote-rewards.md is the page for people.

What comes back is not trusted: its size is bounded, redirects are not followed (they would carry the token elsewhere),
nothing is unpacked, and each entry is checked. A message shows the URL without its query, and never the token.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from treepo_mega.data.rewards.cache import Answer
from treepo_mega.data.rewards.returned import MAX_TEXT, interpret, reason_of
from treepo_mega.data.rewards.verifiers import VerifierError

FIELDS = ("prompt", "data_source", "solution_str", "ground_truth", "extra_info")
"""What the server is told of an answer. All of it is in the key of the cache."""

TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
BODY_BYTES = 1 << 16
"""Most bytes of a reply, and as many again for each answer."""

MAX_WAIT_S = 60.0
"""Longest wait between two tries."""


class NoAnswer(Exception):
    """A try that failed and may be made again; `wait_s`: what the server asks to wait."""

    def __init__(self, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class BadAnswer(Exception):
    """A reply that another try would not mend."""


class RemoteServer:
    """See the module docstring. Made inside a running event loop. Raises VerifierError without its token."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.url: str = settings["url"]
        parts = urlsplit(self.url)
        # A query may hold a key.
        shown = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
        self.title = f"reward server {settings['name']!r} ({shown})"
        self._secrets = [text for text in (parts.query, self._token()) if text]
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=settings["in_flight"]),
            cookie_jar=aiohttp.DummyCookieJar(),
            # A small reply could unpack to any size.
            auto_decompress=False,
        )
        # When to try again changes no result; seeded all the same, so that a run can be repeated.
        self._jitter = random.Random(settings["name"])

    def key(self, request: dict[str, Any]) -> str:
        """What the score of a request is remembered by: all that the server would be told, and where."""
        text = json.dumps([self.url, *(request.get(name) for name in FIELDS)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    async def call(self, batch: list[dict[str, Any]]) -> list[Answer]:
        """A reply for each request; the first says in `cost` what all of them took."""
        body = json.dumps({"items": [{name: each.get(name) for name in FIELDS} for each in batch]}).encode()
        until = min(each["until"] for each in batch)
        tries = 0
        problem = "its turn did not come"
        while True:
            left = until - time.monotonic()
            if left <= 0:
                problem += f"; its deadline_s {self.settings['deadline_s']:g} has passed"
                break
            tries += 1
            try:
                answers = self._scores(await self._post(body, left, len(batch)), len(batch))
            except NoAnswer as error:
                problem = str(error)
                if tries > self.settings["retries"]:
                    break
                await asyncio.sleep(min(self._pause(tries, error.wait_s), max(0.0, until - time.monotonic())))
            except BadAnswer as error:
                answers = [self._lost(str(error), returned="reply")] * len(batch)
                return self._with_cost(answers, tries)
            else:
                return self._with_cost(answers, tries)
        plural = "try" if tries == 1 else "tries"
        return self._with_cost([self._lost(f"{problem} ({tries} {plural})")] * len(batch), tries)

    async def _post(self, body: bytes, left: float, count: int) -> bytes:
        """The body of a reply with status 200. Raises NoAnswer or BadAnswer."""
        seconds = min(self.settings["timeout_s"], left)
        limit = BODY_BYTES * (1 + count)
        try:
            async with self._session.post(
                self.url, data=body, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=seconds)
            ) as response:
                received = bytearray()
                async for chunk in response.content.iter_chunked(1 << 16):
                    received += chunk
                    if len(received) > limit:
                        raise BadAnswer(f"its reply is longer than {limit} bytes")
                if response.status == HTTPStatus.OK:
                    return bytes(received)
                said = f"answered {response.status} {_phrase(response.status)}".rstrip()
                said += f": {bytes(received[:200]).decode('utf-8', 'replace')!r}" if received else ""
                if response.status in TRY_AGAIN:
                    raise NoAnswer(said, _seconds(response.headers.get("Retry-After")))
                raise BadAnswer(said)
        except TimeoutError:
            raise NoAnswer(f"no answer within {seconds:.3g} s") from None
        except aiohttp.ClientPayloadError:
            raise NoAnswer("closed the connection amid its reply") from None
        except aiohttp.ServerDisconnectedError:
            raise NoAnswer("closed the connection without a reply") from None
        except (aiohttp.ClientError, OSError) as error:
            raise NoAnswer(f"{type(error).__name__}: {str(error)[:MAX_TEXT]}") from None

    def _scores(self, body: bytes, count: int) -> list[Answer]:
        """The entries of a reply, each checked by itself. Raises BadAnswer for a reply of another form."""
        expected = f'expected {{"scores": [...]}} with {count} {"entry" if count == 1 else "entries"}'
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            raise BadAnswer(f"its reply is no JSON: {bytes(body[:80])!r}; {expected}") from None
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list):
            raise BadAnswer(f"its reply holds no list 'scores': {bytes(body[:80])!r}; {expected}")
        if len(scores) != count:
            raise BadAnswer(f"its reply holds {len(scores)} scores; {expected}")
        return [self._entry(index, entry) for index, entry in enumerate(scores)]

    def _entry(self, index: int, entry: Any) -> Answer:
        if isinstance(entry, dict) and "score" not in entry and isinstance(entry.get("error"), str):
            return self._lost(f"says: {entry['error'][:MAX_TEXT]}")
        score = entry.get("score") if isinstance(entry, dict) else entry
        if isinstance(score, bool) or not isinstance(score, int | float):
            what = f"scores[{index}] is {_shown(entry)}; expected a finite number, or an object with 'score' or 'error'"
            return self._lost(what, returned=type(entry).__name__)
        try:
            return interpret(entry)
        except (TypeError, ValueError, OverflowError) as error:
            what = str(error).replace("the verifier returned", "it is").replace("the verifier's", "its")
            return self._lost(f"scores[{index}]: {what}", returned=type(entry).__name__)

    def _lost(self, problem: str, **more: str) -> Answer:
        text = f"{self.title}: {problem}"
        for secret in self._secrets:
            # A server may send back what it was sent.
            text = text.replace(secret, "***")
        return {"error": text, **more}

    def _with_cost(self, answers: list[Answer], tries: int) -> list[Answer]:
        cost = {"remote_calls": tries, "remote_retries": max(0, tries - 1)}
        return [{**answers[0], "cost": cost}, *answers[1:]]

    def _pause(self, tries: int, asked: float) -> float:
        # At most doubled so often: 2 ** 2000 is no float.
        doubled = self.settings["backoff_s"] * 2.0 ** min(tries - 1, 20)
        return min(max(asked, doubled * self._jitter.uniform(0.5, 1.0)), MAX_WAIT_S)

    def _token(self) -> str:
        name = self.settings["token_env"]
        if name is None:
            return ""
        token = os.environ.get(name, "").strip()
        if not token or not token.isprintable() or not token.isascii():
            problem = "is not set, or is empty" if not token else "holds what no header can carry"
            raise VerifierError(f"{self.title}: the environment variable {name} (token_env) {problem}")
        return token


def failed(error: BaseException) -> Answer:
    """The reply for a call that raised what it should not."""
    return {"error": reason_of(error)}


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds; 0 for none, and for a date."""
    return min(float(text), MAX_WAIT_S) if text and text.isdecimal() and len(text) < 9 else 0.0


def _shown(entry: Any) -> str:
    return json.dumps(entry)[:60]
