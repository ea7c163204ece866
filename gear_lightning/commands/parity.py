"""`gear-lightning parity`: train a recipe for a few iterations under several strategies and compare the results."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..parity.compare import COMPARED, Comparison, compare, metric, precision_of, tolerance_of
from ..parity.tolerance import TOLERANCE, Tolerance
from ..runs.step_records import RECORDER
from . import parsers
from .parsers import DIFFERENT, EQUAL, UNCOMPARED

ZERO = "gear_lightning.strategies.ZeRO"
STRATEGIES = {  # name -> value of trainer.strategy; the same as in configs/strategy, which is not in the wheel
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
OWN = {  # options of fit that parity sets itself -> what to do instead
    "trainer.default_root_dir": "give --out DIR, which keeps the runs there",
    "trainer.max_epochs": "give --iterations",
    "trainer.devices": "give --devices",
    "trainer.num_nodes": "all processes are on this machine",
}


def idle_iterations(run: Path) -> list[int]:
    """Return the iterations of a run, from 0, whose gradient was 0, for example because all rewards were equal."""
    return [i for i, norm in enumerate(metric(run, "train/grad_norm")) if norm == 0]


def train(options: list[str], run: Path, deadline: float) -> str | None:
    """Run ``fit`` in a new process. Return None, or the error message if it failed."""
    command = [sys.executable, "-m", "gear_lightning", "fit", *options, f"--trainer.default_root_dir={run}"]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return f"did not finish within {deadline:g} s"
        except BaseException:
            os.killpg(process.pid, 9)
            raise
    lines = [line for line in (run / "log.txt").read_text().splitlines() if "rror" in line]
    return None if status == 0 else (lines or ["no message"])[-1].removeprefix("gear-lightning: error: ")


def parity_command(argv: list[str]) -> int:
    """Run ``gear-lightning parity`` and return the exit status."""
    options, rest = parsers.parity().parse_known_args(argv)
    names = options.strategies.split(",")
    known = {"one": []} | {n: [f"--trainer.strategy={json.dumps(value)}"] for n, value in STRATEGIES.items()}
    for name in [*names, options.reference]:
        if name not in known:
            raise UserError(f"no strategy {name!r}; there are {', '.join(STRATEGIES)}")
    if options.iterations < 1 or (options.resume and options.iterations < 2):
        raise UserError(f"--iterations {options.iterations}: must be at least {2 if options.resume else 1}")
    if not any(arg.startswith("--config") for arg in rest):
        raise UserError("--config RECIPE is missing")
    for argument in rest:
        if advice := OWN.get(argument.partition("=")[0].removeprefix("--")):
            raise UserError(f"{argument.partition('=')[0]} does nothing in parity: {advice}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `train` then also ends its process
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
    common += [f"--trainer.callbacks+={RECORDER}"]

    def run(name: str) -> str | None:
        mine = [*common, *known[name], f"--trainer.devices={1 if name == 'one' else devices}"]
        whole = [*mine, f"--trainer.max_epochs={options.iterations}"]
        if options.resume and name != options.reference:
            half = [*mine, f"--trainer.max_epochs={options.iterations // 2}"]
            failed = train(half, out / name, options.deadline)
            return failed or train([*whole, "--ckpt_path=last"], out / name, options.deadline)
        return train(whole, out / name, options.deadline)

    print(f"{options.reference}: the reference; logs and runs are in {out}", flush=True)
    if failed := run(options.reference):
        raise UserError(f"the reference run failed: {failed} (see {out / options.reference / 'log.txt'})")
    idle = idle_iterations(out / options.reference)
    if not any(metric(out / options.reference, "train/grad_norm")):  # also if there was no step
        print(f"\n{_untrained(options.iterations)}\n\n{_kept(out)}")
        return UNCOMPARED
    precision = precision_of(out / options.reference)
    tolerance = tolerance_of(precision)
    if options.tolerance is not None:
        tolerance = replace(tolerance, share=options.tolerance)
    results: dict[str, Comparison | str] = {}
    for name in [n for n in names if n != options.reference]:
        print(f"{name}: {devices} processes", flush=True)
        results[name] = run(name) or compare(out / options.reference, out / name, tolerance)
    print(table(results))
    if idle:
        numbers = ", ".join(str(i + 1) for i in idle)
        print(
            f"\nThe gradient was 0 in {len(idle)} of {options.iterations} iterations ({numbers}), for example because "
            "all rewards were equal: for these, rollouts and credit were compared, but no update."
        )
    status = _report(results, options.reference, tolerance, precision)
    if status == EQUAL and options.out is None:
        shutil.rmtree(out, ignore_errors=True)
    else:
        print(_kept(out))
    return status


def _report(results: dict[str, Comparison | str], reference: str, tolerance: Tolerance, precision: str) -> int:
    """Print the results, and return the exit status."""
    done = {name: result for name, result in results.items() if isinstance(result, Comparison)}
    for name, result in done.items():
        if result.faults:
            print(f"\n{name}: {result.faults[0]}. Rounding does not explain this.")
        elif result.parted:
            text = f"compared for {result.iterations} iterations; then {result.parted}"
            print(f"\n{name}: {text}. Rounding explains this.")
    if any(result.verdict == "NOT COMPARED" for result in done.values()):
        print(f"\n{_uncompared(precision)}")
    if len(done) < len(results) or any(result.faults for result in done.values()):
        status, verdict = DIFFERENT, "NOT all equal"
    elif not all(result.equal for result in done.values()):
        status, verdict = UNCOMPARED, "NOT all compared"
    else:
        status, verdict = EQUAL, "All equal"
    print(
        f"\n{verdict} to {reference} except for rounding ({precision}: gradients, log-probs and credit within "
        f"{tolerance.share:g}, gradient norms within {tolerance.norm:g}, updates as far as gradients explain them)."
    )
    return status


def _uncompared(precision: str) -> str:
    text = (
        "NOTHING WAS COMPARED for strategies where rounding changed a token in the first iteration: all later rollouts "
        "differ, and so does the gradient. Compare with another --data.seed"
    )
    low = (
        ", or with --trainer.precision=32-true: in low precision, log-probs of strategies that gather or reduce in "
        "other dtypes differ by about 0.01 nats, and most rollouts diverge"
    )
    return text + ("." if tolerance_of(precision) is TOLERANCE else low + ".")


def _untrained(iterations: int) -> str:
    what = "the 1 iteration" if iterations == 1 else f"all {iterations} iterations"
    return (
        f"NOTHING WAS TRAINED: in {what} of the reference the gradient was 0, for example because the rewards within "
        "every group are equal. All strategies would give equal results, so none was compared. Use a policy that "
        "solves some but not all of its tasks: more warm start (warm_start.steps), easier tasks, a larger "
        "data.group_size or data.tasks_per_iteration, more --iterations, or data.zero_spread=resample."
    )


def _kept(out: Path) -> str:
    return f"Logs and runs are in {out}; they can be removed."


def table(results: dict[str, Comparison | str]) -> str:
    """Return a table of strategies and compared quantities as text."""
    quantities = [*COMPARED, "train/loss", "gradient", "norm", "update", "teacher"]
    rows = [["strategy", "iterations", *quantities, ""]]
    for name, result in results.items():
        if isinstance(result, str):
            rows.append([name, f"failed: {result}"])
            continue
        cells = [f"{result.worst[q]:.1e}" if q in result.worst else "-" for q in quantities]
        rows.append([name, str(result.iterations), *cells, result.verdict])
    widths = [max(len(r[i]) for r in rows if len(r) > 2) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(["", *lines])
