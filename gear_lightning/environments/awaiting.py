"""Async environments, tools and rewards: their awaitables run on one event loop of the process, on a thread of its own.

The loop lives as long as the process, so a client that is bound to its loop (an HTTP session of a module) serves all
rollouts. The thread that waits for an awaitable has the deadline (`CallPool`): when it passes, the awaitable is
canceled (`give_up`). A loop that a call has blocked is replaced.
"""

import asyncio
import atexit
import concurrent.futures
import contextvars
import inspect
import os
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

FORKED = 70  # exit status of a fork of this process that returned from a call
GRACE = 1.0  # seconds in which a loop must respond after it canceled a call

_lock = threading.Lock()
_loop: "_EventLoop | None" = None
_waiting: "dict[int | None, tuple[_EventLoop, concurrent.futures.Future]]" = {}  # thread -> what it waits for
_given_up: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()  # threads whose deadline has passed
_episode: "contextvars.ContextVar[EpisodeTasks | None]" = contextvars.ContextVar("episode", default=None)


def awaited(value: Any) -> Any:
    """Return a value, or the result of an awaitable. Called by a coroutine, it blocks that coroutine's loop.

    Raises:
        CancelledError: the deadline of this thread's call has passed.
    """
    if not inspect.isawaitable(value):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _event_loop().run(value)
    return _awaited_apart(value)


def give_up(thread: threading.Thread) -> None:
    """Cancel the awaitable for which a thread waits, and all that it will wait for. The thread's deadline has passed.

    Waits up to `GRACE` for the loop to respond, and replaces it if it does not: the call blocks it.
    """
    global _loop
    _given_up.add(thread)
    if (waits := _waiting.get(thread.ident)) is None:
        return
    loop, future = waits
    future.cancel()
    if loop.responds(GRACE):
        return
    with _lock:
        if _loop is loop:
            _loop = None
    loop.stop()  # as soon as the call returns
    warnings.warn(
        "an async environment, tool or reward blocked the event loop (for example with time.sleep), so a new event "
        "loop serves the next calls. Clients that were created on the old one cannot be used any more: create them "
        "in the environment's reset, and await instead of blocking, or call asyncio.to_thread",
        stacklevel=2,
    )


class EpisodeTasks:
    """The tasks that one episode starts on the event loop."""

    def __init__(self) -> None:
        self._tasks: weakref.WeakSet[asyncio.Task] = weakref.WeakSet()

    def add(self, task: asyncio.Task) -> None:
        """Remember a task."""
        self._tasks.add(task)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of the episode. Return its result, awaited if it is an awaitable."""
        token = _episode.set(self)
        try:
            return awaited(function(*arguments, **options))
        finally:
            _episode.reset(token)

    @property
    def left(self) -> bool:
        """Whether a task has not ended."""
        return any(not task.done() for task in list(self._tasks))

    def cancel(self) -> None:
        """Cancel the tasks that are left, and wait until they have ended."""
        awaited(self._cancel())

    async def _cancel(self) -> None:
        mine = asyncio.current_task(), asyncio.get_running_loop()
        left = [task for task in self._tasks if task is not mine[0] and task.get_loop() is mine[1] and not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class _EventLoop:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._loop.set_task_factory(_new_task)
        self._loop.set_default_executor(_DaemonThreads())
        self._stopping = False
        threading.Thread(target=self._serve, daemon=True, name="event loop").start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._stopping:
            with suppress(BaseException):  # SystemExit in a task ends run_forever, too
                self._loop.run_forever()
        with suppress(BaseException):
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Return the result of an awaitable, or raise what it raises."""
        me = threading.current_thread()
        future = asyncio.run_coroutine_threadsafe(_outcome(awaitable), self._loop)
        _waiting[me.ident] = self, future
        try:
            if me in _given_up:
                future.cancel()
            result, error = future.result()
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError("the deadline of the call has passed") from None
        finally:
            _waiting.pop(me.ident, None)
        if error is not None:
            raise error
        return result

    def responds(self, seconds: float) -> bool:
        """Return whether the loop runs a callback within this time."""
        ran = threading.Event()
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(ran.set)
        return ran.wait(seconds)

    def stop(self) -> None:
        """End the thread when the loop is free, and cancel what still runs on it."""
        self._stopping = True
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._loop.stop)


def _event_loop() -> _EventLoop:
    """Return the process's event loop. A fork of the process starts its own."""
    global _loop
    with _lock:
        if _loop is None or _loop.process != os.getpid():
            _loop = _EventLoop()
        return _loop


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return an awaitable's result and what it raised. An exception that leaves a task can end the loop."""
    process = os.getpid()
    try:
        return await awaitable, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error
    finally:
        if os.getpid() != process:
            os._exit(FORKED)  # the call forked, and this is the child: it must not serve the loop


def _awaited_apart(awaitable: Awaitable[Any]) -> Any:
    """Return an awaitable's result, from an event loop on a thread of its own: the loop of this thread is busy."""
    found: list[tuple[Any, BaseException | None]] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(_outcome(awaitable))), daemon=True)
    thread.start()
    thread.join()
    result, error = found[0] if found else (None, asyncio.CancelledError())
    if error is not None:
        raise error
    return result


def _new_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task:
    """Start a task and remember it for its episode, whose context its code inherits."""
    task = asyncio.Task(coroutine, loop=loop, **options)
    if (episode := _episode.get()) is not None:
        episode.add(task)
    return task


class _DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """Runs each function on a daemon thread of its own: one that hangs delays neither the next ones nor the exit."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=work, daemon=True, name="event loop's helper").start()
        return future


@atexit.register
def _stop() -> None:
    if _loop is not None and _loop.process == os.getpid():
        _loop.stop()
