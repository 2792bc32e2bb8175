"""Imports vLLM as an engine does when it is built (`engine/vllm_setup.py`); a rank forked from here need not."""

from __future__ import annotations

import logging
import os

# Read when vLLM is imported; `vllm_setup.build` sets the same before its own import.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)

from treepo_mega.engine import cuda_profile  # noqa: E402

cuda_profile.apply()

import vllm.entrypoints.llm  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
