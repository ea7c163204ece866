"""Tools: schemas of functions, checked and converted arguments, results as JSON, exceptions, several calls at once."""

import dataclasses
import enum
import functools
import json
from collections import deque

import numpy as np
import pydantic
import pytest
from deadlines import seconds
from rich_tools import order
from scripted_policy import answered
from tiny_runs import data, generation, module, trainer
from transformers.utils.chat_template_utils import get_json_schema

from gear_lightning.environments.arguments import read_arguments
from gear_lightning.environments.base import Task, tool_calls
from gear_lightning.environments.functions import FunctionTools, tool_schemas
from gear_lightning.environments.tools import ToolEnvironment, result_text
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.runs.identity import identity_of
from gear_lightning.runs.records import read_records

TOOLS = [f"rich_tools.{name}" for name in ("draw", "count", "in_kind", "fail", "fail_apart", "meet")]
BUDGETS = Budgets(tokens=200_000, context=400_000, step_seconds=seconds(30))
SHAPE = {"name": "a", "corners": [{"x": 1}]}


def make_task(paths=TOOLS, tools=None) -> Task:
    tools = tool_schemas(paths) if tools is None else tools
    return Task("t1", [{"role": "user", "content": "?"}], tools, meta={"answer": "ok"})


def call(*made: tuple[str, dict]) -> str:
    calls = [{"name": name, "arguments": arguments} for name, arguments in made]
    return f"<tool_call>{json.dumps(calls, ensure_ascii=False)}</tool_call>"


def play(*made: tuple[str, dict], paths=TOOLS, task=None, **options):
    environment = functools.partial(FunctionTools, paths, "exact", **options)
    return answered(task or make_task(paths), environment, call(*made), "ok", budgets=BUDGETS)


def results(rollout) -> list[str]:
    return [m["content"] for m in rollout.messages if m["role"] == "tool"]


# -- schemas ----------------------------------------------------------------------------------------------------------


def test_a_schema_describes_enums_optionals_unions_dataclasses_and_models():
    (tool,) = tool_schemas(["rich_tools.draw"])
    parameters = tool["function"]["parameters"]
    found = parameters["properties"]
    point = {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "number", "default": 0.0}},
        "required": ["x"],
    }
    assert tool["function"]["description"] == "Draw a shape."
    assert parameters["required"] == ["color", "shape"]
    assert found["color"] == {"type": "string", "enum": ["red", "blue"], "description": "of its lines"}
    assert found["size"] == {
        "type": "string",
        "enum": ["small", "large"],
        "default": "small",
        "description": "how large it is",
    }
    assert found["times"] == {"type": "integer", "nullable": True, "description": "how often"}
    assert found["label"]["type"] == ["integer", "string"]
    assert found["at"] == {**point, "nullable": True, "description": "where"}
    corners = found["shape"]["properties"]["corners"]
    assert corners == {"type": "array", "default": [], "items": {**point, "description": "A place."}}
    assert found["shape"]["properties"]["name"]["description"] == "its name"
    assert found["weights"]["additionalProperties"] == {"type": "array", "items": {"type": "number"}}
    assert found["tree"]["$ref"] == "#/$defs/Tree", "it contains itself"
    assert parameters["$defs"]["Tree"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
    assert "title" not in json.dumps(tool)


def plain(a: int, b: float, c: str, d: bool, e: list[int], f: dict, g: int | str, h: int | None, i: list, j: tuple):
    """Take everything.

    Over several lines.

    Args:
        a: one
        b: two (choices: [1.5, 2.5])
        c: three
            and more
        d: four
        e: five
        f: six
        g: seven
        h: eight
        i: nine
        j: ten

    Returns:
        a text
    """
    return ""


def titled(title: str, default: str, enum: str, properties: str) -> str:
    """Have names that JSON schema uses itself.

    Args:
        title: a
        default: b
        enum: c
        properties: d
    """
    return title


@pytest.mark.parametrize("function", [plain, titled])
def test_schemas_of_plain_types_are_those_of_transformers(function):
    (found,) = tool_schemas([f"{__name__}.{function.__name__}"])
    assert found == get_json_schema(function)
    assert list(found["function"]["parameters"]) == ["type", "properties", "required"]


def test_other_styles_of_docstrings_are_read():
    (tool,) = tool_schemas(["rich_tools.numbered"])
    assert tool["function"]["parameters"]["properties"]["first"]["description"] == "the first of them"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("undocumented", "it has no docstring"),
        ("half_documented", "the docstring does not describe argument b"),
        ("unhinted", "argument a has no type hint"),
        ("unreadable", "its type hints cannot be read: name 'Nowhere' is not defined"),
        ("opaque", "Cannot generate a JsonSchema"),
    ],
)
def test_a_function_that_cannot_be_described_is_refused_by_name(name, reason):
    with pytest.raises(UserError, match=rf"tool 'rich_tools\.{name}' needs type hints and a docstring") as caught:
        tool_schemas([f"rich_tools.{name}"])
    assert reason in str(caught.value)
    FunctionTools([f"rich_tools.{name}"])  # tasks may describe it themselves


