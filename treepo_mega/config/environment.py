"""Environments: what answers a turn of the policy, and how far that may go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from treepo_mega.config.section import Section


class EnvironmentConfig(Section):
    """Turns and tools, where `data.environment` names an environment. Tools run in worker processes of each rank."""

    max_turns: int = Field(8, ge=1)
    """Turns that the environment answers; the one after them ends the trajectory."""
    max_observation_len: int = Field(1024, ge=1)
    """Tokens of all observations of a trajectory, with what the chat template writes around them. One that would make
    them more ends it. The engine's window is data.max_prompt_len + rollout.max_response_len + this."""
    tool_parser: str = "hermes"
    """How tool calls are written: a name of vLLM's tool parsers, such as hermes, llama3_json or qwen3_coder."""
    history: Literal["refuse", "keep", "fork"] = "refuse"
    """A chat template that rewrites earlier turns (drops their reasoning, say). refuse: the run does not start. fork:
    what follows sees the rewritten history, as behind a server with that template; turns are trained as they were
    sampled. keep: trajectories go on from what was sampled, which such a server would not show."""
    on_error: Literal["observe", "lose"] = "observe"
    """What a tool that hangs, dies or fills the memory means. observe: an observation that says so. lose: the
    trajectory has no reward and leaves its tree."""
    num_workers: int = Field(2, ge=1)
    """Processes per rank that tools run in."""
    timeout_s: float = Field(10.0, gt=0)
    """Deadline of one call, of reset and of get_reward."""
    startup_timeout_s: float = Field(60.0, gt=0)
    """Deadline of a worker that starts and imports the class."""
    memory_mb: int = Field(2048, ge=64)
    """Address space of a worker, and of each process that it starts, MiB."""
    max_states: int = Field(4096, ge=1)
    """States that are alive at once, per rank. Others are rebuilt from their calls when they are needed."""
    max_processes: int = Field(64, ge=0)
    """Processes that a tool may leave behind. A worker that has more is ended with all of them."""
    max_observation_chars: int = Field(8192, ge=16)
    """Longer answers of a tool are cut in the middle."""
    network: bool = False
    """Let tools open network connections."""
    writes_anywhere: bool = False
    """Let tools write outside the worker's own temporary directory."""
