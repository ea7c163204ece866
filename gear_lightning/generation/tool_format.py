"""How a chat template lists tools, renders calls and shows results."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from ..environments.base import Message
from ..errors import UserError
from .tool_syntax.base import ToolCallError, Tools, ToolSyntax
from .tool_syntax.known import FALLBACK, FIRST_CHOICE, NAMED, described, json_calls, known
from .tool_syntax.learned import ARGUMENTS, FIRST, IDS, PROBE_TOOLS, SECOND, candidates
from .turn_format import HELLO, MARK, TurnFormat
from .turn_text import read_turn

BOTH = [(FIRST, ARGUMENTS[0]), (SECOND, ARGUMENTS[1])]
_MARKS = str.maketrans("", "", "\ufdd0\ufdd1")
LOOK = 200  # characters in which the end token of a turn is searched
EXAMPLE = "zq7example7qz"  # placeholder of the example of a call
RESULT = "<tool_response>\n{}\n</tool_response>"  # a result for templates without a tool role


def unmarked(text: str) -> str:
    """Return rendered text without the marks of spelled-out control tokens."""
    return text.translate(_MARKS)


def _schema(arguments: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: {"type": "string" if isinstance(value, str) else "object"} for name, value in arguments.items()}
    return {"properties": kinds}


def calls_of(*calls: tuple[str, dict[str, Any]], ids: Iterable[str] = IDS) -> Message:
    """Return an assistant message with calls, given as (name, arguments) pairs."""
    made = [
        {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}
        for (name, arguments), identifier in zip(calls, ids, strict=False)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


class ToolFormat:
    """The part of a chat format that concerns tools.

    Args:
        turn: the boundaries of turns.
        choice: the syntax, its name, or ``auto``.
        list_tools: ``template`` or ``system``: who lists the tools.
        stop_ids: tokens that end a turn.

    Attributes:
        syntax: how the policy writes calls; None if the template's own syntax is unknown.
        native: whether turns with calls are rendered by the template; otherwise ``syntax`` writes them.
        renders: whether the template renders the calls of earlier turns.
        lists: whether the template lists the tools.
        end_text: the token that ends a turn with calls.
        lossy: whether the template renders some arguments in a way that cannot be read back, as the proof found;
            ``syntax`` writes demonstrations with such arguments.
        results_as_user: whether results are shown as user messages, because the template has no tool role.
    """

    def __init__(self, turn: TurnFormat, choice: "str | ToolSyntax", list_tools: str, stop_ids: set[int]):
        self.turn, self.template = turn, turn.template
        self._choice = choice
        decode = self.template.tokenizer.decode
        self._stops = sorted({turn.end_text, *(decode([i]) for i in stop_ids)} - {""}, key=len, reverse=True)
        # A tokenizer with several templates uses the one for tools only if there are tools.
        self._given: Tools = PROBE_TOOLS if isinstance(self.template.tokenizer.chat_template, dict) else ()
        self.lists = FIRST in self._opening_with_tools()
        one = self._probe((FIRST, ARGUMENTS[0]))
        self.renders = one is not None and FIRST in one and "alpha" in one
        self.lossy = False
        self.native = self.renders and choice != "json_list"
        self.syntax = self._find_syntax(one) if self.renders else self._unrendered()
        if isinstance(choice, ToolSyntax):
            self.syntax = choice
        elif choice != "auto":
            self.syntax = NAMED[choice]()
        self.describes = choice == "json_list" or list_tools == "system"
        self._system_role = self._has_system_role()
        self.results_as_user = False
        self.results_as_user = self.describes and not self.shows_results()
        self.end_text = self._end_of_calls()

    def _opening_with_tools(self) -> str:
        try:
            return self.turn.opening([HELLO], PROBE_TOOLS)
        except UserError:
            return ""

    def _probe(self, *calls: tuple[str, dict[str, Any]]) -> str | None:
        """Return the text of a turn with calls, without its end token; None if the template cannot render it."""
        try:
            text = self.turn.without_thought(self.turn.body(calls_of(*calls), PROBE_TOOLS))
        except UserError:
            return None
        return self._cut(text)

    def _cut(self, text: str) -> str:
        """Return the text of a turn with calls up to its end token. Spelled-out control tokens are marked."""
        found = [match.start() for stop in self._stops if (match := re.search("(?<!\ufdd0)" + re.escape(stop), text))]
        if found:
            return text[: min(found)]
        text = text.rstrip()
        special = next((t for t in self.template.control.special if text.endswith(t)), "")
        return text[: len(text) - len(special)]

    def _find_syntax(self, one: str | None) -> ToolSyntax | None:
        """Return the first syntax that reads back what the template renders."""
        first = known(FIRST_CHOICE, self.template.source)
        tried = [first] if first else []
        if one is not None:
            two = self._probe((FIRST, ARGUMENTS[0]), (SECOND, ARGUMENTS[1]))
            tried += candidates(one, two)
        return next((syntax for syntax in tried if self.reads_back(syntax, (FIRST, ARGUMENTS[0]))), None)

    def _unrendered(self) -> ToolSyntax | None:
        """Return the syntax of a template that does not render calls."""
        source = self.template.source
        tokens = source + " ".join(self.template.tokenizer.get_added_vocab())
        return known(FIRST_CHOICE, source) or known(FALLBACK, tokens) or described(source)

    def reads_back(self, syntax: ToolSyntax, *calls: tuple[str, dict[str, Any]]) -> bool:
        """Return whether calls are read as the template (or the syntax, for templates that render none) writes them."""
        return self._read(syntax, self._text(syntax, calls)) == list(calls)

    def _text(self, syntax: ToolSyntax, calls: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
        return self._probe(*calls) if self.native else self._written(syntax, list(calls))

    def _read(self, syntax: ToolSyntax, text: str | None) -> list[tuple[str, Any]] | None:
        """Return the calls in a text; None if there is no text, if it cannot be read, or if text is left over."""
        if text is None:
            return None
        try:
            found = read_turn(unmarked(text), syntax, PROBE_TOOLS, self.turn.thinking)
        except ToolCallError:
            return None
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in found.calls]
        return None if found.content else calls

    @staticmethod
    def _written(syntax: ToolSyntax, calls: list[tuple[str, dict[str, Any]]]) -> str:
        return syntax.write([{"name": name, "arguments": arguments} for name, arguments in calls])

    def rendered(self, message: Message) -> str:
        """Return the text of a turn with calls as the template renders it, without its end token."""
        text = self._cut(self.turn.without_thought(self.turn.body(message, PROBE_TOOLS)))
        if not self._same(text, message):  # the template does not escape quotes, for example
            syntax = self.syntax or json_calls()
            written = syntax.write([c["function"] for c in message["tool_calls"]])
            return syntax.joint.join(part for part in (message.get("content"), written) if part)
        content = (message.get("content") or "").strip()
        if content and content not in unmarked(text):  # templates of models that never write both
            return content + (self.syntax or json_calls()).joint + text.lstrip("\n")
        return text

    def _same(self, text: str, message: Message) -> bool:
        """Return whether the calls of a message are read from its text as they are."""
        wanted = [c["function"] for c in message["tool_calls"]]
        try:
            tools = [{"function": {"name": c["name"], "parameters": _schema(c["arguments"])}} for c in wanted]
            found = read_turn(unmarked(text), self.syntax or json_calls(), tools, self.turn.thinking).calls
        except ToolCallError:
            return False
        return [c["function"] for c in found] == [{"name": c["name"], "arguments": c["arguments"]} for c in wanted]

    def check_listing(self) -> None:
        """Check that someone lists the tools.

        Raises:
            UserError: neither the template nor this package does.
        """
        if self.lists or self.describes or (self.syntax and not self.syntax.any_text):
            return
        own = (
            "model.chat.list_tools to system (this package lists the tools in the system message, and the policy "
            "calls them in the template's own syntax) or "
            if self.syntax is not None
            else ""
        )
        raise UserError(
            f"the chat template lists no tools, so the policy would not know them: set {own}model.chat.tool_syntax to "
            "json_list (this package lists the tools in the system message and describes its own syntax of calls)"
        )

    def check(self) -> None:
        """Check that calls and results pass through the chat template unchanged.

        Raises:
            UserError: they do not; the message says what to set.
        """
        self.check_listing()
        failed = next((f"{name}: {problem}" for name, problem in self.proof() if problem), None)
        if failed:
            raise UserError(
                f"the chat template does not pass tool calls through unchanged ({failed}). Set "
                "model.chat.tool_syntax to json_list (this package lists the tools and describes its own syntax), or "
                "to a subclass of gear_lightning.generation.tool_syntax.ToolSyntax that reads the model's calls; "
                "`gear-lightning template MODEL` shows what the template renders"
            )

    def proof(self) -> Iterator[tuple[str, str]]:
        """Yield what the round trip checks, and what is wrong with it (empty: nothing)."""
        syntax = self.syntax
        if syntax and not syntax.any_text:
            return
        yield "tools are listed", "" if self.lists or self.describes else "the template lists none"
        if syntax is None:
            yield "a call is read back", "the syntax of the calls that the template renders is unknown"
            return
        for name, call in self._calls(syntax):
            yield name, self._problem(syntax, call)
        text = self._text(syntax, BOTH)
        if text is not None and SECOND in text:  # some models make one call per turn
            yield "two calls in one turn", self._problem(syntax, *BOTH)
        yield "results are shown", self._result_problem()

    def _problem(self, syntax: ToolSyntax, *calls: tuple[str, dict[str, Any]]) -> str:
        found = self._read(syntax, self._text(syntax, calls))
        if found == list(calls):
            return ""
        if found or calls[0] in BOTH or not self.native:
            return "the call is not read back as it was written"
        # the template does not escape such arguments, so they cannot be read back; the syntax itself must
        if self._read(syntax, self._written(syntax, list(calls))) != list(calls):
            return "the call is not read back as it was written"
        self.lossy = True
        return ""

    def _calls(self, syntax: ToolSyntax) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
        """Yield calls that a round trip must preserve, with a description."""
        yield "a call is read back", BOTH[0]
        yield "a call of another function", BOTH[1]
        for name, arguments in self._arguments(syntax):
            yield name, (FIRST, arguments)

    def _arguments(self, syntax: ToolSyntax) -> Iterator[tuple[str, dict[str, Any]]]:
        deep = {"a": [1, 2.5, {"b": None, "c": [True, False, "x"]}], "d": {}}
        yield "nested objects", {"alpha": "x", "beta": deep}
        yield "characters that are not ASCII", {"alpha": "Zürich ☃ 日本 🙂"}
        yield "quotes and backslashes", {"alpha": "a \" and ' and \\ and `"}
        yield "line breaks", {"alpha": "first\n  second\n\nlast"}
        yield "text that looks like a number", {"alpha": "42"}
        yield "text that looks like JSON", {"alpha": '{"k": 1}'}
        whole = unmarked(self._written(syntax, [(FIRST, {"alpha": MARK})]))
        opening, closing = whole.partition(FIRST)[0], whole.rpartition(MARK)[2]
        yield "text with the syntax's own marks", {"alpha": f"a {opening}b{closing} c"}

    def _result_problem(self) -> str:
        try:
            text = self.continuation(self.shown([self._result("probe result")]))[0]
        except UserError as error:
            return str(error)
        return "" if "probe result" in text else "the template does not show the result of a call"

    def shows_results(self) -> bool:
        """Return whether the template shows the text of a tool's result."""
        try:
            return "probe result" in self.continuation([self._result("probe result")])[0]
        except UserError:
            return False

    def _end_of_calls(self) -> str:
        try:
            return self.continuation([self._result("probe result")])[1]
        except UserError:
            return self.turn.end_text

    @staticmethod
    def _result(text: str) -> Message:
        return {"role": "tool", "name": FIRST, "tool_call_id": IDS[0], "content": text}

    def shown(self, messages: list[Message]) -> list[Message]:
        """Return messages as the template can render them: results as user messages if it has no tool role."""
        if not self.results_as_user:
            return messages
        found: list[Message] = []
        for message in messages:
            if message["role"] != "tool":
                found.append(message)
                continue
            text = RESULT.format(message.get("content") or "")
            if found and found[-1]["role"] == "user" and found[-1].get("_results"):
                found[-1] = {**found[-1], "content": found[-1]["content"] + "\n" + text}
            else:
                found.append({"role": "user", "content": text, "_results": True})
        return [{k: v for k, v in m.items() if k != "_results"} for m in found]

    def continuation(self, messages: list[Message]) -> tuple[str, str, bool]:
        """Return the text behind a turn: (text behind its end token, the end token's text, whether it is shared).

        The turn is a placeholder: with a call for each result, because templates render results from the calls.

        Raises:
            UserError: the template cannot render these messages after an assistant turn.
        """
        results = [m for m in messages if m["role"] == "tool"]
        if not results or not self.renders or self.results_as_user:
            stand_in: Message = {"role": "assistant", "content": MARK}
        else:
            ids = [m.get("tool_call_id") or IDS[n % 2] for n, m in enumerate(results)]
            stand_in = calls_of(*((m.get("name") or FIRST, {"alpha": MARK}) for m in results), ids=ids)
            messages = self._with_ids(messages, ids)
        tools = self._given if results else ()
        try:
            text = self.turn.opening([HELLO, stand_in, *messages], tools)
        except UserError:
            if len(results) < 2 or "tool_calls" not in stand_in:
                raise
            stand_in = {**stand_in, "tool_calls": stand_in["tool_calls"][:1]}  # one call per turn: Llama 3
            text = self.turn.opening([HELLO, stand_in, *messages], tools)
        return self._behind(text, stand_in)

    @staticmethod
    def _with_ids(messages: list[Message], ids: list[str]) -> list[Message]:
        given = iter(ids)
        return [{**m, "tool_call_id": next(given)} if m["role"] == "tool" else m for m in messages]

    def _behind(self, text: str, stand_in: Message) -> tuple[str, str, bool]:
        made = bool(stand_in.get("tool_calls"))
        tail, count = self._tail(json.dumps(stand_in)) if made else ("", 1)
        parts = text.split(MARK, count)
        if len(parts) <= count:
            raise UserError("the chat template does not render an assistant turn before other messages")
        after = parts[count]
        behind = after[len(tail) :] if after.startswith(tail) else after
        behind[:LOOK].encode()  # half of a surrogate pair: the tokenizer's own error would not mention it
        ids = self.template.tokenizer.encode(behind[:LOOK].partition("\ufdd0")[0], add_special_tokens=False)
        if made and not after.startswith(tail):  # the template renders the last turn in another way
            found = [(at, stop) for stop in self._stops if (at := behind.find(stop)) >= 0]
            if not found:
                raise UserError("the chat template cannot be continued after a turn with tool calls")
            at, end = min(found)
        else:
            token = next((i for i in ids if self.template.control.holds(i)), None)
            end = self.turn.end_text if token is None else self.template.tokenizer.decode([token])
            at = behind.find(end)
            if at < 0 or behind[:at].strip():
                raise UserError("the chat template cannot be continued after an assistant turn")
        rest = behind[at + len(end) :]
        if not rest:
            raise UserError("the chat template cannot be continued after an assistant turn")
        own = end not in (self.turn.end_text, self.template.tokenizer.eos_token)
        return rest, end, (self.turn.shared or own) if made else self.turn.shared

    @lru_cache(maxsize=256)  # noqa: B019 - one instance per run
    def _tail(self, stand_in: str) -> tuple[str, int]:
        """Return the text between the last argument and the end token of a placeholder turn, and how often the turn
        contains the placeholder."""
        *arguments, tail = self._cut(self.turn.body(json.loads(stand_in), self._given)).split(MARK)
        return tail, max(len(arguments), 1)

    def opening(self, messages: list[Message], tools: Tools) -> str:
        """Return the text of an opening conversation, up to the start of the assistant's turn.

        Raises:
            UserError: the template cannot render the messages, or nothing lists the tools.
        """
        messages = self.shown(messages)
        if not tools:
            return self.turn.opening(messages)
        self.check_listing()
        if not self.describes:
            return self.turn.opening(messages, tools)
        syntax = self.syntax or json_calls(listed=True)
        # The template and this package write control tokens, messages do not: the example is inserted afterwards.
        return self.turn.opening(self._described(messages, syntax, tools)).replace(EXAMPLE, syntax.example())

    def _described(self, messages: list[Message], syntax: ToolSyntax, tools: Tools) -> list[Message]:
        """Return messages with the tools in the system message, or in the first one if there is no system role."""
        listed = syntax.system_text(tools, EXAMPLE)
        if messages and messages[0]["role"] == "system":
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listed}"}, *messages[1:]]
        if self._system_role:
            return [{"role": "system", "content": listed}, *messages]
        return [{**messages[0], "content": f"{listed}\n\n{messages[0].get('content') or ''}"}, *messages[1:]]

    def _has_system_role(self) -> bool:
        try:
            return MARK in self.turn.opening([{"role": "system", "content": MARK}, HELLO])
        except UserError:
            return False
