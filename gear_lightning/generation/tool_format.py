"""How a chat template lists tools, renders calls and shows results."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

from ..environments.base import Message
from ..errors import UserError
from .chat_safety import CLOSE, OPEN, unmarked
from .spelled_marks import hide_marked, reveal
from .tool_listing import ToolListing
from .tool_proof import BOTH, RESULTS, Calls, proof, result_of
from .tool_syntax.base import ToolCallError, Tools, ToolSyntax
from .tool_syntax.known import FALLBACK, FIRST_CHOICE, NAMED, described, json_calls, known
from .tool_syntax.learned import ARGUMENTS, FIRST, IDS, PROBE_TOOLS, SECOND, candidates
from .turn_format import HELLO, MARK, THOUGHT, MisplacedTurnError, TurnFormat
from .turn_text import TurnText, read_turn

_PLAIN = {OPEN: "zq7open7qz", CLOSE: "zq7close7qz"}  # marks as text that every syntax writes as it is
LOOK = 200  # characters in which the end token of a turn is searched
RESULT = "<tool_response>\n{}\n</tool_response>"  # a result for templates without a tool role


def _schema(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of arguments: text, or any other value."""
    kinds = {name: {"type": "string"} if isinstance(value, str) else {} for name, value in arguments.items()}
    return {"properties": kinds}


