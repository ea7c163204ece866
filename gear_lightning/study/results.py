"""Results of a study: curves, and the comparison of its arms in numbers.

All numbers compare runs paired by seed: the same warm start, tasks and sampling streams. The only selection after the
fact is an arm's best point of the grid, which is labeled as such and reported next to the mean over all points.
"""

import csv
import io
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..runs.files import replace_text
from ..runs.metrics_file import read_columns
from .plan import Run, Study
from .statistics import (
    bootstrap_interval,
    collapse_rate,
    first_reach,
    holm,
    interquartile_mean,
    iqm_statistic,
    lower_median,
    mean_over_curve,
    paired_difference,
    ratio_of_means,
)

CURVES, RESULTS = "curves.csv", "results.json"


@dataclass(frozen=True)
class Curves:
    """The metric of the finished runs.

    Attributes:
        arms: names; an arm is omitted if no seed of it has all points of the grid.
        points: of the grid.
        seeds: seeds for which every arm has every point: the others cannot be paired.
        steps: [steps] optimizer steps at which the metric was measured.
        values: [arms, points, seeds, steps].
    """

    arms: list[str]
    points: list[tuple[Any, ...]]
    seeds: list[int]
    steps: np.ndarray
    values: np.ndarray


def check_run(study: Study, run: Run) -> None:
    """Check a finished run before similar ones are started.

    Raises:
        UserError: the metric was measured at fewer than two steps; lists the run's metrics.
    """
    columns = _columns(run)
    if study.metric not in columns or len(columns[study.metric][0]) < 2:
        there = ", ".join(sorted(name for name in columns if "/" in name))
        raise UserError(
            f"{run.folder}: metric={study.metric} was measured at fewer than two steps "
            f"(see trainer.check_val_every_n_epoch and max_epochs); the run's metrics are {there}"
        )