def test_a_passed_check_of_tasks_is_remembered_for_the_same_tools():
    one, same, other = (FunctionTools([f"rich_tools.{name}"], "exact") for name in ("count", "count", "meet"))
    assert identity_of(one) == identity_of(same) != identity_of(other)


# -- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_become_what_the_function_expects():
    tree = {"value": 1, "children": [{"value": 2}]}
    given = {"color": "red", "shape": SHAPE, "at": {"x": 2}, "label": 3, "tree": tree}
    rollout = play(("draw", given))
    kinds = ["Color", "Shape", "Point", "Point", "Tree"]
    shown = {"color": "red", "at": {"x": 2, "y": 0.0}, "label": 3, "kinds": kinds}
    assert results(rollout) == [json.dumps(shown)]
    assert results(play(("count", {"n": 4, "step": 2}))) == ["8"]


@pytest.mark.parametrize(
    ("name", "given", "lines"),
    [
        ("count", {"n": "five"}, ['n: expected integer, got "five"']),
        ("count", {"n": 1.5}, ["n: expected integer, got 1.5"]),
        ("count", {"n": None}, ["n: expected integer, got null"]),
        ("count", {"n": True}, ["n: expected integer, got true"]),
        ("count", {"n": 1, "step": 3}, ["step: expected one of 1, 2, got 3"]),
        ("count", {}, ["missing a required argument: 'n'"]),
        ("count", {"n": 1, "größe": 1}, ["got an unexpected keyword argument 'größe'"]),
        ("draw", {"color": "größer", "shape": SHAPE}, ['color: expected one of "red", "blue", got "größer"']),
        (
            "draw",
            {"color": "red", "shape": {"corners": [{"x": 1}, {"y": "a", "z": 1}]}, "times": "x"},
            [
                "shape.name is missing",
                "shape.corners[1].x is missing",
                'shape.corners[1].y: expected number, got "a"',
                'times: expected integer, got "x"',
            ],
        ),
        (
            "draw",
            {"color": "red", "shape": SHAPE, "label": [1], "tree": {"value": 1, "children": [{"value": "x"}]}},
            ["label: expected integer or string, got [1]", 'tree.children[0].value: expected integer, got "x"'],
        ),
        ("count", {"n": "x" * 1000}, [f'n: expected integer, got "{"x" * 39}...']),
    ],
)
def test_the_policy_reads_what_is_wrong_with_its_arguments(name, given, lines):
    rollout = play((name, given))
    assert (rollout.status, rollout.reward, rollout.tool_errors) == ("done", 1.0, [])
    (text,) = results(rollout)
    assert text.startswith("error: ")
    assert sorted(text.removeprefix("error: ").split("\n")) == sorted(f"{name}: {line}" for line in lines)


def test_arguments_under_another_key_are_not_lost():
    call = '<tool_call>[{"name": "count", "%s": {"n": 1}}]</tool_call>'
    rollout = answered(make_task(), lambda: FunctionTools(TOOLS, "exact"), call % "parameters", "ok")
    assert results(rollout) == results(play(("count", {"n": 1})))
    rollout = answered(make_task(), lambda: FunctionTools(TOOLS, "exact"), call % "args", "ok")
    assert rollout.status == "invalid_tool_call"
    assert rollout.error == 'a tool call has no "arguments", but: args'


def test_text_counts_as_the_value_that_it_spells_out_where_no_text_is_allowed():
    assert results(play(("count", {"n": "4", "step": "2"}))) == ["8"], "some syntaxes write each argument as text"
    parameters = {"properties": {"a": {"type": ["string", "integer"]}, "b": {"type": "array"}, "c": {"type": "string"}}}
    given = {"a": "1", "b": "[1]", "c": "2"}
    assert read_arguments("f", given, parameters) == ({"a": "1", "b": [1], "c": "2"}, [])


LIMITED = {
    "name": "anything",
    "parameters": {"properties": {"n": {"type": "integer", "maximum": 3}}, "required": ["n"]},
}


class Echo(ToolEnvironment):
    def call(self, name, arguments):
        return arguments


