"""Results of a study: curves, and the comparison of its arms in numbers.

All numbers compare runs paired by seed: the same warm start, tasks and sampling streams. The only selection after the
fact is an arm's best point of the grid, which is labeled as such and reported next to the mean over all points.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..runs.files import replace_text
from ..runs.metrics_file import read_columns
from .numbers import Interval, summary
from .plan import Run, Study
from .statistics import first_reach, iqm_statistic, mean_over_curve, paired_differences, ratio_of_means
from .tables import csv_text

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


def read_curve(study: Study, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values [points] of a finished run's metric.

    Raises:
        UserError: the metrics cannot be read, or the metric was measured at fewer than two steps; lists the run's
            metrics.
    """
    try:
        columns = read_columns(run.folder / "metrics.csv")
    except UserError as error:
        raise UserError(f"{error}; remove {run.folder} to repeat the run") from None
    if study.metric not in columns or len(columns[study.metric][0]) < 2:
        there = ", ".join(sorted(name for name in columns if "/" in name))
        raise UserError(
            f"{run.folder}: metric={study.metric} was measured at fewer than two steps "
            f"(see trainer.check_val_every_n_epoch and max_epochs); the run's metrics are {there}"
        )
    return columns[study.metric]


def collect(study: Study, runs: list[Run]) -> Curves:
    """Read the curves of finished runs.

    Raises:
        UserError: no seed is complete, the metric is missing, or runs were measured at different steps.
    """
    found = {(run.arm, run.point, run.seed): read_curve(study, run) for run in runs}
    folders = {(run.arm, run.point, run.seed): run.folder for run in runs}
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
    mean = np.apply_along_axis(partial(mean_over_curve, steps), -1, curves.values)  # [arms, points, seeds]
    base, best = curves.arms.index(study.baseline), mean.mean(-1).argmax(1)
    scores = {"all": mean.mean(1), "best": mean[np.arange(len(best)), best]}  # [arms, seeds]
    paired: dict[str, Any] = {arm: {"points": []} for arm in curves.arms if arm != study.baseline}
    for name, of_arms in [*scores.items(), *((None, mean[:, p]) for p in range(len(curves.points)))]:
        family = paired_differences((of_arms[curves.arms.index(arm)], of_arms[base]) for arm in paired)
        for told, difference in zip(paired.values(), map(asdict, family), strict=True):
            difference |= _ends(difference.pop("interval"))
            if name is None:
                told["points"].append(difference)
            else:
                told[name] = difference
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
        "arms": {
            arm: {
                **_summary(study, steps, mean[i], curves.values[i]),
                "points": [
                    _summary(study, steps, mean[i, p : p + 1], curves.values[i, p : p + 1])
                    for p in range(len(curves.points))
                ],
            }
            for i, arm in enumerate(curves.arms)
        },
        "best_point": dict(zip(curves.arms, best.tolist(), strict=True)),
        "paired": paired,
        "headroom": _headroom(study, curves.arms, scores, paired),
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


def _summary(study: Study, steps: np.ndarray, mean: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Return the numbers of means over the curve [points, seeds] and curves [points, seeds, steps]."""
    runs = values.reshape(-1, len(steps))
    reached = [first_reach(steps, curve, study.threshold) for curve in runs]
    # a seed's runs are not independent: they are drawn together
    options: Any = {"of_means": iqm_statistic, "together": True, "collapse": study.collapse}
    found = summary(mean, values[..., -1], reached, runs, **options)
    return {
        "mean": {"iqm": found.mean, **_ends(found.mean_interval)},
        "final": {"iqm": found.final, **_ends(found.final_interval)},
        "to_threshold": None if found.reached == math.inf else found.reached,
        "reached": found.runs_reached / len(runs),
        "collapsed": found.collapsed,
    }


def _ends(interval: Interval) -> dict[str, float | None]:
    return dict(zip(("low", "high"), interval or (None, None), strict=True))


def _headroom(
    study: Study, arms: list[str], scores: dict[str, np.ndarray], paired: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the ceiling's gain over the baseline, and the other arms' shares of it, over all points and at the best.

    There are no shares if there is no interval of the ceiling's gain, or if it does not lie above zero.

    Args:
        study: the plan.
        arms: names.
        scores: ``all`` and ``best`` -> [arms, seeds].
        paired: as in the results.
    """
    if study.ceiling is None or study.ceiling not in arms:
        return None
    told: dict[str, Any] = {}
    for name in ("all", "best"):
        gaps = dict(zip(arms, scores[name] - scores[name][arms.index(study.baseline)], strict=True))
        top, gain = gaps[study.ceiling], paired[study.ceiling][name]
        there = None if gain["low"] is None else gain["low"] > 0
        ratios = {arm: ratio_of_means(gaps[arm], top) if there else None for arm in paired}
        told[name] = {
            "gain": gain["mean"],
            "low": gain["low"],
            "high": gain["high"],
            "there": there,
            "shares": {arm: ratio and ratio.ratio for arm, ratio in ratios.items()},
            "intervals": {arm: ratio and ratio.interval for arm, ratio in ratios.items()},
        }
    return told


def write_results(study: Study, curves: Curves, results: dict[str, Any], folder: Path) -> None:
    """Write the curves (one line per measurement) and the comparison to a folder."""
    rows: list[list[Any]] = [["arm", *study.grid, "seed", "step", study.metric]]
    for (i, p, s, step), value in np.ndenumerate(curves.values):
        rows.append([curves.arms[i], *curves.points[p], curves.seeds[s], int(curves.steps[step]), f"{value:.6g}"])
    replace_text(folder / CURVES, csv_text(rows))
    replace_text(folder / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
