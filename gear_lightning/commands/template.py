"""``gear-lightning template MODEL``: check a model's chat template and show which spans are trained on."""

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from ..batch import CALL, REASONING
from ..environments.base import Message, tool_call
from ..environments.calculator import CALCULATOR
from ..errors import UserError
from ..generation.chat import Chat, ChatOptions, ToolCallError, ignored_stops
from ..lens.trace import visible
from ..models import Pretrained
from .parsers import template as parser

STYLES = {"prompt": "dim", "thought": "italic magenta", "call": "bold cyan", "sampled": "bold", "observation": "green"}
NOTES = {
    "sampled": "answer: trained on",
    "thought": "reasoning: trained on",
    "call": "tool call: trained on",
}


def spans(chat: Chat, *, tools: bool = True) -> Iterator[tuple[str, list[int]]]:
    """Yield a sample conversation as training sees it: (kind of span, token ids).

    Args:
        chat: the chat format.
        tools: whether the conversation has a tool call.
    """
    listed = [CALCULATOR] if tools else []
    ids = chat.prompt([{"role": "user", "content": "What is 12 * 3?"}], listed)
    yield "prompt", ids
    if tools:
        turn = chat.write(tool_call("calculator", {"expression": "12 * 3"}, "I will calculate it."))
        yield from _parts(chat, turn, listed, ids)
        calls = chat.read(turn, listed, ids).message.get("tool_calls") or [{"id": ""}]  # words call no calculator
        answer: Message = {"role": "tool", "name": "calculator", "tool_call_id": calls[0]["id"], "content": "36"}
        context = chat.continuation([answer], turn[-1])
        yield "observation", context
        ids = [*ids, *turn, *context]
    yield from _parts(chat, chat.write({"role": "assistant", "content": "It is 36."}), listed, ids)


def _parts(chat: Chat, turn: list[int], tools: Any, context: list[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield the parts of a turn by role: reasoning, tool calls, the rest."""
    read = chat.read(turn, tools, context)
    kinds = [{REASONING: "thought", CALL: "call"}.get(part, "sampled") for part in read.parts]
    start = 0
    for place in range(1, len(turn) + 1):
        if place == len(turn) or kinds[place] != kinds[start]:
            yield kinds[start], turn[start:place]
            start = place


def template_command(argv: list[str]) -> int:
    """Run ``gear-lightning template MODEL``: check the chat template and print a sample conversation.

    Returns:
        0 if everything passes; 1 if tools cannot be used with this template.

    Raises:
        UserError: the model cannot be loaded, or its template cannot be used at all; says what is missing.
    """
    options = parser().parse_args(argv)
    source = Pretrained(options.model)
    chosen = ChatOptions(
        options.tool_syntax, list_tools=options.list_tools, template_arguments=options.template_arguments
    )
    chat = Chat(source.tokenizer(), chosen, source.stop_ids())
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
    for line in _facts(chat):
        console.print(line)
    problem = ""
    try:
        chat.check_tools()
    except UserError as error:
        problem = str(error)
    for name, wrong in chat.tools.proof():
        console.print(f"  {'failed' if wrong else 'passed'}: {name}{': ' * bool(wrong)}{wrong}")
    if chat.tools.lossy:
        console.print("  note: the template does not escape all arguments; demonstrations are written with escapes")
    if problem:
        console.print(f"tools cannot be used: {problem}", style="red")
    try:
        for kind, ids in spans(chat, tools=not problem):
            title = NOTES.get(kind, kind)
            console.print(Text(f"-- {title}, {len(ids)} tokens", style="bold"))
            console.print(_text(chat, ids, STYLES[kind]))
    except (UserError, ToolCallError) as error:
        problem = str(error)
        console.print(f"the sample conversation cannot be rendered: {problem}", style="red")
    return 1 if problem else 0


def _facts(chat: Chat) -> Iterator[str]:
    """Yield lines about the chat format."""
    stops = ", ".join(f"{visible(chat.tokenizer.decode([i]))} ({i})" for i in sorted(chat.stop_ids))
    yield f"the policy stops at: {stops}"
    if chat.ignored_stops:
        yield ignored_stops(chat)
    marks = chat.thinking and (visible(chat.thinking.open), visible(chat.thinking.close))
    known = "" if chat.thinking and chat.thinking.native else " (the template does not mention them)"
    yield f"reasoning stands between {marks[0]} and {marks[1]}{known}" if marks else "reasoning is not separated"
    if chat.tools.syntax is None:
        yield "tool calls: unknown syntax"
        return
    who = "the template" if chat.tools.lists and not chat.tools.describes else "gear_lightning, in the system message"
    wrote = "learned from the template" if chat.tools.renders else "known; the template does not render calls"
    if chat.options.tool_syntax != "auto":
        wrote = "set by tool_syntax"
    yield f"tool calls: {type(chat.tools.syntax).__name__} ({wrote}); the tools are listed by {who}"
    yield "\n".join("  " + visible(line) for line in chat.syntax.example().split("\n"))


def _text(chat: Chat, ids: list[int], style: str) -> Any:
    return Text("\n".join(line and visible(line) for line in chat.tokenizer.decode(ids).split("\n")), style=style)
