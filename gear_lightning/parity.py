"""`gear-lightning parity`: train a recipe for a few iterations under several strategies and compare what came out."""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError

ZERO = "gear_lightning.strategies.ZeRO"
STRATEGIES = {  # name -> value of trainer.strategy; configs/strategy holds the same as files, which no wheel has
    "ddp": {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"gradient_as_bucket_view": True},
    },
    "fsdp": {"class_path": "gear_lightning.strategies.FSDP2"},
    "zero1": {"class_path": ZERO, "init_args": {"stage": 1}},
    "zero2": {"class_path": ZERO, "init_args": {"stage": 2}},
    "zero3": {"class_path": ZERO, "init_args": {"stage": 3}},
    "zero3_offload": {
        "class_path": ZERO,
        "init_args": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    },
}
COMPARED = ("policy_logprobs", "divergence", "weights", "token_advantages")
TOLERANCE = {"32-true": 1e-5, "64-true": 1e-5}
EQUAL, DIFFERENT, UNTRAINED = 0, 1, 3  # exit statuses; 2 is an error
OWN = {  # options of fit that parity sets itself -> what to do
    "trainer.default_root_dir": "give --out DIR, which keeps the runs there",
    "trainer.max_epochs": "give --iterations",
    "trainer.devices": "give --devices",
    "trainer.num_nodes": "all processes are on this machine",
}


