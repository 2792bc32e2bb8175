"""`treepo-mega top RUN`: a run in the terminal, looked at again and again. `live.py` reads, this module draws.

    watch(Path("runs/demo"), once=True)

One picture has the verdict, the step and its phase, ranks by host, curves of the last steps, and faults.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from treepo_mega.monitor.live import Rank, Seen, ago, look

BARS = "▁▂▃▄▅▆▇█"
GAP = "·"
CURVE = 40
"""Steps of a curve."""

MOST_RANKS = 16
"""Ranks that have a line each; of more, a host has one."""

CURVES: tuple[tuple[str, str], ...] = (
    ("rollout/accuracy_policy", "accuracy"),
    ("rollout/reward_policy", "reward"),
    ("eval/accuracy", "eval accuracy"),
    ("rollout/signal_share", "prompts with signal"),
    ("rollout/response_len_policy", "response length"),
    ("train/entropy", "entropy"),
    ("grad-norm", "gradient norm"),
    ("train/token_mult_prob_error", "token_mult_prob_error"),
    ("tree/token_ratio", "token ratio"),
    ("perf/step_s", "step, s"),
    ("perf/unique_tokens_per_s_per_gpu", "tokens/s per GPU"),
    ("perf/update_mfu", "update MFU"),
    ("ranks/idle_share", "idle share"),
    ("gpu/memory_used_gib_max", "GPU memory, GiB"),
    ("host/rss_gib_max", "host memory, GiB"),
)


def watch(run_dir: Path, *, once: bool = False, interval_s: float = 2.0, console: Console | None = None) -> None:
    """Draw the run until it ends or the reader interrupts; `once`: a single picture. Raises TopError."""
    console = console or Console()
    seen = look(run_dir, time.time())
    if once:
        console.print(picture(seen, time.time()))
        return
    with Live(picture(seen, time.time()), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            while seen.alive or seen.verdict.startswith("empty"):
                time.sleep(interval_s)
                seen = look(run_dir, time.time())
                live.update(picture(seen, time.time()), refresh=True)
        except KeyboardInterrupt:
            pass
    # The screen is gone with the live view: the last picture stays.
    if console.is_terminal:
        console.print(picture(seen, time.time()))


def picture(seen: Seen, now: float) -> RenderableType:
    """One frame."""
    style = "green" if seen.alive or seen.verdict.startswith("finished") else "bold red"
    head = Text.assemble((seen.name, "bold"), "  ", (seen.verdict, style))
    if seen.of:
        head.append(f"  step {seen.step} of {seen.of}")
    parts: list[RenderableType] = [head]
    if seen.ranks:
        parts.append(_ranks(seen.ranks, now))
    if seen.rows:
        parts.append(_curves(seen))
    parts.append(_faults(seen))
    parts += [Text(f"note: {note}", style="dim") for note in seen.notes]
    return Group(*parts)


def sparkline(values: Sequence[float | None], width: int = CURVE) -> str:
    """The last `width` values as bars from their least to their largest; a dot where there is none.

    >>> sparkline([0, 1, None, 2, 4])
    '▁▃·▅█'
    """
    shown = list(values)[-width:]
    known = [value for value in shown if value is not None and math.isfinite(value)]
    if not known:
        return GAP * len(shown)
    least, spread = min(known), max(known) - min(known)

    def bar(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return GAP
        share = (value - least) / spread if spread else 0.0
        return BARS[round(share * (len(BARS) - 1))]

    return "".join(bar(value) for value in shown)


def _curves(seen: Seen) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", show_edge=False)
    for name in ("", "now", "last steps", "least", "most"):
        table.add_column(name, justify="right" if name in ("now", "least", "most") else "left", no_wrap=True)
    for name, label in CURVES:
        values = [row[name] for row in seen.rows if row.get(name) is not None]
        if values:
            recent = values[-CURVE:]
            bounds = [f"{bound:.4g}" for bound in (min(recent), max(recent))]
            table.add_row(label, f"{values[-1]:.4g}", sparkline(values), *bounds)
    return table


def _ranks(ranks: Sequence[Rank], now: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    by_host = len(ranks) > MOST_RANKS
    for name in ("host", "ranks" if by_host else "rank", "phase", "for", "" if by_host else "waits for"):
        table.add_column(name, no_wrap=True)
    if by_host:
        for host in sorted({rank.host for rank in ranks}):
            here = [rank for rank in ranks if rank.host == host]
            phases = Counter(_phase(rank) for rank in here)
            longest = ago(now - min(rank.since for rank in here))
            words = ", ".join(f"{count} x {phase}" for phase, count in phases.most_common())
            table.add_row(Text(host), str(len(here)), Text(words), longest, "")
        return table
    for rank in ranks:
        style = "red" if rank.silent else ""
        waits = Text(rank.waits_for)
        table.add_row(Text(rank.host), str(rank.number), Text(_phase(rank), style=style), ago(now - rank.since), waits)
    return table


def _phase(rank: Rank) -> str:
    if rank.state != "running":
        return rank.state
    return f"{rank.phase or 'between phases'}{', silent' if rank.silent else ''}"


def _faults(seen: Seen) -> RenderableType:
    if not seen.faults:
        return Text("faults: none in these steps" if seen.rows else "faults: nothing is known yet", style="dim")
    return Text("\n".join(["faults:", *(f"  {fault}" for fault in seen.faults)]), style="red")