def test_every_tool_environment_checks_arguments_against_the_schema_that_the_task_shows():
    task = make_task(tools=[LIMITED])
    said = call(("anything", {"n": 2, "more": "ü"}), ("anything", {"n": 4}), ("anything", {}), ("other", {"n": 9}))
    rollout = answered(task, lambda: Echo("exact"), said, "ok")
    assert results(rollout) == [
        '{"n": 2, "more": "ü"}',
        "error: anything: n: 4 is greater than the maximum of 3",
        "error: anything: missing a required argument: 'n'",
        '{"n": 9}',
    ]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"properties": {"n": {"type": "whole"}}}, r"parameters\.properties\.n\.type is not a JSON schema"),
        ({"properties": {}, "required": "n"}, r"parameters\.required is not a JSON schema"),
        ({"properties": {}, "$ref": "https://example.com/schema"}, "parameters is not a JSON schema"),
    ],
)
def test_a_schema_that_is_not_one_is_refused_before_training_and_never_blamed_on_the_policy(parameters, reason):
    task = make_task(tools=[{"name": "anything", "parameters": parameters}])
    with pytest.raises(UserError, match=rf"task t1: tool 'anything': {reason}"):
        Echo("exact").check(task)
    rollout = answered(task, lambda: Echo("exact"), call(("anything", {"n": 1})), "ok")
    assert (rollout.status, rollout.learnable) == ("environment_error", False)
    assert rollout.error.startswith("the schema of the tool 'anything' cannot be used: ")


def test_functions_that_tasks_describe_themselves_may_have_any_hints():
    (tool,) = tool_schemas(["rich_tools.numbered"])
    tool["function"]["name"] = "injected"
    paths = ["rich_tools.injected", "os.path.join"]
    task = make_task(tools=[tool, {"name": "join"}])
    task.tools[0]["function"]["parameters"] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    made = ("injected", {"a": 1}), ("join", {"a": "x"}), ("injected", {"b": 1})
    wrong = "error: injected: missing a required argument: 'a'\ninjected: got an unexpected keyword argument 'b'"
    assert results(play(*made, paths=paths, task=task)) == ["1 None", "x", wrong]


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("text", 'größer\n"x"'),
        (
            "dict",
            '{"größer": true, "price": 3.5, "none": null, "kind": "red", "at": {"x": 1, "y": 0.0}, "tags": ["a"]}',
        ),
        ("list", '[1, null, {"a": []}]'),
        ("model", '{"name": "ü", "corners": [{"x": 1, "y": 2.0}]}'),
        ("dataclass", '{"x": 1, "y": 0.0}'),
        ("enum", "blue"),
        ("none", "null"),
        ("true", "true"),
        ("number", "1.5"),
        ("bytes", "ü"),
        ("half", '{"half": "?"}'),
        ("loop", '{"error": "ValueError: Circular reference detected (id repeated)"}'),
    ],
)
def test_a_result_that_is_not_text_becomes_json(kind, text):
    rollout = play(("in_kind", {"kind": kind}))
    assert (rollout.status, rollout.reward) == ("done", 1.0)
    assert results(rollout) == [text]


# -- exceptions -------------------------------------------------------------------------------------------------------

