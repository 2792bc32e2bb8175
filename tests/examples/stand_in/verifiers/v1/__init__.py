"""Tasks, tasksets and traces, as far as scoring one answer goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskConfig(_Config):
    pass


class TasksetConfig(_Config):
    id: str = ""
    task: TaskConfig = TaskConfig()


class AgentConfig(_Config):
    pass


class AgentInfo(BaseModel):
    config: AgentConfig


class SystemMessage(BaseModel):
    role: Literal["system"] = "system"
    content: str


class UserMessage(BaseModel):
    role: Literal["user"] = "user"
    content: str


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = None


class MessageNode(BaseModel):
    parent: int | None = None
    message: SystemMessage | UserMessage | AssistantMessage
    sampled: bool = False


class TaskData(BaseModel):
    model_config = ConfigDict(frozen=True)

    idx: int | None = None
    prompt: str | list[SystemMessage | UserMessage | AssistantMessage] | None = None
    system_prompt: str | None = None


class TraceTask(BaseModel):
    type: str
    data: Any
    key: str | None = None
    hash: str | None = None


class Reward(BaseModel):
    score: float
    weight: float = 1.0


class Trace(BaseModel):
    task: TraceTask
    agent: AgentInfo
    state: Any
    nodes: list[MessageNode] = Field(default_factory=list)
    rewards: dict[str, Reward | None] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    is_completed: bool = False
    ok: bool = False

    @property
    def reward(self) -> float:
        return sum(reward.score * reward.weight for reward in self.rewards.values() if reward is not None)

    @property
    def last_reply(self) -> str:
        said = [node.message.content for node in self.nodes if node.sampled]
        return (said[-1] or "").strip() if said else ""


def reward(weight: float = 1.0) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        function.reward = True
        function._vf_weight = weight
        return function

    return mark


def metric(function: Any) -> Any:
    function.metric = True
    return function


DataT = TypeVar("DataT")
StateT = TypeVar("StateT")
TaskT = TypeVar("TaskT")
ConfigT = TypeVar("ConfigT")


class Task(Generic[DataT]):
    NEEDS_CONTAINER: ClassVar[bool] = False

    def __init__(self, data: Any, config: TaskConfig | None = None) -> None:
        self.data = data
        self.config = config or TaskConfig()

    @property
    def hash(self) -> str:
        data = self.data.model_dump(mode="json", exclude_none=True)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @property
    def key(self) -> str:
        return self.hash

    async def setup(self, trace: Any, runtime: Any) -> None: ...

    async def finalize(self, trace: Any, runtime: Any) -> None: ...

    def plugged_judges(self) -> list[Any]:
        return []

    def hooks(self, kind: str) -> list[Any]:
        found = [getattr(self, name) for name in dir(type(self)) if getattr(getattr(type(self), name), kind, False)]
        return sorted(found, key=lambda each: each.__name__)

    async def score(self, trace: Any, runtime: Any = None) -> None:
        for each in self.hooks("metric"):
            trace.metrics[each.__name__] = float(await each(trace=trace))
        for each in self.hooks("reward"):
            trace.rewards[each.__name__] = Reward(score=float(await each(trace=trace)), weight=each._vf_weight)

    @classmethod
    def data_type(cls) -> type[TaskData]:
        from verifiers.v1.utils.generic import concrete_type

        return concrete_type(cls, TaskData) or TaskData

    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return []


class Taskset(Generic[TaskT, ConfigT]):
    INFINITE = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def bounded(self) -> bool:
        return not self.INFINITE

    def __iter__(self) -> Iterator[Any]:
        for idx, task in enumerate(self.load()):
            yield type(task)(task.data.model_copy(update={"idx": idx}), task.config)

    def load(self) -> Any:
        raise NotImplementedError

    @classmethod
    def task_type(cls) -> type[Task]:
        from verifiers.v1.utils.generic import concrete_type

        return concrete_type(cls, Task, origin=Taskset) or Task

    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return []
