"""``gear-lightning slurm``: check a recipe and write a batch script that trains it on a cluster.

The check runs on the login node, so that errors in a recipe are reported before the job waits in the queue.
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
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..recipes.options.parser import CommandParser
from ..recipes.options.values import composed, text_of
from ..recipes.slurm_script import SEEDS, Job, check_job
from ..recipes.slurm_serving import Serving, serving_of

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe

OURS = {  # options of fit that the job sets -> options of this command to use instead
    "--trainer.num_nodes": "--nodes",
    "--trainer.devices": "--gpus-per-node, or --tasks-per-node on CPUs",
    "--trainer.accelerator": "--gpus-per-node, 0 for CPUs",
    "--watchdog.seconds": "--timeout",
}
SERVERS = "--generation.engine.servers"
LISTS = ("setup", "sbatch", "container-mounts")  # can be repeated


def parser() -> CommandParser:
    """Return the parser of the command."""
    out = CommandParser(
        "slurm",
        usage="gear-lightning slurm --config RECIPE [--config MORE ...] --nodes N --gpus-per-node N --time LIMIT "
        "[OPTIONS] [fit's options]",
        description="Write a batch script that trains a recipe under Slurm: RUN/slurm/job.sh (RUN is the recipe's "
        "trainer.default_root_dir). The recipe is checked first. All other options are those of fit.",
    )
    size = out.add_argument_group("size")
    size.add_argument("--nodes", type=int, default=1, help="number of nodes (default %(default)s)")
    size.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs, with one process each; 0: a job on CPUs")
    size.add_argument("--tasks-per-node", type=int, metavar="N", help="number of processes of a job on CPUs")
    size.add_argument(
        "--cpus-per-task", type=int, default=4, metavar="N", help="cores and threads per process (default %(default)s)"
    )
    size.add_argument("--time", help="time limit: 24:00:00, or 2-12 for 2 days and 12 hours, or minutes")
    size.add_argument("--seeds", metavar="LIST", help="one run for each seed, as a job array: 0-9, or 0-9%%4")
    serve = out.add_argument_group("vLLM servers, for a recipe with gear_lightning.generation.VLLMEngine")
    serve.add_argument("--serve-nodes", type=int, metavar="N", help="nodes, of --nodes, that sample with vLLM")
    serve.add_argument(
        "--gpus-per-server", type=int, metavar="N", help="GPUs of a server, by tensor parallelism (default 1)"
    )
    serve.add_argument(
        "--serve-options", metavar="OPTIONS", help="options of gear-lightning serve, e.g. '--python PATH --kv-gib 40'"
    )
    place = out.add_argument_group("placement")
    for option in ("partition", "account", "qos", "constraint", "mem"):
        place.add_argument(f"--{option}", help=f"sbatch's --{option}")
    place.add_argument("--sbatch", action="append", metavar="OPTION", help="other sbatch options: --sbatch=--exclusive")
    place.add_argument("--name", help="job name (default: the run directory's name)")
    place.add_argument("--cluster", metavar="FILE", help="YAML file with these options; the command line overrides it")
    world = out.add_argument_group("environment")
    world.add_argument("--setup", action="append", metavar="LINE", help="shell line to run before training, in order")
    world.add_argument("--python", help="interpreter on the nodes (default: this one; python in a container)")
    world.add_argument("--container", metavar="IMAGE", help="image for pyxis/enroot")
    world.add_argument("--container-mounts", action="append", metavar="FROM:TO", help="more directories to mount in it")
    ends = out.add_argument_group("end of the job")
    ends.add_argument(
        "--signal", type=int, default=300, metavar="SECONDS",
        help="save and requeue the job this long before the time limit (default %(default)s)",
    )  # fmt: skip
    ends.add_argument(
        "--timeout", type=int, default=1800, metavar="SECONDS",
        help="end the job after this long without any progress (default %(default)s)",
    )  # fmt: skip
    what = out.add_argument_group("action").add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only print the script")
    what.add_argument("--submit", action="store_true", help="write and submit the script")
    return out


def from_file(path: Path, known: argparse.ArgumentParser) -> list[str]:
    """Return the options in a YAML file as command-line arguments.

    Raises:
        UserError: the file is invalid; names the file and the key.
    """
    import yaml

    try:
        # BaseLoader keeps all values as text: YAML would parse 24:00:00 as 86400
        text = text_of(path)
        composed(text, str(path))
        found = yaml.load(text, Loader=yaml.BaseLoader)
    except UserError as error:
        raise UserError(f"--cluster {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"--cluster {path}: must hold one option per line, such as `nodes: 2`")
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
    """Return this command's options, including those of its ``--cluster`` file, and the options of ``fit``."""
    known = parser()
    options, rest = known.parse_known_args(argv)
    if options.cluster is not None:
        options, rest = known.parse_known_args([*from_file(Path(options.cluster), known), *argv])
    return options, [arg for arg in rest if arg != "--"]


