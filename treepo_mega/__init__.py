"""treepo_mega: TreePO reinforcement learning on Megatron-Core with a co-located vLLM tree generator.

Importing this package puts one import finder in front of Python's own. It answers for `megatron.*` alone, and only
where there is no GPU: there Megatron's CUDA calls are retargeted to the CPU (`treepo_mega.runtime.cpu_megatron`).
The finder itself imports nothing heavy; torch is asked for a GPU when Megatron is first imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.2.0"


class MegatronFinder:
    """Hands imports of `megatron.*` to `cpu_megatron.retargeted_spec`; every other import goes to Python's finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The retargeted spec of a module of Megatron; None, which means "ask the next finder", for all else."""
        if fullname != "megatron" and not fullname.startswith("megatron."):
            return None
        # Not at the top: it imports torch, which planning and `--help-config` do without.
        from treepo_mega.runtime import cpu_megatron

        return cpu_megatron.retargeted_spec(fullname, path)


sys.meta_path.insert(0, MegatronFinder())
