"""What the JSON schema of a tool says about its parameters, as far as reading a call depends on it."""

from collections.abc import Iterator
from typing import Any

from .base import Tools

ALL = frozenset({"string", "null", "boolean", "integer", "number", "object", "array"})
MAX_REFERENCES = 16  # references and combinations of schemas that are followed


def names_of(tools: Tools) -> list[str]:
    """Return the names of tools."""
    return [str(function.get("name")) for function in map(_function, tools)]


def parameters_of(tool: dict[str, Any]) -> "Parameters":
    """Return the parameters of a tool."""
    schema = _function(tool).get("parameters")
    return Parameters(schema if isinstance(schema, dict) else {})


def parameters_in(tools: Tools, name: str) -> "Parameters":
    """Return the parameters of the tool with a name; none if it is unknown."""
    return next((parameters_of(tool) for tool in tools if _function(tool).get("name") == name), Parameters({}))


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    return tool.get("function") or tool


class Parameters:
    """The parameters of a tool.

    Args:
        schema: the JSON schema of the arguments. References are resolved in it.
    """

    def __init__(self, schema: dict[str, Any]):
        self._root = schema

    def names(self) -> list[str]:
        """Return the names of the parameters that the schema lists."""
        found = (schema.get("properties") for schema in self._parts(self._root))
        return list(dict.fromkeys(name for part in found if isinstance(part, dict) for name in part))

    def kinds(self, name: str) -> frozenset[str]:
        """Return the JSON types that the value of a parameter may have."""
        found = None
        for schema in self._parts(self._root):
            listed = schema.get("properties")
            if isinstance(listed, dict) and name in listed:
                kinds = self._kinds(listed[name], 0)
                found = kinds if found is None else found | kinds
        if found is None:
            found = self._kinds(self._root.get("additionalProperties", True), 0)
        return found

    def _parts(self, schema: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
        """Yield a schema of an object, and those that it refers to or consists of."""
        if not isinstance(schema, dict) or depth > MAX_REFERENCES:
            return
        yield schema
        if "$ref" in schema:
            yield from self._parts(self._resolved(schema["$ref"]), depth + 1)
        for key in ("allOf", "anyOf", "oneOf"):
            for part in _list(schema.get(key)):
                yield from self._parts(part, depth + 1)

    def _kinds(self, schema: Any, depth: int) -> frozenset[str]:
        if not isinstance(schema, dict) or depth > MAX_REFERENCES:
            return ALL
        found = ALL
        if "type" in schema:
            given = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            found &= frozenset(kind for kind in given if isinstance(kind, str))
        values = schema.get("enum") if isinstance(schema.get("enum"), list) else None
        if "const" in schema:
            values = [schema["const"]]
        if values is not None:
            found &= frozenset(kind for value in values for kind in kinds_of(value))
        if "$ref" in schema:
            found &= self._kinds(self._resolved(schema["$ref"]), depth + 1)
        for part in _list(schema.get("allOf")):
            found &= self._kinds(part, depth + 1)
        for key in ("anyOf", "oneOf"):
            if options := _list(schema.get(key)):
                found &= frozenset().union(*(self._kinds(option, depth + 1) for option in options))
        return found | {"null"} if schema.get("nullable") is True else found

    def _resolved(self, reference: Any) -> Any:
        from referencing import Registry
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012

        try:
            resource = DRAFT202012.create_resource(self._root)
            return Registry().resolver_with_root(resource).lookup(str(reference)).contents
        except (Unresolvable, ValueError, LookupError, TypeError, AttributeError):
            return None


def kinds_of(value: Any) -> frozenset[str]:
    """Return the JSON types of a value: several for numbers."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return frozenset({"integer", "number"})
    for types, kind in ((float, "number"), (str, "string"), (dict, "object"), (list, "array")):
        if isinstance(value, types):
            return frozenset({kind})
    return frozenset()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