def job_of(options: argparse.Namespace, rest: list[str], command: str) -> Job:
    """Return the requested job. It reads the recipe as ``fit`` would.

    Raises:
        UserError: an option contradicts the others, or the recipe is invalid.
        SystemExit: an option of fit is unknown or malformed; the parser has reported it.
    """
    configs = [b for a, b in pairwise([*rest, ""]) if a in ("--config", "-c")]
    configs += [arg.partition("=")[2] for arg in rest if arg.startswith("--config=")]
    if not configs:
        raise UserError("--config is missing: gear-lightning slurm --config configs/quickstart.yaml ...")
    for file in configs:
        if not Path(file).is_file():
            raise UserError(f"--config {file}: no such file")
    for arg in rest:
        if (name := arg.partition("=")[0]) in OURS:
            raise UserError(f"{name} is set by the job: give {OURS[name]}")
        if name == "--ckpt_path":
            raise UserError(
                "--ckpt_path: a requeued job resumes from the newest checkpoint of its run directory; to start from "
                "another one, copy it and its .json to RUN/checkpoints"
            )
        if name.removeprefix("--") in SEEDS and options.seeds is not None:
            raise UserError(f"--seeds sets {name} in each run: give only one of them")
    if options.time is None:
        raise UserError("--time is missing: give the job's time limit, e.g. --time 24:00:00")
    tasks = _tasks(options)
    training = max(1, options.nodes - (options.serve_nodes or 0))
    recipe = _read(rest, training, tasks)
    trainer, share = recipe.trainer, recipe.data.tasks_per_iteration
    serving = _serving(options, rest, recipe, tasks)
    if share % (training * tasks):
        raise UserError(
            f"data.tasks_per_iteration={share} is not divisible by {training} x {tasks} processes, but all "
            f"rollouts of a task are on one process; add --data.tasks_per_iteration {training * tasks}"
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
        serving=serving,
        command=command,
    )
    check_job(job)
    return job


def _without_run(rest: list[str]) -> list[str]:
    """Return the options of fit without the run directory, which the job sets to an absolute path."""
    name, out, skip = "--trainer.default_root_dir", [], False
    for arg in rest:
        if not skip and not arg.startswith(f"{name}=") and arg != name:
            out.append(arg)
        skip = arg == name
    return out


def _tasks(options: argparse.Namespace) -> int:
    gpus, tasks = options.gpus_per_node, options.tasks_per_node
    if options.nodes < 1:
        raise UserError(f"--nodes {options.nodes}: must be at least 1")
    if gpus is None:
        raise UserError("--gpus-per-node is missing; give 0 for a job on CPUs")
    if gpus < 0:
        raise UserError(f"--gpus-per-node {gpus}: must be at least 1, or 0 for a job on CPUs")
    if gpus and tasks not in (None, gpus):
        raise UserError(f"--tasks-per-node {tasks}: must equal --gpus-per-node {gpus}, with one process per GPU")
    if gpus:
        return gpus
    if tasks is None:
        raise UserError("--gpus-per-node 0: the number of processes is missing; add e.g. --tasks-per-node 2")
    if tasks < 1:
        raise UserError(f"--tasks-per-node {tasks}: must be at least 1")
    return tasks


def _read(rest: list[str], nodes: int, tasks: int) -> "Recipe":
    """Return the recipe. GPUs of this machine do not matter."""
    from ..recipes.recipe import read_recipe

    return read_recipe([*rest, f"--trainer.num_nodes={nodes}", f"--trainer.devices={tasks}"])


