"""Tests do not depend on the machine: none asserts seconds, and deadlines scale with its speed (`deadlines`)."""

import ast
import re
from pathlib import Path

import deadlines
import pytest

TESTS = Path(__file__).parent
READERS = {  # files that read a clock, and why
    "runs/test_status.py": "writes times into fabricated statuses",
    "support/slurm_jobs.py": "seconds for the table of events on the cluster",
    "support/long_phases.py": "duration of a phase over several restarts of a job",
    "slurm/test_slurm_cluster.py": "the table",
    "slurm/test_slurm_faults.py": "the table",
    "slurm/test_slurm_preemption.py": "the table",
}
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time"}
CLOCKS |= {f"{name}_ns" for name in CLOCKS} | {"clock_gettime"}
LIMITS = {"timeout", "deadline", "seconds", "step_seconds"}  # keywords and parameters
WAITING = {"wait", "join", "poll", "result", "communicate", "get"}  # methods whose first argument may be a timeout
OPTION = re.compile(r"--?(watchdog\.seconds|timeout|\S*step_seconds|\S*budgets\.seconds)(=(\d.*))?$")


def files() -> dict[str, Path]:
    return {str(path.relative_to(TESTS)): path for path in sorted(TESTS.rglob("*.py"))}


def number(node: ast.AST | None) -> bool:
    """Return whether a node is a literal number."""
    if isinstance(node, ast.UnaryOp):
        return number(node.operand)
    if isinstance(node, ast.BinOp):
        return number(node.left) and number(node.right)
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)


def reads_a_clock(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.Attribute)
        and part.attr in CLOCKS
        and isinstance(part.value, ast.Name)
        and part.value.id == "time"
        for part in ast.walk(node)
    )


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def pairs(target: ast.AST, value: ast.AST) -> list[tuple[ast.AST, ast.AST]]:
    """Return pairs of assigned target and value; element by element if both are literal tuples or lists."""
    both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
    return list(zip(target.elts, value.elts, strict=True)) if both else [(target, value)]  # pyright: ignore


