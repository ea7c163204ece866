"""Proves that tool calls and results pass through a chat template unchanged: the round trip of probe calls."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..environments.base import Message
from ..errors import UserError
from .tool_listing import SYSTEM
from .tool_syntax.base import ToolCallError, Tools, ToolSyntax
from .tool_syntax.learned import ARGUMENTS, FIRST, IDS, PROBE_TOOLS, SECOND
from .tool_syntax.schemas import names_of, parameters_of
from .turn_format import HELLO, MARK

if TYPE_CHECKING:
    from .tool_format import ToolFormat

BOTH = [(FIRST, ARGUMENTS[0]), (SECOND, ARGUMENTS[1])]
RESULTS = [f"result {number} begins, {'and goes on ' * 20}and ends as {number}." for number in ("one", "two")]
WRITTEN = "the call is not read back as it was written"
# A tool of the probe, with an argument that is text or null.
NULLABLE = [{"function": {"name": FIRST, "parameters": {"properties": {"alpha": {"type": ["string", "null"]}}}}}]

Calls = Sequence[tuple[str, dict[str, Any]]]


def result_of(text: str, number: int = 0) -> Message:
    """Return the message with the result of one of the two probe calls."""
    return {"role": "tool", "name": BOTH[number][0], "tool_call_id": IDS[number], "content": text}


def proof(tools: "ToolFormat") -> Iterator[tuple[str, str]]:
    """Yield what the round trip checks, and what is wrong with it (empty: nothing)."""
    syntax = tools.syntax
    if syntax and not syntax.any_text:
        return
    yield "tools are listed", _listing_problem(tools)
    if syntax is None:
        unknown = "the syntax of the calls that the template renders is unknown"
        yield "a call is read back", tools.unreadable or unknown
        return
    yield "an answer begins where the generation prompt ends", _answer_problem(tools)
    for name, call in _calls(syntax):
        yield name, _problem(tools, syntax, [call])
    yield "an argument that is null", _problem(tools, syntax, [(FIRST, {"alpha": None})], NULLABLE)
    yield "a call behind text", _content_problem(tools, syntax)
    text = tools.text_of(syntax, BOTH)
    several = text is not None and SECOND in text  # some models make one call per turn
    if several:
        yield "two calls in one turn", _problem(tools, syntax, BOTH)
    yield "results are shown", _result_problem(tools, several)


def _listing_problem(tools: "ToolFormat") -> str:
    if not (tools.lists or tools.describes):
        return "the template lists none"
    try:
        alone = tools.opening([HELLO], PROBE_TOOLS)
        behind = tools.opening([SYSTEM, HELLO], PROBE_TOOLS) if tools.listing.system_role == "shown" else None
    except UserError as error:
        return str(error)
    if min(alone.count(name) for name in ("alpha", "beta")) < len(PROBE_TOOLS):
        return "the template does not list the parameters of each tool"
    if behind is not None and SYSTEM["content"] not in behind:
        return "the template omits the system message if there are tools"
    return ""


def _answer_problem(tools: "ToolFormat") -> str:
    try:
        text = tools.turn.body({"role": "assistant", "content": MARK}, PROBE_TOOLS if tools.native else ())
    except UserError as error:
        return str(error)
    found = tools.turn.without_thought(text).partition(MARK)[0]
    return "" if found.strip() == tools.turn.before.strip() else f"the template begins it with {found[:40]!r}"


def _problem(tools: "ToolFormat", syntax: ToolSyntax, calls: Calls, schemas: Tools = PROBE_TOOLS) -> str:
    found = tools.read_text(syntax, tools.text_of(syntax, calls), schemas)
    if found == list(calls):
        return ""
    if found or calls[0] in BOTH or not tools.native:
        return WRITTEN
    # the template does not escape such arguments, so they cannot be read back; the syntax itself must
    if tools.read_text(syntax, tools.written(syntax, calls), schemas) != list(calls):
        return WRITTEN
    tools.lossy = True
    return ""


def _calls(syntax: ToolSyntax) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Yield calls that a round trip must preserve, with a description."""
    yield "a call is read back", BOTH[0]
    yield "a call of another function", BOTH[1]
    for name, arguments in _arguments(syntax):
        yield name, (FIRST, arguments)


