"""Compares mathematical answers in a process of its own.

The policy's text can keep a computer algebra system busy for hours inside one C call (``9^{9^9}``), which holds the
interpreter's lock: neither a thread's deadline nor a Python signal handler ends it. The worker therefore leaves its
alarm at the system's default action, which is to die; the next question starts a new one.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from typing import Literal

Verdict = Literal["right", "wrong", "bad gold", "too long"]

MAX_TEXT = 10_000  # characters of an answer, from its end
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
            raise RuntimeError("the process that runs math-verify does not start")

    def ask(self, question: object) -> str | None:
        """The worker's answer, or None where it died of the question."""
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
    """Whether a text holds a mathematical equal of ``gold``. Callable from any thread.

    Args:
        gold: the right answer, as plain or LaTeX mathematics.
        text: what the policy wrote; the last 10,000 characters are looked at.
        seconds: wall clock for the comparison. The first call also starts the worker.

    Raises:
        RuntimeError: the worker does not start.
    """
    global _worker
    with _lock:
        # a forked child must not share its parent's pipe; one that was killed meanwhile did not die of this question
        if _worker is None or _worker.owner != os.getpid() or _worker.process.poll() is not None:
            _worker = None  # also where the new one does not start
            _worker = _Worker()
        verdict = _worker.ask([gold, text[-MAX_TEXT:], seconds])
        if verdict in ("right", "wrong", "bad gold"):
            return verdict
        _worker.end()
        _worker = None
        return "too long"


def serve() -> None:
    """Answer questions on standard input, one line each, until it ends."""
    import resource
    import signal

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(START_SECONDS)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)  # less, in a confined process
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable()
    import math_verify  # noqa: F401  # this is what takes long

    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(START_SECONDS if question is None else question[2])
        answers.write(json.dumps("ready" if question is None else _compare(*question[:2])) + "\n")
        signal.alarm(0)


def _compare(gold: str, text: str) -> Verdict:
    from math_verify import parse, verify

    def read(text: str) -> list:
        return parse(text, parsing_timeout=None)  # type: ignore[arg-type]

    # bare LaTeX is only read between dollar signs; without them a part of it would pass for the answer
    wanted = read(gold if "$" in gold or "boxed" in gold else f"${gold}$") or read(gold)
    if not wanted:
        return "bad gold"
    try:
        right = verify(wanted, read(text), timeout_seconds=None)
    except (Exception, MemoryError):
        return "wrong"
    return "right" if right else "wrong"
