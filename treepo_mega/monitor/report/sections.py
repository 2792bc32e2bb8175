"""What stands on the report's page, section by section; `page.py` is its shell."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import yaml

from treepo_mega.monitor.registry import known_names
from treepo_mega.monitor.report.charts import (
    colour,
    fit_chart,
    metric_chart,
    stacked_hours,
    throughput_chart,
    waterfall_chart,
)
from treepo_mega.monitor.report.comparison import Comparison, side_by_side
from treepo_mega.monitor.report.machine import Block, blocks
from treepo_mega.monitor.report.numbers import short, shown
from treepo_mega.monitor.report.page import Charts, document, notes, table
from treepo_mega.monitor.report.slurm import Charged
from treepo_mega.monitor.report.stragglers import RANKS_SHOWN
from treepo_mega.monitor.report.summary import PHASES, RATES, Seen
from treepo_mega.monitor.report.table import ACCURACY, REWARD, trend
from treepo_mega.monitor.scaling_fit import PARAMETERS, Fit, Saving

CURVES = (
    *("rollout/reward_policy", "rollout/accuracy_policy", "rollout/reward_mean", "rollout/accuracy"),
    *("eval/accuracy", "eval/greedy_accuracy", "eval/perplexity", "tree/token_ratio"),
    *("rollout/response_len_policy", "train/entropy", "train/ppo_kl", "train/pg_clipfrac", "grad-norm"),
    *("rollout/logprob_abs_diff_max", "train/gen_kl_error", "perf/step_s", "perf/tokens_per_s"),
    *("perf/update_mfu", "rollout/engine_idle_share", "reshard/gb_per_s", "gpu/power_w_mean"),
    *("gpu/memory_used_gib_max", "host/rss_gib_max"),
)
FALLBACKS = {"rollout/reward_mean": "rollout/reward_policy", "rollout/accuracy": "rollout/accuracy_policy"}
"""Means over leaves, which runs of older versions logged alone, and what takes their place."""
FAULTS = "faults and repairs (0 is best)"


def render(
    runs: Sequence[Seen],
    baselines: Sequence[Seen],
    found: Comparison,
    charged: Charged,
    *,
    now: float,
    refresh_s: float | None = None,
) -> str:
    """The whole page."""
    everyone = [*runs, *baselines]
    charts = Charts()
    when = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    live = "" if refresh_s is None else f"; written again every {refresh_s:g} s"
    said = [note for seen in everyone for note in seen.figures["notes"]]
    body = [
        f'<h1>treepo_mega report</h1><p class="note">{when}{live}</p>',
        notes([*said, *found.notes, *charged.problems]),
        _overview(everyone),
        _comparison(found, charts, True) if baselines else "",
        *(_run(seen, charts) for seen in everyone if len(seen.run.steps)),
        "" if baselines else _comparison(found, charts, False),
        _slurm(charged),
        _curves(everyone, charts),
        *(_samples(seen) for seen in everyone),
        *(_files(seen) for seen in everyone),
    ]
    return document("treepo_mega report", "".join(body), charts, refresh_s=refresh_s)


def _overview(everyone: Sequence[Seen]) -> str:
    head = (
        "run",
        "status",
        "steps",
        "reward",
        "accuracy",
        "eval accuracy",
        "token ratio",
        "hours",
        "step p50",
        "refit",
    )
    rows = []
    for place, seen in enumerate(everyone):
        figures = seen.figures
        rows.append(
            (
                f'<span class="key" style="background:{colour(place)}"></span>{escape(figures["run"])}',
                escape(figures["status"]),
                "-" if figures["first_step"] is None else f"{figures['first_step']} to {figures['last_step']}",
                trend(figures, *REWARD),
                trend(figures, *ACCURACY),
                trend(figures, "eval/accuracy"),
                shown(figures["token_ratio"]),
                f"{shown(figures['hours'])} {figures['unit']}",
                shown(figures["medians"].get("perf/step_s"), " s"),
                shown(figures["medians"].get("reshard/gb_per_s"), " GB/s"),
            )
        )
    return table(head, rows)


def _comparison(found: Comparison, charts: Charts, has_baseline: bool) -> str:
    fitted = [arm for arm in found.arms if arm.metric is not None and arm.fits]
    if not has_baseline and not any(one.problem is None for arm in fitted for one in arm.fits.values()):
        return ""
    title = "Against the baseline" if has_baseline else "Accuracy over compute"
    parts = [f"<h2>{title}</h2>"]
    if has_baseline:
        head = ("", *(escape(arm.name) + (" (baseline)" if arm.is_baseline else "") for arm in found.arms))
        rows = [
            (escape(label), *(shown(value) + ("" if ratio is None else f" ({ratio:.2f} x)") for value, ratio in cells))
            for label, cells in side_by_side(found)
        ]
        parts.append(table(head, rows))
        parts.append("<h3>Saving at equal accuracy</h3>")
        parts += [f"<p>{escape(saving_text(key, one, found.unit))}</p>" for key, one in found.savings.items()]
        if not found.savings:
            parts.append("<p>The runs share no accuracy that could be fitted.</p>")
    parts.append(
        '<h3>ScaleRL\'s fit</h3><p class="note">R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B) over the time of the '
        "steps, evaluation and checkpoints left out. In brackets: the middle 95 % of bootstrap draws.</p>"
    )
    for axis in ("hours", "tokens"):
        parts.append(charts.place(f"accuracy over {axis}", fit_chart(found, axis)))
    rows = [(escape(arm.name), axis, *fit_cells(one)) for arm in fitted for axis, one in arm.fits.items()]
    parts.append(table(("runs", "over", "A", "B", "C_mid", "R0", "what is not known"), rows, text=(1, 6)))
    return "".join(parts)


def fit_cells(one: Fit) -> list[str]:
    """A, B, C_mid, R0 with intervals, and the problem; no figure where there is a problem. HTML."""
    if one.problem is not None:
        return ["-", "-", "-", "-", escape(f"not identifiable: {one.problem}")]
    cells = []
    for name in ("asymptote", "exponent", "midpoint", "start"):
        low, high = one.intervals[name]
        cells.append(f"{short(getattr(one, name))} ({short(low)} to {short(high)})")
    assert set(one.intervals) == set(PARAMETERS)
    return [*cells, ""]


def saving_text(key: tuple[str, str], one: Saving | str, unit: str) -> str:
    """One sentence on a saving, in plain text."""
    arm, axis = key
    what = unit if axis == "hours" else "tokens"
    if isinstance(one, str):
        return f"{arm}, {what}: not known, for {one}."
    low, high = (f"{1 - end:.0%}" if end < float("inf") else "none" for end in reversed(one.interval))
    doubt = "" if one.interval[1] < 1 or one.interval[0] > 1 else " The interval does not tell it from none."
    return (
        f"{arm}: {short(one.ours)} {what} to accuracy {one.accuracy:.3f}, the baseline {short(one.baseline)}: "
        f"{1 - one.ratio:.0%} saved (95 % interval {low} to {high}).{doubt}"
    )


def _run(seen: Seen, charts: Charts) -> str:
    figures = seen.figures
    unit = figures["unit"]
    parts = [f"<h2>Where the {unit} of {escape(figures['run'])} went</h2>"]
    devices = "" if figures["gpus"] is None else f", {figures['gpus']:g} {'GPUs' if seen.spent.on_gpu else 'ranks'}"
    about = "" if seen.spent.on_gpu else " Without a GPU a rank counts as one core."
    parts.append(f'<p class="note">{figures["wall_s"]:.4g} s from the first line to the last{devices}.{about}</p>')
    parts.append(charts.place("Seconds a step by phase", stacked_hours(seen)))
    rows = [
        (
            f'<span class="key" style="background:{colour(place)}"></span>{escape(part["name"])}',
            *(f"{part['share']:.1%}", shown(part["hours"]), shown(part["total"], " s"), shown(part["p50"], " s")),
            *(shown(part["p95"], " s"), str(part["steps"])),
        )
        for place, part in enumerate(figures["phases"])
    ]
    rows.append(("all", "100 %", shown(figures["hours"]), shown(figures["wall_s"], " s"), "", "", ""))
    head = ("phase", "share", unit, "seconds", "p50", "p95", "steps")
    parts.append(table(head, rows, marked=[len(rows) - 1]))
    parts.append("<h3>From perfect to measured</h3>")
    parts.append(
        charts.place(
            f"{unit}, from flat trajectories without a loss to what was measured", waterfall_chart(seen), tall=True
        )
    )
    bars = figures["waterfall"]
    steps = []
    for bar in bars:
        hours = shown(bar["hours"]) if bar["is_total"] else f"{bar['hours']:+.4g}"
        steps.append((escape(bar["name"]), hours, escape(bar["note"])))
    totals = [place for place, bar in enumerate(bars) if bar["is_total"]]
    parts.append(table(("", unit, "from"), steps, text=(2,), marked=totals))
    parts += [_throughput(seen, charts), _plan(seen), _figures(seen), _stragglers(seen)]
    return "".join(parts)


def _throughput(seen: Seen, charts: Charts) -> str:
    rates = seen.figures["throughput"]
    if not rates:
        return ""
    rows = [(name, *(shown(rates[name][rate]) for rate in RATES)) for name in PHASES if name in rates]
    head = ("phase", "unique tokens/s per GPU", "flat tokens/s per GPU", "TFLOP/s per GPU", "MFU", "HFU")
    note = "Flat counts a token in every trajectory, as NeMo-RL does; unique counts it once, as it is computed."
    chart = charts.place("Tokens/s per GPU by phase", throughput_chart(seen))
    return f'<h3>Throughput</h3><p class="note">{note}</p>{chart}{table(head, rows)}'


def _plan(seen: Seen) -> str:
    rows = [
        (escape(row["what"]), shown(row["measured"]), shown(row["planned"]), ratio(row)) for row in seen.figures["plan"]
    ]
    head = ("", "measured", "planned", "measured / planned")
    note = '<p class="note">Seconds are medians over steps.</p>'
    return f"<h3>Against the plan</h3>{note}{table(head, rows)}" if rows else ""


def ratio(row: dict[str, Any]) -> str:
    """Measured / planned, where both are known."""
    known = row["measured"] is not None and row["planned"]
    return f"{row['measured'] / row['planned']:.2f}" if known else "-"


def _figures(seen: Seen) -> str:
    figures = seen.figures
    parts = []
    tokens = [(f"{name} tokens", shown(value)) for name, value in figures["tokens"].items()]
    shared = [("unique / flat tokens", shown(figures["token_ratio"]))]
    medians = [(escape(name), shown(value)) for name, value in figures["medians"].items()]
    parts.append("<h3>Tokens and refit</h3>")
    parts.append('<p class="note">Sums over the run for tokens, medians over its steps for the others.</p>')
    parts.append(table(("figure", "value"), [*tokens, *shared, *medians]))
    parts += [_block(block) for block in blocks(figures)]
    parts.append("<h3>Energy, cost and gain</h3>" + table(("figure", "value"), cost_rows(figures)))
    faults = [
        (escape(name), f'<span class="{"bad" if value else ""}">{short(value)}</span>')
        for name, value in figures["totals"].items()
    ]
    if faults:
        parts.append(f"<h3>Faults</h3>{table((FAULTS, 'total'), faults)}")
    return "".join(parts)


def _block(block: Block) -> str:
    note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
    rows = [[escape(cell) for cell in row] for row in block.rows]
    return f"<h3>{escape(block.title)}</h3>{note}{table(block.head, rows)}"


def cost_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and values, plain text."""
    cost = figures["cost"]
    unit = figures["unit"]
    no_energy = "not measured (gpu/energy_kj)"
    no_price = "no price was given (--price)"
    return [
        ("trajectories trained on", shown(cost["trajectories"])),
        (f"{unit} per 1,000 of them", shown(cost["hours_per_1000"])),
        ("energy", no_energy if cost["energy_kwh"] is None else f"{short(cost['energy_kwh'])} kWh"),
        ("energy per 1,000", shown(cost["energy_kwh_per_1000"], " kWh")),
        ("cost", no_price if cost["cost"] is None else short(cost["cost"])),
        ("cost per 1,000", shown(cost["cost_per_1000"])),
        ("reward gained, last tenth less first", shown(cost["reward_gain"])),
        (f"reward gained, by {unit.removesuffix('s')}", shown(cost["reward_gain_per_hour"])),
    ]