def _replaced(value: Any, texts: dict[str, str]) -> Any:
    """Return a value in whose texts some texts are replaced."""
    if isinstance(value, str):
        for old, new in texts.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {_replaced(key, texts): _replaced(item, texts) for key, item in value.items()}
    return [_replaced(item, texts) for item in value] if isinstance(value, list) else value


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
        listing: who lists the tools, and where.
        syntax: how the policy writes calls; None if the template's own syntax is unknown.
        native: whether turns with calls are rendered by the template; otherwise ``syntax`` writes them.
        renders: whether the template renders the calls of earlier turns.
        unreadable: why the calls that the template renders cannot be the policy's; empty if they can, or if it renders
            none.
        lists: whether the template lists the tools.
        describes: whether this package lists them.
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
        self.describes = choice == "json_list" or list_tools == "system"
        self.listing = ToolListing(turn, self.describes)
        self.lists = self.listing.lists
        one, self.unreadable = self._first_call()
        self.renders = one is not None
        self.lossy = False
        self.native = self.renders and choice != "json_list"
        self.syntax = None if self.unreadable else self._find_syntax(one) if self.renders else self._unrendered()
        if isinstance(choice, ToolSyntax):
            self.syntax = choice
        elif choice != "auto":
            self.syntax = NAMED[choice]()
        self.results_as_user = False
        self.results_as_user = self.describes and not self.shows_results()
        self.end_text = self._end_of_calls()

    def _first_call(self) -> tuple[str | None, str]:
        """Return the text of a turn with a call (None if the template renders none), and why it cannot be the
        policy's."""
        call = calls_of((FIRST, ARGUMENTS[0]))
        try:
            text = self._cut(self.turn.without_thought(self.turn.body(call, PROBE_TOOLS)))
        except MisplacedTurnError as error:
            return None, str(error)
        except UserError:
            return None, ""
        if FIRST in text and "alpha" in text:
            return text, ""
        try:
            empty = self._cut(self.turn.without_thought(self.turn.body({**call, "tool_calls": []}, PROBE_TOOLS)))
        except UserError:
            empty = text
        same = "".join(text.split()) == "".join(empty.split())
        return None, "" if same else f"the template renders a call as {text.strip()[:40]!r}"

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

    @cache  # noqa: B019 - one instance per run
    def thought_marks(self, content: bool) -> tuple[str, str] | None:
        """Return the texts before and behind reasoning in a turn with calls; None if the template renders it only in
        other turns.

        Args:
            content: whether text stands before the calls.
        """
        message = {**calls_of(BOTH[1]), "content": "I look." if content else ""}
        try:
            text = self._cut(self.turn.without_thought(self.turn.body(message, PROBE_TOOLS)))
            thought = self._cut(self.turn.body({**message, "reasoning": THOUGHT}, PROBE_TOOLS))
        except UserError:
            return None
        return self.turn.marks_in(thought, text)

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
        return self.read_text(syntax, self.text_of(syntax, calls)) == list(calls)

    def text_of(self, syntax: ToolSyntax, calls: Calls) -> str | None:
        """Return calls as the template renders them, or as the syntax writes them if the template renders none; None
        if it cannot."""
        return self._probe(*calls) if self.native else self.written(syntax, calls)

    def read_text(self, syntax: ToolSyntax, text: str | None, tools: Tools = PROBE_TOOLS) -> Sequence[Any] | None:
        """Return the calls in a text; None if there is no text, if it cannot be read, or if text is left over."""
        if text is None:
            return None
        try:
            found = self.read(syntax, text, tools)
        except ToolCallError:
            return None
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in found.calls]
        return None if found.content else calls

    def read(self, syntax: ToolSyntax, text: str, tools: Tools = PROBE_TOOLS) -> TurnText:
        """Return the parts of a turn in rendered text, in which spelled-out control tokens are marked.

        Raises:
            ToolCallError: a call that cannot be read.
        """
        marks = syntax.literal_marks
        return reveal(read_turn(unmarked(hide_marked(text, marks)), syntax, tools, self.turn.thinking), marks)

    def written(self, syntax: ToolSyntax, calls: Calls) -> str:
        """Return calls as a syntax writes them."""
        return self.write([{"name": name, "arguments": arguments} for name, arguments in calls], syntax)

    def write(self, calls: Sequence[dict[str, Any]], syntax: ToolSyntax | None = None) -> str:
        """Return calls as a syntax writes them, with marks at the control tokens that are spelled out in them."""
        text = (syntax or self.syntax or json_calls()).write(_replaced(self.template.control.mark(list(calls)), _PLAIN))
        for mark, plain in _PLAIN.items():
            text = text.replace(plain, mark)
        return text

    def rendered(self, message: Message) -> str:
        """Return the text of a turn with calls as the template renders it, without its end token.

        Raises:
            UserError: the calls of the message would not be read back from any text.
        """
        text = self._cut(self.turn.without_thought(self.turn.body(message, PROBE_TOOLS)))
        syntax, content = self.syntax or json_calls(), (message.get("content") or "").strip()
        marked = self.template.control.mark(content)
        if not self._same(text, message):  # the template does not escape quotes, for example
            text = syntax.introduced(marked, self.write([c["function"] for c in message["tool_calls"]]))
        elif content and (content not in unmarked(text) or not self._shows(content, text)):
            # templates of models that never write both, or write the text as reasoning
            alone = self.turn.body({**message, "content": ""}, PROBE_TOOLS)
            text = syntax.introduced(marked, self._cut(self.turn.without_thought(alone)))
        if not self._same(text, message):
            raise UserError(
                f"the calls of this turn cannot be written so that they are read back: {unmarked(text)[:200]!r}"
            )
        return text

    def _shows(self, content: str, text: str) -> bool:
        """Return whether the content of a turn with calls is not read as reasoning."""
        return content not in self.read(self.syntax or json_calls(), text).reasoning

    def _same(self, text: str, message: Message) -> bool:
        """Return whether the calls of a message are read from its text as they are."""
        wanted = [c["function"] for c in message["tool_calls"]]
        tools = [{"function": {"name": c["name"], "parameters": _schema(c["arguments"])}} for c in wanted]
        try:
            found = self.read(self.syntax or json_calls(), text, tools).calls
        except ToolCallError:
            return False
        return [c["function"] for c in found] == [{"name": c["name"], "arguments": c["arguments"]} for c in wanted]

    def check(self) -> None:
        """Check that calls and results pass through the chat template unchanged.

        Raises:
            UserError: they do not; the message says what to set.
        """
        self.listing.check(self.syntax)
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
        return proof(self)

    def shows_results(self) -> bool:
        """Return whether the template shows the text of a tool's result."""
        try:
            return RESULTS[0] in self.continuation([result_of(RESULTS[0])])[0]
        except UserError:
            return False

    def _end_of_calls(self) -> str:
        try:
            return self.continuation([result_of(RESULTS[0])])[1]
        except UserError:
            return self.turn.end_text

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

    def position_problem(self, text: str) -> str:
        """Return what is wrong if the first probe result is not rendered as ``text`` behind earlier turns, too."""
        earlier = [{"role": "assistant", "content": "Hi"}, HELLO]
        if self.renders and not self.results_as_user:
            earlier = [calls_of(BOTH[0]), result_of("probe result")]
        try:
            later = self.continuation(self.shown([result_of(RESULTS[0])]), earlier)[0]
        except UserError as error:
            return str(error)
        # DeepSeek V3 omits control tokens of later results, which is an error of its template
        one, other = (re.sub(r"\s+", "", self.template.control.removed(part)) for part in (text, later))
        return "" if one == other else "the template renders a result in another way behind earlier turns"

    def continuation(self, messages: list[Message], before: Sequence[Message] = ()) -> tuple[str, str, bool]:
        """Return the text behind a turn: (text behind its end token, the end token's text, whether it is shared).

        The turn is a placeholder: with a call for each result, because templates render results from the calls.

        Args:
            messages: the messages behind the turn.
            before: messages between the first user message and the turn.

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
            text = self.turn.opening([HELLO, *before, stand_in, *messages], tools)
        except UserError:
            if len(results) < 2 or "tool_calls" not in stand_in:
                raise
            stand_in = {**stand_in, "tool_calls": stand_in["tool_calls"][:1]}  # one call per turn: Llama 3
            text = self.turn.opening([HELLO, *before, stand_in, *messages], tools)
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
        if made and not after.startswith(tail):  # the template renders the last turn in another way
            found = [(at, stop) for stop in self._stops if (at := behind.find(stop)) >= 0]
            if not found:
                raise UserError("the chat template cannot be continued after a turn with tool calls")
            at, end = min(found)
        else:
            end = self.template.control.first(behind[:LOOK]) or self.turn.end_text
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
            UserError: the template cannot render the messages or omits a part of them, or nothing lists the tools.
        """
        return self.listing.opening(self.shown(messages), tools, self.syntax)
