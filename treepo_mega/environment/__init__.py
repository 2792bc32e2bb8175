"""Environments: what a policy acts upon between two turns, in worker processes that may be killed.

    with EnvironmentPool("calculator", EnvironmentLimits()) as pool:
        state = pool.open({"question": "2 + 3"}, seed=1)
        ticket = pool.act(state, [ToolCall("calculate", {"expression": "2 + 3"})], seed=2)
        replies = pool.wait()                      # {ticket: Reply(text="5")}
        other = pool.branch(state)                 # the same history, from here on a life of its own

`contract.py` says what a class of people's own must be, `pool.py` what a lost or hung tool means.
"""

from treepo_mega.environment.contract import EnvironmentClassError, Manifest
from treepo_mega.environment.pool import EnvironmentPool
from treepo_mega.environment.state import EnvironmentLimits, Reply, State, ToolCall

__all__ = [
    "EnvironmentClassError",
    "EnvironmentLimits",
    "EnvironmentPool",
    "Manifest",
    "Reply",
    "State",
    "ToolCall",
]
