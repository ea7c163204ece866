"""Tasks from a file of JSON lines."""

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..rewards import BUILT_IN, resolve_reward
from .base import Message, Task, TaskSource, deeper_than

ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 64  # lists and objects within each other in a line
_OWN = {"prompt", "messages", "id", "tools", "reference"}  # keys that become fields of the task; others go to its meta


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl or .jsonl.gz file with their line numbers (from 1). Empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object; names file and line.
    """
    path, number = Path(path), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read after line {number} ({error})") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in line:  # an escape can be half a character, which no tokenizer takes
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: found bytes that are not UTF-8, expected JSON") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{where}: found {half}, half of a surrogate pair, expected whole characters") from None
    except RecursionError:
        raise UserError(f"{where}: found JSON that is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: found broken JSON ({error}), expected one JSON object") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: found {_kind(found)}, expected one JSON object")
    if deeper_than(MAX_DEPTH, found):  # whoever copies or renders it later must not run out of stack
        raise UserError(f"{where}: found JSON that is nested too deeply")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        raise ValueError(f"{number[:40]} is beyond all floating-point numbers")
    return float(number)


def _kind(value: Any) -> str:
    """A JSON value in words, short."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if value in ("", [], {}):
        return {"str": "empty text", "list": "an empty list", "dict": "an empty object"}[type(value).__name__]
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 40 else value[:40] + "...", ensure_ascii=False)
    return "a list" if isinstance(value, list) else "an object"


def _expect(right: Any, where: str, found: Any, expected: str) -> None:
    if not right:
        raise UserError(f"{where}: found {found}, expected {expected}")


def _check_messages(messages: Any, where: str, name: str) -> list[Message]:
    _expect(isinstance(messages, list) and messages, where, f"{name} = {_kind(messages)}", "a list of messages")
    for place, message in enumerate(messages):
        at = f"{name}[{place}]"
        _expect(isinstance(message, dict), where, f"{at} = {_kind(message)}", "an object with role and content")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        _expect(role in ROLES, where, f"{at}.role = {_kind(role)}", f"one of {', '.join(ROLES)}")
        if calls is not None:
            _expect(role == "assistant", where, f"{at}.tool_calls in a {role} message", "them in an assistant message")
            _check_calls(calls, where, f"{at}.tool_calls")
        text = isinstance(content, str) or (content is None and bool(calls))
        _expect(text, where, f"{at}.content = {_kind(content)}", "text")
    return messages


def _check_calls(calls: Any, where: str, name: str) -> None:
    _expect(isinstance(calls, list) and calls, where, f"{name} = {_kind(calls)}", "a list of tool calls")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        right = isinstance(function, dict) and isinstance(function.get("name"), str)
        right = right and isinstance(function.get("arguments"), dict)  # type: ignore[union-attr]
        _expect(right, where, f"{name} with {_kind(call)}", '{"function": {"name": text, "arguments": object}}')


def _check_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    _expect(isinstance(tools, list), where, f"tools = {_kind(tools)}", "a list of JSON schemas")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        parameters = function.get("parameters") if isinstance(function, dict) else None
        right = isinstance(function, dict) and isinstance(function.get("name"), str)
        right = right and isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict)
        shape = '{"type": "function", "function": {"name": text, "parameters": {"properties": object}}}'
        _expect(right, where, f"a tool that is {_kind(tool)}", shape)
    return tools


