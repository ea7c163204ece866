"""A calculator tool. Expressions are parsed by `arithmetic` and never reach Python's ``eval``."""

from typing import Any

from .arithmetic import CalculatorError, calculate
from .tools import ToolEnvironment, ToolError, unknown_tool

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "for example (3 + 4.5) * 2"}},
            "required": ["expression"],
        },
    },
}


class Calculator(ToolEnvironment):
    """Answers calls of ``calculator(expression)``. The first message without a call is the final answer.

    Takes the arguments of `ToolEnvironment`. A task enables the calculator by listing `CALCULATOR` in its tools.
    """

    def read_arguments(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments  # `call` checks them, and accepts a number as an expression

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if name != "calculator":
            raise unknown_tool(name, ["calculator"])
        if "expression" not in arguments:
            raise ToolError("calculator takes one argument, expression")
        expression = arguments["expression"]
        try:
            return calculate(str(expression) if isinstance(expression, int | float) else expression)
        except CalculatorError as error:
            raise ToolError(str(error)) from None
