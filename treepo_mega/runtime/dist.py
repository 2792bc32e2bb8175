"""Processes and groups: torchrun (or a plain python, one rank) to Megatron's parallel state, and back.

Every wait here has a deadline. `monitored_barrier` and gloo's own time-out name the ranks that did not come.
`gather_objects` moves our own plain Python objects between our own ranks (JSON and arrays, not pickle).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel

from treepo_mega.config import Config, ConfigError, check
from treepo_mega.errors import RankLost as RankLost
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime.cpu_megatron import require_retargeted
from treepo_mega.runtime.device import backend, bind, device, has_cuda
from treepo_mega.runtime.files import atomic_directory
from treepo_mega.runtime.layer_modules import automatic_impl
from treepo_mega.runtime.packed import PackedError, pack, unpack
from treepo_mega.runtime.pulse import pulse
from treepo_mega.runtime.seeding import derive_seed

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class RanksDisagree(TreepoError):
    """What every rank computes for itself came out differently; the message names it."""


def _default_environment() -> None:
    """A plain `python` run is a torchrun of one rank, on a free port of the loopback interface."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def world_size_from_env() -> int:
    """Ranks of this launch (torchrun's WORLD_SIZE), 1 when started with plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(cfg: Config, spec: ModelSpec | None = None) -> list[str]:
    """Start torch.distributed and Megatron's parallel state; returns the notes of `config.check`.

    `spec`: the model, whose sizes must fit the layout. Collective over all ranks. Raises ConfigError when the world
    size or the model does not fit, and torch.distributed's time-out error after `distributed.timeout_s` when ranks are
    missing. Raises EarlyMegatron when Megatron was imported before treepo_mega on a machine without a GPU.
    """
    require_retargeted()
    notes = check(cfg, world_size_from_env(), spec)
    _default_environment()
    # Before the group: NCCL takes the current device, which is GPU 0 on every rank until then.
    bind()
    timeout = timedelta(seconds=cfg.distributed.timeout_s)
    if not dist.is_initialized():
        dist.init_process_group(backend(), timeout=timeout)
    _connect_all()
    # Made here: inside the first barrier, making it would wait without that barrier's deadline and list of ranks.
    cpu_group()
    parallel = cfg.parallel
    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_size,
            # Whole minutes, as Megatron takes them; `_set_deadlines` makes them exact.
            distributed_timeout_minutes=max(1, round(cfg.distributed.timeout_s / 60)),
        )
        _set_deadlines(timeout)
    seed_everything(cfg.train.seed)
    return notes + choose_layers(cfg)


def _set_deadlines(timeout: timedelta) -> None:
    """Every group that Megatron has made ends its waits at `timeout`."""
    # The deadline of a whole minute where the key says 20 s: ranks in the model's own collectives would hear of a lost
    # one later than those in ours, and after those that hang were ended.
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def choose_layers(cfg: Config) -> list[str]:
    """Put what `model.transformer_impl=auto` stands for here into `cfg`; returns the note that says so, else nothing.

    Collective over all ranks when the key is auto. Raises ConfigError when ranks would build different layers.
    """
    if cfg.model.transformer_impl != "auto":
        return []
    impl, reason = automatic_impl()
    of_ranks = gather_objects(impl)
    if len(set(of_ranks)) > 1:
        named = ", ".join(f"rank {rank} {of_rank}" for rank, of_rank in enumerate(of_ranks))
        raise ConfigError(f"model.transformer_impl=auto differs between ranks: {named}. Set it to local")
    cfg.model.transformer_impl = impl
    return [f"model.transformer_impl=auto takes {impl}: {reason}"]


def seed_everything(seed: int, step: int = 0) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel generators (the latter differ by TP rank)."""
    # NumPy takes 32 bits and torch's CPU generator a signed 64: 31 bits suit all.
    value = derive_seed("global", seed, step) % 2**31
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value)


def _connect_all() -> None:
    """The first collective of the default group on this rank's device. Collective over all ranks."""
    # NCCL builds a group's communicator in its first call, for which it waits for every rank. A refit's point-to-point
    # batches leave out a rank that neither sends nor receives: as the first call they would wait for it until the
    # deadline.
    dist.all_reduce(torch.zeros(1, device=device()))


@functools.cache
def cpu_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks (None: the default one is), made collectively by `initialize`."""
    return dist.new_group(backend="gloo") if has_cuda() else None


def rank() -> int:
    """This process's global rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """Processes on each node (torchrun's LOCAL_WORLD_SIZE); all of them when the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """True on the one rank that writes logs and files."""
    return rank() == 0


