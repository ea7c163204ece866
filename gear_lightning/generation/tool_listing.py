"""Who lists the tools in the prompt: the chat template, or this package in the system message."""

from html import escape

from ..environments.base import Message
from ..errors import UserError
from .chat_safety import unmarked
from .tool_syntax.base import Tools, ToolSyntax, dumps
from .tool_syntax.known import json_calls
from .tool_syntax.learned import FIRST, PROBE_TOOLS
from .tool_syntax.schemas import names_of
from .turn_format import HELLO, TurnFormat

SYSTEM: Message = {"role": "system", "content": "zq7system7qz"}
EXAMPLE = "zq7example7qz"  # placeholder of the example of a call


class ToolListing:
    """Renders opening conversations, with the tools.

    Args:
        turn: the boundaries of turns.
        describes: whether this package lists the tools.

    Attributes:
        lists: whether the template lists the tools.
        system_role: ``shown``, ``omitted`` or ``refused``: what the template does with a system message.
    """

    def __init__(self, turn: TurnFormat, describes: bool):
        self.turn, self.describes = turn, describes
        self.lists = FIRST in self._opened([HELLO], PROBE_TOOLS)
        shown = self._opened([SYSTEM, HELLO])
        self.system_role = "refused" if not shown else "shown" if SYSTEM["content"] in shown else "omitted"

    def _opened(self, messages: list[Message], tools: Tools = ()) -> str:
        try:
            return self.turn.opening(messages, tools)
        except UserError:
            return ""

    def check(self, syntax: ToolSyntax | None) -> None:
        """Check that someone lists the tools, if they are called in a syntax.

        Raises:
            UserError: neither the template nor this package does.
        """
        if self.lists or self.describes or (syntax and not syntax.any_text):
            return
        own = (
            "model.chat.list_tools to system (this package lists the tools in the system message, and the policy "
            "calls them in the template's own syntax) or "
            if syntax is not None
            else ""
        )
        raise UserError(
            f"the chat template lists no tools, so the policy would not know them: set {own}model.chat.tool_syntax to "
            "json_list (this package lists the tools in the system message and describes its own syntax of calls)"
        )

    def opening(self, messages: list[Message], tools: Tools, syntax: ToolSyntax | None) -> str:
        """Return the text of an opening conversation, up to the start of the assistant's turn.

        Raises:
            UserError: the template cannot render the messages or omits a part of them, or nothing lists the tools.
        """
        if self.system_role == "omitted" and any(m["role"] == "system" for m in messages):
            raise UserError("the chat template omits system messages; put the text into the first user message")
        if not tools:
            return self.turn.opening(messages)
        self.check(syntax)
        if self.describes:
            known = syntax or json_calls(listed=True)
            text = self.turn.opening(self._described(messages, known, tools))
            # The template and this package write control tokens, messages do not: the example is inserted afterwards.
            text = text.replace(EXAMPLE, known.example())
        else:
            text = self.turn.opening(messages, tools)
        if syntax is None or syntax.any_text:
            self._check_names(text, self._opened(messages), tools)
        return text

    @staticmethod
    def _check_names(text: str, without: str, tools: Tools) -> None:
        """Check that a prompt names each tool, more often than the same prompt without tools does."""
        text, without = unmarked(text), unmarked(without)
        forms = {name: {name, dumps(name)[1:-1], escape(name)} for name in names_of(tools)}
        missing = [name for name, many in forms.items() if all(text.count(n) <= without.count(n) for n in many)]
        if missing:
            raise UserError(
                f"the chat template does not list the tool {missing[0]!r} in this prompt, so the policy would not know "
                "it: set model.chat.list_tools to system or model.chat.tool_syntax to json_list (this package lists "
                "the tools in the system message)"
            )

    def _described(self, messages: list[Message], syntax: ToolSyntax, tools: Tools) -> list[Message]:
        """Return messages with the tools in the system message, or in the first one if there is no system role."""
        listed = syntax.system_text(tools, EXAMPLE)
        if messages and messages[0]["role"] == "system":
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listed}"}, *messages[1:]]
        if self.system_role == "shown":
            return [{"role": "system", "content": listed}, *messages]
        return [{**messages[0], "content": f"{listed}\n\n{messages[0].get('content') or ''}"}, *messages[1:]]
