"""Compares mathematical answers in a separate process.

The policy's text can make a computer algebra system compute for hours inside one C call (``9^{9^9}``), which holds the
interpreter's lock, so neither a thread's deadline nor a Python signal handler can interrupt it. The worker therefore
keeps the default action of SIGALRM, which kills the process; the next question starts a new worker.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from typing import Literal

Verdict = Literal["right", "wrong", "bad gold", "too long"]

MAX_TEXT = 10_000  # characters that are read, from the end of an answer
START_SECONDS = 120  # for importing the algebra system
MEMORY = 4 << 30  # bytes of address space of the worker


class _Worker:
    def __init__(self) -> None:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from gear_lightning.environments.math_judge import serve; serve()"
        )
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        self.owner = os.getpid()
        if self.ask(None) != "ready":
            self.end()
            raise RuntimeError("the process that runs math-verify could not be started")

    def ask(self, question: object) -> str | None:
        """Return the worker's answer; None if the worker exited during the question."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return json.loads(self.process.stdout.readline() or "null")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


_lock = threading.Lock()
_worker: _Worker | None = None


def judge(gold: str, text: str, *, seconds: int = 5) -> Verdict:
    """Compare a text with the right answer ``gold`` mathematically. Callable from any thread.

    Args:
        gold: the right answer, as plain or LaTeX mathematics.
        text: the policy's text; only the last 10,000 characters are read.
        seconds: wall-clock limit of the comparison. The first call also starts the worker.

    Returns:
        ``right`` if the text contains a mathematical expression equal to ``gold``, ``wrong`` if not, ``bad gold`` if
        ``gold`` cannot be read, ``too long`` if the comparison exceeded its limit.

    Raises:
        RuntimeError: the worker could not be started.
    """
    global _worker
    with _lock:
        # a forked child must not share its parent's pipe; a worker that was killed earlier is restarted
        if _worker is None or _worker.owner != os.getpid() or _worker.process.poll() is not None:
            _worker = None  # stays None if the new worker cannot be started
            _worker = _Worker()
        verdict = _worker.ask([gold, text[-MAX_TEXT:], seconds])
        if verdict in ("right", "wrong", "bad gold"):
            return verdict
        _worker.end()
        _worker = None
        return "too long"


def serve() -> None:
    """Answer questions from standard input, one per line, until it is closed."""
    import resource
    import signal

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # all other output to stdout goes to stderr
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(START_SECONDS)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)  # a confined process may allow less
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable()
    import math_verify  # noqa: F401  # the slow part of the start

    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(START_SECONDS if question is None else question[2])
        answers.write(json.dumps("ready" if question is None else _compare(*question[:2])) + "\n")
        signal.alarm(0)


def _compare(gold: str, text: str) -> Verdict:
    from math_verify import parse, verify

    def read(text: str) -> list:
        return parse(text, parsing_timeout=None)  # type: ignore[arg-type]

    # math-verify reads bare LaTeX only between dollar signs; without them it would read a part of it as the answer
    wanted = read(gold if "$" in gold or "boxed" in gold else f"${gold}$") or read(gold)
    if not wanted:
        return "bad gold"
    try:
        right = verify(wanted, read(text), timeout_seconds=None)
    except (Exception, MemoryError):
        return "wrong"
    return "right" if right else "wrong"
