"""What the learning bench's report adds to means: paired differences, ScaleRL's fit, and plots.

    paired(baseline, arm, rng)             differences of the same seeds, with an interval over seeds
    fitted(baseline, arm, "cpu_s")         asymptote and compute to equal accuracy, or why the data leave them open
    plot(name, arms, path)                 accuracy over tokens and over CPU seconds, a line an arm, a point a run

Arms are lists of results as tools/bench/learning.py stores them. Runs of one seed draw the same prompts in the same
order, so their difference has less noise than the difference of means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from treepo_mega.monitor.scaling_fit import Fit, fit, saving

Result = dict[str, Any]
AXES = {"tokens": "tokens, millions", "cpu_s": "CPU seconds of the steps"}


def paired(baseline: list[Result], arm: list[Result], rng: np.random.Generator, draws: int) -> dict[str, Any]:
    """Mean difference of final accuracy over common seeds, with the middle 95 % of `draws` bootstrap draws of seeds.

    One common seed has a difference and no interval; none has neither.
    """
    theirs = {result["seed"]: result["accuracy"] for result in baseline}
    found = np.array([result["accuracy"] - theirs[result["seed"]] for result in arm if result["seed"] in theirs])
    if not len(found):
        return {"paired_difference": None, "paired_ci95": None}
    ends = None
    if len(found) > 1:
        means = found[rng.integers(len(found), size=(draws, len(found)))].mean(axis=1)
        ends = [round(float(end), 4) for end in np.percentile(means, [2.5, 97.5])]
    return {"paired_difference": round(float(found.mean()), 4), "paired_ci95": ends}


def fit_of(results: list[Result], axis: str) -> Fit:
    """ScaleRL's curve through the runs of an arm."""
    curves = []
    for result in results:
        compute = np.array([point[axis] for point in result["curve"]], np.float64)
        curves.append((compute, np.array([point["accuracy"] for point in result["curve"]], np.float64)))
    return fit(curves)


def fitted(baseline: list[Result], arm: list[Result], axis: str) -> dict[str, Any]:
    """The arm's asymptote and its compute to equal accuracy over the baseline's; `problem` where it is not known."""
    ours = fit_of(arm, axis)
    if ours.problem:
        return {"problem": ours.problem}
    found = saving(ours, fit_of(baseline, axis))
    out: dict[str, Any] = {
        "asymptote": round(ours.asymptote, 4),
        "asymptote_ci95": [round(end, 4) for end in ours.intervals["asymptote"]],
    }
    if isinstance(found, str):
        return out | {"problem": found}
    ends = [round(end, 3) if np.isfinite(end) else None for end in found.interval]
    return out | {"ratio": round(found.ratio, 3), "ratio_ci95": ends, "at_accuracy": round(found.accuracy, 4)}


def plot(title: str, arms: dict[str, list[Result]], path: Path) -> None:
    """Write an SVG: accuracy over each of AXES; the mean of an arm's runs as a line, the runs' points beside it."""
    import matplotlib

    matplotlib.use("svg")
    # Without these the file would differ from run to run.
    matplotlib.rcParams["svg.hashsalt"] = title
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(11, 4.2), sharey=True)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        scale = 1e-6 if axis == "tokens" else 1.0
        for name, results in arms.items():
            compute = np.array([[point[axis] for point in result["curve"]] for result in results]) * scale
            accuracy = np.array([[point["accuracy"] for point in result["curve"]] for result in results])
            line = panel.plot(compute.mean(axis=0), accuracy.mean(axis=0), label=f"{name} ({len(results)})")[0]
            panel.plot(compute.ravel(), accuracy.ravel(), ".", markersize=3, alpha=0.5, color=line.get_color())
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy, temperature 1")
    panels[0].set_title(title, loc="left")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
