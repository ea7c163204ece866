"""Environments and programs in separate processes: their failures affect only their rollout, and end with it."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from deadlines import seconds, until
from misbehaving_environments import Unruly
from scripted_policy import CHAT, Scripted, answered

from gear_lightning.environments import sandbox
from gear_lightning.environments.base import Task
from gear_lightning.environments.functions import FunctionTools, tool_schemas
from gear_lightning.environments.python_tool import CALL, PythonTool, run_python
from gear_lightning.environments.sandbox import Isolated, Limits
from gear_lightning.errors import UserError
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.engine import Sampling

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes with resource limits need Linux"
)

LIMITS = Limits(cpu_seconds=1, memory_mb=512, file_mb=8, processes=16)
BUDGETS = Budgets(tokens=2000, context=16_000, step_seconds=seconds(60), retries=0)


@pytest.fixture(scope="module", autouse=True)
def _namespaces():
    try:
        sandbox.require_confinement("none")
    except UserError as error:
        pytest.skip(str(error))


def task(deed: str | None = None, **meta) -> Task:
    return Task("t1", [{"role": "user", "content": "Go."}], meta={"deed": deed, **meta})


def play(*tasks: Task, environment=None, budgets: Budgets = BUDGETS):
    environment = environment or partial(Isolated, Unruly, LIMITS)
    loop = AgentLoop(CHAT, Scripted("hello"), environment, budgets, Sampling())
    return loop.run(torch.nn.Linear(1, 1), [(t, (0, i)) for i, t in enumerate(tasks)], policy_version=0)[0]


def descendants(of: int) -> list[int]:
    """Return the running descendants of a process. Confined processes are included while their keeper runs."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, waiting = [], [of]
    while waiting:
        parent = waiting.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        waiting += children
    return found


def at_rest() -> bool:
    """Return whether no process of a rollout remains: each keeper has only its server."""
    return all(len(descendants(s.keeper.pid)) == 1 for s in sandbox._servers.values())


@pytest.mark.parametrize(
    ("deed", "status", "error"),
    [
        ("raise", "environment_error", "ZeroDivisionError: division by zero"),
        ("exit", "environment_error", "SystemExit: 3"),
        ("refused", "environment_error", "ConnectionError: refused"),
        ("leave", "environment_error", "the environment's process has exited: exit status 5"),
        ("crash", "environment_error", "killed by SIGSEGV"),
        ("burn", "environment_error", "it used more processor time than limits.cpu_seconds=1"),
        ("bomb", "environment_error", "BlockingIOError"),
        ("memory", "environment_error", "MemoryError"),
        ("file", "environment_error", "OSError: [Errno 27] File too large"),
        ("network", "environment_error", "OSError: [Errno 101] Network is unreachable"),
        ("flood", "environment_flood", "returned more than 67,108,864 bytes of text"),
        ("long", "environment_flood", "step returned more than 1,000,000 bytes of text"),
        ("no step", "invalid_reward", "step returned int, expected a Step"),
        ("bytes", "environment_error", "expected a message with role and content"),
        ("nan", "invalid_reward", "step returned an invalid reward: reward nan"),
        (None, "done", ""),
        ("fork", "done", ""),
    ],
)
def test_a_failure_of_an_isolated_environment_affects_only_its_rollout(deed, status, error):
    before, good, after = play(task(reward=0.5), task(deed), task(reward=0.25))
    assert (good.status, before.status, after.status) == (status, "done", "done")
    assert error in (good.error or "")
    assert good.learnable == (status in ("done", "environment_flood"))
    assert (before.reward, after.reward) == (0.5, 0.25)


@pytest.mark.parametrize("deed", ["hang", "spin", "fork and stay"])
def test_a_hanging_environment_is_killed_with_all_its_processes(deed):
    # more processor time than the call may take, whatever the pace
    patient = partial(Isolated, Unruly, replace(LIMITS, cpu_seconds=seconds(60)))
    play(task(), environment=patient)  # start the server
    until(at_rest, "the end of earlier processes")
    hung, good = play(task(deed), task(), environment=patient, budgets=Budgets(step_seconds=seconds(1)))
    assert (hung.status, good.status) == ("environment_timeout", "done")
    until(at_rest, "the end of the hanging process and its descendants")


def test_rollouts_share_no_state_and_are_forked_from_one_process():
    play(task())
    servers = dict(sandbox._servers)
    rollouts = play(*[task()] * 50)
    assert {r.reward_parts["played"] for r in rollouts} == {1.0}, "module state leaked from one rollout to another"
    assert sandbox._servers == servers, "the server must be reused"


