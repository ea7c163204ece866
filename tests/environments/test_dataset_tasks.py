"""Tasks from data sets: columns of parquet, Arrow, CSV, JSON and JSON Lines files become checked tasks by index."""

import copy
import datetime
import decimal
import gzip
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import deadlines
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gear_lightning.environments import lines, row_files
from gear_lightning.environments.base import Task
from gear_lightning.environments.dataset_tasks import DatasetTasks
from gear_lightning.environments.jsonl import JsonlTasks
from gear_lightning.errors import UserError

COLUMNS = {"prompt": "question", "answer": "answer"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
OTHER = {"type": "function", "function": {"name": "find", "arguments": {"text": "x"}}}


def tool(name: str, key: str, kind: str) -> dict:
    parameters = {"type": "object", "properties": {key: {"type": kind}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def parquet(path, **columns) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def problems(n: int, first: int = 0) -> dict:
    return {"question": [f"{i} + 1?" for i in range(first, first + n)], "answer": list(range(first + 1, first + n + 1))}


def contents(source) -> list:
    return [(task.messages[0]["content"], task.meta.get("answer")) for task in source]


def every(source: DatasetTasks) -> list[Task]:
    return [source[i] for i in range(source.size)]


def arrow(path, *, stream: bool = True, **columns) -> str:
    table = pa.table(columns)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)
    return str(path)


def files_of_all_kinds(folder) -> dict[str, str]:
    """Write the same two problems in every format; return the path by kind."""
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "größer?", "answer": "3"}]
    columns = {"question": [r["question"] for r in rows], "answer": [r["answer"] for r in rows]}
    text = {
        "jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in rows),
        "ndjson": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows, indent=1),
        "csv": "\ufeffquestion,answer\n1 + 1?,2\n\ngrößer?,3\n",
        "tsv": "question\tanswer\n1 + 1?\t2\ngrößer?\t3\n",
    }
    found = {}
    for kind, content in text.items():
        for suffix, pack in {
            "": bytes,
            ".gz": gzip.compress,
            ".zst": lambda raw: pa.compress(raw, codec="zstd", asbytes=True),
        }.items():
            path = folder / f"a.{kind}{suffix}"
            path.write_bytes(pack(content.encode()))
            found[kind + suffix] = str(path)
    found["parquet"] = parquet(folder / "a.parquet", **columns)
    found["arrow stream"] = arrow(folder / "a.arrow", **columns)
    found["arrow file"] = arrow(folder / "b.arrow", stream=False, **columns)
    return found


def test_all_kinds_of_files_give_the_same_tasks(tmp_path):
    for kind, path in files_of_all_kinds(tmp_path).items():
        source = DatasetTasks(path, columns=COLUMNS)
        assert contents(every(source)) == [("1 + 1?", "2"), ("größer?", "3")], kind
        assert len({task.id for task in every(source)}) == 2
        assert source[-1].id == source[1].id
        with pytest.raises(IndexError):
            source[2]


def test_the_keys_of_a_task_come_from_columns_and_further_keys_go_to_its_meta(tmp_path):
    path = parquet(
        tmp_path / "a.parquet",
        **problems(2),
        solution=["s0", None],
        unused=["u", "u"],
        info=[{"level": 3, "style": "rule"}, {"level": None, "style": "rule"}],
    )
    columns = {**COLUMNS, "reference": "solution", "level": "info.level"}
    first, second = every(DatasetTasks(path, columns=columns, reward="number"))
    assert (first.id, first.reference, first.meta) == ("a-0", "s0", {"answer": 1, "level": 3, "reward": "number"})
    assert (second.id, second.reference, second.meta) == ("a-1", None, {"answer": 2, "reward": "number"})
    plain = DatasetTasks(parquet(tmp_path / "b.parquet", prompt=["a", "b"], id=[7, None], answer=[None, 4]))
    assert [(t.id, t.meta) for t in every(plain)] == [("7", {}), ("b-1", {"answer": 4})]


