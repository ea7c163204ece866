"""Splits the text of an assistant turn into reasoning, answer, and tool calls."""

from dataclasses import dataclass, field

from .tool_syntax.base import Call, ToolCallError, Tools, ToolSyntax, searched

MAX_CANDIDATES = 8  # end marks of one thought that are tried; with more, the last one ends it
MAX_THOUGHTS = 64  # thoughts of a turn that are separated; the next one ends at the last end mark

Span = tuple[int, int]


@dataclass(frozen=True)
class Thinking:
    """The marks around a model's reasoning.

    Args:
        open: mark before the reasoning. A chat template may write it as part of the generation prompt.
        close: mark behind the reasoning.
        native: whether the chat template knows the marks. Otherwise only a turn that begins with ``open`` has
            reasoning.
        exclusive: whether ``close`` occurs only behind reasoning. GPT-OSS ends other messages with it, too.
    """

    open: str = "<think>"
    close: str = "</think>"
    native: bool = False
    exclusive: bool = True

    def opened_in(self, context: str) -> bool:
        """Return whether a context ends inside of reasoning."""
        return bool(self.open.strip()) and context.rstrip().endswith(self.open.strip())


@dataclass
class TurnText:
    """The parts of a turn.

    Attributes:
        reasoning: the reasoning without its marks; empty if there is none.
        content: the answer, without reasoning and calls.
        calls: the tool calls, in order.
        thoughts: spans of the text that are reasoning, with their marks.
        actions: spans of the text that are tool calls, with their marks.
        unfinished: whether the text ends inside of reasoning.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    thoughts: list[Span] = field(default_factory=list)
    actions: list[Span] = field(default_factory=list)
    unfinished: bool = False


def read_turn(
    text: str, syntax: ToolSyntax, tools: Tools, thinking: Thinking | None = None, inside: bool = False
) -> TurnText:
    """Return the parts of a turn.

    A call that is drafted or quoted in the reasoning is not a call. Reasoning ends at the first end mark behind which
    no further one occurs outside of tool calls: a thought may quote the mark, and so may a call's arguments.

    Args:
        text: the turn, without its stop token.
        syntax: how the model writes calls.
        tools: the tools of the task; without any, the text is not searched for calls.
        thinking: the marks of reasoning. None: do not split.
        inside: whether the generation prompt has opened the reasoning.

    Raises:
        ToolCallError: a call that cannot be read.
    """
    reader = _Reader(text, syntax, tools, thinking)
    if thinking is None:
        found = reader.outside(0)
    elif inside:
        found = reader.thought(0, 0)
    else:
        found = reader.without_opening() if thinking.native and thinking.exclusive else reader.outside(0)
    found.content = syntax.clean(found.content)
    return found


class _Reader:
    def __init__(self, text: str, syntax: ToolSyntax, tools: Tools, thinking: Thinking | None):
        self.text, self.syntax, self.tools, self.thinking = text, syntax, tools, thinking

    def without_opening(self) -> TurnText:
        """Read a turn whose reasoning may lack its opening mark, as with templates of DeepSeek R1."""
        try:
            found = self.outside(0)
        except ToolCallError:
            if self._closes(0) and not self._opens(0):
                return self.thought(0, 0)
            raise
        return self.thought(0, 0) if self._has_close(found.content) else found

    def outside(self, at: int) -> TurnText:
        """Read from ``at``, which is not inside of reasoning."""
        content, found = "", TurnText()
        while True:
            opened = self._opens(at)
            call = self.syntax.find(self.text, at, self.tools) if self.tools else -1
            if opened and (call < 0 or opened[0] <= call) and self._begins(opened, content + self.text[at : opened[0]]):
                content += self.text[at : opened[0]]
                closed = self._first_close(opened[1]) if len(found.thoughts) < MAX_THOUGHTS else None
                if closed is None:
                    rest = self.thought(*opened)
                    break
                thought = self.text[opened[1] : closed[0]].strip()
                found.reasoning = "\n".join(part for part in (found.reasoning, thought) if part)
                found.thoughts.append((opened[0], closed[1]))
                at = closed[1]
                continue
            if call < 0:
                content += self.text[at:]
                rest = TurnText()
                break
            content += self.text[at:call]
            calls, end = self.syntax.read(self.text, call, self.tools)
            found.calls += calls
            found.actions.append((call, end))
            at = end
        found.reasoning = "\n".join(part for part in (found.reasoning, rest.reasoning) if part)
        found.unfinished = rest.unfinished
        found.content = content + rest.content
        found.calls += rest.calls
        found.thoughts += rest.thoughts
        found.actions += rest.actions
        return found

    def thought(self, start: int, begin: int) -> TurnText:
        """Read reasoning whose mark is at ``start`` and whose text is at ``begin``, and all that follows it."""
        closes = self._closes(begin)
        if not closes:
            return TurnText(self.text[begin:].strip(), thoughts=[(start, len(self.text))], unfinished=True)
        if len(closes) > MAX_CANDIDATES:
            closes = closes[-1:]
        for close in closes[:-1]:
            try:
                found = self.outside(close[1])
            except ToolCallError:
                continue
            if not self._has_close(found.content):
                return self._with_thought(found, start, begin, close)
        return self._with_thought(self.outside(closes[-1][1]), start, begin, closes[-1])

    def _with_thought(self, found: TurnText, start: int, begin: int, close: Span) -> TurnText:
        """Return the parts of a turn with a thought before them."""
        reasoning = self.text[begin : close[0]].strip()
        found.reasoning = "\n".join(part for part in (reasoning, found.reasoning) if part)
        found.thoughts.insert(0, (start, close[1]))
        return found

    def _begins(self, opened: Span, content: str) -> bool:
        """Return whether an opening mark starts reasoning: at the start of a turn, or, where the template knows the
        marks, if it is closed again. Elsewhere the answer only mentions it."""
        if not content.strip():
            return True
        return bool(self.thinking and self.thinking.native and self._closes(opened[1]))

    def _opens(self, at: int) -> Span | None:
        found = searched(self.thinking.open).search(self.text, at) if self.thinking else None
        return found.span() if found else None

    def _closes(self, at: int) -> list[Span]:
        return [m.span() for m in searched(self.thinking.close).finditer(self.text, at)] if self.thinking else []

    def _first_close(self, at: int) -> Span | None:
        """Return the next end mark, if any end mark ends reasoning."""
        if self.thinking is None or self.thinking.exclusive:
            return None
        found = searched(self.thinking.close).search(self.text, at)
        return found.span() if found else None

    def _has_close(self, content: str) -> bool:
        return bool(self.thinking and searched(self.thinking.close).search(content))
