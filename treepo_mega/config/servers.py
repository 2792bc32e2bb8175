"""The rules of reward servers: their names, who asks them, and their credentials."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from treepo_mega.errors import nearest
from treepo_mega.text.server_name import server_of

if TYPE_CHECKING:
    from treepo_mega.config import Config


def check_servers(cfg: Config) -> list[str]:
    """Broken rules as sentences; see `rules.py`."""
    servers = cfg.reward.servers
    names = [server.name for server in servers]
    bad = [f"reward.servers: {name!r} names several servers" for name, count in Counter(names).items() if count > 1]
    asked = set()
    for key, verifier in _verifiers(cfg).items():
        name = server_of(verifier)
        if name is None:
            continue
        asked.add(name)
        if name not in names:
            known = f"; it names: {', '.join(names)}" if names else ", which is empty"
            bad.append(f"{key} {verifier!r}: no server of that name in reward.servers{nearest(name, names) or known}")
    for index, server in enumerate(servers):
        if server.name not in asked:
            bad.append(
                f"reward.servers.{index}: nothing asks it; set data.verifier or a function of reward.functions to "
                f"http:{server.name}, or leave the server out"
            )
    return bad


def missing_tokens(cfg: Config) -> list[str]:
    """A sentence for each server whose credentials are not in this machine's environment."""
    return [
        f"reward.servers.{index}.token_env: the environment variable {server.token_env} is not set, or is empty"
        for index, server in enumerate(cfg.reward.servers)
        if server.token_env is not None and not os.environ.get(server.token_env)
    ]


def _verifiers(cfg: Config) -> dict[str, str]:
    """Key to the verifier that it names."""
    found = {"data.verifier": cfg.data.verifier}
    for part, sources in (("train", cfg.data.train), ("eval", cfg.data.eval)):
        found |= {f"data.{part}.{index}.verifier": each.verifier or "" for index, each in enumerate(sources)}
    parts = enumerate(cfg.reward.functions)
    return found | {f"reward.functions.{index}.verifier": each.verifier or "" for index, each in parts}
