"""ScaleRL's curve of accuracy over compute, fitted to runs, and what it says: or why it says nothing.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)        Khatri et al., "ScaleRL", arXiv 2510.13786, equation 1

    found = fit([(gpu_hours, accuracies)])
    found.asymptote, found.intervals["asymptote"], found.problem
    saving(ours, baseline)             compute to the same accuracy, as a share of the baseline's

A is the asymptote, B the exponent, C_mid the compute at which half of the rise is reached. R0 is fitted, too: an
evaluation at compute 0 is a point like the others. Intervals are the middle 95 % of bootstrap draws: curves are drawn
again where there are three or more, else the residuals. A fit whose data leave a parameter open has a `problem`, and
its figures must not be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

Array = NDArray[np.float64]
Curve = tuple[Array, Array]
"""Compute (any unit, ascending, 0 allowed) and accuracy, both [points]."""

PARAMETERS = ("start", "asymptote", "exponent", "midpoint")
DRAWS = 200
DRAW_TRIES = 40
"""Steps of the solver for a draw, which begins at the best fit. One that needs more is left out and counted."""
FEWEST_POINTS = 6
MOST_POINTS = 48
"""Of a curve: more are averaged in bins, which costs nothing of the shape and saves time."""
EXPONENTS = (0.1, 10.0)
WIDEST = 0.5
"""Of the rise: a wider interval of the asymptote says that the data leave it open."""
FEWEST_CURVES_TO_DRAW = 3


@dataclass(frozen=True)
class Fit:
    """Parameters in the units of the data. `draws`: [draws, 4] in the order of PARAMETERS.

    `problem` says why the parameters are not identified; None when they are.
    """

    start: float
    asymptote: float
    exponent: float
    midpoint: float
    last_compute: float
    points: int
    draws: Array
    problem: str | None

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The middle 95 % of the draws, by parameter; empty without draws."""
        if not len(self.draws):
            return {}
        low, high = np.percentile(self.draws, [2.5, 97.5], axis=0)
        return {name: (float(low[at]), float(high[at])) for at, name in enumerate(PARAMETERS)}

    @property
    def last_value(self) -> float:
        """The curve at the largest compute of the data."""
        return float(value_at(self.last_compute, self.start, self.asymptote, self.exponent, self.midpoint))


@dataclass(frozen=True)
class Saving:
    """Compute to reach `accuracy`: ours / the baseline's, its 95 % interval, and the amounts themselves."""

    accuracy: float
    ratio: float
    interval: tuple[float, float]
    ours: float
    baseline: float


def value_at(compute: Any, start: Any, asymptote: Any, exponent: Any, midpoint: Any) -> Array:
    """R(C); `start` at compute 0.

    >>> float(value_at(4.0, 0.2, 0.8, 1.0, 4.0))
    0.5
    """
    with np.errstate(divide="ignore", over="ignore"):
        share = 1.0 / (1.0 + np.power(np.divide(midpoint, compute), exponent))
    return np.asarray(start + (asymptote - start) * share, np.float64)


def compute_to(value: Any, start: Any, asymptote: Any, exponent: Any, midpoint: Any) -> Array:
    """The inverse of `value_at`: 0 where the curve starts at or above `value`, infinite where it never gets there.

    >>> float(compute_to(0.5, 0.2, 0.8, 1.0, 4.0).round(9))
    4.0
    """
    value, start, asymptote, exponent, midpoint = np.broadcast_arrays(value, start, asymptote, exponent, midpoint)
    reached = (start < value) & (value < asymptote)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = midpoint * np.power((value - start) / (asymptote - value), 1.0 / exponent)
    return np.where(reached, found, np.where(value <= start, 0.0, np.inf))


