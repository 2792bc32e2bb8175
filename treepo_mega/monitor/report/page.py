"""The HTML page of a report: figures, charts, phases, faults and the configuration, in one file.

Everything that comes from a run passes through `html.escape`, and the page's own policy (the meta tag)
forbids scripts and outside loads, should an escape ever be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import yaml

from treepo_mega.monitor.registry import known_names
from treepo_mega.monitor.report.summary import Run
from treepo_mega.monitor.report.svg import COLOURS, line_chart, share_bar, short
from treepo_mega.monitor.report.table import ACCURACY, REWARD, trend

CHARTS = (
    "rollout/reward_policy",
    "rollout/accuracy_policy",
    "rollout/reward_mean",
    "rollout/accuracy",
    "eval/accuracy",
    "eval/greedy_accuracy",
    "eval/perplexity",
    "tree/token_ratio",
    "rollout/response_len_policy",
    "train/entropy",
    "train/ppo_kl",
    "train/pg_clipfrac",
    "grad-norm",
    "rollout/logprob_abs_diff_max",
    "perf/step_s",
    "perf/tokens_per_s",
    "reshard/gb_per_s",
)

STYLE = """
:root{--ink:#1c2430;--dim:#667080;--paper:#fff;--card:#f5f7fa;--rule:#dde2ea;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--dim:#98a2b3;--paper:#12161c;--card:#1b212a;--rule:#333c49}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1000px;margin:2rem auto;
padding:0 1rem}h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{padding:.25rem .6rem;text-align:right;
border-bottom:1px solid var(--rule)}th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
th{color:var(--dim);font-weight:500}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));
gap:1rem}figure{background:var(--card);border-radius:8px;margin:0;padding:.6rem}figcaption{font-weight:600}
figcaption small,.note{font-weight:400;color:var(--dim)}svg{width:100%;height:auto}svg text{font-size:11px;
fill:var(--dim)}.grid{stroke:var(--rule)}.line{fill:none;stroke-width:1.6}.bar{height:22px;border-radius:4px}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}pre{background:var(--card);
padding:1rem;overflow:auto;border-radius:8px}.bad{color:#c0392b;font-weight:600}
.samples td:last-child,.samples th:last-child{text-align:left}.words{font:13px/1.5 ui-monospace,monospace;
overflow-wrap:anywhere;unicode-bidi:isolate}.samples td{vertical-align:top}.samples{overflow-x:auto}
"""
PALETTE = ("#2f7ed8", "#e07b39", "#3a9d5d", "#b04a8f", "#8a6fd1", "#c2a83e", "#4aa3a8", "#8b8f99")


def render_page(runs: Sequence[Run], figures: Sequence[dict[str, Any]]) -> str:
    """The whole page. `figures[i]` is `summarise(runs[i])`."""
    body = [
        "<h1>treepo_mega report</h1>",
        _overview(figures),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(_charts(runs))}</div>',
        *(_run_section(run, f) for run, f in zip(runs, figures, strict=True)),
    ]
    return document("treepo_mega report", "".join(body))


def document(title: str, body: str) -> str:
    """A self-contained page around `body`, which is HTML already, in the style of all our pages."""
    colours = "".join(
        f".line.c{i}{{stroke:{c}}}.dot.c{i},.piece.c{i}{{fill:{c}}}.key.c{i}{{background:{c}}}"
        for i, c in enumerate(PALETTE[:COLOURS])
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}{colours}</style></head><body>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{h}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _number(value: float | None, suffix: str = "") -> str:
    return "-" if value is None else short(value) + suffix


def _overview(figures: Sequence[dict[str, Any]]) -> str:
    head = ("run", "steps", "reward", "accuracy", "eval accuracy", "token ratio", "step p50", "refit p50")
    rows = [
        (
            f'<span class="key c{i % COLOURS}"></span>{escape(f["run"])}',
            f"{f['first_step']} to {f['last_step']}",
            trend(f, *REWARD),
            trend(f, *ACCURACY),
            trend(f, "eval/accuracy"),
            _number(f["token_ratio"]),
            _number(f["medians"].get("perf/step_s"), " s"),
            _number(f["medians"].get("reshard/gb_per_s"), " GB/s"),
        )
        for i, f in enumerate(figures)
    ]
    return table(head, rows)


def _charts(runs: Sequence[Run]) -> list[str]:
    documented, out = known_names(), []
    for metric in CHARTS:
        # A run without the metric keeps its place, so that a run has one colour in all charts.
        series = [(run.name, *run.series(metric)) for run in runs]
        if any(steps for _, steps, _ in series):
            doc = documented[metric]
            about = f"<small>{escape(doc.unit)}; healthy: {escape(doc.healthy)}</small>"
            caption = f"<figcaption>{escape(metric)} {about}</figcaption>"
            out.append(f"<figure>{caption}{line_chart(series)}</figure>")
    return out


def _run_section(run: Run, figures: dict[str, Any]) -> str:
    phases = figures["phases"]
    parts = [f"<h2>{escape(run.name)}</h2>"]
    if phases:
        parts.append(share_bar([(p["name"], p["share"]) for p in phases]))
        rows = [
            (
                f'<span class="key c{i % COLOURS}"></span>{escape(p["name"])}',
                f"{p['share']:.1%}",
                _number(p["p50"], " s"),
                _number(p["p95"], " s"),
                _number(p["total"], " s"),
                str(p["steps"]),
            )
            for i, p in enumerate(phases)
        ]
        parts.append(table(("phase", "share", "p50", "p95", "total", "steps"), rows))
    tokens = {f"{name} tokens": value for name, value in figures["tokens"].items()}
    figures_of_run = {**tokens, "unique / flat tokens": figures["token_ratio"], **figures["medians"]}
    parts.append("<p class=note>Sums over the run for tokens, medians over its steps for the others.</p>")
    parts.append(table(("figure", "value"), [(escape(k), _number(v)) for k, v in figures_of_run.items()]))
    faults = [
        (escape(k), f'<span class="{"bad" if v else ""}">{short(v)}</span>') for k, v in figures["totals"].items()
    ]
    if faults:
        parts.append(table(("faults and repairs (0 is best)", "total"), faults))
    parts.append(_samples(run))
    for title, mapping in (("summary.json", run.summary), ("config.yaml", run.config)):
        if mapping:
            text = escape(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True))
            parts.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _samples(run: Run) -> str:
    """What the model wrote, best and worst by step; nothing without trees."""
    found = run.samples
    if not (found.leaves or found.notes):
        return ""
    rows = [
        (
            str(leaf.step),
            f"{leaf.reward:.3g}",
            escape(leaf.advantage),
            f'<div class="words"><span class="note">{escape(leaf.prompt)}</span> {escape(leaf.response)}</div>',
        )
        for leaf in found.leaves
    ]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)
    about = "best and worst leaf of a prompt; ├ stands at branch points, ⏎ at line ends"
    more = f"treepo-mega tree {escape(run.name)} shows whole trees."
    head = ("step", "reward", "advantage", "prompt and response")
    return (
        f'<h3>What the model wrote</h3><p class="note">{about}. {more}</p>{notes}<div class="samples">'
        f"{table(head, rows)}</div>"
    )
