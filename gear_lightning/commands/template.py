"""``gear-lightning template MODEL``: check a model's chat template and show which spans are trained on."""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from ..environments.base import Message, tool_call, tool_result
from ..environments.calculator import CALCULATOR
from ..generation.chat import Chat, ChatOptions, ignored_stops
from ..lens.trace import visible
from ..models import Pretrained

STYLES = {"prompt": "dim", "sampled": "bold", "observation": "dim italic"}


def spans(chat: Chat) -> list[tuple[str, list[int]]]:
    """Return a sample conversation with a tool call as training sees it: (kind of span, token ids)."""
    opening: list[Message] = [{"role": "user", "content": "What is 12 * 3?"}]
    call = tool_call("calculator", {"expression": "12 * 3"}, "I will calculate it.")
    return [
        ("prompt", chat.prompt(opening, [CALCULATOR])),
        ("sampled", chat.write(call)),
        ("observation", chat.continuation([tool_result("calculator", "36")])),
        ("sampled", chat.write({"role": "assistant", "content": "It is 36."})),
    ]


def template_command(argv: list[str]) -> int:
    """Run ``gear-lightning template MODEL``: check the chat template and print a sample conversation.

    Raises:
        UserError: the model cannot be loaded, or its template is not supported; says what is missing.
    """
    parser = argparse.ArgumentParser(
        "gear-lightning template",
        description="Check a model's chat template: show what is trained on and what is context.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="like model.policy.path: a directory, hub id, .gguf or package:..."
    )
    parser.add_argument("--tool_syntax", default="auto", choices=["auto", "json", "json_list", "words"])
    parser.add_argument(
        "--template_arguments", type=json.loads, metavar="JSON", help="like model.chat.template_arguments"
    )
    options = parser.parse_args(argv)
    source = Pretrained(options.model)
    chat = Chat(source.tokenizer(), ChatOptions(options.tool_syntax, options.template_arguments), source.stop_ids())
    chat.check_tools()
    stops = ", ".join(f"{visible(chat.tokenizer.decode([i]))} ({i})" for i in sorted(chat.stop_ids))
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
    console.print(f"tool calls: {chat.syntax}; the policy stops at: {stops}")
    if chat.ignored_stops:
        console.print(ignored_stops(chat))
    for who, ids in spans(chat):
        console.print(Text(f"-- {who}, {len(ids)} tokens{': trained on' if who == 'sampled' else ''}", style="bold"))
        console.print(_text(chat, ids, STYLES[who]))
    return 0


def _text(chat: Chat, ids: list[int], style: str) -> Any:
    return Text("\n".join(line and visible(line) for line in chat.tokenizer.decode(ids).split("\n")), style=style)