def test_the_trainers_environment_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    (plain,) = play(task("look"))
    named = partial(Isolated, Unruly, LIMITS, variables=["SOME_TOKEN"])
    (passed,) = play(task("look"), environment=named)
    assert "PATH" in plain.reward_parts
    assert "SOME_TOKEN" not in plain.reward_parts
    assert "SOME_TOKEN" in passed.reward_parts


def test_a_server_that_has_exited_is_replaced():
    play(task())
    (server,) = [s for key, s in sandbox._servers.items() if key[1] == LIMITS and not key[3]]
    family = descendants(server.keeper.pid)
    server.keeper.kill()
    server.keeper.wait(seconds(60))
    until(lambda: not any(alive(p) for p in family), "the end of the server after its keeper")
    assert [r.status for r in play(task(), task())] == ["done", "done"]


def test_an_environment_that_hangs_in_close_does_not_block_the_run(monkeypatch):
    monkeypatch.setattr(sandbox, "CLOSE_SECONDS", seconds(0.5))
    (rollout,) = play(task("hang at close"))
    assert (rollout.status, rollout.reward, rollout.success) == ("done", 1.0, True)
    assert rollout.side_error.startswith("close: ")
    until(at_rest, "the end of the hanging process")


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("last flood", "returned more than 67,108,864 bytes of text"),
        ("last long", "step returned more than 1,000,000 bytes of text"),
        ("last bytes", "expected a message with role and content"),
    ],
)
def test_invalid_messages_of_a_last_isolated_step_do_not_change_the_score(deed, error):
    (rollout,) = play(task(deed))
    assert (rollout.status, rollout.reward, rollout.success, rollout.error) == ("done", 1.0, True, None)
    assert error in rollout.side_error


TRAINER = """
import sys, time
from gear_lightning.environments.base import Task
from gear_lightning.environments.sandbox import Isolated, Limits
from misbehaving_environments import Unruly

task = Task("t", [], meta={"deed": "fork and stay"})
environment = Isolated(Unruly, Limits(processes=16))
environment.check(task)
environment.reset(task, seed=0)
print("ready", flush=True)
environment.step({"role": "assistant", "content": ""})
"""


@contextmanager
def running(program: str, before: Sequence[str] = ()):
    """Run a trainer in a separate process, and kill it at the end."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [*before, sys.executable, "-c", program]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        yield trainer
    finally:
        trainer.kill()
        trainer.wait()


def test_killing_the_trainer_ends_all_its_processes():
    with running(TRAINER) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        # keeper, server, the rollout's process, and three grandchildren in other sessions
        until(lambda: len(descendants(trainer.pid)) >= 6, "six processes")
        family = descendants(trainer.pid)
    until(lambda: not any(alive(p) for p in family), "the end of all processes")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_invalid_settings_are_rejected_before_training():
    with pytest.raises(UserError, match=r"limits\.processes=0: must be above 0"):
        Limits(processes=0)
    with pytest.raises(UserError, match="use a class of an importable module"):
        Isolated(lambda: Unruly()).check(task())
    with pytest.raises(UserError, match="task t1 cannot be sent to another process"):
        Isolated(Unruly).check(task(extra=lambda: 0))
    with pytest.raises(UserError, match="task t1: no reward is set"):
        Isolated(partial(FunctionTools, ["os.getcwd"])).check(task())


WITHOUT_NAMESPACES = """
from gear_lightning.environments.base import Task
from gear_lightning.environments.sandbox import Isolated
from gear_lightning.errors import UserError
from misbehaving_environments import Unruly

task = Task("t", [], meta={"deed": "hang"})
try:
    Isolated(Unruly).check(task)
except UserError as error:
    print(error, flush=True)
