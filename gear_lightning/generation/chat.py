"""Converts messages to token ids and back: chat template, tool-call syntax, incremental tokenization.

Sampled ids are final. A conversation grows by appending ids: the prompt, the ids that the policy sampled (including its
stop token), then the ids of the messages up to the next assistant turn. Ids are never decoded and encoded again.

Only the chat template and the policy produce control tokens. A control token spelled out in a task or a tool result
(``<|im_end|>``) is encoded as plain text, so an observation cannot end its turn and start a turn of another role.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..checks import deeper_than
from ..environments.base import Message
from ..errors import UserError
from .chat_safety import ControlTokens, TemplateLimit, check_template, rendered

Syntax = Literal["json", "json_list", "words"]

_MARK = "\u2318answer\u2318"  # placeholder of an assistant turn; assumed not to occur in real text
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
REMEMBERED = 256  # number of prompts and continuations whose ids are cached
MAX_DEPTH = 64  # nesting depth of lists and objects in a tool call
TOOL_PROMPT = """You can call functions. Here are their signatures:
<tools>
{tools}
</tools>
To call one, answer with
<tool_call>[{{"name": "<function>", "arguments": {{<arguments>}}}}]</tool_call>"""


class ToolCallError(ValueError):
    """The policy's text contains an invalid tool call."""


