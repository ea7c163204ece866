"""A Python function as a tool: its JSON schema, and the arguments that it expects, made from those of a call.

Type hints may be those that pydantic knows: also enums, optionals, unions, dataclasses and pydantic models.
"""

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable
from typing import Any

from docstring_parser import ParseError, parse
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_jsonable_python
from typing_extensions import TypedDict  # pydantic accepts that of `typing` only from Python 3.12 on

from ..errors import UserError
from .arguments import MAX_PROBLEMS, missing, shortened, unexpected

_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)  # at the end of a description, as transformers has it
_NAMED = ("properties", "patternProperties")  # keywords whose value maps names to schemas
_VALUES = ("default", "const", "enum", "examples")  # keywords whose value is no schema


class ToolFunction:
    """A function that a policy can call.

    Args:
        function: the function, ``async`` or not. Arguments are passed by name; ``*args`` are never passed.
        path: its import path, for errors.

    Attributes:
        name: name of the tool.
    """

    def __init__(self, function: Callable[..., Any], path: str):
        self.function = function
        self.path = path
        self.name: str = getattr(function, "__name__", path.rpartition(".")[2])
        target = function
        while isinstance(target, functools.partial):
            target = target.func
        self._target = target if inspect.isroutine(target) else type(target).__call__
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some built-in functions have none: they get what the policy gives
            found = ()
            self._open = True
        else:
            self._open = any(p.kind is p.VAR_KEYWORD for p in found)
        self._parameters = [p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self._names = {p.name for p in self._parameters}

    @functools.cached_property
    def schema(self) -> dict[str, Any]:
        """The tool's description in the format of chat templates.

        Raises:
            UserError: the docstring or a type hint is missing or cannot be described.
        """
        try:
            document = parse(inspect.getdoc(self._target) or "")
        except ParseError as error:
            raise self._undescribed(f"its docstring cannot be read: {error}") from None
        description = (document.description or "").strip()
        if not description:
            raise self._undescribed("it has no docstring")
        hints = self._hints(strict=True)
        texts = {p.arg_name: " ".join((p.description or "").split()) for p in document.params}
        for one in self._parameters:
            if one.name not in hints:
                raise self._undescribed(f"argument {one.name} has no type hint")
        parameters = self._parameter_schema()
        for name, described in parameters["properties"].items():
            text = texts.get(name) or described.get("description")
            if not text:
                raise self._undescribed(f"the docstring does not describe argument {name}")
            if choices := _CHOICES.search(text):
                try:
                    described["enum"] = json.loads(choices[1])
                except ValueError as error:
                    raise self._undescribed(f"the choices of argument {name} are not JSON: {error}") from None
                text = text[: choices.start()].strip()
            described["description"] = text
        shown = {"name": self.name, "description": description, "parameters": parameters}
        if (returned := self._return_schema(hints)) is not None:
            about = document.returns.description if document.returns else None
            shown["return"] = {**returned, **({"description": about} if about else {})}
        return {"type": "function", "function": shown}

    def _undescribed(self, reason: str) -> UserError:
        return UserError(
            f"tool {self.path!r} needs type hints and a docstring that describes each argument under Args: ({reason})"
        )

    def _hints(self, *, strict: bool) -> dict[str, Any]:
        """Return the type hints. If one names something that cannot be found, there are none, or `UserError`."""
        try:
            return typing.get_type_hints(inspect.unwrap(self._target), include_extras=True)
        except Exception as error:  # evaluating a hint can raise anything
            if strict:
                raise self._undescribed(f"its type hints cannot be read: {error}") from None
            return {}

    @functools.cached_property
    def _adapter(self) -> Any:
        """The pydantic type of the arguments."""
        hints = self._hints(strict=False)
        fields = {p.name: hints.get(p.name, Any) for p in self._parameters}
        fields |= {p.name: typing.NotRequired[fields[p.name]] for p in self._parameters if p.default is not p.empty}
        kind: Any = TypedDict("kind", fields)  # pyright: ignore
        try:  # the configuration also applies to dataclasses inside, so `bind` finds unknown arguments itself
            return TypeAdapter(with_config(ConfigDict(arbitrary_types_allowed=True))(kind))
        except Exception as error:
            raise self._undescribed(f"its type hints cannot be used: {error}") from None

    def check(self) -> None:
        """Check that the type hints can be used.

        Raises:
            UserError: they cannot.
        """
        assert self._adapter

    def _parameter_schema(self) -> dict[str, Any]:
        try:
            found = _tidy(self._adapter.json_schema(schema_generator=_Schema))
        except UserError:
            raise
        except Exception as error:
            raise self._undescribed(shortened(str(error))) from None
        for one in self._parameters:
            if one.default is not one.empty and one.default is not None:
                try:
                    default = json.loads(json.dumps(to_jsonable_python(one.default), allow_nan=False))
                except Exception:  # a default that JSON cannot represent is not shown
                    continue
                found["properties"][one.name]["default"] = default
        order = ("type", "properties", "required")  # of transformers' get_json_schema
        return {name: found[name] for name in order if name in found} | {k: found[k] for k in found if k not in order}

    def _return_schema(self, hints: dict[str, Any]) -> dict[str, Any] | None:
        if "return" not in hints:
            return None
        try:
            return _tidy(TypeAdapter(hints["return"]).json_schema(mode="serialization", schema_generator=_Schema))
        except Exception:  # the policy never writes this value, so a tool may return what no schema describes
            return None

    def bind(self, arguments: dict[str, Any]) -> tuple[Callable[[], Any] | None, list[str]]:
        """Convert the arguments of a call into those of the function.

        Returns:
            The call, or None, and what is wrong with the arguments, in one line for each problem.
        """
        others = {name: value for name, value in arguments.items() if name not in self._names}
        lines = [] if self._open else [unexpected([name]) for name in others]
        found: dict[str, Any] = {}
        try:
            found = others | self._adapter.validate_python(arguments)
        except ValidationError as error:
            lines = [*map(_line, error.errors(include_url=False, include_context=False)), *lines]
        if lines:
            return None, lines[:MAX_PROBLEMS]
        first = [p.name for p in self._parameters if p.kind is p.POSITIONAL_ONLY]
        given = [found.pop(name) for name in first if name in found]
        return functools.partial(self.function, *given, **found), []

    @functools.cached_property
    def parameters(self) -> dict[str, Any] | None:
        """The JSON schema of the arguments; None if the type hints do not give one."""
        try:
            return self._parameter_schema()
        except UserError:
            return None


def _line(problem: Any) -> str:
    path = problem["loc"]
    if problem["type"] == "missing":
        return missing(path)
    if problem["type"] == "extra_forbidden":
        return unexpected(path)
    return shortened(f"{'.'.join(map(str, path))}: {problem['msg']}")


class _Schema(GenerateJsonSchema):
    """Leaves a default that JSON cannot represent out without a warning."""

    ignored_warning_kinds: typing.ClassVar[Any] = {"skipped-choice", "non-serializable-default"}


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of pydantic in the form that chat templates know from transformers' ``get_json_schema``.

    Definitions are inserted where they are used, unless they contain themselves; titles are removed; null is
    ``nullable``; a union of plain types is a list of types.
    """
    definitions: dict[str, Any] = schema.get("$defs", {})
    kept: dict[str, Any] = {}

    def tidy(node: Any, inside: tuple[str, ...]) -> Any:
        if isinstance(node, list):
            return [tidy(one, inside) for one in node]
        if not isinstance(node, dict):
            return node
        name = str(node.get("$ref", "")).removeprefix("#/$defs/")
        if name in definitions:
            rest = {key: value for key, value in node.items() if key != "$ref"}
            if name in inside or name in _recursive(definitions):
                if name not in kept:
                    kept[name] = None
                    kept[name] = tidy(definitions[name], (*inside, name))
                return {"$ref": node["$ref"], **rest}
            return tidy({**definitions[name], **rest}, (*inside, name))
        found: dict[str, Any] = {}
        for key, value in node.items():
            if key == "default" and value is None:
                continue
            if key in _NAMED and isinstance(value, dict):
                found[key] = {name: tidy(one, inside) for name, one in value.items()}
            elif key in _VALUES:
                found[key] = value
            elif key not in ("title", "$defs") and not (key == "additionalProperties" and value is True):
                found[key] = tidy(value, inside)
        if found.get("items") == {}:
            del found["items"]
        found = _united(found)
        return {"type": found["type"], **found} if "type" in found else found

    found = tidy(schema, ())
    return {**found, "$defs": kept} if kept else found


def _recursive(definitions: dict[str, Any]) -> set[str]:
    """Return the names of definitions that contain themselves."""
    uses = {name: set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(one))) for name, one in definitions.items()}
    for _ in uses:
        uses = {name: used.union(*(uses.get(other, set()) for other in used)) for name, used in uses.items()}
    return {name for name, used in uses.items() if name in used}


def _united(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with ``nullable`` and lists of types in place of ``anyOf``, where they mean the same."""
    kinds = schema.get("anyOf")
    if not kinds:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    some = [kind for kind in kinds if kind != {"type": "null"}]
    if len(some) < len(kinds):
        rest["nullable"] = True
    if len(some) == 1:
        return {**some[0], **rest}
    if all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in some):
        return {"type": sorted({kind["type"] for kind in some}), **rest}
    return {"anyOf": some, **rest}
