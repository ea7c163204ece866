"""Tools with the types and results that people use."""

import asyncio
import dataclasses
import enum
import socket
from typing import Annotated, Any, Literal

import pydantic

from gear_lightning.environments.base import EnvironmentFailure, RewardError
from gear_lightning.environments.tools import ToolError


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    """A place."""

    x: int
    y: float = 0.0


class Shape(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(description="its name")]
    corners: list[Point] = []


class Tree(pydantic.BaseModel):
    value: int
    children: "list[Tree]" = []


def draw(
    color: Color,
    shape: Shape,
    size: Literal["small", "large"] = "small",
    times: int | None = None,
    at: Point | None = None,
    label: int | str = "",
    tree: Tree | None = None,
    weights: dict[str, list[float]] | None = None,
):
    """Draw a shape.

    Args:
        color: of its lines
        shape: what to draw
        size: how large it
            is
        times: how often
        at: where
        label: its label
        tree: what it belongs to
        weights: of its lines
    """
    kinds = [type(value).__name__ for value in (color, shape, shape.corners[0], at, tree)]
    return {"color": color, "at": at, "label": label, "kinds": kinds}


def count(n: int, /, *, step: int = 1) -> int:
    """Count.

    Args:
        n: up to which number
        step: (choices: [1, 2])
    """
    return n * step


def numbered(first: int) -> int:
    """Describe arguments in the style of numpy.

    Parameters
    ----------
    first : int
        the first of them
    """
    return first


def in_kind(kind: str) -> Any:
    """Return a result.

    Args:
        kind: which one
    """
    loop: list[Any] = []
    loop.append(loop)
    return {
        "text": 'größer\n"x"',
        "dict": {"größer": True, "price": 3.5, "none": None, "kind": Color.RED, "at": Point(1), "tags": ("a",)},
        "list": [1, None, {"a": []}],
        "model": Shape(name="ü", corners=[Point(1, 2)]),
        "dataclass": Point(1),
        "enum": Color.BLUE,
        "none": None,
        "true": True,
        "number": 1.5,
        "bytes": "ü".encode(),
        "half": {"half": "\ud83d"},
        "loop": loop,
    }[kind]


class LookupFailed(Exception):
    pass


def fail(how: str) -> str:
    """Fail.

    Args:
        how: in which way
    """
    match how:
        case "key":
            raise KeyError("pencil")
        case "long":
            raise ValueError("ü" * 100_000)
        case "own":
            raise LookupFailed("größer")
        case "unprintable":

            class Unprintable(Exception):
                def __str__(self):
                    raise RuntimeError

            raise Unprintable
        case "path":
            open("/nowhere/at/all").close()
        case "tool error":
            raise ToolError("größer than 3") from ConnectionError()
        case "refused":
            raise ConnectionRefusedError("no backend")
        case "refused inside":
            raise LookupFailed("search failed") from socket.gaierror("no name")
        case "timeout":
            raise TimeoutError("backend too slow")
        case "import":
            import nowhere_at_all  # pyright: ignore[reportMissingImports]  # noqa: F401
        case "memory":
            raise MemoryError
        case "environment":
            raise EnvironmentFailure("the backend is wrong")
        case "reward":
            raise RewardError("cannot be scored")
        case "exit":
            raise SystemExit(2)
    return ""


async def fail_apart(how: str) -> str:
    """Fail, in a task of a group.

    Args:
        how: in which way
    """

    async def failing():
        await asyncio.sleep(0)
        return fail(how)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(failing())
    return task.result()


order: list[str] = []


async def meet(name: str) -> str:
    """Wait for the other call.

    Args:
        name: of this call
    """
    order.append(f"{name} begins")
    for _ in range(1000):
        if len([one for one in order if one.endswith("begins")]) == 2:
            break
        await asyncio.sleep(0.001)
    order.append(f"{name} ends")
    if name == "bad":
        raise KeyError(name)
    return name


def undocumented(a: int):
    return a


def half_documented(a: int, b: int):
    """Describe one argument.

    Args:
        a: this one
    """


def unhinted(a):
    """Has no hint.

    Args:
        a: it
    """


def unreadable(a: "Nowhere"):  # pyright: ignore[reportUndefinedVariable]  # noqa: F821
    """Has a hint that names nothing.

    Args:
        a: it
    """


def opaque(a: socket.socket):
    """Has a hint that JSON cannot represent.

    Args:
        a: it
    """


def injected(a: int, client: socket.socket | None = None) -> str:
    """Has an argument that no call gives."""
    return f"{a} {client}"
