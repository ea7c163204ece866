"""``gear-lightning slurm``: write a batch script that trains a recipe on a cluster, after a look at the recipe.

What is wrong with a recipe is told here, on the login node, and not after hours in the queue.
"""

import argparse
import importlib
import inspect
import shlex
import shutil
import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.slurm_script import SEEDS, Job, check_job

OURS = {  # options of fit that a job sets by itself -> what to give instead
    "--trainer.num_nodes": "--nodes",
    "--trainer.devices": "--gpus-per-node, or --tasks-per-node on CPUs",
    "--trainer.accelerator": "--gpus-per-node, 0 for CPUs",
    "--watchdog.seconds": "--timeout",
}
LISTS = ("setup", "sbatch", "container-mounts")  # may be given several times


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    out = argparse.ArgumentParser(
        "gear-lightning slurm",
        usage="gear-lightning slurm --config RECIPE [--config MORE ...] --nodes N --gpus-per-node N --time LIMIT "
        "[OPTIONS] [fit's options]",
        description="Write a batch script that trains a recipe under Slurm: RUN/slurm/job.sh, RUN being the recipe's "
        "trainer.default_root_dir. The recipe is checked first. All other options are those of fit.",
        allow_abbrev=False,
    )
    size = out.add_argument_group("size")
    size.add_argument("--nodes", type=int, default=1, help="machines (default %(default)s)")
    size.add_argument("--gpus-per-node", type=int, metavar="N", help="one process each; 0: a job on CPUs")
    size.add_argument("--tasks-per-node", type=int, metavar="N", help="processes of a job on CPUs")
    size.add_argument(
        "--cpus-per-task", type=int, default=4, metavar="N", help="cores and threads of a process (default %(default)s)"
    )
    size.add_argument("--time", help="time limit: 24:00:00, or 2-12 for 2 days and 12 hours, or minutes")
    size.add_argument("--seeds", metavar="LIST", help="one run for each seed, as a job array: 0-9, or 0-9%%4")
    place = out.add_argument_group("place")
    for option in ("partition", "account", "qos", "constraint", "mem"):
        place.add_argument(f"--{option}", help=f"as sbatch's --{option}")
    place.add_argument("--sbatch", action="append", metavar="OPTION", help="any other of sbatch: --sbatch=--exclusive")
    place.add_argument("--name", help="of the job (default: the run directory's name)")
    place.add_argument("--cluster", metavar="FILE", help="YAML file of these options; the command line goes before it")
    world = out.add_argument_group("surroundings")
    world.add_argument("--setup", action="append", metavar="LINE", help="shell line before the training, in order")
    world.add_argument("--python", help="interpreter on the nodes (default: this one; python in a container)")
    world.add_argument("--container", metavar="IMAGE", help="image for pyxis/enroot")
    world.add_argument("--container-mounts", action="append", metavar="FROM:TO", help="more directories to see in it")
    ends = out.add_argument_group("ends")
    ends.add_argument(
        "--signal", type=int, default=300, metavar="SECONDS",
        help="before the limit: save, and go back into the queue (default %(default)s)",
    )  # fmt: skip
    ends.add_argument(
        "--timeout", type=int, default=1800, metavar="SECONDS",
        help="without any progress: the job ends (default %(default)s)",
    )  # fmt: skip
    what = out.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the script and write nothing")
    what.add_argument("--submit", action="store_true", help="write it and send it")
    return out


