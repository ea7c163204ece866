"""Tasks and messages in the forms of the OpenAI API give the same prompts as those in the form of chat templates."""

import copy
import json

import pytest
from scripted_policy import answered
from tiny_runs import data, generation, module

from gear_lightning.environments.base import Demonstration, Environment, Step, Task, TaskSource
from gear_lightning.environments.jsonl import JsonlTasks, parse_task
from gear_lightning.environments.openai_format import FormatError, plain_messages, plain_tools
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.errors import UserError

IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
GIVEN = [
    {
        "role": "developer",
        "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        "name": None,
    },
    {"role": "user", "content": [{"type": "input_text", "text": "größer?"}]},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": {"größe": [1, "x"]}}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
            {"id": None, "function": {"name": "g", "arguments": None}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}]},
    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "function", "name": "f", "content": "2"},
]


def made(name, arguments, **more):
    return {"type": "function", **more, "function": {"name": name, "arguments": arguments}}


PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "größer?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [made("f", {"a": {"größe": [1, "x"]}}, id="c1"), made("g", {}, id="c2"), made("g", {})],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "1"},
    {"role": "assistant", "content": "", "tool_calls": [made("f", {})]},
    {"role": "tool", "name": "f", "content": "2"},
]
NO_PARAMETERS = {"type": "object", "properties": {}}
TOOLS = [
    ({"type": "function", "function": {"name": "f"}}, {"name": "f", "parameters": NO_PARAMETERS}),
    (
        {"type": "function", "name": "f", "description": "d", "strict": None, "parameters": {"type": "object"}},
        {"name": "f", "description": "d", "parameters": NO_PARAMETERS},
    ),
    (
        {"function": {"name": "f", "description": None, "parameters": None}},
        {"name": "f", "parameters": NO_PARAMETERS},
    ),
    ({"name": "f", "parameters": {"properties": {"a": {}}}}, {"name": "f", "parameters": {"properties": {"a": {}}}}),
]


def test_messages_of_the_openai_api_become_those_of_chat_templates():
    before = copy.deepcopy(GIVEN)
    assert plain_messages(GIVEN, "messages") == PLAIN
    assert before == GIVEN, "the input is not modified"
    assert plain_messages(PLAIN, "messages") == PLAIN


@pytest.mark.parametrize(("given", "plain"), TOOLS)
def test_tools_of_the_openai_api_become_those_of_chat_templates(given, plain):
    wanted = [{"type": "function", "function": plain}]
    assert plain_tools([given]) == plain_tools(json.dumps([given])) == plain_tools(wanted) == wanted


def test_instructions_of_system_and_developer_become_one_message():
    given = [
        {"role": "system", "content": "A."},
        {"role": "developer", "content": "B."},
        {"role": "user", "content": "C"},
    ]
    assert plain_messages(given, "messages") == [{"role": "system", "content": "A.\n\nB."}, given[2]]
    two = [given[0], given[0], given[2]]
    assert plain_messages(two, "messages") == two, "two system messages are the author's choice"


def test_a_line_a_task_and_a_demonstration_accept_them(tmp_path):
    tools = [tool for tool, _ in TOOLS[:1]]
    line = {"messages": GIVEN, "tools": tools, "reference": GIVEN[1:], "answer": ["3", "three", True]}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(line) + "\n")
    for task in (JsonlTasks(str(tmp_path / "tasks.jsonl"))[0], Task("t", GIVEN, tools, GIVEN[1:])):
        assert task.messages == PLAIN
        assert task.reference == PLAIN[1:]
        assert list(task.tools) == [{"type": "function", "function": TOOLS[0][1]}]
        task.check_format()
    assert Demonstration(Task("t", []), GIVEN).messages == PLAIN
    assert parse_task({"prompt": "a", "tools": json.dumps(tools)}, "f:1", "f-1").tools == list(task.tools)


def test_what_an_environment_returns_is_converted_too():
    class Asks(Environment):
        def reset(self, task, *, seed):
            return [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}]

        def step(self, message):
            return Step(
                [{"role": "user", "content": [{"type": "text", "text": "And?"}]}], done=message["content"] == "b"
            )

    rollout = answered(Task("t", [{"role": "user", "content": "?"}]), Asks, "a", "b")
    assert [m["content"] for m in rollout.messages] == ["?", "Be brief.", "a", "And?", "b", "And?"]
    assert rollout.messages[1]["role"] == "system"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [{"role": "user", "content": [IMAGE]}],
            r"m\[0\]\.content\[0\]: found a part of type image_url, expected text",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            r"m\[0\]\.content\[0\]: found a part of type text",
        ),
        ([{"role": "user", "content": ["a"]}], r"m\[0\]\.content\[0\]: found a part without a type"),
        ([{"role": "user", "content": []}], r"m\[0\]\.content: found an empty list"),
        *(
            (
                [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}],
                rf"m\[0\]\.tool_calls\[0\]\.function\.arguments: {reason}",
            )
            for text, reason in {
                "{": "found text that is not JSON",
                '{"a": NaN}': "found text that is not JSON",
                '{"a": 1e999}': "found text that is not JSON",
                '{"a": "\\ud800"}': "found text that is not JSON",
                "[1]": "found JSON text of another type, expected an object",
                '{"a": ' + "[" * 70 + "]" * 70 + "}": "found JSON that is nested too deeply",
                "[" * 100_000: "found text that is not JSON",
            }.items()
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_by_key(messages, reason):
    with pytest.raises(FormatError, match=reason) as caught:
        plain_messages(messages, "m")
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


class Pictures(TaskSource):
    size = 1

    def __getitem__(self, index):
        return Task("t1", [{"role": "user", "content": [IMAGE]}], meta={"answer": "a"})


def test_a_picture_in_a_task_is_refused_before_training_and_costs_only_its_rollouts_later():
    with pytest.raises(UserError, match=r"task t1: messages\[0\]\.content\[0\]: found a part of type image_url"):
        generation(environment=lambda: SingleTurn("exact")).attach(module(), data(train_tasks=Pictures()))
    rollout = answered(Pictures()[0], lambda: SingleTurn("exact"), "a")
    assert (rollout.status, rollout.learnable) == ("environment_error", False)
    assert "found a part of type image_url" in rollout.error
    with pytest.raises(UserError, match=r"task t2: tools\[0\] is not of the form"):
        Task("t2", [], [{"function": {}}]).check_format()
    with pytest.raises(UserError, match=r"task t2: tools\[0\]: found a tool of type web_search"):
        Task("t2", [], [{"type": "web_search"}]).check_format()
