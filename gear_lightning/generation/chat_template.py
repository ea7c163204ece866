"""Renders messages with a model's chat template, and encodes the result."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..environments.base import Message
from ..errors import UserError
from .chat_safety import ControlTokens, TemplateLimit, check_template, rendered


class ChatTemplate:
    """A tokenizer's chat template, with bounded cost and protected against control tokens in text.

    Args:
        tokenizer: a transformers tokenizer.
        arguments: extra arguments of the template.

    Attributes:
        source: the template's source; of a tokenizer with several templates, all of them.

    Raises:
        UserError: the tokenizer has no chat template, or one that is not allowed.
    """

    def __init__(self, tokenizer: Any, arguments: dict[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.control = ControlTokens(tokenizer)
        self._arguments = arguments or {}
        template = tokenizer.chat_template
        if not template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; use an instruct "
                "model, or put a chat_template.jinja into the model directory"
            )
        sources = list(template.values()) if isinstance(template, dict) else [template]
        for source in sources:
            try:
                check_template(source)
            except TemplateLimit as error:
                raise UserError(f"the chat template: {error}") from None
        self.source = "\n".join(sources)
        self._argument_text = False  # whether the template takes a call's arguments only as JSON text
        self._empty_tools = False  # whether the template fails without a list of tools
        self._parts = False  # whether the template renders only lists of content parts (vision-language models)
        self._parts = not self._renders_text()

    def _renders_text(self) -> bool:
        """Return whether the template renders content that is text, or cannot render content parts either."""
        wanted = "zq7text7qz"
        messages = [{"role": "user", "content": wanted}, {"role": "assistant", "content": wanted}]
        shown = []
        for parts in (False, True):
            self._parts = parts
            try:
                shown.append(self.render(messages, generate=False).count(wanted))
            except UserError:
                shown.append(0)
        return shown[0] >= shown[1]

    def render(self, messages: Sequence[Message], *, generate: bool, tools: Any = ()) -> str:
        """Return the text of messages.

        Args:
            messages: chat messages. Calls and results without an id get one.
            generate: whether to add the generation prompt.
            tools: JSON schemas of the tools.

        Raises:
            UserError: the template cannot render the messages.
        """
        from jinja2 import TemplateError

        try:
            return self._render(messages, generate, tools)
        except TypeError as error:
            calls = any(m.get("tool_calls") for m in messages)
            if calls and not self._argument_text and "dict" in str(error):
                return self._retry("_argument_text", messages, generate, tools)
            if not tools and not self._empty_tools and "NoneType" in str(error):
                return self._retry("_empty_tools", messages, generate, tools)
            raise self._failure(messages, error) from None
        except (TemplateError, LookupError, AttributeError, ValueError, ArithmeticError) as error:
            if (
                isinstance(error, TemplateError)
                and not self._argument_text
                and any(m.get("tool_calls") for m in messages)
            ):
                with suppress(UserError):  # the template's own check of the arguments
                    return self._retry("_argument_text", messages, generate, tools)
            raise self._failure(messages, error) from None

    def encode(self, text: str, after: str = "") -> list[int]:
        """Return the ids of rendered text. ``after``: as in `ControlTokens.encode`.

        Raises:
            UnicodeEncodeError: half of a surrogate pair; the tokenizer's own error would not mention it.
        """
        text.encode()
        return self.control.encode(text, after)

    def _retry(self, option: str, messages: Sequence[Message], generate: bool, tools: Any) -> str:
        setattr(self, option, True)
        try:
            return self.render(messages, generate=generate, tools=tools)
        except UserError:
            setattr(self, option, False)
            raise

    def _render(self, messages: Sequence[Message], generate: bool, tools: Any) -> str:
        listed = self.control.mark(list(tools)) if tools else [] if self._empty_tools else None
        more = {"xml_tools": listed} if listed and "xml_tools" in self.source else {}  # SmolLM3
        marked = self.control.mark([self._prepared(m) for m in messages])
        return rendered(
            lambda: self.tokenizer.apply_chat_template(
                marked,
                tools=listed,
                add_generation_prompt=generate,
                tokenize=False,
                **more,
                **self._arguments,
            )
        )

    def _prepared(self, message: Message) -> Message:
        """Return a message with all keys that templates read."""
        found = {**message, "content": message.get("content") or ""}
        if reasoning := found.pop("reasoning", None):  # templates read it under one of three names
            found |= {"reasoning_content": reasoning, "reasoning": reasoning, "thinking": reasoning}
        if self._parts:
            found["content"] = [{"type": "text", "text": found["content"]}]
        calls = found.get("tool_calls")
        if calls and self._argument_text:
            found["tool_calls"] = [
                {**c, "function": {**c["function"], "arguments": _text(c["function"]["arguments"])}} for c in calls
            ]
        return found

    def _failure(self, messages: Sequence[Message], error: Exception) -> UserError:
        roles = ", ".join(str(m.get("role")) for m in messages)
        return UserError(f"the chat template cannot render messages with the roles {roles}: {error}")


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