def test_values_of_tables_become_json(tmp_path):
    path = parquet(
        tmp_path / "a.parquet",
        prompt=["a"],
        time=[datetime.datetime(2024, 1, 2, 3)],
        day=pa.array([datetime.date(2024, 1, 2)]),
        price=[decimal.Decimal("1.50")],
        count=pa.array([decimal.Decimal("3")]),
        took=[datetime.timedelta(minutes=1.5)],
        vector=[[1.0, 2.0]],
        nested=[{"x": None, "y": {"z": None}, "list": [None, 1]}],
    )
    assert DatasetTasks(path)[0].meta == {
        "time": "2024-01-02T03:00:00",
        "day": "2024-01-02",
        "price": 1.5,
        "count": 3,
        "took": 90.0,
        "vector": [1.0, 2.0],
        "nested": {"y": {}, "list": [None, 1]},
    }


def test_cells_of_csv_files_stay_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"1 +\n1?",007\n"say ""x"", NA",NA\nc,\n')
    tasks = every(DatasetTasks(str(path), columns=COLUMNS))
    assert contents(tasks) == [("1 +\n1?", "007"), ('say "x", NA', "NA"), ("c", None)]
    assert [task.id for task in tasks] == ["a-2", "a-4", "a-5"], "ids have the line in which the row begins"


def test_keys_that_arrow_adds_to_objects_are_removed(tmp_path):
    messages = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [OTHER]},
            {"role": "tool", "name": "find", "content": "y"},
        ],
    ]
    tools = [[tool("add", "a", "integer")], [tool("find", "text", "string")]]
    as_text = {"chat": list(map(json.dumps, messages)), "functions": list(map(json.dumps, tools))}
    items = {"chat": as_text["chat"], "functions": [list(map(json.dumps, some)) for some in tools]}
    renamed = {"messages": "chat", "tools": "functions"}
    for source in (
        DatasetTasks(parquet(tmp_path / "a.parquet", messages=messages, tools=tools)),
        DatasetTasks(parquet(tmp_path / "b.parquet", prompt=messages, tools=tools)),
        DatasetTasks(parquet(tmp_path / "c.parquet", **as_text), columns=renamed),
        DatasetTasks(parquet(tmp_path / "d.parquet", **items), columns=renamed),
    ):
        first, second = every(source)
        assert first.messages == messages[0]
        assert second.messages[1]["tool_calls"] == [CALL]
        assert second.messages[2]["tool_calls"] == [OTHER]
        assert [list(task.tools) for task in (first, second)] == tools


def test_splits_and_slices(tmp_path):
    for n, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        parquet(tmp_path / "set" / "data" / f"{name}.parquet", **problems(5, 5 * n))
    whole = every(DatasetTasks("set", columns=COLUMNS))
    assert [task.meta["answer"] for task in whole] == list(range(1, 11))
    assert contents(every(DatasetTasks("set/data/train-*.parquet", columns=COLUMNS))) == contents(whole)

    def answers(split: str) -> list[int]:
        return [task.meta["answer"] for task in every(DatasetTasks("set", split, columns=COLUMNS))]

    assert answers("test") == [11, 12, 13, 14, 15]
    assert answers("train[:90%]") + answers("train[90%:]") == list(range(1, 11))
    assert answers("train[4:7]+test[-1:]") == [5, 6, 7, 15]
    assert answers("train + test") == list(range(1, 16))
    ids = {task.id: task.meta for task in whole}
    part = every(DatasetTasks("set", "train[50%:]", columns=COLUMNS))
    assert all(ids[task.id] == task.meta for task in part), "an id must not depend on the slice"
    assert DatasetTasks("set", columns=COLUMNS, limit=7).size == 7
    with pytest.raises(UserError, match=r"set: no split 'tset'; splits are train, test; did you mean test\?"):
        answers("tset[:5]")
    for wrong in ("train[", "train[:x]", "train[:500%]"):
        with pytest.raises(UserError, match=re.escape(f"split={wrong}")):
            answers(wrong)