def store() -> dist.Store:
    """The launcher's key-value store, under a prefix of our own: counters and short messages between ranks, on the CPU.

    One process alone gets a store in memory.
    """
    if world_size() == 1:
        return _local_store()
    return dist.PrefixStore("treepo_mega", dist.distributed_c10d._get_default_store())


@functools.cache
def _local_store() -> dist.Store:
    return dist.HashStore()


_waited = [0.0]


def seconds_waited() -> float:
    """What this process has spent in this module's collectives and barriers so far: waits for other ranks, mostly."""
    return _waited[0]


def _waiting(collective: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`collective`, whose seconds `seconds_waited` counts."""

    @functools.wraps(collective)
    def counted(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        began = time.perf_counter()
        try:
            with pulse().waiting(str(args[0]) if collective.__name__ == "barrier" else collective.__name__):
                return collective(*args, **kwargs)
        finally:
            _waited[0] += time.perf_counter() - began

    return counted


@functools.cache
def _barriers() -> itertools.count[int]:
    """Numbers the barriers of this process: every rank passes the same ones in the same order."""
    return itertools.count()


@_waiting
def barrier(what: str, timeout_s: float) -> None:
    """Wait for all ranks on the CPU; after `timeout_s` seconds RankLost names `what` and the missing ranks.

    A rank that died is noticed at once; the error then names those that had not arrived.
    """
    if world_size() == 1:
        return
    key = f"barrier/{next(_barriers())}"
    # A lost store: the barrier itself will say what is wrong.
    with contextlib.suppress(RuntimeError):
        store().set(f"{key}/{rank()}", "here")
    try:
        # On gloo, also beside a GPU: torch has no monitored barrier for NCCL.
        dist.monitored_barrier(cpu_group(), timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as e:
        raise RankLost(
            f"rank {rank()} waited for all ranks to finish {what} (deadline {timeout_s:.0f} s); missing: "
            f"{_missing(key)}. A missing rank died or is stuck; its own output says why. ({e})"
        ) from e
    with contextlib.suppress(RuntimeError):
        store().delete_key(f"{key}/{rank()}")


def _missing(key: str) -> str:
    try:
        absent = [other for other in range(world_size()) if not store().check([f"{key}/{other}"])]
    except RuntimeError:
        return "not known, the launcher's store is gone as well"
    return ", ".join(f"rank {other}" for other in absent) or "none any more (they were late)"


def shared_directory(target: str | Path, timeout_s: float, *, replace: bool = False) -> AbstractContextManager[Path]:
    """`files.atomic_directory` that all ranks fill together, on a file system that all of them see.

    The block, its beginning and its end are collective over all ranks; a wait ends after `timeout_s` with RankLost.
    """
    return atomic_directory(target, replace=replace, leads=is_main(), meet=lambda what: barrier(what, timeout_s))


PADDED_BYTES = 1 << 16
"""Values up to this many bytes travel padded to the longest of them."""


@_waiting
def gather_objects(value: Any) -> list[Any]:
    """Every rank's JSON-able `value`, in rank order, on every rank. Collective over all ranks (CPU tensors).

    An all_gather of sizes; one of all values up to PADDED_BYTES, padded to the longest of them; then each rank with
    more broadcasts its own. A rank receives about what was said, however many ranks have nothing to say. Long lists of
    numbers travel as arrays (`packed.py`). Raises PackedError when a value arrived damaged.
    """
    data = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)
    if world_size() == 1:
        # Packed on one rank too: tuples become lists and keys text, as they do on several.
        return [_unpacked(data, 0)]
    lengths = sizes_of_ranks(data.numel())
    longest = max((length for length in lengths if length <= PADDED_BYTES), default=0)
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    if longest:
        padded = torch.zeros(longest, dtype=torch.uint8)
        if data.numel() <= longest:
            padded[: data.numel()] = data
        dist.all_gather(parts, padded)
    told = []
    for speaker, length in enumerate(lengths):
        part = parts[speaker][:length]
        if length > PADDED_BYTES:
            part = data if speaker == rank() else torch.empty(length, dtype=torch.uint8)
            dist.broadcast(part, src=speaker)
        # Unpacked here: the next speaker's bytes then take the place of this one's.
        told.append(_unpacked(part, speaker))
    return told


def sizes_of_ranks(size: int) -> list[int]:
    """`size` of every rank, in rank order: 8 bytes a rank. Collective over all ranks (CPU tensors)."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([size]))
    return [int(told) for told in sizes]


BROADCASTS = 16
"""Broadcasts of `tell_all` that run at once."""


def tell_all(value: Any = None) -> dict[int, Any]:
    """What each rank that speaks says, by rank, on every rank; None: this one has nothing to say.

    An all_gather of sizes (8 bytes a rank), then each speaker broadcasts its own bytes, nothing padded. `value` as for
    `packed.pack`. Collective over all ranks (CPU tensors). Raises PackedError when a value arrived damaged, RankLost
    when one did not arrive before the group's deadline; both name the speaker.
    """
    data = torch.zeros(0, dtype=torch.uint8)
    if value is not None:
        data = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)
    if world_size() == 1:
        return {} if value is None else {0: _unpacked(data, 0)}
    speakers = [(speaker, size) for speaker, size in enumerate(sizes_of_ranks(data.numel())) if size]
    told = {}
    for first in range(0, len(speakers), BROADCASTS):
        parts = {}
        for speaker, size in speakers[first : first + BROADCASTS]:
            part = data if speaker == rank() else torch.empty(size, dtype=torch.uint8)
            parts[speaker] = part, dist.broadcast(part, src=speaker, async_op=True)
        for speaker, (part, work) in parts.items():
            try:
                work.wait()
            except RuntimeError as e:
                raise RankLost(
                    f"rank {rank()} waited for what rank {speaker} tells all; that rank died or is stuck, and its own "
                    f"output says why. ({e})"
                ) from e
            told[speaker] = _unpacked(part, speaker)
    return told