def parse_task(line: dict[str, Any], where: str, default_id: str, rewards: Sequence[str] = ()) -> Task:
    """One line as a task.

    Args:
        line: see `JsonlTasks`.
        where: ``file:line``, for errors.
        default_id: the id of a task that names none.
        rewards: import paths that the line may name as its reward.

    Raises:
        UserError: says what was found and what was expected.
    """
    both = [key for key in ("prompt", "messages") if key in line]
    found = "both prompt and messages" if both else f"keys {', '.join(line) or 'none'}"
    _expect(len(both) == 1, where, found, "either prompt or messages")
    if "prompt" in line:
        prompt = line["prompt"]
        _expect(isinstance(prompt, str) and prompt.strip(), where, f"prompt = {_kind(prompt)}", "text")
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages = _check_messages(line["messages"], where, "messages")
        last = messages[-1]["role"]
        _expect(last != "assistant", where, "an assistant message at the end of messages", "a user or tool message")
    name = line.get("id", default_id)
    right = (isinstance(name, str) and name.strip()) or (isinstance(name, int) and not isinstance(name, bool))
    _expect(right, where, f"id = {_kind(name)}", "text or an integer")
    reference = line.get("reference")
    if isinstance(reference, list):
        _check_messages(reference, where, "reference")
    elif reference is not None:
        right = isinstance(reference, str) and reference.strip()
        _expect(right, where, f"reference = {_kind(reference)}", "text or a list of messages")
    answer = line.get("answer", "")
    right = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    _expect(right, where, f"answer = {_kind(answer)}", "text or a number")
    if "reward" in line:
        reward = line["reward"]
        _expect(isinstance(reward, str) and reward, where, f"reward = {_kind(reward)}", "a name or an import path")
        known = reward in BUILT_IN or reward in rewards or "." not in reward
        _expect(known, where, f"reward = {_kind(reward)}", "a built-in one or one that the recipe lists under rewards")
        try:
            resolve_reward(reward)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    tools = _check_tools([] if line.get("tools") is None else line["tools"], where)
    meta = {key: value for key, value in line.items() if key not in _OWN}
    return Task(str(name), messages, tools, reference, meta)


@dataclass(frozen=True)
class JsonlTasks(TaskSource):
    """Tasks from a .jsonl or .jsonl.gz file, one JSON object a line.

    A line has ``prompt`` (text) or ``messages`` (chat messages), and may have ``id`` (default: file name and line
    number), ``tools`` (JSON schemas), ``reference`` (text or messages; only the teacher sees it), ``answer`` (for the
    built-in rewards) and ``reward`` (a built-in one, or one of ``rewards``). All other keys go to the task's ``meta``.
    The whole file is checked before training. A file is data: no line of it has anything imported.

    Args:
        path: the file.
        limit: use the first so many tasks. Null: all.
        reward: of the tasks that name none; a built-in reward or an import path. Null: the environment's.
        tools: import paths of functions whose schemas are added to every task, for `FunctionTools`.
        rewards: import paths of rewards that tasks of the file may name.
    """

    path: str
    limit: int | None = None
    reward: str | None = None
    tools: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)

    def __post_init__(self):
        from .functions import tool_schemas

        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit} must be at least 1")
        meta = {}
        if self.reward is not None:
            resolve_reward(self.reward)
            meta["reward"] = self.reward
        for reward in self.rewards:
            resolve_reward(reward)
        shared = tool_schemas(self.tools)
        tasks, lines = [], {}
        stem = Path(self.path).name.removesuffix(".gz").removesuffix(".jsonl")
        for number, line in read_lines(self.path):
            where = f"{self.path}:{number}"
            task = parse_task(line, where, f"{stem}-{number}", self.rewards)
            if task.id in lines:
                raise UserError(f"{where}: found id {task.id!r} again (line {lines[task.id]}), expected a new one")
            lines[task.id] = number
            if self.limit is None or len(tasks) < self.limit:
                tools = [*task.tools, *shared]
                tasks.append(Task(task.id, task.messages, tools, task.reference, {**meta, **task.meta}))
        if not tasks:
            raise UserError(f"{self.path}: found no lines, expected one JSON object a line")
        object.__setattr__(self, "_tasks", tasks)

    @property
    def size(self) -> int:
        return len(self._tasks)  # type: ignore[attr-defined]

    def __getitem__(self, index: int) -> Task:
        return self._tasks[index]  # type: ignore[attr-defined]
