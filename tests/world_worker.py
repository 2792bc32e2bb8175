"""A rank of test_world.py: `world_worker.py fresh|raises|dies|status|hangs`."""

import os
import signal
import sys
import time

import torch.distributed as dist

how = sys.argv[1]
rank = int(os.environ.get("RANK", "0"))
print(f"pid {os.getpid()}", flush=True)
if how == "fresh":
    assert "megatron.core.parallel_state" in sys.modules and not dist.is_initialized()
    print(f"megatron imported, no group, {len(os.listdir('/proc/self/task'))} thread", flush=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        dist.barrier()
elif how == "raises":
    print("before the assertion", flush=True)
    assert rank == 0, "planted"
elif rank == 1 and how == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
elif rank == 1 and how == "status":
    sys.exit(3)
else:
    time.sleep(600)
