"""Tasks from JSON Lines files: valid files give tasks, and invalid files give an error with line and reason."""

import gzip
import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gear_lightning.environments.jsonl import JsonlTasks, parse_task
from gear_lightning.environments.lines import index_lines
from gear_lightning.errors import UserError
from gear_lightning.rewards import number

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
PART, IMAGE = {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b


def undescribed(a):
    return a


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="tasks.jsonl"):
        path = tmp_path / name
        texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
        data = b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


def test_a_file_with_every_key_gives_the_expected_tasks(write):
    path = write(
        {"prompt": "1 + 1?", "answer": 2, "reward": "number", "level": {"hard": False}},
        {"messages": [SYSTEM, USER], "id": 7, "reference": "Say hi.", "tools": [TOOL]},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "name": "add", "content": "3"},
            ],
            "id": "third",
            "reference": [{"role": "assistant", "content": "3"}],
            "tools": None,
        },
    )
    source = JsonlTasks(path)
    first, second, third = (source[i] for i in range(source.size))
    assert (first.id, first.messages) == ("tasks-1", [{"role": "user", "content": "1 + 1?"}])
    assert first.meta == {"answer": 2, "reward": "number", "level": {"hard": False}}
    assert (list(first.tools), first.reference) == ([], None)
    assert (second.id, second.reference, list(second.tools)) == ("7", "Say hi.", [TOOL])
    assert second.messages == [SYSTEM, USER]
    assert second.meta == {}
    assert (third.id, third.reference) == ("third", [{"role": "assistant", "content": "3"}])
    assert third.messages[1]["tool_calls"] == [CALL]


def test_gzip_byte_order_marks_and_blank_lines_are_supported_and_line_numbers_are_kept(write):
    lines = ["", b"\xef\xbb\xbf" + '{"prompt": "größer"}'.encode(), "  \t", {"prompt": "b"}, ""]
    for name in ("mine.jsonl", "mine.jsonl.gz"):
        source = JsonlTasks(write(*lines, name=name))
        assert [source[i].id for i in range(source.size)] == ["mine-2", "mine-4"]
        assert source[0].messages[0]["content"] == "größer"
    assert JsonlTasks(write('{"prompt": "a"}\r\n{"prompt": "b"}\r')).size == 2, "Windows line endings must be supported"


def test_limit_shortens_the_source_but_the_whole_file_is_checked(write):
    assert JsonlTasks(write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}), limit=2).size == 2
    with pytest.raises(UserError, match=r"tasks\.jsonl:3: found keys answer, expected either prompt or messages"):
        JsonlTasks(write({"prompt": "a"}, {"prompt": "b"}, {"answer": "c"}), limit=1)
    with pytest.raises(UserError, match="limit=0: must be at least 1"):
        JsonlTasks(write({"prompt": "a"}), limit=0)


def test_the_shared_reward_applies_to_tasks_without_a_reward(write):
    path = write({"prompt": "a"}, {"prompt": "b", "reward": "exact"})
    source = JsonlTasks(path, reward="number")
    assert [source[i].meta["reward"] for i in (0, 1)] == ["number", "exact"]
    path_of_number = "gear_lightning.rewards.number"
    own = JsonlTasks(write({"prompt": "a", "reward": path_of_number}), rewards=[path_of_number])
    assert own[0].meta["reward"] == f"{number.__module__}.number"
    with pytest.raises(UserError, match="reward 'numbr' is neither built in"):
        JsonlTasks(path, reward="numbr")


def test_schemas_of_shared_tools_come_from_their_functions(write):
    source = JsonlTasks(write({"prompt": "a", "tools": [TOOL]}), tools=[f"{__name__}.add"])
    own, shared = source[0].tools
    assert own == TOOL
    assert shared["function"]["name"] == "add"
    assert shared["function"]["parameters"]["properties"]["a"] == {"type": "integer", "description": "one."}
    with pytest.raises(UserError, match=r"undescribed' needs type hints and a docstring"):
        JsonlTasks(write({"prompt": "a"}), tools=[f"{__name__}.undescribed"])
    with pytest.raises(UserError, match=r"tool 'nowhere\.f' cannot be imported"):
        JsonlTasks(write({"prompt": "a"}), tools=["nowhere.f"])


def chat(*messages):
    return {"messages": list(messages)}


def assistant(**keys):
    return chat({"role": "assistant", "content": "x", **keys}, USER)