def _unpacked(part: torch.Tensor, speaker: int) -> Any:
    """What rank `speaker` packed into the bytes `part`."""
    try:
        return unpack(part.numpy().data)
    except PackedError as e:
        raise PackedError(
            f"what rank {speaker} told rank {rank()} arrived damaged: {e}. Start again; if it comes back, look at the "
            "network and the memory of both machines"
        ) from None


def require_agreement(value: Any, what: str) -> None:
    """Raise RanksDisagree on every rank unless all have an equal JSON-able `value`. Collective over all ranks."""
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    digests = gather_objects(digest)
    others = [rank_ for rank_, other in enumerate(digests) if other != digests[0]]
    if others:
        raise RanksDisagree(
            f"{what} gave other results on ranks {others} than on rank 0. It must be a function of its arguments "
            "alone: no clock, no unseeded random numbers, no order of a set"
        )


@_waiting
def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Element-wise sum of equally keyed dicts over all ranks, in fp64. Collective over all ranks."""
    # Sorted: ranks may have filled their dicts in another order, and the reduction goes by place.
    keys = sorted(values)
    sums = torch.tensor([values[key] for key in keys], dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(sums)
    return dict(zip(keys, sums.tolist(), strict=True))


def sum_over_replicas(values: dict[str, float], *, counts: bool = True) -> dict[str, float]:
    """Sum over all ranks of what the ranks of a tensor-parallel group hold alike, each group counted once, in fp64.

    `counts` False leaves this rank's values out: a pipeline stage that holds a copy, say. All ranks call with the same
    keys. Collective over all ranks.
    """
    included = counts and ps.get_tensor_model_parallel_rank() == 0
    return sum_over_ranks({name: float(value) if included else 0.0 for name, value in values.items()})


@_waiting
def sum_array_over_replicas(values: np.ndarray, *, counts: bool = True) -> np.ndarray:
    """As `sum_over_replicas`, of an fp64 array of the same shape on all ranks. Collective over all ranks."""
    included = counts and ps.get_tensor_model_parallel_rank() == 0
    sums = torch.from_numpy(values.astype(np.float64) if included else np.zeros(values.shape))
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums.numpy()


@_waiting
def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Element-wise maximum of equally keyed dicts over all ranks. Collective over all ranks."""
    keys = sorted(values)
    maxima = torch.tensor([values[key] for key in keys], dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return dict(zip(keys, maxima.tolist(), strict=True))


def leave(code: int = 0) -> None:
    """End this process now, with its helpers. Collective state is not torn down in order."""
    # Megatron's checkpoint writer keeps a manager process. It would outlive `os._exit` and hold the console open.
    for child in multiprocessing.active_children():
        # Not terminate(): a forked child inherits our SIGTERM handler, which only takes note.
        child.kill()
    for child in multiprocessing.active_children():
        child.join(timeout=5)
    sys.stdout.flush()
    sys.stderr.flush()
    # No ordinary exit: vLLM's destructor would destroy the process group under the other ranks.
    os._exit(code)