def fit(curves: Sequence[Curve], *, ceiling: float | None = 1.0, draws: int = DRAWS, seed: int = 0) -> Fit:
    """One curve through all points of `curves`. `ceiling`: the largest value there can be; None for a reward."""
    binned = [_binned(curve) for curve in curves]
    compute, values = _joined(binned)
    problem = _too_little(compute, values)
    if problem:
        last = float(compute.max()) if len(compute) else 0.0
        return Fit(np.nan, np.nan, np.nan, np.nan, last, len(compute), np.empty((0, 4)), problem)
    best = _best(compute, values, ceiling)
    if best is None:
        problem = "no sigmoid could be fitted to these points"
        return Fit(np.nan, np.nan, np.nan, np.nan, float(compute.max()), len(compute), np.empty((0, 4)), problem)
    problem = _left_open(best, compute, values)
    drawn = np.empty((0, 4))
    if problem is None:
        drawn = _bootstrap(binned, best, ceiling, draws, np.random.default_rng(seed))
        problem = _too_wide(best, drawn, draws)
    return Fit(*best, last_compute=float(compute.max()), points=len(compute), draws=drawn, problem=problem)


def saving(ours: Fit, baseline: Fit) -> Saving | str:
    """What `ours` needs to reach the highest accuracy that both runs got to; a text says why that is not known."""
    for name, found in (("this run's", ours), ("the baseline's", baseline)):
        if found.problem:
            return f"{name} fit is not identified: {found.problem}"
    count = min(len(ours.draws), len(baseline.draws))
    sides = [_with_draws(found, count) for found in (ours, baseline)]
    # A draw has an accuracy of its own that both reach: the interval is of the whole procedure.
    accuracies = np.minimum(
        *(value_at(found.last_compute, *side) for found, side in zip((ours, baseline), sides, strict=True))
    )
    mine, theirs = (compute_to(accuracies, *side) for side in sides)
    if not (0 < mine[0] < np.inf and 0 < theirs[0] < np.inf):
        return f"one of the runs starts at or above the accuracy that both reach, {accuracies[0]:.3g}"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = mine[1:] / theirs[1:]
    ratios = np.where(np.isnan(ratios), np.inf, ratios)
    low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")
    whole = (float(low), float(high))
    return Saving(float(accuracies[0]), float(mine[0] / theirs[0]), whole, float(mine[0]), float(theirs[0]))


def _with_draws(found: Fit, count: int) -> Array:
    """[4, 1 + count]: the fit, then its draws."""
    best = [found.start, found.asymptote, found.exponent, found.midpoint]
    return np.array([best, *found.draws[:count]], np.float64).T