def _arguments(syntax: ToolSyntax) -> Iterator[tuple[str, dict[str, Any]]]:
    deep = {"a": [1, 2.5, {"b": None, "c": [True, False, "x"]}], "d": {}}
    yield "nested objects", {"alpha": "x", "beta": deep}
    yield "characters that are not ASCII", {"alpha": "Zürich ☃ 日本 🙂"}
    yield "quotes and backslashes", {"alpha": "a \" and ' and \\ and `"}
    yield "line breaks", {"alpha": "first\n  second\n\nlast"}
    yield "text that looks like a number", {"alpha": "42"}
    yield "text that looks like JSON", {"alpha": '{"k": 1}'}
    whole = syntax.write([{"name": FIRST, "arguments": {"alpha": MARK}}])
    opening, closing = whole.partition(FIRST)[0], whole.rpartition(MARK)[2]
    yield "text with the syntax's own marks", {"alpha": f"a {opening}b{closing} c"}
    yield "text that quotes two calls", {"alpha": whole + whole, "beta": {"k": whole}}


def _content_problem(tools: "ToolFormat", syntax: ToolSyntax) -> str:
    """Return what is wrong with a turn in which a call follows text."""
    call = {"id": IDS[1], "type": "function", "function": {"name": SECOND, "arguments": ARGUMENTS[1]}}
    message: Message = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    try:
        text = tools.rendered(message) if tools.native else f"I look.{syntax.joint}{tools.written(syntax, BOTH[1:])}"
        found = tools.read(syntax, text).calls
    except (UserError, ToolCallError) as error:
        return str(error)
    return "" if [c["function"] for c in found] == [call["function"]] else WRITTEN


def _result_problem(tools: "ToolFormat", several: bool) -> str:
    try:
        one = tools.continuation(tools.shown([result_of(RESULTS[0])]))[0]
        messages = [result_of(text, number) for number, text in enumerate(RESULTS)]
        both = tools.continuation(tools.shown(messages))[0] if several or tools.results_as_user else "".join(RESULTS)
    except UserError as error:
        return str(error)
    if RESULTS[0] not in one:
        return "the template does not show the result of a call"
    if not all(text in both for text in RESULTS):
        return "the template does not show each of several results"
    return tools.position_problem(one)


def check_names(tools: "ToolFormat", listed: Tools) -> None:
    """Check that calls with the names of a task's tools and of their parameters are read.

    Raises:
        UserError: a syntax cannot express a name.
    """
    syntax = tools.syntax
    if syntax is None or not syntax.any_text:
        return
    for tool, name in zip(listed, names_of(listed), strict=True):
        parameters = parameters_of(tool)
        sample = {key: _sample(parameters.kinds(key)) for key in parameters.names()}
        for arguments in [{}, sample] if sample else [{}]:
            calls = [(name, arguments)]
            texts = (tools.text_of(syntax, calls), tools.written(syntax, calls))
            if any(text is not None and tools.read_text(syntax, text, [tool]) != calls for text in texts):
                raise UserError(
                    f"a call of the tool {name!r} cannot be read in the policy's syntax ({type(syntax).__name__}) with "
                    f"its name and the names of its parameters ({', '.join(arguments) or 'no arguments'}): rename "
                    "them, or set model.chat.tool_syntax to json_list, which has no such limits"
                )


def _sample(kinds: frozenset[str]) -> Any:
    """Return a value of one of the types of a parameter."""
    values = {"string": "text", "object": {"k": 1}, "array": [1], "integer": 1, "number": 1.5, "boolean": True}
    return next((value for kind, value in values.items() if kind in kinds), None)
