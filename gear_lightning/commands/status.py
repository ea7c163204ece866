"""`gear-lightning status RUN`: show the phase of a run, its newest checkpoint and its failures."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.options.parser import CommandParser

SILENT = 120.0  # seconds without an update of the status file after which a running run counts as silent


def status_command(args: list[str]) -> int:
    """Print the status of a run directory. The exit status is 0 if the run is running or has finished, else 1.

    Raises:
        UserError: the path is not a run directory.
    """
    parser = CommandParser("status", description="Show the phase of a run, its newest checkpoint and its failures.")
    parser.add_argument("run", type=Path, help="the run directory (trainer.default_root_dir)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(args)
    found = status_of(options.run)
    print(json.dumps(found, indent=1) if options.json else "\n".join(_lines(options.run, found)))
    return 0 if found["state"] in ("running", "finished") else 1


def status_of(run: Path) -> dict[str, Any]:
    """Return the status of a run, from the files of `callbacks.run_status.RunStatus`, checkpoints and crash reports.

    Returns:
        ``state``: running, silent, killed, finished, stopped or failed; ``status``: the newest status file; ``starts``:
        number of starts; ``ends``: how each start ended; ``checkpoint``: the newest file and its age in seconds;
        ``crashes``: report -> its first line.

    Raises:
        UserError: the path is not a run directory.
    """
    path = run / "status.json"
    if not path.exists():
        raise UserError(f"{run}: no status.json; is this the run directory (trainer.default_root_dir) of a fit?")
    try:
        status = json.loads(path.read_text())
        attempts = [json.loads(line) for line in _text(run / "attempts.jsonl").splitlines()]
        age = time.time() - status["time"]
        phase = status["phase"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run}: its status files cannot be read ({type(error).__name__}: {error})") from None
    ended = phase in ("finished", "stopped", "failed")
    state = phase if ended else "killed" if _gone(status) else "running" if age < SILENT else "silent"
    checkpoints = [p for p in (run / "checkpoints").glob("*.ckpt") if p.is_file() and not p.is_symlink()]
    newest = max(checkpoints, key=lambda p: p.stat().st_mtime, default=None)
    reports = sorted((run / "crash").glob("*.txt"), key=lambda p: p.stat().st_mtime)
    return {
        "state": state,
        "seconds_since_its_last_word": round(age, 1),
        "status": status,
        "starts": sum(line["what"] == "start" for line in attempts),
        "ends": [line["how"] for line in attempts if line["what"] == "end"],
        "checkpoint": newest and {"file": str(newest), "age": round(time.time() - newest.stat().st_mtime, 1)},
        "crashes": {str(p): (_text(p).splitlines() or [""])[0] for p in reports},
    }


def _gone(status: dict[str, Any]) -> bool:
    """Return whether rank 0 was a process of this machine and no longer exists."""
    if status.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(status["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, OverflowError):
        return False
    return False


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _lines(run: Path, found: dict[str, Any]) -> list[str]:
    status = found["status"]
    where = f"{status['phase']}, iteration {status.get('iteration', 0)}"
    if status.get("iterations"):
        where += f" of {status['iterations']}"
    if status["phase"] in ("rollout", "evaluation") and "rollouts_done" in status:
        where += f", {status['rollouts_done']} rollouts"
    if status["phase"] == "update" and "micro_batch" in status:
        where += f", micro-batch {status['micro_batch']}"
    ago = _ago(found["seconds_since_its_last_word"])
    lines = [f"{run}: {found['state']}", f"  phase        {where} ({ago} ago)"]
    lines.append(f"  updates      {status.get('optimizer_steps', 0)} optimizer steps")
    job = f", SLURM job {status['slurm_job']}" if "slurm_job" in status else ""
    lines.append(f"  processes    {status['processes']}, rank 0 is {status['process']} on {status['host']}{job}")
    kept = found["checkpoint"]
    lines.append(f"  checkpoint   {kept['file']} ({_ago(kept['age'])} ago)" if kept else "  checkpoint   none yet")
    failures, rollouts = status.get("failures", {}), status.get("rollouts", 0)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(failures.items()) if count) or "none"
    lines.append(f"  rollouts     {rollouts}, left out of learning: {kinds}")
    ends = ", ".join(found["ends"][-3:])
    lines.append(f"  starts       {found['starts']}" + (f", ended by: {ends}" if ends else ""))
    lines += [f"  crash report {path}: {why}" for path, why in list(found["crashes"].items())[-8:]]
    if found["state"] == "killed":
        lines.append("  rank 0 ended without a report; to resume: run the same command with --ckpt_path last")
    if found["state"] == "silent":
        lines.append("  no update for a long time: the run was killed, its node failed, or one step takes very long")
    return lines


def _ago(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
