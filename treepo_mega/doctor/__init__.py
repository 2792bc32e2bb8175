"""Is this cluster fit for the run? Asked on every node before weights are read, answered in seconds.

    srun --ntasks-per-node=1 treepo-mega doctor CONFIG.yaml --gpus 8     the job scripts do this
    treepo-mega doctor CONFIG.yaml                                       this machine alone

`node.py` looks at one node: packages, cards, limits, disks, clock, port. `meeting.py` lets all nodes of a job meet in
a shared directory, where they compare clocks and versions, and open a connection to each other. `reduce.py` lets them
sum a tensor (`--all-reduce`), in child processes with torch (`exchange.py`). Each finding that is not fine names the
host and what to do. Nothing else here imports torch, vLLM or Megatron. Only probe files are written.
"""
