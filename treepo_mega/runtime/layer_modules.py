"""`model.transformer_impl=auto`: whose modules this process builds its layers from, and why. Decided at the start."""

from __future__ import annotations

import importlib
from typing import Literal

from treepo_mega.runtime.device import has_cuda

Impl = Literal["local", "transformer_engine"]


def automatic_impl() -> tuple[Impl, str]:
    """(Transformer Engine where torch sees a GPU and it loads, else Megatron's own modules; the reason)."""
    if not has_cuda():
        return "local", "torch sees no GPU"
    try:
        importlib.import_module("transformer_engine.pytorch")
    # OSError: a library of it is missing, or was built for another torch.
    except (ImportError, OSError) as e:
        return "local", f"Transformer Engine does not load ({type(e).__name__}: {e})"
    return "transformer_engine", "torch sees a GPU, and Transformer Engine loads"