def test_directories_of_save_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    one, other = Dataset.from_dict(problems(4)), Dataset.from_dict(problems(2, 4))
    one.save_to_disk("one", num_shards=2)
    DatasetDict(train=one, test=other).save_to_disk("both")
    tasks = every(DatasetTasks("one", columns=COLUMNS))
    assert contents(tasks) == contents(every(DatasetTasks("both", columns=COLUMNS))) != []
    assert [t.id for t in every(DatasetTasks("both", "test", columns=COLUMNS))] == [
        f"test/data-00000-of-00001-{i}" for i in range(2)
    ]
    assert DatasetTasks("both", "train[:50%]", columns=COLUMNS).size == 2
    with pytest.raises(UserError, match="no split 'val'; splits are train, test"):
        DatasetTasks("both", "val", columns=COLUMNS)
    os.remove("both/test/state.json")
    with pytest.raises(UserError, match="both: not a whole directory of save_to_disk"):
        DatasetTasks("both", columns=COLUMNS)


def test_names_of_configurations_and_files_come_from_the_card(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "easy.csv").write_text("question,answer\na?,1\nb?,2\n")
    (tmp_path / "set" / "hard.csv").write_text("question;answer\n9?;10\n")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy.csv\n"
        "- config_name: hard\n  data_files: hard.csv\n  sep: ';'\n---\n"
    )
    assert DatasetTasks("set", name="easy", columns=COLUMNS).size == 2
    assert contents(every(DatasetTasks("set", name="hard", columns=COLUMNS))) == [("9?", "10")]
    with pytest.raises(UserError, match=r"set: .*easy.*hard"):
        DatasetTasks("set", columns=COLUMNS)
    with pytest.raises(UserError, match=r"'nope' not found. Available: \['easy', 'hard'\]"):
        DatasetTasks("set", name="nope", columns=COLUMNS)


def test_code_in_a_directory_is_refused_and_not_run(tmp_path):
    parquet(tmp_path / "set" / "train.parquet", **problems(2))
    (tmp_path / "set" / "set.py").write_text("open('ran', 'w')")
    with pytest.raises(UserError, match=r"set: Dataset scripts are no longer supported, but found set\.py"):
        DatasetTasks("set", columns=COLUMNS)
    assert not (tmp_path / "ran").exists()


def bad(tmp_path, kind: str) -> str:
    """Write a file of one kind of damage and return its path."""
    path = tmp_path / {"csv": "a.csv", "json": "a.json"}.get(kind.split()[0], "a.parquet")
    whole = (tmp_path / "whole.parquet") if kind == "half of a parquet file" else None
    if whole is not None:
        parquet(whole, **problems(50))
        path.write_bytes(whole.read_bytes()[:300])
    text = {
        "csv without a header": "1 + 1?,2\n3?,4\n",
        "csv with too many cells": 'question,answer\n"a\nb",2\nx,y,z\n',
        "csv with an open quote": 'question,answer\na,"2\n',
        "csv in another encoding": b"question,answer\na,gr\xfc\n",
        "csv with a column twice": "question,question\na,2\n",
        "csv without rows": "question,answer\n",
        "json of an object": '{\n"data": []}',
        "json of a list of text": '["a"]',
        "json of half a list": '[{"question": "a"},',
        "text as a parquet file": b"question,answer",
        "an empty parquet file": b"",
    }.get(kind)
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "csv without a header": ":2: columns.prompt: no column 'question'; columns are 1 + 1?, 2 (the first line of",
        "csv with too many cells": ":4: found 3 cells, expected 2 as in the header",
        "csv with an open quote": ":2: found invalid CSV",
        "csv in another encoding": ":2: found bytes that are not UTF-8",
        "csv with a column twice": ":1: found the column 'question' twice",
        "csv without rows": ": there are no rows in the split 'train'",
        "json of an object": ":1: found invalid JSON",
        "json of a list of text": ': row 0 (counted from 0): found "a", expected one JSON object',
        "json of half a list": ": found invalid JSON",
        "text as a parquet file": ": not a whole parquet file",
        "an empty parquet file": ": not a whole parquet file",
        "half of a parquet file": ": not a whole parquet file",
    }.items(),
)
def test_damaged_files_give_one_line_with_file_and_row(tmp_path, kind, expected):
    path = bad(tmp_path, kind)
    with pytest.raises(UserError, match=re.escape(path + expected)) as caught:
        DatasetTasks(path, columns=COLUMNS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ({"question": ["a", "b", ""]}, {"prompt": "question"}, "row 2 (counted from 0): found prompt = empty text"),
        ({"question": ["a", None]}, {"prompt": "question"}, "row 1 (counted from 0): found prompt = null"),
        ({"prompt": ["a", "b"], "id": ["x", "x"]}, {}, "row 1 (counted from 0): found id 'x' again"),
        ({"prompt": ["a"], "answer": [float("nan")]}, {}, "answer: found a number that is not finite"),
        ({"prompt": ["a"], "image": [b"\x00"]}, {}, "image: found a value of type bytes (an image or audio?)"),
        ({"prompt": ["a"], "tools": ["add"]}, {}, "tools: found text that is not JSON"),
        ({"messages": [[{"role": "robot", "content": "a"}]]}, {}, 'messages[0].role = "robot"'),
        ({"prompt": ["a"], "reward": ["os.system"]}, {}, "a built-in reward or one that the config lists"),
        ({"question": ["a"]}, {}, "found the columns question, expected prompt or messages; name the columns to use"),
        (
            {"question": ["a"]},
            {"prompt": "qestion"},
            "columns are question; did you mean question?",
        ),
        ({"q": [{"x": "a"}]}, {"prompt": "q.y"}, "no column 'q.y'; columns are q.x"),
    ],
)
def test_rows_that_are_not_tasks_are_named(tmp_path, rows, columns, expected):
    path = parquet(tmp_path / "a.parquet", **rows)
    with pytest.raises(UserError, match=re.escape(path) + ".*" + re.escape(expected)):
        DatasetTasks(path, columns=columns)