@pytest.mark.parametrize(
    ("line", "found", "expected"),
    [
        ("{", "invalid JSON", "one JSON object"),
        ('{"prompt": "a"} x', "invalid JSON", "one JSON object"),
        ('{"prompt": "a", "answer": NaN}', "invalid JSON (NaN is not JSON)", "one JSON object"),
        ('{"prompt": "a", "answer": 1e999}', "1e999 is too large for a float", "one JSON object"),
        ('{"prompt": "a", "x": ' + "1" * 5000 + "}", "invalid JSON", "one JSON object"),
        ('{"prompt": "a", "x": ' + "[" * 200_000 + "}", "nested too deeply", ""),
        (b'{"prompt": "\xff"}', "bytes that are not UTF-8", "JSON"),
        (r'{"prompt": "a\ud800"}', r"\ud800, half of a surrogate pair", "whole characters"),
        (r'{"prompt": "a", "x": {"\udfff": 1}}', r"\udfff, half of a surrogate pair", "whole characters"),
        ("[1]", "a list", "one JSON object"),
        ("null", "null", "one JSON object"),
        ('"text"', '"text"', "one JSON object"),
        ({}, "keys none", "either prompt or messages"),
        ({"question": "a", "answer": "b"}, "keys question, answer", "either prompt or messages"),
        ({"prompt": "a", "messages": [USER]}, "both prompt and messages", "either prompt or messages"),
        ({"prompt": " "}, 'prompt = " "', "text"),
        ({"prompt": ""}, "prompt = empty text", "text"),
        ({"prompt": None}, "prompt = null", "text"),
        ({"prompt": ["a"]}, "prompt = a list", "text"),
        ({"messages": []}, "messages = an empty list", "a list of messages"),
        ({"messages": {"role": "user"}}, "messages = an object", "a list of messages"),
        ({"messages": ["a"]}, 'messages[0] = "a"', "an object with role and content"),
        (chat({"content": "a"}), "messages[0].role = null", "one of system, user, assistant, tool"),
        (chat({"role": "human", "content": "a"}), 'messages[0].role = "human"', "one of system, user, assistant, tool"),
        (chat({"role": ["user"], "content": "a"}), "messages[0].role = a list", "one of system, user, assistant, tool"),
        (chat(USER, {"role": "user"}), "messages[1].content = null", "text"),
        (chat({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0]: found a part of type", "text"),
        (chat({"role": "user", "content": []}), "messages[0].content: found an empty list", "text"),
        (
            chat(USER, {"role": "user", "content": [PART, IMAGE]}),
            "messages[1].content[1]: found a part of type image_url",
            "text",
        ),
        (
            {"prompt": "a", "reference": [{"role": "assistant", "content": [IMAGE]}]},
            "reference[0].content[0]: found a",
            "text",
        ),
        (chat({**USER, "tool_calls": [CALL]}), "messages[0].tool_calls in a user message", "an assistant message"),
        (assistant(tool_calls=[]), "messages[0].tool_calls = an empty list", "a list of tool calls"),
        (assistant(tool_calls=["add"]), 'messages[0].tool_calls with "add"', '{"function": {"name": text'),
        (assistant(tool_calls=[{"function": {"name": "add", "arguments": [1]}}]), "with an object", "arguments"),
        (
            assistant(tool_calls=[{"function": {"name": "add", "arguments": "{a"}}]),
            "arguments: found text that is not JSON",
            "JSON",
        ),
        (
            assistant(tool_calls=[CALL, {"function": {"name": "f", "arguments": "[1]"}}]),
            "messages[0].tool_calls[1].function.arguments: found JSON text of another type",
            "an object",
        ),
        (chat(USER, {"role": "assistant", "content": "a"}), "an assistant message at the end", "a user or tool"),
        ({"prompt": "a", "id": ""}, "id = empty text", "text or an integer"),
        ({"prompt": "a", "id": True}, "id = true", "text or an integer"),
        ({"prompt": "a", "id": 1.5}, "id = 1.5", "text or an integer"),
        ({"prompt": "a", "reference": " "}, 'reference = " "', "text or a list of messages"),
        ({"prompt": "a", "reference": 3}, "reference = 3", "text or a list of messages"),
        ({"prompt": "a", "reference": []}, "reference = an empty list", "a list of messages"),
        ({"prompt": "a", "reference": [{"role": "x"}]}, 'reference[0].role = "x"', "one of system"),
        ({"prompt": "a", "answer": None}, "answer = null", "text or a number"),
        ({"prompt": "a", "answer": []}, "answer = an empty list", "text or a number"),
        ({"prompt": "a", "answer": ["b", None]}, "answer = a list", "a list of accepted answers"),
        ({"prompt": "a", "answer": {"x": 1}}, "answer = an object", "text or a number"),
        ({"prompt": "a", "reward": 1}, "reward = 1", "a name or an import path"),
        ({"prompt": "a", "reward": "numbr"}, "", "reward 'numbr' is neither built in"),
        ({"prompt": "a", "reward": "..x"}, "", "one that the config lists under rewards"),
        ({"prompt": "a", "tools": 0}, "tools = 0", "a list of JSON schemas"),
        ({"prompt": "a", "tools": {}}, "tools = an empty object", "a list of JSON schemas"),
        ({"prompt": "a", "tools": ["add"]}, '"add" as a tool', '{"type": "function", "function"'),
        ({"prompt": "a", "tools": [{"function": {"parameters": {}}}]}, "an object as a tool", '"properties": object'),
        ({"prompt": "a", "tools": [{"function": {"name": "f", "parameters": [1]}}]}, "an object as a tool", "prop"),
        ({"prompt": "a", "tools": [{"type": "web_search"}]}, "tools[0]: found a tool of type web_search", "function"),
        ({"prompt": "a", "tools": "{"}, "tools: found text that is not JSON", "expected JSON"),
        ("[", "invalid JSON", "one JSON object in each line; if the file is one JSON array: jq -c '.[]' FILE.json"),
        ({"prompt": "x" * 50, "id": {"x" * 50: 1}}, "id = an object", "text or an integer"),
        ({"prompt": "a", "id": "first"}, "id 'first' again (first in line 1)", "a unique id"),
    ],
)
def test_an_invalid_line_gives_an_error_with_file_line_found_and_expected(write, line, found, expected):
    path = write({"prompt": "a", "id": "first"}, "", line, {"prompt": "b"})
    with pytest.raises(UserError) as caught:
        JsonlTasks(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert found in message
    assert expected in message
    assert len(message) < len(path) + 300
    assert "\n" not in message
    message.encode()


def test_a_generated_id_that_equals_an_explicit_id_is_an_error(write):
    with pytest.raises(UserError, match=r":2: found id 'tasks-2' again \(first in line 1\), expected a unique id"):
        JsonlTasks(write({"prompt": "a", "id": "tasks-2"}, {"prompt": "b"}))


def test_the_error_names_a_file_that_cannot_be_read(write, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/none.jsonl does not exist")):
        JsonlTasks(f"{tmp_path}/none.jsonl")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: cannot be read")):
        JsonlTasks(str(tmp_path))
    with pytest.raises(UserError, match="found no lines, expected one JSON object per line"):
        JsonlTasks(write("", "  "))
    whole = gzip.compress(b"\n".join(json.dumps({"prompt": str(i) * 40}).encode() for i in range(2000)))
    for data in (b"not gzip", whole[: len(whole) // 2], whole[:40] + b"\0\0\0\0" + whole[44:], b""):
        (tmp_path / "bad.jsonl.gz").write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.jsonl\.gz"):
            JsonlTasks(f"{tmp_path}/bad.jsonl.gz")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
WHOLE = [
    {"prompt": "a", "id": 1, "reference": "b", "answer": 2, "reward": "exact", "tools": [TOOL], "other": []},
    {"messages": [USER, {"role": "assistant", "content": "b", "tool_calls": [CALL]}, USER], "reference": [USER]},
]


@st.composite
def nearly_whole(draw):
    """Return a strategy for valid lines with one value, at any depth, replaced, or a key added."""
    line = json.loads(json.dumps(draw(st.sampled_from(WHOLE))))
    place = line
    while True:
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            break
        place = place[key]
    place[key] = draw(JSON)
    if draw(st.booleans()):
        line[draw(st.sampled_from(["prompt", "messages", *WHOLE[0]]))] = draw(JSON)
    return line


@settings(max_examples=1000, deadline=None)
@given(nearly_whole())
@example({"prompt": "a", "reward": "..x"})
def test_any_json_line_is_a_valid_task_or_a_user_error(line):
    line = json.loads(json.dumps(line))
    try:
        task = parse_task(line, "f:1", "f-1")
    except UserError as error:
        message = str(error)
    else:
        message = "f:1: a task"
        assert task.id.strip()
        assert task.messages[-1]["role"] != "assistant"
        assert all(isinstance(m.get("content") or "", str) for m in task.messages)
        assert not set(task.meta) & {"prompt", "messages", "id", "tools", "reference"}
    assert message.startswith("f:1: ")
    message.encode()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(st.sampled_from('{}[]",:1e9.\\ud8 n'), max_size=40).map(str.encode))
def test_any_bytes_are_json_objects_or_a_user_error(tmp_path, data):
    for name in ("any.jsonl", "any.jsonl.gz"):
        (tmp_path / name).write_bytes(data)
        try:
            lines = index_lines(tmp_path / name, "", lambda number, line: str(number), {})
            assert all(isinstance(lines[i][1], dict) for i in range(len(lines)))
        except UserError as error:
            found = str(error)
        else:
            found = str(tmp_path / name)
        assert found.startswith(str(tmp_path / name))