def _binned(curve: Curve) -> Curve:
    """Finite points in order of compute, at most MOST_POINTS of them: means of neighbours."""
    compute = np.asarray(curve[0], np.float64)
    values = np.asarray(curve[1], np.float64)
    finite = np.isfinite(compute) & np.isfinite(values) & (compute >= 0)
    order = np.argsort(compute[finite], kind="stable")
    compute = compute[finite][order]
    values = values[finite][order]
    if len(compute) <= MOST_POINTS:
        return compute, values
    parts = np.array_split(np.arange(len(compute)), MOST_POINTS)
    return np.array([compute[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def _joined(curves: Sequence[Curve]) -> Curve:
    if not curves:
        return np.empty(0), np.empty(0)
    return np.concatenate([curve[0] for curve in curves]), np.concatenate([curve[1] for curve in curves])


def _too_little(compute: Array, values: Array) -> str | None:
    beyond = len(np.unique(compute[compute > 0]))
    if len(compute) < FEWEST_POINTS or beyond < FEWEST_POINTS - 1:
        return f"{len(compute)} points, and four parameters need {FEWEST_POINTS} or more"
    if values.max() - values.min() < 1e-9:
        return "accuracy never changes"
    return None


def _bounds(compute: Array, values: Array, ceiling: float | None) -> tuple[list[float], list[float]]:
    spread = float(values.max() - values.min())
    highest = float(values.max()) + 2 * spread if ceiling is None else max(ceiling, float(values.max()))
    positive = compute[compute > 0]
    low = [float(values.min()) - spread, float(values.min()), EXPONENTS[0], float(np.log(positive.min() / 10))]
    # A start above every value would turn the curve around.
    high = [float(values.max()), highest + 1e-9, EXPONENTS[1], float(np.log(positive.max() * 10))]
    return low, high


def _curve(compute: Array, start: float, asymptote: float, exponent: float, log_midpoint: float) -> Array:
    return value_at(compute, start, asymptote, exponent, np.exp(log_midpoint))


def _slopes(compute: Array, start: float, asymptote: float, exponent: float, log_midpoint: float) -> Array:
    """d curve / d parameter, [points, 4]."""
    share = value_at(compute, 0.0, 1.0, exponent, np.exp(log_midpoint))
    # log(C / C_mid) is minus infinity at compute 0, where the product is 0.
    distance = np.log(np.where(compute > 0, compute, 1.0)) - log_midpoint
    bend = np.where(compute > 0, (asymptote - start) * share * (1 - share), 0.0)
    return np.stack([1 - share, share, bend * distance, -bend * exponent], axis=1)


def _solve(
    compute: Array, values: Array, first: Sequence[float], bounds: tuple[list[float], list[float]], tries: int = 200
) -> tuple[Array, float] | None:
    """(parameters with log of the midpoint, sum of squares); None where the solver gives up."""
    inside = np.clip(first, np.array(bounds[0]) + 1e-12, np.array(bounds[1]) - 1e-12)
    try:
        found, _ = curve_fit(_curve, compute, values, p0=inside, bounds=bounds, jac=_slopes, max_nfev=tries)
    except (RuntimeError, ValueError, OptimizeWarning):
        return None
    return found, float(np.sum((_curve(compute, *found) - values) ** 2))


def _best(compute: Array, values: Array, ceiling: float | None) -> tuple[float, float, float, float] | None:
    bounds = _bounds(compute, values, ceiling)
    positive = compute[compute > 0]
    tried = []
    # The sum of squares has several valleys: steep and early, flat and late.
    for exponent in (0.7, 1.5, 4.0):
        for share in (0.2, 0.5, 0.9):
            midpoint = float(np.log(np.quantile(positive, share)))
            tried.append(_solve(compute, values, [values.min(), values.max(), exponent, midpoint], bounds))
    found = [one for one in tried if one is not None]
    if not found:
        return None
    start, asymptote, exponent, log_midpoint = min(found, key=lambda one: one[1])[0]
    return float(start), float(asymptote), float(exponent), float(np.exp(log_midpoint))


def _bootstrap(
    curves: Sequence[Curve],
    best: tuple[float, float, float, float],
    ceiling: float | None,
    draws: int,
    rng: np.random.Generator,
) -> Array:
    """[draws that could be fitted, 4]."""
    compute, values = _joined(curves)
    bounds = _bounds(compute, values, ceiling)
    first = [*best[:3], float(np.log(best[3]))]
    fitted = value_at(compute, *best)
    # A fit with four parameters leaves residuals that are too small by this factor.
    residuals = (values - fitted) * np.sqrt(len(values) / max(1, len(values) - 4))
    out = []
    for _ in range(draws):
        if len(curves) >= FEWEST_CURVES_TO_DRAW:
            some = _joined([curves[at] for at in rng.integers(len(curves), size=len(curves))])
        else:
            some = (compute, fitted + rng.choice(residuals, size=len(residuals)))
        if (found := _solve(*some, first, bounds, DRAW_TRIES)) is not None:
            out.append([*found[0][:3], np.exp(found[0][3])])
    return np.array(out, np.float64).reshape(-1, 4)


def _left_open(best: tuple[float, float, float, float], compute: Array, values: Array) -> str | None:
    """Why the data do not say what the parameters are; None if they may."""
    _, _, exponent, midpoint = best
    noise = float(np.sqrt(np.mean((value_at(compute, *best) - values) ** 2)))
    seen = float(value_at(compute.max(), *best) - value_at(compute.min(), *best))
    if seen <= 2 * noise:
        return f"the rise of {seen:.3g} is not above the noise of {noise:.3g}"
    if midpoint > compute.max():
        return "the run ends before half of the rise, so that the asymptote is a guess"
    if not EXPONENTS[0] * 1.01 < exponent < EXPONENTS[1] * 0.99:
        return f"the exponent is at its limit, {exponent:.3g}: the rise is a step or has no bend"
    return None


def _too_wide(best: tuple[float, float, float, float], drawn: Array, draws: int) -> str | None:
    """Why the draws do not agree on the asymptote; None if they do."""
    if len(drawn) <= draws // 2:
        return f"only {len(drawn)} of {draws} bootstrap draws could be fitted"
    low, high = np.percentile(drawn[:, 1], [2.5, 97.5])
    if high - low > WIDEST * (best[1] - best[0]):
        return f"the asymptote lies anywhere in {low:.3g} to {high:.3g}"
    return None