def _stragglers(seen: Seen) -> str:
    slow = seen.stragglers
    if not slow.ranks:
        # The metrics have named them already; traces that cannot be read are said at the top.
        if seen.figures["ranks"] is not None:
            return ""
        said = "".join(f'<p class="note">{escape(note)}</p>' for note in slow.notes)
        return f"<h3>Stragglers</h3>{said}"
    rows = [
        (f"rank {row.rank}", str(row.last), shown(row.sampling_s, " s"), shown(row.waiting_s, " s"))
        for row in slow.ranks[:RANKS_SHOWN]
    ]
    spread = [(escape(name), *(shown(value, " s") for value in ends)) for name, ends in slow.phases.items()]
    about = f"{slow.world} ranks, {slow.rounds} rounds of sampling, of the steps of logging.trace_steps."
    return (
        f'<h3>Stragglers by round</h3><p class="note">{about} The others waited for the rank that came last.</p>'
        f"{table(('rank', 'came last, rounds', 'sampling', 'waiting'), rows)}"
        f"<h3>Phases over ranks</h3>{table(('span', 'p50', 'p95', 'max'), spread)}"
    )


def _slurm(charged: Charged) -> str:
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in charged.notes)
    if not charged.jobs:
        return f"<h2>What Slurm charged</h2>{said}"
    rows = [
        (
            *(escape(job.job), escape(job.name), escape(job.state), shown(job.elapsed_s, " s"), str(job.nodes)),
            *("-" if job.gpus is None else str(job.gpus), shown(job.gpu_hours), shown(job.energy_kj, " kJ")),
        )
        for job in charged.jobs
    ]
    head = ("job", "name", "state", "elapsed", "nodes", "GPUs", "GPU-hours", "energy")
    return f"<h2>What Slurm charged</h2>{table(head, rows, text=(1, 2))}"


