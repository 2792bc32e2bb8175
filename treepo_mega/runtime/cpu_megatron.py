"""Megatron-Core without a GPU: retarget its CUDA calls while its modules are imported.

Megatron-Core 0.16.1 names `torch.cuda` and the device string "cuda" in a few dozen places that CPU runs reach (RNG
tracker, gradient buffers, pipeline communication, clipping, rotary tables). Patching `torch.cuda` itself would disturb
vLLM and transformers, which share this process. So `megatron.*` source files are rewritten in the syntax tree only:

    torch.cuda.X            ->  <stand-in>.X          from torch.cuda import X -> X = <stand-in>.X
    "cuda"                  ->  "cpu"                 "torch.cuda.FloatTensor" -> "torch.FloatTensor"
    t.cuda(...)             ->  t.cpu()               pin_memory=True          -> pin_memory=False

Megatron's switch for its jit_fuser (torch.compile on every fused function) is set to off, and the numbers of tokens
that ranks exchange for their experts become arrays of the host, as a copy from a device makes them. Parts of
different lengths go over gloo padded (`cpu_collectives.py`).

Line numbers survive, so tracebacks point into Megatron's own files. torch stays untouched. With CUDA nothing is
rewritten: GPU runs use Megatron as shipped.

`import treepo_mega` installs the finder that asks `retargeted_spec`. It must come before the first import of Megatron;
`require_retargeted` names the module that came too early.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import marshal
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

from treepo_mega.errors import TreepoError
from treepo_mega.runtime import cpu_collectives
from treepo_mega.runtime.device import has_cuda

STAND_IN = "__treepo_cuda__"
ROOT = "megatron"
MARKS = (b"cuda", b"pin_memory")
"""In every line that `_Retarget` rewrites."""
_RULES = Path(__file__).read_bytes()


class EarlyMegatron(TreepoError):
    """Megatron was imported before treepo_mega on a machine without a GPU; the message names the module."""


class _Inert:
    """Stands for a stream, event or NVTX handle: every method returns the object itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _DefaultGenerators:
    """`torch.cuda.default_generators[i]`: the CPU's one default generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Synchronisation and cache calls mean nothing on a CPU."""


def _zero(*args: Any, **kwargs: Any) -> int:
    """Allocator statistics: the CPU allocator keeps none."""
    return 0


class CpuCuda:
    """What `torch.cuda` means inside megatron.* on a CPU. Unknown names fall through to the real module."""

    Stream = Event = device = _Inert
    FloatTensor = torch.FloatTensor
    HalfTensor = torch.HalfTensor
    BFloat16Tensor = torch.BFloat16Tensor
    nvtx = _Inert()
    default_generators = _DefaultGenerators()
    synchronize = empty_cache = set_device = _lazy_init = staticmethod(_ignore)
    memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = staticmethod(_zero)
    manual_seed = staticmethod(torch.manual_seed)

    @property
    def random(self) -> CpuCuda:
        """torch.cuda.random has the RNG functions of torch.cuda."""
        return self

    def is_available(self) -> bool:
        """No GPU: the reason this class exists."""
        return False

    def device_count(self) -> int:
        """One CPU."""
        return 1

    def current_device(self) -> torch.device:
        """The CPU; Megatron passes this on as `device=`."""
        return torch.device("cpu")

    def current_stream(self, *args: Any) -> _Inert:
        """CPU work is synchronous: a stream that does nothing."""
        return _Inert()

    default_stream = current_stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        """`with torch.cuda.stream(s)`: no streams, nothing to switch."""
        return contextlib.nullcontext()

    def get_rng_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """State of the CPU generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Set the CPU generator."""
        torch.set_rng_state(state)

    def _lazy_call(self, callback: Any, **kwargs: Any) -> None:
        callback()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Retarget(ast.NodeTransformer):
    """The rewriting rules of the module docstring."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if node.value == "cuda":
            node.value = "cpu"
        elif isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            node.value = node.value.replace("torch.cuda.", "torch.")
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(STAND_IN, ast.Load()), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr = "cpu"
            node.args = []
            node.keywords = []
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        self.generic_visit(node)
        if node.arg == "pin_memory":
            node.value = ast.copy_location(ast.Constant(False), node.value)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.Assign]:
        """`from torch.cuda import a as b` -> `b = <stand-in>.a`, one assignment a name."""
        if node.module != "torch.cuda":
            return node
        return [
            ast.copy_location(
                ast.Assign(
                    [ast.Name(alias.asname or alias.name, ast.Store())],
                    ast.Attribute(ast.Name(STAND_IN, ast.Load()), alias.name, ast.Load()),
                ),
                node,
            )
            for alias in node.names
        ]


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's `maybe_move_tensor_to_cpu` for tensors of the CPU, which it leaves: collectives refuse them."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _keep(cache: Path, data: bytes) -> None:
    """Write `cache` whole or not at all: ranks start together. Silent where the installation is not ours to change."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(exist_ok=True)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.replace(cache)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten tree. A source without any of MARKS has nothing to rewrite and is loaded as usual."""

    def get_code(self, fullname: str) -> CodeType | None:
        """The module's code, rewritten where there is something to rewrite."""
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if not any(mark in source for mark in MARKS):
            return super().get_code(fullname)
        # Rewriting takes seconds, in every rank. The byte code is kept beside Megatron's own under a name that Python
        # never looks at. The digest of the source and of this file heads it: it is made again when either changes.
        digest = hashlib.sha256(source + _RULES).digest()
        cache = Path(importlib.util.cache_from_source(path, optimization="retargeted"))
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
            kept = cache.read_bytes()
            if kept.startswith(digest):
                return marshal.loads(kept[len(digest) :])
        tree = _Retarget().visit(ast.parse(source, path))
        code = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            _keep(cache, digest + marshal.dumps(code))
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[STAND_IN] = CpuCuda()
        super().exec_module(module)
        # A CPU uses no fusions, and decorating them would import the whole compiler into every rank.
        if module.__name__ == f"{ROOT}.core.jit":
            module.disable_jit_fuser()
        if module.__name__ == f"{ROOT}.core.transformer.moe.moe_utils":
            module.__dict__["maybe_move_tensor_to_cpu"] = _on_host
        if module.__name__ == f"{ROOT}.core.tensor_parallel.mappings":
            cpu_collectives.take_over(module)


def retargeted_spec(fullname: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """The spec of module `fullname` under `megatron`, with the loader that rewrites it; None leaves it as shipped.

    `path` is the `__path__` of the parent package. Anything but a source file keeps the loader that it has.
    """
    if not _retargets():
        return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
    return spec


def require_retargeted() -> None:
    """Raise EarlyMegatron if this process needs the retargeted Megatron and has modules of it as shipped."""
    if has_cuda():
        return
    early = _loaded_as_shipped()
    if early:
        raise EarlyMegatron(
            f"{early} was imported before treepo_mega and calls CUDA, but torch sees no GPU here. Import treepo_mega "
            "first: it retargets Megatron to the CPU"
        )


@functools.cache
def _retargets() -> bool:
    """Whether this process rewrites Megatron: decided at its first import, one way for all of its modules."""
    return not has_cuda() and not _loaded_as_shipped()


def _loaded_as_shipped() -> str:
    """The first loaded module under `megatron` that Python's own source loader loaded; empty if there is none."""
    for name, module in sorted(sys.modules.items(), key=lambda item: item[0]):
        if name.split(".")[0] != ROOT:
            continue
        spec = getattr(module, "__spec__", None)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            return name
    return ""
