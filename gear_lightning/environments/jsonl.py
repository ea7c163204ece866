"""Tasks from a JSON Lines file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..rewards import BUILT_IN, resolve_reward
from ..runs.identity import UnknownIdentityError, file_digest, identity_of
from . import lines, openai_format
from .base import Message, Task
from .lines import IndexedLines, LineTasks, index_lines, kind_of
from .openai_format import TOOL_FORM, FormatError, is_tool, plain_messages, plain_tools

ROLES = ("system", "user", "assistant", "tool")  # of OpenAI's, developer and function become system and tool
_OWN = {"prompt", "messages", "id", "tools", "reference"}  # keys that become fields of the task; others go to its meta


def _expect(right: Any, where: str, found: str | tuple[str, Any], expected: str) -> None:
    """Raise `UserError` unless ``right`` is true. ``found``: a description of the input, or a name and its value."""
    if not right:
        text = found if isinstance(found, str) else f"{found[0]} = {kind_of(found[1])}"
        raise UserError(f"{where}: found {text}, expected {expected}")


def _plain(convert: Callable[[], Any], where: str) -> Any:
    try:
        return convert()
    except FormatError as error:
        raise UserError(f"{where}: {error}") from None


def _check_messages(messages: Any, where: str, name: str) -> list[Message]:
    _expect(isinstance(messages, list) and messages, where, (name, messages), "a list of messages")
    messages = _plain(lambda: plain_messages(messages, name), where)
    for place, message in enumerate(messages):
        at = f"{name}[{place}]"
        _expect(isinstance(message, dict), where, (at, message), "an object with role and content")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        _expect(role in ROLES, where, (f"{at}.role", role), f"one of {', '.join(ROLES)}")
        if calls is not None:
            _expect(role == "assistant", where, f"{at}.tool_calls in a {role} message", "an assistant message")
            _check_calls(calls, where, f"{at}.tool_calls")
        text = isinstance(content, str) or (content is None and bool(calls))
        _expect(text, where, (f"{at}.content", content), "text")
    return messages


def _check_calls(calls: Any, where: str, name: str) -> None:
    _expect(isinstance(calls, list) and calls, where, (name, calls), "a list of tool calls")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        right = isinstance(function, dict) and isinstance(function.get("name"), str)
        right = right and isinstance(function.get("arguments"), dict)  # type: ignore[union-attr]
        _expect(right, where, f"{name} with {kind_of(call)}", '{"function": {"name": text, "arguments": object}}')


def _check_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    tools = _plain(lambda: plain_tools(tools), where)
    _expect(isinstance(tools, list), where, ("tools", tools), "a list of JSON schemas")
    for tool in tools:
        _expect(is_tool(tool), where, f"{kind_of(tool)} as a tool", TOOL_FORM)
    return tools


_resolved = cache(resolve_reward)  # a file has many lines but few different rewards


def parse_task(line: dict[str, Any], where: str, default_id: str, rewards: Sequence[str] = ()) -> Task:
    """Return one line as a task.

    Args:
        line: see `JsonlTasks`.
        where: ``file:line``, for errors.
        default_id: id of the task if the line has no ``id``.
        rewards: import paths that the line may name as its reward.

    Raises:
        UserError: the line is invalid; the message states what was found and what was expected.
    """
    both = [key for key in ("prompt", "messages") if key in line]
    found = "both prompt and messages" if both else f"keys {', '.join(line) or 'none'}"
    _expect(len(both) == 1, where, found, "either prompt or messages")
    if "prompt" in line:
        prompt = line["prompt"]
        _expect(isinstance(prompt, str) and prompt.strip(), where, ("prompt", prompt), "text")
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages = _check_messages(line["messages"], where, "messages")
        last = messages[-1]["role"]
        _expect(last != "assistant", where, "an assistant message at the end of messages", "a user or tool message")
    name = line.get("id", default_id)
    right = (isinstance(name, str) and name.strip()) or (isinstance(name, int) and not isinstance(name, bool))
    _expect(right, where, ("id", name), "text or an integer")
    reference = line.get("reference")
    if isinstance(reference, list):
        _check_messages(reference, where, "reference")
    elif reference is not None:
        right = isinstance(reference, str) and reference.strip()
        _expect(right, where, ("reference", reference), "text or a list of messages")
    answer = line.get("answer", "")
    found = answer if isinstance(answer, list) else [answer]
    right = found and all(isinstance(one, str | int | float) for one in found)
    _expect(right, where, ("answer", answer), "text or a number, true or false, or a list of accepted answers")
    if "reward" in line:
        reward = line["reward"]
        _expect(isinstance(reward, str) and reward, where, ("reward", reward), "a name or an import path")
        known = reward in BUILT_IN or reward in rewards or "." not in reward
        _expect(known, where, ("reward", reward), "a built-in reward or one that the config lists under rewards")
        try:
            _resolved(reward)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    tools = _check_tools([] if line.get("tools") is None else line["tools"], where)
    meta = {key: value for key, value in line.items() if key not in _OWN}
    return Task(str(name), messages, tools, reference, meta)


class SharedSettings:
    """Settings of a source that apply to all of its tasks.

    Args:
        limit: number of tasks, at least 1.
        reward: of the tasks that name none.
        tools: import paths of functions whose schemas are added to every task.
        rewards: import paths that tasks may name.

    Raises:
        UserError: a setting is out of range or cannot be imported.
    """

    def __init__(self, limit: int | None, reward: str | None, tools: Sequence[str], rewards: Sequence[str]):
        from .functions import tool_schemas

        if limit is not None and limit < 1:
            raise UserError(f"limit={limit}: must be at least 1")
        for name in [*filter(None, [reward]), *rewards]:
            resolve_reward(name)
        self.reward = reward
        self.rewards = list(rewards)
        self.tools = tool_schemas(tools)

    def complete(self, task: Task) -> Task:
        """Return a task with the shared tools and reward."""
        meta = {} if self.reward is None else {"reward": self.reward}
        return replace(task, tools=[*task.tools, *self.tools], meta={**meta, **task.meta})

    def identity(self, named: Iterable[str]) -> str | None:
        """Return a text that changes with the shared tools, and with the rewards of the tasks; None if a reward cannot
        be identified. ``named``: the rewards that tasks name."""
        names = {*named, *self.rewards, *filter(None, [self.reward])}
        try:
            return repr([self.tools, [identity_of(resolve_reward(name)) for name in sorted(names)]])
        except UnknownIdentityError:
            return None


def noted(parse: Callable[[int, dict[str, Any]], Task], named: dict[str, int]) -> Callable[[int, dict[str, Any]], str]:
    """Return a function of a line's number and the line that checks the line and returns the id of its task.

    Args:
        parse: returns the task of a line.
        named: filled with the rewards that tasks name -> the number of the first line that names it.
    """

    def look(number: int, line: dict[str, Any]) -> str:
        task = parse(number, line)
        if "reward" in task.meta:
            named.setdefault(task.meta["reward"], number)
        return task.id

    return look


def check_named(rewards: dict[str, int], where: Callable[[int], str]) -> None:
    """Check that rewards can be imported on this machine: an index of the tasks from the cache does not guarantee it.

    Args:
        rewards: reward -> number of the first line that names it.
        where: names the line with a number, for errors.

    Raises:
        UserError: one cannot be imported; names the line.
    """
    for reward, number in rewards.items():
        try:
            resolve_reward(reward)
        except UserError as error:
            raise UserError(f"{where(number)}: {error}") from None


@dataclass(frozen=True)
class JsonlTasks(LineTasks):
    """Tasks from a .jsonl, .jsonl.gz or .jsonl.zst file with one JSON object per line.

    A line has ``prompt`` (text) or ``messages`` (chat messages), and may have ``id`` (default: file name and line
    number), ``tools`` (JSON schemas), ``reference`` (text or messages; only the teacher sees it), ``answer`` (for the
    built-in rewards: text, a number, true or false, or a list of accepted answers) and ``reward`` (a built-in one, or
    one of ``rewards``). All other keys go to the task's ``meta``. Messages and tools may have the forms of the OpenAI
    API, see `gear_lightning.environments.openai_format`. For other keys and other files, see
    `gear_lightning.environments.dataset_tasks.DatasetTasks`.
    The whole file is checked before training. The index of a large file is cached, so it is checked only once. Lines
    are read when they are used. A line cannot import code: it can only name the rewards in ``rewards``.

    Args:
        path: the file; .zst requires the extra ``datasets``.
        limit: number of tasks to use, from the start of the file. Null: all.
        reward: reward of the tasks that name none; a built-in reward or an import path. Null: the environment's.
        tools: import paths of functions whose schemas are added to every task, for `FunctionTools`.
        rewards: import paths of rewards that tasks of the file may name.
    """

    path: str
    limit: int | None = None
    reward: str | None = None
    tools: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)

    def __post_init__(self):
        shared = SharedSettings(self.limit, self.reward, self.tools, self.rewards)
        stem = Path(self.path).name.removesuffix(".gz").removesuffix(".zst").removesuffix(".jsonl")
        notes: dict[str, int] = {}  # reward -> the first line that names it

        def parse(number: int, line: dict[str, Any]) -> Task:
            return parse_task(line, f"{self.path}:{number}", f"{stem}-{number}", self.rewards)

        rules = repr([stem, sorted(self.rewards), code_digests()])
        found = index_lines(self.path, rules, noted(parse, notes), notes)
        if not len(found):
            raise UserError(f"{self.path}: found no lines, expected one JSON object per line")
        check_named(notes, found.source.where)
        for name, value in {"_lines": found, "_parse": parse, "_shared": shared}.items():
            object.__setattr__(self, name, value)

    @property
    def size(self) -> int:
        return len(self._lines) if self.limit is None else min(self.limit, len(self._lines))  # type: ignore[attr-defined]

    def __getitem__(self, index: int) -> Task:
        task = self._parse(*self._lines[range(self.size)[index]])  # type: ignore[attr-defined]
        return self._shared.complete(task)  # type: ignore[attr-defined]

    @property
    def digest(self) -> str:
        return self._lines.digest  # type: ignore[attr-defined]

    @property
    def fingerprint(self) -> str | None:
        found: IndexedLines = self._lines  # type: ignore[attr-defined]
        shared = self._shared.identity(found.notes)  # type: ignore[attr-defined]
        return None if shared is None else repr([found.digest, self, shared])


def code_digests() -> list[str]:
    """Return digests of the code that decides whether a line is a valid task."""
    return [file_digest(file) for file in (__file__, lines.__file__, openai_format.__file__)]