def test_a_late_row_in_a_later_file_is_named(tmp_path):
    parquet(tmp_path / "set" / "a.parquet", **problems(5))
    wrong = problems(3000)
    wrong["question"][2345] = " "
    parquet(tmp_path / "set" / "b.parquet", **wrong)
    found = 'set/b.parquet: row 2345 (counted from 0): found prompt = " ", expected text'
    with pytest.raises(UserError, match=re.escape(found)):
        DatasetTasks("set/*.parquet", columns=COLUMNS)


def test_options_that_do_nothing_or_are_misspelled_are_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", **problems(2))
    for options, text in (
        ({"columns": {"promt": "question"}}, "columns.promt; did you mean prompt?"),
        ({"columns": {"prompt": "question", "refrence": "answer"}}, "columns.refrence; did you mean reference?"),
        ({"columns": {"answer": "answer"}}, "columns: give the column of either prompt or messages"),
        ({"columns": COLUMNS, "build": "builders.skip_odd"}, "columns do nothing with build"),
        ({"columns": COLUMNS, "name": "main"}, "name=main does nothing for"),
        ({"columns": COLUMNS, "revision": "main"}, "revision=main does nothing for"),
        ({"columns": COLUMNS, "limit": 0}, "limit=0: must be at least 1"),
        ({"columns": COLUMNS, "split": "test"}, "no split 'test'; splits are train"),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            DatasetTasks(path, **options)
    for path, text in (
        ("a.csv", "a.csv does not exist"),
        ("x/*.csv", "x/*.csv: no file has such a name"),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            DatasetTasks(path, columns=COLUMNS)
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(UserError, match=r"a\.xlsx: not a supported file; supported are \.parquet"):
        DatasetTasks("a.xlsx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: The directory at .* doesn't contain any data files"):
        DatasetTasks("empty")


def test_a_column_that_no_line_has_is_an_error_but_a_missing_key_is_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "a"}\n{"q": "b", "s": "c"}\n{"q": "d", "s": null}\n')
    source = DatasetTasks(str(path), columns={"prompt": "q", "reference": "s"})
    assert [task.reference for task in every(source)] == [None, "c", None]
    with pytest.raises(UserError, match=r"a\.jsonl: columns\.answer: no column 'r'; columns are q"):
        DatasetTasks(str(path), columns={"prompt": "q", "answer": "r"})


@pytest.mark.parametrize("objects", [[{"y": 1}, {"y": 2}], [{"y": 1, "z": None}, None], [None, {"y": 1}]])
@pytest.mark.parametrize("column", ["x.z", "x.y.z", "w.z"])
def test_a_key_of_an_object_that_no_row_has_is_an_error_that_lists_those_there_are(tmp_path, objects, column):
    path = parquet(tmp_path / "a.parquet", q=["a", "b"], x=objects)
    expected = rf"a\.parquet: columns\.answer: no column '{column}' with a value; columns are q, .*x\.y"
    with pytest.raises(UserError, match=expected):
        DatasetTasks(path, columns={"prompt": "q", "answer": column})
    assert 1 in [
        task.meta.get("answer") for task in every(DatasetTasks(path, columns={"prompt": "q", "answer": "x.y"}))
    ]


# -- functions of the row


BUILDERS = """
import random
from gear_lightning.environments.base import Task
def skip_odd(row):
    if row["answer"] % 2 == 0:
        return {"prompt": row.pop("question"), "answer": row["answer"], "level": None}
def as_task(row):
    messages = [{"role": "user", "content": row["question"]}]
    return Task(f"t{row['answer']}", messages, (), "ref", {"answer": row["answer"]})
def wrong_key(row):
    return {"prompt": row["qestion"]}
def wrong_kind(row):
    return row["question"]
def lucky(row):
    return {"prompt": f"{random.random()} {row['question']}"}
def no_json(row):
    return {"prompt": "a", "x": {1, 2}}
def none(row):
    return None
"""


@pytest.fixture
def builders(tmp_path, monkeypatch):
    (tmp_path / "builders.py").write_text(BUILDERS)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_function_of_the_row_builds_the_task_or_skips_the_row(tmp_path, builders, monkeypatch):
    monkeypatch.setattr(lines, "SMALL", 0)
    path = parquet(tmp_path / "a.parquet", **problems(40))
    source = DatasetTasks(path, build="builders.skip_odd")
    assert [(task.id, task.meta) for task in every(source)] == [
        (f"a-{i}", {"answer": i + 1, "level": None}) for i in range(1, 40, 2)
    ]
    tasks = every(DatasetTasks(path, build="builders.as_task", limit=3))
    assert [(t.id, t.reference, t.meta["answer"]) for t in tasks] == [(f"t{i}", "ref", i) for i in (1, 2, 3)]
    assert not list((tmp_path / "cache").glob("tasks/*")), "the code can depend on anything, so nothing is cached"


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "wrong_key": "row 0 (counted from 0): builders.wrong_key failed (KeyError: 'qestion'); columns are",
        "wrong_kind": "builders.wrong_kind returned a str, expected a dict with the keys of a task, or a Task",
        "lucky": "row 0 (counted from 0): builders.lucky returned another task when it was called again",
        "no_json": "x: found a value of type set, expected text, numbers, lists or objects",
        "none": "build skipped all rows in the split 'train'",
        "missing": "function of build 'builders.missing' cannot be imported",
    }.items(),
)
def test_a_function_that_cannot_be_used_is_named(tmp_path, builders, name, expected):
    path = parquet(tmp_path / "a.parquet", **problems(3))
    with pytest.raises(UserError, match=re.escape(expected)):
        DatasetTasks(path, build=f"builders.{name}")


