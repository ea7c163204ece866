"""Python functions as tools."""

import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

from ..errors import UserError
from ..rewards import RewardChoice, import_function
from .base import Task
from .checks import refuse_generator
from .tool_function import ToolFunction
from .tools import OnError, ToolEnvironment, unknown_tool, wrong_arguments


def tool_function(function: Callable[..., Any], path: str) -> ToolFunction:
    """Return a function as a tool.

    Raises:
        UserError: it yields, or its type hints cannot be used.
    """
    return _prepared(function, path) if isinstance(function, Hashable) else _prepared.__wrapped__(function, path)


@functools.lru_cache(maxsize=256)  # every rollout has an environment of its own
def _prepared(function: Callable[..., Any], path: str) -> ToolFunction:
    refuse_generator(function, f"tool {path!r}")
    tool = ToolFunction(function, path)
    tool.check()
    return tool


def tool_schemas(tools: Sequence[str]) -> list[dict[str, Any]]:
    """Return JSON schemas of functions given by import path, from their signatures and docstrings.

    Raises:
        UserError: a function cannot be imported, or its docstring or type hints do not describe its arguments.
    """
    return [copy.deepcopy(tool_function(import_function(path, "tool"), path).schema) for path in tools]


class FunctionTools(ToolEnvironment):
    """Answers calls with user-defined Python functions. The first message without a call is the final answer.

    A function, ``async`` or not, receives the call's arguments by name, converted into the types of its hints: enums,
    dataclasses and pydantic models become objects. It returns text, or a value that becomes JSON. It raises
    `gear_lightning.environments.tools.ToolError` for a mistake that the agent can correct; for other exceptions see
    ``on_error``. List the functions also in the tasks' ``tools`` (`JsonlTasks`), so that the prompt describes them.

    Args:
        tools: import paths of the functions.
        reward: as in `gear_lightning.environments.tools.ToolEnvironment`.
        max_calls: tool calls in an episode.
        on_error: what an exception of a function does, see `gear_lightning.environments.tools.ToolEnvironment`.
    """

    max_result: ClassVar[int | None] = 10_000

    def __init__(
        self,
        tools: list[str],
        reward: RewardChoice | None = None,
        max_calls: int = 16,
        on_error: OnError = "answer",
    ):
        super().__init__(reward, max_calls, on_error)
        self.functions: dict[str, Callable[..., Any]] = {}
        self.paths: dict[str, str] = {}
        for path in tools:
            function = import_function(path, "tool")
            name = tool_function(function, path).name
            if name in self.functions:
                raise UserError(f"tool {path!r}: another tool is called {name!r} already; rename one")
            self.functions[name], self.paths[name] = function, path

    def check(self, task: Task) -> None:
        super().check(task)
        for tool in task.tools:
            if (name := tool["function"]["name"]) not in self.functions:
                known = ", ".join(self.functions) or "none"
                raise UserError(f"task {task.id} lists the tool {name!r}, but FunctionTools provides only: {known}")

    def parameters(self, name: str) -> dict[str, Any] | None:
        if (shown := super().parameters(name)) is not None or name not in self.functions:
            return shown
        return self._tool(name).parameters

    def _tool(self, name: str) -> ToolFunction:
        return tool_function(self.functions[name], self.paths[name])

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        if name not in self.functions:
            raise unknown_tool(name, list(self.functions))
        call, problems = self._tool(name).bind(arguments)
        if call is None:
            raise wrong_arguments(name, problems)
        return call()