@dataclass(frozen=True)
class Comparison:
    """How far a run is from the reference.

    Attributes:
        same_ids: whether all sampled ids are the same.
        worst: quantity -> largest difference, as a share of the largest value that the reference has of it; weights
            are compared tensor by tensor, and the loss is at least one of the mean size of its terms.
        parted: where sampled ids differ for the first time, and how far the log-probs were apart until then.
    """

    same_ids: bool
    worst: dict[str, float]
    parted: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether the ids are the same and no quantity is further off than the tolerance."""
        return self.same_ids and all(value <= tolerance for value in self.worst.values())  # False for NaN

    def gradients_within(self, tolerance: float) -> bool:
        """Whether all but the weights is within the tolerance."""
        before = {name: value for name, value in self.worst.items() if name not in ("policy", "teacher")}
        return Comparison(self.same_ids, before).within(tolerance)


def _share(reference: Tensor, other: Tensor, at_least: float = 0.0) -> float:
    """Largest difference as a share of the reference's largest value, or of ``at_least`` where that is more; the
    difference itself where both are 0."""
    if reference.shape != other.shape:
        return float("inf")
    if not reference.numel():
        return 0.0
    reference, other = reference.double(), other.double()
    scale = max(float(reference.abs().max()), at_least)
    return float((reference - other).abs().max()) / (scale or 1.0)


Rollouts = dict[tuple[int, int, int], dict[str, Tensor]]


def read_rollouts(run: Path) -> Rollouts:
    """(iteration, group, rollout) -> what the records hold of it, without padding."""
    from .records import read_records

    found = {}
    for record in read_records(run):
        for line in record.rollouts:
            row, mine = line["row"], {}
            if row is not None:
                length = int(record.tensors["valid"][row].sum())
                mine = {k: v[row][:length] for k, v in record.tensors.items() if v.dim() > 1}
            found[line["iteration"], line["group_id"], line["rollout"]] = mine
    return found


def _metrics(run: Path, name: str) -> Tensor:
    import torch

    with (run / "metrics.csv").open() as file:
        return torch.tensor([float(row[name]) for row in csv.DictReader(file) if row.get(name)])


def compare(reference: Path, other: Path) -> Comparison:
    """Compare two run directories.

    Raises:
        UserError: a run has no records.
    """
    import torch

    ours, theirs = read_rollouts(reference), read_rollouts(other)
    same = ours.keys() == theirs.keys() and all(
        ours[key].keys() == theirs[key].keys()
        and all(torch.equal(ours[key][n], theirs[key][n]) for n in ("tokens", "action_mask") if n in ours[key])
        for key in ours
    )
    worst = {}
    for name in COMPARED:
        if not same:
            worst[name] = float("inf")
            continue
        pairs = [(ours[key][name], theirs[key][name]) for key in ours if name in ours[key]]
        worst[name] = _share(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])) if pairs else 0.0
    # a loss of the first epoch on its rollouts is a sum of advantages that cancel: what is left is rounding
    terms = [ours[key]["token_advantages"].double().abs().flatten() for key in ours if "token_advantages" in ours[key]]
    term = float(torch.cat(terms).mean()) if terms else 0.0
    worst["train/loss"] = _share(_metrics(reference, "train/loss"), _metrics(other, "train/loss"), at_least=term)
    worst["train/grad_norm"] = _share(_metrics(reference, "train/grad_norm"), _metrics(other, "train/grad_norm"))
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, mmap=True) for run in (reference, other)]
    worst.update(compare_weights(*(state["state_dict"] for state in states)))
    return Comparison(same, worst, "" if same else parted(ours, theirs))


def parted(ours: Rollouts, theirs: Rollouts) -> str:
    """Where the ids of two runs differ for the first time: iteration (from 1), group, rollout and token (from 0)."""
    gap = 0.0
    for key in sorted(ours.keys() | theirs.keys()):
        place = "iteration {}, group {}, rollout {}".format(key[0] + 1, *key[1:])
        if key not in ours or key not in theirs:
            return f"{place}, which only one of the runs has"
        mine, other = (run[key].get("tokens") for run in (ours, theirs))
        if mine is None or other is None:
            if mine is not other:
                return f"{place}, whose tokens only one of the runs has"
            continue
        length = min(len(mine), len(other))
        differ = (mine[:length] != other[:length]).nonzero()
        same = int(differ[0]) if len(differ) else length
        before, after = (run[key]["policy_logprobs"][:same] for run in (ours, theirs))
        gap = max([gap, *(before - after).abs().tolist()])
        if same < max(len(mine), len(other)):
            return f"{place}, token {same}; until there log-probs are within {gap:.1e} nats"
    return "no sampled token, but in what counts as the policy's"


def idle_iterations(run: Path) -> list[int]:
    """Iterations of a run, from 0, whose gradient was 0: where no group has any spread of rewards, say."""
    return [i for i, norm in enumerate(_metrics(run, "train/grad_norm").tolist()) if norm == 0]


def compare_weights(reference: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """``policy`` and ``teacher`` -> largest difference of a tensor, as a share of its largest value."""
    if reference.keys() != other.keys():
        return {"policy": float("inf")}
    worst = {"policy": 0.0}
    for name, value in reference.items():
        if value.is_floating_point():
            whose = "teacher" if name.startswith("teacher.") or ".teacher." in name else "policy"
            worst[whose] = max(worst.get(whose, 0.0), _share(value, other[name]))
    return worst


def train(options: list[str], run: Path, deadline: float) -> str | None:
    """Run ``fit`` in a process of its own. Returns None, or the line that tells why it failed."""
    command = [sys.executable, "-m", "gear_lightning", "fit", *options, f"--trainer.default_root_dir={run}"]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return f"not done within {deadline:g} s"
        except BaseException:
            os.killpg(process.pid, 9)
            raise
    lines = [line for line in (run / "log.txt").read_text().splitlines() if "rror" in line]
    return None if status == 0 else (lines or ["no message"])[-1].removeprefix("gear-lightning: error: ")


def parity_command(argv: list[str]) -> int:
    """``gear-lightning parity``."""
    parser = argparse.ArgumentParser(
        "gear-lightning parity",
        description="Train a recipe for a few iterations in one process and under several strategies, from the same "
        "weights and seeds, and compare rollouts, credit, losses and weights. All other options are those of fit.",
        epilog=f"Exit status: {EQUAL} all are equal, {DIFFERENT} they differ or one failed, {UNTRAINED} nothing was "
        "trained, so that there is nothing to compare.",
        allow_abbrev=False,
    )
    parser.add_argument("--strategies", default="ddp,fsdp,zero1,zero2,zero3", help="comma-separated: %(default)s")
    parser.add_argument("--iterations", type=int, default=3, help="RL iterations (default %(default)s)")
    parser.add_argument("--devices", type=int, help="processes of each strategy (default: all GPUs, else 2)")
    parser.add_argument("--reference", default="one", help="one (a single process, the default), or a strategy")
    parser.add_argument("--resume", action="store_true", help="stop every strategy's run half way and go on")
    parser.add_argument("--tolerance", type=float, help="largest share that counts as equal (default 1e-5 in float32)")
    parser.add_argument(
        "--out", type=Path, help="directory for the runs, kept (default: a temporary one, removed where all are equal)"
    )
    parser.add_argument("--deadline", type=float, default=3600, help="seconds for each run (default %(default)s)")
    options, rest = parser.parse_known_args(argv)
    names = options.strategies.split(",")
    known = {"one": []} | {n: [f"--trainer.strategy={json.dumps(value)}"] for n, value in STRATEGIES.items()}
    for name in [*names, options.reference]:
        if name not in known:
            raise UserError(f"no strategy {name!r}; there are {', '.join(STRATEGIES)}")
    if options.iterations < 1 or (options.resume and options.iterations < 2):
        raise UserError(f"--iterations {options.iterations} must be at least {2 if options.resume else 1}")
    if not any(arg.startswith("--config") for arg in rest):
        raise UserError("--config RECIPE is missing")
    for argument in rest:
        if advice := OWN.get(argument.partition("=")[0].removeprefix("--")):
            raise UserError(f"{argument.partition('=')[0]} does nothing in parity: {advice}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `train` then ends its process, too
    return _run(options, names, known, rest)


def _run(options: argparse.Namespace, names: list[str], known: dict[str, list[str]], rest: list[str]) -> int:
    import torch

    devices = options.devices or (torch.cuda.device_count() if torch.cuda.device_count() > 1 else 2)
    out = (options.out or Path(tempfile.mkdtemp(prefix="parity-"))).resolve()
    if options.out is not None and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {options.out}: exists and is not empty")
    common = [
        *rest,
        "--trainer.limit_val_batches=0",
        "--trainer.num_nodes=1",
        "--credit_map.every_n_iterations=1000000",
    ]
    common += ["--checkpoint.every_n_epochs=1", "--checkpoint.save_top_k=1", "--recorder.every_n_iterations=1"]

    def play(name: str) -> str | None:
        mine = [*common, *known[name], f"--trainer.devices={1 if name == 'one' else devices}"]
        whole = [*mine, f"--trainer.max_epochs={options.iterations}"]
        if options.resume and name != options.reference:
            half = [*mine, f"--trainer.max_epochs={options.iterations // 2}"]
            failed = train(half, out / name, options.deadline)
            return failed or train([*whole, "--ckpt_path=last"], out / name, options.deadline)
        return train(whole, out / name, options.deadline)

    print(f"{options.reference}: the reference; logs and runs are in {out}", flush=True)
    if failed := play(options.reference):
        raise UserError(f"the reference run failed: {failed} (see {out / options.reference / 'log.txt'})")
    idle = idle_iterations(out / options.reference)
    if not _metrics(out / options.reference, "train/grad_norm").any():  # none, too, where no step had any
        print(f"\n{_untrained(options.iterations)}\n\n{_kept(out)}")
        return UNTRAINED
    results: dict[str, Comparison | str] = {}
    for name in [n for n in names if n != options.reference]:
        print(f"{name}: {devices} processes", flush=True)
        results[name] = play(name) or compare(out / options.reference, out / name)
    precision = _precision(out / options.reference)
    tolerance = options.tolerance or TOLERANCE.get(precision, 5e-2)
    print(table(results, tolerance))
    if idle:
        told = ", ".join(str(i + 1) for i in idle)
        print(
            f"\nThe gradient was 0 in {len(idle)} of {options.iterations} iterations ({told}), as where rewards have "
            "no spread: there, rollouts and credit were compared, and no update."
        )
    done = [r for r in results.values() if isinstance(r, Comparison)]
    for name, result in results.items():
        if isinstance(result, Comparison) and not result.same_ids:
            print(f"\n{name}: sampled ids differ from {result.parted}.")
    if not all(r.same_ids for r in done):
        print(
            "\nWhere log-probs agree until there, it is a token on the edge of two, which rounding decides; whatever "
            "comes after it differs. Compare fewer iterations, or another seed."
        )
    if any(not r.within(tolerance) and r.gradients_within(tolerance) for r in done):
        print(
            "\nWhere only weights differ, the optimizer made it: Adam divides a gradient by its own size, so that "
            "rounding in gradients near zero comes back at the size of the learning rate. Compare with a lower one."
        )
    equal = all(isinstance(r, Comparison) and r.within(tolerance) for r in results.values())
    print(f"\n{'All equal' if equal else 'NOT all equal'} to {options.reference} within {tolerance:g} ({precision}).")
    if equal and options.out is None:
        shutil.rmtree(out, ignore_errors=True)
    else:
        print(_kept(out))
    return EQUAL if equal else DIFFERENT


def _untrained(iterations: int) -> str:
    what = "the 1 iteration" if iterations == 1 else f"all {iterations} iterations"
    return (
        f"NOTHING WAS TRAINED: in {what} of the reference the gradient was 0, as where the rewards within every group "
        "are equal. Any strategy would come out equal, so none was compared. Take a policy that solves some of its "
        "tasks and not all: more warm start (warm_start.steps), easier tasks, a larger data.group_size or "
        "data.tasks_per_iteration, more --iterations, or data.zero_spread=resample."
    )


def _kept(out: Path) -> str:
    return f"Logs and runs are in {out}; they can be removed."


def _precision(run: Path) -> str:
    from omegaconf import OmegaConf

    loaded: Any = OmegaConf.load(run / "config.yaml")
    return str(loaded.trainer.precision or "32-true")


def table(results: dict[str, Comparison | str], tolerance: float) -> str:
    """Strategies by quantities, as text."""
    columns = ["strategy", "ids", *COMPARED, "train/loss", "train/grad_norm", "policy", "teacher", ""]
    rows = [columns]
    for name, result in results.items():
        if isinstance(result, str):
            rows.append([name, f"failed: {result}"])
            continue
        cells = [f"{result.worst[c]:.1e}" if c in result.worst else "-" for c in columns[2:-1]]
        rows.append([name, "same" if result.same_ids else "DIFFER", *cells])
        rows[-1].append("equal" if result.within(tolerance) else "NOT EQUAL")
    widths = [max(len(r[i]) for r in rows if len(r) > 2) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(["", *lines])
