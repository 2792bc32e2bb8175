"""Names of the shared memory in which the CPU engine's tensor-parallel ranks exchange tensors.

    with private_segments():
        llm = LLM(...)            # collective over all ranks

vLLM 0.32 names its segments by the launcher's address, which is the same for every run on a machine, and creates
them exclusively. Two runs at once would meet, and what a run leaves behind would end the next one with "errno: 17".
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

SHARED_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def private_segments() -> Iterator[None]:
    """Give the segments of engines built inside names of their own, and take the names away afterwards.

    Collective over all ranks of torch.distributed: they agree on a token.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    token: list[Any] = [secrets.token_hex(8) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(token, src=0)
    make_group_name = _CPUSHMDistributed.make_group_name
    made: list[str] = []

    def own_name(communicator: Any) -> str:
        made.append(f"treepo-{token[0]}{make_group_name(communicator).replace('/', '')}")
        return made[-1]

    _CPUSHMDistributed.make_group_name = staticmethod(own_name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)  # type: ignore[method-assign]
        # Every rank of a group maps its segments before vLLM leaves their creation. Mapped memory outlives its name,
        # so a run that is killed later leaves nothing.
        for name in made:
            # vLLM 0.32 puts the ranks of a group in brackets, which a glob would read as a set of characters.
            for segment in SHARED_MEMORY.glob(f"*{name.translate({ord('['): '?', ord(']'): '?'})}_*"):
                segment.unlink(missing_ok=True)
