"""Checks of a tool call's arguments against the JSON schema that the policy was shown."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import SchemaError
from referencing import Registry

from ..errors import UserError
from .base import EnvironmentFailure

MAX_PROBLEMS = 8  # lines about one call
MAX_LINE = 200  # characters of one line
MAX_VALUE = 40  # characters of a value in a line


def check_parameters(parameters: Any, what: str) -> None:
    """Check that a tool's ``parameters`` are a valid JSON schema.

    Args:
        parameters: the schema.
        what: description of the tool, for the message.

    Raises:
        UserError: they are not.
    """
    try:
        next(_validator(json.dumps(parameters)).iter_errors({}), None)  # finds references that lead nowhere
    except SchemaError as error:
        place = ".".join(map(str, ("parameters", *error.absolute_path)))
        raise UserError(f"{what}: {place} is not a JSON schema: {shortened(error.message)}") from None
    except Exception as error:
        raise UserError(f"{what}: parameters is not a JSON schema: {shortened(str(error))}") from None


def read_arguments(
    name: str, arguments: dict[str, Any], parameters: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return a call's arguments, and what is wrong with them, in one line for each problem.

    Text counts as the value that it spells out in JSON where the schema takes no text, because some syntaxes of tool
    calls write every argument as text.

    Args:
        name: name of the tool, for errors.
        arguments: name -> value.
        parameters: JSON schema of the tool.

    Raises:
        EnvironmentFailure: the schema cannot be used.
    """
    try:
        validator = _validator(json.dumps(parameters))
        errors = list(validator.iter_errors(arguments))
        texts = [e.absolute_path[0] for e in errors if len(e.absolute_path) == 1 and isinstance(e.instance, str)]
        spelled = {text: value for text in texts if (value := _spelled(arguments[text])) is not None}
        if spelled and len(better := list(validator.iter_errors({**arguments, **spelled}))) < len(errors):
            arguments, errors = {**arguments, **spelled}, better
        lines = dict.fromkeys(line for error in errors for line in _lines(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {shortened(str(error))}"
        raise EnvironmentFailure(f"the schema of the tool {name[:40]!r} cannot be used: {reason}") from error
    return arguments, list(lines)[:MAX_PROBLEMS]


def _spelled(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@functools.lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    """Return the validator of a schema, given as JSON. It loads no schema from elsewhere.

    ``nullable``, which chat templates know from OpenAPI, is not JSON schema: it is taken as permission of null.

    Raises:
        SchemaError: it is not a schema.
    """
    schema = json.loads(text)
    kind = validators.validator_for(schema, Draft202012Validator)
    kind.check_schema(schema)

    def or_null(check: Any) -> Any:
        def checked(validator: Any, wanted: Any, value: Any, schema: Any) -> Any:
            return () if value is None and schema.get("nullable") is True else check(validator, wanted, value, schema)

        return checked

    names = ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref")
    extended = validators.extend(kind, {n: or_null(kind.VALIDATORS[n]) for n in names if n in kind.VALIDATORS})
    return extended(schema, registry=Registry())


def _lines(error: Any) -> list[str]:
    """Return a problem as lines that name the argument, what is expected and what was found."""
    place, wanted, value = _place(error.absolute_path), error.validator_value, error.instance
    if error.validator == "required":
        return [missing([*error.absolute_path, name]) for name in wanted if name not in value]
    if error.validator == "additionalProperties" and wanted is False:
        known = error.schema.get("properties", {})
        return [unexpected([*error.absolute_path, name]) for name in value if name not in known]
    if error.validator == "type":
        expected = " or ".join(wanted) if isinstance(wanted, list) else wanted
    elif error.validator == "enum":
        expected = "one of " + ", ".join(map(_shown, wanted))
    elif error.validator == "const":
        expected = _shown(wanted)
    elif error.validator in ("anyOf", "oneOf") and error.context:
        types = [e.validator_value for e in error.context if e.validator == "type" and not e.relative_path]
        if len(types) < len(wanted):  # the right type, and something inside it is wrong
            inner = min((e for e in error.context if e.validator != "type" or e.relative_path), key=_depth)
            return _lines(inner)
        expected = " or ".join(str(one) for one in types)
    else:
        return [shortened(f"{place}: {error.message}")]
    return [shortened(f"{place}: expected {expected}, got {_shown(value)}")]


def _depth(error: Any) -> int:
    return -len(error.absolute_path)


def missing(path: Sequence[str | int]) -> str:
    """Return the problem of a value that is missing. ``path``: names and indices that lead to it."""
    return f"missing a required argument: {path[0]!r}" if len(path) == 1 else f"{_place(path)} is missing"


def unexpected(path: Sequence[str | int]) -> str:
    """Return the problem of a value that does not belong there."""
    name = str(path[0])[:MAX_VALUE]
    return f"got an unexpected keyword argument {name!r}" if len(path) == 1 else f"{_place(path)} is not expected"


def _place(path: Any) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:MAX_LINE] or "the arguments"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "..."


def shortened(line: str) -> str:
    """Return a text as one line of limited length."""
    line = " ".join(line.split())
    return line if len(line) <= MAX_LINE else line[:MAX_LINE] + "..."