def _columns(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        return read_columns(run.folder / "metrics.csv")
    except UserError as error:
        raise UserError(f"{error}; remove {run.folder} to repeat the run") from None


def collect(study: Study, runs: list[Run]) -> Curves:
    """Read the curves of finished runs.

    Raises:
        UserError: no seed is complete, the metric is missing, or runs were measured at different steps.
    """
    found: dict[tuple[str, tuple[Any, ...], int], tuple[np.ndarray, np.ndarray]] = {}
    folders: dict[tuple[str, tuple[Any, ...], int], Path] = {}
    for run in runs:
        columns = _columns(run)
        if study.metric not in columns:
            raise UserError(f"{run.folder}: its metrics do not contain {study.metric}")
        found[run.arm, run.point, run.seed] = columns[study.metric]
        folders[run.arm, run.point, run.seed] = run.folder
    whole = {
        arm: {s for s in range(study.seeds) if all((arm, point, s) in found for point in study.points)}
        for arm in study.arms
    }
    arms = [arm for arm, complete in whole.items() if complete]
    seeds = sorted(set.intersection(*(whole[arm] for arm in arms))) if study.baseline in arms else []
    if not seeds:
        raise UserError("no seed of the baseline and another arm has all points of the grid yet: nothing can be paired")
    kept = {key: curve for key, curve in found.items() if key[0] in arms and key[2] in seeds}
    at = Counter(tuple(steps.astype(int).tolist()) for steps, _ in kept.values())
    usual = at.most_common(1)[0][0]
    for key, (steps, _) in kept.items():
        if (own := tuple(steps.astype(int).tolist())) != usual:
            raise UserError(
                f"{folders[key]}: {study.metric} was measured at other steps ({_some(own, usual)}) than in "
                f"{at[usual]} of {len(kept)} runs ({_some(usual, own)}); remove that folder to repeat the run"
            )
    values = np.array([[[kept[arm, point, seed][1] for seed in seeds] for point in study.points] for arm in arms])
    return Curves(arms, study.points, seeds, np.array(usual, dtype=float), values)


def _some(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    """Return the number of our steps, and the first of those that the other does not have."""
    own = [step for step in ours if step not in theirs]
    return f"{len(ours)} in total" + (f", only here {', '.join(map(str, own[:3]))}" if own else "")


def analyse(study: Study, curves: Curves) -> dict[str, Any]:
    """Return the comparison as plain data.

    Returns:
        ``arms``: per arm ``mean`` and ``final`` (mean over the curve and last value: interquartile mean over seeds and
        points, and its bootstrap interval over seeds), ``to_threshold`` (lower median of the updates, null if most runs
        never reach it), ``collapsed``, and ``points`` with the same per point of the grid; ``paired``: compared with
        the baseline, per arm: ``all`` points (mean over them), ``best`` point of each, and each of the ``points``;
        ``headroom``: the ceiling's gain over ``all`` points and at its ``best``, each arm's share of it, and the
        shares' Fieller ``intervals`` (95 %, over seeds; they do not account for the choice of an arm's best point);
        ``left_out``: arms that no seed has completed; ``begin_elsewhere``: arms whose first values differ from the
        baseline's, so that they differ in more than intended; ``blocks``: the seeds of each warm start, and the mean
        gain of each over all points (``gains``: arm -> warm starts).
    """
    steps = curves.steps
    mean = np.array([[[mean_over_curve(steps, c) for c in seeds] for seeds in arm] for arm in curves.values])
    final = curves.values[..., -1]
    arms = {}
    for i, arm in enumerate(curves.arms):
        of_points = [_summary(mean[i, p : p + 1], final[i, p : p + 1], curves.values[i, p], study, steps)
                     for p in range(len(curves.points))]  # fmt: skip
        flat = curves.values[i].reshape(-1, len(steps))
        arms[arm] = {**_summary(mean[i], final[i], flat, study, steps), "points": of_points}
    base = curves.arms.index(study.baseline)
    best = [int(mean[i].mean(-1).argmax()) for i in range(len(curves.arms))]
    others = [i for i in range(len(curves.arms)) if i != base]
    paired: dict[str, Any] = {}
    scores = {  # [arms, seeds]
        "all": mean.mean(1),
        "best": np.array([mean[i, best[i]] for i in range(len(curves.arms))]),
        **{str(p): mean[:, p] for p in range(len(curves.points))},
    }
    for name, of_arms in scores.items():
        family = [(i, paired_difference(of_arms[i], of_arms[base])) for i in others]
        adjusted = holm(np.array([d.test.p for _, d in family]))
        for (i, difference), p in zip(family, adjusted, strict=True):
            low, high = difference.interval or (None, None)
            told = {**asdict(difference), "low": low, "high": high, "holm": float(p)}
            del told["interval"]
            if name in ("all", "best"):
                paired.setdefault(curves.arms[i], {})[name] = told
            else:
                paired.setdefault(curves.arms[i], {}).setdefault("points", []).append(told)
    return {
        "metric": study.metric,
        "baseline": study.baseline,
        "ceiling": study.ceiling,
        "grid": list(study.grid),
        "points": [list(point) for point in curves.points],
        "seeds": len(curves.seeds),
        "left_out": [arm for arm in study.arms if arm not in curves.arms],
        "begin_elsewhere": [
            arm for i, arm in enumerate(curves.arms) if (curves.values[i, ..., 0] != curves.values[base, ..., 0]).any()
        ],
        "steps": [int(step) for step in steps],
        "start": float(curves.values[..., 0].mean()),
        "arms": arms,
        "best_point": {arm: best[i] for i, arm in enumerate(curves.arms)},
        "paired": paired,
        "headroom": _headroom(
            study, curves.arms, {name: scores[name] - scores[name][base] for name in ("all", "best")}
        ),
        "blocks": _blocks(study, curves, mean, base),
    }


def _blocks(study: Study, curves: Curves, mean: np.ndarray, base: int) -> dict[str, Any]:
    """Return the seeds and the mean gains of each warm start, from scores [arms, points, seeds]."""
    of_seed = np.array([seed % study.blocks for seed in curves.seeds])
    there = sorted(set(of_seed.tolist()))
    gaps = (mean - mean[base]).mean(1)
    gains = {arm: [float(gaps[i, of_seed == block].mean()) for block in there] for i, arm in enumerate(curves.arms)}
    del gains[study.baseline]
    return {"seeds": [int((of_seed == block).sum()) for block in there], "gains": gains}


def _summary(mean: np.ndarray, final: np.ndarray, curves: np.ndarray, study: Study, steps: np.ndarray) -> dict:
    """Return the numbers of scores [points, seeds] and curves [runs, steps]."""
    reached = [first_reach(steps, curve, study.threshold) for curve in curves]
    median = lower_median(reached)
    return {
        "mean": _with_interval(mean),
        "final": _with_interval(final),
        "to_threshold": median if math.isfinite(median) else None,
        "reached": float(np.isfinite(reached).mean()),
        "collapsed": collapse_rate(curves, study.collapse),
    }


def _with_interval(scores: np.ndarray) -> dict[str, float | None]:
    if scores.shape[1] < 2:
        return {"iqm": interquartile_mean(scores), "low": None, "high": None}
    low, high = bootstrap_interval(scores, iqm_statistic, together=True)  # a seed's runs are not independent
    return {"iqm": interquartile_mean(scores), "low": float(low), "high": float(high)}


def _headroom(study: Study, arms: list[str], gains: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Return the ceiling's gain over the baseline, and the other arms' shares of it, over all points and at the best.

    There are no shares if there is no interval of the ceiling's gain, or if it does not lie above zero.

    Args:
        study: the plan.
        arms: names.
        gains: over the baseline: ``all`` and ``best`` -> [arms, seeds].
    """
    if study.ceiling is None or study.ceiling not in arms:
        return None
    told: dict[str, Any] = {}
    for name, gaps in gains.items():
        top = gaps[arms.index(study.ceiling)]
        gain = paired_difference(top, np.zeros_like(top))
        low, high = gain.interval or (None, None)
        there = None if low is None else low > 0
        others = [arm for arm in arms if arm != study.baseline]
        ratios = {arm: ratio_of_means(gaps[arms.index(arm)], top) if there else None for arm in others}
        told[name] = {
            "gain": gain.mean,
            "low": low,
            "high": high,
            "there": there,
            "shares": {arm: ratio and ratio.ratio for arm, ratio in ratios.items()},
            "intervals": {arm: ratio and ratio.interval for arm, ratio in ratios.items()},
        }
    return told


def write_results(study: Study, curves: Curves, results: dict[str, Any], folder: Path) -> None:
    """Write the curves (one line per measurement) and the comparison to a folder."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["arm", *study.grid, "seed", "step", study.metric])
    for i, arm in enumerate(curves.arms):
        for p, point in enumerate(curves.points):
            for s, seed in enumerate(curves.seeds):
                for step, value in zip(curves.steps, curves.values[i, p, s], strict=True):
                    writer.writerow([arm, *point, seed, int(step), f"{value:.6g}"])
    replace_text(folder / CURVES, text.getvalue())
    replace_text(folder / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
