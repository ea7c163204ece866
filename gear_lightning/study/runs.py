"""Runs of a comparison: content of their directories, and their grouping into arms."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..runs.metrics_file import read_columns
from ..runs.records import FORMAT
from .axes import AXES

# Axes of a curve: axis -> metric of `callbacks.throughput.Throughput`, counted since the start.
TASK = (  # config keys: if these differ, metrics are not comparable
    "data.train_tasks", "data.val_tasks", "data.val_limit", "generation.environment", "generation.budgets",
    "generation.success_threshold", "generation.val_sampling",
)  # fmt: skip
WATCHING = (  # config keys that do not affect training
    "ckpt_path", "weights_only", "recorder", "credit_map", "noise_floor.share", "noise_floor.weight_share",
    "samples", "progress", "preemption", "watchdog", "checkpoint", "trainer.default_root_dir", "trainer.logger",
    "trainer.enable_checkpointing", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.check_val_every_n_epoch", "trainer.val_check_interval", "first_evaluation", "data.eval_batch_size",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory as read. Two runs are equal only if they are the same object.

    Attributes:
        path: of the directory.
        config: every option, by its dotted name.
        columns: metric -> (optimizer steps, values), both [points], steps increasing, values finite.
        inner_epochs: optimizer steps of an iteration.
    """

    path: Path
    config: Mapping[str, Any]
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]]
    inner_epochs: int = 1

    def curve(self, metric: str, over: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a metric over an axis, where both are known.

        Args:
            metric: a column.
            over: a key of `AXES`.

        Returns:
            x values [points], increasing, and values [points].

        Raises:
            UserError: the run has not logged the axis at two points.
        """
        steps, values = self.columns[metric]
        counted = AXES[over]
        if counted is None:
            return steps / self.inner_epochs, values
        at, total = self.columns.get(counted, (np.zeros(1), np.zeros(1)))
        known = steps <= at[-1]
        places = np.interp(steps[known], np.concatenate([[0], at]), np.concatenate([[0], total]))
        rising = np.concatenate([[True], np.diff(places) > 0])
        if rising.sum() < 2:
            raise UserError(f"{self.path}: the run has not logged {over}; compare over iterations")
        return places[rising], values[known][rising]


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in the seed, or that the user has grouped.

    Attributes:
        name: for tables and figures.
        runs: at least one.
        differs: option -> its value here, for the options that distinguish the arms.
        seeds: the seed of each run; runs of two arms with the same seed are a pair.
    """

    name: str
    runs: tuple[Run, ...]
    differs: Mapping[str, str]
    seeds: tuple[str, ...]

    def by_seed(self) -> dict[str, list[Run]]:
        """Return the runs of each seed, in the order of the runs."""
        found: dict[str, list[Run]] = {}
        for seed, run in zip(self.seeds, self.runs, strict=True):
            found.setdefault(seed, []).append(run)
        return found


# -- reading ----------------------------------------------------------------------------------------------------------


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: not a run directory, files that cannot be read, or records of another format.
    """
    for name in ("config.yaml", "metrics.csv"):
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name}; is this the run directory (trainer.default_root_dir) of a fit?")
    _check_format(path)
    config = _read_config(path / "config.yaml")
    inner = config.get("data.inner_epochs", 1)
    if not isinstance(inner, int) or inner < 1:
        raise UserError(f"{path / 'config.yaml'}: data.inner_epochs={inner!r} is not a number of epochs")
    return Run(path, config, read_columns(path / "metrics.csv"), inner)


def _check_format(path: Path) -> None:
    newest = max((path / "rollouts").glob("iter_*.jsonl"), default=None)
    if newest is None:
        return
    with newest.open("rb") as file:
        line = file.readline()
    try:
        record = json.loads(line)
        found = record.get("format") if isinstance(record, dict) else None
    except (ValueError, RecursionError):
        raise UserError(f"{newest}: its first line is not a JSON object") from None
    if found != FORMAT:
        raise UserError(
            f"{newest}: record format {found!r}, this version reads {FORMAT}: another version wrote the run, and its "
            "metrics may mean something else"
        )


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError(f"{path}: not a config")
        return dict(_flat(config))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def _flat(config: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


# -- arms -------------------------------------------------------------------------------------------------------------


def check_metric(runs: list[Run], metric: str) -> None:
    """Check that all runs have a curve of a metric.

    Raises:
        UserError: a run has none; lists the metrics that it has.
    """
    for run in runs:
        points = len(run.columns[metric][0]) if metric in run.columns else 0
        if points < 2:
            there = sorted(name for name, (steps, _) in run.columns.items() if len(steps) > 1)
            lack = f"one value of {metric} is not a curve" if points else f"no metric {metric}"
            raise UserError(f"{run.path}: {lack}; there are {', '.join(there) or 'none with two values'}")


def check_tasks(runs: list[Run]) -> None:
    """Check that all runs have the same tasks.

    Raises:
        UserError: two runs differ; names the option and both values.
    """
    first = runs[0]
    for run in runs[1:]:
        for key in sorted({*first.config, *run.config}):
            ours, theirs = first.config.get(key), run.config.get(key)
            if _below(key, TASK) and not is_seed(key) and ours != theirs:
                raise UserError(
                    f"these runs have different tasks: {key} is {show(ours)} in {first.path} and {show(theirs)} in "
                    f"{run.path}; --allow-different-tasks compares them anyway"
                )


def is_seed(key: str) -> bool:
    """Return whether an option is a seed. The seed of the validation tasks is not: it selects the tasks."""
    return key.rpartition(".")[2] in ("seed", "seed_everything") and not key.startswith("data.val_tasks.")


def make_arms(runs: list[Run], groups: dict[Path, str]) -> list[Arm]:
    """Group runs into arms.

    Runs with the same label form an arm. The others are grouped by their configs, without seeds and options that do not
    affect training.

    Args:
        runs: in order; the first one's arm comes first.
        groups: label of the runs that have one, by path.

    Returns:
        The arms, named by the options that distinguish them.
    """
    varying = [key for key in _keys(runs) if not is_seed(key) and len({_at(run, key) for run in runs}) > 1]
    told = [key for key in varying if _is_shown(runs, key, varying)]
    seeds = [key for key in _keys(runs) if is_seed(key) and all(key in run.config for run in runs)]
    seeds = [key for key in seeds if len({_at(run, key) for run in runs}) > 1]
    members: dict[Any, list[Run]] = {}
    for run in runs:
        label = groups.get(run.path)
        members.setdefault(label or tuple(_at(run, key) for key in varying), []).append(run)
    arms = []
    for key, mine in members.items():
        differs = {option: " or ".join(dict.fromkeys(show(r.config.get(option)) for r in mine)) for option in told}
        has = [option for option in told if any(option in run.config for run in mine)]
        name = key if isinstance(key, str) else ", ".join(_short(told, option, differs[option]) for option in has)
        arms.append(Arm(name or _credit(mine[0]), tuple(mine), differs, tuple(_seed(run, seeds) for run in mine)))
    return [_numbered(arm, i, arms) for i, arm in enumerate(arms)]


def show(value: Any) -> str:
    """Return a config value as short text: the name of a class without its package."""
    text = "not set" if value is None else str(value) if not isinstance(value, float) else f"{value:g}"
    package, dot, name = text.rpartition(".")
    return name if dot and name.isidentifier() and all(part.isidentifier() for part in package.split(".")) else text


def _below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _keys(runs: list[Run]) -> list[str]:
    return sorted({key for run in runs for key in run.config if not _below(key, WATCHING)})


def _at(run: Run, key: str) -> str:
    """Return the value as text, for comparisons and sets. A missing option is not equal to null."""
    return repr(run.config[key]) if key in run.config else ""


def _is_shown(runs: list[Run], key: str, varying: list[str]) -> bool:
    """Return whether an option should be shown: not if it only exists because of another class."""
    if len({_at(run, key) for run in runs if key in run.config}) < 2:
        return False
    parent, inside, _ = key.rpartition(".init_args.")
    kind = f"{parent}.class_path"
    if not inside or kind not in varying:
        return True
    return len({(_at(run, kind), _at(run, key)) for run in runs}) > len({_at(run, kind) for run in runs})


def _short(told: list[str], option: str, value: str) -> str:
    """Return a short name: the class for ``model.credit.class_path``, lr=0.001 for ``model.optimizer.init_args.lr``."""
    if option.endswith(".class_path"):
        return value
    names = [name for name in option.split(".") if name != "init_args"]
    same = sum(other.rpartition(".")[2] == names[-1] for other in told) > 1
    return f"{'.'.join(names[-2:] if same else names[-1:])}={value}"


def _credit(run: Run) -> str:
    return show(run.config.get("model.credit.class_path", "runs"))


def _seed(run: Run, keys: list[str]) -> str:
    """Return one value if all varying seeds are equal, as with `slurm --seeds`."""
    values = {_at(run, key) for key in keys}
    return next(iter(values)) if len(values) == 1 else ", ".join(f"{key}={_at(run, key)}" for key in keys)


def _numbered(arm: Arm, place: int, arms: list[Arm]) -> Arm:
    """Number an arm whose name another arm has, too: their options differ in values without a short name."""
    if sum(other.name == arm.name for other in arms) == 1:
        return arm
    return Arm(f"{arm.name} ({place + 1})", arm.runs, arm.differs, arm.seeds)