def _check_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ToolCallError('a tool call must be an object with "name" and "arguments"')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models write the arguments as a JSON string
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        raise ToolCallError('"arguments" must be an object')
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _json(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_reject)  # NaN and Infinity are not JSON
        # reject 1e999, which is parsed as infinity, and half of a surrogate pair, which tokenizers reject
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ToolCallError(f"not JSON: {error}") from None
    if deeper_than(MAX_DEPTH, value):  # code that recurses into the value later must not exceed the stack
        raise ToolCallError(f"nested more than {MAX_DEPTH} deep")
    return value


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split assistant text into content and tool calls.

    Supports ``<tool_call>{...}</tool_call>`` (Qwen, Hermes) and ``<tool_call>[{...}, ...]</tool_call>`` (SmolLM2). The
    end tag may be missing at the end of the text.

    Raises:
        ToolCallError: a tool call that cannot be read.
    """
    found = []
    for match in _TOOL_CALL.finditer(text):
        body = _json(match[1].strip())
        found += [_check_call(call) for call in (body if isinstance(body, list) else [body])]
    return _TOOL_CALL.sub("", text).strip(), found


def parse_words(text: str, tools: dict[str, list[str]]) -> tuple[str, list[dict[str, Any]]]:
    """Split text in ``words`` syntax into content and tool calls: the first word that names a tool starts a call, and
    the words after it are its arguments.

    Raises:
        ToolCallError: a tool call with the wrong number of arguments.
    """
    words = text.split()
    for place, word in enumerate(words):
        if word in tools:
            names, values = tools[word], words[place + 1 :]
            if len(names) != len(values):
                raise ToolCallError(f"{word} takes {len(names)} arguments ({', '.join(names)}), got {len(values)}")
            arguments = dict(zip(names, values, strict=True))
            call = {"type": "function", "function": {"name": word, "arguments": arguments}}
            return " ".join(words[:place]), [call]
    return text.strip(), []


@dataclass(frozen=True)
class ChatOptions:
    """Options of the conversion from messages to text.

    Args:
        tool_syntax: syntax of the policy's tool calls. ``json``: ``<tool_call>{...}</tool_call>``, the chat template
            lists the tools (Qwen, Hermes). ``json_list``: ``<tool_call>[{...}]</tool_call>``, this package lists the
            tools in the system message (SmolLM2, templates without tool support). ``words``:
            ``name argument argument``, for the from-scratch models. ``auto``: derived from the chat template.
        template_arguments: extra arguments of the chat template, such as ``enable_thinking``.
    """

    tool_syntax: Literal["auto", "json", "json_list", "words"] = "auto"
    template_arguments: dict[str, Any] | None = None


class Chat:
    """Applies a tokenizer's chat template incrementally.

    Args:
        tokenizer: a transformers tokenizer.
        options: options of the conversion from messages to text.
        stop_ids: stop tokens of the model's generation configuration (`PolicySource.stop_ids`).

    Attributes:
        stop_ids: tokens that end the policy's turn: the template's end token, the tokenizer's end-of-sequence token,
            and those of the argument ``stop_ids`` that are not ignored. Sampling stops at these tokens, and the
            exported generation configuration lists them.
        ignored_stops: ids in the argument ``stop_ids`` that are ordinary text to the tokenizer, or unknown to it. A
            generation configuration that does not match the tokenizer could otherwise end answers at ordinary text.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot be continued turn by turn; the message states
            what is missing.
    """

    def __init__(self, tokenizer: Any, options: ChatOptions = ChatOptions(), stop_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.options = options
        self._control = ControlTokens(tokenizer)
        template = tokenizer.chat_template
        if not template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; use an instruct "
                "model, or put a chat_template.jinja into the model directory"
            )
        for source in template.values() if isinstance(template, dict) else [template]:
            try:
                check_template(source)
            except TemplateLimit as error:
                raise UserError(f"the chat template: {error}") from None
        if options.tool_syntax != "auto":
            self.syntax: Syntax = options.tool_syntax
        elif "<act>" in template:  # the chat template of the from-scratch models
            self.syntax = "words"
        elif "<tool_call>" in template and "tools" in template:
            self.syntax = "json"
        elif "tools" in template:
            raise UserError(
                "the chat template lists tools in an unknown syntax (without <tool_call>); set "
                "model.chat.tool_syntax to json, json_list or words"
            )
        else:
            self.syntax = "json_list"
        self._remembered: dict[str, list[int]] = {}
        self._probe()
        given = set(stop_ids)
        self.ignored_stops = {i for i in given if not self._control.holds(i)}
        self.stop_ids = {self._end_mark} | ({self.tokenizer.eos_token_id} - {None}) | (given - self.ignored_stops)

    def _probe(self) -> None:
        """Find the end token that the template puts after an assistant turn: the first control token, with only white
        space before it (``\\n<|EOT|>`` of DeepSeek-Coder, ``' </s>'`` of Llama 2).

        Later messages are rendered after a placeholder turn. Earlier turns are never rendered again, so a template that
        rewrites them (Qwen3 drops old thinking) has no effect on their ids.
        """
        opening: list[Message] = [{"role": "user", "content": "Hello"}]
        if self._render(opening, generate=True) == self._render(opening, generate=False):
            raise UserError(
                "the chat template ignores add_generation_prompt; it must start the assistant's turn if that is true"
            )
        self._closed: list[Message] = [*opening, {"role": "assistant", "content": _MARK}]
        _, found, after = self._render(self._closed, generate=False).partition(_MARK)
        if not found or not after.strip():
            raise UserError(
                "the chat template puts no end token after an assistant turn, so the policy could not end its turn"
            )
        ids = self.encode(after)
        self._end_mark = next((i for i in ids if self._control.holds(i)), ids[0])
        self._end_text = self.tokenizer.decode([self._end_mark])
        self._before_end, _, _ = after.partition(self._end_text)
        one_token = self._control.holds(self._end_mark) or self._end_text.strip() == after.strip()
        if self._before_end.strip() or not one_token:
            raise UserError(
                f"the chat template ends an assistant turn with the text {after[:40]!r} and puts no special token "
                "before it, so the policy could not end its turn; use a template that puts a special token (for "
                "example the end-of-sequence token) directly after the answer"
            )

    def check_tools(self) -> None:
        """Check that the chat template can render tool results.

        Raises:
            UserError: the chat template has no tool role.
        """
        self.continuation([{"role": "tool", "name": "probe", "content": "ok"}])

    def _render(self, messages: list[Message], *, generate: bool, tools: Any = None) -> str:
        from jinja2 import TemplateError

        try:
            return rendered(
                lambda: self.tokenizer.apply_chat_template(
                    self._control.mark(messages),
                    tools=self._control.mark(list(tools)) if tools else None,
                    add_generation_prompt=generate,
                    tokenize=False,
                    **(self.options.template_arguments or {}),
                )
            )
        except (TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError) as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise UserError(f"the chat template cannot render messages with the roles {roles}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of text that already contains its special tokens.

        Raises:
            UnicodeEncodeError: half of a surrogate pair; the tokenizer's own error would not mention it.
        """
        text.encode()
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, messages: list[Message], tools: Any = ()) -> list[int]:
        """Return the ids of an opening conversation, up to the start of the assistant's turn."""
        return self._cached([messages, list(tools)], lambda: self._prompt(messages, tools))

    def _cached(self, key: list[Any], ids: Callable[[], list[int]]) -> list[int]:
        """Return ids from the cache: rollouts of a group share their prompt, and often the answers of a tool."""
        text = json.dumps(key, default=repr)
        if text not in self._remembered:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            self._remembered[text] = ids()
        return list(self._remembered[text])

    def _prompt(self, messages: list[Message], tools: Any) -> list[int]:
        if tools and self.syntax == "json_list":
            listed = TOOL_PROMPT.format(tools="\n".join(json.dumps(tool) for tool in tools))
            system = messages[0]["content"] + "\n\n" if messages and messages[0]["role"] == "system" else ""
            rest = messages[1:] if system else messages
            messages, tools = [{"role": "system", "content": system + listed}, *rest], ()
        return self._encode(self._render(self._plain(messages), generate=True, tools=tools))

    def continuation(self, messages: list[Message]) -> list[int]:
        """Return the ids of the messages between two assistant turns: those after the first turn's stop token.

        Raises:
            UserError: the template cannot render these messages after an assistant turn.
        """
        return self._cached([messages], lambda: self._continuation(messages))

    def _continuation(self, messages: list[Message]) -> list[int]:
        text = self._render(self._closed + self._plain(messages), generate=True).partition(_MARK)[2]
        before, _, between = text.partition(self._end_text)
        if before.strip() or not between:
            raise UserError("the chat template cannot be continued after an assistant turn")
        return self._encode(between)

    def _encode(self, rendered_text: str) -> list[int]:
        rendered_text.encode()  # as in `encode`
        return self._control.encode(rendered_text)

    @staticmethod
    def _plain(messages: list[Message]) -> list[Message]:
        return [{**m, "content": m.get("content") or ""} for m in messages]

    def parse(self, ids: list[int], tools: Any = ()) -> Message:
        """Return the assistant message that the sampled ids encode.

        Raises:
            ToolCallError: a tool call that cannot be read.
        """
        text = self.text(ids)
        if not tools:
            content, found = text.strip(), []
        elif self.syntax == "words":
            signatures = {t["function"]["name"]: list(t["function"]["parameters"]["properties"]) for t in tools}
            content, found = parse_words(text, signatures)
        else:
            content, found = parse_tool_calls(text)
        message: Message = {"role": "assistant", "content": content}
        return {**message, "tool_calls": found} if found else message

    def text(self, ids: list[int]) -> str:
        """Return the decoded text of sampled ids, without their stop token."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=False)

    def write(self, message: Message) -> list[int]:
        """Return the ids that the policy would sample for ``message``, with the stop token (for demonstrations)."""
        calls = [c["function"] for c in message.get("tool_calls") or []]
        parts = [message.get("content") or ""]
        if self.syntax == "words":
            parts += [" ".join([c["name"], *map(str, c["arguments"].values())]) for c in calls]
        elif self.syntax == "json":
            parts += [f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls]
        elif calls:
            parts.append(f"<tool_call>{json.dumps(calls)}</tool_call>")
        separator = " " if self.syntax == "words" else "\n"
        text = separator.join(p for p in parts if p) + self._before_end
        return [*self.encode(text), self._end_mark]


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
