"""What a trace carries along."""

from pydantic import BaseModel


class State(BaseModel):
    """Nothing."""


def state_cls(kind: type) -> type[State]:
    """The state of a kind of task."""
    return State