def _curves(everyone: Sequence[Seen], charts: Charts) -> str:
    documented = known_names()
    found = []
    for metric in CURVES:
        better = FALLBACKS.get(metric)
        if better and all(len(seen.run.series(better)[0]) for seen in everyone if len(seen.run.steps)):
            continue
        doc = documented[metric]
        figure = metric_chart(everyone, metric)
        found.append(charts.place(metric, figure, about=f"{doc.unit}; healthy: {doc.healthy}"))
    inner = "".join(found)
    return f'<h2>Curves</h2><div class="charts">{inner}</div>' if inner else ""


def _samples(seen: Seen) -> str:
    """What the model wrote, best and worst by step; nothing without trees."""
    leaves = seen.run.samples.leaves
    if not leaves:
        return ""
    rows = [
        (
            *(str(leaf.step), f"{leaf.reward:.3g}", escape(leaf.advantage)),
            f'<div class="words"><span class="note">{escape(leaf.prompt)}</span> {escape(leaf.response)}</div>',
        )
        for leaf in leaves
    ]
    about = "best and worst leaf of a prompt; ├ stands at branch points, ⏎ at line ends"
    more = f"treepo-mega tree {escape(seen.run.name)} shows whole trees."
    head = ("step", "reward", "advantage", "prompt and response")
    return (
        f'<h2>What the model of {escape(seen.run.name)} wrote</h2><p class="note">{about}. {more}</p>'
        f'<div class="samples">{table(head, rows)}</div>'
    )


def _files(seen: Seen) -> str:
    parts = []
    for title, mapping in (("summary.json", seen.run.summary), ("config.yaml", seen.run.config)):
        if mapping:
            text = escape(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True))
            name = escape(f"{seen.run.name}/{title}")
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)