def _serving(options: argparse.Namespace, rest: list[str], recipe: "Recipe", tasks: int) -> Serving | None:
    """Return the nodes that serve; None if all train.

    Raises:
        UserError: the options of the servers contradict each other, or the recipe does not sample with vLLM.
    """
    if options.serve_nodes is None:
        for name in ("gpus_per_server", "serve_options"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no effect without --serve-nodes")
        return None
    from ..generation.vllm_engine import SHARED, VLLMEngine, logprobs_mode

    engine = recipe.generation.engine
    if not isinstance(engine, VLLMEngine):
        raise UserError(
            f"--serve-nodes {options.serve_nodes}: the recipe samples with {type(engine).__name__}; add "
            "--generation.engine gear_lightning.generation.VLLMEngine"
        )
    if any(arg.partition("=")[0] == SERVERS for arg in rest):
        raise UserError(f"--serve-nodes sets {SERVERS}: give only one of them")
    if engine.start is not None:
        raise UserError("--serve-nodes starts the servers; remove generation.engine.start from the recipe")
    logprobs_mode(recipe.generation.sampling)
    return serving_of(
        options.nodes,
        options.serve_nodes,
        options.gpus_per_server,
        options.gpus_per_node,
        tasks * options.cpus_per_task,
        engine.transfer == "file" and engine.folder in (None, SHARED),
        _serve_options(options),
    )


def _serve_options(options: argparse.Namespace) -> list[str]:
    """Return the options of ``gear-lightning serve``, quoted.

    Raises:
        UserError: one is unknown, or is set by the job, or vLLM is not where it is expected.
    """
    from . import parsers, serve

    text = options.serve_options or ""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--serve-options {text}: {error}") from None
    given, unknown = parsers.serve().parse_known_args(words)
    if unknown:
        raise UserError(
            f"--serve-options: {unknown[0]} is no option of gear-lightning serve; give fit's to this command"
        )
    for name in ("host", "port", "keep_serving"):
        if getattr(given, name) != parsers.serve().get_default(name):
            raise UserError(f"--serve-options: --{name.replace('_', '-')} is set by the job")
    if given.python is None and options.container is None and not serve.PYTHON.exists():
        raise UserError(
            f"--serve-nodes: {serve.PYTHON} is missing; run make vllm, or give --serve-options '--python PATH', the "
            "Python of the environment with vLLM"
        )
    vllm = given.vllm
    if (options.gpus_per_server or 1) > 1:
        vllm = f"--tensor-parallel-size {options.gpus_per_server} {vllm}".strip()
    found = {"python": given.python, "kv-gib": given.kv_gib, "vllm": vllm or None}
    named = [f"--{name}={shlex.quote(str(value))}" for name, value in found.items() if value is not None]
    return ["--keep-serving", *named]


def _collective(strategy: Any, timeout: int) -> str | None:
    """Return an option that sets the timeout of collectives to twice the watchdog's time; None if not supported.

    The watchdog then ends the job first, and reports which process is stuck.
    """
    if isinstance(strategy, str):
        return None
    module, _, name = strategy["class_path"].rpartition(".")
    if "timeout" not in inspect.signature(getattr(importlib.import_module(module), name)).parameters:
        return None
    return f"--trainer.strategy.init_args.timeout={timedelta(seconds=2 * timeout)}"


def slurm_command(argv: list[str]) -> int:
    """Run ``gear-lightning slurm`` and return the exit status.

    Raises:
        UserError: an option or the recipe is invalid, or Slurm did not accept the job.
    """
    options, rest = read_options(argv)
    if options.submit and shutil.which("sbatch") is None:
        raise UserError("--submit: sbatch is not on PATH; run this on a login node, or use --dry-run")
    given = [arg for arg in argv if arg not in ("--dry-run", "--submit")]
    job = job_of(options, rest, shlex.join(["gear-lightning", "slurm", *given]))
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
        print(f"to submit it: sbatch {shlex.quote(str(path))}", file=sys.stderr)
        return 0
    sent = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if sent.returncode:
        raise UserError(f"sbatch did not accept {path}: {' '.join((sent.stderr or sent.stdout).split())}")
    print(sent.stdout.strip())
    return 0
