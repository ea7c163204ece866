"""``gear-lightning study``: one recipe with several arms, learning rates and seeds, and the results.

A study is planned before it runs: every arm is crossed with every value of the grid and every seed. Runs with the same
seed begin with the same warm start and draw the same tasks in the same order. A study resumes where it stopped.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.packaged import found

Value = str | bool | int | float | list[Any] | dict[str, Any] | None  # str first: "{x}" is not a mapping


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        arm: its arm.
        point: its values of the grid, in the grid's order.
        seed: from 0.
        block: number of its warm start; runs of a block share it.
        folder: its run directory.
        options: options of ``gear-lightning fit``, without the run directory.
    """

    arm: str
    point: tuple[Any, ...]
    seed: int
    block: int
    folder: Path
    options: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """The configuration files among the options."""
        return [option.removeprefix("--config=") for option in self.options if option.startswith("--config=")]

    @property
    def arguments(self) -> list[str]:
        """The command line after ``gear-lightning``."""
        return ["fit", *self.options, f"--trainer.default_root_dir={self.folder}"]

    def __str__(self) -> str:
        return " ".join([self.arm, *map(str, self.point), f"seed {self.seed}"])


@dataclass(frozen=True)
class Study:
    """Plan of a comparison: arms, recipe, grid and seeds.

    Args:
        recipe: configuration files of every run, stacked in this order.
        arms: the compared variants: name -> options of ``fit`` (dotted key -> value), none of them in ``grid`` or
            ``per_seed``. The key ``config`` stacks a file, or a list of files, on the recipe.
        grid: options -> values that are declared before the study and crossed with every arm (learning rates).
        options: options of every run (dotted key -> value).
        per_seed: options -> text in which ``{seed}`` and ``{block}`` are replaced: these make the seeds differ.
        seeds: runs of each arm at each point of the grid.
        blocks: number of warm starts; seed s has warm start s modulo blocks. All options that determine a warm start
            (the policy, the demonstrations, the teacher's privileged text) must be equal in all arms, or the arms begin
            with different weights.
        metric: the compared metric, a column of the runs' metrics.
        baseline: arm that the others are compared with.
        ceiling: arm with information that the others must infer; gains are also reported as shares of its gain, and
            may exceed 100 %. Null: none.
        threshold: the study reports the number of updates until the metric first reaches this value.
        collapse: a run that ends below this fraction of its best value so far has collapsed; between 0 and 1.
        out: folder of the study.
        jobs: number of parallel runs. Null: one for each core. If there are GPUs, each run sees one of them.

    Raises:
        UserError: the plan cannot be run; the message says what to change.
    """

    recipe: list[str]
    arms: dict[str, dict[str, Value]]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    options: dict[str, Value] = field(default_factory=dict)
    per_seed: dict[str, str] = field(default_factory=dict)
    seeds: int = 10
    blocks: int = 1
    metric: str = "val/success"
    baseline: str = "GRPO"
    ceiling: str | None = None
    threshold: float = 0.8
    collapse: float = 0.5
    out: str = "runs/study"
    jobs: int | None = None

    def __post_init__(self):
        for name in ("seeds", "blocks", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if not self.arms or not self.recipe:
            raise UserError("a study needs a recipe and arms")
        if not math.isfinite(self.threshold):
            raise UserError(f"threshold={self.threshold} must be a number")
        if not 0 <= self.collapse <= 1:
            raise UserError(f"collapse={self.collapse} must lie between 0 and 1")
        for name in ("baseline", "ceiling"):
            if (arm := getattr(self, name)) is not None and arm not in self.arms:
                raise UserError(f"{name}={arm} is not one of the arms: {', '.join(self.arms)}")
        if self.ceiling == self.baseline:
            raise UserError(f"ceiling={self.ceiling} is the baseline; use an arm with more information as ceiling")
        if "config" in self.options:
            raise UserError("options: config would stack a file on top of the arms' files; add it to recipe")
        for arm in self.arms:
            if not arm or not all(c.isalnum() or c in "-_.+ " for c in arm) or arm.startswith("."):
                raise UserError(f"arms: {arm!r} cannot name a folder; use letters, digits, spaces and -_.+")
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"grid: {key} has no values")
            if len({_label(value) for value in values}) < len(values):
                raise UserError(f"grid: {key} has the same value twice: {values}")
        for name, given in (("options", self.options), *((f"arms: {arm}", own) for arm, own in self.arms.items())):
            if nested := [key for key, value in given.items() if isinstance(value, dict)]:
                raise UserError(
                    f"{name}: {nested[0]} is a mapping; write options as in `fit`, `{nested[0]}.key: value`, in the "
                    "study's file"
                )
        if self.seeds > 1 and not any("{seed}" in text for text in self.per_seed.values()):
            raise UserError(
                "per_seed has no option with {seed}, so that all seeds would give the same run; use "
                'per_seed: {data.seed: "{seed}"}'
            )
        drawn = {**dict.fromkeys(self.grid, "grid"), **dict.fromkeys(self.per_seed, "per_seed")}
        for name, own in (("options", self.options), *((f"arms: {arm}", own) for arm, own in self.arms.items())):
            if twice := next((key for key in own if key in drawn), None):
                raise UserError(f"{name}: {twice} is set by {drawn[twice]}, for all runs; remove it from one of them")
        if twice := next((key for key in self.per_seed if key in self.grid), None):
            raise UserError(f"per_seed and grid both set {twice}")
        for path in (*self.recipe, *(path for arm in self.arms.values() for path in _files(arm))):
            if not Path(found(path)).is_file():
                raise UserError(f"{path}: no such file (paths are relative to the working directory)")
        for key, text in self.per_seed.items():
            try:
                text.format(seed=0, block=0)
            except (LookupError, ValueError, AttributeError) as error:
                raise UserError(f"per_seed: {key}={text!r} may contain only {{seed}} and {{block}} ({error})") from None

    @property
    def points(self) -> list[tuple[Any, ...]]:
        """Every combination of the grid's values."""
        return list(itertools.product(*self.grid.values()))

    @property
    def runs(self) -> list[Run]:
        """All runs, ordered by seed, so that a stopped study has compared all arms on the seeds that are complete."""
        return list(self._runs())

    def _runs(self) -> Iterator[Run]:
        for seed in range(self.seeds):
            for point in self.points:
                for arm, options in self.arms.items():
                    block = seed % self.blocks
                    given = [f"--config={found(path)}" for path in [*self.recipe, *_files(options)]]
                    own = {key: value for key, value in options.items() if key != "config"}
                    drawn = {key: text.format(seed=seed, block=block) for key, text in self.per_seed.items()}
                    chosen = dict(zip(self.grid, point, strict=True))
                    for key, value in {**self.options, **drawn, **chosen, **own}.items():
                        given.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
                    folder = Path(self.out, "runs", arm, *(_label(x) for x in point), f"seed_{seed:02d}")
                    yield Run(arm, point, seed, block, folder, tuple(given))


def _files(options: dict[str, Any]) -> list[str]:
    found = options.get("config") or []
    return [found] if isinstance(found, str) else list(found)


def _label(value: Any) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in f"{value}")