def from_file(path: Path, known: argparse.ArgumentParser) -> list[str]:
    """A YAML file of this command's options, as a command line.

    Raises:
        UserError: names the file and the key.
    """
    import yaml

    try:
        # BaseLoader: everything is text. YAML would read 24:00:00 as 86400.
        found = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--cluster {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--cluster {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"--cluster {path}: options are given as `nodes: 2`, one a line")
    names = {o[2:] for a in known._actions for o in a.option_strings} - {"cluster", "dry-run", "submit", "help"}
    out = []
    for key, value in found.items():
        if key not in names:
            raise UserError(f"--cluster {path}: no option {key!r}; there are {', '.join(sorted(names - {'h', ''}))}")
        values = value if isinstance(value, list) and key in LISTS else [value]
        if not all(isinstance(v, str) for v in values):
            raise UserError(f"--cluster {path}: {key} takes one value{', or a list' if key in LISTS else ''}")
        out += [f"--{key}={v}" for v in values]
    return out


def read_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's options, those of its ``--cluster`` file among them, and those of ``fit``."""
    known = parser()
    options, rest = known.parse_known_args(argv)
    if options.cluster is not None:
        options, rest = known.parse_known_args([*from_file(Path(options.cluster), known), *argv])
    return options, [arg for arg in rest if arg != "--"]


def job_of(options: argparse.Namespace, rest: list[str], command: str) -> Job:
    """The job that was asked for, its recipe read as ``fit`` would read it.

    Raises:
        UserError: an option does not fit the others, or the recipe is wrong.
        SystemExit: an option of fit is unknown or malformed; the parser has said so.
    """
    configs = [b for a, b in pairwise([*rest, ""]) if a in ("--config", "-c")]
    configs += [arg.partition("=")[2] for arg in rest if arg.startswith("--config=")]
    if not configs:
        raise UserError("which recipe? gear-lightning slurm --config configs/quickstart.yaml ...")
    for file in configs:
        if not Path(file).is_file():
            raise UserError(f"--config {file}: no such file")
    for arg in rest:
        if (name := arg.partition("=")[0]) in OURS:
            raise UserError(f"{name} is set by the job: give {OURS[name]}")
        if name == "--ckpt_path":
            raise UserError(
                "--ckpt_path: a job that comes back from the queue goes on from the newest checkpoint of its run "
                "directory; to begin with another one, copy it and its .json to RUN/checkpoints"
            )
        if name.removeprefix("--") in SEEDS and options.seeds is not None:
            raise UserError(f"{name} is what --seeds sets in each run: give one of them")
    if options.time is None:
        raise UserError("--time is missing: the job's limit, as --time 24:00:00")
    tasks = _tasks(options)
    trainer, share = _read(rest, options.nodes, tasks)
    if share % (options.nodes * tasks):
        raise UserError(
            f"data.tasks_per_iteration={share} does not divide over {options.nodes} x {tasks} processes: all rollouts "
            f"of a task stay on one; add --data.tasks_per_iteration {options.nodes * tasks}"
        )
    run = Path(trainer["default_root_dir"]).absolute()
    asked = [f"--{name}={getattr(options, name)}" for name in ("partition", "account", "qos", "constraint", "mem")]
    job = Job(
        run=run,
        directory=Path.cwd(),
        fit=tuple(_without_run(rest)),
        nodes=options.nodes,
        tasks_per_node=tasks,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        time=options.time,
        signal=options.signal,
        timeout=options.timeout,
        collective=_collective(trainer["strategy"], options.timeout),
        name=options.name or run.name,
        python=options.python or ("python" if options.container else sys.executable),
        sbatch=(*(a for a in asked if not a.endswith("=None")), *(options.sbatch or ())),
        setup=tuple(options.setup or ()),
        container=options.container,
        mounts=tuple(options.container_mounts or ()),
        seeds=options.seeds,
        command=command,
    )
    check_job(job)
    return job


def _without_run(rest: list[str]) -> list[str]:
    """Options of fit without the run directory, which the job names by itself, and absolute."""
    name, out, skip = "--trainer.default_root_dir", [], False
    for arg in rest:
        if not skip and not arg.startswith(f"{name}=") and arg != name:
            out.append(arg)
        skip = arg == name
    return out


def _tasks(options: argparse.Namespace) -> int:
    gpus, tasks = options.gpus_per_node, options.tasks_per_node
    if options.nodes < 1:
        raise UserError(f"--nodes {options.nodes} must be at least 1")
    if gpus is None:
        raise UserError("--gpus-per-node is missing; 0 for a job on CPUs")
    if gpus < 0:
        raise UserError(f"--gpus-per-node {gpus} must be at least 1, or 0 for a job on CPUs")
    if gpus and tasks not in (None, gpus):
        raise UserError(f"--tasks-per-node {tasks}: on GPUs there is one process for each, --gpus-per-node {gpus}")
    if gpus:
        return gpus
    if tasks is None:
        raise UserError("--gpus-per-node 0: how many processes? add --tasks-per-node 2")
    if tasks < 1:
        raise UserError(f"--tasks-per-node {tasks} must be at least 1")
    return tasks


def _read(rest: list[str], nodes: int, tasks: int) -> tuple[Any, int]:
    """The recipe's trainer section, and its tasks per iteration. A GPU of this machine is not looked at."""
    from ..recipes.recipe import read_recipe

    recipe = read_recipe([*rest, f"--trainer.num_nodes={nodes}", f"--trainer.devices={tasks}"])
    return recipe.trainer, recipe.data.tasks_per_iteration


def _collective(strategy: Any, timeout: int) -> str | None:
    """Twice the watchdog's time for collectives, where the strategy can be told: the watchdog says who is stuck."""
    if isinstance(strategy, str):
        return None
    module, _, name = strategy["class_path"].rpartition(".")
    if "timeout" not in inspect.signature(getattr(importlib.import_module(module), name)).parameters:
        return None
    return f"--trainer.strategy.init_args.timeout={timedelta(seconds=2 * timeout)}"


def slurm_command(argv: list[str]) -> int:
    """``gear-lightning slurm``.

    Raises:
        UserError: an option or the recipe is wrong, or Slurm did not take the job.
    """
    options, rest = read_options(argv)
    if options.submit and shutil.which("sbatch") is None:
        raise UserError("--submit: there is no sbatch on PATH; run this on a login node, or use --dry-run")
    said = [arg for arg in argv if arg not in ("--dry-run", "--submit")]
    job = job_of(options, rest, shlex.join(["gear-lightning", "slurm", *said]))
    if options.dry_run:
        print(job.script(), end="")
        return 0
    path = job.logs / "job.sh"
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
        path.write_text(job.script())
    except OSError as error:
        raise UserError(f"trainer.default_root_dir={job.run} cannot be written to ({error.strerror})") from None
    print(path)
    if not options.submit:
        print(f"to send it: sbatch {shlex.quote(str(path))}", file=sys.stderr)
        return 0
    sent = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if sent.returncode:
        raise UserError(f"sbatch did not take {path}: {' '.join((sent.stderr or sent.stdout).split())}")
    print(sent.stdout.strip())
    return 0
