"""Python functions as tools."""

import inspect
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Sequence
from typing import Any

from ..errors import UserError
from ..rewards import Reward, import_function
from .base import Task
from .checks import refuse_async
from .tools import ToolEnvironment, ToolError, unknown_tool

MAX_RESULT = 10_000  # characters of a tool's result that the policy sees


def tool_schemas(tools: Sequence[str]) -> list[dict[str, Any]]:
    """Return JSON schemas of functions given by import path, from their signatures and Google-style docstrings.

    Raises:
        UserError: a function cannot be imported, or its docstring or type hints do not describe its arguments.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    schemas = []
    for path in tools:
        function = import_function(path, "tool")
        refuse_async(function, f"tool {path!r}")
        try:
            schemas.append(get_json_schema(function))
        except Exception as error:
            raise UserError(
                f"tool {path!r} needs type hints and a docstring that describes each argument under Args: ({error})"
            ) from None
    return schemas


class FunctionTools(ToolEnvironment):
    """Answers calls with user-defined Python functions. The first message without a call is the final answer.

    A function receives the call's arguments by name and returns text, or a value that ``str`` converts to text. It
    raises `gear_lightning.environments.tools.ToolError` for a mistake that the agent can correct; any other exception
    ends the rollout. List the functions also in the tasks' ``tools`` (`JsonlTasks`), so that the prompt describes them.

    Args:
        tools: import paths of the functions.
        reward: scores the transcript; the name of a built-in reward, an import path, or a function.
        max_calls: tool calls in an episode.
    """

    def __init__(self, tools: list[str], reward: str | Reward | None = None, max_calls: int = 16):
        super().__init__(reward, max_calls)
        self.functions: dict[str, Callable[..., Any]] = {}
        for path in tools:
            function = import_function(path, "tool")
            refuse_async(function, f"tool {path!r}")
            name = getattr(function, "__name__", path.rpartition(".")[2])
            if name in self.functions:
                raise UserError(f"tool {path!r}: another tool is called {name!r} already; rename one")
            self.functions[name] = function

    def check(self, task: Task) -> None:
        super().check(task)
        for tool in task.tools:
            if (name := tool["function"]["name"]) not in self.functions:
                known = ", ".join(self.functions) or "none"
                raise UserError(f"task {task.id} lists the tool {name!r}, but FunctionTools provides only: {known}")

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        function = self.functions.get(name)
        if function is None:
            raise unknown_tool(name, list(self.functions))
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise ToolError(f"{name}: {error}") from None
        result = function(**arguments)
        if isinstance(result, Awaitable | AsyncIterable | Iterator):
            raise TypeError(f"the tool {name!r} returned a {type(result).__name__}, which is not supported")
        return str(result)[:MAX_RESULT]
