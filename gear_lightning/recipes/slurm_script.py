"""The batch script of a training job for Slurm, written from a `Job`."""

import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from ..errors import UserError
from .slurm_serving import Serving, continued

SWITCHES_OFF = ("bash", "interactive")  # job names that Lightning treats as a shell, in which it ignores Slurm's ranks
LINGER = 30  # seconds for the other processes of a job to write reports and end after the first has ended
SEEDS = ("seed_everything", "data.seed")  # seeds of torch; of the order of tasks and all sampling


@dataclass(frozen=True)
class Job:
    """A Slurm job: its resources and the command it runs.

    Args:
        run: absolute path of the run directory.
        directory: absolute path of the job's working directory, to which paths in the recipe are relative.
        fit: options of ``fit``.
        nodes: number of nodes, those that serve included.
        tasks_per_node: number of training processes per node, one per GPU.
        gpus_per_node: number of GPUs per node. 0: a job on CPUs.
        cpus_per_task: cores and threads per process.
        time: time limit in Slurm's format.
        signal: seconds before the limit at which Slurm signals every process; the job then saves and is requeued.
        timeout: seconds without progress after which the watchdog ends the job.
        collective: option of ``fit`` that sets the strategy's own timeout; None if it has none.
        name: job name.
        python: interpreter on the nodes.
        sbatch: more options of ``sbatch``, for example ``--exclusive``.
        setup: shell lines to run before training.
        container: image for pyxis/enroot; None: no container.
        mounts: directories to mount in the container in addition to both directories.
        seeds: Slurm's array of seeds, for example ``0-9%4``; None: one run.
        serving: the nodes that serve, the last ones; None: all train.
        command: the command line that wrote the script.
    """

    run: Path
    directory: Path
    fit: tuple[str, ...]
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    time: str
    signal: int
    timeout: int
    collective: str | None
    name: str
    python: str
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    container: str | None = None
    mounts: tuple[str, ...] = ()
    seeds: str | None = None
    serving: Serving | None = None
    command: str = ""

    @property
    def logs(self) -> Path:
        """Folder of the script and its output. Slurm does not create it, and a job without it fails silently."""
        return self.run / "slurm"

    def script(self) -> str:
        """Return the script."""
        return "\n".join([*self._head(), "", *self._environment(), "", *self._launch(), ""])

    def _head(self) -> list[str]:
        job = "%A_%a" if self.seeds else "%j"
        asked = [
            f"job-name={quote(self.name)}",
            f"nodes={self.nodes}",
            f"ntasks-per-node={self.tasks_per_node}",
            *([f"gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []),
            f"cpus-per-task={self.cpus_per_task}",
            f"time={self.time}",
            *([f"array={self.seeds}"] if self.seeds else []),
            f"chdir={quote(str(self.directory))}",
            "export=ALL",
        ]
        kept = [
            f"signal=USR1@{self.signal}",
            "requeue",
            "open-mode=append",
            f"output={quote(f'{self.logs}/{job}.out')}",
        ]
        return [
            "#!/bin/bash",
            f"# {self.command}",
            *(f"#SBATCH --{line}" for line in asked),
            *(f"#SBATCH {line}" for line in self.sbatch),
            f"# {self.signal} s before the limit every process gets USR1 (no B:, which would signal only this shell);",
            "# the job saves one checkpoint, is requeued, and appends to the same files.",
            *(f"#SBATCH --{line}" for line in kept),
        ]

    def _environment(self) -> list[str]:
        return [
            *self.setup,
            f"export OMP_NUM_THREADS={self.cpus_per_task} PYTHONUNBUFFERED=1",
            "# a failed collective ends its process; the heartbeat gives the watchdog time to report the stuck rank",
            f"export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC={2 * self.timeout}",
        ]

    @property
    def _training(self) -> int:
        """Number of nodes that train."""
        return self.nodes - (self.serving.nodes if self.serving else 0)

    def _launch(self) -> list[str]:
        job = "%A_%a" if self.seeds else "%j"
        run, seed = quote(str(self.run)), []
        if self.seeds:
            run, seed = f"{run}/seed_$SLURM_ARRAY_TASK_ID", [f"--{option}=$SLURM_ARRAY_TASK_ID" for option in SEEDS]
        python = f"{quote(self.python)} -m gear_lightning"
        recipe = [
            *pairs(self.fit),
            f"--trainer.accelerator={'gpu' if self.gpus_per_node else 'cpu'}",
            f"--trainer.num_nodes={self._training}",
            f"--trainer.devices={self.tasks_per_node}",
            f"--trainer.default_root_dir={run}",
        ]
        fit = [
            *recipe,
            f"--watchdog.seconds={self.timeout}",
            *([quote(self.collective)] if self.collective else []),
            *seed,
            *(self.serving.engine(run) if self.serving else []),
            "--ckpt_path=last",
        ]
        kept = ["--kill-on-bad-exit=0", f"--wait={LINGER}", f"--cpus-per-task={self.cpus_per_task}"]
        more = ["--open-mode=append", f"--output={quote(f'{self.logs}/{job}_%t.log')}", *self._container()]
        if self.serving is None:
            return [
                "# exec: a signal to the batch script also reaches the processes. If one has ended, the others have",
                f"# {LINGER} s to write their reports; kill-on-bad-exit would end them at once.",
                *continued(f"exec srun {' '.join([*kept, more[0]])}", *more[1:], f"{python} fit", *fit),
            ]
        size = [f"--nodes={self._training}", "--relative=0", f"--ntasks={self._training * self.tasks_per_node}"]
        size.append(f"--ntasks-per-node={self.tasks_per_node}")
        serve = [f"{python} serve", *self.serving.options, *recipe]
        logs = f"{self.logs}/{job}_serve_%t.log"
        return [
            *self.serving.addresses(self._training),
            "",
            *self.serving.start(self._container(), serve, run, logs, self._training, self.timeout),
            "",
            f"# If a process has ended, the others have {LINGER} s to write their reports; kill-on-bad-exit would end",
            "# them at once.",
            *continued(f"srun {' '.join(size)}", " ".join(kept), *more, f"{python} fit", *fit, end=" &"),
            *self.serving.end(),
        ]

    def _container(self) -> list[str]:
        """Return srun's options for the container."""
        if self.container is None:
            return []
        seen = [self.directory] + [self.run] * (not self.run.is_relative_to(self.directory))
        mounts = ",".join([*(f"{p}:{p}" for p in seen), *self.mounts])
        return [
            f"--container-image={quote(self.container)}",
            f"--container-workdir={quote(str(self.directory))}",
            f"--container-mounts={quote(mounts)}",
        ]


def pairs(options: tuple[str, ...]) -> list[str]:
    """Return quoted options of a command line, each with its value."""
    found: list[str] = []
    for option in options:
        if found and not option.startswith("-") and "=" not in found[-1] and " " not in found[-1]:
            found[-1] += f" {quote(option)}"
        else:
            found.append(quote(option))
    return found


def check_job(job: Job) -> None:
    """Check for options that Slurm would accept but that would make the job fail.

    Raises:
        UserError: an option would; names it.
    """
    for option, value in {"nodes": job.nodes, "tasks-per-node": job.tasks_per_node, "timeout": job.timeout}.items():
        if value < 1:
            raise UserError(f"--{option} {value}: must be at least 1")
    if job.cpus_per_task < 1:
        raise UserError(f"--cpus-per-task {job.cpus_per_task}: must be at least 1")
    limit = seconds(job.time)
    if job.signal < 1:
        raise UserError(f"--signal {job.signal}: must be at least 1 second before the end")
    if job.signal >= limit:
        raise UserError(
            f"--signal {job.signal}: the job would be asked to save {job.signal} s before its limit, but --time "
            f"{job.time} is {limit} s; give a longer --time or a smaller --signal"
        )
    if job.name in SWITCHES_OFF:
        raise UserError(f"--name {job.name}: Lightning treats a job of that name as a shell; give another --name")
    if job.seeds is not None and not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?", job.seeds):
        raise UserError(f"--seeds {job.seeds}: give seeds as 0-9, as 0,3,7, or as 0-9%4 (four at a time)")
    for first, last in re.findall(r"(\d+)-(\d+)", job.seeds or ""):
        if int(last) < int(first):
            raise UserError(f"--seeds {job.seeds}: the range {first}-{last} is empty")
    for what in (job.run, job.directory):
        if "%" in str(what) or "," in str(what) or "\n" in str(what):
            raise UserError(f"{what}: Slurm does not support '%' and ',' in a path; give another directory")
    for line in job.sbatch:
        if not line.startswith("-"):
            raise UserError(f"--sbatch {line}: give a full option, such as --sbatch=--exclusive")
        if not line.isprintable():
            raise UserError(f"{line!r}: an option of sbatch must be one line")
        if line.partition("=")[0] in ("--time", "-t", "--signal", "--nodes", "--array"):
            raise UserError(f"--sbatch {line}: give it as an option of this command")


def seconds(limit: str) -> int:
    """Return a time limit in seconds.

    Raises:
        UserError: the time limit is invalid.
    """
    # minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    found = 0
    if match:
        days, *parts = match.groups()
        given = [int(part) for part in parts if part is not None]
        if days is not None or len(given) == 3:
            scale = (3600, 60, 1)
        else:
            scale = (60, 1)
        found = int(days or 0) * 86400 + sum(a * b for a, b in zip(given, scale, strict=False))
    if not found:
        raise UserError(f"--time {limit}: give hours:minutes:seconds (24:00:00), days-hours (2-12), or minutes")
    return found
