"""The text of a turn is split into reasoning, answer and calls, whatever the reasoning and the arguments quote."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_lightning.generation.tool_syntax import (
    GemmaCalls,
    HarmonyCalls,
    JsonCalls,
    NamedJsonCalls,
    PythonCalls,
    TaggedCalls,
    ToolCallError,
)
from gear_lightning.generation.tool_syntax.known import json_calls
from gear_lightning.generation.turn_text import Thinking, read_turn

NATIVE = Thinking(native=True)
TOOLS = [
    {"function": {"name": name, "parameters": {"properties": {"a": {"type": "string"}, "b": {"type": "object"}}}}}
    for name in ("f", "g")
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
SYNTAXES = {
    "json": json_calls(),
    "list": json_calls(listed=True),
    "bare": JsonCalls(arguments_key="parameters"),
    "named": NamedJsonCalls("<call>", "</call>", middle="<args>", first="<calls>", last="</calls>"),
    "numbered": NamedJsonCalls("<call>functions.", "</call>", middle=":{index}<args>"),
    "tags": TaggedCalls(
        "<tool_call>\n<function=",
        "\n</function>\n</tool_call>",
        middle=">",
        key_open="\n<parameter=",
        key_close=">\n",
        value_close="\n</parameter>",
    ),
    "glm": TaggedCalls("<tool_call>", "</tool_call>", key_open="<k>", key_close="</k><v>", value_close="</v>"),
    "python": PythonCalls("<call>", "</call>"),
    "gemma": GemmaCalls(),
    "harmony": HarmonyCalls(),
}


def read(text, *, thinking=NATIVE, inside=False, syntax=None, tools=TOOLS):
    found = read_turn(text, syntax or json_calls(), tools, thinking, inside)
    return found.reasoning, found.content, [c["function"]["arguments"] for c in found.calls]


@pytest.mark.parametrize(
    ("text", "inside", "wanted"),
    [
        ("<think>42 or 7</think> It is 7.", False, ("42 or 7", "It is 7.", [])),
        ("42 or 7</think> It is 7.", True, ("42 or 7", "It is 7.", [])),
        ("42 or 7</think> It is 7.", False, ("42 or 7", "It is 7.", [])),  # the policy omitted the opening mark
        ("It is 7.", False, ("", "It is 7.", [])),
        ("<think>\n\n</think>\n\nIt is 7.", False, ("", "It is 7.", [])),
        ("<think>endless", False, ("endless", "", [])),
        ("endless", True, ("endless", "", [])),
        (f"<think>Maybe {CALL} or not</think>No.", False, (f"Maybe {CALL} or not", "No.", [])),
        (f"<think>Maybe {CALL}", False, (f"Maybe {CALL}", "", [])),
        (f"<think>Yes.</think>I look. {CALL}", False, ("Yes.", "I look.", [{"a": "x"}])),
        (
            "<think>write <tool_call></tool_call> then</think>ok",
            False,
            ("write <tool_call></tool_call> then", "ok", []),
        ),
        ("<think>close with </think> and go</think>ok", False, ("close with </think> and go", "ok", [])),
        (f"<think>a </think> b {CALL}</think>ok", False, (f"a </think> b {CALL}", "ok", [])),
        ("<think>one</think>so<think>two</think>ok", False, ("one\ntwo", "sook", [])),
        ("The mark <think> opens a thought.", False, ("", "The mark <think> opens a thought.", [])),
    ],
)
def test_reasoning_is_separated(text, inside, wanted):
    assert read(text, inside=inside) == wanted


def test_a_call_may_quote_the_marks_of_reasoning():
    for value in ("</think>", "<think>", "a </think> b <think> c"):
        call = json_calls().write([{"name": "f", "arguments": {"a": value}}])
        assert read(f"<think>Yes.</think>{call}") == ("Yes.", "", [{"a": value}])
        assert read(call) == ("", "", [{"a": value}])


def test_reasoning_of_an_unknown_template_must_open_the_turn():
    plain = Thinking()
    assert read("<think>a</think>b", thinking=plain) == ("a", "b", [])
    assert read("b </think> c", thinking=plain) == ("", "b </think> c", [])
    assert read("b <think>a</think> c", thinking=plain) == ("", "b <think>a</think> c", [])
    assert read("<think>a</think>b", thinking=None) == ("", "<think>a</think>b", [])


def test_a_broken_call_is_an_error_outside_of_reasoning_only():
    broken = '<tool_call>{"name":'
    assert read(f"<think>{broken}</think>ok") == (broken, "ok", [])
    with pytest.raises(ToolCallError):
        read(f"<think>a</think>{broken}")


def test_without_tools_nothing_is_a_call():
    assert read(f"See {CALL}", tools=()) == ("", f"See {CALL}", [])


MARKS = ["<tool_call>", "</tool_call>", "</think>", "<call>", "\n", '"', "'", "{", "}", "[", ")", "x", " "]
LINE_ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\x00"
TEXT = st.one_of(
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters=LINE_ENDS), max_size=20),
    st.lists(st.sampled_from(MARKS), max_size=6).map("".join),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("klm"), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", [name for name in SYNTAXES if name != "gemma"])
@settings(max_examples=150, deadline=None)
@given(text=TEXT, nested=st.dictionaries(st.sampled_from("klm"), VALUES, max_size=3))
def test_calls_are_read_as_they_are_written(name, text, nested):
    syntax = SYNTAXES[name]
    if isinstance(syntax, TaggedCalls):
        text = text.replace("</parameter>", "").replace("</v>", "")
    arguments = {"a": text, "b": nested}
    if isinstance(syntax, PythonCalls):
        arguments = json.loads(json.dumps(arguments))
    written = syntax.write([{"name": "f", "arguments": arguments}, {"name": "g", "arguments": {}}])
    if name in ("bare", "harmony"):
        written = syntax.write([{"name": "f", "arguments": arguments}])
    found = read_turn(written, syntax, TOOLS)
    assert found.calls[0]["function"] == {"name": "f", "arguments": arguments}
    assert not found.content
    assert name in ("bare", "harmony") or found.calls[1]["function"] == {"name": "g", "arguments": {}}


@pytest.mark.parametrize("name", SYNTAXES)
@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([
    "<tool_call>", "</tool_call>", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "<call>", "</call>",
    "<args>", "<calls>", "</calls>", "functions.f:0", "f(", "a=1", ")", "[", "]", "{", "}", '"', "'", "name", ":", ",",
    "<think>", "</think>", "<|tool_call>call:", '<|"|>', "<tool_call|>", "<k>", "</k><v>", "</v>", "\n", "\\", "a", "1",
    "<|start|>assistant", " to=functions.f", "<|message|>", "<|channel|>", "<|end|>", "9" * 5000, "1e999", "\ud800",
]), max_size=25).map("".join))  # fmt: skip
def test_no_text_breaks_a_reader(name, text):
    for inside in (False, True):
        try:
            found = read_turn(text, SYNTAXES[name], TOOLS, NATIVE, inside)
        except ToolCallError:
            continue
        for call in found.calls:
            json.dumps(call, allow_nan=False, ensure_ascii=False).encode()
        for start, end in found.thoughts + found.actions:
            assert 0 <= start <= end <= len(text)


@pytest.mark.parametrize("thinking", [NATIVE, Thinking(native=True, exclusive=False)])
def test_many_marks_need_neither_much_time_nor_a_deep_stack(thinking):
    for text in ("<think></think>" * 3000, "</think>" * 5000, "<think>" * 5000, "<tool_call>" * 5000):
        for syntax in SYNTAXES.values():
            try:
                read_turn(text, syntax, TOOLS, thinking)
            except ToolCallError:
                continue


LEVELS = {"type": "string", "enum": ["1", "2"]}
TEXT_OR_NULL = [
    {"type": ["string", "null"]},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"oneOf": [{"$ref": "#/$defs/Level"}, {"type": "null"}]},
    {"type": "string", "nullable": True},
    {"enum": ["a", None]},
]
ONLY_TEXT = [
    {"type": "string"},
    {"$ref": "#/$defs/Level"},
    {"$ref": "#level"},
    {"allOf": [{"$ref": "#/$defs/Level"}], "default": "1"},
    {"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]},
    {"anyOf": [{"$ref": "#/$defs/Level"}, {"const": "x"}]},
    {"$ref": "#/$defs/Alias"},
]
NOT_ONLY_TEXT = [{}, True, {"type": ["string", "integer"]}, {"anyOf": [{"type": "string"}, {"type": "number"}]}]


def read_value(name, schema, text, parent=None):
    """Return a value that is read from a tagged call."""
    syntax = SYNTAXES[name]
    defs = {"Level": LEVELS, "Alias": {"$ref": "#/$defs/Level"}, "Named": {"$anchor": "level", **LEVELS}}
    parameters = {"type": "object", "$defs": defs, **(parent or {"properties": {"a": schema}})}
    call = syntax.write([{"name": "h", "arguments": {"a": text}}])
    return read(call, syntax=syntax, tools=[{"function": {"name": "h", "parameters": parameters}}])[2][0]["a"]


@pytest.mark.parametrize("name", ["tags", "glm"])
def test_the_schema_decides_whether_a_value_is_text(name):
    for schema in ONLY_TEXT:
        for text in ("1", "007e1", "null", "None", "true", '"x"', "[1]"):
            assert read_value(name, schema, text) == text, schema
    for schema in TEXT_OR_NULL:
        assert [read_value(name, schema, text) for text in ("null", "None", "1", "nullable")] == [
            None, None, "1", "nullable",
        ], schema  # fmt: skip
    for schema in NOT_ONLY_TEXT:
        assert [read_value(name, schema, text) for text in ("1", "x")] == [1, "x"], schema
    assert read_value(name, {"anyOf": [{"type": "string"}, {"type": "array"}]}, "007e1") == "007e1"
    assert read_value(name, {"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1]") == [1]
    assert read_value(name, {"$ref": "https://example.org/unknown.json"}, "1") == 1


@pytest.mark.parametrize(
    "parent",
    [
        {"$ref": "#/$defs/Arguments", "$defs": {"Arguments": {"properties": {"a": {"type": "string"}}}}},
        {"allOf": [{"properties": {"a": {"type": "string"}}}]},
        {"additionalProperties": {"type": "string"}},
    ],
)
def test_the_schema_of_a_parameter_may_stand_elsewhere(parent):
    assert read_value("tags", None, "1", parent) == "1"


def test_a_schema_that_refers_to_itself_is_read():
    loop = {"$ref": "#/$defs/Loop", "$defs": {"Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Loop"}]}}}
    assert read_value("tags", None, "1", {**loop, "properties": {"a": {"$ref": "#/$defs/Loop"}}}) == 1


BARE = JsonCalls(arguments_key="parameters")
BARE_CALL = '{"name": "f", "parameters": {"a": "x"}}'


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        (f"I look.{BARE_CALL}", "I look.", 1),
        (f"I look.\n\n{BARE_CALL}\n", "I look.", 1),
        (f"<|python_tag|>{BARE_CALL}", "", 1),
        (f"I look. <|python_tag|>{BARE_CALL}", "I look.", 1),
        (f"I look.\n```json\n{BARE_CALL}\n```", "I look.", 1),
        (f"I look. [{BARE_CALL}, {BARE_CALL}]", "I look.", 2),
        (f"{BARE_CALL}; {BARE_CALL}", "", 2),
        (f"I look.\n{BARE_CALL}\n{BARE_CALL}", "I look.", 2),
        ('I look. {"parameters": {"a": "x"}, "name": "f"}', "I look.", 1),
        ('{"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}', "", 1),
        ('Set {x: 1}, {"a": 1}. {"name": "f", "parameters": {"a": "x"}}', 'Set {x: 1}, {"a": 1}.', 1),
        (f"A call is {BARE_CALL}, for example.", f"A call is {BARE_CALL}, for example.", 0),
        ('It is {"name": "Bern", "days": 3}', 'It is {"name": "Bern", "days": 3}', 0),
        (f'{{"calls": [{BARE_CALL}]}}', f'{{"calls": [{BARE_CALL}]}}', 0),
    ],
)
def test_a_json_call_without_marks_is_found_behind_text(text, content, count):
    assert read(text, syntax=BARE) == ("", content, [{"a": "x"}] * count)


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        ('I look.[f(a="x")]', "I look.", 1),
        ('<|python_tag|>[f(a="x")]', "", 1),
        ('I look.\n```python\nf(a="x")\n```', "I look.", 1),
        ('I look: [f(a="x"), f(a="x")]', "I look:", 2),
        ('f(a="x")', "", 1),
        ('Use [f(a="x")] for that.', 'Use [f(a="x")] for that.', 0),
        ("The value of half(a=3)", "The value of half(a=3)", 0),
    ],
)
def test_a_python_call_without_marks_is_found_behind_text(text, content, count):
    assert read(text, syntax=PythonCalls()) == ("", content, [{"a": "x"}] * count)


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (BARE, 'I look. {"name": "f", "parameters": {"a": x}}'),
        (BARE, 'I look. {"name": "f", "parameters": {"a": "x'),
        (BARE, f'{BARE_CALL}; {{"name": "f", "parameters": {{"a": '),
        (PythonCalls(), "I look. [f(a=1 + x)]"),
        (PythonCalls(), 'I look. [f(a="x'),
        (PythonCalls(), "f(1)"),
        (PythonCalls(), "[f(a=1, a=2)]"),
    ],
)
def test_a_broken_call_behind_text_is_an_error(syntax, text):
    with pytest.raises(ToolCallError):
        read(text, syntax=syntax)


@settings(max_examples=200, deadline=None)
@given(
    text=TEXT, content=st.sampled_from(["", "I look.", "See {x} and [y]", "```", '{"a": 1}', "f (x) <|python_tag|>"])
)
def test_calls_without_marks_are_read_behind_any_text(text, content):
    for syntax in (BARE, PythonCalls()):
        written = content + "\n" + syntax.write([{"name": "f", "arguments": {"a": text}}])
        assert read(written, syntax=syntax)[2] == [{"a": text}]


def test_python_calls_need_no_python_names():
    text = "[get-x.v2(from='A, (b', class=[1, {'k': None}], x-y=-2.5), ns/f:g()]"
    calls, end = PythonCalls("<call>", "</call>").read(f"<call>{text}</call>", 0, ())
    assert [c["function"] for c in calls] == [
        {"name": "get-x.v2", "arguments": {"from": "A, (b", "class": [1, {"k": None}], "x-y": -2.5}},
        {"name": "ns/f:g", "arguments": {}},
    ]
    assert end == len(text) + len("<call></call>")


def gemma(value):
    return GemmaCalls().write([{"name": "f", "arguments": value}])


OWN = gemma({"a": "q"})
QUOTE, OPEN, CLOSE = '<|"|>', "<|tool_call>call:", "<tool_call|>"


@pytest.mark.parametrize(
    "value",
    [
        {"a": OWN + OWN},
        {"b": {"x": OWN}},
        {"b": {"x": OWN + "\n" + OWN}, "a": f"see {OWN} end"},
        {"b": [OWN, OWN, {"k": OWN}]},
        {"a": OPEN},
        {"a": CLOSE},
        {"a": OPEN + "f{"},
        {"a": QUOTE},
        {"a": f"{QUOTE}}}{CLOSE}", "b": {"n": 1}},
        {"a": gemma({"a": OWN})},
        {"b": list(range(2000))},
        {"b": {"x:y": 1, "": 2, "{": "}"}},
    ],
)
def test_gemma_s_strings_may_quote_calls(value):
    for calls in ([value], [value, {"a": "z"}]):
        text = GemmaCalls().write([{"name": "f", "arguments": c} for c in calls])
        try:
            found = read(text, syntax=GemmaCalls())[2]
        except ToolCallError:
            assert QUOTE in str(value.values()), "only a quotation mark makes a string ambiguous"
            continue
        assert found == calls


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([OPEN, CLOSE, QUOTE, "f{", "}", "a:", ",", "x", OWN, " "]), max_size=6).map("".join))
def test_gemma_s_strings_are_read_in_time(text):
    for value in ({"a": text}, {"b": [text, {"k": text}]}):
        try:
            read(gemma(value), syntax=GemmaCalls())
        except ToolCallError:
            continue
