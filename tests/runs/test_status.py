"""`gear-lightning status` reports running, finished and killed runs."""

import json
import os
import socket
import time

import pytest

from gear_lightning.commands.status import status_command, status_of
from gear_lightning.errors import UserError


def run(folder, *, process: int, phase: str = "update", age: float = 0.0, host: str | None = None):
    status = {"phase": phase, "iteration": 2, "host": host or socket.gethostname(), "process": process, "processes": 1}
    status |= {"time": time.time() - age, "failures": {"environment_error": 3}, "rollouts": 64}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "attempts.jsonl").write_text(json.dumps({"what": "start", "time": 0}) + "\n")
    return folder


NO_PROCESS = 2**22 - 1  # above the default maximum of process ids on Linux


@pytest.mark.parametrize(
    ("given", "state", "code"),
    [
        ({"process": os.getpid()}, "running", 0),
        ({"process": NO_PROCESS}, "killed", 1),
        ({"process": NO_PROCESS, "phase": "finished"}, "finished", 0),
        ({"process": NO_PROCESS, "phase": "stopped"}, "stopped", 1),
        ({"process": NO_PROCESS, "host": "elsewhere"}, "running", 0),
        ({"process": NO_PROCESS, "host": "elsewhere", "age": 1000.0}, "silent", 1),
    ],
)
def test_the_state_of_a_run(tmp_path, capsys, given, state, code):
    folder = run(tmp_path, **given)
    assert status_of(folder)["state"] == state
    assert status_command([str(folder)]) == code
    said = capsys.readouterr().out
    assert state in said
    assert "environment_error 3" in said


def test_directories_without_a_valid_status_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no status\.json"):
        status_of(tmp_path)
    run(tmp_path, process=1)
    (tmp_path / "attempts.jsonl").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        status_of(tmp_path)
    (tmp_path / "attempts.jsonl").unlink()
    for torn in ("[]", '{"phase": "update"}', '{"pha'):
        (tmp_path / "status.json").write_text(torn)
        with pytest.raises(UserError, match="its status files cannot be read"):
            status_of(tmp_path)
