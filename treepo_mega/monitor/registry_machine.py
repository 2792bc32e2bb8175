"""Metrics of what a run runs on: GPUs, hosts, ranks, memory, start-up. See `registry.py`."""

from __future__ import annotations

from treepo_mega.monitor.metric import Metric

PHASES = "rollout,reward,advantage,old_logprobs,ref_logprobs,update,reshard,step"
"""Phases of a step by the names of their timers, for braces in names."""

MACHINE = (
    Metric("gpu/utilization_{mean,max}", "share", "near 1 in mean", "of the time, some kernel was running; NVML"),
    Metric("gpu/memory_used_gib_{mean,max}", "GiB", "max below the card's", "memory used on a card, by all processes"),
    Metric("gpu/power_w_{mean,max}", "W", "near the card's limit when busy", "power draw of a card"),
    Metric("gpu/sm_clock_mhz_{mean,max}", "MHz", "mean near max", "clock of the multiprocessors"),
    Metric("gpu/temperature_c_{mean,max}", "C", "below 85", "temperature of a card"),
    Metric(
        "gpu/throttled_share_{mean,max}", "share", "mean 0", "samples of a card slowed down by heat or a power limit"
    ),
    Metric("gpu/energy_kj", "kJ", "steady", "energy of all cards in the step"),
    Metric("gpu/ecc_errors", "count", "0; else have the card looked at", "memory errors that ECC could not correct"),
    Metric("gpu/nvlink_gb", "GB", "steady", "bytes over NVLink, sent and received, all cards"),
    Metric("gpu/pcie_gb", "GB", "steady", "bytes over PCIe, sent and received, all cards"),
    Metric("host/cpu_share_{mean,max}", "share", "mean below 0.9", "of a node's cores in use, by all processes"),
    Metric("host/memory_used_gib_{mean,max}", "GiB", "no growth", "host memory used on a node, by all processes"),
    Metric(
        "host/rss_gib_{mean,max}", "GiB", "no growth", "resident memory of a node's first rank and its child processes"
    ),
    Metric("host/shm_gib_{mean,max}", "GiB", "no growth", "shared memory used on a node (/dev/shm)"),
    Metric("host/{disk_read,disk_written}_gb", "GB", "-", "bytes of all disks in the step, all nodes"),
    Metric("host/{network_received,network_sent}_gb", "GB", "-", "bytes of all network interfaces, all nodes"),
    Metric("host/telemetry_samples", "count", "step time / interval x nodes", "samples behind these means"),
    Metric("host/telemetry_s", "s", "below 0.005 of the step x nodes", "time that taking them cost, in a thread"),
)

COSTS = (
    Metric("rollout/requests", "count", "at most segments", "requests to the engines"),
    Metric(
        "rollout/engine_{step,token,request}_{s,cpu_s}",
        "s",
        "steady",
        "cost of an engine's step, of each token that it forwards, and of each request that begins in it, waits left "
        "out: least squares over the steps of all engines; wall time and CPU time of an engine's process",
    ),
    Metric("perf/micro_batches", "count", "few", "micro-batches of a rank's updates, the logging rank's"),
    Metric(
        "perf/update_{step,micro_batch,token}_{s,cpu_s}",
        "s",
        "steady",
        "cost of an update on the logging rank: what follows the passes of an optimizer step, of each micro-batch, and "
        "of each of its tokens: least squares over the micro-batches of the run, the first rollout's left out (in a "
        "pipeline over its optimizer steps)",
    ),
)

LOGGING = (
    Metric(
        "logging/sink_failures",
        "count",
        "absent; else read the warning of that sink in the log",
        "calls of sinks (logging.sinks) that failed since the last line",
    ),
)

RANKS = (
    Metric(
        f"ranks/{{{PHASES}}}_busy_s_{{p50,p95,max}}",
        "s",
        "max near p50; else see ranks/slowest",
        "seconds of a phase without waits in the trainer's own collectives and barriers, over ranks; waits inside the "
        "model's collectives count as busy",
    ),
    Metric(
        "ranks/idle_share",
        "share",
        "below 0.1; above: long answers of few engines, or a slow rank",
        "of the step, what ranks wait in those collectives, mean over ranks",
    ),
    Metric("ranks/idle_share_max", "share", "below 0.3", "the same, of the rank that waits most"),
    Metric(
        "ranks/slowest",
        "rank",
        "changes from step to step; always the same one: look at its host",
        "the rank that is furthest above the median of a phase; after three steps in a row the log names its host",
    ),
    Metric("ranks/slowest_s", "s", "below 0.1 of the step", "how far it is above that median"),
    Metric(
        f"memory/{{{PHASES}}}_peak_gib",
        "GiB",
        "steady, and below the card's; near it: lower train.max_tokens_per_gpu or recompute",
        "largest memory of a rank in a phase: on CUDA what torch has allocated (not an engine's pool of its own); on a "
        "CPU the process's resident memory, without its children",
    ),
    Metric(
        "startup_s/{imports,groups,inputs,actor,reference,engine,resume,refit,total}",
        "s",
        "once, in the first line after a start; reading weights leads",
        "time until the first step by part, slowest rank: the interpreter and its imports, process groups, prompts and "
        "graders, the policies, the engine, a checkpoint, the first weights into the engine",
    ),
)