environment = Isolated(Unruly, network="allow")
environment.check(task)
environment.reset(task, seed=0)
print("ready", flush=True)
environment.step({"role": "assistant", "content": ""})
"""


def test_without_kernel_namespaces_the_network_must_be_allowed():
    none_left = "echo 0 > /proc/sys/user/max_user_namespaces && echo 0 > /proc/sys/user/max_pid_namespaces"
    with running(WITHOUT_NAMESPACES, ["unshare", "-Ur", "sh", "-c", none_left + ' && exec "$@"', "sh"]) as trainer:
        assert "permits no namespaces" in (said := trainer.stdout.readline())
        assert "set network: allow" in said
        assert trainer.stdout.readline() == "ready\n"
        family = descendants(trainer.pid)
        assert len(family) == 3, "keeper, server, the rollout's process"
    until(lambda: not any(alive(p) for p in family), "the end of all processes")


def test_isolation_needs_one_line_in_the_config(repository):
    from gear_lightning.recipes.recipe import read_recipe

    limit = round(seconds(70))  # importing this file's tools takes seconds
    config = {
        "class_path": "gear_lightning.environments.sandbox.Isolated",
        "init_args": {
            "environment": {
                "class_path": "gear_lightning.environments.functions.FunctionTools",
                "init_args": {"tools": ["test_environments.add"], "reward": "exact"},
            },
            "limits": {"cpu_seconds": limit},
        },
    }
    quickstart = str(repository / "configs/quickstart.yaml")
    recipe = read_recipe(["--config", quickstart, "--generation.environment", json.dumps(config)])
    environment = recipe.generation.environment
    function = ["test_environments.add"]
    tools = Task("t", [{"role": "user", "content": "?"}], tool_schemas(function), meta={"answer": "ok"})
    environment().check(tools)
    call = '<tool_call>[{"name": "add", "arguments": {"a": 2, "b": 3}}]</tool_call>'
    rollout = answered(tools, environment, call, "ok")
    assert (rollout.status, rollout.reward) == ("done", 1.0), rollout.error
    assert [m["content"] for m in rollout.messages if m["role"] == "tool"] == ["5"]
    assert environment().limits == Limits(cpu_seconds=limit)


# -- programs that the policy writes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print(6 * 7)", "42"),
        ("import sys\nprint('out', flush=True)\nprint('err', file=sys.stderr)", "out\nerr"),
        ("1 / 0", 'File "main.py", line 1, in <module>'),
        ("import sys; sys.exit(3)", "[exit status 3]"),
        ("import os; os.abort()", "[exit status 1"),
        ("input()", "EOFError"),
        ("import socket; socket.create_connection(('1.1.1.1', 53), 5)", "Network is unreachable"),
        ("import os\nwhile True: os.fork()", "Resource temporarily unavailable"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(20 << 20))", "File too large"),
        ("import os; print(os.listdir(), os.environ.get('SOME_TOKEN'))", "['main.py'] None"),
        ("print('x' * 20_000)", "x\n[ended after 10,000 bytes of output]"),
        ("print('half', chr(0xd83d))", "surrogates not allowed"),
        ("import os; os.write(1, b'\\xff')", "\ufffd"),
        ("", ""),
    ],
)
def test_a_programs_output_is_returned_and_its_limits_are_enforced(code, shown, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    found = run_python(code, seconds=seconds(10))
    assert shown in found
    assert run_python(code, seconds=seconds(10)) == found or "fork" in code, "the output must be reproducible"
    assert len(found) < 11_000


def test_a_program_is_killed_with_all_its_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    quiet = len(descendants(os.getpid()))
    code = """
    import os, time
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
    print("so far", flush=True)
    while True: pass
    """
    limit = seconds(2)  # long enough for its output
    patient = replace(CALL, cpu_seconds=10 * limit)
    assert run_python(textwrap.dedent(code), seconds=limit, limits=patient) == f"so far\n[ended after {limit:g} s]"
    assert len(descendants(os.getpid())) == quiet
    assert list(tmp_path.iterdir()) == [], "its directory was not removed"


def test_the_python_tool_answers_calls_and_reports_mistakes_to_the_agent():
    schema = tool_schemas(["gear_lightning.environments.python_tool.python"])
    problem = Task("t1", [{"role": "user", "content": "6 * 7?"}], schema, meta={"answer": "42"})
    environment = partial(PythonTool, "number", seconds=seconds(5))
    environment().check(problem)

    def said(**arguments):
        return f"<tool_call>{json.dumps([{'name': 'python', 'arguments': arguments}])}</tool_call>"

    rollout = answered(problem, environment, said(code="print(6 * 7)"), said(program="1"), said(code="("), "It is 42.")
    assert (rollout.status, rollout.reward) == ("done", 1.0)
    one, two, three = [m["content"] for m in rollout.messages if m["role"] == "tool"]
    assert (one, two) == ("42", "error: python takes one argument, code, which is text")
    assert "SyntaxError: '(' was never closed" in three
    other = Task("t1", [], [{"function": {"name": "perl"}}], meta={"answer": "42"})
    with pytest.raises(UserError, match="task t1 lists the tool 'perl', but PythonTool provides only python"):
        environment().check(other)