# -- access by index


def test_large_data_is_read_once_and_its_tasks_do_not_change(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(lines, "SMALL", 0)
    reads = []
    monkeypatch.setattr(
        "gear_lightning.environments.row_files._parquet",
        lambda *args, real=row_files._parquet: reads.append(1) or real(*args),
    )
    path = parquet(tmp_path / "a.parquet", **problems(500))
    first = DatasetTasks(path, columns=COLUMNS)
    again = DatasetTasks(path, columns=COLUMNS)
    assert len(reads) == 1, "the tasks must come from the cache"
    order = random.Random(0).sample(range(500), 500)
    assert [again[i] for i in order] == [first[i] for i in order]
    assert (again.fingerprint, again.digest) == (first.fingerprint, first.digest)
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert other[499] == first[499]
    assert not isinstance(again._lines._text, bytes), "rows must not be kept in memory"
    assert DatasetTasks(path, columns={"prompt": "question"}).fingerprint != first.fingerprint
    assert DatasetTasks(path, "train[:50%]", columns=COLUMNS).size == 250
    parquet(tmp_path / "a.parquet", **problems(499), extra=["x"] * 499)
    changed = DatasetTasks(path, columns=COLUMNS)
    assert changed.size == 499
    assert changed.digest != first.digest
    assert first[499].meta["answer"] == 500, "a file that is replaced during use must not change the tasks"


def test_a_row_with_a_wrong_reward_is_named_from_the_cache_too(tmp_path, cache, monkeypatch):
    def missing(module):
        raise UserError(f"{module!r} is not installed")

    monkeypatch.setattr(lines, "SMALL", 0)
    parquet(tmp_path / "set" / "a.parquet", prompt=["a"], reward=["exact"])
    path = parquet(tmp_path / "set" / "b.parquet", prompt=["a", "b"], answer=["1", "2"], reward=["exact", "math"])
    monkeypatch.setattr("gear_lightning.rewards.require_extra", lambda module: None)
    DatasetTasks("set/*.parquet")
    monkeypatch.setattr("gear_lightning.rewards.require_extra", missing)
    with pytest.raises(UserError, match=re.escape("set/b.parquet: row 1 (counted from 0): 'math_verify' is not")):
        DatasetTasks("set/*.parquet")
    assert path


def test_longest_prompts(tmp_path):
    path = parquet(tmp_path / "a.parquet", prompt=["a" * (1 + i % 17) for i in range(100)])
    source = DatasetTasks(path)
    assert all(len(source[i].messages[0]["content"]) == 17 for i in source.longest(5))


def test_jsonl_tasks_read_zstd(tmp_path):
    text = b'{"prompt": "a"}\n\n{"prompt": "b"}\n'
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(pa.compress(text, codec="zstd", asbytes=True) * 2)
    assert [task.id for task in JsonlTasks(str(path))] == ["a-1", "a-3", "a-4", "a-6"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: cannot be read beyond line"):
        JsonlTasks(str(path))
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: cannot be read beyond line 0"):
        JsonlTasks(str(path))


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_the_missing_extra_is_named(tmp_path, monkeypatch, module):
    path = parquet(tmp_path / "set" / "a.parquet", prompt=["a"])
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for given in {"pyarrow": [path, "a.jsonl.zst"], "datasets": ["set", "acme/math"]}[module]:
        with pytest.raises(UserError, match=rf"'{module}' is not installed: pip install 'gear_lightning\[datasets\]'"):
            DatasetTasks(given)


# -- the Hub


def test_a_name_on_the_hub_without_access_gives_one_line(monkeypatch):
    import httpx
    from huggingface_hub import HfApi, constants

    def unreachable(*args, timeout, **kwargs):
        assert timeout <= 60, "an answer must not be awaited without end"
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    text = "acme/math: not a file or directory here, not in the cache of the Hub, and the Hub cannot be reached "
    with pytest.raises(UserError, match=re.escape(text + "(no route); where it can be reached, run: hf download")):
        DatasetTasks("acme/math", columns=COLUMNS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=re.escape(text + "(HF_HUB_OFFLINE is set)")):
        DatasetTasks("acme/math", columns=COLUMNS)
    with pytest.raises(UserError, match="no/such/path does not exist"):
        DatasetTasks("no/such/path", columns=COLUMNS)


def test_data_sets_of_the_hub_are_downloaded_and_found_again_without_access(tmp_path):
    parquet(tmp_path / "hub" / "main" / "train.parquet", **problems(3))
    parquet(tmp_path / "hub" / "main" / "test.parquet", **problems(2, 3))
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: main/{split}.parquet\n" for split in ("train", "test")) + "---\n"
    (tmp_path / "hub" / "README.md").write_text(card)
    script = Path(__file__).parent.parent / "support" / "hub_server.py"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(script), "hub"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=deadlines.seconds(120))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "train": ["train-0", "train-1", "train-2"],
        "stream": ["train-0", "train-1", "train-2", "train-0"],
        "no split": "acme/math: no split 'val'; splits are train, test",
        "no name": "acme/math: neither a file or directory here nor a data set that the Hub shows",
        "offline": ["train-0", "train-1", "train-2"],
    }