def from_a_clock(function: ast.AST) -> set[str]:
    """Return the names in a function that hold a time, or a value computed from one."""
    found: set[str] = set()
    while True:
        more = set()
        for part in ast.walk(function):
            if isinstance(part, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and part.value is not None:
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for name, value in [pair for target in targets for pair in pairs(target, part.value)]:
                    if reads_a_clock(value) or names(value) & found:
                        more |= names(name.value if isinstance(name, ast.Subscript) else name)
        if more <= found:
            return found
        found |= more


def faults(source: str, clock: bool) -> list[str]:
    """Return the machine-dependent statements of a test file, as line and description."""
    tree, lines, found = ast.parse(source), source.splitlines(), []

    def add(node: ast.AST, what: str) -> None:
        text = f"{node.lineno}: {what}"  # pyright: ignore[reportAttributeAccessIssue]
        if "# not waited for" not in lines[node.lineno - 1] and text not in found:  # pyright: ignore
            found.append(text)

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time" and {a.name for a in node.names} & CLOCKS:
            add(node, "import time, so that clocks are seen")
        if isinstance(node, ast.Attribute) and reads_a_clock(node) and not clock:
            add(node, "a clock is read")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = from_a_clock(node)
            for part in ast.walk(node):
                if isinstance(part, ast.Assert) and (reads_a_clock(part.test) or names(part.test) & taken):
                    add(part, "a time is asserted")
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            defaults = [*node.args.defaults, *node.args.kw_defaults]
            for argument, default in zip(reversed(arguments), reversed(defaults), strict=False):
                if argument.arg in LIMITS and number(default):
                    add(default, f"{argument.arg} is a number of seconds")
        if isinstance(node, ast.Assign) and number(node.value):
            named = {name for target in node.targets for name in names(target)}
            if any(re.search("DEADLINE|TIMEOUT|SECONDS", name) for name in named):
                add(node, "a constant is a number of seconds")
        if isinstance(node, ast.Call):
            _look_at_a_call(node, add)
        if isinstance(node, ast.List | ast.Tuple | ast.Call):
            parts = node.args if isinstance(node, ast.Call) else node.elts
            for part, following in zip(parts, [*parts[1:], None], strict=False):
                match = (
                    OPTION.match(part.value) if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
                )
                text = match and (match[3] or getattr(following, "value", None))
                if isinstance(text, str) and re.match(r"\d", text):
                    add(part, f"{part.value} is a number of seconds")
    return found


def _look_at_a_call(node: ast.Call, add) -> None:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for keyword in node.keywords:
        if keyword.arg in LIMITS and number(keyword.value):
            add(keyword.value, f"{keyword.arg} is a number of seconds")
    if isinstance(node.func, ast.Attribute) and called in WAITING and node.args and number(node.args[0]):
        add(node, f"{called} has a number of seconds")
    if called == "sleep" and node.args and number(node.args[0]):
        value = ast.literal_eval(node.args[0])
        if 1 <= value < 1000:  # pauses between two checks are shorter, calls that never return are longer
            add(node, "sleeps for a number of seconds: wait for an event, or scale it")


def test_no_test_depends_on_the_speed_of_the_machine():
    found = [
        f"{name}:{fault}"
        for name, path in files().items()
        if name != "support/deadlines.py"
        for fault in faults(path.read_text(), clock=name in READERS)
    ]
    assert not found, "use deadlines.until, deadlines.seconds or deadlines.cheap:\n" + "\n".join(found)
    assert READERS.keys() <= files().keys()


@pytest.mark.parametrize(
    "line",
    [
        "assert time.monotonic() - started < 30",
        "assert finish() < 5 and time.perf_counter() < end",
        "took = time.time() - begun\n    assert took < 10",
        "begun = time.monotonic()\n    took = time.monotonic() - begun\n    share = took / 2\n    assert share < limit",
        "subprocess.run(command, timeout=60)",
        "process.wait(30)",
        "process.communicate(timeout=2 * 60)",
        "thread.join(5)",
        "Budgets(step_seconds=0.5)",
        "time.sleep(8)",
        "fit('--watchdog.seconds', '6')",
        "options = ['--watchdog.seconds=6']",
        "send(run, '--timeout=15')",
        "DEADLINE = 120",
        "def wait(x, deadline: float = 30): ...",
    ],
)
def test_the_check_detects_each_fault(line):
    assert faults(f"def test():\n    {line}\n", clock=True)
    assert not faults("def test():\n    subprocess.run(command, timeout=seconds(60))\n", clock=False)
    assert not faults(
        "def test():\n    assert len(column) > 3\n    time.sleep(0.05)\n    time.sleep(1000)\n", clock=False
    )
    assert faults("def test():\n    started = time.monotonic()\n", clock=False) == ["2: a clock is read"]


def test_deadlines_scale_with_the_speed_of_the_machine(monkeypatch):
    monkeypatch.setenv(deadlines.FACTOR, "2.5")
    assert deadlines.seconds(4) == 10
    monkeypatch.delenv(deadlines.FACTOR)
    assert deadlines.seconds(4) == 4, "the default in a process without the variable"
    assert deadlines.measure() >= 1
    first = deadlines.factor()
    monkeypatch.setattr(deadlines.subprocess, "run", None)
    assert deadlines.measure() == first, "measured once per run of pytest"
    with pytest.raises(AssertionError, match="not within 0 s: the end"):
        deadlines.until(lambda: False, "the end", limit=0.001 / first)


def test_every_test_has_a_deadline_that_scales_with_the_speed_of_the_machine(request):
    mark = request.node.get_closest_marker("timeout")
    assert mark.args[0] == pytest.approx(deadlines.seconds(request.config.getoption("timeout")))


def test_cheap_limits_processor_time():
    with deadlines.cheap(50):
        pass
    with pytest.raises(AssertionError, match="units of work, and 1 are allowed"):
        _measure_twice()


def _measure_twice() -> None:
    with deadlines.cheap(1):
        deadlines._unit.__wrapped__()
        deadlines._unit.__wrapped__()
