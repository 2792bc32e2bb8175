"""Tasksets as people write them for `verifiers` V1; run with that package, or with the stand-in beside this file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import verifiers.v1 as vf


class SumData(vf.TaskData):
    total: int


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def right(self, trace: Any) -> float:
        return float(trace.last_reply.endswith(str(self.data.total)))

    @vf.reward(weight=0.5)
    async def short(self, trace: Any) -> float:
        return float(len(trace.last_reply) < 10)

    @vf.metric
    async def letters(self, trace: Any) -> float:
        return len(trace.last_reply)


class SumsConfig(vf.TasksetConfig):
    most: int = 3


class Sums(vf.Taskset[SumTask, SumsConfig]):
    def load(self) -> Iterable[SumTask]:
        for number in range(self.config.most):
            data = SumData(prompt=f"{number} + 1 =", system_prompt="Only the number.", total=number + 1)
            yield SumTask(data, self.config.task)


class FileTask(vf.Task[SumData]):
    @vf.reward(weight=1.0)
    async def written(self, trace: Any, runtime: Any) -> float:
        return 1.0

    async def setup(self, trace: Any, runtime: Any) -> None:
        """Write a file."""


class Files(vf.Taskset[FileTask, vf.TasksetConfig]):
    def load(self) -> Iterable[FileTask]:
        yield FileTask(SumData(prompt="Write a file.", total=0), self.config.task)


class Endless(Sums):
    INFINITE = True
