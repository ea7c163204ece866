"""Messages and tools in the forms that the OpenAI API and data sets use, converted into the form of chat templates.

Of messages: content parts become one text, the role ``developer`` becomes ``system``, ``arguments`` as JSON text become
an object, ``function_call`` and the role ``function`` become ``tool_calls`` and ``tool``, and keys without a value
(``"refusal": null``) are removed. Of tools: ``parameters`` may be missing, and the key ``function`` around name and
parameters too. Everything else stays as it is. Inputs are not modified.
"""

import json
from collections.abc import Sequence
from typing import Any

from ..checks import deeper_than

MAX_DEPTH = 64  # nesting depth of lists and objects in JSON text
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of content parts of both OpenAI APIs


TOOL_FORM = '{"type": "function", "function": {"name": text, "parameters": {"properties": object}}}'


class FormatError(ValueError):
    """A message or a tool cannot be converted. The text names the key, what was found and what is expected."""


def plain_messages(messages: Any, name: str) -> Any:
    """Return messages in the form of chat templates. Values that are not messages stay as they are.

    Args:
        messages: a list of messages; other values are returned unchanged.
        name: name of the list, for errors.

    Raises:
        FormatError: content that is not text (an image), or arguments that are not a JSON object.
    """
    if not isinstance(messages, list):
        return messages
    plain: list[Any] = []
    for place, message in enumerate(messages):
        new = _plain_message(message, f"{name}[{place}]") if isinstance(message, dict) else message
        developer = isinstance(message, dict) and message.get("role") == "developer"
        if developer and plain and (first := _system_text(plain[-1])) and (second := _system_text(new)):
            plain[-1] = {**plain[-1], "content": f"{first}\n\n{second}"}  # most templates accept one system message
        else:
            plain.append(new)
    return plain


def _system_text(message: Any) -> str | None:
    content = message.get("content") if isinstance(message, dict) and message.get("role") == "system" else None
    return content if isinstance(content, str) else None


def _plain_message(message: dict[str, Any], at: str) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = message.get("role")
    if isinstance(role, str):
        message["role"] = {"developer": "system", "function": "tool"}.get(role, role)
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"{at}.content")
    if "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = [message.pop("function_call")]
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_plain_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message


def _joined(parts: list[Any], at: str) -> str:
    texts = []
    for place, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(text := part.get("text"), str):
            found = f"a part of type {kind[:40]}" if isinstance(kind, str) else "a part without a type"
            raise FormatError(f"{at}[{place}]: found {found}, expected text or a part of type text with its text")
        texts.append(text)
    if not texts:
        raise FormatError(f"{at}: found an empty list, expected text")
    return "".join(texts)  # as chat templates that take parts write them


def _plain_call(call: Any, at: str) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" not in call and isinstance(call.get("name"), str):
        call = {"function": {key: call[key] for key in ("name", "arguments") if key in call}} | (
            {"id": call["id"]} if "id" in call else {}
        )
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return call
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = _object(arguments, f"{at}.function.arguments")
    filled = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **filled, "function": {**function, "arguments": arguments}}


def plain_tools(tools: Any) -> Any:
    """Return tools in the form of chat templates. Values that are not tools stay as they are.

    Args:
        tools: a list or tuple of tools, or one as JSON text (tables cannot hold objects of different shapes); other
            values are returned unchanged.

    Raises:
        FormatError: text that is not a JSON list, or a tool that is not a function.
    """
    if isinstance(tools, str) and not isinstance(tools := _value(tools, "tools"), list):
        raise FormatError("tools: found JSON text of another type, expected a list")
    if not isinstance(tools, Sequence):
        return tools
    plain = [_plain_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    return tools if list(tools) == plain else plain


def _plain_tool(tool: Any, at: str) -> Any:
    if not isinstance(tool, dict):
        return tool
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "function":
        raise FormatError(f"{at}: found a tool of type {kind[:40]}, expected type function")
    if "function" not in tool and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return tool
    function = {key: value for key, value in function.items() if value is not None}
    parameters = function.get("parameters", {})
    if isinstance(parameters, dict) and "properties" not in parameters:
        function["parameters"] = {"type": "object", **parameters, "properties": {}}
    return {"type": "function", **tool, "function": function}


def is_tool(tool: Any) -> bool:
    """Return whether a value is a tool in the form of chat templates."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    parameters = function.get("parameters")
    return isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict)


def _object(text: str, at: str) -> dict[str, Any]:
    if not isinstance(value := _value(text, at), dict):
        raise FormatError(f"{at}: found JSON text of another type, expected an object")
    return value


def _value(text: str, at: str) -> Any:
    """Return the value of JSON text from a file.

    Raises:
        FormatError: it is not JSON, has numbers that floats cannot represent or half of a surrogate pair, or is nested
            too deeply.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        reason = str(error).encode("ascii", "replace").decode()[:80]
        raise FormatError(f"{at}: found text that is not JSON ({reason}), expected JSON") from None
    if deeper_than(MAX_DEPTH, value):
        raise FormatError(f"{at}: found JSON that is nested too deeply")
    return value
