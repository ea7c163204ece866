"""Describe an object by its type, parts and source code: objects with equal descriptions behave the same."""

import hashlib
import inspect
import os
from enum import Enum
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

MAX_DEPTH = 20  # maximum nesting of objects


class UnknownIdentityError(ValueError):
    """The behavior of an object depends on more than can be described."""


def identity_of(value: Any, depth: int = 0) -> str:
    """Return a text that describes a value: its type, its parts and, for functions and classes, a hash of their source.

    Code that the source files import is not included.

    Args:
        value: the value to describe.
        depth: current nesting depth.

    Raises:
        UnknownIdentityError: the value is, or holds, something else: a closure, a handle, an object without source.
    """
    if depth > MAX_DEPTH:
        raise UnknownIdentityError("nested too deeply")

    def inner(value: Any) -> str:
        return identity_of(value, depth + 1)

    if value is None or isinstance(value, bool | int | float | complex | str | bytes | PurePath | Enum):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(inner, value))})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(inner, value)))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{inner(key)}: {inner(item)}' for key, item in value.items())})"
    if isinstance(value, partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if inspect.ismethod(value):
        return f"{value.__name__} of {inner(value.__self__)}"
    if inspect.isfunction(value):
        if {*value.__code__.co_freevars} - {"__class__"}:  # the cell of super()
            raise UnknownIdentityError(f"{value.__qualname__} is a closure")
        defaults = inner([value.__defaults__, value.__kwdefaults__])
        return f"{value.__module__}.{value.__qualname__} {defaults} {_code(value)}"
    if inspect.isclass(value):
        own = [kind for kind in value.__mro__ if kind.__module__ not in ("builtins", "abc", "typing")]
        return f"{value.__module__}.{value.__qualname__} {' '.join(map(_code, own))}"
    if not hasattr(value, "__dict__") or any(vars(kind).get("__slots__") for kind in type(value).__mro__):
        raise UnknownIdentityError(f"the parts of a {type(value).__name__} cannot be inspected")
    return f"{inner(type(value))} {inner(dict(sorted(vars(value).items())))}"


def _code(thing: Any) -> str:
    """Return the digest of the source file of a function or class."""
    try:
        return file_digest(inspect.getsourcefile(thing) or "")
    except (OSError, TypeError):
        raise UnknownIdentityError(f"{thing!r} has no source file") from None


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    return _content(path, os.stat(path).st_mtime_ns)


@cache
def _content(path: str, changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
