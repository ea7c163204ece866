"""Start a run repeatedly with the same command, in processes forked from one that has done the imports.

Run it as ``python -m restart_runs FILE``. The file holds ``{"lives": [[arguments of rank 0, of rank 1, ...], ...]}``,
with one entry per start. It ends after the first start whose processes all exit with 0, and prints the exit status of
every process of every start as JSON. The output of a process goes to FILE.START.RANK.txt.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from checkout import ROOT, SUPPORT
from deadlines import until
from lightning.pytorch.utilities import rank_zero_only
from quick_start import end_with

LIMIT = 300  # seconds for one start, for `until`


def play(folder: Path, lives: list[list[list[str]]]) -> list[list[int]]:
    """Start these runs one after another in a fresh process; see the module's docstring.

    Returns:
        The exit status of every process of every start.

    Raises:
        AssertionError: a start did not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "lives.json"
    spec.write_text(json.dumps({"lives": lives}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "restart_runs", str(spec)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def said(folder: Path, life: int, rank: int = 0) -> str:
    """Return the output of a process."""
    return (folder / f"lives.json.{life}.{rank}.txt").read_text()


def _fork(arguments: list[str], environment: dict[str, str], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["gear-lightning", *arguments]
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))  # Lightning has read the rank when it was imported
    from gear_lightning.__main__ import main

    end_with(main)


def _run(ranks: list[list[str]], logs: list[Path]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank, arguments in enumerate(ranks):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        children.append(_fork(arguments, place if len(ranks) > 1 else {}, logs[rank]))
    statuses: dict[int, int] = {}

    def over() -> bool:
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        return len(statuses) == len(children)

    try:
        until(over, "the end of a start", limit=LIMIT)
    except AssertionError as error:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, 9)
        sys.exit(f"{error}; see {logs}")
    return [statuses[child] for child in children]


if __name__ == "__main__":
    import gear_lightning.recipes.cli  # noqa: F401

    spec = Path(sys.argv[1])
    starts = json.loads(spec.read_text())["lives"]
    ended: list[list[int]] = []
    for number, ranks in enumerate(starts):
        ended.append(_run(ranks, [Path(f"{spec}.{number}.{r}.txt") for r in range(len(ranks))]))
        if not any(ended[-1]):
            break
    print(json.dumps(ended))
