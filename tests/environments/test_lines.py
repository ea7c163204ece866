"""Large JSON Lines files are read and checked once, then accessed by index. The cache is optional and correct."""

import copy
import gzip
import json
import os
import pickle
import shutil

import pytest

from gear_lightning.environments import jsonl, lines
from gear_lightning.environments.gsm8k import GSM8KDemonstrations, GSM8KTasks
from gear_lightning.environments.jsonl import JsonlTasks
from gear_lightning.environments.lines import index_lines
from gear_lightning.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that stores the index of every file."""
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lines, "SMALL", 0)
    return tmp_path / "cache"


@pytest.fixture
def parsed(monkeypatch):
    """The list of line numbers that are parsed."""
    found = []
    monkeypatch.setattr(jsonl, "parse_task", lambda *args, real=jsonl.parse_task: found.append(args[1]) or real(*args))
    return found


def write(path, *objects) -> str:
    text = "".join((o if isinstance(o, str) else json.dumps(o, ensure_ascii=False)) + "\n" for o in objects).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def tasks(n: int) -> list:
    return [{"prompt": f"größer als {i}? " * (1 + i % 7), "answer": i, "id": f"t{i}"} for i in range(n)]


NAMES = ("tasks.jsonl", "tasks.jsonl.gz")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("small", [0, 1 << 22])
def test_indexed_lines_equal_the_lines_of_the_file(tmp_path, cache, monkeypatch, name, small):
    monkeypatch.setattr(lines, "SMALL", small)
    given = tasks(300)
    source = JsonlTasks(write(tmp_path / name, "", *given[:150], "  ", *given[150:]))
    assert source.size == 300
    for i in (299, 0, 150, 149, 7, -1):
        task = source[i]
        assert (task.id, task.messages[0]["content"]) == (given[i]["id"], given[i]["prompt"])
    with pytest.raises(IndexError):
        source[300]
    assert len(list(JsonlTasks(source.path, limit=12))) == 12
    sizes = [len(json.dumps(t, ensure_ascii=False).encode()) for t in given]
    assert sorted(sizes[i] for i in source.longest(9)) == sorted(sizes)[-9:]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_once_and_again_after_a_change(tmp_path, cache, parsed, name):
    path = tmp_path / name
    first = JsonlTasks(write(path, *tasks(50)))
    assert len(parsed) == 50
    again = JsonlTasks(str(path))
    assert len(parsed) == 50, "the index must come from the cache"
    assert again[49].id == first[49].id == "t49"
    assert again.fingerprint == first.fingerprint
    del parsed[:]
    other = JsonlTasks(write(path, *tasks(49), {"prompt": "new"}))
    assert len(parsed) == 50
    assert other.fingerprint != first.fingerprint
    assert other[49].id == "tasks-50"
    assert [t.id for t in (copy.deepcopy(other)[49], pickle.loads(pickle.dumps(other))[0])] == ["tasks-50", "t0"]
    del parsed[:]
    JsonlTasks(str(path), rewards=["gear_lightning.rewards.number"])
    assert len(parsed) == 50, "other rewards need another check"
    shutil.copy(path, renamed := tmp_path / f"other-{name}")
    assert JsonlTasks(str(renamed))[49].id == "other-tasks-50", "ids depend on the file's name"


def test_an_invalid_line_is_reported_at_every_start(tmp_path, cache):
    path = write(tmp_path / "tasks.jsonl", *tasks(5), {"answer": 3})
    for _ in range(2):
        with pytest.raises(UserError, match=r"tasks\.jsonl:6: found keys answer, expected either prompt or messages"):
            JsonlTasks(path)


def test_rewards_are_resolved_again_with_a_cached_index(tmp_path, cache, monkeypatch):
    def missing(module):
        raise UserError(f"{module!r} is not installed")

    path = write(tmp_path / "tasks.jsonl", {"prompt": "a"}, {"prompt": "b", "answer": "1", "reward": "math"})
    monkeypatch.setattr("gear_lightning.rewards.require_extra", lambda module: None)
    JsonlTasks(path)
    monkeypatch.setattr("gear_lightning.rewards.require_extra", missing)
    with pytest.raises(UserError, match=r"tasks\.jsonl:2: 'math_verify' is not installed"):
        JsonlTasks(path)


@pytest.mark.parametrize("name", NAMES)
def test_ids_must_be_unique_in_the_whole_file(tmp_path, cache, name):
    path = write(tmp_path / name, *tasks(40), "", {"prompt": "x", "id": "t7"}, {"prompt": "y", "id": "t3"})
    with pytest.raises(UserError, match=r":42: found id 't7' again \(first in line 8\), expected a unique id"):
        JsonlTasks(path)


def test_ids_with_the_same_hash_are_not_duplicates(tmp_path, cache, monkeypatch):
    class Alike:
        def digest(self):
            return bytes(8)

    monkeypatch.setattr(lines.hashlib, "blake2b", lambda *_, **__: Alike())
    assert JsonlTasks(write(tmp_path / "tasks.jsonl", *tasks(20))).size == 20
    with pytest.raises(UserError, match="found id 't0' again"):
        JsonlTasks(write(tmp_path / "tasks.jsonl", *tasks(20), *tasks(1)))


def test_replacing_a_file_during_use_does_not_change_the_tasks(tmp_path, cache):
    path = tmp_path / "tasks.jsonl"
    source = JsonlTasks(write(path, *tasks(9)))
    os.replace(write(tmp_path / "new", *tasks(3)), path)
    assert source[8].id == "t8"


def test_overwriting_a_file_during_use_is_an_error(tmp_path, cache):
    path = tmp_path / "tasks.jsonl"
    source = JsonlTasks(write(path, *tasks(9)))
    with path.open("ab") as file:
        file.write(b'{"prompt": "more"}\n')
    assert source[8].id == "t8", "appended lines must not change anything"
    write(path, *reversed(tasks(9)))
    with pytest.raises(UserError, match=r"tasks\.jsonl:1: the file was changed while the run was using it"):
        source[0]


@pytest.mark.parametrize("name", ["index.npz", "notes.json", "text.jsonl"])
@pytest.mark.parametrize("left", [b"{", None])
def test_a_damaged_cache_is_recreated(tmp_path, cache, parsed, name, left):
    path = write(tmp_path / "tasks.jsonl.gz", *tasks(9))
    JsonlTasks(path)
    (kept,) = cache.glob(f"tasks/*/{name}")
    kept.unlink()
    if left is not None:
        kept.write_bytes(left)
    del parsed[:]
    if (name, left) == ("text.jsonl", b"{"):
        with pytest.raises(UserError, match="the file was changed"):
            JsonlTasks(path)[8]
    else:
        assert JsonlTasks(path)[8].id == "t8"
        assert len(parsed) == 10
    assert not list(cache.glob("tasks/*partial*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_cannot_be_written_gives_a_warning(tmp_path, monkeypatch, name):
    monkeypatch.setattr(lines, "SMALL", 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "file"))
    path = write(tmp_path / name, *tasks(9))
    with pytest.warns(UserWarning, match=r"its index cannot be stored .* every start recreates it"):
        source = JsonlTasks(path)
    assert source[8].id == "t8"


def test_small_files_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for name in NAMES:
        JsonlTasks(write(tmp_path / name, *tasks(9)))
    assert not (tmp_path / "cache").exists()


def test_memory_holds_only_the_index(tmp_path, cache):
    source = JsonlTasks(write(tmp_path / "tasks.jsonl", *({"prompt": "x" * 200} for _ in range(2000))))
    found = source._lines
    assert sum(column.nbytes for column in found.index.values()) <= 32 * 2000
    assert not isinstance(found._text, bytes)


def problem(i: int, answer: str) -> dict:
    return {"question": f"{i} and 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {answer}"}


def test_gsm8k_files_are_read_by_index(tmp_path, cache):
    path = write(tmp_path / "gsm.jsonl", *(problem(i, str(i + 1)) for i in range(30)), problem(5, "6") | {"number": 99})
    source = GSM8KTasks(path)
    assert (source.size, source[30].id, source[4].meta["answer"]) == (31, "gsm8k-train-99", "5")
    assert source[3].reference == "It is 4.\n#### 4"
    assert GSM8KTasks(path).fingerprint == source.fingerprint
    with pytest.raises(UserError, match="no problem has between 2 and 3 calculator marks"):
        GSM8KTasks(path, min_marks=2, max_marks=3)
    with pytest.raises(UserError, match=r"gsm\.jsonl:2: expected the keys question and answer"):
        GSM8KTasks(write(tmp_path / "gsm.jsonl", problem(1, "2"), {"question": "?"}))
    demonstrations = GSM8KDemonstrations(write(tmp_path / "gsm.jsonl", problem(1, "2"), problem(2, "3")))
    assert {demonstrations[i].task.id for i in range(2)} == {"gsm8k-train-1", "gsm8k-train-2"}
    assert copy.deepcopy(demonstrations)[0].messages == demonstrations[0].messages


def test_lines_that_look_skips_are_not_indexed(tmp_path, cache):
    path = write(tmp_path / "x.jsonl", *({"n": i} for i in range(10)))
    for notes in ({}, {}):

        def look(number: int, line: dict, notes=notes) -> str | None:
            notes.setdefault("n", number)
            return str(number) if number % 2 else None

        found = index_lines(path, "odd", look, notes)
        assert [found[i][1]["n"] for i in range(len(found))] == [0, 2, 4, 6, 8]
        assert found.notes == {"n": 1}
