"""Jobs of the tests on the cluster: submit them with the command, observe them, and stop them."""

import io
import os
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from deadlines import until
from slurm_cluster import OVER, run

from gear_lightning.commands.slurm import slurm_command

RECIPE = "tests/distributed/run.yaml"


@dataclass
class Sent:
    """A job, or one task of an array.

    Args:
        number: job id of Slurm, ``7`` or ``7_1``.
        run: its run directory.
        started: when it was submitted.
    """

    number: str
    run: Path
    started: float = field(default_factory=time.monotonic)

    def show(self) -> dict[str, str]:
        """Return Slurm's description of the job."""
        return dict(part.partition("=")[::2] for part in run("scontrol", "-o", "show", "job", self.number).split())

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    def ranks(self) -> dict[int, int]:
        """Return rank -> process id of the processes that train."""
        return self.processes("fit")

    def processes(self, word: str) -> dict[int, int]:
        """Return number of the task -> process id of the tasks whose command contains a word."""
        ids, found = {self.number, self.show()["JobId"]}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = dict(
                    item.partition("=")[::2] for item in (folder / "environ").read_bytes().decode().split("\0")
                )
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):  # the process has ended, or belongs to another user
                continue
            if variables.get("SLURM_JOB_ID") in ids and "SLURM_STEP_ID" in variables and word in words:
                rank, pid = int(variables["SLURM_PROCID"]), int(folder.name)
                found[rank] = min(pid, found.get(rank, pid))  # its child processes have larger ids
        return found

    def rows(self) -> int:
        """Return the number of rows of its metrics so far."""
        file = self.run / "metrics.csv"
        return max(0, len(file.read_text().splitlines()) - 1) if file.exists() else 0

    def output(self) -> str:
        """Return the output of all its processes."""
        folder = self.run / "slurm" if (self.run / "slurm").exists() else self.run.parent / "slurm"
        return "\n".join(
            f"-- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.glob("*[0-9].*"))
        )

    def until(self, what: Callable[[], bool], why: str, pause: float = 0.05) -> float:
        """Wait for a condition, and return the seconds. Fail after the deadline, or if the job has ended."""
        begun = asked = time.monotonic()

        def done() -> bool:
            nonlocal asked
            if what():
                return True
            if time.monotonic() - asked > 1:
                asked, state = time.monotonic(), self.state
                assert state not in OVER or what(), f"{state} before {why}:\n{self.output()}"
            return False

        try:
            until(done, why, limit=300, pause=pause)
        except AssertionError as error:
            raise AssertionError(f"no {why} ({self.state}):\n{self.output()}") from error
        return time.monotonic() - begun

    def has_rows(self, count: int) -> None:
        """Wait until its metrics have at least ``count`` rows."""
        self.until(lambda: self.rows() >= count, f"{count} rows")

    def end(self) -> str:
        """Wait for the end of the job, and return its state."""
        try:
            return until(lambda: self.state if self.state in OVER else "", "an end", limit=300, pause=0.2)
        except AssertionError as error:
            raise AssertionError(f"{self.state} still:\n{self.output()}") from error

    def succeeds(self) -> None:
        """Wait for the end of the job, and assert that it completed."""
        state = self.end()
        assert state == "COMPLETED", f"{state} ({self.show()['ExitCode']}):\n{self.output()}"

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def comes_back(self, restarts: int) -> None:
        """Wait until it has been restarted ``restarts`` times and is running."""
        self.until(lambda: self.restarts == restarts, f"restart {restarts}", pause=0.2)
        self.until(lambda: self.state == "RUNNING", f"start after restart {restarts}", pause=0.2)

    def signal(self, name: str, *options: str) -> None:
        """Send a signal to its processes, as Slurm does before the time limit."""
        run("scancel", f"--signal={name}", *options, self.number)


def send(
    folder: Path,
    *options: str,
    recipe: str = RECIPE,
    nodes: int = 2,
    tasks: int = 1,
    minutes: int = 10,
    before: int = 30,
) -> Sent:
    """Submit a job with ``gear-lightning slurm --submit``."""
    size = [f"--nodes={nodes}", "--gpus-per-node=0", f"--tasks-per-node={tasks}", "--cpus-per-task=1"]
    limits = [f"--time={minutes}", f"--signal={before}"]
    said = io.StringIO()
    command = ["--config", RECIPE, *size, *limits, "--submit", f"--trainer.default_root_dir={folder}", *options]
    with redirect_stdout(said), redirect_stderr(said):
        assert slurm_command(command) == 0
    return Sent(said.getvalue().split()[-1], folder)


def send_script(folder: Path, line: str, *options: str) -> Sent:
    """Submit a script without checks."""
    (folder / "slurm").mkdir(parents=True)
    script = folder / "slurm" / "job.sh"
    script.write_text(f"#!/bin/bash\n{line}\n")
    output = f"--output={folder}/slurm/%j.out"
    return Sent(run("sbatch", "--parsable", output, f"--chdir={os.getcwd()}", *options, str(script)), folder)