ANSWERED = {
    "key": "KeyError: 'pencil'",
    "long": "ValueError: " + "ü" * (1000 - len("ValueError: ")),
    "own": "LookupFailed: größer",
    "unprintable": "Unprintable: (its text cannot be read)",
    "path": "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/at/all'",
}
ENDED = {
    "refused": ("environment_error", "ConnectionRefusedError: no backend"),
    "refused inside": ("environment_error", "LookupFailed: search failed"),
    "timeout": ("environment_timeout", "backend too slow"),
    "import": ("environment_error", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "memory": ("environment_error", "MemoryError: "),
    "environment": ("environment_error", "the backend is wrong"),
    "reward": ("invalid_reward", "cannot be scored"),
    "exit": ("environment_error", "SystemExit: 2"),
}


@pytest.mark.parametrize("tool", ["fail", "fail_apart"])
@pytest.mark.parametrize("how", ANSWERED)
def test_an_exception_of_a_tool_is_its_answer_and_is_counted(tool, how):
    rollout = play((tool, {"how": how}))
    assert (rollout.status, rollout.reward, rollout.learnable) == ("done", 1.0, True)
    assert rollout.tool_errors == [ANSWERED[how]]
    assert results(rollout) == [json.dumps({"error": ANSWERED[how]}, ensure_ascii=False)]


@pytest.mark.parametrize("tool", ["fail", "fail_apart"])
@pytest.mark.parametrize("how", ENDED)
def test_an_exception_that_no_call_causes_ends_the_rollout(tool, how):
    rollout = play((tool, {"how": how}))
    assert (rollout.status, rollout.learnable) == (ENDED[how][0], False)
    if how != "exit" or tool == "fail":  # a group adds its own text
        assert rollout.error == ENDED[how][1]


@pytest.mark.parametrize("tool", ["fail", "fail_apart"])
def test_a_tool_error_is_a_text_and_is_not_counted(tool):
    for options in ({}, {"on_error": "end"}):
        rollout = play((tool, {"how": "tool error"}), **options)
        assert (rollout.status, rollout.tool_errors) == ("done", [])
        assert results(rollout) == ["error: größer than 3"]


def test_on_error_end_ends_the_rollout_with_any_other_exception():
    rollout = play(("fail", {"how": "key"}), on_error="end")
    assert (rollout.status, rollout.error, rollout.learnable) == ("environment_error", "KeyError: 'pencil'", False)
    with pytest.raises(UserError, match="on_error='ignore': must be one of answer, end"):
        FunctionTools(TOOLS, on_error="ignore")  # pyright: ignore[reportArgumentType]


# -- several calls ----------------------------------------------------------------------------------------------------


def message(*made: tuple[str, dict]) -> dict:
    functions = [{"name": name, "arguments": arguments} for name, arguments in made]
    calls = [{"type": "function", "id": f"id-{i}", "function": function} for i, function in enumerate(functions)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_calls_of_one_message_are_answered_in_order_each_with_its_id():
    environment = FunctionTools(TOOLS, "exact", max_calls=4)
    environment.reset(make_task(), seed=0)
    said = message(("count", {"n": 1}), ("fail", {"how": "key"}), ("nothing", {}), ("in_kind", {"kind": "none"}))
    step = environment.step(said)
    assert [c.id for c in tool_calls(said)] == [f"id-{i}" for i in range(4)]
    assert [m["tool_call_id"] for m in step.messages] == [c.id for c in tool_calls(said)]
    assert [m["name"] for m in step.messages] == ["count", "fail", "nothing", "in_kind"]
    assert [m["content"][:8] for m in step.messages] == ["1", '{"error"', "error: t", "null"]
    assert environment.step(message(("count", {"n": 1}))).truncated, "all four calls count"


def test_async_calls_of_one_message_run_together_and_keep_their_order():
    order.clear()
    rollout = play(("meet", {"name": "bad"}), ("count", {"n": 2}), ("meet", {"name": "good"}))
    assert set(order[:2]) == {"bad begins", "good begins"}, "each waits for the other"
    assert results(rollout) == ['{"error": "KeyError: \'bad\'"}', "2", "good"]


def test_every_call_has_an_id_that_its_result_repeats():
    messages = play(("count", {"n": 1}), ("count", {"n": 2})).messages
    made = [call["id"] for m in messages for call in m.get("tool_calls") or []]
    assert len(set(made)) == 2
    assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == made


# -- a run ------------------------------------------------------------------------------------------------------------


class Broken(ToolEnvironment):
    """Ends each episode after an exception of a tool."""

    def call(self, name, arguments):
        raise KeyError("pencil")

    def step(self, message):
        step = super().step({"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]})
        step.done = True
        return step

    def read_arguments(self, name, arguments):
        return arguments


def test_a_run_counts_records_and_reports_exceptions_of_tools(tmp_path):
    fit = trainer(tmp_path, generation(environment=lambda: Broken(lambda *_: 1.0)), max_epochs=1)
    with pytest.warns(UserWarning, match=r"task lookup-.*: a tool raised an exception.*KeyError: 'pencil'") as caught:
        fit.fit(module(), datamodule=data())
    assert sum("a tool raised" in str(warning.message) for warning in caught) == 1
    assert fit.callback_metrics["rollouts/tool_errors"] == 1
    assert fit.callback_metrics["rollouts/side_errors"] == 0
    (record,) = read_records(tmp_path)
    assert all(r["tool_errors"] == ["KeyError: 'pencil'"] and r["error"] is None for r in record.rollouts)


@dataclasses.dataclass
class Read:
    data: bytes


class Sent(pydantic.BaseModel):
    data: bytes = pydantic.Field(serialization_alias="body")


Mark = enum.Enum("Mark", {"ODD": b"a\xff"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": b"ok", "b": 1.5}, '{"a": "ok", "b": 1.5}'),
        ({"a": b"a\xff", "b": [1, None]}, '{"a": "a�", "b": [1, null]}'),
        ({b"a\xff": {"c": (b"a\xff",)}}, '{"a�": {"c": ["a�"]}}'),
        ([bytearray(b"a\xff"), deque([b"a\xff"]), {b"a\xff"}], '["a�", ["a�"], ["a�"]]'),
        ({"a": Read(b"a\xff")}, '{"a": {"data": "a�"}}'),
        ([Sent(data=b"a\xff")], '[{"body": "a�"}]'),
        ([Mark.ODD], '["a�"]'),
        (np.array([b"a\xff"]), '["a�"]'),
        (b"a\xff", "a�"),
        (bytearray(b"a\xff"), "a�"),
    ],
)
def test_bytes_in_a_result_are_decoded_with_replacement(value, text):
    assert result_text(value) == text
