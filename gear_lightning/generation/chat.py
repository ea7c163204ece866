"""Converts messages to token ids and back: chat template, tool-call syntax, incremental tokenization.

Sampled ids are final. A conversation grows by appending ids: the prompt, the ids that the policy sampled (including its
stop token), then the ids of the messages up to the next assistant turn. Ids are never decoded and encoded again.

Only the chat template and the policy produce control tokens. A control token spelled out in a task or a tool result
(``<|im_end|>``) is encoded as plain text, so an observation cannot end its turn and start a turn of another role.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from ..batch import CALL, REASONING
from ..environments.base import Message
from ..errors import UserError
from .chat_template import ChatTemplate
from .spelled_marks import hide_spelled, reveal
from .tool_format import ToolFormat, calls_of
from .tool_proof import BOTH, check_names
from .tool_syntax.base import ToolCallError, ToolSyntax
from .tool_syntax.known import json_calls
from .tool_syntax.learned import IDS, PROBE_TOOLS, SECOND
from .turn_format import HELLO, MARK, TurnFormat, thinking_of
from .turn_text import Span, Thinking, TurnText, read_turn

__all__ = ["Chat", "ChatOptions", "ToolCallError", "ignored_stops"]

REMEMBERED = 256  # number of prompts and continuations whose ids are cached
CONTEXT = 32  # tokens of the context in which a prefilled mark of reasoning is searched


@dataclass(frozen=True)
class ChatOptions:
    """Options of the conversion from messages to text.

    Args:
        tool_syntax: how the policy writes tool calls. ``auto``: the chat template's own syntax, learned from the calls
            that the template renders and proved at the start by reading them back. ``json_list``:
            ``<tool_call>[{...}]</tool_call>``, which this package describes in the system message together with the
            tools (SmolLM2, templates without tool support). ``json``: ``<tool_call>{...}</tool_call>`` (Qwen 2.5,
            Hermes). ``words``: ``name argument argument``, for the from-scratch models. Or a subclass of
            `gear_lightning.generation.tool_syntax.ToolSyntax`, by class_path.
        list_tools: who lists the tools in the prompt. ``template``: the chat template. ``system``: this package, in the
            system message, for templates that list none but whose model writes calls (DeepSeek R1).
        thinking: the marks of reasoning, as a list of two texts. ``auto``: those of the chat template, else
            ``<think>`` and ``</think>``. ``off``: reasoning is not separated from the answer.
        earlier_reasoning: what later turns see of it. ``keep``: all of it, because turns are only appended. ``drop``:
            none of it from the next user message on, as many templates render it. The conversation so far is then
            rendered again and becomes the prompt of the rollout: only the turns behind the last such message are
            learned from.
        stop_tokens: further tokens that end the policy's turn, as text.
        template_arguments: extra arguments of the chat template, such as ``enable_thinking``.
    """

    tool_syntax: Literal["auto", "json", "json_list", "words"] | ToolSyntax = "auto"
    list_tools: Literal["template", "system"] = "template"
    thinking: Literal["auto", "off"] | list[str] = "auto"
    earlier_reasoning: Literal["keep", "drop"] = "keep"
    stop_tokens: list[str] | None = None
    template_arguments: dict[str, Any] | None = None


@dataclass(frozen=True)
class ReadTurn:
    """A sampled turn.

    Attributes:
        message: the assistant message: ``content``, and, if there are any, ``reasoning`` and ``tool_calls``.
            ``unfinished`` is True if the turn ends inside of its reasoning.
        parts: for each token, `REASONING` (with its marks), `CALL` (a tool call), or 0. A stop token belongs to what it
            ends.
    """

    message: Message
    parts: list[int]

    @property
    def unfinished(self) -> bool:
        """Whether the turn ends inside of its reasoning."""
        return self.message.get("unfinished", False)


def _thinking(options: ChatOptions, source: str) -> Thinking | None:
    if options.thinking == "off" and options.earlier_reasoning == "drop":
        raise UserError(
            "model.chat.earlier_reasoning=drop needs reasoning that is separated from the answer; "
            "model.chat.thinking=off does not separate it"
        )
    if isinstance(options.thinking, str):
        return None if options.thinking == "off" else thinking_of(source)
    if len(options.thinking) != 2 or not all(mark.strip() for mark in options.thinking):
        raise UserError(
            f"model.chat.thinking={options.thinking}: must be auto, off, or the two marks, such as "
            "['<think>', '</think>']"
        )
    return Thinking(*options.thinking, native=True)


class Chat:
    """Applies a tokenizer's chat template incrementally.

    Args:
        tokenizer: a transformers tokenizer.
        options: options of the conversion from messages to text.
        stop_ids: stop tokens of the model's generation configuration (`PolicySource.stop_ids`).

    Attributes:
        stop_ids: tokens that end the policy's turn: the template's end token, the tokenizer's end-of-sequence token,
            those of the argument ``stop_ids`` that are not ignored, and those of the options. Sampling stops at these
            tokens, and the exported generation configuration lists them.
        ignored_stops: ids in the argument ``stop_ids`` that are ordinary text to the tokenizer, or unknown to it. A
            generation configuration that does not match the tokenizer could otherwise end answers at ordinary text.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot be continued turn by turn; the message states
            what is missing.
    """

    def __init__(self, tokenizer: Any, options: ChatOptions = ChatOptions(), stop_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.options = options
        self.template = ChatTemplate(tokenizer, options.template_arguments)
        self.thinking = _thinking(options, self.template.source)
        self.turn = TurnFormat(self.template, self.thinking)
        self._remembered: dict[str, list[int]] = {}
        self._checked: set[str] = set()  # what has passed `check_tools` and `check_task`
        self._texts: dict[int, str] = {}  # of single tokens
        self._decoded: tuple[tuple[int, ...], str] = ((), "")  # the newest: a turn is needed several times
        given = set(stop_ids)
        self.ignored_stops = {i for i in given if not self.template.control.holds(i)}
        named = {self._token(text) for text in options.stop_tokens or ()}
        eos = {self.tokenizer.eos_token_id} - {None}
        self.stop_ids = {self.turn.end} | eos | (given - self.ignored_stops) | named
        self.tools = ToolFormat(self.turn, options.tool_syntax, options.list_tools, self.stop_ids)
        if self.tools.lists:  # only then does a turn end with a call
            self.stop_ids |= self._control(self.tools.end_text)

    def _token(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(f"model.chat.stop_tokens: {text!r} is not one token of the tokenizer, but {len(ids)}")
        return ids[0]

    def _control(self, text: str) -> set[int]:
        """Return the id of a control token as a set; empty for other text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return set(ids) if len(ids) == 1 and self.template.control.holds(ids[0]) else set()

    @property
    def syntax(self) -> ToolSyntax:
        """How the policy writes tool calls."""
        return self.tools.syntax or json_calls()

    def encode(self, text: str) -> list[int]:
        """Return the ids of text that already contains its special tokens.

        Raises:
            UnicodeEncodeError: half of a surrogate pair; the tokenizer's own error would not mention it.
        """
        text.encode()
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, messages: list[Message], tools: Any = ()) -> list[int]:
        """Return the ids of an opening conversation, up to the start of the assistant's turn.

        Raises:
            UserError: the template cannot render the messages, or there are tools that it does not list.
        """
        return self._cached([messages, list(tools)], lambda: self._prompt(messages, tools))

    def _prompt(self, messages: list[Message], tools: Any) -> list[int]:
        return self.template.encode(self.tools.opening([self._earlier(m) for m in messages], tools))

    def _earlier(self, message: Message) -> Message:
        """Return a message as the template is to render it: with its calls as text, if the template would not render
        them in the policy's syntax; without its reasoning, if that is to be dropped and the template does not."""
        if self.options.earlier_reasoning == "drop" and not self._template_drops:
            message = {key: value for key, value in message.items() if key != "reasoning"}
        if not message.get("tool_calls") or self.tools.native:
            return message
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**kept, "content": self._with_calls(message)}

    @cached_property
    def _template_drops(self) -> bool:
        """Whether the template drops reasoning before a user message."""
        messages = [HELLO, {"role": "assistant", "content": "Hi", "reasoning": MARK}, HELLO]
        return MARK not in self.template.render(messages, generate=True)

    def drops_reasoning(self, messages: list[Message]) -> bool:
        """Return whether the reasoning before these messages is dropped (`ChatOptions.earlier_reasoning`)."""
        return self.options.earlier_reasoning == "drop" and any(m["role"] == "user" for m in messages)

    def _cached(self, key: list[Any], ids: Callable[[], list[int]]) -> list[int]:
        """Return ids from the cache: rollouts of a group share their prompt, and often the answers of a tool."""
        text = json.dumps(key, default=repr)
        if text not in self._remembered:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            self._remembered[text] = ids()
        return list(self._remembered[text])

    def continuation(self, messages: list[Message], stop: int | None = None) -> list[int]:
        """Return the ids of the messages between two assistant turns: those after the first turn's stop token.

        Args:
            messages: tool results, user messages, ...
            stop: the stop token that the policy sampled. Some templates have no end token: the next message's first
                token ends the turn. It is added here if the policy stopped at another one.

        Raises:
            UserError: the template cannot render these messages after an assistant turn.
        """
        return self._cached([messages, stop], lambda: self._continuation(messages, stop))

    def _continuation(self, messages: list[Message], stop: int | None) -> list[int]:
        text, end, shared = self.tools.continuation(self.tools.shown(messages))
        if shared and stop is not None and stop not in self._control(end):
            text = end + text
        return self.template.encode(text, after=self.turn.end_text)

    def parse(self, ids: list[int], tools: Any = (), context: Sequence[int] = ()) -> Message:
        """Return the assistant message that the sampled ids encode: the message of `read`.

        Raises:
            ToolCallError: a tool call that cannot be read.
        """
        return self._message(self._split(ids, tools, context))

    def read(self, ids: list[int], tools: Any = (), context: Sequence[int] = (), calls_before: int = 0) -> ReadTurn:
        """Return what the sampled ids encode.

        Args:
            ids: the sampled turn.
            tools: JSON schemas of the task's tools.
            context: the ids before the turn. They show whether the generation prompt opened the reasoning.
            calls_before: number of calls in earlier turns, for the ids of calls that the policy did not name.

        Raises:
            ToolCallError: a tool call that cannot be read.
        """
        turn = self._split(ids, tools, context)
        return ReadTurn(self._message(turn, calls_before), self._parts(ids, turn))

    def read_invalid(self, ids: list[int], tools: Any = (), context: Sequence[int] = ()) -> ReadTurn:
        """Return a turn with a tool call that `read` cannot read. Behind the first thought, the text from the first
        call on counts as a call, and it remains in ``content``."""
        text = self.text(ids)
        turn = self._split(ids, (), context)
        call = self.syntax.find(text, turn.thoughts[0][1] if turn.thoughts else 0, tools)
        turn.actions = [] if call < 0 else [(call, len(text))]
        return ReadTurn(self._message(turn), self._parts(ids, turn))

    def _parts(self, ids: list[int], turn: TurnText) -> list[int]:
        actions, thoughts = self.mask(ids, turn.actions), self.mask(ids, turn.thoughts)
        parts = [REASONING if t else CALL if a else 0 for t, a in zip(thoughts, actions, strict=True)]
        if ids and ids[-1] in self.stop_ids:  # of the last token before it that is not white space
            before = zip(parts[-2::-1], ids[-2::-1], strict=True)
            parts[-1] = next((part for part, token in before if self.text([token]).strip()), 0)
        return parts

    def _split(self, ids: list[int], tools: Any, context: Sequence[int]) -> TurnText:
        inside = False
        if self.thinking and context:
            inside = self.thinking.opened_in(self.tokenizer.decode(context[-CONTEXT:], skip_special_tokens=False))
        marks, text = self.syntax.literal_marks, self.text(ids)
        for mark in marks:
            text = hide_spelled(text, mark, self._control(mark), ids, self.text)
        return reveal(read_turn(text, self.syntax, tools, self.thinking, inside), marks)

    def _message(self, turn: TurnText, calls_before: int = 0) -> Message:
        content = turn.content.removeprefix(self.turn.before.strip()).strip() if self.turn.before else turn.content
        message: Message = {"role": "assistant", "content": content}
        if turn.reasoning:
            message["reasoning"] = turn.reasoning
        if turn.unfinished:
            message["unfinished"] = True
        if turn.calls:
            numbered = enumerate(turn.calls, calls_before)
            message["tool_calls"] = [{"id": f"call{number:05d}", **call} for number, call in numbered]
        return message

    def open_thought(self, ids: list[int], tools: Any, context: Sequence[int]) -> tuple[list[int], bool]:
        """Return the parts of a turn that has not ended yet (see `ReadTurn`), and whether it is inside of reasoning."""
        try:
            read = self.read(ids, tools, context)
        except ToolCallError:  # an incomplete call
            read = self.read_invalid(ids, tools, context)
        return read.parts, read.unfinished

    def closing(self) -> list[int]:
        """Return the ids that end reasoning, as the template writes them."""
        return self.template.encode(self.turn.closing, after=self.turn.end_text)

    def mask(self, ids: list[int], spans: list[Span]) -> list[bool]:
        """Return whether each token of a turn overlaps one of the spans of its text."""
        mask = [False] * len(ids)
        if not spans:
            return mask
        ends = self._ends(ids)

        def tokens_to(position: int) -> int:  # number of tokens whose text reaches a position
            if ends:
                return 0 if position <= 0 else bisect_left(ends, position) + 1
            return bisect_left(range(len(ids)), position, key=lambda n: len(self.text(ids[:n])))

        for start, end in spans:
            for place in range(max(tokens_to(start + 1) - 1, 0), tokens_to(end)):
                mask[place] = ids[place] not in self.stop_ids
        return mask

    def _ends(self, ids: list[int]) -> list[int]:
        """Return where the text of each token of a turn ends; empty if some characters consist of several tokens."""
        texts = []
        for i in ids:
            if i not in self._texts:
                self._texts[i] = self.text([i])
            texts.append(self._texts[i])
        return list(accumulate(map(len, texts))) if "".join(texts) == self.text(ids) else []

    def text(self, ids: list[int]) -> str:
        """Return the decoded text of sampled ids, without their stop token."""
        key, newest = tuple(ids), self._decoded
        if newest[0] != key:
            text = self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=False)
            newest = self._decoded = key, text
        return newest[1]

    def write(self, message: Message) -> list[int]:
        """Return the ids that the policy would sample for ``message``, with the stop token (for demonstrations)."""
        text, end = self._written(message)
        # encoded behind the generation prompt, because some tokenizers add a space at the beginning of a text
        opening, anchor = self.turn.lead, self.turn.end_text
        before, whole = (self.template.encode(part, after=anchor) for part in (opening, opening + text))
        ids = whole[len(before) :] if whole[: len(before)] == before else self.template.encode(text, after=anchor)
        return [*ids, *(self._control(end) or {self.turn.end})]

    def _written(self, message: Message) -> tuple[str, str]:
        """Return the text of a turn and its end token."""
        mark = self.template.control.mark
        content, reasoning = mark(message.get("content") or ""), mark(message.get("reasoning") or "")
        if message.get("tool_calls") and self.tools.native:
            thought = self.turn.thought(reasoning, self.tools.thought_marks(bool(content)))
            return thought + self.tools.rendered({**message, "reasoning": ""}), self.tools.end_text
        thought = self.turn.thought(reasoning)
        if not message.get("tool_calls"):
            return thought + self.turn.before + content + self.turn.before_end, self.turn.end_text
        return thought + self._with_calls({**message, "content": content}) + self.turn.before_end, self.turn.end_text

    def _with_calls(self, message: Message) -> str:
        """Return the content and the calls of a message as text in the syntax of `ToolFormat.syntax`."""
        content = message.get("content") or ""
        functions = [{**call["function"], "id": call.get("id")} for call in message["tool_calls"]]
        return self.syntax.introduced(content, self.tools.write(functions))

    def check_tools(self) -> None:
        """Check that calls and results pass through the chat template unchanged.

        Raises:
            UserError: they do not; the message says what to set.
        """
        if "" in self._checked:
            return
        self.tools.listing.check(self.tools.syntax)
        if self.options.earlier_reasoning == "drop":
            self._check_rendered_again()
        self.tools.check()
        self._checked.add("")

    def check_task(self, messages: list[Message], tools: Any) -> None:
        """Check that the policy can call the tools of a task: `check_tools`, that its prompt names them, and that calls
        with their names and parameters are read.

        Args:
            messages: the task's messages; empty if the environment writes the prompt.
            tools: JSON schemas of the task's tools.

        Raises:
            UserError: it cannot; the message names the tool, and says what to set.
        """
        if not tools:
            return
        self.check_tools()
        self.prompt(messages or [HELLO], tools)
        key = json.dumps(list(tools), default=repr)
        if key not in self._checked:
            check_names(self.tools, tools)
            self._checked.add(key)

    def _check_rendered_again(self) -> None:
        result: Message = {"role": "tool", "name": SECOND, "tool_call_id": IDS[0], "content": "probe result"}
        messages = [HELLO, calls_of(BOTH[1]), result, {"role": "assistant", "content": MARK}, HELLO]
        try:
            text = self.tokenizer.decode(self._prompt(messages, PROBE_TOOLS))
            lost = [part for part in (*BOTH[1][1].values(), "probe result", MARK) if str(part) not in text]
            problem = f"it omits {lost[0]!r} of an earlier turn" if lost else ""
        except UserError as error:
            problem = str(error)
        if problem:
            raise UserError(
                "model.chat.earlier_reasoning=drop: the chat template cannot render a whole conversation with calls "
                f"({problem}); set it to keep"
            )


def ignored_stops(chat: Chat) -> str:
    """Return a warning about `Chat.ignored_stops`; empty if there are none."""
    if not chat.ignored_stops:
        return ""
    known = range(len(chat.tokenizer))
    texts = [f"{i} ({chat.tokenizer.decode([i])!r})" if i in known else str(i) for i in sorted(chat.ignored_stops)]
    return (
        f"the model's generation configuration stops at token {', '.join(texts)}, which is not a control token of its "
        "tokenizer: it is not used as a stop token, and the export omits it. Correct eos_token_id in the model's "
        "generation_config.json (or config.json)"
    )
